"""What is typed or piped in is read line by line, and Ctrl-C is never lost."""

import io
import os
import sys

import pytest

from ance_jax.jobs import prompt


@pytest.fixture
def typed(monkeypatch):
  """typed(text) has an input that is a pipe; returns its other end."""
  opened = []

  def typed(text):
    read, write = os.pipe()
    opened.extend([os.fdopen(read), os.fdopen(write, 'wb', buffering=0)])
    monkeypatch.setattr(sys, 'stdin', opened[-2])
    opened[-1].write(text)
    return opened[-1]

  yield typed
  for file in opened:
    file.close()


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    (b'one\n two words \n\nnever\n', ['one', 'two words']),
    (b'without an end', ['without an end']),
    ('caf\u00e9\r\n\u4e2d\n'.encode(), ['caf\u00e9', '\u4e2d']),
    (b'\xff\n', ['\ufffd']),
    (b'', []),
  ],
)
def test_queries_are_lines_up_to_an_empty_one_or_the_end(text, expected, typed):
  typed(text).close()
  assert list(prompt.queries()) == expected


def test_where_the_input_has_no_descriptor_python_reads_it(monkeypatch):
  monkeypatch.setattr(sys, 'stdin', io.StringIO('one\ntwo'))
  assert list(prompt.queries()) == ['one', 'two']


class _Interrupted(io.StringIO):
  """A terminal that Ctrl-C reaches while the prompt is being written."""

  def flush(self):
    if 'query> ' in self.getvalue():
      raise KeyboardInterrupt


def test_ctrl_c_while_the_prompt_is_written_is_not_forgotten(
  typed, monkeypatch
):
  typed(b'one\n')
  monkeypatch.setattr(sys, 'stdout', _Interrupted())
  with pytest.raises(KeyboardInterrupt):
    next(prompt.queries())


def test_nothing_is_read_that_would_wait(typed, monkeypatch):
  """A read that waits does not see a Ctrl-C that came just before it."""
  typed(b'')
  looks = []

  def select(read, write, error, timeout):
    looks.append(timeout)
    if len(looks) == 3:
      raise KeyboardInterrupt  # As Python does between two looks.
    return [], [], []

  monkeypatch.setattr(prompt.select, 'select', select)
  monkeypatch.setattr(prompt.os, 'read', None)
  with pytest.raises(KeyboardInterrupt):
    next(prompt.queries())
  assert max(looks) <= 0.2
