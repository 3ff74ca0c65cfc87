"""The whole cycle on the small set: what is due when, and that it is done."""

import dataclasses
import json
import os
import pathlib
import shutil

import conftest
import jax
import numpy as np
import orbax.checkpoint as ocp
import padded
import pytest
from report_test import rows_of

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import devices as devices_lib
from ance_jax.core import logs
from ance_jax.core import pace
from ance_jax.core import workdirs
from ance_jax.jobs import footprint
from ance_jax.jobs import report
from ance_jax.jobs import sections
from ance_jax.jobs import train
from ance_jax.mining import miner
from ance_jax.models import bi_encoder
from ance_jax.retrieval import encoding
from ance_jax.retrieval import index
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import refreshes
from ance_jax.training import steps
from ance_jax.training import trainer

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def _finished(beir_folder, tmp_path_factory, compiled_once):
  folder = tmp_path_factory.mktemp('finished') / 'run'
  config = dataclasses.replace(
    conftest.make_tiny(beir_folder, folder), num_devices=1
  )
  train.run(config)
  return config


@pytest.fixture
def finished(_finished, tmp_path):
  """Settings of a run that ended at step 12, in a copy of its folder."""
  folder = shutil.copytree(_finished.workdir, tmp_path / 'run')
  return dataclasses.replace(_finished, workdir=str(folder))


def test_a_run_trains_mines_evaluates_and_leaves_what_it_says(
  tiny, capsys, monkeypatch
):
  monkeypatch.setenv('TQDM_DISABLE', '1')
  tiny = dataclasses.replace(tiny, max_steps=16, num_devices=2)
  began, begin = [], pace.Pace.begin
  monkeypatch.setattr(
    pace.Pace, 'begin', lambda self: (began.append(self), begin(self))
  )
  tables, write_page = [], report.write_page

  def written(workdir, path):
    write_page(workdir, path)
    tables.append(rows_of(path.read_text(), 'Refreshes')[1:])

  monkeypatch.setattr(report, 'write_page', written)
  scores = train.run(tiny)
  # The rate is of steps alone: each stretch between refreshes begins anew.
  assert len(began) == 4
  workdir = pathlib.Path(tiny.workdir)
  assert set(logs.series(workdir, 'train/loss')) == set(range(1, 17))
  assert set(logs.series(workdir, 'dev/mrr@10')) == {4, 8, 12, 16}
  assert logs.series(workdir, 'refresh/negatives_age') == {8: 4, 12: 4}
  assert set(logs.series(workdir, 'refresh/overlap')) == {8, 12}
  ages = logs.series(workdir, 'train/negatives_age')
  assert ages == {s: 1 + (s - 1) % 4 for s in range(5, 17)}
  seen = [(line['step'], name) for line in logs.read(workdir) for name in line]
  seen = [pair for pair in seen if pair[1] != 'step']
  assert len(seen) == len(set(seen))
  assert scores['mrr@10'] == logs.series(workdir, 'dev/mrr@10')[16]
  assert scores['mrr@10'] > 0.15
  pick_ups = atomic.read_json(workdir / 'pickups.json')['pickups']
  assert [(n['step'], n['refresh']) for n in pick_ups] == [
    (4, 4), (8, 8), (12, 12)
  ]  # fmt: skip
  assert checkpoint.committed_steps(workdir)[-3:] == [8, 12, 16]
  assert len(list((workdir / 'embeddings').iterdir())) == 1
  assert (workdir / 'curves.png').read_bytes()[:4] == b'\x89PNG'
  page = (workdir / workdirs.PAGE_FILE).read_text()
  shown = rows_of(page, 'Examples of dev')[1:]
  assert [row[1] for row in shown] == ['4', '16'] * 3
  # The page is written again at each refresh and at the end.
  assert [len(rows) for rows in tables] == [1, 2, 3, 3]
  assert [row[1] for row in tables[-1]] == ['4', '8', '12']
  assert len(rows_of(page, 'Dev by evaluation')) == 5
  assert sections.REFRESHED not in page
  out = capsys.readouterr().out
  assert 'refresh at step 8: dev mrr@10' in out
  assert 'negatives_age 4 | overlap with the last' in out
  assert out.count('query: ') == 3
  printed = [x.split(' | ') for x in out.splitlines() if x[:5] == 'step ']
  losses = logs.series(workdir, 'train/loss')
  rates = logs.series(workdir, 'train/learning_rate')
  assert [line[:2] for line in printed] == [
    [f'step {step} of 16', f'loss {losses[step]:.4g}'] for step in range(1, 17)
  ]
  assert [line[3] for line in printed] == [
    f'learning rate {rates[step]:.3g}' for step in range(1, 17)
  ]
  assert len(printed[0]) == 4
  assert all(' steps/s, ' in line[4] for line in printed[1:])


