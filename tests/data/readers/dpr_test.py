"""DPR's files as they are, and their rules."""

import gzip
import json

import formats
import pytest

from ance_jax import config
from ance_jax import errors
from ance_jax.training import experiment


def load(folder, *splits, **changes):
  settings = config.Config(dataset='dpr', data_dir=str(folder), **changes)
  return experiment.load_texts(settings, splits)


@pytest.fixture
def folder(tmp_path):
  formats.write_dpr(tmp_path)
  return tmp_path


def test_passages_are_read_with_their_quotes_undone(folder):
  corpus = load(folder, 'dev').corpus
  rows = range(formats.NUM_PASSAGES)
  assert list(corpus.ids) == [str(row + 1) for row in rows]
  assert list(corpus.texts) == [formats.passage_text(row) for row in rows]
  assert corpus.titles[9] == 'Title "2"'
  raw = (folder / 'psgs_w100.tsv').read_text()
  assert '""never""' in raw  # As the real file has it.


def test_the_first_positive_context_is_the_positive_and_bm25s_the_negatives(
  folder, capsys
):
  path = folder / 'biencoder-nq-train.json'
  # A question may span any lines.
  path.write_text(json.dumps(json.loads(path.read_text())))
  split = load(folder, 'train').splits['train']
  # Apostrophes are plain, as in DPR.
  texts = ''.join(split.texts)
  assert "w1's" in texts
  assert '\u2019' not in texts
  wanted = [row for n, _, row in formats.queries('train') if n != 3]
  assert split.passages.tolist() == wanted
  assert split.positives()[1].tolist() == wanted
  assert split.answers[0] == [formats.answer_of(wanted[0])]
  assert split.negatives[0] == [wanted[0] + near for near in (10, 20, 30)]
  assert split.negatives[4] == []
  out = capsys.readouterr().out
  assert 'left out 1 questions without a positive' in out
  assert '1 questions without a negative of BM25' in out
  # Files of another size than the source's.
  assert "psgs_w100.tsv: 120 rows; the source's has 21,015,324" in out
  assert "biencoder-nq-train.json: 32 rows; the source's has 58,880" in out


def test_questions_with_answers_alone_all_count(folder):
  split = load(folder, 'test').splits['test']
  wanted = list(formats.queries('test'))
  assert list(split.texts) == [text for _, text, _ in wanted]
  assert split.answers[1] == [formats.answer_of(wanted[1][2]), "or O'Neill's"]
  assert len(split.passages) == 0
  assert split.protocol == 'answers'
  assert len(split.offsets) == formats.NUM_TEST + 1


def test_trivia_names_its_contexts_otherwise_and_gzip_makes_no_difference(
  tmp_path,
):
  formats.write_dpr(tmp_path, 'trivia')
  before = load(tmp_path, 'train')
  for path in list(tmp_path.iterdir()):
    zipped = path.with_name(f'{path.name}.gz')
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
  again = load(tmp_path, 'train')
  assert again.corpus.hash == before.corpus.hash
  assert again.splits['train'].hash == before.splits['train'].hash


def test_a_flag_selects_the_question_set(folder):
  formats.write_dpr(folder, 'trivia')
  nq = load(folder, 'test', questions='nq').splits['test']
  assert nq.ids[0] == 'nq-test-1'


def test_answers_of_curatedtrec_are_patterns(tmp_path):
  formats.write_dpr(tmp_path, 'curatedtrec')
  path = tmp_path / 'curatedtrec-test.qa.csv'
  path.write_text("who\u2019s\t['Lin(da|coln)']\nwhen\t['\\\\d{4}']\n")
  split = load(tmp_path, 'test').splits['test']
  assert split.answers_are_patterns
  assert list(split.texts) == ["who's", 'when']
  assert split.answers == [['Lin(da|coln)'], [r'\d{4}']]
  path.write_text("who\t['Lin(da']\n")
  with pytest.raises(errors.BadInput, match='not a regular expression'):
    load(tmp_path, 'test')
