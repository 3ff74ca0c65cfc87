"""A run's folder elsewhere: what is published here, copied there, and back.

A bucket has no rename and no lock, and nothing in it can be mapped. So each
process works in a folder on its own disk, and copies what it publishes to
`--remote_dir`: a folder's manifest last, and first when it goes, so that the
folder is there whole or not at all. What others published is copied in, and is
seen here once each hash is right.
"""

import json
import pathlib
import shutil

from etils import epath
import fsspec.config
import tqdm

from ance_jax import errors
from ance_jax.core import atomic

# With the cache of listings, on by default, what others publish is never seen.
for _protocol in ('gcs', 'gs', 's3', 'az', 'abfs'):
  fsspec.config.conf.setdefault(_protocol, {})['use_listings_cache'] = False
# Where the copy of a folder is: the folder's absolute path to an `epath.Path`.
_places = {}
# Copies that were found not to be what their manifest says, and that manifest.
_damaged = set()


def connect(workdir, address):
  """Keeps a copy of what is published in a folder from here on.

  Args:
    workdir: The folder, on this machine's disk.
    address: That of the copy, gs://BUCKET/..., or a path; empty: there is none.

  Raises:
    BadInput: Nothing can be read there, or it is the folder itself.
  """
  _places.pop(_absolute(workdir), None)
  if not address:
    return
  if '://' not in address:
    _check_apart(
      pathlib.Path(workdir).resolve(), pathlib.Path(address).resolve()
    )
  place = epath.Path(address)
  try:
    is_file = place.exists() and not place.is_dir()
  except Exception as error:
    raise errors.BadInput(
      '--remote_dir must be a place that can be reached; found '
      f'{address} ({type(error).__name__}: {str(error)[:200]}); check its name '
      'and your rights there; gs:// wants `pip install gcsfs`, s3:// s3fs.'
    ) from error
  if is_file:
    raise errors.BadInput(
      f'--remote_dir must be a folder; found a file at {address}; name another.'
    )
  _places[_absolute(workdir)] = place


def _check_apart(here, elsewhere):
  if here.is_relative_to(elsewhere) or elsewhere.is_relative_to(here):
    raise errors.BadInput(
      '--remote_dir must be another folder than --workdir, and neither may lie '
      f'in the other; found {elsewhere} with {here}; name another.'
    )


def is_connected(workdir):
  """Returns whether a folder has a copy elsewhere."""
  return _absolute(workdir) in _places


def push(path):
  """Copies a file, or a published folder, out; nothing where there is no copy.

  Raises:
    OSError: It could not be written.
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
  _unlink(there / atomic.MANIFEST)
  for name in (*json.loads(content)['files'], atomic.MANIFEST):
    _write(there / name, path / name)


def remove(path):
  """Removes the copy of a published folder, its manifest first."""
  there = _there(path)
  if there is not None and there.exists():
    _unlink(there / atomic.MANIFEST)
    there.rmtree(missing_ok=True)


def numbers(folder):
  """Returns the numbers that the copy of a folder has folders for, in order."""
  return sorted(_numbered(folder))


def files(folder):
  """Returns the paths of the files that the copy of a folder has."""
  there = _there(folder)
  if there is None or not there.is_dir():
    return []
  return sorted(pathlib.Path(folder) / path.name for path in there.iterdir())


def read(path):
  """Returns the bytes of the copy of a file; None: there is none."""
  there = _there(path)
  if there is None:
    return None
  try:
    return there.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    return None


def write(path, content):
  """Writes the copy of a file that is not kept here."""
  there = _there(path)
  there.parent.mkdir(parents=True, exist_ok=True)
  there.write_bytes(content)


def unlink(path):
  """Removes the copy of a file."""
  _unlink(_there(path))


def pull_file(path):
  """Makes a file what its copy is, if that is there."""
  content, path = read(path), pathlib.Path(path)
  if content is not None and not (
    path.is_file() and path.read_bytes() == content
  ):
    atomic.make_folder(path.parent)
    atomic.write_bytes(path, content)


def pull(folder):
  """Makes a published folder what its copy is.

  Returns:
    Whether the folder is here and as its copy is: false where there is no copy,
    or no whole one, or it was removed or replaced meanwhile.
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
    # Else it went, or is another by now.
    if read(manifest) == content:
      _damaged.add((there, content))
      tqdm.tqdm.write(f'{there} is not whole, and not taken ({error})')
    return False
  return True


def pull_newest(folder, after=-1):
  """Copies the numbered folder in that is the newest; see `pull`.

  Args:
    folder: The folder of these, such as that of all checkpoints.
    after: int; what is not above it is left.

  Returns:
    Its number, or None.
  """
  names = _numbered(folder)
  for number in sorted(names, reverse=True):
    if number > after and pull(pathlib.Path(folder) / names[number]):
      return number
  return None


def _numbered(folder):
  """Returns {number: name} of the folders in the copy of a folder."""
  there = _there(folder)
  if there is None or not there.is_dir():
    return {}
  names = [path.name for path in there.iterdir()]
  return {int(name): name for name in names if name.isdigit()}


def _there(path):
  path = _absolute(path)
  for folder, place in _places.items():
    if path.is_relative_to(folder):
      return place / path.relative_to(folder).as_posix()
  return None


def _absolute(path):
  return pathlib.Path(path).absolute()


def _write(there, path):
  """Copies the file `path` to `there`; an object is seen once it is closed."""
  there.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'rb') as source, there.open('wb') as target:
    shutil.copyfileobj(source, target)


def _unlink(there):
  there.unlink(missing_ok=True)
