"""A BEIR folder: corpus.jsonl, queries.jsonl, qrels/<split>.tsv.

It may also hold answers.jsonl, which is not part of BEIR's format. Files may be
gzipped. Invalid input is rejected with file and line.
"""

import array
import collections
from collections.abc import Iterator
import os
import pathlib
import re

from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import downloads
from ance_jax.data import records
from ance_jax.data import registry
from ance_jax.data import strings

_LINE = '{"_id": ..., "text": ...}'
_JUDGEMENT = '{"query-id": ..., "corpus-id": ..., "score": ...}'


def read(settings: records.Settings) -> corpus_lib.RawDataset:
  """Reads the BEIR folder `--data_dir`."""
  folder = records.open_folder(settings, 'corpus.jsonl')
  if settings.download:
    downloads.fetch_beir(settings.beir_set, folder)
  corpus = read_corpus(folder, settings.beir_set)
  records.say_corpus(folder.name, corpus)
  query_ids, queries = read_queries(folder)
  query_rows = {query_id: row for row, query_id in enumerate(query_ids)}
  answers = read_answers(folder, query_rows)

  def read_split(name):
    kinds = (f'{name}.tsv', f'{name}.jsonl')
    found = [records.find(folder / 'qrels', kind) for kind in kinds]
    path = found[0] or found[1]
    if path is None:
      return None
    pairs, missing = read_qrels(path, query_rows, corpus.rows)
    return corpus_lib.RawSplit(
      query_ids, queries, pairs, answers, missing=missing
    )

  return corpus_lib.RawDataset(corpus, read_split, qrels_found(folder))


def read_corpus(
  folder: pathlib.Path, beir_set: str | None = None
) -> corpus_lib.Corpus:
  """Reads corpus.jsonl; a missing title is ''.

  Args:
    folder: The BEIR folder.
    beir_set: Name of the BEIR dataset expected there, or None.
  """
  writer, lines = corpus_lib.CorpusWriter(), array.array('q')
  counts = collections.Counter()
  how = ''
  if beir_set:
    archive = registry.beir_archive(beir_set)
    how = f'unpack {archive.url} ({archive.size / 1e6:,.1f} MB)'
    how += ', or set --download'
  path = records.existing(folder, 'corpus.jsonl', 'a BEIR folder', how)
  for line, *row in passages(path, counts):
    writer.add(*row)
    lines.append(line)
  records.say_counts(path, counts)
  expected = registry.BEIR_PASSAGES.get(beir_set)
  return records.corpus(path, writer, lines, expected)


def passages(
  path: pathlib.Path, counts: collections.Counter
) -> Iterator[tuple[int, str, str, str]]:
  """Yields (line number, id, title, text) of the passages of a corpus.jsonl.

  A passage with only a title gets it as its text; an empty one is kept. Both
  are counted.

  Args:
    path: Path of the file.
    counts: Counter of corrections, for `records.say_counts`.
  """
  for line, record in records.json_lines(path, _LINE, 'read the corpus'):
    an_id = records.an_id(path, line, record, counts)
    records.check_id(path, line, an_id, {})
    title = record.get('title') or ''
    if not isinstance(title, str):
      raise strict_io.bad(
        path, 'a title must be a string', strict_io.quoted(title),
        records.as_string(title), line
      )  # fmt: skip
    text = records.text(path, line, record, 'text', counts)
    if not text.strip() and title.strip():
      title, text = '', title
      counts['passages without a text, whose title is taken for it'] += 1
    elif not text.strip():
      # Cranfield has two; ranking them last is part of its figures.
      counts['passages without a title and a text, kept empty'] += 1
    yield line, an_id, title, text


def read_queries(folder: pathlib.Path) -> tuple[list[str], list[str]]:
  """Returns the ids and texts of all queries."""
  ids, texts, counts = {}, [], collections.Counter()
  path = records.existing(folder, 'queries.jsonl', 'a BEIR folder')
  for line, record in records.json_lines(path, _LINE):
    an_id = records.an_id(path, line, record, counts)
    records.check_id(path, line, an_id, ids)
    text = records.text(path, line, record, 'text', counts)
    if not text.strip():
      raise strict_io.bad(
        path,
        'a query must have a text',
        strict_io.quoted(record['text'] or ''),
        'give it one, or remove it and its judgements',
        line,
      )
    ids[an_id] = line
    texts.append(text)
  records.check_any(path, ids)
  records.say_counts(path, counts)
  return list(ids), texts


