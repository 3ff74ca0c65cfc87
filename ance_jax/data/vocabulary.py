"""Trains a byte-pair vocabulary on the texts of a corpus."""

import collections
from collections.abc import Collection
import itertools
import json
import threading

import tokenizers

from ance_jax import errors
from ance_jax.core import logs

PAD, UNKNOWN, CLS, SEP, MASK = '[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'
SPECIAL = (PAD, UNKNOWN, CLS, SEP, MASK)

# In a corpus with more letters than this, rare letters are encoded as bytes.
# The common ones are at least this many and at least this share of the text.
_MOST_LETTERS, _COMMON = 500, 0.9995
_BYTES = tuple(f'<0x{number:02X}>' for number in range(256))
# Maximum letters per word for the trainer, which takes quadratic time.
_MOST_OF_WORD = 1_000
_SAMPLE = 1_000
_POLL_SECS = 0.1


def train(texts: Collection[str], size: int) -> tokenizers.Tokenizer:
  """Returns a tokenizer with a vocabulary trained on `texts`.

  Byte pairs over lower-cased words and single punctuation marks. Not the
  library's WordPiece trainer, which is not deterministic.

  Args:
    texts: Texts, which are iterated over twice.
    size: Maximum number of entries, including special tokens.

  Raises:
    BadInput: `size` is too small.
    Stopped: A stop signal came.
  """
  raw, sample = _count(texts)
  normalizer, kept = tokenizers.normalizers.BertNormalizer(), []
  letters = _letters(raw, normalizer)
  with_bytes = len(letters) > _MOST_LETTERS
  _check(size, len(letters), with_bytes)
  if with_bytes:
    normalizer = _keeping_marks()
    letters = _letters(raw, normalizer)
    kept = _common(letters, (size - len(SPECIAL) - len(_BYTES)) // 2)
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNKNOWN))
  tokenizer.normalizer = normalizer
  pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  tokenizer.pre_tokenizer = pre_tokenizer
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size - len(_BYTES) * with_bytes,
    special_tokens=list(SPECIAL),
    initial_alphabet=kept,
    limit_alphabet=len(kept) or _MOST_LETTERS,
    show_progress=logs.has_bars(),
  )
  _run(
    tokenizer,
    trainer,
    (_cut(text, normalizer, pre_tokenizer) for text in texts),
  )
  if with_bytes:
    _add_bytes(tokenizer)
  logs.log(_summary(tokenizer, sample, len(letters), len(kept)))
  return tokenizer


