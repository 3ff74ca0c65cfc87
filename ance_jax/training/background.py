"""Refreshes in the background: `--refresh_mode=async` and `external`.

The trainer and the refresher share only a folder. The trainer commits
checkpoints, the refresher publishes refreshes, and both appear atomically. The
refresher is a thread of the trainer's process or a separate process, which may
be killed and restarted at any time; both run the same code.
"""

from concurrent import futures
import contextlib
import threading
import time

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import locks
from ance_jax.core import logs
from ance_jax.core import remote
from ance_jax.training import experiment
from ance_jax.training import refreshes
from ance_jax.training import schedule

_CLAIM_FILE = 'refreshing.json'
# Seconds between polls of the folder.
LOOK_SECS = 0.5


class RefreshPoller:
  """Finds refreshes that this process's thread or another process published."""

  def __init__(
    self, run: experiment.Experiment, thread: 'RefreshThread | None' = None
  ):
    """Creates the poller.

    Args:
      run: The trainer's run.
      thread: Refresher of this process, if any.
    """
    self._run, self._thread = run, thread
    self._refused, self._looked, self._found = set(), -LOOK_SECS, None
    # Copies in a thread, so that training never waits for the network.
    self._pool, self._copying = futures.ThreadPoolExecutor(1), None

  def newest(
    self, active: schedule.ActiveRefresh | None, step: int
  ) -> int | None:
    """Returns the step of the refresh to pick up after `step` steps, if any.

    Raises:
      Exception: The error that ended this process's refresh thread.
    """
    if self._thread:
      self._thread.check()
    now = time.monotonic()
    if now - self._looked >= LOOK_SECS:
      self._copy_in(active)
      self._looked, self._found = now, self._look(active, step)
    if active and self._found and self._found <= active.refresh:
      self._found = None
    return self._found

  def wait(
    self, active: schedule.ActiveRefresh | None, step: int, oldest: int
  ) -> int:
    """Waits until `newest` returns a refresh of step `oldest` or later.

    Raises:
      errors.Stopped: The process received a stop signal.
    """
    logs.log(
      f'training waits at step {step} for a refresh of step {oldest} or later'
    )
    while True:
      found = distributed.broadcast(lambda: self.newest(active, step))
      if found is not None and found >= oldest:
        return found
      if logs.stop_requested():
        raise errors.Stopped(f'waiting for a refresh at step {step}')
      time.sleep(LOOK_SECS)

  def close(self) -> None:
    """Waits for the current copy."""
    self._pool.shutdown()

  def _copy_in(self, active):
    """Starts to copy newer refreshes in, unless a copy is in progress."""
    here = not remote.is_connected(self._run.workdir)
    if here or (self._copying and not self._copying.done()):
      return
    after = active.refresh if active else -1
    self._copying = self._pool.submit(_copy_in, self._run, after)

  def _look(self, active, step):
    for number in reversed(refreshes.published(self._run)):
      if active and number <= active.refresh:
        break
      if number <= step and self._is_ours(number):
        return number
    return None

  def _is_ours(self, number):
    folder = refreshes.folder(self._run, number)
    seen = number, folder.stat().st_ino if folder.is_dir() else None
    if seen in self._refused:
      return False
    manifest = atomic.find_valid(folder, {})
    if manifest is None:
      return False
    wrong = refreshes.refusal(self._run, manifest)
    if wrong:
      self._refused.add(seen)
      logs.log(f'{folder} is not picked up: {wrong}')
    return not wrong


def _copy_in(run, after):
  """Copies refreshes of another machine in; logs errors instead of raising."""
  try:
    refreshes.fetch(run, after)
  except Exception as error:  # Each bucket library has its own errors.
    logs.log(f'nothing can be read of {run.config.remote_dir} now: {error}')