@pytest.mark.parametrize('method', ['random', 'bm25', 'dpr', 'ance'])
def test_every_other_row_trains(method, tiny):
  config = dataclasses.replace(
    tiny,
    method=method,
    warmup_method='bm25',
    warmup_steps=2,
    steps_per_refresh=3,
    max_steps=6,
    num_devices=1,
    dropout_rate=0.0,
  )
  train.run(config)
  losses = logs.series(config.workdir, 'train/loss')
  assert list(losses) == list(range(1, 7))
  assert len(set(losses.values())) == 6
  mined = logs.series(config.workdir, 'refresh/judged')
  assert list(mined) == ([2, 5] if method == 'ance' else [])
  assert list(logs.series(config.workdir, 'dev/mrr@10'))[-1] == 6


def watch_batches(monkeypatch):
  """Returns a list that fills with (step, batch, `Negatives`) as it is made."""
  seen, last = [], []
  real_draw, real_make = batches.draw_rows, batches.make_batch

  def draw_rows(data, step, **kwargs):
    last[:] = step, kwargs['negatives']
    return real_draw(data, step, **kwargs)

  def make_batch(*args, **kwargs):
    batch = real_make(*args, **kwargs)
    seen.append((last[0], batch, last[1]))
    return batch

  monkeypatch.setattr(batches, 'draw_rows', draw_rows)
  monkeypatch.setattr(batches, 'make_batch', make_batch)
  return seen


def test_the_released_code_trains_on_triplets_of_a_slice_in_a_row(
  tiny, monkeypatch
):
  config = dataclasses.replace(
    tiny,
    method='ance_code',
    warmup_method='bm25',
    warmup_steps=0,
    query_slices=5,
    num_hard_negatives=3,
    max_steps=24,
    num_devices=1,
    steps_per_checkpoint=3,
    checkpoints_to_keep=30,
  )
  seen = watch_batches(monkeypatch)
  train.run(config)
  run = experiment.open(config, ('train', 'dev'))[0]
  positives = dict(
    zip(*run.dataset.splits['train'].positives(last=True), strict=True)
  )
  slices = []
  for since in range(0, 24, 4):
    manifest = atomic.read_manifest(run.workdir / 'refresh' / f'{since:08d}')
    slices.append(tuple(manifest['query_slice']))
    table = refreshes.load(run, since).negatives
    size = slices[-1][1] - slices[-1][0]
    assert table.shape == (size, 3)
    made = [s for s in seen if since <= s[0] < since + 4]
    triplets = [t for _, batch, _ in made for t in texts_of(batch)]
    # 32 triplets of 3 a query: ten whole queries in a row, in an order that
    # begins again behind the slice's last.
    queries = [query for query, _, _ in triplets[:30:3]]
    assert len(set(queries)) == min(size, 10)
    assert queries[size:] == queries[: max(10 - size, 0)]
    for place, (query, positive, negative) in enumerate(triplets):
      row = row_of(run.dataset.queries['train'], query)
      assert slices[-1][0] <= row < slices[-1][1]
      assert positive == text_of(run.dataset.passages, positives[row])
      wanted = table[row - slices[-1][0], place % 3]
      assert negative == text_of(run.dataset.passages, wanted)
  assert slices == [(0, 9), (9, 18), (18, 27), (27, 36), (36, 48), (0, 9)]
  # The other positives of a query are negatives to this code.
  every = set(zip(*run.dataset.splits['train'].positives(), strict=True))
  deep = run._replace(config=dataclasses.replace(config, num_hard_negatives=10))
  refreshes.refresh(deep, 4)
  mined = {
    (9 + query, passage)
    for query, row in enumerate(refreshes.load(deep, 4).negatives)
    for passage in row
  }
  assert mined & every
  assert not mined & set(positives.items())


