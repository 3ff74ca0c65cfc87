"""Shared checks of dataset readers: folders, ids, texts and judgements."""

import collections
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from collections.abc import Sized
import functools
import itertools
import os
import pathlib
import re
from typing import Any
from typing import NamedTuple

import ijson

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import registry
from ance_jax.data import strings

# Characters.
_LONGEST_ID = 500
_MOST_GRADE = 1000
# Bytes at the start of a file that tell an array from lines.
_PEEKED = 4096


class Settings(NamedTuple):
  """Which data is read, and how it is split; see the flags of these names.

  Attributes:
    test_splits: Splits that are read, where they are there, if none are named.
    pydocs_dir: Folder of the set 'pydocs'.
    builds_pydocs: Whether it is built there where it is not, or damaged.
  """

  dataset: str
  data_dir: str = ''
  download: bool = False
  beir_set: str | None = None
  questions: str | None = None
  protocol: str | None = None
  train_split: str = 'train'
  dev_split: str = 'dev'
  dev_fraction: float = 0.1
  negatives: str = ''
  test_splits: tuple[str, ...] = ()
  pydocs_dir: str = ''
  builds_pydocs: bool = True


def open_folder(settings: Settings, first: str) -> pathlib.Path:
  """Returns `--data_dir`.

  Args:
    settings: Which data is read.
    first: Name of a file that a folder of such a dataset contains.

  Raises:
    BadInput: It is not given, or is not a folder.
  """
  path = settings.data_dir
  if not path:
    raise errors.BadInput(
      f'--dataset={settings.dataset} must be told where the data is; found no '
      f'--data_dir; set it to the folder that holds {first}.'
    )
  if settings.download:
    atomic.make_folder(path)
  if (found := strict_io.kind(path)) != 'a folder':
    raise errors.BadInput(
      f'--data_dir must be a folder; found {found} at {path}; set it to the '
      f'folder that holds {first}.'
    )
  return pathlib.Path(path)


def find(folder: pathlib.Path, name: str) -> pathlib.Path | None:
  """Returns the path of a file, plain or gzipped, or None."""
  paths = [folder / name, folder / f'{name}.gz']
  there = [path for path in paths if _is_there(path)]
  if len(there) == 2:
    logs.log(f'{there[0]}: 1 of 2 files is read, not {there[1].name}')
  return strict_io.regular(there[0]) if there else None


def _is_there(path):
  """Returns whether a name is taken; raises OSError without permission."""
  try:
    os.lstat(path)
  except (FileNotFoundError, NotADirectoryError):
    return False
  return True


def existing(
  folder: pathlib.Path, name: str, what: str, source: str = ''
) -> pathlib.Path:
  """Returns the path of a file, plain or gzipped.

  Args:
    folder: Folder of the dataset.
    name: Name of the file, without .gz.
    what: Description of such a folder, for the error message.
    source: How to get the file, in the imperative, or ''.

  Raises:
    BadInput: The file is missing.
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


def json_lines(
  path: pathlib.Path, form: str, what: str | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line number, object) of a JSON lines file.

  Args:
    path: Path of the file.
    form: Example of a line, for error messages.
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


def json_array(
  path: pathlib.Path, what: str = 'questions'
) -> Iterator[tuple[int, Any]]:
  """Yields (number, item) of a JSON array, without loading all of it.

  Args:
    path: Path of the file.
    what: Name of the items, for error messages.
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


