"""Files and folders that appear whole or not at all.

A folder is written under a temporary name, its files are hashed and synced to
disk, `manifest.json` is written last, and a rename makes it visible. Readers
here treat a folder without a manifest as missing, and check files against the
manifest before reading them.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import time
from typing import Any
from typing import BinaryIO

import numpy as np
import tqdm

from ance_jax import errors
from ance_jax.core import faults

MANIFEST = 'manifest.json'
_UNFINISHED = '.unfinished'
_NEW, _OLD = 'new', 'old'
_LOCK, _IN_USE, _IN_TURN = '.lock', 'in-use.lock', 'in-turn.lock'
_POLL_SECS = 0.2


@contextlib.contextmanager
def writing(path: str | pathlib.Path) -> Iterator[BinaryIO]:
  """Opens a binary file that appears as `path` once it is whole on disk."""
  path = pathlib.Path(path)
  unfinished, _ = _unfinished(path)
  with named(path), open(unfinished, 'wb') as file:
    lock(file.fileno())
    yield file
    file.flush()
    os.fsync(file.fileno())
    os.replace(unfinished, path)
  _sync_path(path.parent)


def write_bytes(path: str | pathlib.Path, content: bytes) -> None:
  """Writes a file atomically."""
  with writing(path) as file:
    file.write(content)


def write_text(path: str | pathlib.Path, text: str) -> None:
  """Writes a text file atomically."""
  write_bytes(path, text.encode())


def make_folder(path: str | pathlib.Path) -> None:
  """Makes a folder and its parents, and syncs them to disk."""
  path = pathlib.Path(path)
  if not path.is_dir():
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync_path(path.parent)


@contextlib.contextmanager
def named(path: str | pathlib.Path) -> Iterator[None]:
  """Adds this path to an OSError from the block that has none.

  Writing to an open file on a full disk raises one without a path.
  """
  try:
    yield
  except OSError as error:
    if error.filename is None:
      error.filename = str(path)
    raise


@contextlib.contextmanager
def publish(
  folder: str | pathlib.Path, manifest: dict[str, Any]
) -> Iterator[pathlib.Path]:
  """Yields a folder to write into, and renames it to `folder` at the end.

  Args:
    folder: Final path; an existing folder there is replaced.
    manifest: Content of `manifest.json`, to which the file hashes are added.
      The block may add to it.

  Yields:
    Path of the folder to write into. If the block raises, nothing is published.
  """
  with _replacing(folder) as unfinished:
    yield unfinished
    commit(unfinished, manifest)


@contextlib.contextmanager
def receive(folder: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a folder to copy a published one into; publishes it if whole.

  Raises:
    Damaged: The copy does not match its manifest.
  """
  with _replacing(folder) as unfinished:
    try:
      yield unfinished
      if read_manifest(unfinished) is None:
        raise _damaged(unfinished / MANIFEST)
    except BaseException:
      # Callers retry, so leave no failed copy behind.
      shutil.rmtree(unfinished)
      _lock_of(unfinished).unlink()
      raise
    # Otherwise a power cut could leave a folder of this name without its files.
    _sync(unfinished)


@contextlib.contextmanager
def _replacing(folder):
  """Yields a folder that replaces `folder` if the block does not raise."""
  folder = pathlib.Path(folder)
  make_folder(folder.parent)
  unfinished, old = _unfinished(folder)
  with named(folder), _opened(_lock_of(unfinished)) as descriptor:
    lock(descriptor)
    unfinished.mkdir()
    yield unfinished
    # One rename each, because a half-removed folder would count as damaged.
    if folder.exists():
      os.rename(folder, old)
    os.rename(unfinished, folder)
    _sync_path(folder.parent)
    _lock_of(unfinished).unlink()
  remove_folder(old)


def commit(folder: str | pathlib.Path, manifest: dict[str, Any]) -> None:
  """Syncs and hashes all files of a folder, and writes its manifest last.

  Args:
    folder: Path of a folder that is no longer written to.
    manifest: Content of `manifest.json`, to which the hashes are added.
  """
  folder = pathlib.Path(folder)
  _sync(folder)
  hashes = {
    str(path.relative_to(folder)): file_hash(path)
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }
  write_json(folder / MANIFEST, {**manifest, 'files': hashes})


