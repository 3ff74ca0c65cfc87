"""Token rows: what the tokenizer gives, made once, padded on the right."""

import numpy as np
import pytest
import tokenizers
import transformers

from ance_jax.data import corpus as corpus_lib
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens

TEXTS = [f'word{i % 7} and some more text, number {i}' for i in range(50)]


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.train_vocabulary(TEXTS, 120)


def make(
  tokenizer,
  folder,
  texts=TEXTS,
  length=8,
  content_hash='h',
  number=None,
  **cut,
):
  return tokens.token_rows(
    tokenizer,
    texts,
    what='texts',
    num_texts=number or len(texts),
    cut=tokens.Cut(length, **cut),
    content_hash=content_hash,
    folder=folder,
  )


def test_rows_are_the_tokenizers_own_cut_at_the_length(tokenizer, tmp_path):
  rows = make(tokenizer, tmp_path)
  for number, text in enumerate(TEXTS):
    expected = tokenizer(text, truncation=True, max_length=8)['input_ids']
    start, end = rows.offsets[number : number + 2]
    assert rows.ids[start:end].tolist() == expected
  assert rows.lengths().tolist() == [8] * 50
  assert rows.ids.dtype == np.uint16


def test_texts_that_are_cut_are_counted(tokenizer, tmp_path, capsys):
  make(tokenizer, tmp_path, ['word1', 'word2'] + TEXTS[:3])
  said = capsys.readouterr().out
  assert '5 rows of' in said
  assert '3 of them cut at 8' in said


def test_padding_is_on_the_right_and_minus_one_is_an_empty_row(
  tokenizer, tmp_path
):
  rows = make(tokenizer, tmp_path, ['word1', TEXTS[0]], length=12)
  ids, lengths = rows.padded([1, -1, 0], 14)
  assert ids.shape == (3, 14)
  assert lengths.tolist() == [rows.lengths()[1], 1, rows.lengths()[0]]
  for place, row in ((0, 1), (2, 0)):
    start, end = rows.offsets[row : row + 2]
    real = lengths[place]
    assert ids[place, :real].tolist() == rows.ids[start:end].tolist()
    assert (ids[place, real:] == tokenizer.pad_token_id).all()
  assert (ids[1] == tokenizer.pad_token_id).all()


def test_rows_are_made_once_for_the_same_text_length_and_tokenizer(
  tokenizer, tmp_path
):
  make(tokenizer, tmp_path)
  (first,) = tmp_path.glob('texts-*')
  stamp = (first / 'ids.bin').stat().st_mtime_ns
  make(tokenizer, tmp_path)
  assert list(tmp_path.glob('texts-*')) == [first]
  assert (first / 'ids.bin').stat().st_mtime_ns == stamp
  make(tokenizer, tmp_path, length=9)
  make(tokenizer, tmp_path, content_hash='other')
  make(tokenizer_lib.train_vocabulary(TEXTS, 60), tmp_path)
  # The length of an earlier call does not count.
  make(tokenizer, tmp_path)
  assert len(list(tmp_path.glob('texts-*'))) == 4


