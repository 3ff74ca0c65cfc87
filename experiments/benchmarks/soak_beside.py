"""Kills a trainer and its refresher at random moments, again and again.

    python experiments/benchmarks/soak_beside.py --kills=20

Two processes share a folder and nothing else: one trains with
--refresh_mode=external, one refreshes with --watch. Every few seconds one of
the two is killed with SIGKILL, or both are asked to stop with SIGTERM, and
started again with the same command. Once training is over, a run with
--refresh_replay must end with the same bits: nothing that was picked up is lost
or changed.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import soak

SETTINGS = dataclasses.replace(
  soak.SETTINGS,
  refresh_mode='external',
  max_staleness=60,
  max_steps=600,
  steps_per_refresh=20,
  steps_per_checkpoint=10,
  steps_per_eval=None,
  checkpoints_to_keep=2,
)
# What is killed, or stopped.
KINDS = ('train', 'refresh', 'both')
# Exit codes of a process that ended by itself, and that was asked to; one that
# was not yet listening is ended by the signal.
OVER, STOPPED = 0, (143, -signal.SIGTERM)
# Seconds until a process counts as hanging.
HANGS = 600


class Job:
  """A process that is started again when it was killed."""

  def __init__(self, folder, name, settings):
    self._command = [
      sys.executable,
      '-m',
      'ance_jax.main',
      *settings.to_flagfile().split(),
    ]
    self._log = open(folder / f'{name}.txt', 'ab')
    self._env = os.environ | {
      'PYTHONUNBUFFERED': '1',
      'JAX_COMPILATION_CACHE_DIR': str(folder.parent / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    self.start()

  def start(self):
    """Starts the process."""
    self._process = subprocess.Popen(
      self._command,
      stdout=self._log,
      stderr=subprocess.STDOUT,
      start_new_session=True,
      env=self._env,
    )

  def is_over(self):
    """Returns whether it ended by itself, which must be without an error."""
    code = self._process.poll()
    if code not in (None, OVER):
      raise RuntimeError(f'{self._log.name}: exit code {code}')
    return code == OVER

  def kill(self):
    """Kills the process."""
    os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()

  def ask_to_stop(self):
    """Sends SIGTERM."""
    self._process.terminate()

  def stop(self):
    """Returns once it ended, as it was asked to."""
    code = self._process.wait(HANGS)
    if code not in (OVER, *STOPPED):
      raise RuntimeError(f'{self._log.name}: exit code {code}')


def run(folder, random, kills, steps):
  """Makes a run of so many steps, killed so many times, and its replay.

  Returns:
    The number of kills by job, of pick-ups, and the seconds.
  """
  start = time.time()
  base = dataclasses.replace(
    SETTINGS,
    max_steps=steps,
    workdir=str(folder / 'run'),
    data_dir=str(folder.parent / 'beir'),
  )
  jobs = {'train': Job(folder, 'train', base)}
  try:
    jobs['refresh'] = Job(
      folder, 'refresh', dataclasses.replace(base, job='refresh', watch=True)
    )
    killed = dict.fromkeys(KINDS, 0)
    for number in random.permutation(kills):
      time.sleep(random.uniform(0.5, 12))
      if jobs['train'].is_over():
        break
      kind = KINDS[number % len(KINDS)]
      _end(jobs, kind)
      killed[kind] += 1
    _wait(jobs.values())
    again = dataclasses.replace(
      base,
      workdir=str(folder / 'again'),
      refresh_mode='sync',
      max_staleness=0,
      refresh_replay=base.workdir,
    )
    jobs['again'] = Job(folder, 'again', again)
    _wait([jobs['again']])
  finally:
    for job in jobs.values():
      if job._process.poll() is None:
        job.kill()
  first, second = (soak.outcome(folder / name) for name in ('run', 'again'))
  # A replay has the refreshes that were used, not those that were left.
  used = [one['refresh'] for one in first['pick-ups']]
  first = {k: v for k, v in first.items() if _is_of(k, used)}
  different = [k for k in first | second if first.get(k) != second.get(k)]
  assert not different, different[:9]
  assert used == sorted(used)
  left = soak.left_over(folder / 'run')
  assert not left, left
  return killed, len(used), time.time() - start


def _end(jobs, kind):
  """Kills a job, or stops both of them; all run again afterwards."""
  if kind in jobs:
    jobs[kind].kill()
    jobs[kind].start()
    return
  for job in jobs.values():
    job.ask_to_stop()
  for job in jobs.values():
    job.stop()
    job.start()


def _wait(jobs):
  """Returns when all of them ended by themselves."""
  start = time.time()
  # All are looked at: one may wait for another that failed.
  while sum(job.is_over() for job in jobs) < len(jobs):
    assert time.time() - start < HANGS, 'a job hangs'
    time.sleep(0.5)


def _is_of(name, used):
  return not name.startswith('negatives ') or int(name.split()[1]) in used


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--kills_per_run', type=int, default=5)
  parser.add_argument('--steps', type=int, default=SETTINGS.max_steps)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--folder', type=pathlib.Path)
  given = parser.parse_args()
  random = np.random.default_rng(given.seed)
  total, runs, picked_up = dict.fromkeys(KINDS, 0), 0, 0
  with tempfile.TemporaryDirectory() as temporary:
    top = given.folder or pathlib.Path(temporary)
    soak.write_beir(top / 'beir')
    while sum(total.values()) < given.kills:
      folder = top / f'{runs:03d}'
      folder.mkdir()
      killed, used, secs = run(folder, random, given.kills_per_run, given.steps)
      total = {name: total[name] + killed[name] for name in total}
      runs, picked_up = runs + 1, picked_up + used
      print(f'run {runs}: killed {killed}, {used} pick-ups, {secs:.0f} s')
  result = {'kills': total, 'runs': runs, 'pick_ups': picked_up}
  print(json.dumps({**result, 'bit_equal': runs}))


if __name__ == '__main__':
  main()
