"""Folders, ids, texts and judgements, as the readers of datasets take them."""

import collections
import functools
import itertools
import os
import pathlib
import re

import ijson

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.data import registry

# Characters.
_LONGEST_ID = 500
_MOST_GRADE = 1000
# Bytes of a file by which an array is told from lines.
_PEEKED = 4096


def open_folder(config, first):
  """Returns `--data_dir` as a `pathlib.Path`.

  Args:
    config: The run's `Config`.
    first: Name of a file that the folder of such a dataset holds.

  Raises:
    BadInput: It is not given, or no folder.
  """
  path = config.data_dir
  if not path:
    raise errors.BadInput(
      f'--dataset={config.dataset} must be told where the data is; found no '
      f'--data_dir; set it to the folder that holds {first}.'
    )
  if config.download:
    atomic.make_folder(path)
  if (found := strict_io.kind(path)) != 'a folder':
    raise errors.BadInput(
      f'--data_dir must be a folder; found {found} at {path}; set it to the '
      f'folder that holds {first}.'
    )
  return pathlib.Path(path)


def find(folder, name):
  """Returns the path of a file, plain or gzipped, or None."""
  paths = [folder / name, folder / f'{name}.gz']
  there = [path for path in paths if _is_there(path)]
  if len(there) == 2:
    logs.say(f'{there[0]}: 1 of 2 files is read, not {there[1].name}')
  return strict_io.regular(there[0]) if there else None


def _is_there(path):
  """Returns whether a name is taken; raises OSError where none may look."""
  try:
    os.lstat(path)
  except (FileNotFoundError, NotADirectoryError):
    return False
  return True


def existing(folder, name, what, source=''):
  """Returns the path of a file, plain or gzipped.

  Args:
    folder: `pathlib.Path`.
    name: Name of the file, without .gz.
    what: What such a folder is called.
    source: Where the file can be had, as an imperative, or ''.

  Raises:
    BadInput: There is none.
  """
  path = find(folder, name)
  if path is None:
    below = [p.parent for p in itertools.islice(folder.glob(f'*/{name}*'), 1)]
    cure = source or 'check --data_dir'
    cure = f'set --data_dir={below[0]}' if below else cure
    names = ', '.join(sorted(os.listdir(folder))[:8]) or 'nothing'
    raise errors.BadInput(
      f'{what} must hold {name} or {name}.gz; found neither in {folder}, but '
      f'{names}; {cure}.'
    )
  return path


def json_lines(path, form, what=None):
  """Yields (line number, dict) of a JSON lines file.

  Args:
    path: Path of the file.
    form: What a line is like, for people.
    what: Name of the phase for a progress bar, or None for no bar.
  """
  progress = functools.partial(logs.progress, what=what, unit='bytes')
  for number, line in strict_io.lines(path, progress if what else None):
    record = strict_io.json_value(line, path, number)
    if not isinstance(record, dict):
      raise strict_io.bad(
        path, 'a line must be a JSON object', strict_io.quoted(line),
        f'give each line as {form}', number
      )  # fmt: skip
    yield number, record


def json_array(path, what='questions'):
  """Yields (number, item) of a JSON array, which need not fit in memory.

  Args:
    path: `pathlib.Path` of the file.
    what: What it is an array of, for people.
  """
  with strict_io.opened(path) as (raw, file):
    try:
      yield from enumerate(
        logs.progress(
          ijson.items(file, 'item', use_float=True),
          f'read {path.name}',
          total=path.stat().st_size,
          unit='bytes',
          count=strict_io.bytes_since(raw),
        ),
        1,
      )
    except (ijson.JSONError, UnicodeDecodeError) as error:
      raise strict_io.bad(
        path, f'a file must be a whole JSON array of {what}',
        ' '.join(str(error).split())[:80], 'fetch it again'
      ) from error  # fmt: skip


def objects(path, form):
  """Yields (number, dict) of JSON lines, or of a JSON array of objects.

  Args:
    path: `pathlib.Path` of the file.
    form: What an object is like, for people.
  """
  with strict_io.opened(path) as (_, file):
    is_array = re.match(rb'(\xef\xbb\xbf)?\s*\[\s*\{', file.read(_PEEKED))
  if not is_array:
    yield from json_lines(path, form, f'read {path.name}')
    return
  for number, item in json_array(path, 'objects'):
    if not isinstance(item, dict):
      raise strict_io.bad(
        path, f'item {number} must be an object', strict_io.quoted(item),
        f'give each as {form}'
      )  # fmt: skip
    yield number, item