def objects(
  path: pathlib.Path, form: str
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (number, object) of JSON lines or of a JSON array of objects.

  Args:
    path: Path of the file.
    form: Example of an object, for error messages.
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


def text(
  path: pathlib.Path,
  line: int,
  record: dict[str, Any],
  key: str,
  counts: collections.Counter,
) -> str:
  """Returns the text of a record, '' for null; counts lossy conversions."""
  if key in record and record[key] is None:
    counts[f'times null as {key!r}, read as empty'] += 1
    return ''
  found = string(path, line, record, key)
  try:
    found.encode()
  except UnicodeEncodeError:
    counts['texts with half a surrogate pair, read as ?'] += 1
  return found


def an_id(
  path: pathlib.Path,
  line: int,
  record: dict[str, Any],
  counts: collections.Counter,
  key: str = '_id',
) -> str:
  """Returns the id of a record, a string or a whole number.

  The key may be 'id' instead of '_id', as in MTEB.
  """
  if key == '_id' and key not in record and 'id' in record:
    key = 'id'
    counts["lines with 'id' for '_id'"] += 1
  found = record.get(key)
  if isinstance(found, int) and not isinstance(found, bool):
    counts['ids that are numbers, read as their digits'] += 1
    return str(found)
  return string(path, line, record, key)


def string(
  path: pathlib.Path, line: int, record: dict[str, Any], key: str
) -> str:
  """Returns the string that a record has for a key."""
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


def as_string(value: Any) -> str:
  """Returns how to turn a JSON value into a string, in the imperative."""
  cures = {list: 'join its parts into one', dict: 'give its text alone'}
  return cures.get(type(value), 'quote it')


def keys_of(record: dict[str, Any]) -> str:
  """Returns the keys of a record, for error messages."""
  shown = ', '.join(map(strict_io.quoted, list(record)[:8]))
  return f'the keys {shown or "none"}'


def check_id(
  path: pathlib.Path, line: int, an_id: str, ids: Mapping[str, int]
) -> None:
  """Raises `BadInput` if an id is invalid or repeated.

  Args:
    path: The file.
    line: Line number of the id.
    an_id: The id.
    ids: {id: line} of earlier ids; not modified.
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


def corpus(
  path: pathlib.Path,
  writer: corpus_lib.CorpusWriter,
  lines: Sequence[int],
  expected: int | None = None,
) -> corpus_lib.Corpus:
  """Returns the corpus of a file's passages, after checking it.

  Args:
    path: The file.
    writer: Writer with all passages added.
    lines: Line number of each passage.
    expected: As for `say_rows`.

  Raises:
    BadInput: There are no passages, or an id occurs twice.
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


def say_rows(
  path: pathlib.Path, rows: int, expected: int | None = None
) -> None:
  """Prints a line if a file has another number of rows than the original.

  Args:
    path: Path of the file.
    rows: Rows read from the file.
    expected: Rows of the original; None looks up the file name in
      `registry.ROWS`.
  """
  if expected is None:
    expected = registry.ROWS.get(path.name.removesuffix('.gz'))
  if expected not in (None, rows):
    logs.log(f"{path}: {rows:,} rows; the source's has {expected:,}")


def row(
  path: pathlib.Path,
  line: int,
  kind: str,
  rows: Mapping[str, int] | strings.Rows,
  an_id: str,
) -> int:
  """Returns the row of an id; `kind` names the id in the error message."""
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


def grade(
  path: pathlib.Path, number: int, text: str, counts: collections.Counter
) -> int:
  """Parses the grade of a judgement.

  Args:
    path: The file.
    number: Line number.
    text: Grade as in the file; 1.0 is read as 1.
    counts: Counter of corrections.
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
  # Python rejects numbers of more than 4300 digits.
  if len(whole[1]) > 9 or abs(int(whole[1])) > _MOST_GRADE:
    raise strict_io.bad(
      path, f'a grade must be from -{_MOST_GRADE} to {_MOST_GRADE}',
      strict_io.quoted(text), 'mend the line', number
    )  # fmt: skip
  return int(whole[1])


class Judgements:
  """Collects the judgements of a file, in file order."""

  def __init__(
    self,
    path: pathlib.Path,
    query_rows: dict[str, int],
    passage_rows: dict[str, int] | strings.Rows,
  ):
    """Starts without judgements.

    Args:
      path: The file.
      query_rows: {query id: row}.
      passage_rows: {passage id: row}.
    """
    self._path, self._pairs, self._counts = path, {}, collections.Counter()
    self._query_rows, self._passage_rows = query_rows, passage_rows

  def __len__(self):
    return len(self._pairs)

  def add(self, line: int, query_id: str, passage_id: str, given: str) -> None:
    """Adds the judgement of a line.

    Args:
      line: Line number.
      query_id: Id of a query.
      passage_id: Id of a passage, which the corpus may lack.
      given: Grade as in the file.

    Raises:
      BadInput: The query is unknown, the grade is invalid, or the pair already
        has a different grade.
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

  def done(
    self,
  ) -> tuple[dict[tuple[int, int], int], dict[tuple[int, str], int]]:
    """Returns the judgements for `corpus.RawSplit`, and prints corrections.

    Returns:
      {(query row, passage row): grade}, and {(query row, passage id): grade} of
      passages that the corpus lacks.
    """
    say_counts(self._path, +self._counts)
    there, missing = {}, {}
    for pair, number in self._pairs.items():
      (missing if isinstance(pair[1], str) else there)[pair] = number
    return there, missing


def say_corpus(name: str, corpus: corpus_lib.Corpus) -> None:
  """Prints the size of a corpus, its number of duplicates and its hash."""
  size = len(corpus.ids)
  logs.log(
    f'{name}: {size:,} passages, {size - corpus.groups.max() - 1:,} of them '
    f'the same text as another, hash {corpus.hash[:12]}'
  )


def say_counts(path: pathlib.Path | None, counts: Mapping[str, int]) -> None:
  """Prints {correction: count} of a file."""
  for what, number in counts.items():
    logs.log(f'{path}: {number:,} {what}')


def check_any(path: pathlib.Path, items: Sized) -> None:
  """Raises `BadInput` if nothing was read from a file."""
  if not items:
    raise strict_io.bad(
      path, 'a file must have a line', 'none', 'fetch it again'
    )  # fmt: skip
