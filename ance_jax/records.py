"""Folders, ids, texts and judgements, as the readers of datasets take them."""

import functools
import itertools
import os
import pathlib
import re

from ance_jax import config as config_lib
from ance_jax import handoff
from ance_jax import logs
from ance_jax import reading
from ance_jax import registry

# Characters.
_LONGEST_ID = 500
_MOST_GRADE = 1000


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
    raise config_lib.BadInput(
      f'--dataset={config.dataset} must be told where the data is; found no '
      f'--data_dir; set it to the folder that holds {first}.'
    )
  if config.download:
    handoff.make_folder(path)
  if not os.path.isdir(path):
    found = 'a file' if os.path.exists(path) else 'nothing'
    raise config_lib.BadInput(
      f'--data_dir must be a folder; found {found} at {path}; set it to the '
      f'folder that holds {first}.'
    )
  return pathlib.Path(path)


def find(folder, name):
  """Returns the path of a file, plain or gzipped, or None."""
  paths = [folder / name, folder / f'{name}.gz']
  there = [path for path in paths if os.path.lexists(path)]
  if len(there) == 2:
    logs.say(f'{there[0]}: 1 of 2 files is read, not {there[1].name}')
  return reading.regular(there[0]) if there else None


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
    raise config_lib.BadInput(
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
  for number, line in reading.lines(path, progress if what else None):
    record = reading.json_value(line, path, number)
    if not isinstance(record, dict):
      raise reading.bad(
        path, 'a line must be a JSON object', reading.quoted(line),
        f'give each line as {form}', number
      )  # fmt: skip
    yield number, record


def text(path, line, record, key, counts):
  """Returns the text of a record, and counts what it cannot keep of it."""
  found = string(path, line, record, key)
  try:
    found.encode()
  except UnicodeEncodeError:
    counts['texts with half a surrogate pair, read as ?'] += 1
  return found


def string(path, line, record, key):
  """Returns the string that a record has under a key."""
  if key not in record:
    raise reading.bad(
      path, f'a line must have a string {key!r}', keys_of(record),
      f'name it {key}', line
    )  # fmt: skip
  if not isinstance(record[key], str):
    raise reading.bad(
      path, f'a line must have as {key!r} a string', repr(record[key])[:80],
      'quote it', line
    )  # fmt: skip
  return record[key]


def keys_of(record):
  """Returns the keys of a record, for people."""
  shown = ', '.join(map(reading.quoted, list(record)[:8]))
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
    raise reading.bad(
      path, f'an id must have at most {_LONGEST_ID} characters',
      f'{len(an_id):,}, beginning {an_id[:20]!r}', 'shorten it', line
    )  # fmt: skip
  if not an_id or not an_id.isprintable() or an_id != ''.join(an_id.split()):
    raise reading.bad(
      path, 'an id must have characters, none of them a space (run files are '
      'split there) or invisible', reading.quoted(an_id), 'rename it', line
    )  # fmt: skip
  if an_id in ids:
    raise reading.bad(
      path, 'ids must differ',
      f'{an_id!r} in lines {ids[an_id]} and {line}', 'remove one'
    )  # fmt: skip


def corpus(path, writer, lines, expected=None):
  """Returns the `data.Corpus` of what was read of a file.

  Args:
    path: The file.
    writer: `data.CorpusWriter` that has its passages.
    lines: Line of each of them there.
    expected: As for `say_rows`.

  Raises:
    BadInput: There are none, or an id stands twice.
  """
  check_any(path, writer)
  made = writer.done()
  if found := made.rows.repeated():
    first, second = found
    raise reading.bad(
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
    if near in rows:
      cure = 'remove the spaces around it'
    raise reading.bad(
      path, f'a {kind} id must be one of the data',
      reading.quoted(an_id), cure, line
    )  # fmt: skip
  return rows[an_id]


def grade(path, number, text):
  """Returns the grade, an int, that a file has in a line."""
  if not re.fullmatch(r'[+-]?[0-9]+', text.strip()):
    raise reading.bad(
      path, 'a grade must be a whole number', reading.quoted(text),
      'mend the line', number
    )  # fmt: skip
  # Python does not read a number of more than 4300 digits.
  if len(text) > 9 or abs(int(text)) > _MOST_GRADE:
    raise reading.bad(
      path, f'a grade must be from -{_MOST_GRADE} to {_MOST_GRADE}',
      reading.quoted(text), 'mend the line', number
    )  # fmt: skip
  return int(text)


class Judgements:
  """{(query row, passage row): grade}, in the order of a file.

  Attributes:
    pairs: The dict.
  """

  def __init__(self, path):
    self.pairs, self._path, self._repeated = {}, path, 0

  def add(self, line, query, passage, grade):
    """Adds the judgement of a line.

    Args:
      line: Number of the line.
      query: Query row.
      passage: Passage row.
      grade: int.

    Raises:
      BadInput: The pair has another one.
    """
    self._repeated += (query, passage) in self.pairs
    before = self.pairs.setdefault((query, passage), grade)
    if before != grade:
      raise reading.bad(
        self._path, 'a pair must have one grade', f'{before} and {grade}',
        'keep one of the two', line
      )  # fmt: skip

  def done(self):
    """Returns the dict, and says what stood twice."""
    if self._repeated:
      logs.say(
        f'{self._path}: {self._repeated:,} judgements that stand twice, read '
        'once'
      )
    return self.pairs


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
    raise reading.bad(
      path, 'a file must have a line', 'none', 'fetch it again'
    )  # fmt: skip
