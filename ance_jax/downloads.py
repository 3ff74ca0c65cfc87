"""Where the files of public datasets are, how large, and their checksums.

Facts of public registries (the page of MS MARCO, NIST, DPR's download_data.py,
ir_datasets); what none of them has is left empty. TFDS fetches them.
"""

import hashlib
import os
import pathlib
import shutil
import tarfile
from typing import NamedTuple

import tensorflow_datasets as tfds

from ance_jax import config as config_lib
from ance_jax import handoff
from ance_jax import logs
from ance_jax import records

_CHUNK = 2**20

_MARCO = 'https://msmarco.z22.web.core.windows.net/msmarcoranking/'
_NIST = 'https://trec.nist.gov/data/deep/'
_DPR = 'https://dl.fbaipublicfiles.com/dpr/'


class Download(NamedTuple):
  """A file that is fetched.

  Attributes:
    url: Its address.
    size: Bytes, or None.
    md5: Checksum in hexadecimal digits, or None.
  """

  url: str
  size: int | None = None
  md5: str | None = None


_COLLECTION = Download(
  f'{_MARCO}collectionandqueries.tar.gz',
  1_057_717_952,
  '31644046b18952c1386cd4564ba2ae69',
)
_DL19_QUERIES = Download(
  f'{_MARCO}msmarco-test2019-queries.tsv.gz',
  4_276,
  'eda71eccbe4d251af83150abe065368c',
)
_DL20_QUERIES = Download(
  f'{_MARCO}msmarco-test2020-queries.tsv.gz',
  4_131,
  '00a406fb0d14ed3752d70d1e4eb98600',
)
# Name of a file, unpacked -> what it is in.
DOWNLOADS = {
  'collection.tsv': _COLLECTION,
  'queries.train.tsv': _COLLECTION,
  'queries.dev.small.tsv': _COLLECTION,
  'qrels.train.tsv': _COLLECTION,
  'qrels.dev.small.tsv': _COLLECTION,
  'msmarco-test2019-queries.tsv': _DL19_QUERIES,
  '2019qrels-pass.txt': Download(
    f'{_NIST}2019qrels-pass.txt', 187_092, '2f4be390198da108f6845c822e5ada14'
  ),
  'msmarco-test2020-queries.tsv': _DL20_QUERIES,
  '2020qrels-pass.txt': Download(
    f'{_NIST}2020qrels-pass.txt', 218_617, '0355ccee7509ac0463e8278186cdd8d1'
  ),
  'msmarco-docs.tsv': Download(f'{_MARCO}msmarco-docs.tsv.gz'),
  'msmarco-doctrain-queries.tsv': Download(
    f'{_MARCO}msmarco-doctrain-queries.tsv.gz',
    6_457_962,
    '4086d31a9cf2d7b69c4932609058111d',
  ),
  'msmarco-doctrain-qrels.tsv': Download(
    f'{_MARCO}msmarco-doctrain-qrels.tsv.gz',
    2_385_717,
    '9d1609e240113b0504fd2e61cb36d924',
  ),
  'msmarco-docdev-queries.tsv': Download(
    f'{_MARCO}msmarco-docdev-queries.tsv.gz',
    91_837,
    'ac20593d71b9c32ab2633230f9cdf10d',
  ),
  'msmarco-docdev-qrels.tsv': Download(
    f'{_MARCO}msmarco-docdev-qrels.tsv.gz',
    38_553,
    '5eeafaeb4960979a62e7fed93273254e',
  ),
  '2019qrels-docs.txt': Download(
    f'{_NIST}2019qrels-docs.txt', 339_438, 'd7ef53b995ef7e01676ea85d7ec01dda'
  ),
  '2020qrels-docs.txt': Download(
    f'{_NIST}2020qrels-docs.txt', 182_852, 'e10f3545583b124a4ed5e7992293e15a'
  ),
  'psgs_w100.tsv': Download(
    f'{_DPR}wikipedia_split/psgs_w100.tsv.gz',
    4_694_541_059,
    '612fe66e0b6b41ee28f806140226c563',
  ),
  'biencoder-nq-train.json': Download(
    f'{_DPR}data/retriever/biencoder-nq-train.json.gz',
    2_314_892_908,
    'a1c927b5adae71388eb064329387709f',
  ),
  'biencoder-nq-dev.json': Download(
    f'{_DPR}data/retriever/biencoder-nq-dev.json.gz',
    256_239_282,
    '2640483dbe0df7ae29c6da419c551a80',
  ),
  'biencoder-trivia-train.json': Download(
    f'{_DPR}data/retriever/biencoder-trivia-train.json.gz',
    1_848_559_940,
    '5aa4d3577c91425cd20e239ed89a252b',
  ),
  'biencoder-trivia-dev.json': Download(
    f'{_DPR}data/retriever/biencoder-trivia-dev.json.gz',
    207_271_749,
    'd559dffe09acfe5a6370adea55b8abf2',
  ),
  'nq-test.qa.csv': Download(f'{_DPR}data/retriever/nq-test.qa.csv'),
  'nq-dev.qa.csv': Download(f'{_DPR}data/retriever/nq-dev.qa.csv'),
  'trivia-test.qa.csv': Download(f'{_DPR}data/retriever/trivia-test.qa.csv.gz'),
  'trivia-dev.qa.csv': Download(f'{_DPR}data/retriever/trivia-dev.qa.csv.gz'),
}
for _set in ('webquestions', 'curatedtrec', 'squad1'):
  _file = f'{_set}-test.qa.csv'
  DOWNLOADS[_file] = Download(f'{_DPR}data/retriever/{_file}')
  for _split in ('train', 'dev'):
    _file = f'biencoder-{_set}-{_split}.json'
    DOWNLOADS[_file] = Download(f'{_DPR}data/retriever/{_file}.gz')