def text(path, line, record, key, counts):
  """Returns the text of a record, '' for null; counts what it cannot keep."""
  if key in record and record[key] is None:
    counts[f'times null as {key!r}, read as empty'] += 1
    return ''
  found = string(path, line, record, key)
  try:
    found.encode()
  except UnicodeEncodeError:
    counts['texts with half a surrogate pair, read as ?'] += 1
  return found


def an_id(path, line, record, counts, key='_id'):
  """Returns the id of a record: a string, or the digits of a whole number.

  Instead of '_id' it may be under 'id', as MTEB has it.
  """
  if key == '_id' and key not in record and 'id' in record:
    key = 'id'
    counts["lines with 'id' for '_id'"] += 1
  found = record.get(key)
  if isinstance(found, int) and not isinstance(found, bool):
    counts['ids that are numbers, read as their digits'] += 1
    return str(found)
  return string(path, line, record, key)


def string(path, line, record, key):
  """Returns the string that a record has under a key."""
  if key not in record:
    raise strict_io.bad(
      path, f'a line must have a string {key!r}', keys_of(record),
      f'name it {key}', line
    )  # fmt: skip
  if not isinstance(record[key], str):
    raise strict_io.bad(
      path, f'a line must have as {key!r} a string', repr(record[key])[:80],
      as_string(record[key]), line
    )  # fmt: skip
  return record[key]


def as_string(value):
  """Returns how to make a string of a JSON value, in the imperative."""
  cures = {list: 'join its parts into one', dict: 'give its text alone'}
  return cures.get(type(value), 'quote it')


def keys_of(record):
  """Returns the keys of a record, for people."""
  shown = ', '.join(map(strict_io.quoted, list(record)[:8]))
  return f'the keys {shown or "none"}'


def check_id(path, line, an_id, ids):
  """Raises `BadInput` if an id cannot be one.

  Args:
    path: The file.
    line: Number of its line there.
    an_id: The id, a string.
    ids: {id: line} of those before; it is not added.
  """
  if len(an_id) > _LONGEST_ID:
    raise strict_io.bad(
      path, f'an id must have at most {_LONGEST_ID} characters',
      f'{len(an_id):,}, beginning {an_id[:20]!r}', 'shorten it', line
    )  # fmt: skip
  if not an_id or not an_id.isprintable() or an_id != ''.join(an_id.split()):
    raise strict_io.bad(
      path,
      'an id must have characters, none of them a space (run files are '
      'split there) or invisible',
      strict_io.quoted(an_id),
      'rename it wherever it stands, perhaps with _ for each space',
      line,
    )
  if an_id in ids:
    raise strict_io.bad(
      path, 'ids must differ',
      f'{an_id!r} in lines {ids[an_id]} and {line}', 'remove one'
    )  # fmt: skip


def corpus(path, writer, lines, expected=None):
  """Returns the `corpus.Corpus` of what was read of a file.

  Args:
    path: The file.
    writer: `corpus.CorpusWriter` that has its passages.
    lines: Line of each of them there.
    expected: As for `say_rows`.

  Raises:
    BadInput: There are none, or an id stands twice.
  """
  check_any(path, writer)
  made = writer.done()
  if found := made.rows.repeated():
    first, second = found
    raise strict_io.bad(
      path, 'ids must differ', f'{made.ids[first]!r} in lines '
      f'{lines[first]} and {lines[second]}', 'remove one'
    )  # fmt: skip
  say_rows(path, len(lines), expected)
  return made


def say_rows(path, rows, expected=None):
  """Prints a line if a file has not the rows that the source's has.

  Args:
    path: `pathlib.Path` of the file.
    rows: Rows that were read of it.
    expected: Rows of the source's; None: those of a file of that name, if it
      has a row in `registry.ROWS`.
  """
  if expected is None:
    expected = registry.ROWS.get(path.name.removesuffix('.gz'))
  if expected not in (None, rows):
    logs.say(f"{path}: {rows:,} rows; the source's has {expected:,}")