def text_of(rows, row):
  return tuple(rows.ids[rows.offsets[row] : rows.offsets[row + 1]].tolist())


def row_of(rows, text):
  (row,) = [r for r in range(len(rows)) if text_of(rows, r) == text]
  return row


def texts_of(batch):
  """Returns the (query, positive, negative) tokens of each row."""
  return [tuple(texts) for texts in padded.texts(batch)]


def test_the_released_code_goes_on_inside_of_a_slice_bit_for_bit(
  tiny, tmp_path
):
  config = dataclasses.replace(
    tiny,
    method='ance_code',
    query_slices=3,
    num_hard_negatives=3,
    max_steps=14,
    num_devices=1,
    steps_per_checkpoint=3,
    checkpoints_to_keep=9,
  )
  train.run(config)
  whole = read_params(config, 14)
  for step in (12, 14):
    shutil.rmtree(pathlib.Path(config.workdir) / 'checkpoints' / str(step))
  train.run(config)
  jax.tree.map(np.testing.assert_array_equal, read_params(config, 14), whole)


def test_the_released_openqa_code_leaves_out_passages_with_an_answer(
  tiny, beir_folder, tmp_path, monkeypatch
):
  folder = tmp_path / 'qa'
  shutil.copytree(beir_folder, folder)
  config = dataclasses.replace(
    tiny,
    data_dir=str(folder),
    method='ance_code_qa',
    num_hard_negatives=1,
    max_steps=8,
    num_devices=1,
  )
  with pytest.raises(errors.BadInput, match='48 training queries have none'):
    train.run(config)
  shutil.rmtree(config.workdir)
  queries = [
    json.loads(line)
    for line in (folder / 'queries.jsonl').read_text().splitlines()
  ]
  lines = [
    {'_id': q['_id'], 'answers': [max(q['text'].split())]} for q in queries
  ]
  # Two that any passage answers.
  words = [f't{topic}w{word}' for topic in range(12) for word in range(40)]
  lines[3]['answers'] = lines[5]['answers'] = words
  (folder / 'answers.jsonl').write_text(
    ''.join(json.dumps(line) + '\n' for line in lines)
  )
  seen = watch_batches(monkeypatch)
  train.run(config)
  run = experiment.open(config, ('train', 'dev'))[0]
  table, split = refreshes.load(run, 4).negatives, run.dataset.splits['train']
  plain = mine_plainly(run, 4)
  left_out = 0
  for query, row in enumerate(table):
    found = set(split.answers[query])
    kept = [
      p
      for p in plain[query]
      if not found & set(run.dataset.corpus.texts[p].split())
    ]
    left_out += config.top_k - len(kept)
    assert row.tolist() == kept + [-1] * (config.top_k - len(kept))
  assert logs.series(config.workdir, 'refresh/answers') == {4: left_out}
  assert [query for query, row in enumerate(table) if row[0] < 0] == [3, 5]
  assert logs.series(config.workdir, 'refresh/no_negatives') == {4: 2}
  for step, batch, negatives in seen:
    if step >= 4:
      for query, _, negative in texts_of(batch):
        row = row_of(run.dataset.queries['train'], query)
        there = [text_of(run.dataset.passages, p) for p in table[row] if p >= 0]
        assert negative in there
      assert len(negatives.rows) == (table[:, 0] >= 0).sum()


def mine_plainly(run, step):
  """Returns the top K of all training queries but for the last positive."""
  other = run._replace(
    config=dataclasses.replace(
      run.config, method='ance_code', num_hard_negatives=1
    )
  )
  last = dict(
    zip(*run.dataset.splits['train'].positives(last=True), strict=True)
  )
  shapes = bi_encoder.shapes(run.retriever.config)
  params = checkpoint.read_params(run.workdir, step, shapes, run.devices)
  watch = logs.Stopwatch()
  indexed = other.with_params(params).index_corpus(watch)
  queries = run.with_params(params).encode_queries('train', watch)
  rows = index.search(indexed.passage_index, queries, run.config.top_k + 1).rows
  return [
    [p for p in row.tolist() if p != last[query]][: run.config.top_k]
    for query, row in enumerate(rows)
  ]


