"""One trainer a folder, and one refresher: a lock that ends with its process.

On one machine the kernel holds it, so that no crash leaves it behind. Machines
that share a folder, or a `--remote_dir`, may not share the kernel's locks:
there the holder gives a sign of life every few seconds, and without one for a
minute it counts as dead.
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


def take(workdir):
  """Returns the trainer's `Lock` of a folder, which process 0 has for all."""
  return Lock(workdir) if distributed.is_first() else _Others()


class _Others:
  """What the other processes have instead."""

  def check(self):
    """Does nothing."""

  def close(self):
    """Does nothing."""


class Lock:
  """The lock of a folder, held until `close`."""

  def __init__(self, workdir, name=LOCK_FILE):
    """Takes the lock.

    Args:
      workdir: The folder.
      name: `LOCK_FILE`, or `REFRESH_LOCK_FILE`, for one that only refreshes.

    Raises:
      BadInput: Another process holds it; the text names its host and id.
    """
    self._path = pathlib.Path(workdir) / name
    self._holder = json.dumps(
      {
        'host': socket.gethostname(),
        'process': os.getpid(),
        'kernel': _kernel(),
      }
    ).encode()
    with atomic.named(self._path):
      self._descriptor = _take(self._path, self._holder)
    try:
      self._there = _There(self._path, json.loads(self._holder))
    except BaseException:
      self._path.unlink()
      os.close(self._descriptor)
      raise
    self._released, self._lost = threading.Event(), False
    self._beating = threading.Thread(target=self._beat, daemon=True)
    self._beating.start()

  def check(self):
    """Raises `BadInput` if another process took the folder over.

    It can, where this one gave no sign of life for a minute: a machine that
    slept, or was moved.
    """
    if self._lost:
      raise errors.BadInput(
        f'a folder must have one {_HOLDERS[self._path.name]}; found that '
        f"{self._path} is another process's now; leave the folder to it."
      )

  def close(self):
    """Lets go of the folder; no file is left."""
    self._released.set()
    self._beating.join()
    try:
      if self._is_ours():
        self._path.unlink()
      self._there.close()
    finally:
      os.close(self._descriptor)

  def _beat(self):
    """Gives signs of life until the end, or until the lock is lost."""
    while not self._released.wait(_BEAT_SECS) and not self._lost:
      # One that fails, on a disk that fails for a moment, is made up for by
      # the next.
      with contextlib.suppress(Exception):
        os.utime(self._descriptor)
        self._lost = not (self._is_ours() and self._there.beat())

  def _is_ours(self):
    try:
      return self._path.read_bytes() == self._holder
    except FileNotFoundError:
      return False


class _There:
  """The same for all machines that share a `--remote_dir`, if there is one.

  A bucket has no clock that all could read, so whether another holder lives is
  seen by watching it for as long as it may be silent.
  """

  def __init__(self, path, holder):
    self._path, self._holder, self._beats = path, holder, 0
    if not remote.is_connected(path.parent):
      return
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
    # Of two that begin together, the one that wrote last has it.
    time.sleep(_SETTLE_SECS)
    if not self._is_ours():
      raise self._held(remote.read(path) or b'{}')

  def beat(self):
    """Gives a sign of life; returns whether the lock is still held."""
    if not remote.is_connected(self._path.parent):
      return True
    if not self._is_ours():
      return False
    self._write()
    return True

  def close(self):
    """Lets go of it."""
    if remote.is_connected(self._path.parent) and self._is_ours():
      remote.unlink(self._path)

  def _write(self):
    self._beats += 1
    value = {**self._holder, 'beats': self._beats}
    remote.write(self._path, json.dumps(value).encode())

  def _is_ours(self):
    return _holder_of(remote.read(self._path)) == self._holder

  def _is_dead(self, found):
    """Returns whether it is known that the holder is no more: it was here."""
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
    return errors.BadInput(
      f'a --remote_dir must have one {_HOLDERS[self._path.name]}; found '
      f'process {holder.get("process")} on {holder.get("host")}; stop it first.'
    )


def _holder_of(content):
  """Returns who wrote a lock there, without the count of signs of life."""
  try:
    holder = json.loads(content or b'{}')
    return {key: holder[key] for key in ('host', 'process', 'kernel')}
  except (ValueError, TypeError, KeyError):
    return {}


def _take(path, holder):
  """Returns a descriptor of the file, locked, and with `holder` in it."""
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      locked = atomic.lock(descriptor)
      _check_holder(path, descriptor, locked)
      # Who held it may have removed the file since it was opened here.
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
  """Raises `BadInput` if the process that the file names may live."""
  try:
    holder = json.loads(os.pread(descriptor, 4096, 0))
    host, process = holder['host'], holder['process']
    elsewhere = holder['kernel'] != _kernel()
  except (ValueError, TypeError, KeyError):  # New, or torn by a crash.
    host, process, elsewhere = 'this host', 'unknown', False
  age = _age_secs(path, descriptor)
  if not locked or (elsewhere and age < _DEAD_SECS):
    cure = 'stop it first'
    if locked:
      cure += f', or, if it is dead, wait until {_DEAD_SECS} s have passed'
    raise errors.BadInput(
      f'a folder must have one {_HOLDERS[path.name]}; found process {process} '
      f'on {host} in {path.parent}, with its last sign of life {age:.0f} s '
      f'ago; {cure}.'
    )


def _age_secs(path, descriptor):
  """Returns the seconds since the last sign of life, by the folder's clock."""
  with tempfile.TemporaryFile(dir=path.parent) as now:
    return os.fstat(now.fileno()).st_mtime - os.fstat(descriptor).st_mtime


def _kernel():
  """Returns what tells this start of this machine from all others."""
  if _BOOT_ID.exists():
    return _BOOT_ID.read_text().strip()
  return socket.gethostname()
