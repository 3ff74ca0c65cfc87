"""What may end a job: an error by each kind of cause, and exit codes."""

# Beside 0: a disk failed, or something nobody thought of; what the user gave
# cannot be used; a shell's for SIGTERM and Ctrl-C.
FAILED, BAD_INPUT, STOPPED, INTERRUPTED = 1, 2, 143, 130


class BadInput(ValueError):
  """What the user gave cannot be used; the text says rule, value and cure.

  It is one line that any terminal can show, whatever the value holds.
  """

  def __init__(self, text):
    super().__init__(''.join(c if c.isprintable() else ' ' for c in text))


class Damaged(BadInput):
  """A file is not what was written, or is gone."""


class SaveFailed(RuntimeError):
  """A checkpoint could not be written."""


class Stopped(Exception):
  """The process was asked to stop, in the middle of a phase."""