def test_the_sisters_share_the_warm_up_bit_for_bit(tiny):
  changes = {
    'refreshed': {},
    'frozen': {'max_refreshes': 1},
    'in_batch': {'method': 'in_batch'},
  }
  params, losses = {}, {}
  for name, change in changes.items():
    config = dataclasses.replace(
      tiny, workdir=f'{tiny.workdir}/{name}', num_devices=1, **change
    )
    train.run(config)
    params[name] = read_params(config, 4)
    losses[name] = logs.series(config.workdir, 'train/loss')
  for name in ('frozen', 'in_batch'):
    jax.tree.map(
      np.testing.assert_array_equal, params[name], params['refreshed']
    )
  ends = {
    name: [series[s] for s in range(9, 13)] for name, series in losses.items()
  }
  assert ends['refreshed'] != ends['frozen'] != ends['in_batch']
  for step in range(1, 9):
    assert losses['frozen'][step] == losses['refreshed'][step]
    if step <= 4:
      assert losses['in_batch'][step] == losses['refreshed'][step]


def read_params(config, step):
  run = experiment.open(config, ('train', 'dev'))[0]
  shapes = bi_encoder.shapes(run.retriever.config)
  return jax.device_get(
    checkpoint.read_params(config.workdir, step, shapes, run.devices)
  )


def test_planted_negatives_appear_in_the_next_batch(tiny, monkeypatch):
  """The table that a refresh publishes is what the step is given."""
  config = dataclasses.replace(tiny, num_devices=1)
  real_mining = miner.mine_block

  def plant(task, queries, ranking):
    mined = real_mining(task, queries, ranking)
    mined.negatives[:] = np.arange(mined.negatives.shape[1])
    return mined

  monkeypatch.setattr(miner, 'mine_block', plant)
  seen, shard = [], devices_lib.shard
  monkeypatch.setattr(
    devices_lib, 'shard', lambda *a: (seen.append(a[0]), shard(*a))[1]
  )
  train.run(config)
  passages = experiment.open(config, ('train', 'dev'))[0].dataset.passages
  planted = {text_of(passages, row) for row in range(config.top_k)}
  mined = [b for b in seen if b.passage_lengths.shape[1] == 3]
  assert len(mined) == 8
  for batch in mined:
    for _, _, *negatives in padded.texts(batch):
      assert set(negatives) <= planted


@pytest.mark.parametrize('name', ['loss', 'grad_norm'])
def test_what_is_not_finite_stops_and_keeps_the_last_checkpoint(
  name, tiny, monkeypatch
):
  real = steps.make_train_step

  def poison(*arguments):
    train_step = real(*arguments)

    def poisoned(state, *others):
      state, metrics = train_step(state, *others)
      if int(state.step) == 7:
        metrics = {**metrics, name: np.float32('nan')}
      return state, metrics

    return poisoned

  monkeypatch.setattr(steps, 'make_train_step', poison)
  config = dataclasses.replace(tiny, num_devices=1)
  with pytest.raises(FloatingPointError, match='step 7 has .*nan'):
    train.run(config)
  assert checkpoint.committed_steps(config.workdir)[-1] == 4
  assert max(logs.series(config.workdir, 'train/loss')) == 6


def test_nothing_is_compiled_once_a_refresh_was_trained_on(eventful):
  config = dataclasses.replace(eventful, dropout_rate=0.3)
  train.run(config)
  compiles = logs.series(config.workdir, 'time/compiles')
  assert list(compiles) == [0, 4, 5, 8, 10, 12, 15, 16]
  # The first training on mined negatives ends at the evaluation of step 5.
  assert compiles[4] > 0
  assert compiles[5] > 0
  assert [compiles[step] for step in (8, 10, 12, 15, 16)] == [0] * 5


