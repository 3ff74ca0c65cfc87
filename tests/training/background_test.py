"""Refreshes beside training: none is waited for or lost, all are repeated."""

import contextlib
import dataclasses
import pathlib
import shutil
import threading
from unittest import mock

import crash_test
import jax
import numpy as np
import pytest

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import locks
from ance_jax.core import logs
from ance_jax.data import tokenizer
from ance_jax.jobs import refresh
from ance_jax.jobs import train
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import encoding
from ance_jax.training import background
from ance_jax.training import experiment
from ance_jax.training import refreshes
from ance_jax.training import run_log
from ance_jax.training import schedule
from ance_jax.training import steps

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(autouse=True)
def _look_at_each_step(monkeypatch):
  monkeypatch.setattr(background, 'LOOK_SECS', 0.001)


@pytest.fixture
def config(tiny):
  return dataclasses.replace(tiny, num_devices=1, max_steps=24)


def pick_ups(config):
  found = atomic.read_json(pathlib.Path(config.workdir) / 'pickups.json')
  return [(one['step'], one['refresh']) for one in found['pickups']]


def replayed(config):
  """Trains anew with the refreshes of a run, and compares the two."""
  again = dataclasses.replace(
    config,
    workdir=config.workdir + '-again',
    refresh_mode='sync',
    refresh_delay=0,
    refresh_devices=0,
    max_staleness=0,
    refresh_replay=config.workdir,
  )
  train.run(again)
  last, state, _, *others = crash_test.outcome(config)
  their_last, theirs, _, *their_others = crash_test.outcome(again)
  assert (last, *others) == (their_last, *their_others)
  jax.tree.map(np.testing.assert_array_equal, state, theirs)


@contextlib.contextmanager
def refresher(config):
  """Runs `--job=refresh --watch` on a thread; gives what ended it by itself."""
  ended, enough = [], threading.Event()

  def work():
    try:
      with logs.stopped_by(enough):
        refresh.run(dataclasses.replace(config, job='refresh', watch=True))
    except errors.Stopped as error:
      if not enough.is_set():  # else it was in a refresh when it was stopped
        ended.append(error)
    except Exception as error:
      ended.append(error)

  thread = threading.Thread(target=work)
  thread.start()
  try:
    yield ended
  finally:
    enough.set()
    thread.join()


def hold(monkeypatch, event):
  """Has refreshes wait for an event before they are published.

  Returns:
    An event that is set once the first one waits.
  """
  real, held = corpus_index.evaluate, threading.Event()

  def evaluate_later(*arguments):
    if threading.current_thread() is not threading.main_thread():
      held.set()
      while not event.wait(0.01):
        if logs.stop_requested():
          raise errors.Stopped('held')
    return real(*arguments)

  monkeypatch.setattr(corpus_index, 'evaluate', evaluate_later)
  return held


def set_at(monkeypatch, step, event, then=lambda: None):
  """Sets an event once so many steps are made, and then does something."""
  real = run_log.RunLog.log_step

  def log_step(self, number, *others):
    if number == step:
      event.set()
      then()
    return real(self, number, *others)

  monkeypatch.setattr(run_log.RunLog, 'log_step', log_step)


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
  """Returns the settings of a finished run, cached by name."""
  made = {}

  def kept(name, config):
    if name not in made:
      folder = str(tmp_path_factory.mktemp('kept') / name)
      made[name] = dataclasses.replace(config, workdir=folder)
      train.run(made[name])
    return made[name]

  return kept


@pytest.fixture
def in_step(config, kept):
  return kept('sync', dataclasses.replace(config, checkpoints_to_keep=9))


@pytest.fixture
def finished(config, in_step):
  """A copy of a run with refreshes of steps 4, 8, 12, 16, 20."""
  shutil.copytree(in_step.workdir, config.workdir)
  return experiment.open(config, ('train', 'dev'))[0]


@pytest.fixture
def delayed(config, kept):
  changes = {'refresh_mode': 'delayed', 'refresh_delay': 6, 'max_refreshes': 4}
  return kept('delayed', dataclasses.replace(config, **changes))


def test_delayed_negatives_come_into_use_so_many_steps_later(delayed, in_step):
  assert pick_ups(delayed) == [(10, 4), (14, 8), (18, 12), (22, 16)]
  ages = logs.series(delayed.workdir, 'train/negatives_age')
  assert ages == {s: 7 + (s - 11) % 4 for s in range(11, 25)}
  dev = logs.series(delayed.workdir, 'dev/mrr@10')
  assert set(dev) == {4, 8, 12, 16, 24}
  replayed(delayed)
  params = [
    jax.tree.leaves(crash_test.outcome(one)[1]) for one in (delayed, in_step)
  ]
  assert any((a != b).any() for a, b in zip(*params, strict=True))


