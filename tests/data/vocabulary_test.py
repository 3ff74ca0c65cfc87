"""A vocabulary of our own: its letters, its bytes, its trainer."""

import pathlib
import random
import signal
import subprocess
import sys
import time
import unicodedata

import pytest
import tokenizers

from ance_jax import errors
from ance_jax.core import logs
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.data import vocabulary
from ance_jax.training import experiment

# 3,000 passages of Han letters, the common ones more often.
HAN = [chr(0x4E00 + number) for number in range(3_000)]
RARE = '😀 龘 か\u3099 ﷽ 𒀀 ß 한국'


def chinese(number=300, size=3_000, seed=0):
  draw, weights = random.Random(seed), [1 / (n + 10) for n in range(size)]
  return [
    ''.join(draw.choices(HAN[:size], weights, k=60)) for _ in range(number)
  ]


def first_version(texts, size):
  """The trainer as it was when no corpus had more than 500 letters."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='[UNK]'))
  tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=size,
    special_tokens=special,
    limit_alphabet=500,
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='[CLS] $A [SEP]',
    pair='[CLS] $A [SEP] $B [SEP]',
    special_tokens=[('[CLS]', 2), ('[SEP]', 3)],
  )
  return tokenizer.to_str()


def trained(texts, size):
  return tokenizer_lib.train_vocabulary(texts, size).backend_tokenizer


def test_a_corpus_of_few_letters_keeps_its_tokenizer_to_the_byte(tiny, capsys):
  dataset = experiment.load_texts(tiny, ('train',))
  texts = tokens.passage_texts(dataset.corpus, tokenizer_lib.SPACE)
  assert trained(texts, 200).to_str() == first_version(texts, 200)
  # Accents, other alphabets, a long word, and a file of Python.
  texts = [*pathlib.Path(__file__).read_text().splitlines()[:80]]
  texts += ['Élan vital, Ёж и чай', 'नदी', '中文 ' + 'ab' * 500, '']
  assert trained(texts, 400).to_str() == first_version(texts, 400)
  assert 'letters, 0.00% unknown' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('number', 'is_as_before'), [(500, True), (501, False)]
)
def test_the_new_way_begins_above_500_letters(number, is_as_before):
  texts = [
    letter * (2 + place % 3) for place, letter in enumerate(HAN[:number])
  ]
  new = trained(texts, 1_000)
  assert (new.to_str() == first_version(texts, 1_000)) == is_as_before
  assert (new.token_to_id('<0xFF>') is None) == is_as_before


def test_no_letter_is_unknown_and_all_can_be_read_back(capsys, tmp_path):
  texts = [*chinese(), 'naïve Café Ωmega', 'Việt trường ngữ', RARE]
  tokenizer_lib.train_vocabulary(texts, 2_000).save_pretrained(tmp_path)
  tokenizer = tokenizer_lib.load(str(tmp_path))
  backend = tokenizer.backend_tokenizer
  assert len(tokenizer) <= 2_000
  assert 'letters, the others as bytes (' in capsys.readouterr().out
  for text in [*texts, '鿿 never seen: 🜨']:
    encoded = backend.encode(text)
    assert tokenizer.unk_token_id not in encoded.ids
    read = backend.decode(encoded.ids).replace(' ', '')
    expected = unicodedata.normalize('NFC', text).lower().replace(' ', '')
    # Letters of Vietnamese have two marks, and lose both.
    for accented, plain in (
      ('ï', 'i'), ('é', 'e'), ('ệ', 'e'), ('ư', 'u'), ('ờ', 'o'), ('ữ', 'u'),
      ('\u2009', '')
    ):  # fmt: skip
      expected = expected.replace(accented, plain)
    assert read == expected
  # Bytes are tokens of letters, not of what is written like one.
  assert '<0x41>' not in backend.encode('<0x41>').tokens


def test_the_line_has_the_shares_of_unknown_tokens_and_of_bytes(capsys):
  texts = chinese()
  tokenizer = trained(texts, 1_000)
  tokens_of = [t for text in texts for t in tokenizer.encode(text).tokens[1:-1]]
  share = sum(token.startswith('<0x') for token in tokens_of) / len(tokens_of)
  assert (
    f'bytes ({share:.2%} of the tokens), 0.00% unk' in capsys.readouterr().out
  )
  # Letters that it was not trained on.
  few = trained(['abab'], 8)
  line = vocabulary._summary(few, ['ab', 'z ab z'], 2, 0)
  assert '8 tokens, all 2 letters, 50.00% unknown in 2' in line


def test_common_letters_have_a_token_each():
  tokenizer = trained(chinese(), 8_192)
  seen = set(''.join(chinese()))
  assert 500 < len(seen) <= 3_000
  # All but a two-thousandth of the text.
  counts = [tokenizer.token_to_id(letter) is not None for letter in seen]
  as_bytes = len(counts) - sum(counts)
  total = 300 * 60
  assert 0 < as_bytes <= total * 0.0005
  # No more than half of a small vocabulary, the most frequent ones.
  small = trained(chinese(), 1_000)
  kept = [letter for letter in seen if small.token_to_id(letter) is not None]
  assert len(kept) == (1_000 - 5 - 256) // 2
  text = ''.join(chinese())
  least = min(text.count(letter) for letter in kept)
  assert all(text.count(other) <= least for other in seen - set(kept))


def test_letters_bytes_and_pairs_fill_the_vocabulary():
  draw = random.Random(0)
  latin = [''.join(draw.choices('abcdefgh', k=200)) for _ in range(40)]
  assert trained(chinese() + latin, 1_500).get_vocab_size() == 1_500
  assert trained(latin, 1_500).get_vocab_size() == 1_500


def test_it_is_the_same_at_every_call():
  texts = [*chinese(60), *(f'{a}{b}ing' for a in 'abcde' for b in 'xyz')]
  assert trained(texts, 800).to_str() == trained(texts, 800).to_str()


def test_marks_of_other_scripts_than_latin_and_greek_are_letters():
  texts = [*chinese(), 'がか कि की กี่ กำ e\u0301 ά']
  tokenizer = trained(texts, 4_000)
  for first, second in (('が', 'か'), ('कि', 'कु'), ('กี', 'กิ')):
    assert tokenizer.encode(first).ids != tokenizer.encode(second).ids
  for first, second in (('é', 'e'), ('ά', 'α'), ('が', 'か\u3099')):
    assert tokenizer.encode(first).ids == tokenizer.encode(second).ids


@pytest.mark.parametrize(
  ('texts', 'least', 'holds'),
  [(['abc', 'def'], 11, '6 letters'), (chinese(), 263, '256 bytes that a')],
)
def test_a_vocabulary_that_is_too_small_is_refused(texts, least, holds):
  assert 5 < len(tokenizer_lib.train_vocabulary(texts, least)) <= least
  with pytest.raises(errors.BadInput, match=f'{holds}.* {least} at least'):
    tokenizer_lib.train_vocabulary(texts, least - 1)


def test_words_of_more_than_1000_letters_are_trained_on_in_parts():
  # Parts of 1,000 letters: the last of a first part, and the first of a second.
  long, whole = 'a' * 999 + 'bc' + 'd' * 999, 'a' * 998 + 'ef'
  texts = [f'some, {long}! {whole}'] * 2
  parts = [f'some, {long[:1000]} {long[1000:]}! {whole}'] * 2
  new = trained(texts, 60)
  assert (new.to_str() == first_version(parts, 60)) is True
  assert new.token_to_id('ef')
  assert not new.token_to_id('bc')
  # A text is tokenized with its words whole.
  assert ''.join(new.encode(long).tokens[1:-1]) == long


def test_short_words_without_spaces_are_trained_on_as_they_stand():
  """As code and Chinese have them: only the trainer normalizes these."""
  text = 'Ab,' * 400
  normalizer = tokenizers.normalizers.BertNormalizer()
  pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  assert vocabulary._cut(text, normalizer, pre_tokenizer) == text


def test_time_is_linear_in_the_longest_word():
  secs = []
  for size in (50_000, 200_000):
    word = ''.join(random.Random(0).choices('abcdefgh', k=size))
    start = time.process_time()
    trained([word], 8_192)
    secs.append(time.process_time() - start)
  assert secs[1] < 10 * secs[0] + 1  # It was 20 times as long, 57 s.


class Texts(list):
  """Texts that are counted first; what `second` yields is trained on."""

  def __init__(self, second):
    super().__init__(['some', 'text'])
    self._passes = iter([super().__iter__, second])

  def __iter__(self):
    return next(self._passes)()


def test_a_stop_signal_ends_training_while_texts_are_read():
  started, secs = time.monotonic(), 20

  def second():
    logs._stop.set()
    while time.monotonic() < started + secs:
      yield 'some text'

  try:
    with pytest.raises(errors.Stopped, match='train the vocabulary'):
      vocabulary.train(Texts(second), 50)
  finally:
    logs._stop.clear()
  assert time.monotonic() < started + secs / 2


def test_an_error_of_the_texts_ends_training():
  def second():
    yield 'some'
    raise UnicodeError('of this text')

  with pytest.raises(UnicodeError, match='of this text'):
    vocabulary.train(Texts(second), 50)


_TRAINS = """
import random
import sys

from ance_jax import errors
from ance_jax.core import logs
from ance_jax.data import vocabulary

class Texts(list):
  def __iter__(self):
    yield from super().__iter__()
    print('read', flush=True)

draw = random.Random(0)
texts = Texts(''.join(draw.choices('abcdefgh', k=900)) for _ in range(4_000))
with logs.stop_signals():
  try:
    vocabulary.train(texts, 30_000)
  except errors.Stopped as stopped:
    sys.exit(f'stopped: {stopped}')
"""


def test_a_stop_signal_ends_training_within_seconds():
  process = subprocess.Popen(
    [sys.executable, '-c', _TRAINS],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  with process:
    reads = 2  # Letters are counted, and the trainer has all texts.
    while reads:  # Between them may be lines of how far it is.
      line = process.stdout.readline()
      assert line, 'it ended'
      reads -= line == 'read\n'
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)  # Training would take minutes more.
    _, said = process.communicate(timeout=90)
  assert time.monotonic() - start < 45  # On a machine that does much else.
  assert process.returncode == 1
  assert said == 'stopped: train the vocabulary\n'
