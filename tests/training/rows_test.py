"""Rows beyond ANCE's own: what each mines, trains and begins again with."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from types import SimpleNamespace

import background_test
import crash_test
import distributed_test
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import logs
from ance_jax.data import corpus as corpus_lib
from ance_jax.jobs import batch_report
from ance_jax.jobs import inspect
from ance_jax.jobs import mine
from ance_jax.jobs import train
from ance_jax.models import bi_encoder
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import negatives
from ance_jax.training import refreshes
from ance_jax.training import schedule
from ance_jax.training import searched
from ance_jax.training import teachers
from ance_jax.training import topics
from ance_jax.training import trainer

pytestmark = pytest.mark.usefixtures('compiled_once')


def score(query, passage):
  """The teacher's score of two rows: any function of them."""
  return round(float(np.sin(7 * query + 3 * passage)) * 4, 3)


@pytest.fixture(scope='module')
def scores_file(tmp_path_factory, beir_folder):
  """A run file of a teacher, without query 3's positives and some passages."""
  path = tmp_path_factory.mktemp('teacher') / 'scores.trec'
  judged = (beir_folder / 'qrels' / 'train.tsv').read_text().split('\n')[1:-1]
  of_three = {line.split('\t')[1] for line in judged if line.startswith('q3\t')}
  lines = []
  for query in range(48):
    found = {
      f'p{passage}': score(query, passage)
      for passage in range(150)
      if (passage + query) % 10
      and not (query == 3 and f'p{passage}' in of_three)
      or is_judged(judged, query, passage)
      and query != 3
    }
    for rank, name in enumerate(sorted(found, key=found.get, reverse=True), 1):
      lines.append(f'q{query} Q0 {name} {rank} {found[name]} teacher\n')
  path.write_text(''.join(lines))
  return path


def is_judged(lines, query, passage):
  return any(line.startswith(f'q{query}\tp{passage}\t') for line in lines)


@pytest.fixture(scope='module')
def given_file(tmp_path_factory, beir_folder):
  """Three negatives a query, with scores, and those of its positives."""
  path = tmp_path_factory.mktemp('given') / 'given.jsonl'
  judged = (beir_folder / 'qrels' / 'train.tsv').read_text().split('\n')[1:-1]
  with open(path, 'w') as file:
    for query in range(48):
      positives = [
        int(line.split('\t')[1][1:])
        for line in judged
        if line.startswith(f'q{query}\t')
      ]
      negatives = [(positives[0] + n) % 150 for n in (31, 53, 71)]
      record = {
        'query_id': f'q{query}',
        'positive_ids': [f'p{row}' for row in positives],
        'positive_scores': [score(query, row) for row in positives],
        'negative_ids': [f'p{row}' for row in negatives],
        'negative_scores': [score(query, row) for row in negatives],
      }
      file.write(json.dumps(record) + '\n')
  return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory, beir_folder):
  """The folder of a run, to begin from and to be a guide."""
  folder = tmp_path_factory.mktemp('trained') / 'run'
  config = conftest_tiny(beir_folder, folder)
  train.run(dataclasses.replace(config, method='in_batch', num_devices=1))
  return folder


def conftest_tiny(*arguments):
  import conftest

  return conftest.make_tiny(*arguments)


def of_row(name, config, scores_file, given_file, trained):
  """Returns the settings of an eventful run of a row."""
  more = {
    'star': {'warmup_steps': 2},
    'distill': {'score_run': str(scores_file), 'also_weight': 0.2},
    'margin_mse': {
      'score_run': str(scores_file), 'draw': 'bins', 'topics': 5
    },
    'distill_given': {'negatives': str(given_file)},
    'margin_mse_given': {'negatives': str(given_file), 'draw': 'top'},
    'adore': {'tie_encoders': False, 'init_from': str(trained)},
    'guided': {'guide': str(trained), 'guide_margin': -0.2},
    'ance_given': {'negatives': str(given_file), 'negatives_per_source': 2},
    'ance_guided': {
      'guide': 'refresh', 'guide_margin': -0.02, 'also_weight': 0.5,
      'teacher_temperature': 0.1
    },
    'ance_tele': {'negatives_per_source': 4, 'rate_steps': 8},
    'ance': {
      'draw': 'simans', 'mask_above': 0.1, 'trainable': 'layer_0',
      'score_run': str(scores_file), 'positive_min_score': 3.9
    },
    'ance_in_batch': {
      'symmetric_columns': True, 'matryoshka_widths': '8,4',
      'hardness_weight': 2.0, 'draw': 'simans_abs'
    },
  }[name]  # fmt: skip
  if not methods.METHODS[name].refreshes:
    more['warmup_steps'] = 0
  return dataclasses.replace(config, method=name, **more)


NAMES = (
  'star', 'distill', 'margin_mse', 'distill_given', 'margin_mse_given', 'adore',
  'guided', 'ance_guided', 'ance_given', 'ance_tele', 'ance', 'ance_in_batch'
)  # fmt: skip