def test_a_delayed_run_stopped_at_any_step_ends_bit_equal(
  config, delayed, monkeypatch
):
  config = dataclasses.replace(
    delayed, workdir=config.workdir, checkpoints_to_keep=1
  )
  for step in (5, 9, 13):  # One refresh is not in use yet, or two, or one is.
    with monkeypatch.context() as patch:
      set_at(patch, step, threading.Event(), logs._stop.set)
      with pytest.raises(errors.Stopped):
        train.run(config)
    logs._stop.clear()
  train.run(config)
  crash_test.check_same(crash_test.outcome(config), crash_test.outcome(delayed))


def test_what_is_damaged_before_it_comes_into_use_is_made_again(
  config, delayed, monkeypatch, capsys
):
  config = dataclasses.replace(
    delayed,
    workdir=config.workdir,
    steps_per_checkpoint=3,
    checkpoints_to_keep=1,
  )
  path = pathlib.Path(config.workdir, 'refresh', '00000004', 'negatives.npy')
  set_at(monkeypatch, 8, threading.Event(), lambda: path.write_bytes(b''))
  train.run(config)
  assert 'is made again' in capsys.readouterr().out
  crash_test.check_same(crash_test.outcome(config), crash_test.outcome(delayed))


def test_training_never_waits_for_a_refresh_that_is_held(config, monkeypatch):
  config = dataclasses.replace(config, refresh_mode='async', max_steps=70)
  released, begun = threading.Event(), threading.Event()
  held = hold(monkeypatch, released)
  # So that it is the first refresh due, however slow the machine is.
  set_at(monkeypatch, 5, begun, lambda: held.wait(120))
  set_at(monkeypatch, 60, released)
  train.run(config)
  first_step, first_refresh = pick_ups(config)[0]
  # By then the refresher may have come further than that which was held.
  assert 4 <= first_refresh < 60 <= first_step
  assert (pathlib.Path(config.workdir) / 'refresh' / '00000004').is_dir()
  assert set(logs.series(config.workdir, 'train/loss')) == set(range(1, 71))
  ages = logs.series(config.workdir, 'train/negatives_age')
  assert min(ages) == first_step + 1
  assert ages[first_step + 1] == first_step + 1 - first_refresh


def test_what_was_picked_up_beside_training_is_repeated_bit_for_bit(
  config, monkeypatch
):
  config = dataclasses.replace(
    config, refresh_mode='async', refresh_devices=2, max_staleness=4
  )
  made = mock.Mock(wraps=steps.make_train_step)
  with monkeypatch.context() as patch:
    patch.setattr(steps, 'make_train_step', made)
    train.run(config)
  # One for the warm-up's row, one for that which mines.
  assert made.call_count == 2
  assert len(pick_ups(config)) > 3
  assert all(0 <= step - mined <= 4 for step, mined in pick_ups(config))
  replayed(config)


def test_training_waits_at_the_greatest_staleness(config, monkeypatch, capsys):
  config = dataclasses.replace(config, refresh_mode='async', max_staleness=6)
  waits, real = [], background.RefreshPoller.wait

  def wait(self, in_use, step, oldest):
    waits.append(step - (in_use.refresh if in_use else 4))
    return real(self, in_use, step, oldest)

  monkeypatch.setattr(background.RefreshPoller, 'wait', wait)
  monkeypatch.setattr(
    background.RefreshPoller,
    'newest',
    only_late(background.RefreshPoller.newest),
  )
  train.run(config)
  assert set(waits) == {6}
  ages = logs.series(config.workdir, 'train/negatives_age')
  assert max(ages.values()) == 6
  assert 'training waits at step' in capsys.readouterr().out


def only_late(real):
  """Lets a trainer see what is new only where it has to."""

  def newest(self, in_use, step):
    is_late = step - (in_use.refresh if in_use else 4) >= 6
    return real(self, in_use, step) if is_late else None

  return newest


def test_a_run_killed_beside_a_refresh_repeats_its_pick_ups(
  config, monkeypatch
):
  config = dataclasses.replace(config, refresh_mode='async', max_staleness=8)

  def kill():
    raise OSError('killed')

  with monkeypatch.context() as patch:
    # One has to be picked up after 12 steps.
    set_at(patch, 15, threading.Event(), kill)
    with pytest.raises(OSError, match='killed'):
      train.run(config)
  before = pick_ups(config)
  assert before
  assert checkpoint.committed_steps(config.workdir)[-1] < 15
  train.run(config)
  assert pick_ups(config)[: len(before)] == before
  replayed(config)


