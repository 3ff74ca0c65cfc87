"""The script for a machine with an accelerator, as far as a CPU shows it."""

import importlib
import json
import re

import pytest
import scripts


@pytest.fixture
def script(monkeypatch):
  monkeypatch.syspath_prepend(
    str(scripts.REPOSITORY / 'experiments' / 'benchmarks')
  )
  return importlib.import_module('accelerator')


def test_a_part_that_raises_is_recorded_and_the_others_go_on(script, capsys):
  written = []

  def call(name):
    if name == 'step':
      raise ValueError('no such kernel\nand more')
    return {'of': name}

  found = script.run_parts(
    ['encode', 'step', 'search', 'adore'],
    call,
    seconds=100,
    needs=lambda name: 1000 if name == 'search' else 50,
    write=lambda found: written.append(list(found)),
  )
  assert found['encode']['of'] == 'encode'
  assert found['step']['error'] == 'ValueError: no such kernel'
  assert found['search']['not_begun'] == 'no time left'
  assert found['adore']['of'] == 'adore'
  # What was measured is kept after each part.
  assert [len(names) for names in written] == [1, 2, 3, 4]
  printed = capsys.readouterr().out
  assert 'adore: begins' in printed
  assert 'search: begins' not in printed


def test_its_wheels_have_the_ranges_of_the_package(script):
  text = (scripts.REPOSITORY / 'setup.py').read_text()
  required = re.findall(
    r"^    '([^']+)',", text.split('extras_require')[0], re.M
  )
  assert set(script.WHEELS) - set(required) == {
    # What ir-measures asks for.
    'pytrec-eval-terrier>=0.5.5'
  }


@pytest.mark.soak
def test_all_parts_run_at_a_small_size(tmp_path):
  output = tmp_path / 'found.json'
  scripts.run_benchmark(
    'accelerator.py', '--all', '--small', f'--output={output}', timeout=900
  )
  parts = json.loads(output.read_text())['parts']
  names = (
    scripts.REPOSITORY / 'experiments/benchmarks/accelerator.py'
  ).read_text()
  assert list(parts) == re.findall(r"^  '(\w+)': Part", names, re.M)
  assert all('part_secs' in numbers for numbers in parts.values())
