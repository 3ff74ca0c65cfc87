"""Cases of bad input, and functions that corrupt files."""

from collections.abc import Callable
import contextlib
import gzip
import json
import os
import shutil
from typing import NamedTuple

import pytest

from ance_jax import errors


class Refused(NamedTuple):
  """Input that must be rejected with a one-sentence error.

  Attributes:
    make: make(folder) corrupts the valid input in a folder, and returns the
      settings to change, or None.
    says: Text that the error must contain.
    file: File whose path must begin the error, or ''.
    line: Line number that the error must name, or None.
  """

  make: Callable
  says: str
  file: str = ''
  line: int | None = None


class Accepted(NamedTuple):
  """Input that must be accepted.

  Attributes:
    make: As for `Refused`.
    says: Text that a log line must contain; '' if nothing was skipped or
      changed.
  """

  make: Callable
  says: str = ''


def settings(**changes):
  """Returns a `make` that changes settings and no files."""
  return lambda folder: changes


def append(name, data):
  """Returns a `make` that appends text or bytes to a file."""

  def make(folder):
    with open(folder / name, 'ab') as file:
      file.write(_bytes(data))

  return make


def put(name, data, **changes):
  """Returns a `make` that overwrites a file."""

  def make(folder):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(_bytes(data))
    return changes

  return make


def put_json(name, value):
  """Returns a `make` that overwrites a JSON file."""
  return put(name, json.dumps(value))


def change_json(name, *without, **values):
  """Returns a `make` that sets `values` in a JSON file and drops `without`."""

  def make(folder):
    old = json.loads((folder / name).read_text())
    new = {k: v for k, v in {**old, **values}.items() if k not in without}
    (folder / name).write_text(json.dumps(new))

  return make


def edit(name, change):
  """Returns a `make` that applies `change` to a file's bytes."""

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
  """Returns a `make` that gzips a file and applies `change` to the result."""

  def make(folder):
    path = folder / name
    data = change(gzip.compress(path.read_bytes()))
    path.unlink()
    (folder / f'{name}.gz').write_bytes(data)

  return make


def link(name, target):
  """Returns a `make` that replaces a file by a symbolic link."""

  def make(folder):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)

  return make


def pipe(name):
  """Returns a `make` that replaces a file by a pipe without a writer."""

  def make(folder):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)

  return make


def folder_as(name):
  """Returns a `make` that replaces a file by a folder."""

  def make(folder):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()

  return make


def together(*makes):
  """Returns a `make` that runs `makes` and returns the last one's settings."""
  return lambda folder: [make(folder) for make in makes][-1]


def _bytes(data):
  return data if isinstance(data, bytes) else data.encode()


def refused(says):
  """Expects a refusal that says so; none if `says` is empty or None."""
  if not says:
    return contextlib.nullcontext()
  return pytest.raises(errors.BadInput, match=says)
