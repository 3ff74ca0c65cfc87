"""Mirrors published files and folders of a run to `--remote_dir`, and back.

A bucket has no rename and no locks, and its files cannot be memory-mapped. So
each process works on its own disk and copies published folders to
`--remote_dir`. A folder's manifest is copied last and removed first, so the
folder exists there whole or not at all. Folders published by others are copied
in, and become visible here once every hash matches.
"""

import json
import os
import pathlib
import shutil

from etils import epath
import fsspec.config
import tqdm

from ance_jax import errors
from ance_jax.core import atomic

# The listings cache, on by default, would hide folders published by others.
for _protocol in ('gcs', 'gs', 's3', 'az', 'abfs'):
  fsspec.config.conf.setdefault(_protocol, {})['use_listings_cache'] = False
# {absolute path of a folder: `epath.Path` of its copy}.
_places = {}
# (copy, its manifest) of copies that did not match their manifest.
_damaged = set()


def connect(workdir: str | os.PathLike, address: str) -> None:
  """Mirrors a folder to an address from now on.

  A folder that is mirrored stays so while it is connected again, because the
  heartbeat of its lock goes there.

  Args:
    workdir: The folder, on this machine's disk.
    address: gs://BUCKET/... or a path; empty mirrors nowhere.

  Raises:
    BadInput: The address cannot be read, or overlaps with the folder.
  """
  here = pathlib.Path(workdir)
  if not address:
    _places.pop(here.absolute(), None)
    return
  if '://' not in address:
    real, other = here.resolve(), pathlib.Path(address).resolve()
    if real.is_relative_to(other) or other.is_relative_to(real):
      raise errors.refusal(
        f'--remote_dir={other} and --workdir={real} overlap',
        'name a --remote_dir outside it, that does not hold it',
      )
  place = epath.Path(address)
  try:
    is_file = place.exists() and not place.is_dir()
  except Exception as error:
    raise errors.refusal(
      f'--remote_dir={address} cannot be reached ({type(error).__name__}: '
      f'{str(error)[:200]})',
      'check its name and your rights there; gs:// wants `pip install gcsfs`, '
      's3:// s3fs',
    ) from error
  if is_file:
    raise errors.refusal(f'--remote_dir={address} is a file', 'name a folder')
  _places[here.absolute()] = place


def is_connected(workdir: str | os.PathLike) -> bool:
  """Returns whether a folder is mirrored."""
  return pathlib.Path(workdir).absolute() in _places


def push(path: str | os.PathLike) -> None:
  """Copies a file or a published folder out, if it is in a mirrored folder.

  Raises:
    OSError: The copy could not be written.
  """
  there, path = _there(path), pathlib.Path(path)
  if there is None or not path.exists():
    return
  if path.is_file():
    _write(there, path)
    return
  content = (path / atomic.MANIFEST).read_bytes()
  if read(path / atomic.MANIFEST) == content:
    return
  (there / atomic.MANIFEST).unlink(missing_ok=True)
  for name in (*json.loads(content)['files'], atomic.MANIFEST):
    _write(there / name, path / name)


def remove(path: str | os.PathLike) -> None:
  """Removes the copy of a published folder, manifest first."""
  there = _there(path)
  if there is not None and there.exists():
    (there / atomic.MANIFEST).unlink(missing_ok=True)
    there.rmtree(missing_ok=True)


def numbers(folder: str | os.PathLike) -> list[int]:
  """Returns the numbers that name subfolders of a folder's copy, in order."""
  return sorted(_numbered(folder))


def files(folder: str | os.PathLike) -> list[pathlib.Path]:
  """Returns local paths of the files in a folder's copy."""
  return sorted(pathlib.Path(folder) / name for name in _names(folder))


def read(path: str | os.PathLike) -> bytes | None:
  """Returns the bytes of a file's copy; None if there is none."""
  there = _there(path)
  try:
    return None if there is None else there.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    return None


def write(path: str | os.PathLike, content: bytes) -> None:
  """Writes the copy of a file that has no local version."""
  there = _there(path)
  there.parent.mkdir(parents=True, exist_ok=True)
  there.write_bytes(content)


def unlink(path: str | os.PathLike) -> None:
  """Removes the copy of a file."""
  _there(path).unlink(missing_ok=True)


def pull_file(path: str | os.PathLike) -> None:
  """Overwrites a file with its copy, if there is one."""
  content, path = read(path), pathlib.Path(path)
  if content is not None and not (
    path.is_file() and path.read_bytes() == content
  ):
    atomic.make_folder(path.parent)
    atomic.write_bytes(path, content)


def pull(folder: str | os.PathLike) -> bool:
  """Overwrites a published folder with its copy.

  Returns:
    Whether the folder is now here and equal to its copy: False if there is no
    copy, or it is incomplete, or was removed or replaced meanwhile.
  """
  there, folder = _there(folder), pathlib.Path(folder)
  content = read(folder / atomic.MANIFEST)
  if content is None:
    return False
  manifest = folder / atomic.MANIFEST
  if manifest.is_file() and manifest.read_bytes() == content:
    return True
  if (there, content) in _damaged:
    return False
  try:
    files = json.loads(content)['files']
    with atomic.receive(folder) as unfinished:
      for name in files:
        path = unfinished / name
        if '..' in path.parts or not path.is_relative_to(unfinished):
          raise ValueError(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with (there / name).open('rb') as source, open(path, 'wb') as target:
          shutil.copyfileobj(source, target)
      (unfinished / atomic.MANIFEST).write_bytes(content)
  except (FileNotFoundError, ValueError) as error:
    # Otherwise it was removed or replaced meanwhile.
    if read(manifest) == content:
      _damaged.add((there, content))
      tqdm.tqdm.write(f'{there} is not whole, and not taken ({error})')
    return False
  return True


def pull_newest(folder: str | os.PathLike, after: int = -1) -> int | None:
  """Copies in the highest-numbered subfolder that is whole; see `pull`.

  Args:
    folder: Parent of the numbered folders, such as that of all checkpoints.
    after: Only numbers above this one.

  Returns:
    The number, or None.
  """
  names = _numbered(folder)
  for number in sorted(names, reverse=True):
    if number > after and pull(pathlib.Path(folder) / names[number]):
      return number
  return None


def _numbered(folder):
  """Returns {number: name} of the subfolders of a folder's copy."""
  return {int(name): name for name in _names(folder) if name.isdigit()}


def _names(folder):
  """Returns the names in a folder's copy; [] if there is no copy."""
  there = _there(folder)
  if there is None or not there.is_dir():
    return []
  return [path.name for path in there.iterdir()]


def _there(path):
  path = pathlib.Path(path).absolute()
  for folder, place in _places.items():
    if path.is_relative_to(folder):
      return place / path.relative_to(folder).as_posix()
  return None


def _write(there, path):
  """Copies the file `path` to `there`; in a bucket it appears when closed."""
  there.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'rb') as source, there.open('wb') as target:
    shutil.copyfileobj(source, target)
