"""What a run needs is known before it starts; what cannot fit is refused."""

import dataclasses
import pathlib

import pytest

from ance_jax import errors
from ance_jax.jobs import footprint
from ance_jax.jobs import train
from ance_jax.training import experiment


@pytest.fixture
def run(tiny):
  """A run that was not begun: 150 passages, 48 queries, width 16."""
  config = dataclasses.replace(tiny, num_devices=1, dry_run=True)
  return experiment.create(config, ('train', 'dev'))[0]


def sizes(run, **changes):
  config = dataclasses.replace(run.config, **changes)
  needs = footprint._needs(run._replace(config=config))
  return {(need.place, need.what): need.size for need in needs}


def test_settings_count(run):
  """train_test.py compares them with the files of a run."""
  found = sizes(run)
  # Refreshes after steps 4 and 8 of 12; 10 negatives a query, and scores.
  assert found['disk', 'negatives'] == 2 * 2 * 48 * 10 * 4
  assert found['disk', 'embeddings, old and new'] == 2 * 150 * 16 * 4
  assert sizes(run, max_refreshes=1)['disk', 'negatives'] == 2 * 48 * 10 * 4
  for once in ('bm25', 'given'):
    found = sizes(run, warmup_method=once)
    assert found['disk', 'negatives'] == 5 * 48 * 10 * 4
  assert ('disk', 'negatives') not in sizes(run, method='in_batch')
  flat, small = sizes(run), sizes(run, index='SQ8')
  assert flat['host memory', 'index Flat'] == 150 * 16 * 4
  assert small['host memory', 'index SQ8'] == 150 * 16
  on_devices = sizes(run, index='device')
  assert on_devices['host memory', 'index device'] == 150 * 16 * 4
  one = flat['disk', 'checkpoints'] // 4
  for kept, counted in ((1, 4), (9, 12), (1000, 101)):
    found = sizes(run, checkpoints_to_keep=kept, max_steps=400)
    assert found['disk', 'checkpoints'] == counted * one
  once = sizes(run, method='in_batch')
  twice = sizes(run, method='in_batch', steps_per_eval=5)
  name = 'disk', 'embeddings, old and new'
  assert 2 * once[name] == twice[name] == flat[name]


def test_a_tower_that_is_not_trained_has_no_moments(tiny):
  config = dataclasses.replace(
    tiny, num_devices=1, tie_encoders=False, dry_run=True, warmup_steps=0
  )
  run = experiment.create(config, ('train', 'dev'))[0]
  both, one = sizes(run, method='in_batch'), sizes(run, method='adore')
  name = 'host memory', 'a checkpoint in writing'
  assert one[name] * 3 == both[name] * 2  # 2 + 2 of 2 + 4 trees.
  name = 'host memory', 'parameters, gradients, optimizer'
  assert one[name] * 8 == both[name] * 5
  name = 'host memory', 'passages that each step searches'
  assert one[name] == 150 * 16 * 4
  assert name not in both


def test_scores_of_a_teacher_are_one_table_more(run):
  plain, taught = (
    sizes(run, method=name, score_run=path)['disk', 'negatives']
    for name, path in (('star', ''), ('distill', 'x'))
  )
  # One refresh, of rows and scores; the teacher's are there twice for a while.
  assert taught / plain == 4 / 2


def test_what_holds_an_answer_has_its_room(run):
  split = run.dataset.splits['train']
  answered = run.dataset._replace(
    splits={'train': split._replace(answers=[['x']] * len(split.ids))}
  )
  name = 'disk', 'which passages hold an answer'
  assert name not in sizes(run)
  found = sizes(run._replace(dataset=answered), top_k=7)
  assert found[name] == 2 * (14 * 48 * (8 + 1))
  assert found['host memory', name[1]] == 2 * found[name]
  assert name not in sizes(
    run._replace(dataset=answered), method='bm25', warmup_steps=0
  )
  assert name not in sizes(run._replace(dataset=answered), drop_answers=False)


def test_an_index_on_devices_takes_their_memory_and_no_more_than_it_may(run):
  class Accelerator:
    platform = 'gpu'

  there = run._replace(
    retriever=run.retriever._replace(devices=(Accelerator(),) * 4)
  )
  found = sizes(there, index='device')
  assert found['device memory', 'index device'] == 38 * 16 * 4
  assert ('host memory', 'index device') not in found
  config = dataclasses.replace(run.config, index='device', search_memory_mb=500)
  on_four = there._replace(config=config)
  assert footprint._of_index(on_four, 10**7, 768, False).size == 500 * 2**20
  assert footprint._of_index(on_four, 10**7, 768, True).size == 2000 * 2**20


def test_a_dry_run_prints_the_table_and_trains_nothing(tiny, capsys):
  config = dataclasses.replace(tiny, num_devices=1, dry_run=True)
  assert train.run(config) is None
  out = capsys.readouterr().out
  assert '2 x 150 passages x 16 x 4 bytes' in out
  assert '2 x 48 queries x 10 x 4 bytes' in out
  left = {path.name for path in pathlib.Path(tiny.workdir).iterdir()}
  assert left == {'tokens'}


@pytest.mark.parametrize(
  ('place', 'largest'),
  [
    ('disk', 'checkpoints'),
    ('host memory', 'parameters, gradients, optimizer'),
  ],
)
def test_what_cannot_fit_is_refused_before_it_starts(
  place, largest, tiny, monkeypatch
):
  room = footprint._room

  def little(run):
    return {**room(run), place: 1000}

  monkeypatch.setattr(footprint, '_room', little)
  config = dataclasses.replace(tiny, num_devices=1)
  with pytest.raises(
    errors.BadInput,
    match=f'1.0 kB of {place} is too little .* of them {largest}',
  ):
    train.run(config)
  assert not pathlib.Path(tiny.workdir, 'checkpoints').exists()


def test_what_nobody_tells_is_not_refused(tiny, monkeypatch):
  monkeypatch.setattr(footprint, '_room', lambda run: {'device memory': None})
  config = dataclasses.replace(tiny, num_devices=1, dry_run=True)
  assert train.run(config) is None


def test_what_a_run_wrote_is_room_for_what_it_writes(run, monkeypatch):
  before = footprint._room(run)['disk']
  free = before // 2
  usage = footprint.shutil.disk_usage('/')._replace(free=free)
  monkeypatch.setattr(footprint.shutil, 'disk_usage', lambda _: usage)
  assert footprint._room(run)['disk'] == free
  for (
    folder
  ) in 'checkpoints embeddings refresh bm25 given answers taught'.split():
    before = footprint._room(run)['disk']
    (run.workdir / folder).mkdir(exist_ok=True)
    (run.workdir / folder / 'part').write_bytes(bytes(1000))
    assert footprint._room(run)['disk'] == before + 1000


def test_a_container_with_a_limit_has_no_more_than_that(tmp_path, monkeypatch):
  monkeypatch.setattr(footprint, '_CGROUP', tmp_path)
  whole = footprint._free_memory()
  (tmp_path / 'memory.current').write_text('9000\n')
  # Files that are cached are given up.
  stat = 'anon 1000\ninactive_file 5000\nactive_file 3000\n'
  (tmp_path / 'memory.stat').write_text(stat)
  (tmp_path / 'memory.max').write_text('max\n')
  assert footprint._free_memory() > whole / 2
  (tmp_path / 'memory.max').write_text('51000\n')
  assert footprint._free_memory() == 50000