@pytest.fixture
def make(eventful, scores_file, given_file, trained):
  def make(name, **changes):
    config = of_row(name, eventful, scores_file, given_file, trained)
    return dataclasses.replace(config, **changes)

  return make


class Killed(BaseException):
  pass


@pytest.mark.parametrize('name', NAMES)
def test_a_run_that_dies_twice_ends_as_if_nothing_had_been(
  name, make, tmp_path, monkeypatch
):
  config = make(name, workdir=str(tmp_path / 'whole'))
  train.run(config)
  expected = crash_test.outcome(config)
  take_step = trainer.Trainer.take_step

  def killed(self, batch):
    if self.step == self.dies_at:
      raise Killed
    take_step(self, batch)

  again = dataclasses.replace(config, workdir=str(tmp_path / 'again'))
  for step in (8, 13):
    with monkeypatch.context() as patch:
      patch.setattr(trainer.Trainer, 'take_step', killed)
      patch.setattr(trainer.Trainer, 'dies_at', step, raising=False)
      with pytest.raises(Killed):
        train.run(again)
  train.run(again)
  found = crash_test.outcome(again)
  crash_test.check_same(found, expected)
  steps = [step for step, name in found[3] if name == 'train/loss']
  assert steps == list(range(1, 17))


def opened(config):
  splits = (config.train_split, config.dev_split)
  return experiment.open(dataclasses.replace(config, checkpoint='last'), splits)


def test_star_and_the_distilled_refresh_once(make):
  for name in ('star', 'distill', 'margin_mse'):
    config = make(name)
    assert schedule.num_refreshes(config) == 1
    assert schedule.refresh_due(config, config.warmup_steps)
    more = dataclasses.replace(config, max_refreshes=3)
    assert schedule.num_refreshes(more) == 1
    why = config_lib.why_unread(config, 'max_refreshes')
    assert why == f'on --method={name}, which refreshes once'


def test_negatives_come_with_the_scores_of_the_teacher(make, capsys):
  """Those it does not score, and the query it has no positive of, are out."""
  config = make('distill')
  train.run(config)
  run, _ = opened(config)
  stored = refreshes.load(run, 4)
  split, corpus = run.dataset.splits['train'], run.dataset.corpus
  queries, positives = split.shared_positives()
  for query, row in enumerate(stored.negatives):
    number = int(split.ids[query][1:])
    names = [int(corpus.ids[passage][1:]) for passage in row if passage >= 0]
    assert (number == 3) == (not names)
    assert all((name + number) % 10 for name in names)
    expected = [score(number, name) for name in names]
    there = row >= 0
    np.testing.assert_allclose(stored.taught[query][there], expected, atol=1e-6)
    assert np.isnan(stored.taught[query][~there]).all()
  expected = [
    score(int(split.ids[q][1:]), int(corpus.ids[p][1:]))
    for q, p in zip(queries, positives, strict=True)
    if split.ids[q] != 'q3'
  ]
  of_three = np.array([split.ids[q] == 'q3' for q in queries])
  assert np.isnan(stored.positive_taught[of_three]).all()
  np.testing.assert_allclose(
    stored.positive_taught[~of_three], expected, atol=1e-6
  )
  out = capsys.readouterr().out
  assert '1 queries have a positive that the teacher does not score' in out
  check_batches(run, config, schedule.ActiveRefresh(4, 4))


def check_batches(run, config, active):
  """Each passage of a batch has its own score by the teacher."""
  method = methods.METHODS[config.method]
  negatives = refreshes.negatives_for(run, method, active)
  data = experiment.training_data(run, method)
  split, corpus = run.dataset.splits['train'], run.dataset.corpus
  for step in range(5, 9):
    drawn = batches.draw_rows(
      data,
      step,
      seed=config.seed,
      batch_size=8,
      num_negatives=2,
      negatives=negatives,
      draw=experiment.draw(config, method),
    )
    for query, passages, taught in zip(*drawn, strict=True):
      number = int(split.ids[query][1:])
      expected = [
        score(number, int(corpus.ids[passage][1:])) for passage in passages
      ]
      np.testing.assert_allclose(taught, expected, atol=1e-6)


@pytest.mark.parametrize('name', ['distill_given', 'margin_mse_given'])
def test_scores_that_come_with_given_negatives_teach(name, make):
  config = make(name)
  train.run(config)
  run, _ = opened(config)
  check_batches(run, config, None)


