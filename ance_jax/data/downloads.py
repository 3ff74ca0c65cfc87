"""Downloads the files of public datasets with TFDS."""

import hashlib
import os
import pathlib
import re
import shutil
import tarfile
import zipfile

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.data import records
from ance_jax.data import registry

_CHUNK = 2**20


def existing(
  settings: records.Settings, folder: pathlib.Path, name: str, what: str
) -> pathlib.Path:
  """Returns the path of a file, plain or gzipped; `--download` fetches it.

  Args:
    settings: Which data is read.
    folder: Folder of the dataset.
    name: Name of the file, without .gz.
    what: Description of such a folder, for error messages.

  Raises:
    BadInput: The file is missing or cannot be downloaded.
  """
  found = registry.DOWNLOADS.get(name)
  if found and settings.download and not records.find(folder, name):
    fetch(name, folder)
  return records.existing(folder, name, what, how(found) if found else '')


def how(found: registry.Download) -> str:
  """Returns how to get the files of a download, in the imperative."""
  size = f'{found.size / 1e6:,.1f} MB' if found.size else 'size not known'
  verb = 'unpack' if found.url.endswith(('.tar.gz', '.zip')) else 'fetch'
  return f'{verb} {found.url} ({size}), or set --download'


def fetch_beir(name: str, folder: pathlib.Path) -> None:
  """Downloads a BEIR dataset into a folder, unless its corpus is there.

  Args:
    name: Key of `registry.BEIR_PASSAGES`.
    folder: Folder of the dataset.

  Raises:
    BadInput: The download fails or lacks the corpus.
  """
  if records.find(folder, 'corpus.jsonl'):
    return
  path = _fetched(registry.beir_archive(name), folder, name)
  inside = re.compile(
    rf'{re.escape(name)}/((?:corpus|queries)\.jsonl|qrels/[a-z]+\.tsv)'
  )
  with zipfile.ZipFile(path) as archive:
    found = list(filter(None, map(inside.fullmatch, archive.namelist())))
    if 'corpus.jsonl' not in {match[1] for match in found}:
      raise errors.refusal(
        f'{path} does not hold {name}/corpus.jsonl', 'fetch it by hand'
      )
    # The corpus goes last, so that its presence means that all files are there.
    for match in sorted(found, key=lambda match: match[1], reverse=True):
      atomic.make_folder((folder / match[1]).parent)
      with (
        archive.open(match[0]) as member,
        atomic.writing(folder / match[1]) as file,
      ):
        shutil.copyfileobj(member, file, _CHUNK)


def fetch(name: str, folder: pathlib.Path) -> None:
  """Downloads a file into a folder atomically.

  Earlier downloads are reused. The download is kept in downloads/; the file is
  a symlink to it, or is extracted from it if it is an archive.

  Args:
    name: Name of the file, unpacked; a key of `registry.DOWNLOADS`.
    folder: Folder of the dataset.

  Raises:
    BadInput: The download fails or has another checksum.
  """
  found = registry.DOWNLOADS[name]
  path = _fetched(found, folder, name)
  if found.url.endswith('.tar.gz'):
    _extract(path, name, folder)
    return
  suffix = '.gz' if found.url.endswith('.gz') else ''
  os.symlink(path.relative_to(folder), folder / f'{name}{suffix}')


def _fetched(found, folder, name):
  """Returns the path of a download, new or cached, with its checksum verified.

  Args:
    found: `registry.Download`.
    folder: `pathlib.Path` of the folder with downloads/.
    name: Name of the needed file or dataset, for messages.
  """
  import tensorflow_datasets as tfds  # Only where something is fetched.

  manager = tfds.download.DownloadManager(download_dir=folder / 'downloads')
  logs.log(f'{name}: fetching {found.url}')
  try:
    path = pathlib.Path(manager.download(found.url))
  except Exception as error:  # From requests, TFDS or the disk.
    reason = ' '.join(str(error).split())[:120]
    raise errors.refusal(
      f'{found.url} cannot be fetched ({reason})',
      f'put {name} into {folder} by hand',
    ) from error
  if found.md5 is None:
    logs.log(f'{name}: no checksum of it is known')
  elif (md5 := _md5(path)) != found.md5:
    path.unlink()
    raise errors.refusal(
      f'{found.url} has the MD5 {md5}, not {found.md5}, and was removed',
      'give the same command again',
    )
  return path


def _extract(path, name, folder):
  """Extracts one file of an archive into a folder."""
  # Not with TFDS, which needs TensorFlow to extract.
  with tarfile.open(path) as archive:
    members = [m for m in archive if m.name == name and m.isfile()]
    if not members:
      raise errors.refusal(
        f'{path} does not hold the file {name}', 'fetch it by hand'
      )
    with atomic.writing(folder / name) as file:
      shutil.copyfileobj(archive.extractfile(members[0]), file, _CHUNK)


def _md5(path):
  digest = hashlib.md5(usedforsecurity=False)
  with open(path, 'rb') as file:
    for chunk in logs.progress(
      iter(lambda: file.read(_CHUNK), b''),
      f'check {path.name}',
      total=path.stat().st_size,
      unit='bytes',
      count=len,
    ):
      digest.update(chunk)
  return digest.hexdigest()