# Rows that files of the sources have, without a header. Those of the papers and
# of the registries; what is not here is not known.
ROWS = {
  'collection.tsv': 8_841_823,
  'qrels.train.tsv': 532_761,
  'queries.dev.small.tsv': 6_980,
  'qrels.dev.small.tsv': 7_437,
  'msmarco-docs.tsv': 3_213_835,
  'msmarco-doctrain-queries.tsv': 367_013,
  'msmarco-docdev-queries.tsv': 5_193,
  'psgs_w100.tsv': 21_015_324,
  'biencoder-nq-train.json': 58_880,
  'biencoder-nq-dev.json': 6_515,
  'nq-dev.qa.csv': 8_757,
  'nq-test.qa.csv': 3_610,
  'trivia-test.qa.csv': 11_313,
}


def say_rows(path, rows):
  """Prints a line if a file has not the rows that the source's has.

  Args:
    path: `pathlib.Path` of the file.
    rows: Rows that were read of it.
  """
  expected = ROWS.get(path.name.removesuffix('.gz'))
  if expected not in (None, rows):
    logs.say(f"{path}: {rows:,} rows; the source's has {expected:,}")


def existing(config, folder, name, what):
  """Returns the path of a file, plain or gzipped; with `--download` fetched.

  Args:
    config: The run's `Config`.
    folder: `pathlib.Path`.
    name: Name of the file, without .gz.
    what: What such a folder is called.

  Raises:
    BadInput: It is not there, or cannot be fetched.
  """
  if not records.find(folder, name) and config.download and name in DOWNLOADS:
    fetch(name, folder)
  return records.existing(folder, name, what, how(name))


def how(name):
  """Returns how a file can be had, as an imperative; '' if that is not known.

  Args:
    name: Name of the file, unpacked.
  """
  found = DOWNLOADS.get(name)
  if found is None:
    return ''
  size = f'{found.size / 1e6:,.1f} MB' if found.size else 'size not known'
  verb = 'unpack' if _is_archive(found) else 'fetch'
  return f'{verb} {found.url} ({size}), or set --download'


def fetch(name, folder):
  """Downloads a file into a folder: all of it is there afterwards, or none.

  What was fetched before is not fetched again. It lies in downloads/, and the
  file is a link to it, or one of an archive.

  Args:
    name: Name of the file, unpacked; a key of `DOWNLOADS`.
    folder: `pathlib.Path`.

  Raises:
    BadInput: It cannot be fetched, or has another checksum.
  """
  found = DOWNLOADS[name]
  manager = tfds.download.DownloadManager(download_dir=folder / 'downloads')
  logs.say(f'{name}: fetching {found.url}')
  try:
    path = pathlib.Path(manager.download(found.url))
  except Exception as error:  # Of requests, TFDS or the disk.
    reason = ' '.join(str(error).split())[:120]
    raise config_lib.BadInput(
      f'{found.url} must be there to be fetched; found that it is not '
      f'({reason}); put {name} into {folder} by hand.'
    ) from error
  if found.md5 is None:
    logs.say(f'{name}: no checksum of it is known')
  elif (md5 := _md5(path)) != found.md5:
    path.unlink()
    raise config_lib.BadInput(
      f'{found.url} must have the MD5 {found.md5}; found {md5}, and removed '
      'it; give the same command again.'
    )
  if _is_archive(found):
    _extract(path, name, folder)
    return
  if found.url.endswith('.gz'):
    name = f'{name}.gz'
  os.symlink(path.relative_to(folder), folder / name)


def _extract(path, name, folder):
  """Writes one file of an archive into a folder."""
  # Not by TFDS, which needs TensorFlow for it.
  with tarfile.open(path) as archive:
    members = [m for m in archive if m.name == name and m.isfile()]
    if not members:
      raise config_lib.BadInput(
        f'{path} must hold the file {name}; found none; fetch it by hand.'
      )
    with handoff.writing(folder / name) as file:
      shutil.copyfileobj(archive.extractfile(members[0]), file, _CHUNK)


def _is_archive(found):
  return found.url.endswith('.tar.gz')


def _md5(path):
  digest, size = hashlib.md5(usedforsecurity=False), path.stat().st_size
  with open(path, 'rb') as file:
    for chunk in logs.progress(
      iter(lambda: file.read(_CHUNK), b''),
      f'check {path.name}',
      total=size,
      unit='bytes',
      count=len,
    ):
      digest.update(chunk)
  return digest.hexdigest()
