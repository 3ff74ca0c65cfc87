"""What people bring is read here, strictly: lines, JSON, names of files.

What can be meant in one way only is taken, and a printed line counts it. All
else is refused in one sentence: file and line, rule, found value, cure.
"""

import collections
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
import zlib

import tqdm

from ance_jax import errors

# Bytes. The longest documents of MS MARCO have a few million; a few kilobytes
# of gzip can say that a line has billions.
MAX_LINE = 2**24
MAX_FILE = 2**26
# Python itself refuses to read a number of more than 4300.
_MAX_DIGITS = 300
_BOM, _GZIP = b'\xef\xbb\xbf', b'\x1f\x8b'
_KINDS = {dict: 'object', list: 'list'}


class _Refused(ValueError):
  """Rule, found value and cure of what a JSON text may not have."""


def bad(path, rule, found, cure, line=None):
  """Returns the `BadInput` of a file that cannot be used.

  Args:
    path: The file or folder.
    rule: What must be, as the beginning of a sentence.
    found: What is, for people; see `quoted`.
    cure: What to do, in the imperative.
    line: Number of the line, from 1, or None.
  """
  place = f'{path}, line {line}' if line else path
  return errors.BadInput(f'{place}: {rule}; found {found}; {cure}.')


def quoted(value):
  """Returns the beginning of a value in quotes, on one line."""
  return repr(value if isinstance(value, bytes) else str(value)[:80])[:120]


def regular(path):
  """Returns the path of a file that can be read to its end.

  Raises:
    BadInput: It is missing, a folder, a pipe or a device. Links are followed.
  """
  found = kind(path)
  if found != 'a file':
    raise bad(path, 'what is read must be a file', found, 'give one there')
  return pathlib.Path(path)


