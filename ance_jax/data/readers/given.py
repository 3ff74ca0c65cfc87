"""Matches negatives from a file to rows of queries and of the corpus.

Records without a text are matched by id, others by text.
"""

import array
import collections
from collections.abc import Mapping
import math
import pathlib

import numpy as np

from ance_jax.core import logs
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import keys
from ance_jax.data import records
from ance_jax.data.readers import given_formats


def attach(
  path: pathlib.Path, judged: corpus_lib.RawSplit, corpus: corpus_lib.Corpus
) -> corpus_lib.RawSplit:
  """Adds the negatives of a file to a split.

  Args:
    path: Path of the file.
    judged: The split; only its queries with judgements get negatives.
    corpus: All passages, with `keys`.
  """
  counts, numbers = collections.Counter(), {}
  wanted = sorted(judged.judged_queries())
  queries = Queries(
    {judged.query_ids[row]: row for row in wanted},
    {row: judged.queries[row] for row in wanted},
  )
  sides = [[array.array(kind) for kind in 'iid'] for _ in range(2)]
  for record in given_formats.read(path, counts):
    rows = queries.rows(record)
    counts['lines of queries that the training split lacks'] += not rows
    for side, found in zip(sides, record[-2:], strict=True):
      for passage in found:
        number = numbers.setdefault(_name_of(passage), len(numbers))
        for row in rows:
          for column, value in zip(
            side, (row, number, passage.score), strict=True
          ):
            column.append(value)
  rows = _rows_of(numbers, corpus)
  positives, given = (_pairs(side, rows) for side in sides)
  records.say_counts(path, +counts)
  lacking = int((rows[np.array(sides[1][1], np.int64)] < 0).sum())
  _say(path, given, len(wanted), lacking)
  scores = {
    (query, row): score
    for query, row, score in zip(
      *map(np.ndarray.tolist, positives), strict=True
    )
    if (query, row) in judged.judgements and not math.isnan(score)
  }
  if not len(given.passages):
    return judged
  return judged._replace(given=given, scores=scores)


def _say(path, given, num_queries, lacking):
  """Prints the number of negatives from a file."""
  left_out = f'; left out {lacking:,} that the corpus lacks' if lacking else ''
  scored = int((~np.isnan(given.scores)).sum())
  logs.log(
    f'{path}: {len(given.passages):,} negatives of '
    f'{len(np.unique(given.queries)):,} of {num_queries:,} training '
    f'queries{left_out}; {scored:,} with a score'
  )


def _pairs(side, rows):
  """Returns the columns of a file as `corpus.Given`, pairs once, by query."""
  queries, numbers, scores = (np.array(column) for column in side)
  passages = rows[numbers.astype(np.int64)]
  (there,) = np.nonzero(passages >= 0)
  first = there[keys.first_of_pairs(queries[there], passages[there])]
  return corpus_lib.Given(
    queries[first].astype(np.int32),
    passages[first].astype(np.int32),
    scores[first].astype(np.float32),
  )


class Queries:
  """Some queries, found by id and text as a file names them.

  Args:
    ids: {id: row}.
    texts: {row: text} of the same rows.
  """

  def __init__(self, ids: Mapping[str, int], texts: Mapping[int, str]):
    self._ids, self._rows = ids, {}
    self._keys = dict(
      zip(texts, keys.of_texts(texts.values()).tolist(), strict=True)
    )
    for row, key in self._keys.items():
      self._rows.setdefault(key, []).append(row)

  def rows(self, record: given_formats.Record) -> list[int]:
    """Returns the rows of a record's query; [] if it is none of these.

    If the record has a text, its id must belong to that text, because other
    datasets may use the same ids.
    """
    row = self._ids.get(record.query_id)
    if record.query is None:
      return [] if row is None else [row]
    key = int(keys.of_texts([record.query])[0])
    if row is not None and self._keys[row] == key:
      return [row]
    return self._rows.get(key, [])


def _name_of(passage):
  """Returns the id, whether that is all, and the starts of a passage's keys."""
  text = passage.id if passage.text is None else passage.text
  _, starts = keys.of_passage(passage.title, text)
  return passage.id, passage.text is None, starts


def _rows_of(names, corpus):
  """Returns the (n,) int64 rows of n names of passages, -1 for unknown ones.

  An id matches if the file has no text for it, or the same text as the corpus.
  """
  if not names:
    return np.zeros(0, np.int64)
  ids, alone, starts = zip(*names, strict=True)
  starts = keys.as_starts(b''.join(starts))
  rows = corpus.rows.many(['' if i is None else i for i in ids])
  there = corpus.keys[rows]
  equal = (starts[:, :, None] == there[:, None, :]).any((1, 2))
  rows[~(np.array(alone) | equal) | np.array([i is None for i in ids])] = -1
  # Title and text, text alone, then title and text against text, both ways.
  for ours, theirs in ((1, 1), (0, 0), (1, 0), (0, 1)):
    left = np.nonzero(rows < 0)[0]
    rows[left] = _first(starts[left, ours], corpus.keys[:, theirs])
  return rows


def _first(wanted, column):
  """Returns the first index of each wanted key in a column, -1 for none."""
  order = np.argsort(column, kind='stable')
  places = np.searchsorted(column[order], wanted)
  found = order[np.minimum(places, len(order) - 1)]
  return np.where(column[found] == wanted, found, -1)
