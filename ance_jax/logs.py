"""What a run says: lines, progress bars, `metrics.jsonl`, TensorBoard files."""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import threading
import time

import tensorboardX
import tqdm

from ance_jax import handoff

# A signal reaches the whole process, so this is the process's state: whether it
# was asked to stop. Every long phase runs under `progress`, which looks at it.
_stop = threading.Event()


class Stopped(Exception):
  """The process was asked to stop, in the middle of a phase."""


def say(text):
  """Prints one line, above a progress bar if there is one."""
  tqdm.tqdm.write(text)


def progress(items, what, *, total, unit='it', count=lambda item: 1, done=0):
  """Yields from `items` under a bar with rate and remaining time.

  Args:
    items: What to go through; a stop signal ends it after the present one.
    what: Name of the phase.
    total: Number of units in all.
    unit: What is counted.
    count: Number of units in an item.
    done: Units that were done before, by an earlier process.

  Raises:
    Stopped: A stop signal came.
  """
  bar = tqdm.tqdm(
    desc=what,
    total=total,
    initial=done,
    unit=f' {unit}',
    leave=False,
    mininterval=0.5,
  )
  with bar:
    for item in items:
      if _stop.is_set():
        raise Stopped(what)
      yield item
      bar.update(count(item))


def stop_requested():
  """Returns whether SIGTERM or Ctrl-C came."""
  return _stop.is_set()


@contextlib.contextmanager
def stop_signals():
  """Turns SIGTERM and Ctrl-C into a request; a second Ctrl-C interrupts.

  Only the main thread of a process can do so; elsewhere this does nothing.
  """
  _stop.clear()
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def request(number, _):
    if number == signal.SIGINT and _stop.is_set():
      raise KeyboardInterrupt
    _stop.set()

  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.signal(number, request) for number in numbers}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


class Stopwatch:
  """Seconds that each named phase took."""

  def __init__(self):
    self.secs = {}

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

  A restart goes on from `step`: what was written beyond it is cut, and of that
  at it what comes after the checkpoint (the refresh and the evaluation).
  """

  def __init__(self, workdir, *, step):
    self._path = pathlib.Path(workdir) / 'metrics.jsonl'
    with _locked(workdir):
      lines = read(workdir)
      kept = [line for line in lines if line['step'] < step]
      for line in lines:
        if line['step'] == step:
          kept.append({k: v for k, v in line.items() if _made_before_save(k)})
      _write(self._path, [line for line in kept if len(line) > 1])
    self._board = tensorboardX.SummaryWriter(
      os.path.join(workdir, 'tensorboard'), purge_step=step + 1
    )

  def write(self, step, values):
    """Writes a dict of name to float as one line of `step`."""
    values = {name: float(value) for name, value in values.items()}
    # Opened each time: `replace` in another process makes a new file.
    with _locked(self._path.parent), open(self._path, 'a') as file:
      file.write(json.dumps({'step': step, **values}) + '\n')
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def close(self):
    """Syncs and closes the files."""
    with open(self._path) as file:
      os.fsync(file.fileno())
    self._board.close()


def read(workdir):
  """Returns the lines of `metrics.jsonl` as dicts; a torn last one is left."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  lines = path.read_text().split('\n')[:-1] if path.exists() else []
  return [json.loads(line) for line in lines]


def series(workdir, name):
  """Returns {step: value} of one metric."""
  return {line['step']: line[name] for line in read(workdir) if name in line}


def replace(workdir, step, values):
  """Writes metrics of `step` in place of those of the same names.

  A process that trains in the same folder may write at the same time.
  """
  with _locked(workdir):
    lines = read(workdir)
    for line in lines:
      if line['step'] == step:
        for name in values:
          line.pop(name, None)
    lines.append({'step': step, **{k: float(v) for k, v in values.items()}})
    path = pathlib.Path(workdir) / 'metrics.jsonl'
    _write(path, [line for line in lines if len(line) > 1])


@contextlib.contextmanager
def _locked(workdir):
  """Lets one process at a time write `metrics.jsonl` of a folder."""
  descriptor = os.open(workdir, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)  # Which unlocks it.


def _made_before_save(name):
  after = name.startswith(('dev/', 'refresh/', 'time/'))
  return not after or name == 'time/train_secs'


def _write(path, lines):
  handoff.write_text(path, ''.join(json.dumps(line) + '\n' for line in lines))