def uncommit(folder: str | pathlib.Path) -> None:
  """Removes the manifest of a folder to be removed, so that readers skip it."""
  (pathlib.Path(folder) / MANIFEST).unlink(missing_ok=True)
  _sync_path(folder)


def is_committed(folder: str | pathlib.Path) -> bool:
  """Returns whether a folder has its manifest."""
  return (pathlib.Path(folder) / MANIFEST).is_file()


def read_manifest(
  folder: str | pathlib.Path, only: str = ''
) -> dict[str, Any] | None:
  """Checks the files of a published folder and returns its manifest.

  Args:
    folder: Path of the folder.
    only: Check only files whose relative paths start with this.

  Returns:
    The manifest, or None if no such folder was published.

  Raises:
    Damaged: A file is missing or differs from the published one.
  """
  folder = pathlib.Path(folder)
  if not is_committed(folder):
    return None
  manifest = read_json(folder / MANIFEST)
  files = manifest.get('files')
  if not isinstance(files, dict):
    raise _damaged(folder / MANIFEST)
  for name, expected in files.items():
    path = folder / name
    if name.startswith(only) and (
      not path.is_file() or file_hash(path) != expected
    ):
      raise _damaged(path)
  return manifest


def find_valid(
  folder: str | pathlib.Path, about: dict[str, Any]
) -> dict[str, Any] | None:
  """Returns the manifest of a published folder if it can be used.

  A damaged folder is renamed, with a printed line, so that it can be rebuilt.

  Args:
    folder: Path of the folder.
    about: Items that the manifest must contain.

  Returns:
    The manifest; None if the folder must be built.
  """
  try:
    manifest = read_manifest(folder)
  except errors.Damaged as damaged:
    try:
      aside = set_aside(folder)
    except OSError as error:
      if not faults.is_denied(error):
        raise
      raise errors.Damaged(
        f'{damaged} It cannot be made again there; name a folder of your own.'
      ) from error
    tqdm.tqdm.write(f'{damaged} It is now {aside}, and is made again.')
    return None
  return manifest if manifest and about.items() <= manifest.items() else None


def set_aside(
  path: str | pathlib.Path, aside: str | None = None
) -> pathlib.Path:
  """Renames a damaged file or folder, and returns its new path.

  Args:
    path: The file or folder.
    aside: New path, with a number added if it is taken; None adds `.damaged`
      and a number to `path`.
  """
  path = pathlib.Path(path)
  stem, number = aside or f'{path}.damaged', 1
  free = pathlib.Path(aside or f'{stem}-1')
  while free.exists():
    number += 1
    free = pathlib.Path(f'{stem}-{number}')
  os.rename(path, free)
  _sync_path(free.parent)
  _sync_path(path.parent)
  return free


def load_array(path: str | pathlib.Path) -> np.ndarray:
  """Memory-maps a .npy file, read-only.

  Raises:
    Damaged: It is not a .npy file, or holds Python objects.
  """
  try:
    return np.load(path, mmap_mode='r')
  except (ValueError, EOFError) as error:
    raise _damaged(path) from error


def write_json(path: str | pathlib.Path, value: dict[str, Any]) -> None:
  """Writes a dict as JSON that includes its own hash."""
  write_text(path, _hashed_json(value))


def read_json(path: str | pathlib.Path) -> dict[str, Any]:
  """Returns a dict written by `write_json`.

  Raises:
    Damaged: The file is missing or any bit of it has changed.
  """
  try:
    text = pathlib.Path(path).read_text()
    value = json.loads(text)
    del value['sha256']
  except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
    raise _damaged(path) from error
  if text != _hashed_json(value):
    raise _damaged(path)
  return value


