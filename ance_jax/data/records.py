"""Shared checks of dataset readers: folders, ids, texts and judgements."""

import array
import collections
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from collections.abc import Sized
import functools
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
    raise errors.refusal(
      f'--data_dir is not given, and --dataset={settings.dataset} needs it',
      f'set it to the folder that holds {first}',
    )
  if settings.download:
    atomic.make_folder(path)
  if (found := strict_io.kind(path)) != 'a folder':
    raise errors.refusal(
      f'--data_dir={path} names {found}, and a folder is needed',
      f'set it to the folder that holds {first}',
    )
  return pathlib.Path(path)


def find(folder: pathlib.Path, name: str) -> pathlib.Path | None:
  """Returns the path of a file, plain or gzipped, or None."""
  there = [p for p in (folder / name, folder / f'{name}.gz') if _is_there(p)]
  if len(there) == 2:
    logs.log(f'{there[0]}: 1 of 2 files is read, not {there[1].name}')
  return strict_io.regular(there[0]) if there else None


def first(folder: pathlib.Path, names: Iterable[str]) -> pathlib.Path | None:
  """Returns the path of the first of some files that is found, or None."""
  return next(filter(None, (find(folder, name) for name in names)), None)


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
    below = next(folder.glob(f'*/{name}*'), None)
    names = ', '.join(sorted(os.listdir(folder))[:8]) or 'nothing'
    raise errors.refusal(
      f'{folder} has neither {name} nor {name}.gz, which {what} needs (it '
      f'holds {names})',
      f'set --data_dir={below.parent}'
      if below
      else source or 'check --data_dir',
    )
  return path


def read_lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """Yields `strict_io.lines` and shows progress."""
  return strict_io.lines(
    path,
    functools.partial(logs.progress, what=f'read {path.name}', unit='bytes'),
  )


def cells(
  path: pathlib.Path, names: Sequence[str], *, quotes: bool = False
) -> Iterator[tuple[int, list[str]]]:
  """Yields (line number, cells) of a tab-separated file.

  Args:
    path: The file.
    names: Names of its columns.
    quotes: Whether cells may be in double quotes.
  """
  for line, text in read_lines(path):
    found = strict_io.unquoted(path, line, text) if quotes else text.split('\t')
    if len(found) != len(names):
      raise strict_io.refusal(
        path,
        f'the line has {len(found)} columns, not {len(names)} with tabs '
        f'between: {", ".join(names)}',
        'fetch the file again',
        line,
      )
    yield line, found


def json_lines(
  path: pathlib.Path, form: str, what: str | None = None
) -> Iterator[tuple[int, dict[str, Any], collections.Counter]]:
  """Yields (line number, object, corrections) of a JSON lines file.

  The corrections are one Counter, which is printed after the last line.

  Args:
    path: Path of the file.
    form: Example of a line, for error messages.
    what: Name of the phase for a progress bar, or None for no bar.
  """
  counts = collections.Counter()
  progress = functools.partial(logs.progress, what=what, unit='bytes')
  for number, line in strict_io.lines(path, progress if what else None):
    record = strict_io.json_value(line, path, number)
    if not isinstance(record, dict):
      raise strict_io.refusal(
        path,
        f'{strict_io.quoted(line)} is not a JSON object',
        f'give each line as {form}',
        number,
      )
    yield number, record, counts
  say_counts(path, counts)


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
      reason = ' '.join(str(error).split())[:80]
      raise strict_io.refusal(
        path, f'not a whole JSON array of {what} ({reason})', 'fetch it again'
      ) from error


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
    for number, record, _ in json_lines(path, form, f'read {path.name}'):
      yield number, record
    return
  for number, item in json_array(path, 'objects'):
    if not isinstance(item, dict):
      raise strict_io.refusal(
        path,
        f'item {number}, {strict_io.quoted(item)}, is not an object',
        f'give each as {form}',
      )
    yield number, item


