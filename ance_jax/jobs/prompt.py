"""Reads queries from a terminal or another program."""

from collections.abc import Iterator
import os
import select
import sys

# Maximum delay of a Ctrl-C between the prompt and the read, in seconds.
_LOOK_SECS = 0.1


def queries() -> Iterator[str]:
  """Yields lines of input until an empty line or the end of the input."""
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
  # `input` loses a Ctrl-C that arrives while it writes the prompt, and a
  # blocking read misses one that arrives just before it.
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
  """Returns the input's file descriptor, or None for a terminal or notebook."""
  try:
    return None if sys.stdin.isatty() else sys.stdin.fileno()
  except (AttributeError, ValueError):  # A notebook has no descriptor.
    return None