def test_a_kill_between_parts_costs_the_part_and_changes_no_byte(
  tokenizer, tmp_path, monkeypatch
):
  texts = [f'{text} {number}' for number in range(2) for text in TEXTS]
  before = make(tokenizer, tmp_path / 'whole', texts)
  monkeypatch.setattr(tokens, '_ROWS_AT_ONCE', 2)
  monkeypatch.setattr(tokens, '_BATCHES_A_PART', 3)
  real, made = tokens._tokenize, []

  def killed_at_third(*args):
    made.append(args)
    if len(made) == 3:
      raise KeyboardInterrupt
    real(*args)

  monkeypatch.setattr(tokens, '_tokenize', killed_at_third)
  with pytest.raises(KeyboardInterrupt):
    make(tokenizer, tmp_path / 'parts', texts)
  again = make(tokenizer, tmp_path / 'parts', texts)
  # The two that were whole were not made again.
  assert len(made) == 3 + -(-len(texts) // 6) - 2
  np.testing.assert_array_equal(again.ids, before.ids)
  np.testing.assert_array_equal(again.offsets, before.offsets)
  assert [p.name for p in (tmp_path / 'parts').glob('*-parts')] == []
  stored = next((tmp_path / 'parts').glob('texts-*'))
  whole = next((tmp_path / 'whole').glob('texts-*'))
  for name in ('ids.bin', 'offsets.npy'):
    assert (stored / name).read_bytes() == (whole / name).read_bytes()
  monkeypatch.setattr(tokens, '_tokenize', real)
  with pytest.raises(ValueError, match='has more texts than 16 parts'):
    make(tokenizer, tmp_path / 'few', texts, number=len(texts) - 6)


def test_padding_and_cutting_that_a_tokenizer_file_asks_for_have_no_effect(
  tokenizer, tmp_path
):
  expected = make(tokenizer, tmp_path / 'a')
  backend = tokenizer.backend_tokenizer
  backend.enable_padding(length=30)
  backend.enable_truncation(3)
  in_memory = tokens.memory_rows(tokenizer, TEXTS, 8)
  backend.enable_padding(length=30)
  backend.enable_truncation(3)
  on_disk = make(tokenizer, tmp_path / 'b')
  for rows in (in_memory, on_disk):
    np.testing.assert_array_equal(rows.ids, expected.ids)
    np.testing.assert_array_equal(rows.offsets, expected.offsets)
  assert on_disk.hash == expected.hash


def test_a_saved_vocabulary_is_read_back_alike(tokenizer, tmp_path):
  tokenizer.save_pretrained(tmp_path)
  loaded = tokenizer_lib.load(str(tmp_path))
  text = 'Word3 and MORE, ünseen \u4e00'
  assert loaded(text)['input_ids'] == tokenizer(text)['input_ids']
  assert loaded.pad_token_id == tokenizer.pad_token_id


@pytest.fixture
def bytes_folder(tmp_path):
  """Folder of a RobertaTokenizer of 17 tokens; a letter has its own row."""
  words = '<s> <pad> </s> <unk> Ġ P p a r i s I is Ġis Ġp ar <mask>'.split()
  transformers.RobertaTokenizer(
    vocab={word: row for row, word in enumerate(words)},
    merges=[('i', 's'), ('Ġ', 'is'), ('Ġ', 'p'), ('a', 'r')],
  ).save_pretrained(tmp_path / 'plain')
  return tmp_path / 'plain'


@pytest.mark.parametrize(
  ('lower_case', 'prefix_space', 'ids', 'with_title'),
  [
    # P ar is Ġ I s, and P ar is </s> I s.
    (None, None, [5, 15, 12, 4, 11, 10], [5, 15, 12, 2, 11, 10]),
    # p ar is Ġis, and p ar is </s> is: as with the code of ANCE.
    (True, None, [6, 15, 12, 13], [6, 15, 12, 2, 12]),
    # Ġ P ar is Ġ I s, and Ġ P ar is </s> Ġ I s.
    (None, True, [4, 5, 15, 12, 4, 11, 10], [4, 5, 15, 12, 2, 4, 11, 10]),
    # Ġp ar is Ġis, and Ġp ar is </s> Ġis: as with the code of STAR.
    (True, True, [14, 15, 12, 13], [14, 15, 12, 2, 13]),
    (True, False, [6, 15, 12, 13], [6, 15, 12, 2, 12]),
  ],
)
def test_case_and_space_are_in_the_tokenizer_and_saved_with_it(
  lower_case, prefix_space, ids, with_title, bytes_folder, tmp_path
):
  made = tokenizer_lib.load(str(bytes_folder))
  tokenizer_lib.set_flavour(
    made, lower_case=lower_case, prefix_space=prefix_space
  )
  made.save_pretrained(tmp_path / 'saved')
  saved = tokenizer_lib.load(str(tmp_path / 'saved'))
  corpus = make_corpus([('Paris', 'Is'), ('', 'Paris Is')])
  separator = tokenizer_lib.title_separator(made, 'token')
  texts = list(tokens.passage_texts(corpus, separator))
  for tokenizer in (made, saved):
    rows = tokens.memory_rows(tokenizer, ['Paris Is', *texts], 16)
    found = [
      rows.ids[start:end].tolist()
      for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)
    ]
    assert found == [[0, *i, 2] for i in (ids, with_title, ids)]


