"""What a case is, and hands that spoil files."""

from collections.abc import Callable
import gzip
import json
import os
import shutil
from typing import NamedTuple


class Refused(NamedTuple):
  """Input that is refused in one sentence.

  Attributes:
    make: make(folder) spoils the sound input there, and returns settings that
      differ from the sound ones, or None.
    says: What the sentence must say.
    file: What it must begin with, to the name of the file, or ''.
    line: The line that it must name, or None.
  """

  make: Callable
  says: str
  file: str = ''
  line: int | None = None


class Accepted(NamedTuple):
  """Input that is used.

  Attributes:
    make: As for `Refused`.
    says: What a printed line must say; '' where nothing was left out or
      changed.
  """

  make: Callable
  says: str = ''


def settings(**changes):
  """Returns a `make` that leaves the files as they are."""
  return lambda folder: changes


def append(name, data):
  """Returns a `make` that writes text or bytes behind a file."""

  def make(folder):
    with open(folder / name, 'ab') as file:
      file.write(_bytes(data))

  return make


def put(name, data, **changes):
  """Returns a `make` that writes a file anew."""

  def make(folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(_bytes(data))
    return changes

  return make


def put_json(name, value):
  """Returns a `make` that writes a JSON file anew."""
  return put(name, json.dumps(value))


def change_json(name, *without, **values):
  """Returns a `make` that sets some keys of a JSON file, and drops others."""

  def make(folder):
    old = json.loads((folder / name).read_text())
    new = {k: v for k, v in {**old, **values}.items() if k not in without}
    (folder / name).write_text(json.dumps(new))

  return make


def edit(name, change):
  """Returns a `make` that puts change(bytes) in place of a file's bytes."""

  def make(folder):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))

  return make


def remove(*names):
  """Returns a `make` that removes files or folders."""

  def make(folder):
    for name in names:
      path = folder / name
      shutil.rmtree(path) if path.is_dir() else path.unlink()

  return make


def rename(old, new):
  """Returns a `make` that renames a file."""
  return lambda folder: (folder / old).rename(folder / new) and None


def zipped(name, change=lambda data: data):
  """Returns a `make` that gzips a file, and changes the bytes of that."""

  def make(folder):
    path = folder / name
    data = change(gzip.compress(path.read_bytes()))
    path.unlink()
    (folder / f'{name}.gz').write_bytes(data)

  return make


def link(name, target):
  """Returns a `make` that puts a link in place of a file."""

  def make(folder):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)

  return make


def pipe(name):
  """Returns a `make` that puts a pipe, which nobody writes, in place."""

  def make(folder):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)

  return make


def folder_as(name):
  """Returns a `make` that puts a folder in place of a file."""

  def make(folder):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()

  return make


def together(*makes):
  """Returns a `make` of several, the settings of the last."""
  return lambda folder: [make(folder) for make in makes][-1]


def _bytes(data):
  return data if isinstance(data, bytes) else data.encode()