def test_adore_trains_the_query_tower_alone_and_encodes_the_corpus_once(make):
  config = make('adore', steps_per_eval=2)
  train.run(config)
  run, step = opened(config)
  first, last = (
    checkpoint.read_params(
      config.workdir, n, bi_encoder.shapes(run.retriever.config), run.devices
    )
    for n in (checkpoint.committed_steps(pathlib.Path(config.workdir))[0], step)
  )
  same = {
    side: all(
      (a == b).all()
      for a, b in zip(
        *(map(np.asarray, leaves(tree[side])) for tree in (first, last)),
        strict=True,
      )
    )
    for side in first
  }
  assert same == {bi_encoder.QUERY: False, bi_encoder.PASSAGE: True}
  assert len(list(pathlib.Path(config.workdir, 'embeddings').iterdir())) == 1
  encoded = logs.series(config.workdir, 'flops/encode')
  assert len(encoded) > 5
  assert crash_test.outcome(config)[1][1].keys() == {bi_encoder.QUERY}


def leaves(tree):
  import jax

  return jax.tree.leaves(tree)


def test_towers_that_are_one_cannot_train_alone(make):
  config = make('adore', tie_encoders=True, init_from='')
  with pytest.raises(
    errors.BadInput, match='set --notie_encoders, with --init'
  ):
    train.run(config)


def test_an_episode_begins_with_the_first_weights_and_a_new_optimizer(
  make, monkeypatch
):
  config = make('ance_tele', warmup_steps=4, restart_from='warmup')
  take_step, seen = trainer.Trainer.take_step, {}

  def look(self, batch):
    # Dropout goes by it, and checkpoints hold it.
    assert int(self.state.step) == self.step
    if self.step in (0, 4, 8, 12):
      seen[self.step] = [
        [np.asarray(x) for x in leaves(tree)]
        for tree in (self.state.params, self.state.opt_state)
      ]
    take_step(self, batch)

  monkeypatch.setattr(trainer.Trainer, 'take_step', look)
  train.run(config)
  for step in (8, 12):
    for found, expected in zip(seen[step], seen[4], strict=True):
      for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
  moved = [(a != b).any() for a, b in zip(seen[0][0], seen[4][0], strict=True)]
  assert any(moved)
  assert not any(x.any() for x in seen[8][1])
  rates = logs.series(config.workdir, 'train/learning_rate')
  assert [rates[n] for n in (5, 6, 7)] == [rates[n] for n in (9, 10, 11)]
  assert rates[1] == rates[5] == 0 < rates[2]
  assert 4 in checkpoint.committed_steps(pathlib.Path(config.workdir))


def test_an_episode_keeps_the_negatives_of_those_before(make):
  config = make('ance_tele')
  train.run(config)
  run, _ = opened(config)
  first, second = (refreshes.load(run, n).negatives for n in (4, 8))
  assert first.shape[1] <= 8 < second.shape[1] <= 16
  for before, after in zip(first, second, strict=True):
    assert set(before) - {-1} <= set(after)
    there = after[after >= 0]
    assert len(set(there)) == len(there)
  made = [refreshes.manifest(run, n) for n in (4, 8, 12)]
  assert 'momentum' not in made[0]
  for before, after in zip(made, made[1:], strict=False):
    files = before['files']
    assert after['momentum'] == [before['step'], files['negatives.npy']]


def test_the_passages_near_the_first_positive_are_negatives_too(make):
  """With all of its 10, the union is those of the query and of its positive."""
  config = make('ance_tele', negatives_per_source=0, max_steps=5)
  train.run(config)
  run, _ = opened(config)
  params = checkpoint.read_params(
    config.workdir, 4, bi_encoder.shapes(run.retriever.config), run.devices
  )
  run = run.with_params(params)
  indexed = run.index_corpus(logs.Stopwatch())
  passages = np.concatenate(indexed.blocks)
  queries = run.encode_queries('train', logs.Stopwatch())
  split, groups = run.dataset.splits['train'], run.dataset.corpus.groups
  of_query, positives = split.shared_positives()
  stored = refreshes.load(run, 4)
  for query, found in enumerate(stored.negatives):
    own = positives[of_query == query]
    banned = {groups[row] for row in own}
    banned |= {groups[p] for q, p in split.own_passages().T if q == query}
    expected = []
    for vector in (queries[query], passages[own[0]]):
      order = np.argsort(-(passages @ vector), kind='stable')
      allowed = [row for row in order.tolist() if groups[row] not in banned]
      expected += [row for row in allowed[:10] if row not in expected]
    assert set(found[found >= 0].tolist()) == set(expected)
    there = found >= 0
    np.testing.assert_allclose(
      stored.scores[query][there],
      passages[found[there]] @ queries[query],
      atol=1e-5,
    )


@pytest.mark.parametrize('slices', [1, 2])
def test_sources_of_a_row_are_drawn_from_and_joined(slices, make):
  config = make('ance_given', negatives_per_source=2, query_slices=slices)
  train.run(config)
  run, _ = opened(config)
  given = run.dataset.splits['train'].given
  index, step = {}, 4 * slices
  start, _ = refreshes.manifest(run, step)['query_slice']
  assert (start > 0) == (slices > 1)
  for query, found in enumerate(refreshes.load(run, step).negatives, start):
    there = set(found[found >= 0].tolist())
    assert 2 <= len(there) <= 4
    index[query] = len(there & set(given.of(query).tolist()))
  assert min(index.values()) >= 1
  assert sum(index.values()) >= 2 * len(index) - 6