class RefreshThread:
  """Refreshes in a thread of the trainer's process."""

  def __init__(self, run: experiment.Experiment):
    """Starts the thread.

    Args:
      run: The run, on the devices that refresh.
    """
    self._lock = locks.Lock(run.config.workdir, locks.REFRESH_LOCK_FILE)
    self._enough = threading.Event()
    self._pool = futures.ThreadPoolExecutor(1)
    self._watching = self._pool.submit(self._watch, run)

  def _watch(self, run):
    with logs.stopped_by(self._enough):
      watch(run)

  def check(self) -> None:
    """Raises the thread's error if it has failed."""
    if self._watching.done():
      self._watching.result()

  def close(self) -> None:
    """Stops the current refresh and waits for the thread to end."""
    self._enough.set()
    self._pool.shutdown()
    self._lock.close()
    with contextlib.suppress(errors.Stopped):
      self._watching.result()


def open_poller(
  stack: contextlib.ExitStack, run: experiment.Experiment
) -> RefreshPoller | None:
  """Returns the poller of a run; None if there are no background refreshes.

  With `--refresh_mode=async` this also starts the refresh thread. `stack`
  closes both.
  """
  config, thread = run.config, None
  if config.refresh_replay or config.refresh_mode not in ('async', 'external'):
    return None
  if not schedule.num_refreshes(config):
    return None
  if config.refresh_mode == 'async':
    others = devices_lib.training_devices(config)[1]
    there = run.on_devices(others) if others else run
    thread = RefreshThread(there)
    stack.enter_context(contextlib.closing(thread))
  poller = RefreshPoller(run, thread)
  return stack.enter_context(contextlib.closing(poller))


def watch(run: experiment.Experiment) -> None:
  """Refreshes with the newest checkpoint, repeatedly, until training ends.

  Args:
    run: The run, on the devices that refresh.

  Raises:
    errors.Stopped: The process received a stop signal.
  """
  config, looked_at = run.config, -1
  refreshes.fetch(run, -1)

  def is_wanted(step):
    return step == config.max_steps or schedule.refresh_due(config, step)

  while True:
    checkpoint.fetch(config.workdir, wanted=is_wanted)
    committed = checkpoint.committed_steps(config.workdir)
    if config.max_steps in committed:
      return
    # Newer refreshes are from a run that has lost its latest checkpoints.
    made = [
      n for n in refreshes.published(run) if n <= max(committed, default=0)
    ]
    last = made[-1] if made else None
    step = _next(run, committed, last, looked_at)
    if step is None:
      if logs.stop_requested():
        raise errors.Stopped('waiting for a checkpoint')
      time.sleep(LOOK_SECS)
      continue
    if _refresh(run, step, last):
      looked_at = step


def claimed(workdir: str) -> int | None:
  """Returns the step of the checkpoint that a refresher is reading, if any."""
  try:
    remote.pull_file(f'{workdir}/{_CLAIM_FILE}')
    return atomic.read_json(f'{workdir}/{_CLAIM_FILE}')['step']
  except errors.Damaged:
    return None


def _next(run, committed, last, looked_at):
  """Returns the step to refresh with, or None; logs the refreshes it skips.

  Steps up to `looked_at` were refreshed or left out by this process.

  A refresh that was started earlier comes first. Otherwise a refresher that is
  killed before each refresh ends would never finish one.
  """
  config = run.config
  past = max(-1 if last is None else last, looked_at)
  due = [n for n in committed if n > past and schedule.refresh_due(config, n)]
  if not due:
    return None
  begun = claimed(config.workdir)
  step = begun if begun in due else due[-1]
  if left_out := schedule.refreshes_between(config, past, step):
    logs.log(
      f'refreshes of step {", ".join(map(str, left_out))} are left out: the '
      f'checkpoint of step {step} is newer'
    )
  return step


def _refresh(run, step, last):
  """Makes one refresh; returns False if its checkpoint was deleted first."""
  workdir = run.config.workdir
  # The trainer keeps this checkpoint from now on, unless it is deleting it.
  atomic.write_json(f'{workdir}/{_CLAIM_FILE}', {'step': step})
  remote.push(f'{workdir}/{_CLAIM_FILE}')
  try:
    made = refreshes.refresh(run, step, before=last)
  except (OSError, ValueError):
    if step in checkpoint.committed_steps(workdir):
      raise
    logs.log(f'the checkpoint of step {step} is gone: a newer one is taken')
    return False
  logs.log(refreshes.summary(made))
  refreshes.prune_embeddings(run, made)
  return True