def row(path, line, kind, rows, an_id):
  """Returns the row of an id; `kind` names it for people."""
  if an_id not in rows:
    near = an_id.strip()
    cure = 'add it, or remove the line'
    if kind == 'judged query':
      cure = 'add it to the queries, or remove the line (BEIR stops at it, too)'
    if near in rows:
      cure = 'remove the spaces around it'
    raise strict_io.bad(
      path, f'a {kind} id must be one of the data',
      strict_io.quoted(an_id), cure, line
    )  # fmt: skip
  return rows[an_id]


def grade(path, number, text, counts):
  """Returns the grade, an int, that a file has in a line.

  Args:
    path: The file.
    number: Number of the line.
    text: What it has as grade; 1.0 is 1.
    counts: Counter of what is taken otherwise.
  """
  whole = re.fullmatch(r'([+-]?[0-9]+)(\.0*)?', text.strip())
  if not whole:
    raise strict_io.bad(
      path, 'a grade must be a whole number', strict_io.quoted(text),
      'mend the line', number
    )  # fmt: skip
  counts['grades with a decimal point, such as 1.0, read as whole numbers'] += (
    whole[2] is not None
  )
  # Python does not read a number of more than 4300 digits.
  if len(whole[1]) > 9 or abs(int(whole[1])) > _MOST_GRADE:
    raise strict_io.bad(
      path, f'a grade must be from -{_MOST_GRADE} to {_MOST_GRADE}',
      strict_io.quoted(text), 'mend the line', number
    )  # fmt: skip
  return int(whole[1])


class Judgements:
  """The judgements of a file, in its order."""

  def __init__(self, path, query_rows, passage_rows):
    """Makes an empty one.

    Args:
      path: The file.
      query_rows: {query id: row}.
      passage_rows: {passage id: row}, or `strings.Rows`.
    """
    self._path, self._pairs, self._counts = path, {}, collections.Counter()
    self._query_rows, self._passage_rows = query_rows, passage_rows

  def __len__(self):
    return len(self._pairs)

  def add(self, line, query_id, passage_id, given):
    """Adds the judgement of a line.

    Args:
      line: Number of the line.
      query_id: Id of a query.
      passage_id: Id of a passage, which the corpus may lack.
      given: The grade, as the file has it.

    Raises:
      BadInput: The query is unknown, the grade is none, or the pair has
        another one.
    """
    number = grade(self._path, line, given, self._counts)
    query = row(self._path, line, 'judged query', self._query_rows, query_id)
    passage = self._passage_rows.get(passage_id)
    if passage is None and passage_id.strip() in self._passage_rows:
      row(self._path, line, 'judged passage', self._passage_rows, passage_id)
    pair = query, passage_id if passage is None else passage
    self._counts['judgements that stand twice, read once'] += (
      pair in self._pairs
    )
    before = self._pairs.setdefault(pair, number)
    if before != number:
      raise strict_io.bad(
        self._path, 'a pair must have one grade', f'{before} and {number}',
        'keep one of the two', line
      )  # fmt: skip

  def done(self):
    """Returns them as `corpus.Judged` has them, and prints what was counted.

    Returns:
      {(query row, passage row): grade}, and {(query row, passage id): grade} of
      passages that the corpus lacks.
    """
    say_counts(self._path, +self._counts)
    there, missing = {}, {}
    for pair, number in self._pairs.items():
      (missing if isinstance(pair[1], str) else there)[pair] = number
    return there, missing


def say_corpus(name, corpus):
  """Prints the size of a corpus, its duplicates and its hash."""
  size = len(corpus.ids)
  logs.say(
    f'{name}: {size:,} passages, {size - corpus.groups.max() - 1:,} of them '
    f'the same text as another, hash {corpus.hash[:12]}'
  )


def say_counts(path, counts):
  """Prints {what was taken otherwise: number} of a file."""
  for what, number in counts.items():
    logs.say(f'{path}: {number:,} {what}')


def check_any(path, items):
  """Raises `BadInput` if a file held nothing."""
  if not items:
    raise strict_io.bad(
      path, 'a file must have a line', 'none', 'fetch it again'
    )  # fmt: skip
