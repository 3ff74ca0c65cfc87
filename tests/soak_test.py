"""The soak of real kills runs, and recovers: two kills of the hundreds."""

import importlib
import json

import pytest
import scripts


def test_what_the_soak_watches_is_there(monkeypatch):
  # The soak itself is seldom run: a function renamed shows here.
  monkeypatch.syspath_prepend(scripts.REPOSITORY / 'experiments' / 'benchmarks')
  watched = importlib.import_module('watched')
  found = []
  monkeypatch.setattr(
    watched, 'wrap', lambda owner, name, _: found.append(getattr(owner, name))
  )
  watched.watch(board=None, units=None)
  assert len(found) > 10


@pytest.mark.soak
def test_a_run_recovers_from_two_real_kills(tmp_path):
  printed = scripts.run_benchmark(
    'soak.py',
    '--kills=2',
    '--kills_per_run=2',
    f'--folder={tmp_path}',
    timeout=300,
  )
  numbers = json.loads(printed.splitlines()[-1])
  assert numbers['kills'] == numbers['recovered'] == 2
  assert sum(numbers['killed_in'].values()) == 2
  assert numbers['runs'] == numbers['bit_equal']


@pytest.mark.soak
def test_a_trainer_and_its_refresher_recover_from_kills_and_stops(tmp_path):
  printed = scripts.run_benchmark(
    'soak_beside.py',
    '--kills=3',
    '--kills_per_run=3',
    '--steps=200',
    f'--folder={tmp_path}',
    timeout=1200,
  )
  numbers = json.loads(printed.splitlines()[-1])
  assert sum(numbers['kills'].values()) >= 3
  assert numbers['kills']['both'] >= 1
  assert numbers['bit_equal'] == numbers['runs']
  assert numbers['pick_ups'] > 2
