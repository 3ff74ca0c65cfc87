"""Whole runs stopped, refused, damaged or cut off the power: all end the same.

Everything happens in one process, so that hundreds of runs fit into minutes:
what is compiled is kept between them, and a stop is an exception after which
nothing changes on disk any more. Real kills are in crash_test.py and in
experiments/benchmarks/soak.py.
"""

import dataclasses
import os
import pathlib
import shutil
from unittest import mock

import crash_test
import faulty_disk
import numpy as np
import psutil
import pytest

from ance_jax import errors
from ance_jax import launch
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import logs
from ance_jax.jobs import report
from ance_jax.jobs import train
from ance_jax.training import resume
from ance_jax.training import run_log

pytestmark = pytest.mark.usefixtures('compiled_once')
# Together they take an hour and a half on two cores.
STOPS = 600
ERRORS = 200
POWER_CUTS = 200
DAMAGES = 500
# Nothing reads these again.
OUTPUTS = ('tensorboard', 'curves.png', 'report.html', 'lock')


@pytest.fixture(scope='module', autouse=True)
def _quick():
  """Draws nothing, and does not wait for a real disk."""
  patch = pytest.MonkeyPatch()
  patch.setattr(report, 'draw', lambda *_: None)
  patch.setattr(logs, '_Board', mock.MagicMock())
  # The same names in each run, so that their operations can be compared.
  patch.setattr(atomic.secrets, 'token_hex', lambda _: 'token')
  patch.setattr(logs, 'progress', _progress)
  patch.setattr(os, 'fsync', lambda descriptor: None)
  # In the order of the program: the same number is the same operation.
  real_save = checkpoint.Checkpoints.save

  def save(self, *arguments):
    real_save(self, *arguments)
    self.wait()

  patch.setattr(checkpoint.Checkpoints, 'save', save)
  yield
  patch.undo()


def _progress(items, what, **_):
  for item in items:
    if logs.stop_requested():
      raise errors.Stopped(what)
    yield item


@pytest.fixture
def config(eventful):
  return eventful


class Reference:
  """A run that nothing happened to, and all that a run after a fault must be.

  Attributes:
    operations: Its file operations.
    outcome: `crash_test.outcome` of it.
  """

  def __init__(self, config):
    with faulty_disk.FaultyDisk(config.workdir) as disk:
      train.run(config)
    self.operations = disk.operations
    self.outcome = crash_test.outcome(config)

  def check(self, config, unread=None):
    """Starts a run again, and checks that it ends like this one.

    Args:
      config: The run's.
      unread: Name of a refresh that was damaged, and that nothing reads again.
    """
    train.run(config)
    if unread:
      shutil.rmtree(pathlib.Path(config.workdir) / 'refresh' / unread)
    last, state, negatives, *rest = self.outcome
    negatives = {k: v for k, v in negatives.items() if k != unread}
    expected = last, state, negatives, *rest
    crash_test.check_same(crash_test.outcome(config), expected)
    left = [
      path.name
      for path in pathlib.Path(config.workdir).rglob('*')
      if 'unfinished' in path.name or 'tmp' in path.name or path.name == 'lock'
    ]
    assert left == []


@pytest.fixture(scope='module')
def reference_of(tmp_path_factory):
  """Returns the `Reference` of settings, whatever their folder; made once."""
  made = {}

  def reference_of(config):
    key = dataclasses.replace(config, workdir='')
    if key not in made:
      folder = str(tmp_path_factory.mktemp('whole'))
      made[key] = Reference(dataclasses.replace(config, workdir=folder))
    return made[key]

  return reference_of


@pytest.fixture
def reference(reference_of, config):
  return reference_of(config)


def new_folder(config, *names):
  """Returns the settings with an empty folder of this name."""
  workdir = f'{config.workdir}-{"-".join(map(str, names))}'
  os.makedirs(workdir)
  return dataclasses.replace(config, workdir=workdir)


def stop(config, disk):
  """Runs until a fault; returns what ended it, or None if nothing did."""
  with disk:
    try:
      train.run(config)
    except BaseException as error:
      return error
  return None


def committed(config):
  """Returns the newest committed step, or None."""
  return max(checkpoint.committed_steps(config.workdir), default=None)


