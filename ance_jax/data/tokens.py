"""Tokenizes texts into token rows on disk, once per tokenizer, length and text.

Token rows are unpadded and concatenated in one flat array, with offsets.
Compared with fixed-width rows, Arrow and ArrayRecord, this is the smallest on
disk and, after plain memory maps, by far the fastest for random reads.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
from typing import NamedTuple

import numpy as np

from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import strings
from ance_jax.data import tokenizer as tokenizer_lib

_ROWS_AT_ONCE = 4096
# Half a million rows, the most work that a killed process loses.
_BATCHES_A_PART = 128


class TokenRows(NamedTuple):
  """Tokens of N texts; row i is ids[offsets[i]:offsets[i + 1]].

  A text has one row or, if documents are cut into pieces, the rows from
  first[i] to first[i + 1], of R in all.

  Attributes:
    ids: (T,) uint16 or uint32 token ids, including special tokens.
    offsets: (R + 1,) int64.
    pad_id: Token id of padding.
    hash: Hash of the tokenizer, the length and the texts.
    first: (N + 1,) int64; None if texts are not cut, so that N = R.
  """

  ids: np.ndarray
  offsets: np.ndarray
  pad_id: int
  hash: str
  first: np.ndarray | None = None

  def __len__(self):
    return len(self.offsets if self.first is None else self.first) - 1

  def pieces(self) -> 'TokenRows':
    """Returns the R pieces as `TokenRows` of R texts."""
    return TokenRows(self.ids, self.offsets, self.pad_id, self.hash)

  def texts_of_pieces(self) -> np.ndarray | None:
    """Returns the text row of each piece, (R,) int32; None without `first`."""
    if self.first is None:
      return None
    return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.first))

  def lengths(self) -> np.ndarray:
    """Returns the number of tokens per row, (R,) int32."""
    return np.diff(self.offsets).astype(np.int32)

  def rows_of_pieces(self, texts: np.ndarray, number: int) -> np.ndarray:
    """Returns the rows of the pieces of some texts.

    Args:
      texts: (n,) int, -1 for none.
      number: C, the maximum number of pieces per text.

    Returns:
      (n, C) int, -1 for absent pieces.
    """
    if self.first is None:
      return texts[:, None]
    start, end = self.first[texts], self.first[texts + 1]
    rows = start[:, None] + np.arange(number)
    return np.where((rows < end[:, None]) & (texts >= 0)[:, None], rows, -1)

  def lengths_of(self, rows: np.ndarray) -> np.ndarray:
    """Returns the numbers of tokens of rows of any shape, 0 for -1."""
    return np.where(rows < 0, 0, self.offsets[rows + 1] - self.offsets[rows])

  def copy(
    self, rows: np.ndarray, target: np.ndarray, starts: np.ndarray
  ) -> None:
    """Writes the tokens of (n,) rows into a flat array.

    Args:
      rows: (n,) int, -1 for none.
      target: (m,) int array.
      starts: (n,) int, where in `target` the first token of each row goes.
    """
    lengths = self.lengths_of(rows)
    within = np.arange(lengths.sum())
    within -= np.repeat(np.cumsum(lengths) - lengths, lengths)
    target[np.repeat(starts, lengths) + within] = self.ids[
      np.repeat(self.offsets[rows], lengths) + within
    ]

  def padded(
    self, rows: Sequence[int] | np.ndarray, length: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns some rows, padded on the right.

    Args:
      rows: (n,) int; -1 gives a row of one padding token, whose embedding is
        finite and unused.
      length: Number of columns, at least the longest row.

    Returns:
      (n, length) int32 token ids, and (n,) int32 numbers of tokens.
    """
    rows = np.asarray(rows)
    starts = self.offsets[rows]
    lengths = np.where(rows < 0, 0, self.offsets[rows + 1] - starts)
    real = np.arange(length) < lengths[:, None]
    ids = np.full(real.shape, self.pad_id, np.int32)
    ids[real] = self.ids[(starts[:, None] + np.arange(length))[real]]
    return ids, np.maximum(lengths, 1).astype(np.int32)