def test_the_host_reads_a_step_when_the_next_one_was_given_to_the_device(
  tiny, monkeypatch
):
  order, real = [], steps.make_train_step

  class Loss:
    """Tells when it is read."""

    def __init__(self, step, value):
      self.step, self.value = step, value

    def __array__(self, *_, **__):
      order.append(f'read {self.step}')
      return np.asarray(self.value)

  def make_train_step(*arguments):
    train_step = real(*arguments)

    def told(state, *others):
      state, metrics = train_step(state, *others)
      order.append(f'give {int(state.step)}')
      return state, {**metrics, 'loss': Loss(int(state.step), metrics['loss'])}

    return told

  monkeypatch.setattr(steps, 'make_train_step', make_train_step)
  train.run(dataclasses.replace(tiny, num_devices=1))
  expected = []
  for step in (1, 5, 9):  # What was given before a boundary is read there.
    for number in range(step + 1, step + 4):
      expected += [f'give {number}', f'read {number - 1}']
    expected = [*expected[:-6], f'give {step}', *expected[-6:]]
    expected.append(f'read {step + 3}')
  assert order == expected


@pytest.mark.parametrize(
  ('change', 'expected'),
  [
    ({'batch_size': 9}, '--batch_size=9 is not divisible by the 8 devices'),
    ({'micro_batch_size': 3}, '=3 does not divide the 1 queries'),
    (
      {'num_devices': 9},
      '--num_devices=9 is more than the number of devices here .8',
    ),
    ({'workdir': ''}, 'without --workdir'),
    ({'top_k': 149}, '--top_k=149 and up to .* are more than the 150'),
    (
      {'num_hard_negatives': 11},
      '--num_hard_negatives=11 is more than --top_k=10',
    ),
    ({'index': 'Nothing'}, 'FAISS cannot make --index=Nothing'),
    ({'index': 'IVF256,Flat'}, '--index=IVF256,Flat has 256 lists'),
    (
      {'index': 'device', 'index_params': 'nprobe=1'},
      '--index_params=nprobe=1 is for indexes of FAISS',
    ),
    ({'num_heads': 3}, 'is not divisible by --num_heads=3'),
    ({'init_from': '/nowhere'}, 'no file or folder'),
  ],
)
def test_settings_that_cannot_be_used_leave_nothing_half_made(
  tiny, change, expected
):
  with pytest.raises(errors.BadInput, match=expected):
    train.run(dataclasses.replace(tiny, **change))
  # What is made of the data alone is whole, and good for the next start.
  left = {path.name for path in pathlib.Path(tiny.workdir).glob('*')}
  assert left <= {'datasets', 'tokens'}


def test_a_row_that_never_mines_may_have_a_corpus_below_its_top_k(tiny):
  """It trains in a folder where a start with a row that mines was refused."""
  config = dataclasses.replace(tiny, top_k=200, num_devices=1)
  with pytest.raises(
    errors.BadInput, match='--top_k=200 and up to .* are more'
  ):
    train.run(config)
  assert train.run(dataclasses.replace(config, method='in_batch'))


@pytest.mark.parametrize(
  ('kept', 'left'), [(1, [6, 8, 12]), (2, [6, 8, 10, 12])]
)
def test_the_newest_checkpoints_are_kept_and_the_best_and_that_in_use(
  kept, left, tiny, monkeypatch
):
  config = dataclasses.replace(
    tiny,
    num_devices=1,
    steps_per_checkpoint=2,
    checkpoints_to_keep=kept,
    max_steps=12,
  )
  numbers = []
  real = checkpoint.Checkpoints.save

  def save(self, *arguments):
    numbers.append(len(checkpoint.committed_steps(config.workdir)))
    return real(self, *arguments)

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', save)
  monkeypatch.setattr(checkpoint, 'best', lambda workdir, steps: 6)
  train.run(config)
  # The last refresh is that of step 8; what precedes a save is whole.
  assert checkpoint.committed_steps(config.workdir) == left
  assert min(numbers[1:]) >= 1