@pytest.mark.soak
def test_stopped_at_any_file_operation_a_run_ends_bit_equal(
  config, reference, sample, capsys
):
  cases = [
    (number, how)
    for number, operation in enumerate(reference.operations)
    for how in ('before', 'half-way', 'after')
    if how != 'half-way' or operation.kind == 'write'
  ]
  chosen = sample(cases, STOPS)
  for number, how in chosen:
    here = new_folder(config, number, how)
    ended = stop(here, faulty_disk.FaultyDisk(here.workdir, at=number, how=how))
    assert isinstance(ended, faulty_disk.Killed), (number, how, ended)
    newest = committed(here)
    capsys.readouterr()
    reference.check(here)
    begun = 'from step 0\n' if newest is None else f'of step {newest}\n'
    assert begun in capsys.readouterr().out
    shutil.rmtree(here.workdir)
  with capsys.disabled():
    print(f' {len(chosen)} of {len(cases)} stops', end='')


@pytest.mark.soak
@pytest.mark.parametrize('name', faulty_disk.ERRORS)
def test_an_error_at_any_file_operation_ends_in_a_sentence_and_loses_nothing(
  name, config, reference, sample, capsys
):
  chosen = sample(range(len(reference.operations)), ERRORS)
  for number in chosen:
    here = new_folder(config, name, number)
    disk = faulty_disk.FaultyDisk(
      here.workdir, at=number, error=faulty_disk.ERRORS[name]
    )
    ended = stop(here, disk)
    if ended:
      sentence, code = launch.explain(ended)
      assert code == 1, (number, sentence)
      assert os.strerror(faulty_disk.ERRORS[name]) in sentence
      assert '\n' not in sentence
    else:
      # Where Orbax could not remove a file, it is removed again.
      assert disk.failed.kind == 'remove', disk.failed
      assert disk.failed.path.startswith('checkpoints/'), disk.failed
    newest, _ = checkpoint.newest_whole(here.workdir)
    assert newest == committed(here)
    reference.check(here)
    shutil.rmtree(here.workdir)
  with capsys.disabled():
    print(f' {len(chosen)} of {len(reference.operations)} errors', end='')


@pytest.mark.soak
def test_after_a_power_cut_a_run_ends_bit_equal(
  config, reference, sample, capsys
):
  """Checkpoints whose manifest was synced are there, whole."""
  operations = reference.operations
  for seed in sample(range(POWER_CUTS), POWER_CUTS):
    random = faulty_disk.seeded(seed)
    number = int(random.integers(len(operations) + 1))
    here = dataclasses.replace(config, workdir=f'{config.workdir}-cut-{seed}')
    faulty_disk.after_power_loss(operations[:number], here.workdir, random)
    promised = _committed_in(operations[:number])
    newest, _ = checkpoint.newest_whole(here.workdir)
    assert promised is None or newest >= promised, (seed, number)
    reference.check(here)
    shutil.rmtree(here.workdir)


def _committed_in(operations):
  """Returns the newest step whose folder was synced after its manifest came."""
  come, sure = set(), [None]
  for kind, path, detail in operations:
    parts = path.split('/')
    if parts[0] == 'checkpoints' and len(parts) > 1 and parts[1].isdecimal():
      if kind == 'rename' and str(detail).endswith('/manifest.json'):
        come.add(parts[1])
      elif kind == 'fsync' and len(parts) == 2 and parts[1] in come:
        sure.append(int(parts[1]))
  return sure[-1]


def stopped_run(config):
  """A run that was stopped between two checkpoints, after two refreshes."""
  here = new_folder(config, 'stopped')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_log.RunLog, 'log_step', _killer(11))
    with pytest.raises(faulty_disk.Killed):
      train.run(here)
  return here


def _killer(at):
  real = run_log.RunLog.log_step

  def log_step(self, step, *rest):
    if step == at:
      raise faulty_disk.Killed
    real(self, step, *rest)

  return log_step


def damages(workdir, random):
  """Yields (path, content) for ever: each file in turn, a bit off, or cut."""
  files = sorted(
    path
    for path in pathlib.Path(workdir).rglob('*')
    if path.is_file()
    and path.relative_to(workdir).parts[0] not in OUTPUTS
    and path.stat().st_size
  )
  while True:
    for path in files:
      content = bytearray(path.read_bytes())
      place = int(random.integers(len(content)))
      if random.integers(2):
        content[place] ^= 1 << int(random.integers(8))
      else:
        del content[place:]
      yield path.relative_to(workdir), bytes(content)