def passage_texts(
  corpus: corpus_lib.Corpus, separator: str, prompt: str = ''
) -> '_PassageTexts':
  """Returns an iterable, with `len`, of the text to tokenize per passage.

  The text is the title, if any, and the text of the passage.

  With BERT's separator token this is DPR's pair, [CLS] title [SEP] text [SEP].
  DPR's code truncates the longer of the two until both fit; here the end is cut
  before [SEP] is added, which is the same unless a title takes more than half
  of the tokens. No spaces surround the token, because transformers 2, which
  tokenized ANCE's documents, strips them.

  Args:
    corpus: All passages.
    separator: Text between the two; `tokenizer.SPACE` unless for an encoder.
    prompt: Prefix of each text.
  """
  return _PassageTexts(corpus, separator, prompt)


def passage_text(title, text, separator, prompt):
  """Returns the text of one passage to tokenize; see `passage_texts`."""
  title = title.replace(corpus_lib.TITLE_PART, separator)
  return prompt + (f'{title}{separator}{text}' if title else text)


@dataclasses.dataclass(frozen=True)
class _PassageTexts:
  corpus: corpus_lib.Corpus
  separator: str
  prompt: str

  def __len__(self):
    return len(self.corpus.texts)

  def __iter__(self):
    for row in zip(self.corpus.titles, self.corpus.texts, strict=True):
      yield passage_text(*row, self.separator, self.prompt)


class Cut(NamedTuple):
  """How texts are cut to the encoder's length.

  Attributes:
    length: Maximum number of tokens, including special tokens.
    pieces: Maximum number of pieces per text, each of up to `length` tokens
      (MaxP); 1 keeps only the first (FirstP).
    whole: Whether to tokenize a text once, with special tokens around it, and
      then cut it, as ANCE's code does. Otherwise each piece has its own.
  """

  length: int
  pieces: int = 1
  whole: bool = False


def token_rows(
  tokenizer: tokenizer_lib.Tokenizer,
  texts: Iterable[str],
  *,
  what: str,
  num_texts: int,
  cut: Cut,
  content_hash: str,
  folder: str | os.PathLike,
  spread: Callable | None = None,
) -> TokenRows:
  """Returns the `TokenRows` of some texts, from disk if they exist.

  Args:
    tokenizer: A fast tokenizer.
    texts: One text per row.
    what: Name of the texts, such as 'passages'.
    num_texts: Number of texts.
    cut: How to cut them; a printed line counts the cut texts.
    content_hash: Hash of the texts, or of everything they depend on.
    folder: Where token rows are stored, as memory maps. One process at a time
      tokenizes there; others wait for it.
    spread: spread(function, tasks) calls function(task) for each task, possibly
      on other machines; None tokenizes in this process, on all its cores. The
      bytes are the same.
  """
  backend = tokenizer_lib.backend(tokenizer)
  of_cut = f'{cut.length}' if cut.pieces == 1 else f'{tuple(cut)}'
  key = hashlib.sha256(
    f'{backend.to_str()} {of_cut} {content_hash}'.encode()
  ).hexdigest()
  kept = pathlib.Path(folder) / f'{what}-{key[:16]}'

  def make():
    # Leftovers of a killed process; a run cleans only its own folder.
    atomic.remove_unfinished(folder)
    _enable_truncation(backend, cut)
    batches = logs.progress(
      strings.batches(texts, _ROWS_AT_ONCE),
      f'{"hand out" if spread else "tokenize"} {what}',
      total=num_texts,
      unit='texts',
      count=len,
    )
    num_parts = math.ceil(num_texts / (_BATCHES_A_PART * _ROWS_AT_ONCE))
    if spread or num_parts > 1:
      _tokenize_in_parts(backend, batches, num_parts, kept, cut, spread)
    else:
      _tokenize(backend, batches, kept, cut)
    return atomic.read_manifest(kept)

  # Looks without the lock first, because the folder may be read-only.
  manifest = atomic.find_valid(kept, {})
  if manifest is None:
    waiting = f'{folder}: another process tokenizes there; waiting for it'
    with atomic.exclusive(folder, functools.partial(logs.log, waiting)):
      manifest = atomic.find_valid(kept, {}) or make()
  ids, offsets, first = _stored(kept, manifest, cut)
  pieces = f' in {len(offsets) - 1:,} pieces' if cut.pieces > 1 else ''
  logs.log(
    f'{what}: {num_texts:,} rows{pieces} of {manifest["mean_length"]:.1f} '
    f'tokens in the mean, {manifest["num_cut"]:,} of them cut at '
    f'{cut.length * cut.pieces}'
  )
  return TokenRows(ids, offsets, tokenizer.pad_token_id, key, first)


