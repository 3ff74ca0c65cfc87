"""Readers: every form of a BEIR folder; bad ones are in bad_input_test.py."""

import dataclasses
import gzip
import hashlib
import json
import shutil

import numpy as np
import pytest

from ance_jax import errors
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import strings as strings_lib
from ance_jax.training import experiment


@pytest.fixture
def folder(beir_folder, tmp_path):
  """A copy of the small set, to be changed."""
  shutil.copytree(beir_folder, tmp_path / 'data')
  return tmp_path / 'data'


@pytest.fixture
def load(folder, tiny):
  def load(*names, **changes):
    changed = dataclasses.replace(tiny, data_dir=str(folder), **changes)
    return experiment.load_texts(changed, names)

  return load


def judgements_of(dataset, name):
  """{(query id, passage id): grade} as the arrays have it."""
  split = dataset.splits[name]
  rows = np.repeat(np.arange(len(split.ids)), np.diff(split.offsets))
  return {
    (split.ids[int(q)], dataset.corpus.ids[int(p)]): int(g)
    for q, p, g in zip(rows, split.passages, split.grades, strict=True)
  }


def read_qrels(path):
  lines = [line.split('\t') for line in path.read_text().splitlines()[1:]]
  return {(query, passage): int(grade) for query, passage, grade in lines}


def test_rows_ids_texts_and_judgements_are_those_of_the_files(load, folder):
  dataset = load('train', 'dev')
  records = [
    json.loads(line)
    for line in (folder / 'corpus.jsonl').read_text().splitlines()
  ]
  corpus = dataset.corpus
  columns = zip(corpus.ids, corpus.titles, corpus.texts, strict=True)
  assert list(columns) == [(r['_id'], r['title'], r['text']) for r in records]
  queries = dict(
    json.loads(line).values()
    for line in (folder / 'queries.jsonl').read_text().splitlines()
  )
  for name in ('train', 'dev'):
    split = dataset.splits[name]
    assert judgements_of(dataset, name) == read_qrels(
      folder / 'qrels' / f'{name}.tsv'
    )
    for query_id, text in zip(split.ids, split.texts, strict=True):
      assert queries[query_id] == text


def test_positives_are_the_judgements_above_zero_in_the_order_of_lines(
  load, folder
):
  (folder / 'qrels' / 'dev.tsv').write_text(
    'q1\tp9\t1\nq0\tp5\t1\nq0\tp7\t2\nq1\tp3\t1\nq0\tp6\t1\nq0\tp8\t0\n'
    'q0\tp4\t-1\n'
  )
  dataset = load('dev')
  split, ids = dataset.splits['dev'], dataset.corpus.ids
  for last, expected in {
    False: [
      ('q0', 'p5'), ('q0', 'p7'), ('q0', 'p6'), ('q1', 'p9'), ('q1', 'p3')
    ],
    True: [('q0', 'p6'), ('q1', 'p3')],
  }.items():  # fmt: skip
    pairs = zip(*split.positives(last=last), strict=True)
    assert [(split.ids[int(q)], ids[int(p)]) for q, p in pairs] == expected


def test_answers_belong_to_their_queries_and_to_the_hash(load, folder):
  assert load('dev').splits['dev'].answers is None
  lines = [{'_id': f'q{n}', 'answers': [f'a{n}', 'b']} for n in (48, 50, 51)]
  path = folder / 'answers.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  split = load('dev').splits['dev']
  answers = dict(zip(split.ids, split.answers, strict=True))
  assert (answers['q48'], answers['q49']) == (['a48', 'b'], [])
  lines[0]['answers'] = ['other']
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  assert load('dev').splits['dev'].hash != split.hash


def test_equal_texts_are_one_group_whatever_case_and_spaces(load, folder):
  with open(folder / 'corpus.jsonl', 'a') as file:
    for number, text in enumerate(['Some  Text', 'some text\n', 'other text']):
      file.write(json.dumps({'_id': f'x{number}', 'text': text}) + '\n')
  groups = load('dev').corpus.groups
  assert groups[-3] == groups[-2] != groups[-1]
  assert all(groups[i] == groups[i + 1] for i in range(0, 20, 2))
  assert len(set(groups[20:-3].tolist())) == len(groups[20:-3])


