"""Text -> token rows on disk, made once per tokenizer, length and text.

A token row has no padding; rows lie one behind the other in one flat array,
with offsets (measured against fixed-width rows, Arrow and ArrayRecord: the
smallest on disk, and far the fastest to read at random after plain memory
maps).
"""

import array
import collections
import hashlib
import itertools
import pathlib
from typing import NamedTuple

import numpy as np

from ance_jax import data
from ance_jax import handoff
from ance_jax import logs
from ance_jax import reading
from ance_jax import tokenizer as tokenizer_lib

_ROWS_AT_ONCE = 4096
# Half a million rows: what a kill can cost.
_BATCHES_A_PART = 128


class TokenRows(NamedTuple):
  """Tokens of N texts; row i is ids[offsets[i]:offsets[i + 1]].

  Attributes:
    ids: (T,) uint16 or uint32, token ids, special tokens included.
    offsets: (N + 1,) int64.
    pad_id: Token id that padding is made of.
    hash: Hash of the tokenizer, the length and the texts.
  """

  ids: np.ndarray
  offsets: np.ndarray
  pad_id: int
  hash: str

  def __len__(self):
    return len(self.offsets) - 1

  def lengths(self):
    """Returns the (N,) int32 numbers of tokens."""
    return np.diff(self.offsets).astype(np.int32)

  def padded(self, rows, length):
    """Returns the token ids of some rows, padded on the right.

    Args:
      rows: (n,) int, rows to take; -1 gives a row of one padding token, which
        encodes to something finite that nobody reads.
      length: Columns of the result, at least the longest row.

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


def passage_texts(corpus, separator):
  """Yields what is tokenized of each passage: title, if any, and text.

  With BERT's separator token this is the pair of DPR, [CLS] title [SEP] text
  [SEP]. DPR's code shortens the longer of the two until both fit; here the end
  is cut, and then [SEP] added, which is the same unless a title takes more than
  half of the tokens. No spaces are around the token: transformers 2, with which
  ANCE's documents were tokenized, strips them.

  Args:
    corpus: `data.Corpus`.
    separator: What stands between the two; `tokenizer.SPACE` for all but an
      encoder.
  """
  for title, text in zip(corpus.titles, corpus.texts, strict=True):
    title = title.replace(data.TITLE_PART, separator)
    yield f'{title}{separator}{text}' if title else text


def token_rows(
  tokenizer, texts, *, what, num_texts, length, content_hash, folder
):
  """Returns the `TokenRows` of some texts, from disk if they are there.

  Args:
    tokenizer: A fast transformers tokenizer.
    texts: Iterable of strings, one a row.
    what: 'passages' or another name for people.
    num_texts: Number of `texts`.
    length: Tokens at most; what is cut is counted in a printed line.
    content_hash: Hash of the texts, or of all that they are made of.
    folder: Where token rows are kept, as memory maps.
  """
  backend = tokenizer_lib.backend(tokenizer)
  key = hashlib.sha256(
    f'{backend.to_str()} {length} {content_hash}'.encode()
  ).hexdigest()
  kept = pathlib.Path(folder) / f'{what}-{key[:16]}'
  manifest = handoff.find(kept, {})
  if manifest is None:
    backend.enable_truncation(length)
    batches = logs.progress(
      _batches(texts),
      f'tokenize {what}',
      total=num_texts,
      unit='texts',
      count=len,
    )
    if num_texts > _BATCHES_A_PART * _ROWS_AT_ONCE:
      _tokenize_in_parts(backend, iter(batches), kept)
    else:
      _tokenize(backend, batches, kept)
    manifest = handoff.read_manifest(kept)
  logs.say(
    f'{what}: {num_texts:,} rows of {manifest["mean_length"]:.1f} tokens in '
    f'the mean, {manifest["num_cut"]:,} of them cut at {length}'
  )
  return TokenRows(*_stored(kept, manifest), tokenizer.pad_token_id, key)


def memory_rows(tokenizer, texts, length):
  """Returns the `TokenRows` of a few texts, kept in memory only."""
  backend = tokenizer_lib.backend(tokenizer)
  backend.enable_truncation(length)
  rows = [encoding.ids for encoding in backend.encode_batch_fast(texts)]
  offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in rows])])
  return TokenRows(
    np.concatenate(rows).astype(np.uint32), offsets, tokenizer.pad_token_id, ''
  )


def _stored(folder, manifest):
  """Returns the ids and offsets of a folder that `_tokenize` published."""
  try:
    ids = np.memmap(folder / 'ids.bin', manifest['dtype'], 'r')
    offsets = np.load(folder / 'offsets.npy')
    if offsets.dtype == np.int64 and offsets[-1] == len(ids):
      return ids, offsets
    reason = f'{offsets.dtype} offsets for {len(ids):,} tokens'
  except (ValueError, KeyError, TypeError, IndexError) as error:
    reason = str(error).splitlines()[0]
  raise reading.bad(
    folder,
    'token rows must be as they were written',
    f'others ({reason})',
    'remove the folder: they are made again',
  )


def _tokenize(backend, batches, folder):
  """Publishes the ragged token rows of batches of texts as `folder`."""
  narrow = backend.get_vocab_size() <= np.iinfo(np.uint16).max + 1
  dtype = np.dtype(np.uint16 if narrow else np.uint32)
  lengths, num_cut, manifest = array.array('q'), 0, {}
  with handoff.publish(folder, manifest) as unfinished:
    with open(unfinished / 'ids.bin', 'wb') as file:
      for batch in batches:
        encodings = backend.encode_batch_fast(batch)
        ids = [np.array(encoding.ids, dtype) for encoding in encodings]
        file.write(np.concatenate(ids).tobytes())
        lengths.extend(map(len, ids))
        num_cut += sum(bool(e.overflowing) for e in encodings)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    np.save(unfinished / 'offsets.npy', offsets)
    manifest['dtype'] = dtype.name
    manifest['mean_length'] = float(np.mean(lengths))
    manifest['num_cut'] = num_cut


def _tokenize_in_parts(backend, batches, folder):
  """Does what `_tokenize` does, and after a kill goes on with the next part."""
  parts, whole = folder.with_name(f'{folder.name}-parts'), []
  while (first := next(batches, None)) is not None:
    rest = itertools.islice(batches, _BATCHES_A_PART - 1)
    part = parts / f'{len(whole):05d}'
    if handoff.find(part, {}):
      collections.deque(rest, 0)  # Goes past these texts.
    else:
      _tokenize(backend, itertools.chain([first], rest), part)
    whole.append(part)
  manifests = [handoff.read_manifest(part) for part in whole]
  stored = [_stored(*pair) for pair in zip(whole, manifests, strict=True)]
  lengths = np.concatenate([np.diff(offsets) for _, offsets in stored])
  manifest = {
    'dtype': manifests[0]['dtype'],
    'mean_length': float(lengths.mean()),
    'num_cut': sum(each['num_cut'] for each in manifests),
  }
  with handoff.publish(folder, manifest) as unfinished:
    with open(unfinished / 'ids.bin', 'wb') as file:
      for ids, _ in stored:
        file.write(ids)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    np.save(unfinished / 'offsets.npy', offsets)
  handoff.remove_folder(parts)


def _batches(texts):
  batch = []
  for text in texts:
    batch.append(text)
    if len(batch) == _ROWS_AT_ONCE:
      yield batch
      batch = []
  if batch:
    yield batch
