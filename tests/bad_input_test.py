"""Whatever is given: one sentence, or a line that counts what was changed."""

import functools
import re
import signal

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
MAX_SECS = 60


@pytest.fixture(scope='session')
def sound(tmp_path_factory):
  """sound(group) -> a folder that the sound input of a group may be kept in."""
  return functools.cache(lambda group: tmp_path_factory.mktemp('sound'))


@pytest.fixture
def alarm():
  """alarm() fails a case that hangs from then on."""

  def late(*_):
    raise TimeoutError('the case hangs')

  before = signal.signal(signal.SIGALRM, late)
  yield lambda: signal.alarm(MAX_SECS)
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(('group', 'name'), CASES)
def test_each_case_ends_in_a_sentence_or_a_line(
  group, name, sound, alarm, tmp_path, capsys
):
  module, case = GROUPS[group], GROUPS[group].CASES[name]
  module.make_sound(tmp_path, sound(group))
  changes = case.make(tmp_path)
  alarm()
  capsys.readouterr()
  if not isinstance(case, Refused):
    module.use(tmp_path, changes)
    assert case.says in capsys.readouterr().out
    return
  with pytest.raises(errors.BadInput) as refused:
    module.use(tmp_path, changes)
  text = str(refused.value).replace(str(tmp_path), 'FOLDER')
  assert case.says in text
  assert text.isprintable()
  assert text.endswith('.')
  assert len(text) < 700
  if refused.type is not errors.Damaged:
    # The fact, the rule if it is not plain, and the cure.
    assert '; ' in text
  if case.file:
    place = rf'^\S*{re.escape(case.file)}(\.gz)?'
    place += rf', line {case.line}: ' if case.line else r'(, line \d+)?: '
    assert re.search(place, text)