def test_gzipped_files_give_the_same(load, folder):
  plain = load('train', 'dev')
  judged = read_qrels(folder / 'qrels' / 'train.tsv')
  for path in [*folder.glob('*.jsonl'), *(folder / 'qrels').glob('*.tsv')]:
    with gzip.open(f'{path}.gz', 'wb') as file:
      file.write(path.read_bytes())
    path.unlink()
  zipped = load('train', 'dev')
  assert zipped.corpus.hash == plain.corpus.hash
  assert zipped.splits['train'].hash == plain.splits['train'].hash
  (folder / 'qrels' / 'train.tsv.gz').unlink()
  keys = 'query-id', 'corpus-id', 'score'
  with gzip.open(folder / 'qrels' / 'train.jsonl.gz', 'wt') as file:
    for (query, passage), grade in judged.items():
      line = dict(zip(keys, (query, passage, grade), strict=True))
      file.write(json.dumps(line) + '\n')
  as_json = load('train')
  assert as_json.splits['train'].hash == plain.splits['train'].hash


def test_missing_titles_no_header_and_windows_line_ends_are_read(load, folder):
  before = load('dev')
  path = folder / 'corpus.jsonl'
  path.write_text(path.read_text().replace('"title": "", ', ''))
  qrels = folder / 'qrels' / 'dev.tsv'
  qrels.write_text(qrels.read_text().split('\n', 1)[1])
  for changed in (path, qrels):
    changed.write_text(changed.read_text().replace('\n', '\r\n'))
  after = load('dev')
  assert after.corpus.hash == before.corpus.hash
  assert after.splits['dev'].hash == before.splits['dev'].hash
  path.write_text(path.read_text().replace('topic', 'Topic', 1))
  assert load('dev').corpus.hash != before.corpus.hash


def test_without_dev_a_share_of_train_is_held_out_by_hash(load, folder, capsys):
  whole = set(load('train').splits['train'].ids)
  (folder / 'qrels' / 'dev.tsv').unlink()
  dataset = load('train', 'dev', dev_fraction=0.3)
  train, dev = (set(dataset.splits[name].ids) for name in ('train', 'dev'))
  assert train | dev == whole
  assert not train & dev
  assert 0.1 * len(whole) < len(dev) < 0.5 * len(whole)
  capsys.readouterr()
  assert set(load('train', dev_fraction=0.3).splits['train'].ids) == train
  assert "30% of 'train', by hash of the query id, is held out for it" in (
    capsys.readouterr().out
  )
  with pytest.raises(errors.BadInput, match='dev_fraction=0 holds none out of'):
    load('dev', dev_fraction=0.0)


def test_train_queries_without_a_positive_are_left_out_and_counted(
  load, folder, capsys
):
  with open(folder / 'queries.jsonl', 'a') as file:
    file.write(json.dumps({'_id': 'lonely', 'text': 'no answer'}) + '\n')
  for name in ('train', 'dev'):
    with open(folder / 'qrels' / f'{name}.tsv', 'a') as file:
      file.write('lonely\tp3\t0\n')
  dataset = load('train', 'dev')
  assert 'lonely' not in list(dataset.splits['train'].ids)
  assert 'lonely' in list(dataset.splits['dev'].ids)
  assert (
    'train: left out 1 queries without a positive' in capsys.readouterr().out
  )


def test_strings_are_a_list_of_any_text_in_a_file_as_in_memory(monkeypatch):
  items = ['', 'a', 'ü\U0001f600' * 7, 'line\nbreak', 'half \ud83d pair', '']
  digests = set()
  for most, kind in ((2**27, bytes), (10, np.memmap)):
    monkeypatch.setattr(strings_lib, '_MAX_BLOB', most)
    strings = strings_lib.make(items)
    assert isinstance(strings._blob, kind)
    assert list(strings) == [*items[:4], 'half ? pair', '']
    with pytest.raises(IndexError):
      strings[6]
    digest = hashlib.sha256()
    strings.update_hash(digest)
    digests.add(digest.digest())
  assert len(digests) == 1


