"""Text -> token rows on disk, made once per tokenizer, length and text.

A token row has no padding; rows lie one behind the other in one flat array,
with offsets (measured against fixed-width rows, Arrow and ArrayRecord: the
smallest on disk, and far the fastest to read at random after plain memory
maps).
"""

import hashlib
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np
import tokenizers
import transformers

from ance_jax import config as config_lib
from ance_jax import handoff
from ance_jax import logs
from ance_jax import reading

PAD, UNKNOWN, CLS, SEP, MASK = '[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'
Tokenizer = transformers.PreTrainedTokenizerFast
# Between title and text, as in BEIR and sentence-transformers.
SPACE = ' '
_ROWS_AT_ONCE = 4096


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


def train_vocabulary(texts, vocab_size):
  """Returns a transformers tokenizer with a vocabulary trained on `texts`.

  Byte pairs over lower-cased words and single punctuation marks. The library's
  WordPiece trainer is not used: it gives another vocabulary at every call.

  Args:
    texts: Iterable of strings.
    vocab_size: Entries at most, special tokens included.
  """
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNKNOWN))
  tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  special = [PAD, UNKNOWN, CLS, SEP, MASK]
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=special,
    limit_alphabet=500,
    show_progress=True,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=f'{CLS} $A {SEP}',
    pair=f'{CLS} $A {SEP} $B {SEP}',
    special_tokens=[(t, special.index(t)) for t in (CLS, SEP)],
  )
  return Tokenizer(
    tokenizer_object=tokenizer,
    pad_token=PAD,
    unk_token=UNKNOWN,
    cls_token=CLS,
    sep_token=SEP,
    mask_token=MASK,
  )


def load_tokenizer(name):
  """Returns the transformers tokenizer of a folder or hub name.

  Raises:
    BadInput: There is none, it needs code of its own, or it cannot do what
      is asked of one here.
  """
  _check_tokenizer_files(name)
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      name, trust_remote_code=False
    )
  except Exception as error:  # Its parsers raise any kind.
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip('.')
    raise config_lib.BadInput(
      f'a model must come with its tokenizer; found none that loads at {name} '
      f'({reason}); check --init_from.'
    ) from error
  if not tokenizer.is_fast:
    raise config_lib.BadInput(
      'a tokenizer must be a fast one (tokenizer.json); found '
      f'{type(tokenizer).__name__} at {name}; convert it with transformers.'
    )
  if tokenizer.pad_token_id is None:
    raise config_lib.BadInput(
      f'a tokenizer must have a padding token; found none at {name}; name it '
      'as pad_token in tokenizer_config.json.'
    )
  if not _backend(tokenizer).encode('').ids:
    raise config_lib.BadInput(
      'a tokenizer must put special tokens around a text; found none around '
      f'an empty one at {name}; add its post_processor to tokenizer.json.'
    )
  return _plain(tokenizer)


def check_case(tokenizer, name):
  """Raises `BadInput` if a tokenizer's files and its class differ on case.

  What ANCE's tokenizer lower-cased with transformers 2, that of transformers 5
  does not: the class of RoBERTa takes no notice of `do_lower_case`, nor of what
  tokenizer.json says.

  Args:
    tokenizer: What `load_tokenizer` gave.
    name: Folder or hub name that it is of.
  """
  said, does = _says_lower_case(name), _lower_cases(tokenizer)
  if said not in (None, does):
    cases, keeps = 'one that lower-cases', 'one that keeps capitals'
    raise config_lib.BadInput(
      'a tokenizer must lower-case if its files say so, and only then; found '
      f'{cases if does else keeps}, and files of {cases if said else keeps}, '
      f'at {name}; set --lower_case or --nolower_case, or mend '
      'tokenizer_config.json.'
    )


def set_flavour(tokenizer, *, lower_case, prefix_space):
  """Makes a tokenizer change texts first, as a part of its tokenizer.json.

  So it cannot be forgotten where a text is tokenized, and is saved with it.

  Args:
    tokenizer: A fast transformers tokenizer.
    lower_case: Whether texts are lower-cased; None: as it is.
    prefix_space: Whether a space is put before each text; None: as it is.

  Raises:
    BadInput: It cannot do what is asked for.
  """
  backend = tokenizer.backend_tokenizer
  if lower_case is False and _lower_cases(tokenizer):
    raise config_lib.BadInput(
      '--lower_case must be true, or left out, with a tokenizer that '
      'lower-cases; found it false; use a checkpoint that has capitals.'
    )
  if lower_case and not _lower_cases(tokenizer):
    # Letter by letter: unlike Python's lower(), which ANCE used, it makes an
    # upper-case sigma at the end of a word a sigma like others.
    steps = [tokenizers.normalizers.Lowercase()]
    if backend.normalizer is not None:
      steps.append(backend.normalizer)
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
  if prefix_space is not None:
    if not isinstance(
      backend.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel
    ):
      raise config_lib.BadInput(
        '--prefix_space must be left out for a tokenizer that is not '
        f'byte-level; found it {str(prefix_space).lower()}; leave it out.'
      )
    backend.pre_tokenizer.add_prefix_space = prefix_space