def _count(texts):
  """Returns {character: count} of the texts, and the beginnings of some."""
  counts, sample = collections.Counter(), []
  step = max(1, len(texts) // _SAMPLE)
  texts = logs.progress(texts, 'count letters', total=len(texts), unit='texts')
  for number, text in enumerate(texts):
    counts.update(text)
    if number % step == 0:
      sample.append(text[:_SAMPLE])
  return counts, sample


def _letters(characters, normalizer):
  """Returns {letter: count} after normalizing {character: count}.

  The normalizer treats each character alone, and words are separated by spaces.
  """
  letters = collections.Counter()
  for character, count in characters.items():
    for letter in normalizer.normalize_str(character):
      if not letter.isspace():
        letters[letter] += count
  return letters


def _check(size, number, with_bytes):
  least = len(SPECIAL) + (len(_BYTES) + 2 if with_bytes else number)
  if size < least:
    what = (
      f'256 bytes that a corpus of {number:,} letters is written in'
      if with_bytes
      else f'{number} letters of the corpus'
    )
    raise errors.BadInput(
      f'--vocab_size={size} does not hold the {len(SPECIAL)} special tokens '
      f'and the {what}; set it to {least} at least.'
    )


def _keeping_marks():
  """Returns a normalizer that strips accents only from Latin and Greek letters.

  BERT's strips marks from all scripts, including vowels, tones and consonants
  in Thai, Indic scripts and Japanese.
  """
  return tokenizers.normalizers.Sequence(
    [
      tokenizers.normalizers.NFD(),
      tokenizers.normalizers.Replace(
        tokenizers.Regex(r'(?<=[\p{Latin}\p{Greek}])\p{Mn}+'), ''
      ),
      tokenizers.normalizers.NFC(),
      tokenizers.normalizers.BertNormalizer(strip_accents=False),
    ]
  )


def _common(letters, most):
  """Returns the most frequent letters, at most `most` of them."""
  ranked = sorted(letters, key=lambda letter: (-letters[letter], letter))
  total, so_far, number = letters.total(), 0, 0
  while so_far < _COMMON * total or number < _MOST_LETTERS:
    so_far += letters[ranked[number]]
    number += 1
  return ranked[: min(number, most)]


def _run(tokenizer, trainer, texts):
  """Trains in a thread, because the library ignores stop signals."""
  failed, fed, stop = [], threading.Event(), threading.Event()

  def feed():
    try:
      for text in texts:
        if stop.is_set():
          raise errors.Stopped
        yield text
    finally:
      fed.set()

  def work():
    try:
      tokenizer.train_from_iterator(feed(), trainer)
    except BaseException as error:
      failed.append(error)

  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  try:
    with logs.working('train the vocabulary'):
      while thread.is_alive():
        if logs.stop_requested():
          raise errors.Stopped('train the vocabulary')
        thread.join(_POLL_SECS)
  except BaseException:
    # The training thread runs on until the process exits; by then it must have
    # made its last call into Python.
    stop.set()
    fed.wait()
    thread.join(1)
    raise
  if failed:
    raise failed[0]


def _cut(text, normalizer, pre_tokenizer):
  """Returns a text, with overlong words split into parts."""
  # Not with the tokenizer itself, which is locked while it trains.
  if max(map(len, text.split()), default=0) <= _MOST_OF_WORD:
    return text
  normal = normalizer.normalize_str(text)
  words = [word for word, _ in pre_tokenizer.pre_tokenize_str(normal)]
  if max(map(len, words)) <= _MOST_OF_WORD:
    return text
  return ' '.join(
    word[start : start + _MOST_OF_WORD]
    for word in words
    for start in range(0, len(word), _MOST_OF_WORD)
  )


def _add_bytes(tokenizer):
  """Makes a tokenizer encode letters outside its vocabulary as bytes."""
  model, first = json.loads(tokenizer.to_str())['model'], len(SPECIAL)
  vocabulary = dict(zip(_BYTES, itertools.count(first), strict=False)) | {
    token: number + len(_BYTES) * (number >= first)
    for token, number in model['vocab'].items()
  }
  tokenizer.model = tokenizers.models.BPE(
    vocabulary,
    [tuple(pair) for pair in model['merges']],
    unk_token=UNKNOWN,
    byte_fallback=True,
  )
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Replace(tokenizers.Regex(r'\z'), ' '),
    ]
  )


def _summary(tokenizer, sample, num_letters, num_kept):
  """Returns a line about the coverage of a vocabulary."""
  batch = tokenizer.encode_batch_fast(sample, add_special_tokens=False)
  counts = collections.Counter(i for one in batch for i in one.ids)
  total = max(counts.total(), 1)
  unknown = counts[tokenizer.token_to_id(UNKNOWN)] / total
  letters = f'all {num_letters:,} letters'
  if num_kept:
    of_bytes = sum(counts[tokenizer.token_to_id(byte)] for byte in _BYTES)
    letters = (
      f'{num_kept:,} of {num_letters:,} letters, the others as bytes '
      f'({of_bytes / total:.2%} of the tokens)'
    )
  return (
    f'vocabulary: {tokenizer.get_vocab_size():,} tokens, {letters}, '
    f'{unknown:.2%} unknown in {len(sample):,} of the texts'
  )
