"""A BEIR folder: corpus.jsonl, queries.jsonl, qrels/<split>.tsv.

A file answers.jsonl, which is not of BEIR, may lie beside them.

Files may be gzipped. What cannot be used is refused with file and line.
"""

import collections
import functools
import itertools
import os
import pathlib
import re

from ance_jax import config as config_lib
from ance_jax import data
from ance_jax import logs
from ance_jax import reading

# Characters.
_LONGEST_ID = 500
_MOST_GRADE = 1000


def read(config):
  """Returns the `data.Source` of the folder `--data_dir`."""
  folder = open_folder(config.data_dir)
  corpus = data.make_corpus(*read_corpus(folder))
  size = len(corpus.ids)
  logs.say(
    f'{folder.name}: {size:,} passages, {size - corpus.groups.max() - 1:,} of '
    f'them the same text as another, hash {corpus.hash[:12]}'
  )
  query_ids, queries = read_queries(folder)
  passage_rows = {passage_id: row for row, passage_id in enumerate(corpus.ids)}
  query_rows = {query_id: row for row, query_id in enumerate(query_ids)}
  answers = read_answers(folder, query_rows)

  def read_split(name):
    judgements = read_qrels(folder, name, query_rows, passage_rows)
    if judgements is None:
      return None
    return data.Judged(query_ids, queries, judgements, answers)

  return data.Source(corpus, read_split, qrels_found(folder))


def open_folder(path):
  """Returns the folder as a `pathlib.Path`, or raises `BadInput`."""
  if not path:
    raise config_lib.BadInput(
      '--dataset=beir must be told where the data is; found no --data_dir; set '
      'it to the folder that holds corpus.jsonl.'
    )
  if not os.path.isdir(path):
    found = 'a file' if os.path.exists(path) else 'nothing'
    raise config_lib.BadInput(
      f'--data_dir must be a folder; found {found} at {path}; set it to the '
      'folder that holds corpus.jsonl.'
    )
  return pathlib.Path(path)


def read_corpus(folder):
  """Returns the ids, titles ('' where missing) and texts of all passages.

  A passage that has only a title has it as its text, and is counted.
  """
  ids, titles, texts, counts = {}, [], [], collections.Counter()
  path = _existing(folder, 'corpus.jsonl')
  for line, record in _records(path, 'read the corpus'):
    an_id = _new_id(path, line, record, ids)
    title = record.get('title') or ''
    if not isinstance(title, str):
      raise reading.bad(
        path, 'a title must be a string', reading.quoted(title), 'quote it',
        line
      )  # fmt: skip
    text = _text(path, line, record, counts)
    if not text.strip():
      title, text = '', title
      counts['passages without a text, whose title is taken for it'] += 1
    if not text.strip():
      raise reading.bad(
        path, 'a passage must have a text', reading.quoted(record['text']),
        'remove it', line
      )  # fmt: skip
    ids[an_id] = line
    titles.append(title)
    texts.append(text)
  return _counted(path, counts, list(ids), titles, texts)


def read_queries(folder):
  """Returns the ids and texts of all queries."""
  ids, texts, counts = {}, [], collections.Counter()
  path = _existing(folder, 'queries.jsonl')
  for line, record in _records(path):
    an_id = _new_id(path, line, record, ids)
    text = _text(path, line, record, counts)
    if not text.strip():
      raise reading.bad(
        path, 'a query must have a text', reading.quoted(text), 'remove it',
        line
      )  # fmt: skip
    ids[an_id] = line
    texts.append(text)
  return _counted(path, counts, list(ids), texts)


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
  judgements, repeated = {}, 0
  for number, line in reading.lines(path):
    cells = line.split('\t')
    if len(cells) != 3:
      raise reading.bad(
        path, 'a judgement must be query id, passage id and grade with tabs '
        'between', reading.quoted(line), 'mend the line', number
      )  # fmt: skip
    query_id, passage_id, grade = cells
    is_word = not re.search(r'\d', grade)
    if number == 1 and is_word and query_id not in query_rows:
      continue  # The header.
    grade = _grade(path, number, grade)
    query = _row(path, number, 'judged query', query_rows, query_id)
    passage = _row(path, number, 'judged passage', passage_rows, passage_id)
    repeated += (query, passage) in judgements
    if judgements.setdefault((query, passage), grade) != grade:
      raise reading.bad(
        path, 'a pair must have one grade', reading.quoted(line),
        'keep one of the two', number
      )  # fmt: skip
  if repeated:
    logs.say(f'{path}: {repeated:,} judgements that stand twice, read once')
  return judgements