def title_separator(tokenizer, name):
  """Returns the text that `--title_separator` names: 'space' or 'token'."""
  if name == 'space':
    return SPACE
  if tokenizer.sep_token is None:
    raise config_lib.BadInput(
      '--title_separator must be space for a tokenizer without a separator '
      'token; found token; set it so.'
    )
  return tokenizer.sep_token


def passage_texts(corpus, separator):
  """Yields what is tokenized of each passage: title, if any, and text.

  With BERT's separator token this is the pair of DPR, [CLS] title [SEP] text
  [SEP]. DPR's code shortens the longer of the two until both fit; here the end
  is cut, and then [SEP] added, which is the same unless a title takes more than
  half of the tokens. No spaces are around the token: transformers 2, with which
  ANCE's documents were tokenized, strips them.

  Args:
    corpus: `corpora.Corpus`.
    separator: What stands between the two; `SPACE` for all but an encoder.
  """
  for title, text in zip(corpus.titles, corpus.texts, strict=True):
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
  backend = _backend(tokenizer)
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
    _tokenize(backend, batches, kept)
    manifest = handoff.read_manifest(kept)
  logs.say(
    f'{what}: {num_texts:,} rows of {manifest["mean_length"]:.1f} tokens in '
    f'the mean, {manifest["num_cut"]:,} of them cut at {length}'
  )
  return TokenRows(*_stored(kept, manifest), tokenizer.pad_token_id, key)


def memory_rows(tokenizer, texts, length):
  """Returns the `TokenRows` of a few texts, kept in memory only."""
  backend = _backend(tokenizer)
  backend.enable_truncation(length)
  rows = [encoding.ids for encoding in backend.encode_batch_fast(texts)]
  offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in rows])])
  return TokenRows(
    np.concatenate(rows).astype(np.uint32), offsets, tokenizer.pad_token_id, ''
  )


def _check_tokenizer_files(folder):
  """Raises `BadInput` if JSON files of a local tokenizer cannot be used."""
  for name in ('tokenizer_config.json', 'special_tokens_map.json'):
    path = pathlib.Path(folder) / name
    if os.path.lexists(path) and 'auto_map' in reading.json_file(path):
      raise reading.bad(
        path,
        'a tokenizer must need no code of its own',
        'auto_map',
        'use a model of a class that transformers has',
      )
  path = pathlib.Path(folder) / 'tokenizer.json'
  if os.path.lexists(path):
    reading.json_file(path)


def _plain(tokenizer):
  """Returns a tokenizer that is what its tokenizer.json says, and no more.

  Classes such as RobertaTokenizer make their own when they are read back, of
  the vocabulary alone: what was added to it would be lost without a word.
  """
  names = ('pad', 'unk', 'cls', 'sep', 'mask', 'bos', 'eos')
  special = {f'{n}_token': getattr(tokenizer, f'{n}_token') for n in names}
  return Tokenizer(
    tokenizer_object=tokenizer.backend_tokenizer,
    model_max_length=tokenizer.model_max_length,
    **{name: token for name, token in special.items() if token is not None},
  )


def _says_lower_case(name):
  """Returns whether a tokenizer lower-cases by its files; None: not said."""
  settings = transformers.models.auto.tokenization_auto.get_tokenizer_config
  said = settings(name).get('do_lower_case')
  if isinstance(said, bool):
    return said
  path = transformers.utils.cached_file(
    name, 'tokenizer.json', _raise_exceptions_for_missing_entries=False
  )
  if path is None:
    return None
  normalizer = json.dumps(reading.json_file(path).get('normalizer'))
  return '"Lowercase"' in normalizer or '"lowercase": true' in normalizer


def _lower_cases(tokenizer):
  normalizer = tokenizer.backend_tokenizer.normalizer
  return normalizer is not None and normalizer.normalize_str('A') == 'a'


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


def _backend(tokenizer):
  """Returns the `tokenizers.Tokenizer`, without the limits some files bring."""
  backend = tokenizer.backend_tokenizer
  backend.no_truncation()
  backend.no_padding()
  return backend


def _tokenize(backend, batches, folder):
  """Publishes the ragged token rows of batches of texts as `folder`."""
  narrow = backend.get_vocab_size() <= np.iinfo(np.uint16).max + 1
  dtype = np.dtype(np.uint16 if narrow else np.uint32)
  lengths, num_cut, manifest = [], 0, {}
  with handoff.publish(folder, manifest) as unfinished:
    with open(unfinished / 'ids.bin', 'wb') as file:
      for batch in batches:
        encodings = backend.encode_batch_fast(batch)
        ids = [np.array(encoding.ids, dtype) for encoding in encodings]
        file.write(np.concatenate(ids).tobytes())
        lengths += map(len, ids)
        num_cut += sum(bool(e.overflowing) for e in encodings)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    np.save(unfinished / 'offsets.npy', offsets)
    manifest['dtype'] = dtype.name
    manifest['mean_length'] = float(np.mean(lengths))
    manifest['num_cut'] = num_cut


def _batches(texts):
  batch = []
  for text in texts:
    batch.append(text)
    if len(batch) == _ROWS_AT_ONCE:
      yield batch
      batch = []
  if batch:
    yield batch
