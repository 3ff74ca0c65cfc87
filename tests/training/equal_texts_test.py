"""Equal texts: a query is not its own negative, and equal queries are one.

Expected values are from plain Python over a small random set in which copies
are planted: queries that are passages, and queries of one text.
"""

import dataclasses
import hashlib
import json
import pathlib
import types

import formats
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import keys
from ance_jax.data import tokens
from ance_jax.jobs import inspect
from ance_jax.jobs import mine as mine_lib
from ance_jax.jobs import serve
from ance_jax.mining import filters
from ance_jax.retrieval import metrics
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import negatives as negatives_lib

NUM_PASSAGES, NUM_QUERIES, TOP_K = 60, 24, 12
WORDS = 'ada bob cy dot'.split()


def normal(text):
  return ' '.join(text.lower().split())


def words(random):
  return ' '.join(random.choice(WORDS, random.integers(1, 4), replace=False))


def write(folder, seed):
  """Writes a BEIR set of so few words that texts are often equal."""
  random = np.random.default_rng(seed)
  passages = [
    {
      '_id': f'p{row}',
      'title': words(random) if row % 3 else '',
      'text': words(random) + ' ' * int(random.integers(2)),
    }
    for row in range(NUM_PASSAGES)
  ]
  queries = [
    {'_id': f'q{row}' if row % 2 else f'p{row}', 'text': words(random).upper()}
    for row in range(NUM_QUERIES)
  ]
  (folder / 'qrels').mkdir(parents=True)
  lines = {'train': [], 'dev': []}
  for row, query in enumerate(queries):
    chosen = random.choice(NUM_PASSAGES, 3, replace=False)
    # A passage that is the query itself may be its positive, too.
    for place, grade in zip(chosen, (1, 0, int(row % 3 > 0)), strict=True):
      name = 'dev' if row % 5 == 4 else 'train'
      lines[name].append(f'{query["_id"]}\tp{place}\t{grade}')
  write_lines(folder / 'corpus.jsonl', passages)
  write_lines(folder / 'queries.jsonl', queries)
  for name, found in lines.items():
    (folder / 'qrels' / f'{name}.tsv').write_text('\n'.join(found) + '\n')