def is_found(path):
  """Returns whether the reader of a damaged file finds it so."""
  folder = path.parent
  while not atomic.is_committed(folder) and folder != folder.parent:
    folder = folder.parent
  try:
    if folder == folder.parent:
      atomic.read_json(path)
    else:
      atomic.read_manifest(folder)
  except errors.Damaged:
    return True
  return False


def check_damage(config, stopped, reference, path, content, capsys):
  """Damages one file of a stopped run, and checks what comes of it."""
  here = dataclasses.replace(config, workdir=f'{config.workdir}-damaged')
  shutil.rmtree(here.workdir, ignore_errors=True)
  shutil.copytree(stopped.workdir, here.workdir)
  damaged = pathlib.Path(here.workdir) / path
  damaged.write_bytes(content)
  # These two are written anew at each start, from what the checkpoint holds.
  rewritten = path.name in ('run.flags', 'metrics.jsonl')
  rewritten &= len(path.parts) == 1
  assert rewritten or is_found(damaged), path
  capsys.readouterr()
  # The negatives in use are those of step 8.
  of_four = path.parts[:2] == ('refresh', '00000004')
  reference.check(here, '00000004' if of_four else None)
  out = capsys.readouterr().out
  newest = committed(stopped)
  if path.parts[:2] == ('checkpoints', str(newest)):
    assert f'The checkpoint of step {newest} is now' in out
    assert 'goes on from the checkpoint of step 8\n' in out
  else:
    assert f'goes on from the checkpoint of step {newest}\n' in out


@pytest.mark.soak
def test_any_damaged_file_is_found_and_the_run_ends_bit_equal(
  config, reference, sample, capsys
):
  stopped = stopped_run(config)
  assert committed(stopped) == 9
  stream = damages(stopped.workdir, faulty_disk.seeded(1))
  cases = [next(stream) for _ in range(DAMAGES)]
  for path, content in sample(cases, DAMAGES):
    check_damage(config, stopped, reference, path, content, capsys)


@pytest.mark.soak
def test_stopped_at_any_step_a_run_ends_bit_equal(
  config, reference_of, sample, capsys
):
  config = dataclasses.replace(
    config, max_steps=40, steps_per_refresh=12, steps_per_checkpoint=5
  )
  whole = reference_of(config)
  for step in sample(range(1, 41), 40):
    here = new_folder(config, 'stop', step)
    capsys.readouterr()
    if step % 10 == 7:
      killed = crash_test.kill_at(
        here, 'ance_jax.training.run_log', 'RunLog.log_step', step
      )
      assert killed.returncode == -9, killed.stderr[-2000:]
    else:
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log.RunLog, 'log_step', _killer(step))
        with pytest.raises(faulty_disk.Killed):
          train.run(here)
    # A save that was under way is lost, too, where the process really dies.
    newest = committed(here)
    assert newest >= step - 5 - 5 * (step % 10 == 7)
    capsys.readouterr()
    whole.check(here)
    assert f'of step {newest}\n' in capsys.readouterr().out
    shutil.rmtree(here.workdir)


@pytest.mark.soak
@pytest.mark.usefixtures('pythons_gc')
def test_two_hundred_refreshes_leave_memory_files_and_threads_flat(
  config, monkeypatch, capsys
):
  config = dataclasses.replace(
    config,
    warmup_steps=1,
    steps_per_refresh=1,
    steps_per_checkpoint=1,
    steps_per_eval=None,
    max_steps=201,
    checkpoints_to_keep=2,
  )
  process, seen = psutil.Process(), []
  real = resume.pick_up

  def pick_up(*arguments):
    real(*arguments)
    seen.append(
      (process.memory_info().rss, process.num_fds(), process.num_threads())
    )

  monkeypatch.setattr(resume, 'pick_up', pick_up)
  train.run(config)
  assert len(seen) == 200
  # The first refreshes compile, and fill caches.
  later = np.array(seen[50:], float)
  slopes = np.polyfit(np.arange(len(later)), later, 1)[0]
  with capsys.disabled():
    print(
      f'\n200 refreshes: memory {later[0, 0] / 1e6:.1f} MB, '
      f'{slopes[0] / later[0, 0]:+.4%} a refresh; open files '
      f'{later[0, 1]:.0f}, {slopes[1]:+.4f}; threads {later[0, 2]:.0f}, '
      f'{slopes[2]:+.4f}'
    )
  assert slopes[0] / later[0, 0] < 1e-3
  assert abs(slopes[1]) < 0.01
  # Orbax's and XLA's pools grow and shrink by one or two.
  assert abs(slopes[2]) < 0.03