@pytest.mark.parametrize(
  ('first', 'then'),
  [(2, (1, 2)), pytest.param(1, (1, 2, 4, 8), marks=pytest.mark.soak)],
)
def test_other_devices_go_on_with_the_same_batches_and_losses(
  first, then, tiny, tmp_path, monkeypatch, capsys
):
  """With the same negatives; the sums over devices are rounded differently."""
  config = dataclasses.replace(
    tiny,
    dropout_rate=0.2,
    learning_rate=1e-3,
    num_devices=first,
    steps_per_refresh=20,
    steps_per_checkpoint=6,
    max_steps=6,
  )
  train.run(config)
  seen, real_shard = [], devices_lib.shard
  monkeypatch.setattr(
    devices_lib, 'shard', lambda *a: (seen.append(a[0]), real_shard(*a))[1]
  )
  batches_of, losses_of, said = {}, {}, {}
  for number in then:
    here = str(tmp_path / str(number))
    shutil.copytree(config.workdir, here)
    seen.clear()
    capsys.readouterr()
    train.run(
      dataclasses.replace(
        config, workdir=here, num_devices=number, max_steps=16
      )
    )
    said[number] = 'not bit-equal to what it was' in capsys.readouterr().out
    batches_of[number] = list(seen)
    losses = logs.series(here, 'train/loss')
    losses_of[number] = [losses[step] for step in range(7, 17)]
  assert said == {number: number != first for number in said}
  for number in then[1:]:
    assert len(batches_of[number]) == 10
    for found, expected in zip(batches_of[number], batches_of[1], strict=True):
      assert padded.texts(found) == padded.texts(expected)
      for name in ('rows', 'passage_groups', 'positive_groups'):
        np.testing.assert_array_equal(
          getattr(found, name), getattr(expected, name)
        )
    np.testing.assert_allclose(losses_of[number], losses_of[1], rtol=1e-5)
  assert losses_of[then[-1]] != losses_of[1]


def test_other_devices_mine_the_same_lists_but_for_close_scores(finished):
  tables = {}
  for number in (1, 2, 4):
    run = experiment.open(
      dataclasses.replace(finished, num_devices=number), ('train', 'dev')
    )[0]
    shutil.rmtree(run.workdir / 'refresh')
    refreshes.refresh(run, 4)
    tables[number] = np.array(refreshes.load(run, 4).negatives)
  scores = _scores_of(run, 4)
  for number in (2, 4):
    for query in range(len(scores)):
      first, second = tables[1][query], tables[number][query]
      np.testing.assert_allclose(
        scores[query, first], scores[query, second], atol=1e-5
      )


def _scores_of(run, step):
  """Returns the (Q, N) scores of all training queries and passages."""
  shapes = bi_encoder.shapes(run.retriever.config)
  params = checkpoint.read_params(run.workdir, step, shapes, run.devices)
  queries, passages = (
    encoding.encode_rows(encoder, params, rows, 'encode')[0]
    for encoder, rows in (
      (run.retriever.query_encoder, run.dataset.queries['train']),
      (run.retriever.passage_encoder, run.dataset.passages),
    )
  )
  return queries @ passages.T


def test_flags_that_may_change_are_chosen_by_hand():
  """A new flag may not; these change where and how far, not what is learned.

  --max_steps moves the end of the learning rate's line, --tokens_per_batch and
  --num_devices the rounding of embeddings, --search_memory_mb that of scores,
  --micro_batch_size and --remat that of gradients, and a line says so.
  """
  may = {
    field.name
    for field in dataclasses.fields(config_lib.Config)
    if field.metadata['may_change']
  }
  assert may == {
    'job', 'workdir', 'remote_dir', 'num_devices', 'num_processes',
    'process_id',
    'coordinator', 'dry_run', 'debug',
    'compilation_cache_dir', 'data_dir', 'download', 'micro_batch_size',
    'remat', 'max_steps', 'tokens_per_batch', 'search_memory_mb',
    'steps_per_eval', 'retriever',
    'split', 'checkpoint', 'steps_per_checkpoint', 'checkpoints_to_keep',
    'steps_per_log', 'progress_bars', 'query', 'num_results', 'runs', 'picture',
    'tokens_dir', 'beir_set', 'beam_runner', 'beam_options', 'output',
    'overwrite', 'export_corpus', 'port',
    'ranking', 'num_negatives', 'format',
    'refresh_mode', 'refresh_devices', 'refresh_replay', 'max_staleness',
    'watch',
  }  # fmt: skip


