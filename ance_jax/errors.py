"""What may end a job: an error by each kind of cause, and exit codes."""

# Beside 0: a disk failed, or something nobody thought of; what the user gave
# cannot be used; a shell's for SIGTERM and Ctrl-C.
FAILED, BAD_INPUT, STOPPED, INTERRUPTED = 1, 2, 143, 130


class BadInput(ValueError):
  """Unusable user input; the text says what is wrong and how to fix it.

  It is one line that any terminal can show, whatever the value holds.
  """

  def __init__(self, text):
    super().__init__(''.join(c if c.isprintable() else ' ' for c in text))


def refusal(fact: str, cure: str, place: str = '') -> BadInput:
  """Returns the error of a fact and its cure, as one sentence.

  Args:
    fact: What is wrong, with the rule if the fact does not say it.
    cure: What to do.
    place: File and line that it is in, '' if there are none.
  """
  return BadInput(f'{place}{fact}; {cure}.')


class Damaged(BadInput):
  """A file is not what was written, or is gone."""


class SaveFailed(RuntimeError):
  """A checkpoint could not be written."""


class Stopped(Exception):
  """The process was asked to stop, in the middle of a phase."""
