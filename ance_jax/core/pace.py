"""Rate and time left of a phase, as text and as log lines."""

from collections.abc import Callable
import threading
import time

import tqdm

# Seconds from the start of a phase to its first line, and between lines.
_FIRST_SECS, _EVERY_SECS = 3, 20


class Lines:
  """Context that logs the progress of one phase every few seconds.

  A thread prints the lines, because a single item may take minutes. A phase
  that ends before the first line is due prints none.
  """

  def __init__(
    self,
    say: Callable[[str], None] | None,
    what: str,
    total: int = 0,
    unit: str = '',
    done: int = 0,
  ):
    """Initializes the phase.

    Args:
      say: Prints a line; None prints nothing.
      what: Name of the phase.
      total: Number of units in all; 0 if unknown.
      unit: Name of the units.
      done: Units that an earlier process has finished.
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

  def update(self, number: int) -> None:
    """Adds to the number of finished units."""
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
    return f'{text}, {rate_text(rate, max(self._total - done, 0), self._unit)}'


class Pace:
  """Measures the rate of training steps and estimates the time left.

  Time between two stretches of steps does not count, nor does the first step of
  a stretch, which may include compilation.
  """

  def __init__(self, max_steps: int):
    self._max_steps, self._since, self._rate = max_steps, None, None

  def begin(self) -> None:
    """Starts a stretch."""
    self._since = None

  def seen(self, step: int) -> None:
    """Starts the clock if `step` is the first step of its stretch."""
    if self._since is None:
      self._since = step, time.perf_counter()

  def text(self, step: int) -> str:
    """Returns the rate since the last call and the time left, as text.

    If no step was done since, it repeats the previous rate. Empty before the
    first rate.
    """
    now = step, time.perf_counter()
    steps, secs = (b - a for a, b in zip(self._since, now, strict=True))
    if steps and secs:
      self._rate, self._since = steps / secs, now
    if not self._rate:
      return ''
    return rate_text(self._rate, self._max_steps - step, 'steps')


def rate_text(rate: float, left: float, unit: str) -> str:
  """Returns a rate and the time left at that rate, as text.

  Args:
    rate: Units per second, above 0.
    left: Units left.
    unit: Name of the units.
  """
  number = f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'
  return f'{number} {unit}/s, {tqdm.tqdm.format_interval(left / rate)} left'