@pytest.fixture(scope='module', params=range(3))
def folder(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('equal')
  write(folder, request.param)
  return folder


def settings(folder, **changes):
  changes = {'workdir': str(folder), 'top_k': TOP_K, **changes}
  return config_lib.Config(dataset='beir', data_dir=str(folder), **changes)


class Slow:
  """What is right, by loops over texts."""

  def __init__(self, folder, protocol):
    lines = {
      name: [json.loads(x) for x in (folder / name).read_text().splitlines()]
      for name in ('corpus.jsonl', 'queries.jsonl')
    }
    self.passages, asked = lines.values()
    self.texts = [normal(p['text']) for p in self.passages]
    wholes = [normal(f'{p["title"]} {p["text"]}') for p in self.passages]
    text_of = {query['_id']: normal(query['text']) for query in asked}
    judged = {}
    for line in (folder / 'qrels' / 'train.tsv').read_text().splitlines():
      query, passage, grade = line.split('\t')
      if int(grade) > 0:
        judged.setdefault(query, []).append(int(passage[1:]))
    self.ids = [query for query in text_of if query in judged]
    self.judged = [judged[query] for query in self.ids]
    asked = [text_of[query] for query in self.ids]
    self.equal = [
      [other for other, text in enumerate(asked) if text == mine]
      for mine in asked
    ]
    self.own = [
      {
        row
        for row, whole in enumerate(wholes)
        if query in (self.texts[row], whole)
        or (protocol == 'beir' and an_id == f'p{row}')
      }
      for an_id, query in zip(self.ids, asked, strict=True)
    ]

  def positives(self, query, last):
    """What a query may draw, its own first, and all that it shares."""
    found = self.judged[query]
    shared = [p for q in self.equal[query] for p in self.judged[q][-1:]]
    if last:
      return found[-1:], {*found[-1:], *shared}
    every = {p for q in self.equal[query] for p in self.judged[q]}
    return [*found, *sorted(every - {*found})], every

  def of_text(self, rows, same_text):
    """Passages, and with `same_text` all of their texts."""
    texts = {self.texts[row] for row in rows}
    return {
      row
      for row, text in enumerate(self.texts)
      if row in rows or (same_text and text in texts)
    }


@pytest.mark.parametrize('row', ['ance', 'ance_code'])
@pytest.mark.parametrize('same_text', [True, False])
@pytest.mark.parametrize('protocol', ['usual', 'beir'])
def test_a_step_draws_shared_positives_and_counts_no_column_of_them(
  row, same_text, protocol, folder
):
  config = settings(folder, protocol=protocol)
  corpus, splits = experiment.load_texts(config, ('train', 'dev'))
  slow, method = Slow(folder, protocol), methods.METHODS[row]
  size = len(slow.ids)
  made = batches.training_data(
    splits['train'],
    corpus,
    tokens.TokenRows(np.ones(size), np.arange(size + 1), 0, ''),
    tokens.TokenRows(np.ones(9), np.arange(10), 0, ''),
    types.SimpleNamespace(tower=lambda side: side),
    method,
    same_text,
  )
  same_text = same_text and not method.last_positive
  for query in range(size):
    drawn, shared = slow.positives(query, method.last_positive)
    found = made.positives[made.offsets[query] : made.offsets[query + 1]]
    own = len(slow.judged[query])
    assert sorted(found) == sorted(drawn)
    assert len(set(found.tolist())) == len(found)
    assert method.last_positive or found[:own].tolist() == slow.judged[query]
    counted = ~np.isin(made.groups, made.positive_groups[query])
    banned = slow.of_text(shared | slow.own[query], same_text)
    assert set(np.flatnonzero(counted)) == set(range(NUM_PASSAGES)) - banned
  assert any(len(equal) > 1 for equal in slow.equal)


def run_of(folder, **changes):
  """What `negatives.select_negatives` and `sources` read of a run."""
  config = settings(folder, **changes)
  corpus, splits = experiment.load_texts(config, ('train', 'dev'))
  return types.SimpleNamespace(
    config=config,
    dataset=types.SimpleNamespace(
      corpus=corpus,
      splits=splits,
      passages=types.SimpleNamespace(hash='p'),
      queries={'train': types.SimpleNamespace(hash='q')},
    ),
    workdir=pathlib.Path(config.workdir),
  )


def test_what_negatives_depend_on_tells_equal_texts_apart(folder):
  run = run_of(folder)
  split = run.dataset.splits['train']
  none = np.zeros((2, 0), np.int32)
  every = [
    {'groups': split.groups, 'same_text': split.same_text},
    {'groups': split.groups, 'same_text': none},
    {'groups': None, 'same_text': split.same_text},
    {'groups': None, 'same_text': split.same_text[:, 1:]},
    {'groups': None, 'same_text': none, 'own': np.arange(len(split.ids))},
    {'groups': None, 'same_text': none},
  ]
  found = []
  for changes in every:
    run.dataset.splits['train'] = split._replace(**changes)
    found.append(json.dumps(negatives_lib.sources(run)))
  assert len(set(found)) == len(every)
  # As it was before texts were compared: such a run goes on.
  assert json.loads(found[-1])['own'] is False


@pytest.mark.parametrize(
  ('take', 'says'),
  [
    ('by_bm25', 'BM25 negatives of the data: dropped'),
    ('by_given', 'given negatives: dropped'),
  ],
)
def test_given_negatives_of_a_query_are_filtered_by_those_of_its_text(
  take, says, folder, tmp_path, capsys
):
  run = run_of(folder, workdir=str(tmp_path))
  slow, split = Slow(folder, 'usual'), run.dataset.splits['train']
  given = [list(range(NUM_PASSAGES)) for _ in slow.ids]
  run.dataset.splits['train'] = split._replace(negatives=given)
  found = getattr(negatives_lib, take)(run)
  assert says in capsys.readouterr().out
  for query, row in enumerate(found.negatives.tolist()):
    _, shared = slow.positives(query, last=False)
    banned = slow.of_text(shared | slow.own[query], same_text=True)
    assert row == [p for p in range(NUM_PASSAGES) if p not in banned][:TOP_K]


@pytest.mark.parametrize('form', ['ids', 'triplets'])
def test_other_trainers_get_neither_own_texts_nor_positives_of_equal_queries(
  form, folder, tmp_path, capsys
):
  config = settings(
    folder, workdir=str(tmp_path), job='mine', retriever='bm25', format=form,
    on_shortage='fill', num_negatives=8, max_rank=NUM_PASSAGES,
  )  # fmt: skip
  report = mine_lib.run(config)
  slow = Slow(folder, 'usual')
  path = tmp_path / f'hard_negatives.{form}.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  every = range(len(slow.ids))
  if form == 'triplets':
    # Each judged pair once: those of an equal query come with that query.
    assert len(lines) == sum(8 * len(judged) for judged in slow.judged)
    return
  own_texts = 0
  for query, line in zip(every, lines, strict=True):
    drawn, shared = slow.positives(query, last=False)
    rows = [int(an_id[1:]) for an_id in line['positive_ids']]
    own = len(slow.judged[query])
    assert (rows[:own], sorted(rows)) == (slow.judged[query], sorted(drawn))
    negatives = {int(an_id[1:]) for an_id in line['negative_ids']}
    assert len(negatives) == 8
    assert not negatives & slow.of_text(shared | slow.own[query], True)
    # What is the query has all of its words: BM25 ranks it.
    of_positives = slow.of_text(shared, same_text=True)
    own_texts += len(slow.of_text(slow.own[query], True) - of_positives)
  assert report['taken']['own text']['candidates'] == own_texts > 0
  assert filters.FILTERS[:4] == ('positive', 'same text', 'own text', 'answer')
  (row,) = [
    x for x in capsys.readouterr().out.splitlines() if '  own text' in x
  ]
  assert row.split()[2] == str(own_texts)


def test_each_query_is_scored_by_its_own_judgements(folder):
  run = run_of(folder)
  slow, split = Slow(folder, 'usual'), run.dataset.splits['train']
  random = np.random.default_rng(1)
  rows = np.array([random.permutation(NUM_PASSAGES) for _ in slow.ids])
  found = metrics.by_query(
    rows.astype(np.int32), split, run.dataset.corpus.texts
  )
  firsts = [
    min(ranking.tolist().index(passage) + 1 for passage in judged)
    for ranking, judged in zip(rows, slow.judged, strict=True)
  ]
  expected = [1 / first if first <= 10 else 0 for first in firsts]
  np.testing.assert_allclose(found['mrr@10'], expected, rtol=1e-6)


def test_the_hash_of_a_split_is_that_of_its_data_alone(folder):
  split = run_of(folder).dataset.splits['train']
  digest = hashlib.sha256()
  for texts in (split.ids, split.texts):
    encoded = [text.encode() for text in texts]
    digest.update(np.cumsum([0, *map(len, encoded)]))
    digest.update(b''.join(encoded))
  for column in (split.offsets, split.passages, split.grades):
    digest.update(column)
  assert split.hash == digest.hexdigest()


def write_pairs(folder):
  """The second positive is a query; of the corpus, two rows are the fourth."""
  pairs = ('how so', 'or not'), ('LIKE this', 'like  this'), ('How So', 'that')
  pairs = (*pairs, ('a  title', 'why'))
  write_lines(
    folder / 'pairs.jsonl', ({'anchor': a, 'positive': p} for a, p in pairs)
  )
  titled = ('A', 'Title'), ('a title', ''), ('a title', 'and more')
  write_lines(
    folder / 'corpus.jsonl',
    ({'_id': f'c{len(x)}', 'title': t, 'text': x} for t, x in titled),
  )
  return [(1, 4), (3, 0), (3, 1)], [0, 2]


def write_dpr(folder):
  formats.write_dpr(folder)
  path = folder / 'biencoder-nq-train.json'
  records = json.loads(path.read_text())
  text = formats.passage_text(5)
  for record, asked in zip(
    records, (text, text.upper(), f'title "1"  {text}'), strict=False
  ):
    record['question'] = asked
  path.write_text(json.dumps(records))
  return [(0, 5), (1, 5), (2, 5)], [0, 1]


def write_msmarco(folder):
  formats.write_msmarco(folder)
  text = formats.passage_text(4)
  rewrite(folder / 'queries.train.tsv', text, text.upper())
  return [(0, 4), (1, 4)], [0, 1]


def write_documents(folder):
  """Document 4 has no body: its title is its text."""
  formats.write_documents(folder)
  whole = f'http://site.org/7?a=b title 7 {formats.passage_text(7)}'
  path = folder / 'msmarco-doctrain-queries.tsv'
  rewrite(path, 'title 4', 'Title 4', whole)
  return [(0, 4), (1, 4), (2, 7)], [0, 1]


def rewrite(path, *texts):
  """Gives the first queries of MS MARCO other texts."""
  lines = path.read_text().splitlines()
  lines[: len(texts)] = [f'{1000 + n}\t{text}' for n, text in enumerate(texts)]
  path.write_text('\n'.join(lines) + '\n')


def write_lines(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))


