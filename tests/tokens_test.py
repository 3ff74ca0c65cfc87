"""Token rows: what the tokenizer gives, made once, padded on the right."""

import numpy as np
import pytest

from ance_jax import config
from ance_jax import tokens

TEXTS = [f'word{i % 7} and some more text, number {i}' for i in range(50)]


@pytest.fixture(scope='module')
def tokenizer():
  return tokens.train_vocabulary(TEXTS, 120)


def make(tokenizer, folder, texts=TEXTS, length=8, content_hash='h'):
  return tokens.token_rows(
    tokenizer,
    texts,
    what='texts',
    num_texts=len(texts),
    length=length,
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
  short = ['word1', 'word2'] + TEXTS[:3]
  make(tokenizer, tmp_path, short)
  assert '5 rows of' in capsys.readouterr().out
  make(tokenizer, tmp_path, short)
  assert '3 of them cut at 8' in capsys.readouterr().out


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
  (first,) = tmp_path.iterdir()
  stamp = (first / 'ids.bin').stat().st_mtime_ns
  make(tokenizer, tmp_path)
  assert list(tmp_path.iterdir()) == [first]
  assert (first / 'ids.bin').stat().st_mtime_ns == stamp
  make(tokenizer, tmp_path, length=9)
  make(tokenizer, tmp_path, content_hash='other')
  make(tokens.train_vocabulary(TEXTS, 60), tmp_path)
  assert len(list(tmp_path.iterdir())) == 4


def test_the_length_of_an_earlier_call_does_not_change_the_key(
  tokenizer, tmp_path
):
  hashes = set()
  for length in (8, 9, 8):
    hashes.add(make(tokenizer, tmp_path, length=length).hash)
  assert len(hashes) == 2


def test_rows_in_several_batches_are_those_of_one(
  tokenizer, tmp_path, monkeypatch
):
  whole = make(tokenizer, tmp_path / 'a')
  monkeypatch.setattr(tokens, '_ROWS_AT_ONCE', 7)
  parts = make(tokenizer, tmp_path / 'b')
  np.testing.assert_array_equal(whole.ids, parts.ids)
  np.testing.assert_array_equal(whole.offsets, parts.offsets)


def test_memory_rows_are_those_on_disk(tokenizer, tmp_path):
  on_disk = make(tokenizer, tmp_path)
  in_memory = tokens.memory_rows(tokenizer, TEXTS, 8)
  np.testing.assert_array_equal(on_disk.ids, in_memory.ids)
  np.testing.assert_array_equal(on_disk.offsets, in_memory.offsets)


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
  assert on_disk.hash == expected.hash


def test_a_large_vocabulary_is_held_in_wider_numbers(tmp_path):
  texts = [f'{chr(0x4E00 + i)}' for i in range(10)]
  tokenizer = tokens.train_vocabulary(texts, 100)
  tokenizer.add_tokens([f'extra{i}' for i in range(66_000)])
  rows = make(tokenizer, tmp_path, ['extra65999'])
  assert rows.ids.dtype == np.uint32
  assert rows.ids.max() == len(tokenizer) - 1


def test_the_vocabulary_is_the_same_each_time_it_is_trained():
  first, second = (tokens.train_vocabulary(TEXTS, 120) for _ in range(2))
  assert first.get_vocab() == second.get_vocab()
  ids = first('word1 Unseen!')['input_ids']
  assert ids == second('word1 Unseen!')['input_ids']
  assert ids[0] == first.cls_token_id
  assert ids[-1] == first.sep_token_id


def test_a_saved_vocabulary_is_read_back_alike(tokenizer, tmp_path):
  tokenizer.save_pretrained(tmp_path)
  loaded = tokens.load_tokenizer(str(tmp_path))
  text = 'Word3 and MORE, ünseen \u4e00'
  assert loaded(text)['input_ids'] == tokenizer(text)['input_ids']
  assert loaded.pad_token_id == tokenizer.pad_token_id


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
  with pytest.raises(config.BadInput, match='must come with its tokenizer'):
    tokens.load_tokenizer(str(tmp_path))