def read_qrels(
  path: pathlib.Path,
  query_rows: dict[str, int],
  passage_rows: dict[str, int] | strings.Rows,
) -> tuple[dict[tuple[int, int], int], dict[tuple[int, str], int]]:
  """Reads a qrels/<split>.tsv or .jsonl.

  Args:
    path: The file.
    query_rows: {query id: row}.
    passage_rows: {passage id: row}.

  Returns:
    Judgements and missing pairs, as from `records.Judgements.done`.
  """
  judgements = records.Judgements(path, query_rows, passage_rows)
  if '.jsonl' in path.suffixes:
    rows = _json_rows(path)
  else:
    rows = _rows(path, query_rows, passage_rows)
  for row in rows:
    judgements.add(*row)
  return judgements.done()


def _rows(path, query_rows, passage_rows):
  """Yields (line number, query id, passage id, grade) from columns.

  The first line determines the format: BEIR's three tab-separated columns,
  optionally quoted and with a header, or TREC's four.
  """
  trec = None
  for number, line in strict_io.lines(path):
    cells = line.split('\t')
    if cells[0].startswith('"') and cells[0] not in query_rows:
      cells = strict_io.unquoted(path, number, line)
    if trec is None:
      trec = len(line.split()) == 4 and len(cells) != 3
    if trec:
      cells = line.split()
    if len(cells) != (4 if trec else 3):
      raise strict_io.bad(
        path, 'a judgement must be query id, passage id and grade with tabs '
        'between, or all lines be of TREC: query id, 0, passage id, grade',
        strict_io.quoted(line), 'mend the line', number
      )  # fmt: skip
    query_id, passage_id, given = cells[0], cells[-2], cells[-1]
    known = query_id in query_rows or passage_id in passage_rows
    if number == 1 and not known and not re.search(r'\d', given):
      continue  # The header.
    yield number, query_id, passage_id, given
  if trec:
    logs.log(f'{path}: read as judgements of TREC, of four columns')


def _json_rows(path):
  """Yields the same as `_rows` from JSON lines, MTEB's format."""
  counts = collections.Counter()
  for number, record in records.json_lines(path, _JUDGEMENT):
    ids = [
      records.an_id(path, number, record, counts, key)
      for key in ('query-id', 'corpus-id')
    ]
    if 'score' not in record:
      raise strict_io.bad(
        path, "a line must have a 'score'", records.keys_of(record),
        f'give each line as {_JUDGEMENT}', number
      )  # fmt: skip
    yield number, *ids, str(record['score'])
  records.say_counts(path, counts)


def read_answers(
  folder: pathlib.Path, query_rows: dict[str, int]
) -> dict[int, list[str]] | None:
  """Returns {query row: answers} from answers.jsonl; None without that file.

  A line is {"_id": query id, "answers": [text, ...]}.

  Args:
    folder: The BEIR folder.
    query_rows: {query id: row}.
  """
  path = records.find(folder, 'answers.jsonl')
  if path is None:
    return None
  answers, counts = {}, collections.Counter()
  for line, record in records.json_lines(path, _LINE):
    query_id = records.an_id(path, line, record, counts)
    row = records.row(path, line, 'answered query', query_rows, query_id)
    texts = record.get('answers')
    if not isinstance(texts, list) or not all(
      isinstance(text, str) and text.strip() for text in texts
    ):
      raise strict_io.bad(
        path, "a line must have as 'answers' a list of strings, none empty",
        repr(texts)[:80], 'mend the line', line
      )  # fmt: skip
    if row in answers:
      raise strict_io.bad(
        path,
        'a query must have one line of answers',
        strict_io.quoted(query_id),
        'join them',
        line,
      )
    answers[row] = texts
  records.say_counts(path, counts)
  return answers


def qrels_found(folder: pathlib.Path) -> str:
  """Returns the names of files in qrels/, for error messages."""
  path = folder / 'qrels'
  if not path.is_dir():
    return f'{path}, which is no folder'
  names = sorted(os.listdir(path))
  shown = ', '.join(names[:8]) + ', ...' * (len(names) > 8)
  return f'{path}, where there is {shown or "nothing"}'