def test_verdicts_make_positives_of_what_they_score_high(make, capsys):
  config = make('ance')
  train.run(config)
  run = experiment.restore(config, ('train', 'dev'), 16)
  split, corpus = run.dataset.splits['train'], run.dataset.corpus
  queries, positives = split.positives()
  found = {
    (int(split.ids[q][1:]), int(corpus.ids[p][1:]))
    for q, p in zip(queries, positives, strict=True)
  }
  lines = pathlib.Path(config.score_run).read_text().splitlines()
  high = {
    (int(line.split()[0][1:]), int(line.split()[2][1:]))
    for line in lines
    if float(line.split()[4]) >= 3.9
  }
  judged = dataclasses.replace(config, job='evaluate')
  before = experiment.restore(judged, ('train', 'dev'), 16)
  old = before.dataset.splits['train']
  expected = {
    (int(old.ids[q][1:]), int(corpus.ids[p][1:]))
    for q, p in zip(*old.positives(), strict=True)
  }
  assert len(high - expected) > 50
  assert found == expected | high
  said = f'{len(high - expected):,} passages that were not judged are positives'
  assert said in capsys.readouterr().out
  table = refreshes.load(run, 4).negatives
  for query, row in enumerate(table):
    number = int(split.ids[query][1:])
    names = {(number, int(corpus.ids[p][1:])) for p in row if p >= 0}
    assert not names & found
  # Judgements of a query keep their order, new ones follow.
  for query in range(len(split.ids)):
    own = split.passages[slice(*split.offsets[query : query + 2])]
    was = old.passages[slice(*old.offsets[query : query + 2])]
    np.testing.assert_array_equal(own[: len(was)], was)


def test_topics_are_clusters_of_the_first_weights_and_cannot_come_later(make):
  config = make('margin_mse')
  train.run(config)
  folder = pathlib.Path(config.workdir, 'topics')
  assert set(np.load(folder / 'topics.npy')) == set(range(5))
  shutil.rmtree(folder)
  with pytest.raises(errors.BadInput, match='topics of the training queries'):
    train.run(dataclasses.replace(config, max_steps=17))


def test_what_is_shown_of_a_batch_has_the_positives_of_verdicts(
  make, monkeypatch
):
  config = make('ance', max_steps=5)
  draw_rows, drawn = batches.draw_rows, {}

  def noting(data, step, **settings):
    drawn[step] = draw_rows(data, step, **settings)
    return drawn[step]

  monkeypatch.setattr(batches, 'draw_rows', noting)
  train.run(config)
  of_training = drawn.pop(4)
  inspect.run(dataclasses.replace(config, job='inspect'))
  np.testing.assert_array_equal(drawn[4].passages, of_training.passages)


def test_what_is_shown_of_a_batch_is_of_one_topic_where_the_step_s_is(
  make, monkeypatch
):
  config = make('margin_mse')
  draw_rows, drawn = batches.draw_rows, {}

  def noting(data, step, **settings):
    drawn[step] = draw_rows(data, step, **settings)
    return drawn[step]

  monkeypatch.setattr(batches, 'draw_rows', noting)
  run = experiment.create(config, ('train', 'dev'))[0]._replace(id='')
  assert '8 queries of any topics, as only a run' in batch_report.lines(run)[0]
  train.run(config)
  of_training = drawn.pop(4)
  run, _ = opened(config)
  assert batch_report.lines(run)[0].endswith('8 queries')
  np.testing.assert_array_equal(drawn[4].passages, of_training.passages)


# The set has no answers, which this row needs.
KNOWN = sorted(methods.METHODS.keys() - {'ance_code_qa'})
MODES = {
  'delayed': {'refresh_mode': 'delayed', 'refresh_delay': 2},
  'async': {'refresh_mode': 'async'},
  'external': {'refresh_mode': 'external'},
  'remote': {},
  'slices': {'query_slices': 2},
  'trigger': {'refresh_trigger': 0.5},
  'plateau': {'warmup_until_plateau': 1},
  'chunks': {'chunks': 2, 'passage_length': 8, 'symmetric_columns': False},
  'micro-batches': {'micro_batch_size': 2},
  'remat': {'remat': True},
  'simans': {'draw': 'simans'},
  'bins': {'draw': 'bins'},
  'margin': {'relative_margin': 0.05},
  'topics': {'topics': 3},
  'matryoshka': {'matryoshka_widths': '8,4'},
  'symmetric': {'symmetric_columns': True},
  'guide': {'guide_margin': 0.0, 'symmetric_columns': False},
  'own guide': {
    'guide_margin': 0.0,
    'symmetric_columns': False,
    'guide': 'refresh',
  },
}