@pytest.mark.parametrize(
  ('name', 'write'),
  [
    ('pairs', write_pairs),
    ('dpr', write_dpr),
    ('msmarco', write_msmarco),
    ('msmarco_doc', write_documents),
  ],
)
def test_all_readers_find_equal_texts(
  name, write, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(keys, '_ROWS_AT_ONCE', 3)
  own, twins = write(tmp_path)
  config = config_lib.Config(
    dataset=name, data_dir=str(tmp_path), dev_fraction=0
  )
  corpus, splits = experiment.load_texts(config, ('train',))
  assert corpus.keys is None  # They are gone once all splits are made.
  split = splits['train']
  found = split.own_passages().T.tolist()
  assert [tuple(pair) for pair in found] == own
  assert np.flatnonzero(split.twins()).tolist() == twins
  out = capsys.readouterr().out
  queries = len({query for query, _ in own})
  assert f'train: {queries} queries are passages of the corpus, too' in out
  assert f'train: {len(twins)} queries have the text of another' in out


@pytest.mark.parametrize(
  ('title', 'text', 'asked'),
  [
    ('Iron', '', 'iron'), ('Iron', ' \t', 'IRON '), ('', 'rusts', 'Rusts'),
    ('Iron', 'rusts', 'iron  rusts'), ('Iron', 'rusts', 'rusts'),
  ],
)  # fmt: skip
def test_a_query_is_a_passage_by_its_text_or_title_and_text(title, text, asked):
  starts = keys.as_starts(keys.of_passage(title, text)[1])
  assert keys.of_texts([asked])[0] in starts
  assert keys.of_texts([f'{asked}x'])[0] not in starts


def test_what_is_equal_is_told_by_split(folder, capsys):
  run = run_of(folder)
  slow, split = Slow(folder, 'usual'), run.dataset.splits['train']
  asked = {normal(text) for text in run.dataset.splits['dev'].texts}
  shared = sum(normal(text) in asked for text in split.texts)
  assert (
    corpus_lib.queries_shared(split, run.dataset.splits['dev']) == shared > 0
  )
  out = capsys.readouterr().out
  assert f"train: {shared} queries have the text of a query of 'dev'" in out
  assert "the text of a query of 'train'" not in out
  facts = inspect.split_facts(split)
  equal = sum(len(equal) > 1 for equal in slow.equal)
  assert facts['queries of the same text as another'] == equal > 0
  own = sum(map(bool, slow.own))
  assert facts['queries that are passages, too'] == own > 0


def test_dev_is_left_out_where_all_splits_are_asked_for_and_it_has_no_query(
  tmp_path,
):
  write_pairs(tmp_path)
  config = config_lib.Config(dataset='pairs', data_dir=str(tmp_path))
  few = dataclasses.replace(config, dev_fraction=1e-9)
  assert list(experiment.load_texts(few, None).splits) == ['train']
  none = dataclasses.replace(config, dev_fraction=0)
  assert list(experiment.load_texts(none, None).splits) == ['train']
  many = dataclasses.replace(config, dev_fraction=0.5)
  assert list(experiment.load_texts(many, None).splits) == ['train', 'dev']
  with pytest.raises(errors.BadInput, match="split 'dev'"):
    experiment.load_texts(few, ('train', 'dev'))


def test_the_page_shows_as_right_what_was_judged_for_an_equal_query(
  folder, tmp_path, monkeypatch
):
  run = run_of(folder, workdir=str(tmp_path))
  slow, shown = Slow(folder, 'usual'), []

  def results(run, shots, query, judged):
    shown.append(judged)
    return [['', ''], ['1', '']]

  monkeypatch.setattr(serve, '_results', results)
  texts = run.dataset.splits['train'].texts
  for row, text in enumerate(texts):
    serve._page(run, [], {text: row}, text)
  every = range(len(slow.ids))
  assert shown == [slow.positives(query, last=False)[1] for query in every]