def file_hash(path: str | pathlib.Path) -> str:
  """Returns the SHA-256 of a file in hexadecimal."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def remove_unfinished(folder: str | pathlib.Path) -> None:
  """Removes leftovers of killed writers in `folder`, at any depth.

  A folder that was being replaced gets its name back.
  """
  for path in sorted(pathlib.Path(folder).rglob(f'*{_UNFINISHED}')):
    # Removing a parent may already have removed it. A file is its own lock.
    if path.exists():
      with _opened(_lock_of(path) if path.is_dir() else path) as descriptor:
        if lock(descriptor):
          _remove_left_over(path)
  for path in pathlib.Path(folder).rglob(f'*{_UNFINISHED}{_LOCK}'):
    with _opened(path) as descriptor:
      if lock(descriptor):
        path.unlink()


def _remove_left_over(path):
  name, _, part = path.name.removesuffix(_UNFINISHED).rpartition('.')
  if path.is_file():
    path.unlink()
  elif part.startswith(_OLD) and not path.with_name(name).exists():
    os.rename(path, path.with_name(name))
    _sync_path(path.parent)
  else:
    shutil.rmtree(path)


def remove_folder(path: str | pathlib.Path) -> None:
  """Removes a folder and its contents, if it exists."""
  if pathlib.Path(path).exists():
    shutil.rmtree(path)


def remove_unused(folder: str | pathlib.Path) -> None:
  """Removes a folder unless a process holds it with `in_use`."""
  with _opened(pathlib.Path(folder) / _IN_USE) as descriptor:
    if lock(descriptor):
      shutil.rmtree(folder)


@contextlib.contextmanager
def in_use(folder: str | pathlib.Path) -> Iterator[None]:
  """Protects a folder from `remove_unused`; makes it if missing."""
  descriptor = None
  while descriptor is None:
    descriptor = _use(pathlib.Path(folder) / _IN_USE)
  try:
    yield
  finally:
    os.close(descriptor)


def _use(path):
  """Returns a descriptor with a shared lock; None if the folder was removed."""
  make_folder(path.parent)
  try:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  except FileNotFoundError:
    return None
  with contextlib.suppress(FileNotFoundError):
    locked = lock(descriptor, fcntl.LOCK_SH)
    if locked and os.path.samestat(os.fstat(descriptor), os.stat(path)):
      return descriptor
  os.close(descriptor)
  return None


@contextlib.contextmanager
def exclusive(
  folder: str | pathlib.Path, waiting: Callable[[], None]
) -> Iterator[None]:
  """Runs the block in one process at a time per folder; makes the folder.

  Args:
    folder: Path.
    waiting: Called once before waiting for another process.
  """
  make_folder(folder)
  with _opened(pathlib.Path(folder) / _IN_TURN) as descriptor:
    if not lock(descriptor):
      waiting()
    while not lock(descriptor):
      time.sleep(_POLL_SECS)
    yield


def lock(descriptor: int, how: int = fcntl.LOCK_EX) -> bool:
  """Locks an open file; returns False if another process holds the lock.

  The kernel releases the lock when the descriptor is closed, so a dead process
  never holds one.

  Args:
    descriptor: File descriptor.
    how: fcntl.LOCK_EX (exclusive) or LOCK_SH (shared).
  """
  try:
    fcntl.flock(descriptor, how | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def _unfinished(path):
  """Returns temporary names for the new `path` and for the one it replaces."""
  token = f'{os.getpid()}-{secrets.token_hex(4)}{_UNFINISHED}'
  return tuple(
    path.with_name(f'{path.name}.{part}-{token}') for part in (_NEW, _OLD)
  )


def _lock_of(folder):
  """Returns the lock file of the writer of an unfinished folder.

  A file, because NFS does not lock folders.
  """
  return folder.with_name(folder.name + _LOCK)


@contextlib.contextmanager
def _opened(path, flags=os.O_RDWR | os.O_CREAT):
  """Yields a descriptor of a file, by default made if missing."""
  descriptor = os.open(path, flags, 0o644)
  try:
    yield descriptor
  finally:
    os.close(descriptor)


def _hashed_json(value):
  digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
  return json.dumps({**value, 'sha256': digest}, indent=1)


def _damaged(path):
  return errors.Damaged(f'{path} is missing or was changed.')


def _sync(folder):
  """Waits until a folder and all its contents are on disk, contents first."""
  contents = sorted(folder.rglob('*'), reverse=True)
  for path in (*contents, folder, folder.parent):
    _sync_path(path)


def _sync_path(path):
  with _opened(path, os.O_RDONLY) as descriptor:
    os.fsync(descriptor)
