"""Whatever is given: one sentence, or a line that counts what was changed."""

import contextlib
import functools
import io
import re
import signal
import time
from typing import NamedTuple

from bad_input_tools import Refused
import cases_beir
import cases_checkpoints
import cases_flags
import cases_formats
import cases_mine
import cases_runs
import pytest

from ance_jax import errors

GROUPS = {
  'flags': cases_flags,
  'beir': cases_beir,
  'formats': cases_formats,
  'checkpoints': cases_checkpoints,
  'runs': cases_runs,
  'mine': cases_mine,
}
CASES = [(group, name) for group in GROUPS for name in GROUPS[group].CASES]
# Of a machine that does other things too; nearly all take milliseconds.
MAX_SECS = 20


class Outcome(NamedTuple):
  """What became of a case: (type, text) of the error, lines, seconds."""

  error: tuple[type, str] | None
  printed: str
  secs: float


@pytest.fixture(scope='session')
def outcome(tmp_path_factory):
  """outcome(group, name) -> `Outcome`; each case is run once."""
  sound = functools.cache(lambda group: tmp_path_factory.mktemp('sound'))

  def late(*_):
    raise TimeoutError('the case hangs')

  @functools.cache
  def find(group, name):
    module, folder = GROUPS[group], tmp_path_factory.mktemp('case')
    module.make_sound(folder, sound(group))
    changes = module.CASES[name].make(folder)
    printed, error, start = io.StringIO(), None, time.perf_counter()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(MAX_SECS)
    try:
      with contextlib.redirect_stdout(printed):
        module.use(folder, changes)
    except Exception as caught:
      text = str(caught).replace(str(folder), 'FOLDER')
      error = type(caught), text
    finally:
      signal.alarm(0)
      signal.signal(signal.SIGALRM, before)
    secs = time.perf_counter() - start
    return Outcome(error, printed.getvalue(), secs)

  return find


@pytest.mark.parametrize(('group', 'name'), CASES)
def test_each_case_ends_in_a_sentence_or_a_line(group, name, outcome):
  case, found = GROUPS[group].CASES[name], outcome(group, name)
  assert found.secs < MAX_SECS
  if not isinstance(case, Refused):
    assert found.error is None
    assert case.says in found.printed
    return
  assert found.error is not None, 'it was accepted'
  kind, text = found.error
  assert issubclass(kind, errors.BadInput), found.error
  assert case.says in text
  assert text.isprintable()
  assert text.endswith('.')
  assert len(text) < 700
  if kind is not errors.Damaged:
    # The fact, perhaps the rule and what was found, and the cure.
    assert '; ' in text
  if case.file:
    place = rf'^\S*{re.escape(case.file)}(\.gz)?'
    place += rf', line {case.line}: ' if case.line else r'(, line \d+)?: '
    assert re.search(place, text)


def rule_of(text):
  """Returns what a sentence demands, without names, numbers and values."""
  rule = text.split('; found ')[0]
  rule = re.sub(r'^\S+(, line \d+)?: ', '', rule)
  rule = re.sub(r'--\w+', '--flag', rule)
  rule = re.sub(r'be one of .*', 'be one of those', rule)
  rule = re.sub(r'tensor \S+|\b[a-z]+_[a-z_]+\b', '_', rule)
  return re.sub(r"'[^']*'|\d[\d,]*|\S*FOLDER\S*", '_', rule)


def test_there_are_many_cases_of_many_rules(outcome):
  rules = {}
  for group, name in CASES:
    found = outcome(group, name)
    if found.error:
      rules.setdefault(rule_of(found.error[1]), []).append(name)
  for rule, names in sorted(rules.items()):
    print(len(names), rule)
  print(len(CASES), len(rules))
  assert len(CASES) >= 200
  assert len(rules) >= 80