def test_two_jobs_share_a_folder_and_nothing_else(config):
  config = dataclasses.replace(config, refresh_mode='external', max_staleness=8)
  with refresher(config) as ended:
    train.run(config)
  assert not ended
  assert len(pick_ups(config)) > 1
  assert logs.series(config.workdir, 'dev/mrr@10').keys() > {
    mined for _, mined in pick_ups(config)
  }
  replayed(config)


def test_a_second_refresher_is_refused(finished):
  with contextlib.closing(
    locks.Lock(finished.workdir, locks.REFRESH_LOCK_FILE)
  ):
    with pytest.raises(errors.BadInput, match='is the refresher of'):
      refresh.run(
        dataclasses.replace(finished.config, job='refresh', watch=True)
      )


def test_a_refresher_ends_with_the_training(finished, capsys):
  refresh.run(dataclasses.replace(finished.config, job='refresh', watch=True))
  assert 'training is over' in capsys.readouterr().out


def goes_on(run, after):
  """The run of more steps, without the refreshes after a step."""
  for step in refreshes.published(run):
    if step > after:
      shutil.rmtree(refreshes.folder(run, step))
  return run._replace(config=dataclasses.replace(run.config, max_steps=30))


def stop_after(monkeypatch, number):
  """Has the refresher stop once it made so many refreshes; returns theirs."""
  made, real = [], refreshes.refresh

  def make(run, step, **kwargs):
    made.append(step)
    found = real(run, step, **kwargs)
    if len(made) == number:
      raise KeyboardInterrupt
    return found

  monkeypatch.setattr(refreshes, 'refresh', make)
  return made


def test_a_refresher_goes_on_inside_the_refresh_it_was_killed_in(
  finished, monkeypatch
):
  run = goes_on(finished, 4)
  shutil.rmtree(run.workdir / 'embeddings')
  atomic.write_json(run.workdir / 'refreshing.json', {'step': 12})
  real, blocks = encoding.encode_rows, []

  def encode_rows(encoder, params, rows, what, *others):
    if what.startswith('encode block'):
      if len(blocks) == 2:
        blocks.append('killed')
        raise KeyboardInterrupt
      blocks.append(what)
    return real(encoder, params, rows, what, *others)

  with monkeypatch.context() as patch:
    patch.setattr(encoding, 'encode_rows', encode_rows)
    with pytest.raises(KeyboardInterrupt):
      background.watch(run)
  made = stop_after(monkeypatch, 1)
  monkeypatch.setattr(encoding, 'encode_rows', encode_rows)
  with pytest.raises(KeyboardInterrupt):
    background.watch(run)
  assert made == [12]
  assert blocks == [
    'encode block 1/3', 'encode block 2/3', 'killed', 'encode block 3/3'
  ]  # fmt: skip


def test_a_full_disk_ends_the_refresher_and_the_next_one_loses_nothing(
  finished, monkeypatch
):
  before = refreshes.refresh(finished, 24)
  run = goes_on(finished, 20)
  real = np.save

  def save(file, array):
    if str(file).endswith('negatives.npy'):
      raise OSError(28, 'No space left on device')
    real(file, array)

  with monkeypatch.context() as patch:
    patch.setattr(np, 'save', save)
    with pytest.raises(OSError, match='No space left'):
      background.watch(run)
  assert refreshes.published(run) == [4, 8, 12, 16, 20]
  assert stop_after(monkeypatch, 1) == []
  with pytest.raises(KeyboardInterrupt):
    background.watch(run)
  after = atomic.read_manifest(refreshes.folder(run, 24))
  assert after['files']['negatives.npy'] == before['files']['negatives.npy']


def test_a_refresher_asked_to_stop_does_so_inside_of_a_refresh(
  finished, monkeypatch
):
  run = goes_on(finished, 16)
  shutil.rmtree(run.workdir / 'embeddings')
  real, asked = encoding.encode_rows, threading.Event()

  def encode_rows(encoder, params, rows, what, *others):
    found = real(encoder, params, rows, what, *others)
    asked.set()  # As SIGTERM does.
    return found

  monkeypatch.setattr(encoding, 'encode_rows', encode_rows)
  with logs.stopped_by(asked):
    with pytest.raises(errors.Stopped, match='encode block 2/3'):
      background.watch(run)
  assert refreshes.published(run) == [4, 8, 12, 16]


