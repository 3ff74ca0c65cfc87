"""Lets at most one trainer and one refresher use a run folder.

On one machine the kernel holds the lock and releases it when the process exits,
so no crash leaves it behind. Machines that share a folder or a `--remote_dir`
may not share kernel locks, so the holder also writes a heartbeat every few
seconds, and counts as dead after a minute without one.
"""

import contextlib
import json
import os
import pathlib
import socket
import tempfile
import threading
import time

import tqdm

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import distributed
from ance_jax.core import remote

LOCK_FILE = 'lock'
REFRESH_LOCK_FILE = 'refresh.lock'
_HOLDERS = {LOCK_FILE: 'trainer', REFRESH_LOCK_FILE: 'refresher'}
_BEAT_SECS, _DEAD_SECS, _SETTLE_SECS = 10, 60, 2
_BOOT_ID = pathlib.Path('/proc/sys/kernel/random/boot_id')


def take(workdir: str | pathlib.Path) -> 'Lock | _Others':
  """Returns the trainer's `Lock` of a folder; process 0 holds it for all."""
  return Lock(workdir) if distributed.is_first() else _Others()


class _Others:
  """Stands in for the `Lock` in processes other than 0."""

  def check(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


class Lock:
  """The lock of a folder, held until `close`."""

  def __init__(self, workdir: str | pathlib.Path, name: str = LOCK_FILE):
    """Takes the lock.

    Args:
      workdir: The folder.
      name: `LOCK_FILE` to train, `REFRESH_LOCK_FILE` to refresh only.

    Raises:
      BadInput: Another process holds it; the message names its host and id.
    """
    self._path = pathlib.Path(workdir) / name
    holder = {
      'host': socket.gethostname(),
      'process': os.getpid(),
      'kernel': _kernel(),
    }
    self._holder = json.dumps(holder).encode()
    with atomic.named(self._path):
      self._descriptor = _take(self._path, self._holder)
    try:
      connected = remote.is_connected(workdir)
      self._there = _There(self._path, holder) if connected else None
    except BaseException:
      self._path.unlink()
      os.close(self._descriptor)
      raise
    self._released, self._lost = threading.Event(), False
    self._beating = threading.Thread(target=self._beat, daemon=True)
    self._beating.start()

  def check(self) -> None:
    """Raises `BadInput` if another process has taken over the folder.

    That happens when this process sent no heartbeat for a minute, for example
    because its machine slept or was migrated.
    """
    if self._lost:
      raise errors.refusal(
        f"{self._path} is another process's now", 'leave the folder to it'
      )

  def close(self) -> None:
    """Releases the lock and removes its file."""
    self._released.set()
    self._beating.join()
    try:
      if self._is_ours():
        self._path.unlink()
      if self._there:
        self._there.close()
    finally:
      os.close(self._descriptor)

  def _beat(self):
    """Sends heartbeats until the lock is released or lost."""
    while not self._released.wait(_BEAT_SECS) and not self._lost:
      # If the disk fails for a moment, the next heartbeat makes up for it.
      with contextlib.suppress(Exception):
        os.utime(self._descriptor)
        alive = self._is_ours() and (not self._there or self._there.beat())
        self._lost = not alive

  def _is_ours(self):
    try:
      return self._path.read_bytes() == self._holder
    except FileNotFoundError:
      return False


class _There:
  """The same lock in `--remote_dir`, for all machines.

  Machines that share a bucket share no clock, so whether another holder is
  alive is found out by watching for its heartbeat until the deadline.
  """

  def __init__(self, path, holder):
    self._path, self._holder, self._beats = path, holder, 0
    found = remote.read(path)
    if found and not self._is_dead(found):
      tqdm.tqdm.write(
        f'{path.name} of --remote_dir is held: waiting {_DEAD_SECS} s for a '
        'sign of life of its holder'
      )
      time.sleep(_DEAD_SECS)
      if remote.read(path) not in (found, None):
        raise self._held(found)
    self._write()
    # If two start at once, the one that writes last gets the lock.
    time.sleep(_SETTLE_SECS)
    if not self._is_ours():
      raise self._held(remote.read(path) or b'{}')

  def beat(self):
    """Sends a heartbeat; returns whether the lock is still held."""
    if not self._is_ours():
      return False
    self._write()
    return True

  def close(self):
    """Releases the lock."""
    if self._is_ours():
      remote.unlink(self._path)

  def _write(self):
    self._beats += 1
    value = {**self._holder, 'beats': self._beats}
    remote.write(self._path, json.dumps(value).encode())

  def _is_ours(self):
    return _holder_of(remote.read(self._path)) == self._holder

  def _is_dead(self, found):
    """Returns whether the holder ran on this machine and has exited."""
    holder = _holder_of(found)
    if holder.get('kernel') != self._holder['kernel']:
      return False
    try:
      os.kill(holder['process'], 0)
    except ProcessLookupError:
      return True
    except PermissionError:
      pass
    return holder['process'] == os.getpid()

  def _held(self, found):
    holder = _holder_of(found)
    return errors.refusal(
      f'process {holder.get("process")} on {holder.get("host")} is the '
      f'{_HOLDERS[self._path.name]} of --remote_dir',
      'stop it first',
    )


def _holder_of(content):
  """Returns the writer of a lock, without its heartbeat count, or {}."""
  try:
    holder = json.loads(content or b'{}')
    return {key: holder[key] for key in ('host', 'process', 'kernel')}
  except (ValueError, TypeError, KeyError):
    return {}


def _take(path, holder):
  """Returns a locked descriptor of the file, with `holder` written into it."""
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      _check_holder(path, descriptor, locked=atomic.lock(descriptor))
      # The previous holder may have removed the file after the open above.
      if os.path.samestat(os.fstat(descriptor), os.stat(path)):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder, 0)
        return descriptor
    except FileNotFoundError:
      pass
    except BaseException:
      os.close(descriptor)
      raise
    os.close(descriptor)


def _check_holder(path, descriptor, locked):
  """Raises `BadInput` if the process named in the file may be alive."""
  kernel = _kernel()
  # The file has none if it is new, or was truncated by a crash.
  unknown = {'host': 'this host', 'process': 'unknown', 'kernel': kernel}
  holder = _holder_of(os.pread(descriptor, 4096, 0)) or unknown
  age = _age_secs(path, descriptor)
  if not locked or (holder['kernel'] != kernel and age < _DEAD_SECS):
    wait = f', or, if it is dead, wait until {_DEAD_SECS} s have passed'
    raise errors.refusal(
      f'process {holder["process"]} on {holder["host"]} is the '
      f'{_HOLDERS[path.name]} of {path.parent}, with its last sign of life '
      f'{age:.0f} s ago',
      'stop it first' + wait * locked,
    )


def _age_secs(path, descriptor):
  """Returns seconds since the last heartbeat, by the file system's clock."""
  with tempfile.TemporaryFile(dir=path.parent) as now:
    return os.fstat(now.fileno()).st_mtime - os.fstat(descriptor).st_mtime


def _kernel():
  """Returns an id of this boot of this machine."""
  if _BOOT_ID.exists():
    return _BOOT_ID.read_text().strip()
  return socket.gethostname()
