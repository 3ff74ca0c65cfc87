"""A BEIR folder: corpus.jsonl, queries.jsonl, qrels/<split>.tsv.

It may also hold answers.jsonl, which is not part of BEIR's format. Files may be
gzipped. Invalid input is rejected with file and line.
"""

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
  path = records.existing(folder, 'queries.jsonl', 'a BEIR folder')
  query_ids, queries = records.queries(path, _queries(path))
  query_rows = {query_id: row for row, query_id in enumerate(query_ids)}
  answers = read_answers(folder, query_rows)

  def read_split(name):
    path = records.first(folder / 'qrels', (f'{name}.tsv', f'{name}.jsonl'))
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
  how = downloads.how(registry.beir_archive(beir_set)) if beir_set else ''
  path = records.existing(folder, 'corpus.jsonl', 'a BEIR folder', how)
  return records.corpus(
    path, passages(path), registry.BEIR_PASSAGES.get(beir_set)
  )


def passages(path: pathlib.Path) -> Iterator[tuple[int, str, str, str]]:
  """Yields (line number, id, title, text) of the passages of a corpus.jsonl.

  A passage with only a title gets it as its text; an empty one is kept. A line
  at the end counts both.
  """
  for line, record, counts in records.json_lines(
    path, _LINE, 'read the corpus'
  ):
    an_id = records.an_id(path, line, record, counts)
    title = (
      records.string(path, line, record, 'title') if record.get('title') else ''
    )
    text = records.text(path, line, record, counts)
    if not text.strip() and title.strip():
      title, text = '', title
      counts['passages without a text, whose title is taken for it'] += 1
    elif not text.strip():
      # Cranfield has two; ranking them last is part of its figures.
      counts['passages without a title and a text, kept empty'] += 1
    yield line, an_id, title, text


def _queries(path):
  """Yields (line number, id, text) of a queries.jsonl."""
  for line, record, counts in records.json_lines(path, _LINE):
    an_id = records.an_id(path, line, record, counts)
    text = records.text(path, line, record, counts)
    if not text.strip():
      raise strict_io.refusal(
        path,
        f'the query {strict_io.quoted(an_id)} has no text',
        'give it one, or remove it and its judgements',
        line,
      )
    yield line, an_id, text


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
    Judgements and missing pairs, as from `records.judgements`.
  """
  rows = (
    _json_rows(path)
    if '.jsonl' in path.suffixes
    else _rows(path, query_rows, passage_rows)
  )
  return records.judgements(path, rows, query_rows, passage_rows)


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
      raise strict_io.refusal(
        path, f'{strict_io.quoted(line)} is not query id, passage id and grade '
        'with tabs between, and not all lines are of TREC: query id, 0, '
        'passage id, grade', 'correct the line', number
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
  for number, record, counts in records.json_lines(path, _JUDGEMENT):
    yield (
      number,
      records.an_id(path, number, record, counts, 'query-id'),
      records.an_id(path, number, record, counts, 'corpus-id'),
      str(records.value(path, number, record, 'score')),
    )


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
  answers = {}
  for line, record, counts in records.json_lines(path, _LINE):
    query_id = records.an_id(path, line, record, counts)
    row = records.row(path, line, 'answered query', query_rows, query_id)
    texts = record.get('answers')
    if not records.are_texts(texts):
      raise strict_io.refusal(
        path,
        f"{repr(texts)[:80]} as 'answers' is not a list of strings, none empty",
        'correct the line',
        line,
      )
    if row in answers:
      raise strict_io.refusal(
        path,
        f'the query {query_id!r} has answers in an earlier line, too',
        'join them',
        line,
      )
    answers[row] = texts
  return answers


def qrels_found(folder: pathlib.Path) -> str:
  """Returns the names of files in qrels/, for error messages."""
  path = folder / 'qrels'
  if not path.is_dir():
    return f'{path}, which is not a folder'
  names = sorted(os.listdir(path))
  shown = ', '.join(names[:8]) + ', ...' * (len(names) > 8)
  return f'{path}, where there is {shown or "nothing"}'