@pytest.mark.parametrize('mode', MODES)
def test_each_row_goes_with_a_mode_or_says_why_not(
  mode, make, scores_file, given_file, trained
):
  """The pairs themselves are run by the soak; here, what is refused."""
  refused = {}
  for name in KNOWN:
    try:
      config = of_pair(name, mode, make, scores_file, given_file, trained)
      train.run(dataclasses.replace(config, dry_run=True))
    except errors.BadInput as error:
      refused[name] = str(error)
  assert all('; ' in text for text in refused.values())
  expected = {name for name in KNOWN if mode in refusals(name)}
  assert refused.keys() == expected


@pytest.mark.soak
@pytest.mark.parametrize('name', KNOWN)
def test_each_pair_of_a_row_and_a_mode_trains(
  name, make, scores_file, given_file, trained, tmp_path
):
  for mode in MODES:
    if mode not in refusals(name):
      config = of_pair(name, mode, make, scores_file, given_file, trained)
      folder = str(tmp_path / mode)
      config = dataclasses.replace(config, workdir=folder, max_steps=10)
      refreshes_beside = mode == 'external' and methods.METHODS[name].refreshes
      beside = (
        background_test.refresher(config)
        if refreshes_beside
        else contextlib.nullcontext()
      )
      with beside as ended:
        assert train.run(config)
      assert not ended
      if refreshes_beside:
        background_test.replayed(config)


@pytest.mark.soak
@pytest.mark.parametrize(
  'name', ['adore', 'guided', 'ance_guided', 'ance_tele', 'distill']
)
def test_two_processes_train_a_row_as_one_does(name, make, tmp_path):
  # A seed without two candidates whose scores differ by rounding alone.
  changes = {'rows_per_block': 16, 'seed': 2, 'num_devices': 4}
  alone = make(name, workdir=str(tmp_path / 'alone'), **changes)
  train.run(alone)
  config = dataclasses.replace(
    alone, workdir=str(tmp_path / 'two'), num_devices=0
  )
  assert [code for code, *_ in distributed_test.together(config, 2)] == [0, 0]
  for measure in ('train/loss', 'dev/mrr@10'):
    found, expected = (
      logs.series(run.workdir, measure) for run in (config, alone)
    )
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(
      list(found.values()), list(expected.values()), atol=1e-5
    )


def of_pair(name, mode, make, scores_file, given_file, trained):
  changes = dict(MODES[mode])
  if mode == 'guide' or (name == 'guided' and mode != 'own guide'):
    changes['guide'] = str(trained)
  if mode == 'remote':
    changes['remote_dir'] = f'{make("star").workdir}-remote-{name}'
  if name not in NAMES:
    changes['method'] = name
    if not methods.METHODS[name].refreshes:
      changes['warmup_steps'] = 0
    if 'given' in methods.METHODS[name].sources:
      changes['negatives'] = str(given_file)
    return make('star', **changes)
  return make(name, **changes)


def refusals(name):
  """The modes that a row is refused with."""
  row, found = methods.METHODS[name], set()
  if not row.refreshes:
    found |= {'slices', 'trigger', 'simans', 'plateau', 'own guide'}
  if 'given' in row.sources:
    found.add('margin')
  if row.triplets:
    found |= {'trigger', 'simans', 'topics'}
  if name == 'ance_guided':
    found |= {'chunks', 'external'}
  if row.searches:
    found |= {'chunks', 'matryoshka', 'symmetric', 'guide', 'margin'}
  if row.restarts:
    found |= {'delayed', 'async', 'external', 'slices', 'trigger'}
  if row.teacher != 'mined':
    found.add('bins')
  if row.teacher or not row.in_batch:
    found.add('symmetric')
  return found


def test_a_row_with_a_teacher_is_no_warm_up():
  rows = methods.of_warm_up()
  assert {'in_batch', 'bm25', 'dpr', 'given', 'random'} <= set(rows)
  assert not {'adore', 'guided', 'distill_given', 'star'} & set(rows)


def with_twins(config):
  """Returns a new run in which queries 2, 5 and 20 have one text."""
  run, _ = experiment.create(config, ('train', 'dev'))
  split = run.dataset.splits['train']
  groups = np.arange(len(split.ids), dtype=np.int32)
  groups[[5, 20]] = 2
  splits = {**run.dataset.splits, 'train': split._replace(groups=groups)}
  return run._replace(dataset=run.dataset._replace(splits=splits))