def text(
  path: pathlib.Path,
  line: int,
  record: dict[str, Any],
  counts: collections.Counter,
) -> str:
  """Returns the text of a record, '' for null; counts lossy conversions."""
  if value(path, line, record, 'text') is None:
    counts["times null as 'text', read as empty"] += 1
    return ''
  found = string(path, line, record, 'text')
  count_surrogates(found, counts)
  return found


def count_surrogates(text: str, counts: collections.Counter) -> None:
  """Counts a text that is valid JSON but not UTF-8."""
  try:
    text.encode()
  except UnicodeEncodeError:
    counts['texts with half a surrogate pair, read as ?'] += 1


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
  found = value(path, line, record, key)
  if not isinstance(found, str):
    cures = {list: 'join its parts into one', dict: 'give its text alone'}
    raise strict_io.refusal(
      path,
      f'{repr(found)[:80]} as {key!r} is not a string',
      cures.get(type(found), 'quote it'),
      line,
    )
  return found


def value(
  path: pathlib.Path, line: int, record: dict[str, Any], key: str
) -> Any:
  """Returns the value that a record has for a key."""
  if key not in record:
    raise strict_io.refusal(
      path, f'no {key!r} among {keys_of(record)}', f'name it {key}', line
    )
  return record[key]


def are_texts(value: Any) -> bool:
  """Returns whether a value is a list of strings, none of them empty."""
  return isinstance(value, list) and all(
    isinstance(text, str) and text.strip() for text in value
  )


def keys_of(record: dict[str, Any]) -> str:
  """Returns the keys of a record, for error messages."""
  shown = ', '.join(map(strict_io.quoted, list(record)[:8]))
  return f'the keys {shown or "none"}'


def corpus(
  path: pathlib.Path,
  passages: Iterable[tuple[int, str, str, str]],
  expected: int | None = None,
) -> corpus_lib.Corpus:
  """Returns the corpus of a file's passages, after checking it.

  Args:
    path: The file.
    passages: (line number, id, title, text) of each; read once.
    expected: As for `say_rows`.

  Raises:
    BadInput: There are no passages, or an id is invalid or occurs twice.
  """
  lines = array.array('q')

  def rows():
    for line, *row in passages:
      _check_id(path, line, row[0])
      lines.append(line)
      yield row

  made = corpus_lib.corpus_of(rows())
  check_any(path, lines)
  if found := made.rows.repeated():
    raise _repeated(path, made.ids[found[0]], *(lines[row] for row in found))
  say_rows(path, len(lines), expected)
  return made


def queries(
  path: pathlib.Path, found: Iterable[tuple[int, str, str]]
) -> tuple[list[str], list[str]]:
  """Returns the ids and texts of a file's queries, after checking it.

  Args:
    path: The file.
    found: (line number, id, text) of each.
  """
  lines, texts = {}, []
  for line, an_id, text in found:
    _check_id(path, line, an_id)
    if an_id in lines:
      raise _repeated(path, an_id, lines[an_id], line)
    lines[an_id] = line
    texts.append(text)
  check_any(path, texts)
  say_rows(path, len(texts))
  return list(lines), texts


def _check_id(path, line, an_id):
  """Raises `BadInput` if an id is invalid."""
  if len(an_id) > _LONGEST_ID:
    raise strict_io.refusal(
      path, f'an id of {len(an_id):,} characters, beginning {an_id[:20]!r}, is '
      f'longer than {_LONGEST_ID}', 'shorten it', line
    )  # fmt: skip
  if not an_id or not an_id.isprintable() or an_id != ''.join(an_id.split()):
    raise strict_io.refusal(
      path,
      f'the id {strict_io.quoted(an_id)} is empty, has a space (where run '
      'files are split) or an invisible character',
      'rename it in every file, with _ for a space',
      line,
    )


