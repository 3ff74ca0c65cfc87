"""Log lines, progress bars, stop signals, `metrics.jsonl` and TensorBoard.

Progress bars are for terminals. Elsewhere, as in the log of a batch system, a
long phase prints a line now and then, and training prints one every
`--steps_per_log` steps.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from concurrent import futures
import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any

import tqdm

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import distributed
from ance_jax.core import pace
from ance_jax.core import strict_io

METRICS_FILE = 'metrics.jsonl'
# Whether the process was asked to stop. Global, because signals go to the whole
# process. Every long phase runs under `progress`, which checks it.
_stop = threading.Event()
_of_thread = threading.local()
# Whether `--noprogress_bars` was given; also per process.
_no_bars = threading.Event()
# Number of items that `ahead` prefetches.
_AHEAD = 2


def log(text: str) -> None:
  """Prints a line in process 0, above any progress bars.

  The line is written whole and flushed, because a pipe could hold it back for
  minutes.
  """
  if distributed.is_first():
    with tqdm.tqdm.external_write_mode(sys.stdout):
      sys.stdout.write(f'{text}\n')
      sys.stdout.flush()


def use_bars(wanted: bool) -> None:
  """Sets whether this process shows progress bars on a terminal."""
  (_no_bars.clear if wanted else _no_bars.set)()


def has_bars() -> bool:
  """Returns whether progress is shown as bars rather than lines."""
  env = os.environ.get('TQDM_DISABLE', '').lower()
  off = _no_bars.is_set() or env not in ('', '0', 'false')
  return not off and sys.stderr.isatty()


def progress(
  items: Iterable,
  what: str,
  *,
  total: int,
  unit: str = 'it',
  count: Callable[[Any], int] = lambda item: 1,
  done: int = 0,
  stops: bool = True,
  lines: bool = True,
) -> Iterator:
  """Yields from `items` and shows progress, rate and time left.

  Args:
    items: Items to iterate over.
    what: Name of the phase.
    total: Number of units in all.
    unit: Name of the units.
    count: Number of units in an item.
    done: Units that an earlier process has finished.
    stops: Whether a stop signal ends the iteration after the current item;
      otherwise the caller checks for one.
    lines: Whether to print lines if there is no bar; otherwise the caller
      prints its own.

  Raises:
    Stopped: A stop signal came.
  """
  if has_bars():
    shown = tqdm.tqdm(
      desc=what,
      total=total,
      initial=done,
      unit=f' {unit}',
      leave=False,
      mininterval=0.5,
      disable=not distributed.is_first(),
    )
  else:
    shown = pace.Lines(
      log if lines and distributed.is_first() else None, what, total, unit, done
    )
  with shown:
    for item in items:
      if stops and stop_requested():
        raise errors.Stopped(what)
      yield item
      shown.update(count(item))


def working(what: str) -> pace.Lines:
  """Returns a context that prints lines if it takes long and bars are off.

  For work that cannot be split into items. With `has_bars`, that work may show
  its own bar.
  """
  is_silent = has_bars() or not distributed.is_first()
  return pace.Lines(None if is_silent else log, what)


def ahead(make: Callable[[Any], Any], items: Iterable) -> Iterator:
  """Yields make(item) for each item in order, prefetched on a thread."""
  with futures.ThreadPoolExecutor(1) as pool:
    waiting = collections.deque()
    for item in items:
      waiting.append(pool.submit(make, item))
      if len(waiting) > _AHEAD:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def stop_requested() -> bool:
  """Returns whether SIGTERM or Ctrl-C came, or this thread was stopped."""
  event = getattr(_of_thread, 'stop', None)
  return _stop.is_set() or bool(event and event.is_set())


@contextlib.contextmanager
def stopped_by(event: threading.Event) -> Iterator[None]:
  """Makes this thread stop its work in the block once an event is set."""
  _of_thread.stop = event
  try:
    yield
  finally:
    del _of_thread.stop


def interrupt() -> None:
  """Raises KeyboardInterrupt."""
  raise KeyboardInterrupt


@contextlib.contextmanager
def stop_signals(leave: Callable[[], Any] = interrupt) -> Iterator[None]:
  """Turns SIGTERM and Ctrl-C into a request to stop, for a block.

  Only works in the main thread; does nothing in others.

  Args:
    leave: Called on a second Ctrl-C.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def request(number, _):
    if number == signal.SIGINT and _stop.is_set():
      leave()
    _stop.set()

  before = {
    number: signal.signal(number, request)
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    _stop.clear()


class Stopwatch:
  """Seconds spent and floating-point operations done per named phase."""

  def __init__(self):
    self.secs, self.flops = collections.Counter(), collections.Counter()

  def add_flops(self, name: str, flops: float) -> None:
    """Adds floating-point operations to phase `name`."""
    self.flops[name] += flops

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Adds the seconds spent in the block to phase `name`."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self.secs[name] += time.perf_counter() - start


class Metrics:
  """Writes `metrics.jsonl` and TensorBoard files, each (step, name) once.

  Only process 0 of the training job writes them.
  """

  def __init__(
    self, workdir: str | os.PathLike, *, history: bytes = b'', step: int = 0
  ):
    """Starts from the lines `history` of the checkpoint of `step`."""
    self._path, self._file = pathlib.Path(workdir) / METRICS_FILE, None
    if not distributed.is_first():
      return
    atomic.write_bytes(self._path, history)
    board = os.path.join(workdir, 'tensorboard')
    atomic.make_folder(board)
    self._file = open(self._path, 'ab')
    try:
      self._board = _Board(board, step)
    except BaseException:
      self._file.close()
      raise

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Writes {name: number} as one line of `step`."""
    if not self._file:
      return
    values = {name: float(value) for name, value in values.items()}
    with atomic.named(self._path):
      self._file.write(json.dumps({'step': step, **values}).encode() + b'\n')
      self._file.flush()
    self._board.write(step, values)

  def history(self) -> bytes:
    """Returns all lines so far, for a checkpoint."""
    return self._path.read_bytes()

  def close(self) -> None:
    """Syncs and closes the files."""
    if not self._file:
      return
    try:
      os.fsync(self._file.fileno())
    finally:
      self._file.close()
      self._board.close()


class _Board:
  """TensorBoard files."""

  def __init__(self, folder, step):
    # Imported here because it imports torch, if installed, which takes a
    # second.
    from tensorboardX import event_file_writer
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2

    self._scalar, self._event = summary.scalar, event_pb2.Event
    # Not SummaryWriter, which hangs once its thread has hit a full disk.
    self._writer = event_file_writer.EventsWriter(f'{folder}/events')
    # Tells TensorBoard to hide points of earlier files from this step on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._writer.write_event(self._event(step=step + 1, session_log=start))

  def write(self, step, values):
    """Writes {name: float}."""
    now = time.time()
    for name, value in values.items():
      self._writer.write_event(
        self._event(wall_time=now, step=step, summary=self._scalar(name, value))
      )
    self._writer.flush()

  def close(self):
    """Closes the file."""
    self._writer.close()


def read(workdir: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the lines of `metrics.jsonl`, without a truncated last one.

  Raises:
    BadInput: A line is not a JSON object of numbers with a step.
  """
  path = pathlib.Path(workdir) / METRICS_FILE
  if not os.path.lexists(path):
    return []
  whole = strict_io.regular(path).read_bytes().count(b'\n')
  found = []
  for number, text in strict_io.lines(path):
    if number > whole:
      break  # The process was killed while writing it.
    line = strict_io.json_value(text, path, number)
    fact = None
    if not isinstance(line, dict) or type(line.get('step')) is not int:
      fact = "not a JSON object with a whole number 'step'"
    elif not all(type(value) in (int, float) for value in line.values()):
      fact = 'a metric is not a number'
    if fact:
      raise strict_io.refusal(
        path,
        f'{fact}: {strict_io.quoted(text)}',
        'remove it, or train on: that gives back what the checkpoint holds',
        number,
      )
    found.append(line)
  return found


def dev_measures(workdir: str | os.PathLike) -> list[str]:
  """Returns the names of a run's dev metrics, in protocol order."""
  found = (
    [name for name in line if name.startswith('dev/')] for line in read(workdir)
  )
  return next(filter(None, found), [])


def series(workdir: str | os.PathLike, name: str) -> dict[int, float]:
  """Returns {step: value} of a metric."""
  return {line['step']: line[name] for line in read(workdir) if name in line}
