"""Runs `ance_jax.main`, and shows in a file what it is doing at each moment.

    python experiments/benchmarks/watched.py BOARD UNITS --flag=value ...

BOARD is mapped into memory, so that it is still true after a SIGKILL; UNITS
gets a line for each training step and corpus block that is begun, and for each
checkpoint that was committed.
"""

import contextlib
import functools
import importlib
import inspect
import math
import os
import sys
import threading
import time

import numpy as np

# The last eight are the phases that a kill is aimed at.
PHASES = (
  'start',
  'between',
  'train',
  'save',
  'encode',
  'search',
  'mine',
  'publish',
  'evaluate',
  'prune',
)
TARGETS = PHASES[2:]
_PHASE, _SAVING, _CHANGES, _COUNTS = 0, 1, 2, 3
_LOGS = _COUNTS + len(PHASES)
_LOG_UNITS = 1e6


class Board:
  """The file: what goes on, and how often and how long each phase was seen."""

  def __init__(self, path, mode='r'):
    """Maps a file; mode 'w+' makes it, 'r+' is for who writes, 'r' reads."""
    shape = (_LOGS + len(PHASES),)
    self._cells = np.memmap(path, np.int64, mode, shape=shape)
    self._stack, self._since = ['start'], time.monotonic_ns()

  def phase(self):
    """Returns the name of what goes on; saving counts beside training."""
    name = PHASES[self._cells[_PHASE]]
    beside = self._cells[_SAVING] and name in ('train', 'between')
    return 'save' if beside else name

  def changes(self):
    """Returns how often the phase changed."""
    return int(self._cells[_CHANGES])

  def count(self, name):
    """Returns how often a phase began, or was come back to."""
    return int(self._cells[_COUNTS + PHASES.index(name)])

  def secs(self, name):
    """Returns the geometric mean of the seconds of a phase at a time.

    The first time, with all that is compiled, does not weigh much in it.
    """
    total = int(self._cells[_LOGS + PHASES.index(name)])
    return math.exp(total / _LOG_UNITS / max(self.count(name), 1)) / 1e9

  @contextlib.contextmanager
  def during(self, name):
    """Shows a phase while the block runs, if it runs on the main thread."""
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    if self._stack == ['start']:
      self._stack = ['between']
    self._stack.append(name)
    self._show()
    try:
      yield
    finally:
      self._stack.pop()
      self._show()

  def _show(self):
    now, number = time.monotonic_ns(), PHASES.index(self._stack[-1])
    if self._cells[_PHASE] != PHASES.index('save'):  # `saving` knows better.
      self._add(self._cells[_PHASE], now - self._since)
    self._cells[_PHASE], self._since = number, now
    self._cells[_COUNTS + number] += 1
    self._cells[_CHANGES] += 1

  def saving(self, nanosecs=None):
    """Shows that a save is under way; with its time, that it ended."""
    self._cells[_SAVING] = nanosecs is None
    self._cells[_CHANGES] += 1
    if nanosecs is not None:
      self._add(PHASES.index('save'), nanosecs)

  def _add(self, number, nanosecs):
    self._cells[_LOGS + number] += int(_LOG_UNITS * math.log(nanosecs))


def wrap(owner, name, wrapper):
  """Replaces a function by what `wrapper(function)` returns."""
  real = getattr(owner, name)
  setattr(owner, name, functools.wraps(real)(wrapper(real)))


def watch(board, units):
  """Wraps the functions of the package that are phases.

  Args:
    board: `Board` to show them on.
    units: File descriptor that units of work are written to.
  """
  from ance_jax.core import atomic
  from ance_jax.core import checkpoint
  from ance_jax.mining import miner
  from ance_jax.retrieval import corpus_index
  from ance_jax.retrieval import index
  from ance_jax.training import trainer

  def shown(name):
    def wrapper(real):
      def call(*args, **kwargs):
        with board.during(name):
          return real(*args, **kwargs)

      return call

    return wrapper

  def publish(real):
    @contextlib.contextmanager
    def call(*args, **kwargs):
      with board.during('publish'), real(*args, **kwargs) as folder:
        yield folder

    return call

  wrap(index, 'search', shown('search'))
  wrap(miner, 'mine_table', shown('mine'))
  wrap(atomic, 'publish', publish)
  wrap(corpus_index, 'evaluate', shown('evaluate'))
  wrap(corpus_index, 'prune_embeddings', shown('prune'))
  wrap(trainer.Trainer, '_prune', shown('prune'))
  wrap(checkpoint.Checkpoints, 'keep', shown('prune'))
  watch_saving(board, units)
  watch_training(board, units)
  watch_encoding(board, units)


def watch_saving(board, units):
  """Shows a save until its thread ends, and then writes 'commit N'."""
  from ance_jax.core import checkpoint

  def save(real):
    def call(*args, **kwargs):
      board.saving()
      with board.during('save'):
        return real(*args, **kwargs)

    return call

  def commit(real):
    def call(*args, **kwargs):
      start = time.monotonic_ns()
      board.saving()
      try:
        result = real(*args, **kwargs)
        step = _argument(real, 'step', args, kwargs)
        os.write(units, f'commit {step}\n'.encode())
        return result
      finally:
        board.saving(time.monotonic_ns() - start)

    return call

  wrap(checkpoint.Checkpoints, 'save', save)
  wrap(checkpoint.Checkpoints, '_commit', commit)


def watch_training(board, units):
  """Shows training, and writes 'step N' when that step is begun."""
  from ance_jax.training import steps
  from ance_jax.training import trainer

  done = 0

  def loop(real):
    def call(*args, **kwargs):
      nonlocal done
      done = args[0].step
      with board.during('train'):
        return real(*args, **kwargs)

    return call

  def make(real):
    def call(*args, **kwargs):
      train_step = real(*args, **kwargs)

      def counted(state, *others):
        nonlocal done
        done += 1
        os.write(units, f'step {done}\n'.encode())
        return train_step(state, *others)

      return counted

    return call

  for name in ('begin_stretch', 'take_step', 'log_steps'):
    wrap(trainer.Trainer, name, loop)
  wrap(steps, 'make_train_step', make)


def watch_encoding(board, units):
  """Shows the encoding of corpus blocks, and writes 'block NAME' for each."""
  from ance_jax.retrieval import encoding

  corpus = None

  def whole(real):
    def call(*args, **kwargs):
      nonlocal corpus
      corpus = _argument(real, 'folder', args, kwargs)
      try:
        return real(*args, **kwargs)
      finally:
        corpus = None

    return call

  def part(real):
    def call(*args, **kwargs):
      if corpus is None:
        return real(*args, **kwargs)
      what = _argument(real, 'what', args, kwargs)
      os.write(units, f'block {corpus} {what}\n'.encode())
      with board.during('encode'):
        return real(*args, **kwargs)

    return call

  wrap(encoding, 'encode_corpus', whole)
  wrap(encoding, 'encode_rows', part)


def _argument(function, name, args, kwargs):
  return inspect.signature(function).bind(*args, **kwargs).arguments[name]


def main(board, units, flags):
  """Runs the command line under watch."""
  # Before torch is hidden: what scipy looks for at its import is not None.
  # And transformers must not have been imported, with torch, before.
  importlib.import_module('scipy.stats')
  sys.modules['torch'] = None  # tensorboardX needs none, and it takes seconds.
  descriptor = os.open(units, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  watch(Board(board, 'r+'), descriptor)
  from ance_jax import main as command_line

  sys.argv = ['main', *flags]
  command_line.run()


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2], sys.argv[3:])