def test_a_second_trainer_is_refused_while_the_first_one_works(
  tiny, monkeypatch
):
  config = dataclasses.replace(tiny, num_devices=1)
  real, refused = trainer.Trainer.save, []

  def save(self):
    with pytest.raises(errors.BadInput) as raised:
      train.run(config)
    refused.append(str(raised.value))
    return real(self)

  monkeypatch.setattr(trainer.Trainer, 'save', save)
  train.run(config)
  assert (
    f'process {os.getpid()} on {os.uname().nodename} is the trainer'
    in refused[0]
  )


def test_a_run_that_lost_its_checkpoints_is_not_begun_anew(finished):
  shutil.rmtree(pathlib.Path(finished.workdir, 'checkpoints'))
  before = logs.read(finished.workdir)
  with pytest.raises(
    errors.BadInput, match='has no whole .*, but metrics up to step 12'
  ):
    train.run(finished)
  assert logs.read(finished.workdir) == before


@pytest.mark.parametrize('name', ['metrics.jsonl', 'pickups.json'])
@pytest.mark.parametrize('damage', ['change', 'cut', 'remove'])
def test_a_damaged_history_is_given_back_by_the_checkpoint(
  name, damage, finished, capsys
):
  path = pathlib.Path(finished.workdir, name)
  whole, lines = path.read_bytes(), logs.read(finished.workdir)
  if damage == 'change':
    path.write_bytes(whole.replace(b'1', b'2', 1))
  elif damage == 'cut':
    path.write_bytes(whole[:30])
  else:
    path.unlink()
  train.run(finished)
  assert f'{name} is missing or was changed' in capsys.readouterr().out
  if name == 'pickups.json':
    assert path.read_bytes() == whole
  again = logs.read(finished.workdir)
  assert [without_times(line) for line in again] == [
    without_times(line) for line in lines
  ]


def without_times(line):
  return {k: v for k, v in line.items() if not k.startswith('time/')}


def test_data_that_changed_under_a_run_is_refused(finished, tmp_path):
  data = shutil.copytree(finished.data_dir, tmp_path / 'data')
  path = data / 'corpus.jsonl'
  path.write_text(path.read_text().replace('w1 ', 'w2 ', 1))
  with pytest.raises(errors.BadInput, match='the corpus is not the one'):
    train.run(dataclasses.replace(finished, data_dir=str(data), max_steps=13))


def test_a_damaged_table_of_negatives_is_made_again_of_its_checkpoint(
  finished, capsys
):
  path = pathlib.Path(finished.workdir, 'refresh/00000004/negatives.npy')
  whole = path.read_bytes()
  path.write_bytes(whole[:-1])
  run = experiment.open(finished, ('train', 'dev'))[0]
  assert refreshes.load(run, 4).negatives.shape == (48, 10)
  assert path.read_bytes() == whole
  out = capsys.readouterr().out
  assert 'negatives.npy is missing or was changed' in out
  assert '00000004.damaged-1' in out


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(
  finished, capsys
):
  expected = logs.series(finished.workdir, 'train/loss')
  folder = pathlib.Path(finished.workdir)
  _flip_a_bit(max((folder / 'checkpoints/12').rglob('*'), key=_size))
  train.run(finished)
  out = capsys.readouterr().out
  assert 'is missing or was changed' in out
  assert 'The checkpoint of step 12 is now' in out
  assert 'goes on from the checkpoint of step 8' in out
  assert logs.series(folder, 'train/loss') == expected
  assert (folder / 'damaged-checkpoint-12').is_dir()


def test_a_run_without_a_whole_checkpoint_never_begins_anew(finished):
  for folder in pathlib.Path(finished.workdir, 'checkpoints').iterdir():
    _flip_a_bit(folder / 'manifest.json')
  before = logs.read(finished.workdir)
  for expected in (
    'all . checkpoints in .* are damaged',
    'no whole checkpoint .damaged: ',
  ):
    with pytest.raises(errors.BadInput, match=expected):
      train.run(finished)
  assert logs.read(finished.workdir) == before


def _size(path):
  return path.stat().st_size if path.is_file() else -1


def _flip_a_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


