"""Folders that others wait for: visible whole, or not at all.

A folder is written under another name, every file of it is hashed and synced
to disk, `manifest.json` comes last, and a rename makes it visible. A folder
without a manifest does not exist for any reader here, and what a manifest names
is checked before it is read.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import time

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
def writing(path):
  """Gives a binary file, which is seen as `path` once all of it is on disk."""
  path = pathlib.Path(path)
  unfinished, _ = _unfinished(path)
  with named(path), open(unfinished, 'wb') as file:
    lock(file.fileno())
    yield file
    file.flush()
    os.fsync(file.fileno())
    os.replace(unfinished, path)
  _sync_folder(path.parent)


def write_bytes(path, content):
  """Writes a file: afterwards all of it is there, or none."""
  with writing(path) as file:
    file.write(content)


def write_text(path, text):
  """Writes a text file: afterwards all of it is there, or none."""
  write_bytes(path, text.encode())


def make_folder(path):
  """Makes a folder and those above it, all of them on disk afterwards."""
  path = pathlib.Path(path)
  if not path.is_dir():
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _sync_folder(path.parent)


@contextlib.contextmanager
def named(path):
  """Gives an OSError of the block that has no path this one.

  What is written to an open file on a full disk fails without one.
  """
  try:
    yield
  except OSError as error:
    if error.filename is None:
      error.filename = str(path)
    raise


@contextlib.contextmanager
def publish(folder, manifest):
  """Gives a folder to write into, and makes it visible as `folder` at the end.

  Args:
    folder: Path that the folder is to have; an older one is replaced.
    manifest: dict for `manifest.json`, to which the hashes of the files are
      added. It may be filled while the folder is written.

  Yields:
    Path of the folder to write into. If the block raises, nothing is published.
  """
  with _replacing(folder) as unfinished:
    yield unfinished
    seal(unfinished, manifest)


@contextlib.contextmanager
def receive(folder):
  """Gives a folder to copy a published one into; visible at the end if whole.

  Raises:
    Damaged: What was copied is not what its manifest says.
  """
  with _replacing(folder) as unfinished:
    try:
      yield unfinished
      if read_manifest(unfinished) is None:
        raise _damaged(unfinished / MANIFEST)
    except BaseException:
      # Such a copy may be begun again and again.
      shutil.rmtree(unfinished)
      _lock_of(unfinished).unlink()
      raise
    _sync(unfinished)
    # Else a power cut leaves a folder of this name without what is in it.
    _sync_folder(unfinished)


@contextlib.contextmanager
def _replacing(folder):
  """Gives a folder that becomes `folder` if the block does not raise."""
  folder = pathlib.Path(folder)
  make_folder(folder.parent)
  unfinished, old = _unfinished(folder)
  with named(folder), _locked(_lock_of(unfinished)):
    unfinished.mkdir()
    yield unfinished
    # In one rename each: what is half removed would be seen as damaged.
    if folder.exists():
      os.rename(folder, old)
    os.rename(unfinished, folder)
    _sync_folder(folder.parent)
    _lock_of(unfinished).unlink()
  remove_folder(old)


def seal(folder, manifest):
  """Syncs and hashes all files of a folder, and writes its manifest last.

  Args:
    folder: Path of a folder that is not written to any more.
    manifest: dict for `manifest.json`, to which the hashes are added.
  """
  folder = pathlib.Path(folder)
  _sync(folder)
  files = sorted(p for p in folder.rglob('*') if p.is_file())
  hashes = {str(p.relative_to(folder)): file_hash(p) for p in files}
  write_json(folder / MANIFEST, {**manifest, 'files': hashes})


def unseal(folder):
  """Removes the manifest of a folder that is to be removed: it is not there."""
  (pathlib.Path(folder) / MANIFEST).unlink(missing_ok=True)
  _sync_folder(folder)


def is_sealed(folder):
  """Returns whether a folder has its manifest."""
  return (pathlib.Path(folder) / MANIFEST).is_file()


def read_manifest(folder, only=''):
  """Returns the manifest of a published folder, its files checked.

  Args:
    folder: Path of the folder.
    only: Check no more than the files whose names in it begin so.

  Returns:
    The dict given to `publish`, or None if no such folder was published.

  Raises:
    Damaged: A file is missing or is not what was published.
  """
  folder = pathlib.Path(folder)
  if not is_sealed(folder):
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


def find(folder, about):
  """Returns the manifest of a published folder, if it can be used.

  A damaged one is set aside, and a line says so: what can be made again is.

  Args:
    folder: Path of the folder.
    about: dict that the manifest must hold.

  Returns:
    The manifest; None if the folder is to be made.
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
  usable = manifest is not None and about.items() <= manifest.items()
  return manifest if usable else None


