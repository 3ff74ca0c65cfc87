"""How fast a phase goes: rate and time left as text, and lines with both."""

import threading
import time

import tqdm

# Seconds from the start of a phase to its first line, and from one to the next.
_FIRST_SECS, _EVERY_SECS = 3, 20


class Lines:
  """Lines of one phase, printed by a thread: an item alone may take minutes.

  A context; a phase that is over before the first line is due prints none.
  """

  def __init__(self, say, what, total=0, unit='', done=0):
    """Begins the phase.

    Args:
      say: Prints a line; None: there are none.
      what: Name of the phase.
      total: Number of units in all; 0: nobody knows.
      unit: Their name.
      done: Units that were done before.
    """
    self._say, self._what, self._total, self._unit = say, what, total, unit
    self._before = self._done = done
    self._start, self._ended = time.perf_counter(), threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def __enter__(self):
    if self._say:
      self._thread.start()
    return self

  def __exit__(self, *_):
    self._ended.set()
    if self._say:
      self._thread.join()

  def update(self, number):
    """Adds to the units that are done."""
    self._done += number

  def _run(self):
    wait = _FIRST_SECS
    while not self._ended.wait(wait):
      secs = time.perf_counter() - self._start
      self._say(f'{self._what}: {self._text(secs)}')
      wait = _EVERY_SECS

  def _text(self, secs):
    so_far = f'{tqdm.tqdm.format_interval(secs)} so far'
    if not self._total:
      return so_far
    done = self._done
    text = f'{done:,} of {self._total:,} {self._unit}'
    if done == self._before:
      return f'{text}, {so_far}'
    rate = (done - self._before) / secs
    left = max(self._total - done, 0)
    return f'{text}, {rate_text(rate, left, self._unit)}'


class Pace:
  """How fast steps come, and how long those that are left will take.

  What is between two stretches of steps does not count, nor does the first step
  of a stretch, which may have been compiled for.
  """

  def __init__(self, max_steps):
    self._max_steps, self._since, self._rate = max_steps, None, None

  def begin(self):
    """Notes that a stretch begins."""
    self._since = None

  def seen(self, step):
    """Notes that a step is done, if it is the first one of its stretch."""
    if self._since is None:
      self._since = step, time.perf_counter()

  def text(self, step):
    """Returns the text of the rate since the last call, or the one before.

    Empty where there is none yet.
    """
    now = step, time.perf_counter()
    steps, secs = (b - a for a, b in zip(self._since, now, strict=True))
    if steps and secs:
      self._rate, self._since = steps / secs, now
    if not self._rate:
      return ''
    return rate_text(self._rate, self._max_steps - step, 'steps')


def rate_text(rate, left, unit):
  """Returns the text of a rate above 0, and of the time that it leaves.

  Args:
    rate: Units a second.
    left: Units that are left.
    unit: Their name.
  """
  number = f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'
  secs = tqdm.tqdm.format_interval(left / rate)
  return f'{number} {unit}/s, {secs} left'