def kind(path):
  """Returns what a path is: 'a file', 'a folder', 'nothing', or another.

  Raises:
    OSError: It cannot be known, as a folder above it may not be read.
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


def inside(folder, name, named_by):
  """Returns the path in `folder` that a file of it names.

  Args:
    folder: Path of the folder.
    name: What the file says; anything that JSON can hold.
    named_by: Path of the file.

  Raises:
    BadInput: It is no name, or leads out of the folder.
  """
  usable = isinstance(name, str) and '\0' not in name and '\\' not in name
  parts = pathlib.PurePosixPath(name).parts if usable else ('/',)
  if '..' in parts or parts[:1] == ('/',):
    raise bad(
      named_by,
      'a file that is named must lie in the same folder',
      quoted(name),
      'put it there, and name it without / in front and without ..',
    )
  return pathlib.Path(folder).joinpath(*parts)


@contextlib.contextmanager
def opened(path, line=lambda: None):
  """Opens a file to read bytes; a name that ends in .gz is unzipped.

  Args:
    path: The file.
    line: Function that gives the line that is read, for a message, or None.

  Yields:
    The file as it lies on disk, and what is in it.

  Raises:
    BadInput: It is no file, or not the kind that its name says, or its end is
      missing; the last also from within the block.
  """
  path = regular(path)
  try:
    with open(path, 'rb') as raw:
      _check_zipped(path, raw.peek(2)[:2] == _GZIP)
      yield raw, gzip.open(raw) if path.suffix == '.gz' else raw
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise bad(
      path, 'a gzipped file must be whole', f'it damaged ({error})',
      'fetch it again', line()
    ) from error  # fmt: skip


def bytes_since(raw):
  """Returns count(item): the bytes that were read since it was last called."""
  place = 0

  def count(_):
    nonlocal place
    before, place = place, raw.tell()
    return place - before

  return count


def lines(path, progress=None):
  """Yields (line number, text) of the lines of a file that are not empty.

  A name that ends in .gz is unzipped. A byte order mark, line ends of Windows
  and empty lines are taken away, and counted in a printed line.

  Args:
    path: Path of the file.
    progress: progress(items, total=..., count=...) -> items, which shows how
      many bytes were read; or None.

  Raises:
    BadInput: It is no file of text lines.
  """
  path, counts, number = regular(path), collections.Counter(), 0
  with opened(path, lambda: number + 1) as (raw, file):
    chunks = iter(functools.partial(file.readline, MAX_LINE + 1), b'')
    if progress:
      size = path.stat().st_size
      chunks = progress(chunks, total=size, count=bytes_since(raw))
    for number, chunk in enumerate(chunks, 1):
      text = _line(chunk, path, number, counts)
      if text:
        yield number, text
  if counts:
    changes = ', '.join(f'{n:,} {what}' for what, n in counts.items())
    tqdm.tqdm.write(f'{path}: {changes}')


def unquoted(path, number, text):
  """Returns the cells of a line with tabs between, some in double quotes.

  Raises:
    BadInput: A quote is not closed.
  """
  # Else csv takes no cell above 131,072 characters.
  csv.field_size_limit(MAX_LINE)
  try:
    (cells,) = csv.reader([text], delimiter='\t', strict=True)
  except csv.Error as error:
    raise bad(
      path, 'a cell that begins with a quote must end with one in its line, '
      'and have those inside it twice', f'{quoted(text)} ({error})',
      'fetch the file again', number
    ) from error  # fmt: skip
  return cells


def json_value(text, path, line=None):
  """Returns what a JSON text says, if it says it in one way only.

  Args:
    text: The text.
    path: Path of the file that it is from.
    line: Its line there, or None if it is all of the file.

  Raises:
    BadInput: It is no JSON, or what Python reads but others do not: NaN,
      infinity, a key that stands twice, nesting without end.
  """
  try:
    return _DECODER.decode(text)
  except json.JSONDecodeError as error:
    found = quoted(text) if line else error.msg
    raise bad(
      path, f'a {"line" if line else "file"} must be one JSON value', found,
      'mend it', line or error.lineno
    ) from error  # fmt: skip
  except _Refused as error:
    raise bad(path, *error.args, line) from error
  except RecursionError as error:
    raise bad(
      path, 'JSON must be nested less than a thousand deep',
      quoted(text[:40]), 'make it flat', line
    ) from error  # fmt: skip


def json_file(path, kind=dict):
  """Returns the dict, or the list, that a JSON file holds.

  Raises:
    BadInput: It does not.
  """
  path = regular(path)
  with open(path, 'rb') as file:
    data = file.read(MAX_FILE + 1)
  if len(data) > MAX_FILE:
    raise bad(
      path, f'a JSON file must have at most {MAX_FILE:,} bytes', 'more',
      'give the right file'
    )  # fmt: skip
  if data.startswith(_BOM):
    raise bad(
      path, 'a JSON file must have no byte order mark', 'one',
      'save it as plain UTF-8'
    )  # fmt: skip
  value = json_value(_decoded(data, path), path)
  if not isinstance(value, kind):
    raise bad(
      path, f'a file must be a JSON {_KINDS[kind]}',
      f'{type(value).__name__} {quoted(value)}', 'give the right file'
    )  # fmt: skip
  return value


def _check_zipped(path, is_zipped):
  if is_zipped != (path.suffix == '.gz'):
    raise bad(
      path, 'a gzipped file, and no other, must have a name in .gz',
      'a gzipped one' if is_zipped else 'one that is not gzipped', 'rename it'
    )  # fmt: skip


def _line(chunk, path, number, counts):
  """Returns the text of a line, '' for one of spaces; counts what was off."""
  if len(chunk) > MAX_LINE:
    raise bad(
      path, f'a line must have at most {MAX_LINE:,} bytes',
      f'more, beginning {quoted(chunk[:40])}', 'split it', number
    )  # fmt: skip
  if number == 1 and chunk.startswith(_BOM):
    chunk = chunk[len(_BOM) :]
    counts['byte order mark removed'] += 1
  text = _decoded(chunk, path, number).removesuffix('\n')
  if text.endswith('\r'):
    text = text[:-1]
    counts['line ends of Windows (CRLF) read as LF'] += 1
  for character, name in (('\0', 'NUL'), ('\r', 'carriage return')):
    if character in text:
      raise bad(
        path, f'a line must have no {name} in it', quoted(text[:60]),
        'write the file as UTF-8 text with an LF behind each line', number
      )  # fmt: skip
  if not text or text.isspace():
    counts['empty lines left out'] += 1
    return ''
  return text


def _decoded(data, path, line=None):
  cure = 'convert the file'
  if path.suffix == '.gz':
    cure = 'fetch it again, or convert it'
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    place = error.start
    wrong, before = data[place : place + 4], data[max(place - 30, 0) : place]
    raise bad(
      path, 'text must be UTF-8', f'{wrong!r} behind {before!r}',
      cure, line or data.count(b'\n', 0, place) + 1
    ) from error  # fmt: skip


def _once(pairs):
  value = dict(pairs)
  if len(value) < len(pairs):
    keys = collections.Counter(key for key, _ in pairs)
    raise _Refused(
      'a key must stand once in a JSON object',
      quoted(keys.most_common(1)[0][0]),
      'remove one',
    )
  return value


def _whole_number(digits):
  if len(digits) > _MAX_DIGITS:
    raise _Refused(
      f'a number must have at most {_MAX_DIGITS} digits',
      f'{len(digits):,}',
      'quote it if it is a text',
    )
  return int(digits)


def _number(digits):
  value = float(digits)
  if math.isinf(value):
    raise _not_finite(digits)
  return value


def _constant(name):
  raise _not_finite(name)


def _not_finite(name):
  return _Refused(
    'a number must be finite', quoted(name), 'quote it, or mend it'
  )


_DECODER = json.JSONDecoder(
  object_pairs_hook=_once,
  parse_int=_whole_number,
  parse_float=_number,
  parse_constant=_constant,
)