def test_one_positive_of_a_query_goes_with_its_own_score(make, monkeypatch):
  """Queries of equal text have more positives than a row of one takes."""
  config = make('ance', trainable='', score_run='', positive_min_score=None)
  run = with_twins(config)
  split = run.dataset.splits['train']
  row = methods.METHODS['ance']._replace(last_positive=True)
  monkeypatch.setitem(methods.METHODS, 'ance', row)
  queries, positives = split.shared_positives(last=True)
  assert len(queries) > len(split.ids)
  values = (1000 * queries + positives).astype(np.float32)
  table = np.tile(np.arange(3, dtype=np.int32), (len(split.ids), 1))
  for start in (0, 11):
    first = np.searchsorted(queries, start)
    stored = negatives.Stored(
      table[start:], table[start:].astype(np.float32), values[first:]
    )
    found = refreshes.of_table(run, start, stored, 0)
    data = experiment.training_data(run, row)
    for place, query in enumerate(found.rows):
      pick = data.offsets[query]
      value = found.positive_scores[pick - found.first_pair]
      assert value == 1000 * query + data.positives[pick]
      assert place + start == query


def test_a_query_takes_the_scores_that_its_twin_has(make):
  config = make('distill')
  run = with_twins(config)
  split = run.dataset.splits['train']
  table = np.tile(np.arange(3, dtype=np.int32), (len(split.ids), 1))
  row = methods.METHODS['distill']
  found, counts = negatives.teach(run, row, negatives.Stored(table), 0, keep='')
  # Query 3 alone has a positive that nobody scores.
  assert counts['queries_without_teacher'] == 1
  queries, positives = split.shared_positives()
  ids, names = run.dataset.splits['train'].ids, run.dataset.corpus.ids
  for query, passage, value in zip(
    queries, positives, found.positive_taught, strict=True
  ):
    twins = np.flatnonzero(split.groups == split.groups[query])
    values = [score(int(ids[t][1:]), int(names[passage][1:])) for t in twins]
    if ids[query] != 'q3':
      assert min(abs(value - one) for one in values) < 1e-5


def test_a_missing_score_is_looked_up_under_the_queries_of_the_same_text():
  """Wherever the pair stands among those that are asked about."""
  groups = np.array([0, 1, 2, 0, 2])
  split = SimpleNamespace(
    groups=groups, twins=lambda: np.bincount(groups)[groups] > 1
  )
  known = {(3, 7): 0.5, (4, 8): 0.25, (1, 7): 9.0, (3, 8): 9.0}
  # Both of the same text have one: each keeps its own.
  known |= {(2, 6): 0.125, (4, 6): 7.0, (0, 5): 3.0, (3, 5): 0.0625}

  def score(queries, passages):
    pairs = zip(queries.tolist(), passages.tolist(), strict=True)
    return np.array([known.get(pair, np.nan) for pair in pairs])

  queries = np.array([0, 0, 1, 2, 3, 4, 2, 0, 3])
  passages = np.array([7, 9, 8, 8, 7, 6, 6, 5, 5])
  found = teachers.with_twins(
    score, split, queries, passages, score(queries, passages)
  )
  nan = np.nan
  np.testing.assert_array_equal(
    found, [0.5, nan, nan, 0.25, 0.5, 7, 0.125, 3, 0.0625]
  )


def test_a_negative_keeps_its_score_where_one_before_it_has_no_teacher(make):
  """SimANS draws by it."""
  run, _ = experiment.create(make('distill', draw='simans'), ('train', 'dev'))
  number = len(run.dataset.splits['train'].ids)
  table = np.tile(np.arange(20, dtype=np.int32), (number, 1))
  stored = negatives.Stored(table, 1000 + table.astype(np.float32))
  row = methods.METHODS['distill']
  found, counts = negatives.teach(run, row, stored, 0, keep='')
  assert counts['without_teacher'] > 0
  there = found.negatives >= 0
  expected = np.where(there, 1000 + found.negatives, np.nan)
  np.testing.assert_array_equal(found.scores, expected)


@pytest.mark.parametrize(
  ('name', 'published'), [('distill', '00000004'), ('distill_given', 'given')]
)
def test_what_a_teacher_scored_is_there_until_it_is_published(
  name, published, make, monkeypatch
):
  config = make(name, max_steps=5)
  parts, publish = {}, atomic.publish

  @contextlib.contextmanager
  def noting(folder, about):
    with publish(folder, about) as unfinished:
      yield unfinished
    taught = pathlib.Path(config.workdir, 'taught')
    parts[pathlib.Path(folder).name] = list(taught.rglob('*.npy'))

  monkeypatch.setattr(atomic, 'publish', noting)
  train.run(config)
  assert parts[published]


def test_a_teacher_that_changes_ends_a_run(make, tmp_path, trained):
  path = tmp_path / 'scores.trec'
  config = make('distill')
  shutil.copy(config.score_run, path)
  config = dataclasses.replace(config, score_run=str(path), max_steps=6)
  train.run(config)
  path.write_text(path.read_text().replace(' teacher', ' other'))
  with pytest.raises(errors.BadInput, match='is not the file with which'):
    train.run(dataclasses.replace(config, max_steps=8))
  guide = tmp_path / 'guide'
  shutil.copytree(trained, guide)
  config = make('guided', guide=str(guide), max_steps=6)
  config = dataclasses.replace(config, workdir=str(tmp_path / 'guided'))
  train.run(config)
  further = train_further(guide)
  assert further
  with pytest.raises(errors.BadInput, match='has other weights than when'):
    train.run(dataclasses.replace(config, max_steps=8))