def read_answers(folder, query_rows):
  """Returns {query row: list of strings} of answers.jsonl, None without it.

  A line is {"_id": query id, "answers": [text, ...]}.

  Args:
    folder: The BEIR folder.
    query_rows: {query id: row}.
  """
  path = _find(folder, 'answers.jsonl')
  if path is None:
    return None
  answers = {}
  for line, record in _records(path):
    query_id = _string(path, line, record, '_id')
    row = _row(path, line, 'answered query', query_rows, query_id)
    texts = record.get('answers')
    if not isinstance(texts, list) or not all(
      isinstance(text, str) and text.strip() for text in texts
    ):
      raise reading.bad(
        path, "a line must have as 'answers' a list of strings, none empty",
        repr(texts)[:80], 'mend the line', line
      )  # fmt: skip
    if row in answers:
      raise reading.bad(
        path, 'a query must have one line of answers', reading.quoted(query_id),
        'join them', line
      )  # fmt: skip
    answers[row] = texts
  return answers


def qrels_found(folder):
  """Returns what lies in qrels/, for people."""
  path = folder / 'qrels'
  if not path.is_dir():
    return f'{path}, which is no folder'
  names = sorted(os.listdir(path))
  shown = ', '.join(names[:8]) + ', ...' * (len(names) > 8)
  return f'{path}, where there is {shown or "nothing"}'


def _grade(path, number, text):
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


def _row(path, number, kind, rows, an_id):
  if an_id not in rows:
    near = an_id.strip()
    cure = 'add it, or remove the line'
    if near in rows:
      cure = 'remove the spaces around it'
    raise reading.bad(
      path, f'a {kind} id must be one of the data',
      reading.quoted(an_id), cure, number
    )  # fmt: skip
  return rows[an_id]


def _new_id(path, line, record, ids):
  """Returns the id of a record; `ids` are those before, with their lines."""
  an_id = _string(path, line, record, '_id')
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
  return an_id


def _text(path, line, record, counts):
  """Returns the text of a record, and counts what it cannot keep of it."""
  text = _string(path, line, record, 'text')
  try:
    text.encode()
  except UnicodeEncodeError:
    counts['texts with half a surrogate pair, read as ?'] += 1
  return text


def _string(path, line, record, key):
  if key not in record:
    raise reading.bad(
      path, f'a line must have a string {key!r}',
      f'the keys {", ".join(map(reading.quoted, list(record)[:8])) or "none"}',
      f'name it {key}', line
    )  # fmt: skip
  if not isinstance(record[key], str):
    raise reading.bad(
      path, f'a line must have as {key!r} a string', repr(record[key])[:80],
      'quote it', line
    )  # fmt: skip
  return record[key]


def _records(path, what=None):
  """Yields (line number, dict) of a JSON lines file; `what` is its phase."""
  progress = functools.partial(logs.progress, what=what, unit='bytes')
  for number, line in reading.lines(path, progress if what else None):
    record = reading.json_value(line, path, number)
    if not isinstance(record, dict):
      raise reading.bad(
        path, 'a line must be a JSON object', reading.quoted(line),
        'give each line as {"_id": ..., "text": ...}', number
      )  # fmt: skip
    yield number, record


def _counted(path, counts, ids, *texts):
  """Returns what a file holds, and says what was taken otherwise."""
  if not ids:
    raise reading.bad(
      path, 'a file must have a line', 'none', 'fetch it again'
    )  # fmt: skip
  for what, number in counts.items():
    logs.say(f'{path}: {number:,} {what}')
  return ids, *texts


def _find(folder, name):
  """Returns the path of a file, plain or gzipped, or None."""
  paths = [folder / name, folder / f'{name}.gz']
  there = [path for path in paths if os.path.lexists(path)]
  if len(there) == 2:
    logs.say(f'{there[0]}: 1 of 2 files is read, not {there[1].name}')
  return reading.regular(there[0]) if there else None


def _existing(folder, name):
  path = _find(folder, name)
  if path is None:
    below = [p.parent for p in itertools.islice(folder.glob(f'*/{name}*'), 1)]
    cure = f'set --data_dir={below[0]}' if below else 'check --data_dir'
    names = ', '.join(sorted(os.listdir(folder))[:8]) or 'nothing'
    raise config_lib.BadInput(
      f'a BEIR folder must hold {name} or {name}.gz; found neither in '
      f'{folder}, but {names}; {cure}.'
    )
  return path
