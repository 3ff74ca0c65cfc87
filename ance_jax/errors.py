"""What may end a job: an error by each kind of cause."""


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
