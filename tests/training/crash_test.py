"""Killed at any point and started again, a run ends as if nothing had been."""

import dataclasses
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ance_jax import flags
from ance_jax.core import checkpoint
from ance_jax.core import logs
from ance_jax.jobs import train

pytestmark = pytest.mark.usefixtures('compiled_once')

REPOSITORY = pathlib.Path(__file__).parents[2]
# What the killed process runs: our main, with a function of a module replaced
# by one that kills the process when it is called for the n-th time (with a
# last argument that ends so, if one is given).
CHILD = """
import importlib, os, signal, sys
module, name, calls, after = {module!r}, {name!r}, {calls}, {after}
argument = {argument!r}
owner = importlib.import_module(module)
*path, last = name.split('.')
for part in path:
  owner = getattr(owner, part)
real, count = getattr(owner, last), 0
def wrapped(*arguments, **keywords):
  global count
  fits = argument is None or str(arguments[-1]).endswith(argument)
  count += fits
  strikes = fits and count == calls
  if strikes and not after:
    for _ in range({times}):
      os.kill(os.getpid(), signal.{signal})
  result = real(*arguments, **keywords)
  if strikes and after:
    os.kill(os.getpid(), signal.{signal})
  return result
setattr(owner, last, wrapped)
from ance_jax.core import checkpoint
from ance_jax import main
close = checkpoint.Checkpoints.close
checkpoint.Checkpoints.close = lambda self: print('waits') or close(self)
sys.argv = ['main', *{flags!r}]
main.run()
"""


@pytest.fixture
def config(eventful):
  return eventful


@pytest.fixture(scope='module')
def reference(request):
  """Cached result of the run that is never killed."""
  return {}


def run_main(flags, code=None, **kwargs):
  arguments = ['-c', code] if code else ['-m', 'ance_jax.main', *flags]
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=300,
    **kwargs,
  )


def kill_at(
  config,
  module,
  name,
  calls,
  *,
  after=False,
  argument=None,
  signal='SIGKILL',
  times=1,
):
  """Runs main up to a call of a function, and sends itself the signal."""
  code = CHILD.format(
    module=module,
    name=name,
    calls=calls,
    after=after,
    argument=argument,
    signal=signal,
    times=times,
    flags=config.to_flagfile().split('\n')[:-1],
  )
  return run_main((), textwrap.dedent(code))


def outcome(config):
  """All that two runs must share: state, negatives, metrics, pick-ups."""
  workdir = pathlib.Path(config.workdir)
  last = checkpoint.committed_steps(workdir)[-1]
  folder = workdir.absolute() / 'checkpoints' / str(last)
  with ocp.StandardCheckpointer() as checkpointer:
    state = [
      jax.tree.map(np.asarray, checkpointer.restore(folder / item))
      for item in ('params', 'opt_state')
    ]
  negatives = {
    path.parent.name: np.load(path)
    for path in sorted(workdir.glob('refresh/????????/negatives.npy'))
  }
  metrics = {}
  for line in logs.read(workdir):
    for name, value in line.items():
      if name != 'step' and not name.startswith('time/'):
        assert (line['step'], name) not in metrics
        metrics[line['step'], name] = value
  # What was encoded before the kill is not encoded, and counted, again.
  metrics = {k: v for k, v in metrics.items() if k[1] != 'refresh/real_tokens'}
  return (
    last,
    state,
    negatives,
    metrics,
    (workdir / 'pickups.json').read_text(),
  )


def check_same(found, expected):
  assert found[0] == expected[0]
  jax.tree.map(np.testing.assert_array_equal, found[1:3], expected[1:3])
  assert found[3] == expected[3]
  assert found[4] == expected[4]


def never_killed(reference, config):
  """The outcome of the same run without a kill, made once."""
  if not reference:
    whole = dataclasses.replace(config, workdir=f'{config.workdir}-whole')
    train.run(whole)
    reference.update(folder=whole.workdir, outcome=outcome(whole))
  return reference['outcome']


# (module, function, which call or what its last argument ends with, after it
# or before, step it goes on from)
KILLS = {
  'before the first checkpoint': (
    'ance_jax.core.checkpoint',
    'Checkpoints.save',
    1,
    False,
    None,
  ),
  'at a step of the warm-up': (
    'ance_jax.training.run_log',
    'RunLog.log_step',
    3,
    True,
    0,
  ),
  'at a step between checkpoints': (
    'ance_jax.training.run_log',
    'RunLog.log_step',
    11,
    True,
    (8, 9),
  ),
  'while a checkpoint is written': (
    'ance_jax.core.checkpoint',
    'Checkpoints.save',
    5,
    True,
    (6, 8),
  ),
  'after the checkpoint of a refresh': (
    'ance_jax.training.refreshes',
    'refresh',
    2,
    False,
    8,
  ),
  'inside the encoding of a refresh': (
    'ance_jax.retrieval.encoding',
    'encode_rows',
    9,
    False,
    4,
  ),
  'after the mining': (
    'ance_jax.mining.miner',
    'mine_table',
    2,
    True,
    8,
  ),
  'before the refresh is visible': (
    'ance_jax.core.atomic',
    'os.rename',
    'refresh/00000008',
    False,
    8,
  ),
  'after the refresh, before it is picked up': (
    'ance_jax.training.refreshes',
    'refresh',
    2,
    True,
    8,
  ),
  'after the pick-up': ('ance_jax.training.resume', 'pick_up', 2, True, 8),
  'while embeddings are pruned': (
    'ance_jax.retrieval.corpus_index',
    'prune_embeddings',
    4,
    False,
    8,
  ),
}


