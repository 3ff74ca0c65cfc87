"""What a run says: lines, progress bars, `metrics.jsonl`, TensorBoard files.

Bars are for a terminal. Elsewhere, as in the log of a batch system, a phase
that takes long prints a line now and then, and training one every
`--steps_per_log` steps.
"""

import collections
from concurrent import futures
import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
import time

import tqdm

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import distributed
from ance_jax.core import pace
from ance_jax.core import strict_io

METRICS_FILE = 'metrics.jsonl'
# A signal reaches the whole process, so this is the process's state: whether it
# was asked to stop. Every long phase runs under `progress`, which looks at it.
_stop = threading.Event()
_of_thread = threading.local()
# Also the process's: whether `--noprogress_bars` was given.
_no_bars = threading.Event()
# Items that `ahead` makes before they are asked for.
_AHEAD = 2


def say(text):
  """Prints one line at once, above the bars if there are any; process 0 does.

  It is written whole, and flushed: a pipe would keep it back for minutes.
  """
  if distributed.is_first():
    with tqdm.tqdm.external_write_mode(sys.stdout):
      sys.stdout.write(f'{text}\n')
      sys.stdout.flush()


def use_bars(wanted):
  """Sets whether this process shows bars where it has a terminal."""
  (_no_bars.clear if wanted else _no_bars.set)()


def has_bars():
  """Returns whether progress is shown as bars; else it is printed as lines."""
  env = os.environ.get('TQDM_DISABLE', '').lower()
  off = _no_bars.is_set() or env not in ('', '0', 'false')
  return not off and sys.stderr.isatty()


def progress(
  items,
  what,
  *,
  total,
  unit='it',
  count=lambda item: 1,
  done=0,
  stops=True,
  lines=True,
):
  """Yields from `items` and shows how far it is, with rate and time left.

  Args:
    items: What to go through; a stop signal ends it after the present one.
    what: Name of the phase.
    total: Number of units in all.
    unit: What is counted.
    count: Number of units in an item.
    done: Units that were done before, by an earlier process.
    stops: Whether a stop signal ends it; else the caller looks for one.
    lines: Whether lines are printed where there is no bar; else the caller
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
    print_line = say if lines and distributed.is_first() else None
    shown = pace.Lines(print_line, what, total, unit, done)
  with shown:
    for item in items:
      if stops and stop_requested():
        raise errors.Stopped(what)
      yield item
      shown.update(count(item))


def working(what):
  """Returns a context that prints lines if it takes long and bars are off.

  Around what cannot be gone through item by item, and may have a bar of its
  own where `has_bars` says so.
  """
  is_silent = has_bars() or not distributed.is_first()
  return pace.Lines(None if is_silent else say, what)


def ahead(make, items):
  """Yields make(item) for each item in order, made ahead on a thread."""
  with futures.ThreadPoolExecutor(1) as pool:
    waiting = collections.deque()
    for item in items:
      waiting.append(pool.submit(make, item))
      if len(waiting) > _AHEAD:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def stop_requested():
  """Returns whether SIGTERM or Ctrl-C came, or this thread has to stop."""
  event = getattr(_of_thread, 'stop', None)
  return _stop.is_set() or bool(event and event.is_set())


@contextlib.contextmanager
def stopped_by(event):
  """Stops what this thread does in the block once an event is set."""
  _of_thread.stop = event
  try:
    yield
  finally:
    del _of_thread.stop


def interrupt():
  """Raises KeyboardInterrupt."""
  raise KeyboardInterrupt


@contextlib.contextmanager
def stop_signals(leave=interrupt):
  """Turns SIGTERM and Ctrl-C into a request to stop, for a block.

  Only the main thread of a process can do so; elsewhere this does nothing.

  Args:
    leave: What is called at a second Ctrl-C.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def request(number, _):
    if number == signal.SIGINT and _stop.is_set():
      leave()
    _stop.set()

  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.signal(number, request) for number in numbers}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    _stop.clear()


class Stopwatch:
  """Seconds that each named phase took, and operations that are its work."""

  def __init__(self):
    self.secs, self.flops = {}, {}

  def work(self, name, flops):
    """Adds operations to those of `name`."""
    self.flops[name] = self.flops.get(name, 0) + flops

  @contextlib.contextmanager
  def phase(self, name):
    """Adds the seconds of the block to those of `name`."""
    start = time.perf_counter()
    try:
      yield
    finally:
      spent = time.perf_counter() - start
      self.secs[name] = self.secs.get(name, 0.0) + spent


class Metrics:
  """`metrics.jsonl` and TensorBoard files of a run, each (step, name) once.

  Only the process that trains writes them; of several, process 0.
  """

  def __init__(self, workdir, *, history=b'', step=0):
    """Begins with the lines `history`, those of the checkpoint of `step`."""
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

  def write(self, step, values):
    """Writes a dict of name to float as one line of `step`."""
    if not self._file:
      return
    values = {name: float(value) for name, value in values.items()}
    with atomic.named(self._path):
      self._file.write(json.dumps({'step': step, **values}).encode() + b'\n')
      self._file.flush()
    self._board.write(step, values)

  def history(self):
    """Returns all lines up to now, for a checkpoint."""
    return self._path.read_bytes()

  def close(self):
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
    # It imports torch where that is installed, which takes a second.
    from tensorboardX import event_file_writer
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2

    self._scalar, self._event = summary.scalar, event_pb2.Event
    # Not its SummaryWriter: that one hangs once its thread met a full disk.
    self._writer = event_file_writer.EventsWriter(f'{folder}/events')
    # TensorBoard hides what earlier files hold from this step on.
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._writer.write_event(self._event(step=step + 1, session_log=start))

  def write(self, step, values):
    """Writes a dict of name to float."""
    now = time.time()
    for name, value in values.items():
      scalar = self._scalar(name, value)
      self._writer.write_event(
        self._event(wall_time=now, step=step, summary=scalar)
      )
    self._writer.flush()

  def close(self):
    """Closes the file."""
    self._writer.close()


def read(workdir):
  """Returns the lines of `metrics.jsonl` as dicts; a torn last one is left.

  Raises:
    BadInput: A line is no JSON object of numbers with a step.
  """
  path = pathlib.Path(workdir) / METRICS_FILE
  if not os.path.lexists(path):
    return []
  whole = strict_io.regular(path).read_bytes().count(b'\n')
  found = []
  for number, text in strict_io.lines(path):
    if number > whole:
      break  # A kill cut it.
    line = strict_io.json_value(text, path, number)
    rule = None
    if not isinstance(line, dict) or type(line.get('step')) is not int:
      rule = "a line must be a JSON object with a whole number 'step'"
    elif not all(type(value) in (int, float) for value in line.values()):
      rule = 'a metric must be a number'
    if rule:
      cure = 'remove it, or train on: that gives back what the checkpoint holds'
      raise strict_io.bad(path, rule, strict_io.quoted(text), cure, number)
    found.append(line)
  return found


def dev_measures(workdir):
  """Returns the names of a run's dev metrics, in the order of the protocol."""
  for line in read(workdir):
    if names := [name for name in line if name.startswith('dev/')]:
      return names
  return []


def series(workdir, name):
  """Returns {step: value} of one metric."""
  return {line['step']: line[name] for line in read(workdir) if name in line}
