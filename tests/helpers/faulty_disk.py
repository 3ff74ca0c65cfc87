"""Simulates a disk that fails at the n-th file operation, and power cuts.

`FaultyDisk` intercepts Python's file operations below one folder. It records
those that change the disk (open for writing, write, fsync, rename, remove, make
or remove a folder), and at the n-th it simulates the end of the process (all
later operations have no effect) or raises an error. It does not see the writes
of Orbax's C++ code.

`after_power_loss` turns the recorded operations into a state in which a power
cut may leave the disk: synced data is complete; unsynced data may be complete,
missing, torn or zeros.
"""

import builtins
import errno
import io
import os
import pathlib
from typing import NamedTuple

import numpy as np
import pytest

# Not recorded: another thread writes it, and no job reads it.
_PASSED_BY = ('tensorboard',)
BEFORE, HALF_WAY, AFTER = 'before', 'half-way', 'after'


class Killed(BaseException):
  """Simulates the end of the process."""


class Operation(NamedTuple):
  """One change of the disk.

  Attributes:
    kind: 'open', 'write', 'fsync', 'rename', 'remove' or 'mkdir'.
    path: Path that it changes, relative to the folder.
    detail: Data of a write, new path of a rename, whether opening truncates the
      file, content of an fsynced file (its writes may not have been seen); else
      None.
  """

  kind: str
  path: str
  detail: object = None