def memory_rows(
  tokenizer: tokenizer_lib.Tokenizer,
  texts: Sequence[str],
  length: int,
  pieces: int = 1,
  whole: bool = False,
) -> TokenRows:
  """Returns the `TokenRows` of a few texts, in memory only.

  Args:
    tokenizer: As for `token_rows`.
    texts: The texts.
    length: As in `Cut`.
    pieces: As in `Cut`.
    whole: As in `Cut`.
  """
  cut = Cut(length, pieces, whole)
  backend = tokenizer_lib.backend(tokenizer)
  _enable_truncation(backend, cut)
  ids, lengths, numbers, _ = _encode(backend, texts, cut, np.uint32)
  first = _offsets(numbers) if cut.pieces > 1 else None
  return TokenRows(ids, _offsets(lengths), tokenizer.pad_token_id, '', first)


def _stored(folder, manifest, cut):
  """Loads (ids, offsets, first) published by `_tokenize`."""
  try:
    ids = np.memmap(folder / 'ids.bin', manifest['dtype'], 'r')
    offsets = np.load(folder / 'offsets.npy')
    first = np.load(folder / 'first.npy') if cut.pieces > 1 else None
    if offsets.dtype == np.int64 and offsets[-1] == len(ids):
      return ids, offsets, first
    reason = f'{offsets.dtype} offsets for {len(ids):,} tokens'
  except (ValueError, KeyError, TypeError, IndexError) as error:
    reason = str(error).splitlines()[0]
  raise strict_io.refusal(
    folder,
    f'the token rows are not those that were written ({reason})',
    'remove the folder: they are made again',
  )


def _tokenize(backend, batches, folder, cut):
  """Tokenizes batches of texts and publishes their token rows as `folder`."""
  # Ids may exceed the number of entries, because some vocabularies have gaps.
  narrow = max(backend.get_vocab().values()) <= np.iinfo(np.uint16).max
  dtype = np.dtype(np.uint16 if narrow else np.uint32)

  blocks = (_encode(backend, batch, cut, dtype) for batch in batches)
  _publish(folder, blocks, dtype.name, cut)


def _encode(backend, texts, cut, dtype):
  """Returns a block for `_publish`: some texts, tokenized."""
  found = [_rows_of(e, cut) for e in backend.encode_batch_fast(texts)]
  rows = [np.array(ids, dtype) for pieces, _ in found for ids in pieces]
  return (
    # One that is empty, so that there may be no text.
    np.concatenate([np.zeros(0, dtype), *rows]),
    list(map(len, rows)),
    [len(pieces) for pieces, _ in found],
    sum(is_cut for _, is_cut in found),
  )


