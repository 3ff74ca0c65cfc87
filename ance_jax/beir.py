"""A BEIR folder -> plain lists: corpus.jsonl, queries.jsonl, qrels/<split>.tsv.

Files may be gzipped. What cannot be used is refused with file and line.
"""

import gzip
import json
import pathlib
import re
import zlib

from ance_jax import config as config_lib
from ance_jax import logs


def open_folder(path):
  """Returns the folder as a `pathlib.Path`, or raises `BadInput`."""
  if not path:
    raise config_lib.BadInput(
      '--dataset=beir must be told where the data is; found no --data_dir; set '
      'it to the folder that holds corpus.jsonl.'
    )
  return pathlib.Path(path)


def read_corpus(folder):
  """Returns the ids, titles ('' where missing) and texts of all passages."""
  ids, titles, texts = [], [], []
  path = _existing(folder, 'corpus.jsonl')
  for line, record in _jsonl(path, ('_id', 'text'), 'read the corpus'):
    title = record.get('title') or ''
    if not isinstance(title, str):
      raise _bad(path, line, 'a title must be a string', title, 'quote it')
    if not record['text'].strip():
      raise _bad(
        path, line, 'a passage must have a text', record['text'], 'remove it'
      )
    ids.append(record['_id'])
    titles.append(title)
    texts.append(record['text'])
  _check_ids(path, ids)
  return ids, titles, texts


def read_queries(folder):
  """Returns the ids and texts of all queries."""
  path = _existing(folder, 'queries.jsonl')
  records = [record for _, record in _jsonl(path, ('_id', 'text'))]
  ids = [record['_id'] for record in records]
  _check_ids(path, ids)
  return ids, [record['text'] for record in records]


def read_qrels(folder, split, query_rows, passage_rows):
  """Returns {(query row, passage row): grade} of qrels/<split>.tsv.

  Args:
    folder: The BEIR folder.
    split: Name of the split.
    query_rows: {query id: row}.
    passage_rows: {passage id: row}.

  Returns:
    The dict, or None if there is no such file.
  """
  path = _find(folder / 'qrels', f'{split}.tsv')
  if path is None:
    return None
  judgements = {}
  for number, line in _lines(path):
    cells = line.split('\t')
    if len(cells) != 3:
      raise _bad(
        path, number, 'a judgement must be query id, passage id and grade '
        'with tabs between', line, 'mend the line'
      )  # fmt: skip
    query_id, passage_id, grade = cells
    if number == 1 and not re.search(r'\d', grade):
      continue  # The header.
    if not re.fullmatch(r'[+-]?\d+', grade.strip()):
      raise _bad(
        path, number, 'a grade must be a whole number', grade, 'mend the line'
      )
    for kind, rows, an_id in (
      ('query', query_rows, query_id),
      ('passage', passage_rows, passage_id),
    ):
      if an_id not in rows:
        raise _bad(
          path, number, f'a judged {kind} id must be one of the data', an_id,
          'add it, or remove the judgement'
        )  # fmt: skip
    pair = query_rows[query_id], passage_rows[passage_id]
    if judgements.setdefault(pair, int(grade)) != int(grade):
      raise _bad(
        path, number, 'a pair must have one grade', line, 'keep one of the two'
      )
  return judgements


def _check_ids(path, ids):
  rows = {}
  for row, an_id in enumerate(ids):
    if an_id != ''.join(an_id.split()) or not an_id:
      raise config_lib.BadInput(
        f'{path}: an id must have characters, none of them a space (run files '
        f'are split there); found {an_id!r}; rename it.'
      )
    if rows.setdefault(an_id, row) != row:
      raise config_lib.BadInput(
        f'{path}: ids must differ; found {an_id!r} in lines {rows[an_id] + 1} '
        f'and {row + 1}; remove one.'
      )


def _jsonl(path, text_keys, what=None):
  """Yields (line number, dict) of a JSON lines file; `what` is its phase."""
  for number, line in _lines(path, what):
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise _bad(
        path, number, 'a line must be one JSON object', line, 'mend it'
      ) from error
    for key in text_keys:
      if not isinstance(record, dict) or not isinstance(record.get(key), str):
        raise _bad(
          path, number, f'a line must be a JSON object with a string {key!r}',
          line, 'mend it'
        )  # fmt: skip
    yield number, record


def _lines(path, what=None):
  """Yields (line number, text) of the lines of a file, gzipped or not.

  Args:
    path: Path of the file.
    what: Name of the phase for a progress bar, or None for no bar.
  """
  number = place = 0

  def read(_):
    nonlocal place
    before, place = place, raw.tell()
    return place - before

  try:
    with open(path, 'rb') as raw:
      file = gzip.open(raw) if path.suffix == '.gz' else raw
      if what:
        size = path.stat().st_size
        file = logs.progress(file, what, total=size, unit='bytes', count=read)
      for number, line in enumerate(file, 1):
        yield number, line.decode().rstrip('\r\n')
  except UnicodeDecodeError as error:
    raise _bad(
      path, number, 'text must be UTF-8', error.object[:60], 'convert the file'
    ) from error
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise config_lib.BadInput(
      f'{path}: a gzipped file must be whole; found it damaged after line '
      f'{number} ({error}); fetch it again.'
    ) from error


def _find(folder, name):
  """Returns the path of a file, plain or gzipped, or None."""
  paths = (folder / name, folder / f'{name}.gz')
  return next((path for path in paths if path.is_file()), None)


def _existing(folder, name):
  path = _find(folder, name)
  if path is None:
    raise config_lib.BadInput(
      f'a BEIR folder must hold {name} or {name}.gz; found neither in '
      f'{folder}; check --data_dir.'
    )
  return path


def _bad(path, line, rule, found, cure):
  """Returns the error that names file, line, rule, found value and cure."""
  return config_lib.BadInput(
    f'{path}, line {line}: {rule}; found {str(found)[:80]!r}; {cure}.'
  )