def _repeated(path, an_id, first, second):
  return strict_io.refusal(
    path, f'the id {an_id!r} is in lines {first} and {second}', 'remove one'
  )


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
  rows: dict[str, int] | strings.Rows,
  an_id: str,
) -> int:
  """Returns the row of an id; `kind` names the id in the error message."""
  found = rows.get(an_id)
  if found is None:
    cure = (
      'add it to the queries, or remove the line (BEIR stops at it, too)'
      if kind == 'judged query'
      else 'add it, or remove the line'
    )
    if an_id.strip() in rows:
      cure = 'remove the spaces around it'
    raise strict_io.refusal(
      path, f'the {kind} {strict_io.quoted(an_id)} is not in the data', cure,
      line
    )  # fmt: skip
  return found


def judgements(
  path: pathlib.Path,
  judged: Iterable[tuple[int, str, str, str]],
  query_rows: dict[str, int],
  passage_rows: dict[str, int] | strings.Rows,
) -> tuple[dict[tuple[int, int], int], dict[tuple[int, str], int]]:
  """Returns the judgements of a file for `corpus.RawSplit`, in file order.

  Args:
    path: The file.
    judged: (line number, query id, passage id, grade as in the file) of each;
      the corpus may lack the passage.
    query_rows: {query id: row}.
    passage_rows: {passage id: row}.

  Returns:
    {(query row, passage row): grade}, and {(query row, passage id): grade} of
    passages that the corpus lacks.

  Raises:
    BadInput: A query is unknown, a grade is invalid, or a pair has two grades.
  """
  grades, counts = {}, collections.Counter()
  for line, query_id, passage_id, given in judged:
    number = _grade(path, line, given, counts)
    query = row(path, line, 'judged query', query_rows, query_id)
    passage = passage_rows.get(passage_id)
    if passage is None and passage_id.strip() in passage_rows:
      row(path, line, 'judged passage', passage_rows, passage_id)
    pair = query, passage_id if passage is None else passage
    counts['repeated judgements, read once'] += pair in grades
    before = grades.setdefault(pair, number)
    if before != number:
      raise strict_io.refusal(
        path,
        f'the pair has the grades {before} and {number}',
        'keep one of the two',
        line,
      )
  say_rows(path, len(grades))
  say_counts(path, +counts)
  missing = {p: grade for p, grade in grades.items() if isinstance(p[1], str)}
  return {p: g for p, g in grades.items() if p not in missing}, missing


def _grade(path, line, text, counts):
  """Returns the grade of a judgement; 1.0 is read as 1, and counted."""
  fact = f'the grade {strict_io.quoted(text)} is not a whole number'
  whole = re.fullmatch(r'([+-]?[0-9]+)(\.0*)?', text.strip())
  # Python rejects numbers of more than 4300 digits.
  if whole and (len(whole[1]) > 9 or abs(int(whole[1])) > _MOST_GRADE):
    fact += f' from -{_MOST_GRADE} to {_MOST_GRADE}'
    whole = None
  if not whole:
    raise strict_io.refusal(path, fact, 'correct the line', line)
  counts['grades with a decimal point, such as 1.0, read as whole numbers'] += (
    whole[2] is not None
  )
  return int(whole[1])


def say_corpus(name: str, corpus: corpus_lib.Corpus) -> None:
  """Prints the size of a corpus, its number of duplicates and its hash."""
  size = len(corpus.ids)
  logs.log(
    f'{name}: {size:,} passages, {size - corpus.groups.max() - 1:,} of them '
    f'the same text as another, hash {corpus.hash[:12]}'
  )


def say_counts(path: pathlib.Path, counts: collections.Counter) -> None:
  """Prints {correction: count} of a file."""
  for what, number in counts.items():
    logs.log(f'{path}: {number:,} {what}')


def check_any(path: pathlib.Path, items: Sized) -> None:
  """Raises `BadInput` if nothing was read from a file."""
  if not items:
    raise strict_io.refusal(path, 'the file has no entries', 'fetch it again')