@pytest.mark.parametrize('spread', [2**40, 5, 1])
def test_rows_are_those_of_a_dict_also_where_hashes_are_equal(
  spread, monkeypatch
):
  monkeypatch.setattr(
    strings_lib, 'hashed', lambda text: len(text) * 31 % spread
  )
  ids = [f'{"x" * (number % 4)}{number}' for number in range(60)]
  corpus = corpus_lib.make_corpus(ids, [''] * 60, ids)
  assert [corpus.rows.get(an_id) for an_id in ids] == list(range(60))
  assert 'x' not in corpus.rows
  assert corpus.rows.get('60', -1) == -1
  assert corpus.rows.repeated() is None
  twice = [*ids, ids[7], ids[3]]
  again = corpus_lib.make_corpus(twice, [''] * 62, twice).rows
  assert again.repeated() == (7, 60)
  wanted = [*twice, '', 'x', '60']
  assert again.many(wanted).tolist() == [*range(60), 7, 3, -1, -1, -1]
  assert again.many([]).tolist() == []


def test_pairs_are_texts_of_which_equal_ones_are_one(tmp_path, tiny):
  pairs = [
    {'anchor': 'what', 'positive': 'Title 1 text 1'},
    {'query': 'who', 'positive': 'new'},
    {'anchor': 'what', 'positive': 'text 0'},
    {'anchor': 'who', 'positive': 'text 0'},
    {'anchor': 'Who', 'positive': 'new'},
  ]
  corpus = [
    {'_id': 'a', 'text': 'text 0'},
    {'_id': 'b', 'title': 'Title 1', 'text': 'text 1'},
    {'_id': 'c', 'text': 'text 0'},
  ]
  for name, lines in (('pairs', pairs), ('corpus', corpus)):
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (tmp_path / f'{name}.jsonl').write_text(text)
  settings = dataclasses.replace(
    tiny, dataset='pairs', data_dir=str(tmp_path), dev_fraction=0.0
  )
  dataset = experiment.load_texts(settings, ('train',))
  assert list(dataset.corpus.ids) == ['a', 'b', 'c', 'pairs-2']
  assert list(dataset.corpus.texts)[3] == 'new'
  assert list(dataset.splits['train'].texts) == ['what', 'who', 'Who']
  assert judgements_of(dataset, 'train') == {
    ('q0', 'b'): 1,
    ('q0', 'a'): 1,
    ('q1', 'pairs-2'): 1,
    ('q1', 'a'): 1,
    ('q2', 'pairs-2'): 1,
  }
  halves = dataclasses.replace(settings, dev_fraction=0.5)
  splits = experiment.load_texts(halves, ('train', 'dev')).splits
  assert [list(splits[name].ids) for name in ('train', 'dev')] == [
    ['q1'], ['q0', 'q2']
  ]  # fmt: skip
  (tmp_path / 'corpus.jsonl').unlink()
  alone = experiment.load_texts(settings, ('train',)).corpus
  assert list(alone.texts) == ['Title 1 text 1', 'new', 'text 0']


def test_a_split_keeps_what_the_corpus_lacks_beside_its_arrays():
  judged = corpus_lib.RawSplit(
    ['a', 'b', 'c'], ['x', 'y', 'z'], {(0, 5): 1, (2, 1): 2},
    missing={(1, 'gone'): 3, (2, 'gone'): -1, (2, 'lost'): 1},
  )  # fmt: skip
  split = corpus_lib.make_split(judged)
  assert list(split.ids) == ['a', 'b', 'c']
  assert split.offsets.tolist() == [0, 1, 1, 2]
  assert split.passages.tolist() == [5, 1]
  assert split.missing == [[], [3], [-1, 1]]
  assert split.positives()[0].tolist() == [0, 2]
  hashes = {
    corpus_lib.make_split(judged._replace(missing=missing)).hash
    for missing in (
      judged.missing,
      None,
      {**judged.missing, (1, 'gone'): 2},
      {(1, 'gone'): 3, (2, 'gone'): -1},
    )
  }
  assert len(hashes) == 4
  # Grades are not taken for negatives of the data.
  same = {1: [3]}, {(1, 'gone'): 3}
  assert (
    corpus_lib.make_split(judged._replace(missing=same[1], all_count=True)).hash
    != corpus_lib.make_split(
      judged._replace(missing=None, negatives=same[0], all_count=True)
    ).hash
  )