class FaultyDisk:
  """Context manager that records file operations and fails at one of them.

  Attributes:
    operations: `Operation`s done so far.
    failed: `Operation` that raised the error, or None.
  """

  def __init__(self, folder, *, at=None, how=BEFORE, error=None):
    """Prepares the patches; entering the context applies them.

    Args:
      folder: Folder to watch; paths outside it are not affected.
      at: Number of the operation to fail at, from 0; None for never.
      how: Whether to stop before, half-way through (writes only) or after it.
      error: errno to raise once instead of stopping, or None.
    """
    self._folder = os.path.abspath(folder)
    self._at, self._how, self._error = at, how, error
    self._dead = False
    self._patch = pytest.MonkeyPatch()
    self._paths = {}
    self.operations, self.failed = [], None

  def __enter__(self):
    real_open = io.open
    for module in (builtins, io):
      self._patch.setattr(
        module, 'open', lambda *a, **k: self._open(real_open, *a, **k)
      )
    for name, kind in (
      ('unlink', 'remove'),
      ('remove', 'remove'),
      ('rmdir', 'remove'),
      ('mkdir', 'mkdir'),
      ('rename', 'rename'),
      ('replace', 'rename'),
    ):
      self._patch_os(name, kind)
    self._patch_descriptors()
    return self

  def __exit__(self, *_):
    self._patch.undo()

  def _inside(self, path, dir_fd=None):
    """Returns a path relative to the folder, or None if it is outside."""
    if isinstance(path, int):
      return self._paths.get(path)
    path = os.fsdecode(path)
    if dir_fd is not None and not os.path.isabs(path):
      path = os.path.join(os.readlink(f'/proc/self/fd/{dir_fd}'), path)
    path = os.path.abspath(path)
    if path != self._folder and not path.startswith(self._folder + os.sep):
      return None
    inner = os.path.relpath(path, self._folder)
    return None if inner.split(os.sep)[0] in _PASSED_BY else inner

  def _do(self, kind, path, action, detail=None, half=None):
    """Executes and records one operation, or fails if its turn has come."""
    if self._dead:
      raise Killed
    if not counts(kind, path):
      return action()
    here = len(self.operations) == self._at
    if here and self._error:
      self._at, self.failed = None, Operation(kind, path, detail)
      raise OSError(self._error, os.strerror(self._error), path)
    if here and self._how == HALF_WAY and half:
      half()
    if here and self._how != AFTER:
      self._dead = True
      raise Killed
    result = action()
    self.operations.append(Operation(kind, path, detail))
    if here:
      self._dead = True
      if kind == 'open' and hasattr(result, 'close'):
        result.close()
      raise Killed
    return result

  def _open(self, real, file, mode='r', *args, **kwargs):
    path = self._inside(file)
    reads = not set(mode) & set('wax+')
    if path is None or reads or 'opener' in kwargs:  # tempfile has an opener.
      return real(file, mode, *args, **kwargs)
    opened = self._do(
      'open', path, lambda: real(file, mode, *args, **kwargs), 'w' in mode
    )
    self._paths[opened.fileno()] = path
    return _File(self, opened, path)

  def _patch_os(self, name, kind):
    real = getattr(os, name)

    def patched(path, *args, **kwargs):
      descriptor = kwargs.get('dir_fd', kwargs.get('src_dir_fd'))
      inner = self._inside(path, descriptor)
      if inner is None:
        return real(path, *args, **kwargs)
      detail = self._inside(args[0]) if kind == 'rename' else None
      return self._do(kind, inner, lambda: real(path, *args, **kwargs), detail)

    self._patch.setattr(os, name, patched)

  def _patch_descriptors(self):
    """Patches the functions of descriptors: open, fsync, pwrite, ftruncate."""
    real_open, real_fsync = os.open, os.fsync
    real_write, real_cut = os.pwrite, os.ftruncate

    def patched_open(path, flags, *args, **kwargs):
      inner = self._inside(path, kwargs.get('dir_fd'))
      temporary = flags & os.O_TMPFILE == os.O_TMPFILE
      if inner is None or temporary or not flags & os.O_CREAT:
        descriptor = real_open(path, flags, *args, **kwargs)
      else:
        descriptor = self._do(
          'open', inner, lambda: real_open(path, flags, *args, **kwargs), False
        )
      self._paths[descriptor] = inner
      return descriptor

    def patched_fsync(descriptor):
      path = os.readlink(f'/proc/self/fd/{descriptor}')
      inner = self._inside(path)
      if inner is None:
        return real_fsync(descriptor)
      content = None
      if os.path.isfile(path):
        content = pathlib.Path(path).read_bytes()
      return self._do('fsync', inner, lambda: real_fsync(descriptor), content)

    def patched_pwrite(descriptor, data, offset):
      inner = self._paths.get(descriptor)
      if inner is None:
        return real_write(descriptor, data, offset)
      return self._do(
        'write',
        inner,
        lambda: real_write(descriptor, data, offset),
        bytes(data),
        lambda: real_write(descriptor, data[: len(data) // 2], offset),
      )

    def patched_ftruncate(descriptor, length):
      inner = self._paths.get(descriptor)
      if inner is None:
        return real_cut(descriptor, length)
      return self._do('open', inner, lambda: real_cut(descriptor, length), True)

    self._patch.setattr(os, 'open', patched_open)
    self._patch.setattr(os, 'fsync', patched_fsync)
    self._patch.setattr(os, 'pwrite', patched_pwrite)
    self._patch.setattr(os, 'ftruncate', patched_ftruncate)


class _File:
  """A file opened for writing, each write of which is one operation."""

  def __init__(self, disk, file, path):
    self._disk, self._file, self._path = disk, file, path

  def write(self, data):
    data = data if isinstance(data, str) else bytes(data)

    def put(part):
      self._file.write(part)
      self._file.flush()

    raw = data.encode() if isinstance(data, str) else data
    self._disk._do(
      'write',
      self._path,
      lambda: put(data),
      raw,
      lambda: put(data[: len(data) // 2]),
    )
    return len(data)

  def __getattr__(self, name):
    return getattr(self._file, name)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()

  def __iter__(self):
    return iter(self._file)


def counts(kind, path):
  """Returns whether to record an operation.

  In checkpoints only those of our code and all fsyncs are recorded, because the
  order of Orbax's threads varies.
  """
  if not path.startswith('checkpoints') or kind == 'fsync':
    return True
  name = path.split('/')[2:3]
  return bool(name) and name[0].startswith(('record', 'manifest.json'))


class _Inode:
  """A file or folder: its synced state and the changes since.

  Those of a folder are (name that goes, name that comes, inode that it gets).
  """

  def __init__(self, synced):
    self.synced, self.since = synced, []


def after_power_loss(operations, folder, random, before=()):
  """Writes files as a power cut may leave them.

  A folder keeps the first few of its unsynced changes. Each unsynced write of a
  file is complete, missing, torn or zeros.

  Args:
    operations: `Operation`s before the power cut.
    folder: Folder to create.
    random: numpy Generator.
    before: Folders that existed, synced, before the first operation.
  """
  root = _Inode({})
  tree = _Tree(root)
  for path in before:
    tree.make_synced(path)
  for operation in operations:
    tree.apply(operation)
  os.makedirs(folder)
  _write_folder(root, pathlib.Path(folder), random)


class _Tree:
  """The inodes by current path."""

  def __init__(self, root):
    self._now = {'.': root}

  def make_synced(self, path):
    self._entry(path, 'mkdir')
    self._sync(os.path.dirname(path) or '.', None)

  def apply(self, operation):
    kind, path, detail = operation
    if kind == 'open':
      if path not in self._now:
        self._entry(path, 'open')
      elif detail:
        self._now[path].since.append(('cut', None))
    elif kind == 'write':
      self._now[path].since.append(('write', detail))
    elif kind == 'mkdir':
      self._entry(path, 'mkdir')
    elif kind == 'fsync':
      self._sync(path, detail)
    elif kind == 'remove':
      self._remove(path)
    else:
      self._rename(path, detail)

  def _entry(self, path, kind):
    if path in self._now:
      return
    parent = os.path.dirname(path) or '.'
    if parent not in self._now:
      self._entry(parent, 'mkdir')
    inode = self._now[path] = _Inode({} if kind == 'mkdir' else b'')
    self._now[parent].since.append((None, os.path.basename(path), inode))

  def _parent(self, path):
    return self._now[os.path.dirname(path) or '.']

  def _sync(self, path, content):
    self._entry(path, 'mkdir' if content is None else 'open')
    inode = self._now[path]
    if content is None:
      inode.synced = dict(_applied(inode, len(inode.since)))
    else:
      inode.synced = content
    inode.since = []

  def _remove(self, path):
    if path in self._now:
      self._parent(path).since.append((os.path.basename(path), None, None))
      self._forget(path)

  def _forget(self, path):
    for other in [
      p for p in self._now if p == path or p.startswith(path + '/')
    ]:
      del self._now[other]

  def _rename(self, path, new):
    if path not in self._now:
      return  # Orbax's C++ code made it.
    inode = self._now[path]
    moved = {
      new + other[len(path) :]: node
      for other, node in self._now.items()
      if other == path or other.startswith(path + '/')
    }
    self._forget(path)
    self._forget(new)
    self._now.update(moved)
    # Our renames stay within one folder, where they are atomic.
    self._parent(new).since.append(
      (os.path.basename(path), os.path.basename(new), inode)
    )


def _applied(inode, number):
  """Returns a folder's entries after the first `number` unsynced changes."""
  entries = dict(inode.synced)
  for old, new, inner in inode.since[:number]:
    entries.pop(old, None)
    if new:
      entries[new] = inner
  return entries.items()


def _write_folder(inode, folder, random):
  number = int(random.integers(len(inode.since) + 1))
  for name, inner in _applied(inode, number):
    if isinstance(inner.synced, bytes):
      (folder / name).write_bytes(_content(inner, random))
    else:
      (folder / name).mkdir()
      _write_folder(inner, folder / name, random)


def _content(inode, random):
  """Returns the content in which a power cut may leave a file."""
  content = inode.synced
  for kind, data in inode.since:
    fate = random.integers(4)
    if kind == 'cut':
      content = b'' if fate else content
    elif fate == 0:
      content += data
    elif fate == 1:
      content += data[: int(random.integers(len(data) + 1))]
    elif fate == 2:
      content += bytes(len(data))
  return content


ERRORS = {
  'ENOSPC': errno.ENOSPC,
  'EIO': errno.EIO,
  'EMFILE': errno.EMFILE,
}


class Extreme:
  """A fake Generator that keeps either unsynced names or unsynced data.

  Names without data result from a rename before the fsync of the file, data
  without names from a folder without fsync.
  """

  def __init__(self, *, names):
    self._names = names

  def integers(self, high):
    return high - 1 if self._names else 0


def seeded(*numbers):
  """Returns a numpy Generator seeded with `numbers`."""
  return np.random.default_rng(numbers)