def set_aside(path, aside=None):
  """Renames what is damaged, and returns its new path.

  Args:
    path: The file or folder.
    aside: Its new path, to which a number is added where it is taken; None for
      a name beside it.
  """
  path = pathlib.Path(path)
  first = pathlib.Path(aside or f'{path}.damaged-1')
  stem, number, free = aside or f'{path}.damaged', 1, first
  while free.exists():
    number += 1
    free = pathlib.Path(f'{stem}-{number}')
  os.rename(path, free)
  _sync_folder(free.parent)
  _sync_folder(path.parent)
  return free


def load_array(path):
  """Returns the array of a .npy file, as a map that cannot be written.

  Raises:
    Damaged: It is none, or one of Python objects.
  """
  try:
    return np.load(path, mmap_mode='r')
  except (ValueError, EOFError) as error:
    raise _damaged(path) from error


def write_json(path, value):
  """Writes a dict as JSON that holds its own hash."""
  write_text(path, _hashed_json(value))


def read_json(path):
  """Returns the dict that `write_json` wrote.

  Raises:
    Damaged: It is missing, or one bit of it is another.
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


def file_hash(path):
  """Returns the SHA-256 of a file, in hexadecimal digits."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def remove_unfinished(folder):
  """Removes what killed writers left in `folder`, at any depth.

  A folder that was being replaced is given back its name.
  """
  for path in sorted(pathlib.Path(folder).rglob(f'*{_UNFINISHED}')):
    # It may have gone with a folder above it. A file is its own lock.
    if path.is_dir():
      with _locked(_lock_of(path)) as alone:
        if alone:
          _remove_left_over(path)
    elif path.exists():
      with _locked(path) as alone:
        if alone:
          path.unlink()
  for path in pathlib.Path(folder).rglob(f'*{_UNFINISHED}{_LOCK}'):
    with _locked(path) as alone:
      if alone:
        path.unlink()


def _remove_left_over(path):
  name, _, part = path.name.removesuffix(_UNFINISHED).rpartition('.')
  if part.startswith(_OLD) and not path.with_name(name).exists():
    os.rename(path, path.with_name(name))
    _sync_folder(path.parent)
  else:
    shutil.rmtree(path)


def remove_folder(path):
  """Removes a folder, if it is there, and all that is in it."""
  if pathlib.Path(path).exists():
    shutil.rmtree(path)


def remove_unused(folder):
  """Removes a folder that no process has `in_use`."""
  with _locked(pathlib.Path(folder) / _IN_USE) as alone:
    if alone:
      shutil.rmtree(folder)


@contextlib.contextmanager
def in_use(folder):
  """Keeps a folder, made where it is missing, from being removed as unused."""
  descriptor = None
  while descriptor is None:
    descriptor = _use(pathlib.Path(folder) / _IN_USE)
  try:
    yield
  finally:
    os.close(descriptor)


def _use(path):
  """Returns the descriptor of a shared lock; None if the folder just went."""
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
def turn(folder, waiting):
  """Lets one process at a time run the block for a folder, made if missing.

  Args:
    folder: Path.
    waiting: Called once if another process has it, before this one waits.
  """
  make_folder(folder)
  descriptor = os.open(
    pathlib.Path(folder) / _IN_TURN, os.O_RDWR | os.O_CREAT, 0o644
  )
  try:
    if not lock(descriptor):
      waiting()
    while not lock(descriptor):
      time.sleep(_POLL_SECS)
    yield
  finally:
    os.close(descriptor)


def lock(descriptor, how=fcntl.LOCK_EX):
  """Locks an open file; returns whether nobody else has it locked.

  The kernel holds the lock as long as the descriptor is open, so that a dead
  process has none.

  Args:
    descriptor: Its file descriptor.
    how: fcntl.LOCK_EX, alone, or LOCK_SH, together with others of that kind.
  """
  try:
    fcntl.flock(descriptor, how | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  return True


def _unfinished(path):
  """Returns names for `path` while it is written, and for what it replaces."""
  token = f'{os.getpid()}-{secrets.token_hex(4)}{_UNFINISHED}'
  return tuple(
    path.with_name(f'{path.name}.{part}-{token}') for part in (_NEW, _OLD)
  )


def _lock_of(folder):
  """Returns the file whose lock the writer of an unfinished folder has.

  NFS does not lock folders.
  """
  return folder.with_name(folder.name + _LOCK)


@contextlib.contextmanager
def _locked(path, how=fcntl.LOCK_EX):
  """Gives whether the lock of a file, made if missing, was had for a block."""
  descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    yield lock(descriptor, how)
  finally:
    os.close(descriptor)


def _hashed_json(value):
  digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
  return json.dumps({**value, 'sha256': digest}, indent=1)


def _damaged(path):
  return errors.Damaged(
    f'a file must stay as it was written; found that {path} is missing or was '
    'changed.'
  )


def _sync(folder):
  """Waits until a folder, and all that is in it, is on disk."""
  paths = sorted(folder.rglob('*'))
  for path in paths:
    if path.is_file():
      with open(path, 'rb') as file:
        os.fsync(file.fileno())
  for path in (folder.parent, *paths):
    if path.is_dir():
      _sync_folder(path)


def _sync_folder(path):
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
