"""Folders that others wait for: visible whole, or not at all.

A folder is written under another name, every file of it is hashed and synced
to disk, `manifest.json` comes last, and a rename makes it visible. A folder
without a manifest does not exist for any reader here.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil

from ance_jax import config as config_lib

MANIFEST = 'manifest.json'
_UNFINISHED = '.unfinished'


@contextlib.contextmanager
def writing(path):
  """Gives a binary file, which is seen as `path` once all of it is on disk."""
  path = pathlib.Path(path)
  unfinished = path.with_name(path.name + _UNFINISHED)
  with open(unfinished, 'wb') as file:
    yield file
    file.flush()
    os.fsync(file.fileno())
  os.replace(unfinished, path)
  _sync_folder(path.parent)


def write_text(path, text):
  """Writes a text file: afterwards all of it is there, or none."""
  with writing(path) as file:
    file.write(text.encode())


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
  folder = pathlib.Path(folder)
  folder.parent.mkdir(parents=True, exist_ok=True)
  unfinished = folder.with_name(folder.name + _UNFINISHED)
  shutil.rmtree(unfinished, ignore_errors=True)
  unfinished.mkdir()
  yield unfinished
  files = sorted(p for p in unfinished.rglob('*') if p.is_file())
  hashes = {str(p.relative_to(unfinished)): _synced_hash(p) for p in files}
  for path in unfinished.rglob('*'):
    if path.is_dir():
      _sync_folder(path)
  text = json.dumps({**manifest, 'files': hashes}, indent=1)
  write_text(unfinished / MANIFEST, text)
  if folder.exists():
    shutil.rmtree(folder)
  os.rename(unfinished, folder)
  _sync_folder(folder.parent)


def read_manifest(folder):
  """Returns the manifest of a published folder, its files checked.

  Returns:
    The dict given to `publish`, or None if no such folder was published.

  Raises:
    BadInput: A file is missing or is not what was published.
  """
  folder = pathlib.Path(folder)
  if not (folder / MANIFEST).exists():
    return None
  manifest = json.loads((folder / MANIFEST).read_text())
  for name, expected in manifest['files'].items():
    path = folder / name
    if not path.exists() or file_hash(path) != expected:
      raise config_lib.BadInput(
        f'a published file must stay as it was; {path} is missing or was '
        f'changed; remove {folder} to have it made again.'
      )
  return manifest


def file_hash(path):
  """Returns the SHA-256 of a file, in hexadecimal digits."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def remove_unfinished(folder):
  """Removes what a killed writer left in `folder`."""
  for path in pathlib.Path(folder).glob(f'*{_UNFINISHED}'):
    if path.is_dir():
      shutil.rmtree(path)
    else:
      path.unlink()


def _synced_hash(path):
  with open(path, 'rb') as file:
    os.fsync(file.fileno())
  return file_hash(path)


def _sync_folder(path):
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