@pytest.mark.parametrize(
  ('change', 'says'),
  [({'seed': 1}, '--seed is 1'), ({'max_steps': 11}, '--max_steps.* 12')],
)
def test_the_folder_of_another_run_is_refused(change, says, finished):
  def stamps():
    paths = pathlib.Path(finished.workdir).rglob('*')
    return {path: path.stat().st_mtime_ns for path in paths}

  before = stamps()
  with pytest.raises(errors.BadInput, match=says):
    train.run(dataclasses.replace(finished, **change))
  assert stamps() == before


def test_a_finished_run_goes_on_with_more_steps(tiny, capsys):
  config = dataclasses.replace(tiny, max_steps=5, num_devices=1)
  first = train.run(config)
  capsys.readouterr()
  of_a_start = {'debug': True, 'progress_bars': False}
  scores = train.run(dataclasses.replace(config, max_steps=9, **of_a_start))
  said = capsys.readouterr().out.splitlines()
  assert [line for line in said if 'from here on' in line] == [
    '--max_steps is 9 from here on; it was 5'
  ]
  # What the first end was evaluated to is not forgotten.
  dev = logs.series(config.workdir, 'dev/mrr@10')
  assert list(dev) == [4, 5, 8, 9]
  assert (dev[5], dev[9]) == (first['mrr@10'], scores['mrr@10'])
  assert set(logs.series(config.workdir, 'train/loss')) == set(range(1, 10))
  assert list(logs.series(config.workdir, 'refresh/judged')) == [4, 8]


def test_refreshes_of_a_run_hold_no_positive_and_no_text_of_one(finished):
  run = experiment.open(finished, ('train', 'dev'))[0]
  negatives = refreshes.load(run, 4).negatives
  assert negatives.shape == (len(run.dataset.queries['train']), finished.top_k)
  queries, passages = run.dataset.splits['train'].positives()
  for query in range(len(negatives)):
    banned = set(run.dataset.corpus.groups[passages[queries == query]].tolist())
    assert not banned & set(
      run.dataset.corpus.groups[negatives[query]].tolist()
    )
    assert len(set(negatives[query].tolist())) == finished.top_k


def test_the_room_that_a_run_is_said_to_need_is_that_of_its_files(finished):
  run = experiment.open(finished, ('train', 'dev'))[0]
  needs = {(need.place, need.what): need.size for need in footprint._needs(run)}

  def written(pattern):
    paths = run.workdir.glob(pattern)
    return sum(path.stat().st_size for path in paths if path.is_file())

  tables = written('refresh/*/negatives.npy') + written('refresh/*/scores.npy')
  assert tables == pytest.approx(needs['disk', 'negatives'], rel=0.1)
  # Orbax compresses a little; all four that this run saves are kept.
  one = needs['disk', 'checkpoints'] / 4
  params = needs['host memory', 'parameters, gradients, optimizer'] / 16
  assert one == 3 * 4 * params
  newest = 'checkpoints/12/*_state/**/*', 'checkpoints/12/params/**/*'
  assert sum(map(written, newest)) > 0.5 * one


def test_a_row_may_train_one_tower_alone(tiny, monkeypatch):
  """A run of it, resumed, keeps the other tower and has no moments for it."""
  row = methods.METHODS['in_batch']._replace(trains=('query',))
  monkeypatch.setitem(methods.METHODS, 'in_batch', row)
  config = dataclasses.replace(
    tiny, method='in_batch', warmup_steps=0, tie_encoders=False,
    num_devices=1, max_steps=4, steps_per_checkpoint=2, checkpoints_to_keep=9,
  )  # fmt: skip
  train.run(config)
  folder = pathlib.Path(config.workdir).absolute() / 'checkpoints'
  shutil.rmtree(folder / '4')
  train.run(config)
  with ocp.StandardCheckpointer() as checkpointer:
    first, last = (
      checkpointer.restore(folder / step / 'params') for step in ('0', '4')
    )
    moments = checkpointer.restore(folder / '4' / 'opt_state')
  assert list(moments) == ['query']
  jax.tree.map(np.testing.assert_array_equal, first['passage'], last['passage'])
  moved = jax.tree.map(
    lambda x, y: float(abs(x - y).max()), first['query'], last['query']
  )
  assert max(jax.tree.leaves(moved)) > 1e-3