def train_further(folder):
  from ance_jax import flags

  config = flags.from_flagfile(f'{folder}/run.flags', workdir=str(folder))
  return train.run(dataclasses.replace(config, max_steps=14))


def test_to_look_at_a_run_writes_nothing_into_it(make, scores_file):
  config = make('distill')
  train.run(config)
  folder = pathlib.Path(config.workdir)
  before = {
    path: path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file() and 'refresh' in path.parts
  }
  found = inspect.run(
    dataclasses.replace(config, job='inspect', score_run='', also_weight=0.2)
  )
  assert any('negative' in line for line in found['batch'])
  assert before
  for path, content in before.items():
    assert path.read_bytes() == content
  job = dataclasses.replace(
    config, job='mine', score_run='', num_negatives=2,
    output=str(folder.parent / 'mined.jsonl'),
  )  # fmt: skip
  assert mine.run(job)


@pytest.mark.parametrize('name', ['distill', 'distill_given'])
def test_what_a_teacher_scored_before_a_kill_is_not_scored_again(
  name, make, monkeypatch
):
  config = make(name)
  monkeypatch.setattr(teachers, '_PAIRS_AT_ONCE', 25)
  whole = dataclasses.replace(config, workdir=f'{config.workdir}-whole')
  train.run(whole)
  expected = crash_test.outcome(whole)
  scorer, asked = teachers.scorer, []

  def counted(run, split, *, raw=False):
    score = scorer(run, split, raw=raw)

    def scored(queries, passages):
      if not raw or len(queries) == 1:  # A query's twins are asked again.
        return score(queries, passages)
      if len(asked) == 6:
        asked.append(None)
        raise Killed
      asked.append((queries.tolist(), passages.tolist()))
      return score(queries, passages)

    return scored

  monkeypatch.setattr(teachers, 'scorer', counted)
  with pytest.raises(Killed):
    train.run(config)
  before = asked[:6]
  asked[:] = [None] * 7
  train.run(config)
  assert asked[7:]
  assert not [one for one in asked[7:] if one in before]
  crash_test.check_same(crash_test.outcome(config), expected)
  assert not list(pathlib.Path(config.workdir, 'taught').iterdir())


def test_processes_share_what_a_teacher_scores(make, monkeypatch, tmp_path):
  run, _ = experiment.create(make('distill'), ('train', 'dev'))
  monkeypatch.setattr(teachers, '_PAIRS_AT_ONCE', 20)
  random = np.random.default_rng(0)
  queries, passages = random.integers(40, size=(2, 190))
  scored = []

  def score(queries, passages):
    scored.append(len(queries))
    return np.sin(3 * queries + passages)

  def of_process(number, keep='4', score=score, run=run, **about):
    monkeypatch.setattr(teachers.distributed, 'index', lambda: number)
    return teachers.score_pairs(
      run, score, queries, passages, about=about, keep=keep, dealt=True
    )

  alone = of_process(0, keep='')
  np.testing.assert_allclose(alone, np.sin(3 * queries + passages), rtol=1e-5)
  assert len(scored) == 10
  assert not (run.workdir / 'taught').exists()
  scored.clear()
  monkeypatch.setattr(teachers.distributed, 'count', lambda: 2)

  def fails(what):
    raise Killed

  monkeypatch.setattr(teachers.distributed, 'barrier', fails)
  with pytest.raises(Killed):
    of_process(1)
  assert len(scored) == 5
  monkeypatch.setattr(teachers.distributed, 'barrier', lambda what: None)
  np.testing.assert_array_equal(of_process(0), alone)
  assert len(scored) == 10
  monkeypatch.setattr(teachers.distributed, 'count', lambda: 1)
  # What another teacher scored, or the same with other weights, is not taken.
  other = of_process(0, score=lambda q, _: np.zeros(len(q)), teacher='other')
  assert not other.any()
  model = tmp_path / 'model'
  model.mkdir()
  config = dataclasses.replace(
    run.config, cross_encoder=str(model), score_run=''
  )
  run = run._replace(config=config)
  for number, content in enumerate(('weights', 'other weights')):
    (model / 'model.safetensors').write_text(content)
    found = of_process(
      0,
      run=run,
      score=lambda q, _, n=number: np.full(len(q), n),
      teacher='model',
    )
    assert (found == number).all()
  np.testing.assert_array_equal(of_process(0), alone)
  assert len(scored) == 10
  teachers.forget(run.workdir, '4')
  of_process(0)
  assert len(scored) == 20


