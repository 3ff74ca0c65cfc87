"""Parts of accelerator.py that are whole runs, on data that is made."""

from collections.abc import Callable
import contextlib
import dataclasses
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from unittest import mock

import accelerator_checks
import boundary
import jax
import made
import numpy as np
import orbax.checkpoint as ocp

from ance_jax import config
from ance_jax.core import checkpoint
from ance_jax.core import logs
from ance_jax.jobs import train
from ance_jax.training import refreshes

REPOSITORY = pathlib.Path(__file__).parents[2]
# Seconds after which a process hangs, and between two looks at its folder.
_HANGS, _LOOK = 240, 0.005
# The run that is killed: a small one that refreshes, in steps.
_STEPS, _EVERY, _SAVED, _KILLED = 60, 20, 5, 25


def resumed(sizes: made.Sizes, work: pathlib.Path) -> dict[str, float]:
  """Kills a run by SIGKILL and starts it again: it must end with the same bits.

  It compares parameters, optimizer state and all negatives with a run that was
  not killed. On a GPU it sets XLA's flag for deterministic operations.
  """
  small = dataclasses.replace(made.SMALL, body=(2, 128, 2, 256, 1000))
  data = made.write_beir(work / 'resumed', small.passages)
  settings = made.run_settings(
    small,
    data,
    method='ance_in_batch',
    dtype=sizes.dtype,
    warmup_steps=_EVERY,
    steps_per_refresh=_EVERY,
    steps_per_checkpoint=_SAVED,
    max_steps=_STEPS,
  )
  flags = os.environ.get('XLA_FLAGS', '')
  if jax.default_backend() == 'gpu':
    flags = f'{flags} --xla_gpu_deterministic_ops=true'.strip()
  env = {'JAX_COMPILATION_CACHE_DIR': str(work / 'compiled of resumed')}
  if flags:
    env['XLA_FLAGS'] = flags

  def saved(folder):
    return max(checkpoint.committed_steps(folder), default=0) >= _KILLED

  start = time.perf_counter()
  run_child(settings, work / 'whole', env)
  secs = time.perf_counter() - start
  killed = run_child(settings, work / 'killed', env, until=saved)
  accelerator_checks.require(killed, 'the run ended before it was killed')
  at = max(checkpoint.committed_steps(work / 'killed'))
  run_child(settings, work / 'killed', env)
  expected, found = (_outcome(work / name) for name in ('whole', 'killed'))
  different = [
    name
    for name in expected.keys() | found.keys()
    if name not in expected.keys() & found.keys()
    or not np.array_equal(expected[name], found[name], equal_nan=True)
  ]
  accelerator_checks.require(
    not different,
    f'{len(different)} arrays differ, such as {min(different, default="")}',
  )
  return {'killed_after_step': at, 'equal': len(found), 'secs': round(secs, 1)}


def start(sizes: made.Sizes, work: pathlib.Path) -> dict[str, float]:
  """Takes the seconds from the start of a process to its first step.

  Once with an empty cache of compiled programs, and again with what was kept.
  """
  data = made.write_beir(work / 'start', sizes.passages)
  settings = made.run_settings(sizes, data, steps_per_log=1)
  env = {
    'JAX_COMPILATION_CACHE_DIR': str(work / 'compiled'),
    # What a run keeps in its own cache.
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
  }
  found = {}
  for name in ('cold', 'warm'):
    begun = time.perf_counter()
    stopped = run_child(
      settings,
      work / name,
      env,
      until=lambda folder: logs.series(folder, 'train/loss'),
    )
    accelerator_checks.require(stopped, 'the run ended before its first step')
    found[f'{name}_secs'] = round(time.perf_counter() - begun, 1)
  return found