def make_corpus(passages):
  titles, texts = zip(*passages, strict=True)
  ids = [str(number) for number in range(len(texts))]
  return corpus_lib.Corpus(ids, titles, texts, np.arange(len(texts)), 'h')


def test_special_tokens_stay_as_they_are_when_texts_are_lower_cased(tokenizer):
  cased = tokenizer_lib.train_vocabulary(TEXTS, 120)
  cased.backend_tokenizer.normalizer = None
  tokenizer_lib.set_flavour(cased, lower_case=True, prefix_space=None)
  expected = tokenizer('word1 [SEP] text')['input_ids']
  assert cased('WORD1 [SEP] Text')['input_ids'] == expected
  assert expected.count(tokenizer.sep_token_id) == 2


def test_lower_case_comes_before_what_else_is_done_to_a_text():
  """As sentence-transformers lower-cases, whatever the tokenizer does."""
  made = tokenizer_lib.train_vocabulary(TEXTS, 120)
  made.backend_tokenizer.normalizer = tokenizers.normalizers.Replace('x', 'a')
  assert made('Xx')['input_ids'] != made('aa')['input_ids']
  tokenizer_lib.lower_case(made)
  assert made('Xx')['input_ids'] == made('aa')['input_ids']


def test_the_separator_token_makes_the_pair_of_dpr(tokenizer):
  """Cut like DPR's, but where a title takes more than half of the tokens."""
  backend = tokenizer.backend_tokenizer
  passages = [('word1 word2', TEXTS[0]), ('', TEXTS[1]), ('word3', 'text')]
  passages += [(TEXTS[2], 'word4')]
  separator = tokenizer_lib.title_separator(tokenizer, 'token')
  joined = list(tokens.passage_texts(make_corpus(passages), separator))
  different = set()
  for length in range(3, 40):
    rows = tokens.memory_rows(tokenizer, joined, length)
    for row, (title, text) in enumerate(passages):
      found = rows.ids[rows.offsets[row] : rows.offsets[row + 1]].tolist()
      backend.enable_truncation(max(length, 4), strategy='longest_first')
      pair = backend.encode(title, text) if title else backend.encode(text)
      # DPR's code puts the separator in the last place, where it was cut.
      expected = pair.ids[:length]
      expected[-1] = tokenizer.sep_token_id
      title_size = len(backend.encode(title, add_special_tokens=False).ids)
      if found != expected:
        different.add(row)
        assert title_size > (length - 3) // 2
      assert found[-1] == tokenizer.sep_token_id
  assert 0 in different
  assert 1 not in different


def test_what_stands_between_title_and_text_is_a_space_or_a_token(tokenizer):
  corpus = make_corpus([('a', 'b'), ('', 'c')])
  assert list(tokens.passage_texts(corpus, tokenizer_lib.SPACE)) == ['a b', 'c']
  prompted = tokens.passage_texts(corpus, tokenizer_lib.SPACE, 'p: ')
  assert list(prompted) == ['p: a b', 'p: c']
  assert (
    tokenizer_lib.title_separator(tokenizer, 'space') == tokenizer_lib.SPACE
  )
  assert tokenizer_lib.title_separator(tokenizer, 'token') == '[SEP]'