@pytest.mark.parametrize(
  ('job', 'promoted'),
  [('train', 2), ('refresh', 2), ('inspect', 2), ('evaluate', 0)],
)
def test_a_candidate_is_a_positive_from_the_least_score_on(
  job, promoted, tmp_path, capsys
):
  path = tmp_path / 'scores.trec'
  path.write_text('q Q0 a 1 0.75 t\nq Q0 b 2 0.5 t\nq Q0 c 3 0.4999 t\n')
  names = list('abcd')
  corpus = corpus_lib.make_corpus(names, [''] * 4, names)
  split = corpus_lib.make_split(
    corpus_lib.RawSplit(['q'], ['text'], {(0, 3): 2})
  )
  config = config_lib.Config(
    job=job, score_run=str(path), positive_min_score=0.5
  )
  texts = corpus_lib.TextDataset(corpus, {'train': split})
  found = experiment.with_verdicts(config, texts).splits['train']
  assert found.passages.tolist() == [3, 0, 1][: 1 + promoted]
  assert found.grades.tolist() == [2, 1, 1][: 1 + promoted]
  said = f': {promoted} passages that were not judged are positives'
  assert (said in capsys.readouterr().out) == bool(promoted)


def test_simans_draws_by_the_scores_that_the_loss_has():
  config = config_lib.Config(draw='simans', simans_b=-1.0, temperature=0.05)
  row = methods.METHODS[config.method]
  found = experiment.draw(config, row)
  assert found == batches.Draw('simans', config.simans_a, -1.0, 20.0)
  # A warm-up has no such scores.
  assert experiment.draw(config, methods.METHODS['bm25']) == batches.UNIFORM


@pytest.mark.parametrize('method', ['distill_given', 'margin_mse_given'])
def test_of_given_negatives_some_must_have_scores_to_be_taught_by(
  method, monkeypatch
):
  monkeypatch.setattr(negatives, '_check_room', lambda *_: None)

  def check(scores):
    given = corpus_lib.Given(
      np.array([0, 0]), np.array([1, 2]), np.array(scores)
    )
    run = SimpleNamespace(
      config=config_lib.Config(method=method, num_hard_negatives=1),
      dataset=SimpleNamespace(
        splits={'train': SimpleNamespace(given=given, negatives=None)}
      ),
    )
    negatives._check_given(run, True)

  with pytest.raises(errors.BadInput, match='needs a teacher'):
    check([np.nan, np.nan])
  check([0.5, np.nan])


def test_lists_that_are_too_short_for_a_step_are_filled_up(make):
  config = make('distill_given', method='given', num_hard_negatives=5)
  run, _ = experiment.create(config, ('train', 'dev'))
  found, counts = negatives.take_given(run)
  given = run.dataset.splits['train'].given
  assert found.negatives.shape[1] == 5
  assert (found.negatives >= 0).all()
  for query, row in enumerate(found.negatives.tolist()):
    own = [p for p in given.of(query).tolist() if p in row]
    assert row[: len(own)] == own
    assert len(own) >= 2
  assert counts['random'] >= 2 * len(found.negatives)


def test_topics_are_those_of_their_seed(tmp_path):
  queries = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)

  def of(seed):
    run = SimpleNamespace(
      id='run',
      config=config_lib.Config(topics=6, seed=seed),
      workdir=tmp_path / str(seed),
      dataset=SimpleNamespace(queries={'train': SimpleNamespace(hash='x')}),
      encode_queries=lambda split, watch: queries,
    )
    return topics.make(run, 0).tolist()

  assert of(0) == of(0) != of(1)


@pytest.mark.parametrize('same_text', [True, False])
def test_copies_of_a_positive_are_relevant_only_where_equal_texts_are_one(
  same_text, make, monkeypatch
):
  config = make('adore', drop_same_text=same_text, max_steps=1)
  place, placed = searched.place, []

  def noting(blocks, groups, devices):
    placed.append(groups)
    return place(blocks, groups, devices)

  monkeypatch.setattr(searched, 'place', noting)
  train.run(config)
  run, _ = opened(config)
  groups = run.dataset.corpus.groups
  assert len(set(groups.tolist())) < len(groups)
  expected = groups if same_text else np.arange(len(groups))
  np.testing.assert_array_equal(placed[0], expected)


def test_a_query_without_a_teacher_counts_once(make, tmp_path):
  """Query 4 has two positives, and query 3 is not scored anyway."""
  config = make('distill')
  lines = pathlib.Path(config.score_run).read_text().splitlines(True)
  path = tmp_path / 'fewer.trec'
  path.write_text(''.join(n for n in lines if not n.startswith('q4 ')))
  config = dataclasses.replace(config, score_run=str(path))
  run, _ = experiment.create(config, ('train', 'dev'))
  split = run.dataset.splits['train']
  assert split.offsets[5] - split.offsets[4] == 2
  table = np.tile(np.arange(3, dtype=np.int32), (len(split.ids), 1))
  row = methods.METHODS['distill']
  _, counts = negatives.teach(run, row, negatives.Stored(table), 0, keep='')
  assert counts['queries_without_teacher'] == 2