def refresh(sizes: made.Sizes, work: pathlib.Path) -> dict:
  """Trains with refreshes in step, and beside on the same device."""
  data, every = (
    made.write_beir(work / 'refresh', sizes.passages),
    sizes.steps // 5,
  )
  settings = made.run_settings(
    sizes,
    data,
    method='ance_in_batch',
    warmup_steps=every,
    steps_per_refresh=every,
  )
  changes = dataclasses.asdict(settings)
  for name in ('workdir', 'max_steps'):
    del changes[name]
  found, beside = {}, {'refresh_mode': 'async'}
  with open(work / 'refresh.log', 'w') as log, contextlib.redirect_stdout(log):
    # What a refresher compiles, a later one reads from the cache.
    first = dataclasses.replace(
      settings,
      workdir=str(work / 'first'),
      max_steps=2 * every + 1,
      max_staleness=every,
      **beside,
    )
    train.run(first)
    # Beside, training waits for none but where it has come to its last fifth.
    beside['max_staleness'] = 3 * every
    for name, mode in (('in step', {}), ('beside', beside)):
      folder = str(work / name)
      with _timed(refreshes, 'refresh') as secs:
        numbers = boundary.train_once(folder, sizes.steps, **changes | mode)
      found[name] = {what: round(value, 2) for what, value in numbers.items()}
      found[name]['refreshes'] = len(secs)
      # The first one of a run compiles, or reads what was compiled.
      median = statistics.median(secs[1:] or secs)
      found[name]['refresh secs'] = round(median, 2)
  return found


def run_child(
  settings: config.Config,
  folder: pathlib.Path,
  env: dict[str, str],
  until: Callable[[pathlib.Path], object] | None = None,
) -> bool:
  """Runs a job in a process of its own; returns whether it was killed.

  Args:
    settings: Of the job, without its folder.
    folder: Folder of the run.
    env: Variables to set.
    until: Kills it by SIGKILL when until(folder) is true; None lets it end.

  Raises:
    RuntimeError: The process failed or hangs.
  """
  flags = dataclasses.replace(settings, workdir=str(folder)).to_flagfile()
  path = [str(REPOSITORY), os.environ.get('PYTHONPATH', '')]
  env = {'PYTHONPATH': os.pathsep.join(filter(None, path)), **env}
  log = folder.with_suffix('.log')
  with open(log, 'ab') as output:
    process = subprocess.Popen(
      [sys.executable, '-m', 'ance_jax.main', *flags.split()],
      stdout=output,
      stderr=subprocess.STDOUT,
      env={**os.environ, **env},
    )
  end = time.monotonic() + _HANGS
  try:
    while process.poll() is None and time.monotonic() < end:
      if until and folder.exists() and until(folder):
        break
      time.sleep(_LOOK)
  finally:  # Also where a person stops this script.
    process.kill()
    code = process.wait()
  if code not in (0, -signal.SIGKILL) or time.monotonic() >= end:
    last = log.read_text(errors='replace').splitlines()[-1:]
    raise RuntimeError(f'a run ended with {code}: {"".join(last)}')
  return code == -signal.SIGKILL


def _outcome(folder):
  """Returns {name: array} of the last checkpoint and of all negatives."""
  last = max(checkpoint.committed_steps(folder))
  found = {'last step': np.array(last)}
  with ocp.StandardCheckpointer() as checkpointer:
    for item in ('params', 'opt_state'):
      path = folder.absolute() / 'checkpoints' / str(last) / item
      leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(path))
      for name, leaf in leaves:
        found[f'{item}{jax.tree_util.keystr(name)}'] = np.asarray(leaf)
  for path in folder.glob('refresh/*/negatives.npy'):
    found[f'negatives {path.parent.name}'] = np.load(path)
  return found


@contextlib.contextmanager
def _timed(module, name):
  """Yields a list that gets the seconds of each call of a function."""
  real, secs = getattr(module, name), []

  def timed(*args, **kwargs):
    begun = time.perf_counter()
    found = real(*args, **kwargs)
    secs.append(time.perf_counter() - begun)
    return found

  with mock.patch.object(module, name, timed):
    yield secs
