"""A file of pairs: pairs.jsonl, optionally with a corpus.jsonl.

The format that sentence-transformers trains on, that `mine_hard_negatives`
reads and writes, and that `--job=mine` writes: texts without ids, with or
without negatives. Equal queries are merged, and so are equal passages.
"""

import collections
import pathlib

from ance_jax import errors
from ance_jax.core import strict_io
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import records
from ance_jax.data.readers import beir
from ance_jax.data.readers import given
from ance_jax.data.readers import given_formats


def read(settings: records.Settings) -> corpus_lib.RawDataset:
  """Reads the pairs in the folder `--data_dir`."""
  folder = records.open_folder(settings, 'pairs.jsonl')
  path = records.existing(folder, 'pairs.jsonl', 'a folder of pairs')
  queries, passages, judged, any_negative = _read_pairs(path)
  if settings.negatives and any_negative:
    raise errors.refusal(
      f'{path} has negatives, and --negatives={settings.negatives} gives '
      'others',
      'leave out --negatives, or remove the negatives from pairs.jsonl',
    )
  ids = [f'q{row}' for row in range(len(queries))]
  if settings.negatives:
    _add_negatives(pathlib.Path(settings.negatives), ids, queries, passages)
  corpus, rows = _read_corpus(folder, path, passages)
  records.say_corpus(folder.name, corpus)

  def read_split(name):
    if name != settings.train_split:
      return None
    return corpus_lib.RawSplit(
      ids, list(queries), {(query, rows[whole]): 1 for query, whole in judged}
    )

  return corpus_lib.RawDataset(
    corpus, read_split, path, path if any_negative else None
  )


def _read_pairs(path):
  """Reads pairs.jsonl.

  Returns:
    {query: row}, {title and text joined: (id, title, text, line)}, a list of
    (query row, title and text joined) of the positives, and whether any line
    has a negative.
  """
  queries, passages, judged, any_negative = {}, {}, {}, False
  counts = collections.Counter()
  for record in given_formats.read(path, counts):
    if not (record.query or '').strip() or not all(
      passage.text for passage in record.positives
    ):
      raise strict_io.refusal(
        path,
        f'the query {strict_io.quoted(record.query or "")} or its positive has '
        'no text',
        'remove the line',
        record.line,
      )
    found = record.positives + record.negatives
    if not found:
      raise strict_io.refusal(
        path,
        'the line has no positive',
        f'give each as {given_formats.FORM}',
        record.line,
      )
    query = queries.setdefault(record.query, len(queries))
    _add(passages, found, 'pairs', record.line)
    any_negative |= bool(record.negatives)
    for positive in record.positives:
      # With one line per negative, repeated positives are expected.
      again = (query, positive.whole) in judged and not record.negatives
      counts['repeated pairs, read once'] += again
      judged[query, positive.whole] = True
  records.check_any(path, queries)
  without = len(queries) - len({query for query, _ in judged})
  counts['queries without a positive, left out'] += without
  records.say_counts(path, +counts)
  return queries, passages, list(judged), any_negative


def _add_negatives(path, ids, queries, passages):
  """Adds the texts that a file of negatives has for these queries."""
  known = given.Queries(
    {an_id: row for row, an_id in enumerate(ids)}, dict(enumerate(queries))
  )
  for record in given_formats.read(path, collections.Counter()):
    if known.rows(record):
      _add(passages, record.negatives, 'given', record.line)


def _add(passages, found, kind, line):
  """Adds those `given_formats.Passage`s of a line whose text is new."""
  number = 0
  for passage in found:
    if passage.text is not None and passage.whole not in passages:
      name = f'{kind}-{line}' + (f'-{number}' if number else '')
      passages[passage.whole] = name, passage.title, passage.text, line
      number += 1


def _read_corpus(folder, path, passages):
  """Returns the `corpus.Corpus` and {title and text joined: row}.

  Passages of corpus.jsonl come first, then those of the pairs that are not in
  it. A passage of the pairs is in it if it equals a text there, or a title, a
  space and a text.
  """
  there, rows = records.find(folder, 'corpus.jsonl'), {}

  def in_order():
    number = 0
    for line, an_id, title, text in beir.passages(there) if there else ():
      for whole in (text, f'{title} {text}'):
        if whole in passages:
          rows.setdefault(whole, number)
      number += 1
      yield line, an_id, title, text
    for whole, (*row, line) in passages.items():
      if whole not in rows:
        rows[whole] = number
        number += 1
        yield line, *row

  return records.corpus(there or path, in_order()), rows