def test_pieces_have_special_tokens_of_their_own_and_are_no_more_than_asked(
  tokenizer, tmp_path, capsys
):
  texts = ['word1', TEXTS[0] * 3, TEXTS[1]]
  rows = make(tokenizer, tmp_path, texts, pieces=3)
  make(tokenizer, tmp_path, texts, pieces=2)
  said = capsys.readouterr().out
  assert (
    '3 rows in 6 pieces of 6.5 tokens in the mean, 1 of them cut at 24' in said
  )
  # The last has two pieces, all of it.
  assert (
    '3 rows in 5 pieces of 6.2 tokens in the mean, 1 of them cut at 16' in said
  )
  pieces, texts_of = rows.pieces(), rows.texts_of_pieces()
  assert len(rows) == 3
  assert len(pieces) == len(texts_of) == rows.first[-1]
  for number, text in enumerate(texts):
    plain = tokenizer(text, add_special_tokens=False)['input_ids']
    expected = [plain[i : i + 6] for i in range(0, len(plain), 6)][:3]
    found = [
      pieces.ids[pieces.offsets[p] : pieces.offsets[p + 1]].tolist()
      for p in np.nonzero(texts_of == number)[0]
    ]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert found == [[cls, *ids, sep] for ids in expected]
  again = make(tokenizer, tmp_path, texts, pieces=3)
  np.testing.assert_array_equal(again.first, rows.first)
  in_memory = tokens.memory_rows(tokenizer, texts, 8, 3)
  np.testing.assert_array_equal(in_memory.ids, rows.ids)
  np.testing.assert_array_equal(in_memory.first, rows.first)
  of_texts = rows.rows_of_pieces(np.array([0, 1, -1]), 3)
  assert of_texts.tolist() == [[0, -1, -1], [1, 2, 3], [-1, -1, -1]]
  assert rows.lengths_of(of_texts).tolist() == [
    [rows.lengths()[0], 0, 0], [8, 8, 8], [0, 0, 0]
  ]  # fmt: skip
  flat = np.zeros(20, int)
  rows.copy(np.array([2, -1, 1]), flat, np.array([11, 0, 1]))
  second, first = (
    rows.ids[rows.offsets[n] : rows.offsets[n + 1]].tolist() for n in (2, 1)
  )
  assert flat.tolist() == [0, *first, 0, 0, *second, 0]


def test_whole_pieces_are_cut_as_in_ance_and_only_the_first_has_a_first_token(
  tokenizer, tmp_path
):
  text = TEXTS[0] * 3
  rows = make(tokenizer, tmp_path, [text, 'word1'], pieces=3, whole=True)
  expected = tokenizer(text, truncation=True, max_length=24)['input_ids']
  assert rows.ids[: rows.offsets[3]].tolist() == expected
  assert rows.first.tolist() == [0, 3, 4]
  assert rows.lengths()[:3].tolist() == [8, 8, 8]
  in_memory = tokens.memory_rows(tokenizer, [text, 'word1'], 8, 3, whole=True)
  np.testing.assert_array_equal(in_memory.ids, rows.ids)
  np.testing.assert_array_equal(in_memory.first, rows.first)


@pytest.mark.parametrize(
  ('highest', 'dtype'), [(65_535, np.uint16), (65_536, np.uint32)]
)
def test_the_highest_id_decides_how_wide_numbers_are(highest, dtype, tmp_path):
  """Not the number of entries: a vocabulary may have gaps."""
  words = {'[PAD]': 0, '[UNK]': 1, '[CLS]': 2, '[SEP]': 3, 'far': highest}
  tokenizer = transformers.BertTokenizer(vocab=words)
  rows = make(tokenizer, tmp_path, ['far', 'other'])
  assert rows.ids.tolist() == [2, highest, 3, 2, 1, 3]
  assert rows.ids.dtype == dtype