def _publish(folder, blocks, dtype, cut):
  """Publishes token rows as `folder`.

  Args:
    folder: Path of the folder.
    blocks: Iterable of ids, their number per row, the number of rows per text,
      and the number of texts that are cut.
    dtype: Name of the type of all ids.
    cut: How the texts are cut.
  """
  lengths, numbers = [], []
  num_cut, manifest = 0, {}
  with atomic.publish(folder, manifest) as unfinished:
    with open(unfinished / 'ids.bin', 'wb') as file:
      for ids, of_rows, of_texts, cut_here in blocks:
        file.write(ids)
        lengths.append(np.fromiter(of_rows, np.int64))
        numbers.append(np.fromiter(of_texts, np.int64))
        num_cut += cut_here
    whole = np.concatenate(lengths)
    np.save(unfinished / 'offsets.npy', _offsets(whole))
    if cut.pieces > 1:
      np.save(unfinished / 'first.npy', _offsets(np.concatenate(numbers)))
    manifest.update(
      dtype=dtype, mean_length=float(np.mean(whole)), num_cut=num_cut
    )


def _enable_truncation(backend, cut):
  backend.enable_truncation(cut.length * (cut.pieces if cut.whole else 1))


def _offsets(lengths):
  """Returns the (n + 1,) int64 offsets of n consecutive parts."""
  return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _rows_of(encoding, cut):
  """Returns the ids of a text's pieces, and whether it was cut."""
  if cut.pieces > 1 and cut.whole:
    ids = encoding.ids
    rows = [ids[i : i + cut.length] for i in range(0, len(ids), cut.length)]
    return rows, bool(encoding.overflowing)
  # The tokenizer puts special tokens around each piece.
  rows = [encoding, *encoding.overflowing]
  return [r.ids for r in rows[: cut.pieces]], len(rows) > cut.pieces


def tokenize_part(
  part: pathlib.Path, tokenizer_file: str | os.PathLike, cut: Cut
) -> None:
  """Publishes the token rows of a part, whose texts are stored next to it.

  Args:
    part: Path of the folder to publish.
    tokenizer_file: Path of a tokenizer.json that includes its truncation.
    cut: How to cut the texts.
  """
  if not atomic.find_valid(part, {}):
    backend = tokenizer_lib.read_backend(tokenizer_file)
    texts = strings.load(_texts_of(part))
    _tokenize(backend, strings.batches(texts, _ROWS_AT_ONCE), part, cut)


def _tokenize_in_parts(backend, batches, num_parts, folder, cut, spread):
  """Same as `_tokenize`, but a killed process resumes with the next part."""
  folder_of_parts = folder.with_name(f'{folder.name}-parts')
  parts = [folder_of_parts / f'{number:05d}' for number in range(num_parts)]
  batches = iter(batches)
  for part in parts:
    some = itertools.islice(batches, _BATCHES_A_PART)
    if not atomic.find_valid(part, {}):
      if not spread:
        _tokenize(backend, some, part, cut)
      elif not atomic.find_valid(_texts_of(part), {}):
        with atomic.publish(_texts_of(part), {}) as unfinished:
          strings.make(itertools.chain.from_iterable(some)).save(unfinished)
    for _ in some:  # Skips the texts of a part that is there.
      pass
  if next(batches, None) is not None:  # This also closes the progress bar.
    raise ValueError(f'{folder.name} has more texts than {num_parts} parts')
  if spread:
    file = folder_of_parts / 'tokenizer.json'
    atomic.write_text(file, backend.to_str())
    logs.log(f'{folder.name}: workers tokenize {num_parts:,} parts')
    spread(
      functools.partial(tokenize_part, tokenizer_file=file, cut=cut), parts
    )
  _join(parts, folder, cut)
  atomic.remove_folder(folder_of_parts)


def _texts_of(part):
  return part.with_name(f'{part.name}-texts')


def _join(parts, folder, cut):
  """Concatenates the token rows of parts and publishes them as `folder`."""
  manifests = [atomic.read_manifest(part) for part in parts]

  def blocks():
    for part, manifest in zip(parts, manifests, strict=True):
      ids, offsets, first = _stored(part, manifest, cut)
      of_texts = [] if first is None else np.diff(first)
      yield ids, np.diff(offsets), of_texts, manifest['num_cut']

  _publish(folder, blocks(), manifests[0]['dtype'], cut)
