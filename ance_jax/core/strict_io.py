"""Strict reading of user files: text lines, JSON and file names.

Input with only one possible meaning is accepted, and a printed line counts the
corrections. Everything else is rejected in one sentence with file and line,
rule, value and cure.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import csv
import errno
import functools
import gzip
import json
import math
import os
import pathlib
import stat
from typing import Any
from typing import BinaryIO
import zlib

import tqdm

from ance_jax import errors

# Bytes. The longest documents of MS MARCO have a few million. A few kilobytes
# of gzip can expand to a line of billions.
MAX_LINE = 2**24
MAX_FILE = 2**26
# Python itself rejects numbers of more than 4300 digits.
_MAX_DIGITS = 300
_BOM, _GZIP = b'\xef\xbb\xbf', b'\x1f\x8b'
_KINDS = {dict: 'object', list: 'list'}


class _Refused(ValueError):
  """Fact and cure of a JSON text that is rejected."""


def refusal(
  path: str | os.PathLike, fact: str, cure: str, line: int | None = None
) -> errors.BadInput:
  """Returns the `BadInput` for a file that cannot be used.

  Args:
    path: The file or folder.
    fact: What is wrong, with the rule if the fact does not say it.
    cure: What to do, in the imperative.
    line: Line number, from 1.
  """
  return errors.refusal(
    fact, cure, f'{path}, line {line}: ' if line else f'{path}: '
  )


def quoted(value: Any) -> str:
  """Returns the beginning of a value, quoted, on one line."""
  return repr(value if isinstance(value, bytes) else str(value)[:80])[:120]


def regular(path: str | os.PathLike) -> pathlib.Path:
  """Returns the path of a regular file; follows links.

  Raises:
    BadInput: It is missing, a folder, a pipe or a device.
  """
  if (found := kind(path)) != 'a file':
    raise refusal(
      path, f'there is {found}, and a file is needed', 'give one there'
    )
  return pathlib.Path(path)


def kind(path: str | os.PathLike) -> str:
  """Returns the kind of a path: 'a file', 'a folder', 'nothing' or another.

  Raises:
    OSError: The kind is unknown, because a parent folder is not readable.
  """
  try:
    mode = os.stat(path).st_mode
  except (FileNotFoundError, NotADirectoryError):
    return 'nothing'
  except OSError as error:
    if error.errno != errno.ELOOP:
      raise
    return 'a link to itself'
  if stat.S_ISREG(mode):
    return 'a file'
  return 'a folder' if stat.S_ISDIR(mode) else 'a pipe, socket or device'


def inside(
  folder: str | os.PathLike, name: Any, named_by: str | os.PathLike
) -> pathlib.Path:
  """Returns the path of a file in `folder` that another file names.

  Args:
    folder: Path of the folder.
    name: The name as parsed from JSON; may be of any type.
    named_by: Path of the file with the name.

  Raises:
    BadInput: The name is not a string or leads out of the folder.
  """
  usable = isinstance(name, str) and '\0' not in name and '\\' not in name
  parts = pathlib.PurePosixPath(name).parts if usable else ('/',)
  if '..' in parts or parts[:1] == ('/',):
    raise refusal(
      named_by,
      f'{quoted(name)} is not a path within the same folder',
      'put the file there, and name it without / in front and without ..',
    )
  return pathlib.Path(folder).joinpath(*parts)


@contextlib.contextmanager
def opened(
  path: str | os.PathLike, line: Callable[[], int | None] = lambda: None
) -> Iterator[tuple[BinaryIO, BinaryIO]]:
  """Opens a file to read bytes; decompresses it if its name ends in .gz.

  Args:
    path: The file.
    line: Returns the current line number for error messages, or None.

  Yields:
    (file on disk, decompressed file).

  Raises:
    BadInput: It is not a file, its content does not match its suffix, or it is
      truncated; the last is also raised from within the block.
  """
  path = regular(path)
  try:
    with open(path, 'rb') as raw:
      _check_zipped(path, raw.peek(2)[:2] == _GZIP)
      yield raw, gzip.open(raw) if path.suffix == '.gz' else raw
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise refusal(
      path, f'the gzipped data is damaged ({error})', 'fetch it again', line()
    ) from error


def bytes_since(raw: BinaryIO) -> Callable[[Any], int]:
  """Returns count(item): the bytes of `raw` read since the previous call."""
  place = 0

  def count(_):
    nonlocal place
    before, place = place, raw.tell()
    return place - before

  return count


def lines(
  path: str | os.PathLike, progress: Callable | None = None
) -> Iterator[tuple[int, str]]:
  """Yields (line number, text) of the non-empty lines of a text file.

  Decompresses a name in .gz. Strips the byte order mark, Windows line ends and
  empty lines, and prints how many.

  Args:
    path: Path of the file.
    progress: progress(items, total=..., count=...) -> items, which shows how
      many bytes were read; or None.

  Raises:
    BadInput: It is not a file of text lines.
  """
  path, counts, number = regular(path), collections.Counter(), 0
  with opened(path, lambda: number + 1) as (raw, file):
    chunks = iter(functools.partial(file.readline, MAX_LINE + 1), b'')
    if progress:
      chunks = progress(
        chunks, total=path.stat().st_size, count=bytes_since(raw)
      )
    for number, chunk in enumerate(chunks, 1):
      if text := _line(chunk, path, number, counts):
        yield number, text
  if counts:
    changes = ', '.join(f'{n:,} {what}' for what, n in counts.items())
    tqdm.tqdm.write(f'{path}: {changes}')


def unquoted(path: str | os.PathLike, number: int, text: str) -> list[str]:
  """Splits a tab-separated line whose cells may be in double quotes.

  Raises:
    BadInput: A quote is not closed.
  """
  # csv rejects cells above 131,072 characters by default.
  csv.field_size_limit(MAX_LINE)
  try:
    (cells,) = csv.reader([text], delimiter='\t', strict=True)
  except csv.Error as error:
    raise refusal(
      path,
      f'a quoted cell does not end with its quote in {quoted(text)} ({error})',
      'fetch the file again, or write quotes inside a quoted cell twice',
      number,
    ) from error
  return cells


def json_value(
  text: str, path: str | os.PathLike, line: int | None = None
) -> Any:
  """Parses a JSON text, rejecting anything ambiguous.

  Args:
    text: The text.
    path: Path of its file.
    line: Its line number there; None if it is the whole file.

  Raises:
    BadInput: It is not JSON, or only Python reads it: NaN, infinity, a repeated
      key, unlimited nesting.
  """
  try:
    return _DECODER.decode(text)
  except json.JSONDecodeError as error:
    raise refusal(
      path,
      f'not one JSON value ({quoted(text) if line else error.msg})',
      'correct it',
      line or error.lineno,
    ) from error
  except _Refused as error:
    raise refusal(path, *error.args, line) from error
  except RecursionError as error:
    raise refusal(
      path,
      f'JSON is nested a thousand deep or more: {quoted(text[:40])}',
      'make it flat',
      line,
    ) from error


def json_file(path: str | os.PathLike, kind: type = dict) -> Any:
  """Returns the content of a JSON file.

  Args:
    path: The file.
    kind: Expected type, dict or list.

  Raises:
    BadInput: It is not a JSON file of that type.
  """
  path = regular(path)
  with open(path, 'rb') as file:
    data = file.read(MAX_FILE + 1)
  if len(data) > MAX_FILE:
    raise refusal(
      path, f'the file has more than {MAX_FILE:,} bytes', 'give the right file'
    )
  if data.startswith(_BOM):
    raise refusal(
      path, 'the file begins with a byte order mark', 'save it as plain UTF-8'
    )
  value = json_value(_decoded(data, path), path)
  if not isinstance(value, kind):
    raise refusal(
      path,
      f'{quoted(value)} is not a JSON {_KINDS[kind]}',
      'give the right file',
    )
  return value


def _check_zipped(path, is_zipped):
  if is_zipped != (path.suffix == '.gz'):
    fact = (
      'gzipped, and its name does not end in .gz'
      if is_zipped
      else 'not gzipped, and its name ends in .gz'
    )
    raise refusal(path, fact, 'rename it')


def _line(chunk, path, number, counts):
  """Returns the text of a line, '' for a blank one; counts corrections."""
  if len(chunk) > MAX_LINE:
    raise refusal(
      path,
      f'more than {MAX_LINE:,} bytes, beginning {quoted(chunk[:40])}',
      'split the line',
      number,
    )
  if number == 1 and chunk.startswith(_BOM):
    chunk = chunk[len(_BOM) :]
    counts['byte order mark removed'] += 1
  text = _decoded(chunk, path, number).removesuffix('\n')
  if text.endswith('\r'):
    text = text[:-1]
    counts['line ends of Windows (CRLF) read as LF'] += 1
  for character, name in (('\0', 'NUL'), ('\r', 'carriage return')):
    if character in text:
      raise refusal(
        path,
        f'a {name} is in {quoted(text[:60])}',
        'write the file as UTF-8 text with an LF at the end of each line',
        number,
      )
  if not text or text.isspace():
    counts['empty lines left out'] += 1
    return ''
  return text


def _decoded(data, path, line=None):
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    place = error.start
    wrong, before = data[place : place + 4], data[max(place - 30, 0) : place]
    raise refusal(
      path,
      f'{wrong!r} after {before!r} is not UTF-8',
      'fetch it again, or convert it'
      if path.suffix == '.gz'
      else 'convert the file',
      line or data.count(b'\n', 0, place) + 1,
    ) from error


def _once(pairs):
  value = dict(pairs)
  if len(value) < len(pairs):
    ((key, number),) = collections.Counter(k for k, _ in pairs).most_common(1)
    raise _Refused(
      f'the key {quoted(key)} is {number} times in a JSON object', 'keep one'
    )
  return value


def _whole_number(digits):
  if len(digits) > _MAX_DIGITS:
    raise _Refused(
      f'a number has {len(digits):,} digits, more than {_MAX_DIGITS}',
      'quote it if it is a text',
    )
  return int(digits)


def _number(digits):
  value = float(digits)
  if not math.isfinite(value):
    raise _Refused(
      f'{quoted(digits)} is not a finite number', 'quote it, or correct it'
    )
  return value


_DECODER = json.JSONDecoder(
  object_pairs_hook=_once,
  parse_int=_whole_number,
  parse_float=_number,
  parse_constant=_number,
)