def test_a_checkpoint_that_goes_while_it_is_read_is_not_the_end(
  finished, monkeypatch, capsys
):
  run = goes_on(finished, 4)
  real, gone = checkpoint.read_params, []

  def read_params(workdir, step, *others):
    if not gone:
      gone.append(step)
      shutil.rmtree(run.workdir / 'checkpoints' / str(step))
    return real(workdir, step, *others)

  monkeypatch.setattr(checkpoint, 'read_params', read_params)
  made = stop_after(monkeypatch, 2)
  with pytest.raises(KeyboardInterrupt):
    background.watch(run)
  assert gone == [24]
  assert made == [24, 20]
  assert 'the checkpoint of step 24 is gone' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('module', 'name'),
  [
    (checkpoint, 'read_record'),
    (tokenizer, 'load'),
    (checkpoint, 'read_params'),
  ],
)
def test_a_job_that_begins_while_its_checkpoint_goes_takes_another(
  finished, monkeypatch, capsys, module, name
):
  real, gone = getattr(module, name), []

  def read(*given):
    if not gone:
      gone.append(24)
      shutil.rmtree(finished.workdir / 'checkpoints' / '24')
    return real(*given)

  monkeypatch.setattr(module, name, read)
  _, step = experiment.open(finished.config, ('train', 'dev'))
  assert gone == [24]
  assert step == 20
  assert 'the checkpoint of step 24 is gone' in capsys.readouterr().out
  with pytest.raises(ValueError, match='is not last, best or one of'):
    experiment.open(
      dataclasses.replace(finished.config, checkpoint='24'), ('train', 'dev')
    )


def test_the_trainer_keeps_the_checkpoint_that_a_refresher_reads(
  config, monkeypatch
):
  config = dataclasses.replace(
    config, refresh_mode='external', max_steps=16, checkpoints_to_keep=1
  )
  set_at(
    monkeypatch,
    9,
    threading.Event(),
    lambda: atomic.write_json(f'{config.workdir}/refreshing.json', {'step': 8}),
  )
  train.run(config)
  assert checkpoint.committed_steps(config.workdir) == [8, 16]


FOREIGN = {
  'run': ('f' * 16, 'another run'),
  'passages': ('f' * 16, 'another corpus or tokenizer'),
  'tokenizer': (
    {'kind': 'BPE', 'lower_case': True},
    "another tokenizer, \"{'kind': 'BPE', 'lower_case': True}",
  ),
  'own': ('f' * 16, 'another set of equal texts'),
  'judgements': ('f' * 16, 'another set of judgements'),
  'checkpoint': ('f' * 16, 'another checkpoint'),
  'top_k': (11, 'another --top_k'),
}


def test_a_refresh_of_another_is_refused_by_name(finished, capsys):
  folder = refreshes.folder(finished, 20)
  manifest = atomic.read_manifest(folder)
  for name, (value, text) in FOREIGN.items():
    assert text in refreshes.refusal(finished, {**manifest, name: value})
  with atomic.publish(folder, {**manifest, 'top_k': 11}) as new:
    shutil.copyfile(folder / 'negatives.npy', new / 'negatives.npy')
  reader = background.RefreshPoller(finished)
  for is_said in (True, False):
    assert reader.newest(None, 24) == 16
    assert ('another --top_k' in capsys.readouterr().out) == is_said
    reader._looked = -1
  # What a refresher that was begun again publishes in its place is another.
  with atomic.publish(folder, manifest) as new:
    shutil.copyfile(folder / 'negatives.npy', new / 'negatives.npy')
  assert reader.newest(None, 24) == 20


def test_all_that_was_mined_after_what_is_in_use_is_copied_in(
  finished, monkeypatch
):
  asked = []
  monkeypatch.setattr(background.remote, 'is_connected', lambda _: True)
  monkeypatch.setattr(refreshes, 'fetch', lambda _, after: asked.append(after))
  # Mined at step 10, in use from step 17 on.
  for in_use in (None, schedule.ActiveRefresh(17, 10)):
    with contextlib.closing(background.RefreshPoller(finished)) as reader:
      reader.newest(in_use, 19)
  assert asked == [-1, 10]


@pytest.mark.parametrize('name', ['negatives.npy', 'manifest.json'])
def test_half_a_refresh_is_never_picked_up(finished, name):
  folder = refreshes.folder(finished, 20)
  (folder / name).unlink()
  assert background.RefreshPoller(finished).newest(None, 24) == 16
  # What has no manifest may be of another, which is at work.
  assert folder.exists() == (name == 'manifest.json')


def test_what_ends_the_refresher_ends_the_training_within_a_step(
  config, monkeypatch
):
  config = dataclasses.replace(config, refresh_mode='async', max_steps=2000)

  def fail(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(corpus_index, 'evaluate', fail)
  with pytest.raises(OSError, match='No space left'):
    train.run(config)
  assert checkpoint.newest_whole(config.workdir)[0] is not None


def test_replaying_other_data_is_refused(finished, tmp_path):
  config = dataclasses.replace(
    finished.config, workdir=str(tmp_path / 'other'), top_k=11
  )
  other = finished._replace(config=config)
  for step, says in ((8, 'it is of another --top_k'), (9, 'it is not there')):
    with pytest.raises(errors.BadInput, match=f'replayed: {says}'):
      refreshes.adopt(other, finished.config.workdir, step)