# Each takes seconds, so the soak tries the others; by default they are stopped
# in one process, by run_faults_test.py and background_test.py.
ALWAYS_TRIED = (
  'while a checkpoint is written',
  'after the pick-up',
)


def seldom(*values):
  return pytest.param(*values, marks=pytest.mark.soak)


@pytest.mark.parametrize(
  'name', [n if n in ALWAYS_TRIED else seldom(n) for n in KILLS]
)
def test_killed_and_started_again_a_run_ends_bit_equal(
  name, config, reference, capsys
):
  expected = never_killed(reference, config)
  module, function, calls, after, resumed_at = KILLS[name]
  argument = calls if isinstance(calls, str) else None
  killed = kill_at(
    config,
    module,
    function,
    1 if argument else calls,
    after=after,
    argument=argument,
  )
  assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
  committed = checkpoint.committed_steps(config.workdir)
  # Its settings are those of the checkpoint, not of a file that was edited.
  path = pathlib.Path(config.workdir, 'run.flags')
  path.write_text(path.read_text().replace('--seed=0', '--seed=1'))
  train.run(config)
  assert '--seed=0\n' in path.read_text()
  out = capsys.readouterr().out
  resumed = [
    step for step in range(17) if f'checkpoint of step {step}\n' in out
  ]
  assert resumed == committed[-1:]
  if resumed_at is None:
    assert resumed == []
    assert 'from step 0' in out
  else:
    allowed = resumed_at if isinstance(resumed_at, tuple) else (resumed_at,)
    assert resumed[0] in allowed
  check_same(outcome(config), expected)


@pytest.mark.soak
def test_the_same_command_goes_on_after_two_kills(config, reference):
  expected = never_killed(reference, config)
  kill_at(config, 'ance_jax.training.run_log', 'RunLog.log_step', 6)
  kill_at(config, 'ance_jax.mining.miner', 'mine_table', 1)
  done = run_main(config.to_flagfile().split('\n')[:-1])
  assert done.returncode == 0, done.stderr[-2000:]
  assert 'goes on from the checkpoint of step 8' in done.stdout
  check_same(outcome(config), expected)


@pytest.mark.parametrize(
  ('number', 'module', 'function', 'calls', 'saved'),
  [
    ('SIGTERM', 'ance_jax.training.run_log', 'RunLog.log_step', 7, 8),
    ('SIGTERM', 'ance_jax.retrieval.encoding', 'encode_rows', 9, 4),
    seldom('SIGINT', 'ance_jax.training.run_log', 'RunLog.log_step', 7, 8),
    seldom('SIGTERM', 'ance_jax.retrieval.corpus_index', 'evaluate', 3, 5),
  ],
  ids=['in training', 'inside a refresh', 'Ctrl-C', 'in an evaluation'],
)
def test_a_stop_signal_saves_says_so_and_loses_nothing(
  number, module, function, calls, saved, config, reference
):
  expected = never_killed(reference, config)
  stopped = kill_at(config, module, function, calls, signal=number)
  assert stopped.returncode == 143
  assert 'ance_jax: stopped on request in ' in stopped.stderr
  assert 'waits' in stopped.stdout
  assert 'Traceback' not in stopped.stderr
  assert checkpoint.committed_steps(config.workdir)[-1] == saved
  train.run(config)
  check_same(outcome(config), expected)


def test_a_second_ctrl_c_leaves_at_once_and_loses_nothing(config, reference):
  expected = never_killed(reference, config)
  left = kill_at(
    config,
    'ance_jax.training.run_log',
    'RunLog.log_step',
    7,
    signal='SIGINT',
    times=2,
  )
  assert left.returncode == 130
  assert left.stderr.endswith('ance_jax: interrupted.\n')
  assert 'waits' not in left.stdout
  assert 'Traceback' not in left.stderr
  assert checkpoint.committed_steps(config.workdir)[-1] <= 6
  train.run(config)
  check_same(outcome(config), expected)


def test_a_run_writes_the_flags_that_repeat_it(config, reference):
  never_killed(reference, config)
  folder = pathlib.Path(reference['folder'])
  again = flags.from_flagfile(str(folder / 'run.flags'))
  assert again == dataclasses.replace(config, workdir=str(folder))
  assert (folder / 'curves.png').exists()
