"""The soak of real kills runs, and recovers: two kills of the hundreds."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]


def test_what_the_soak_watches_is_there(monkeypatch):
  # The soak itself is seldom run: a function renamed shows here.
  monkeypatch.syspath_prepend(REPOSITORY / 'experiments' / 'benchmarks')
  watched = importlib.import_module('watched')
  found = []
  monkeypatch.setattr(
    watched, 'wrap', lambda owner, name, _: found.append(getattr(owner, name))
  )
  watched.watch(board=None, units=None)
  assert len(found) > 10


@pytest.mark.soak
def test_a_run_recovers_from_two_real_kills(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      'experiments/benchmarks/soak.py',
      '--kills=2',
      '--kills_per_run=2',
      f'--folder={tmp_path}',
    ],
    cwd=REPOSITORY,
    env={**os.environ, 'PYTHONPATH': str(REPOSITORY)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  numbers = json.loads(done.stdout.splitlines()[-1])
  assert numbers['kills'] == numbers['recovered'] == 2
  assert sum(numbers['killed_in'].values()) == 2
  assert numbers['runs'] == numbers['bit_equal']


@pytest.mark.soak
def test_a_trainer_and_its_refresher_recover_from_kills_and_stops(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      'experiments/benchmarks/soak_beside.py',
      '--kills=3',
      '--kills_per_run=3',
      '--steps=200',
      f'--folder={tmp_path}',
    ],
    cwd=REPOSITORY,
    env={**os.environ, 'PYTHONPATH': str(REPOSITORY)},
    capture_output=True,
    text=True,
    timeout=1200,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  numbers = json.loads(done.stdout.splitlines()[-1])
  assert sum(numbers['kills'].values()) >= 3
  assert numbers['kills']['both'] >= 1
  assert numbers['bit_equal'] == numbers['runs']
  assert numbers['pick_ups'] > 2
