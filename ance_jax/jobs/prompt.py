"""Queries that a person types, or another program sends."""

import os
import select
import sys

# Seconds for which a Ctrl-C between the prompt and the read waits at most.
_LOOK_SECS = 0.1


def queries():
  """Yields what is typed until an empty line or the end of the input."""
  while query := _line('query> ').strip():
    yield query


def _line(prompt):
  """Returns the next line; '' at the end of the input."""
  descriptor = _descriptor()
  if descriptor is None:
    try:
      return input(prompt)
    except EOFError:
      return ''
  # Not `input`, which forgets a Ctrl-C that comes while it writes the prompt;
  # and no read that waits, as one that comes just before it is not seen there.
  print(prompt, end='', flush=True)
  line = b''
  while not line.endswith(b'\n'):
    while not select.select([descriptor], [], [], _LOOK_SECS)[0]:
      pass
    byte = os.read(descriptor, 1)
    if not byte:
      break
    line += byte
  return line.decode(errors='replace')


def _descriptor():
  """Returns the descriptor of an input that is no terminal, or None."""
  try:
    return None if sys.stdin.isatty() else sys.stdin.fileno()
  except (AttributeError, ValueError):  # A notebook's has none.
    return None
