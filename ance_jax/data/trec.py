"""Rankings of other systems: TREC run files -> arrays.

The arrays take 16 bytes per line, and sorting the lines about 100.
"""

import array
import itertools
import math
import os
import pathlib
from typing import NamedTuple

import numpy as np

from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import keys
from ance_jax.data import records
from ance_jax.data import strings

_LINES_AT_ONCE = 65_536


class Ranking(NamedTuple):
  """The best passages of Q queries, best first, ties by row.

  Attributes:
    rows: (Q, K) int32 passage rows; -1 where the index found no more.
    scores: (Q, K) float32; -inf where rows is -1.
  """

  rows: np.ndarray
  scores: np.ndarray


def repeated(rows: np.ndarray) -> np.ndarray:
  """Returns a (q, K) mask of entries that repeat one to their left."""
  order = rows.argsort(1, kind='stable')
  ordered = np.take_along_axis(rows, order, 1)
  again = np.zeros(rows.shape, bool)
  np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
  return again


class Ranked(NamedTuple):
  """Rankings of some of Q queries, as read from a file.

  Attributes:
    offsets: (Q + 1,) int64; the ranking of query row i is the slice from
      offsets[i] to offsets[i + 1], which may be empty.
    passages: (R,) int32 passage rows, best first, distinct within a ranking.
    scores: (R,) float64.
  """

  offsets: np.ndarray
  passages: np.ndarray
  scores: np.ndarray

  def of(self, query: int) -> np.ndarray:
    """Returns the passage rows of a query, best first."""
    return self.passages[self.offsets[query] : self.offsets[query + 1]]

  def block(self, queries: np.ndarray) -> Ranking:
    """Returns the `Ranking` of (q,) query rows, as wide as the longest.

    Scores are float64, as in the file.
    """
    slices = self.offsets[queries], np.diff(self.offsets)[queries]
    return Ranking(
      corpus_lib.padded(self.passages, *slices, -1),
      corpus_lib.padded(self.scores, *slices, -np.inf),
    )


def read_run(
  path: str | os.PathLike,
  query_rows: dict[str, int],
  passage_rows: strings.Rows,
) -> Ranked:
  """Reads a TREC run file.

  A line is query id, Q0, passage id, rank, score and name. As in trec_eval, the
  score decides and the rank is ignored; ties keep the order of the file. Lines
  of other queries and repeated passages of a query are skipped and counted.

  Args:
    path: Path of the file.
    query_rows: {query id: row} of all Q queries.
    passage_rows: Rows of the passage ids.
  """
  columns = [array.array(kind) for kind in 'iid']
  for lines in strings.batches(_lines(path, query_rows), _LINES_AT_ONCE):
    numbers, queries, ids, scores = zip(*lines, strict=True)
    passages = passage_rows.many(ids)
    for number, an_id in itertools.compress(
      zip(numbers, ids, strict=True), passages < 0
    ):
      records.row(path, number, 'ranked passage', passage_rows, an_id)
    for column, part in zip(columns, (queries, passages, scores), strict=True):
      column.extend(part)
  return _ranked(path, *map(np.array, columns), len(query_rows))


def _lines(path, query_rows):
  """Yields (line number, query row, passage id, score) of a run file."""
  unknown = 0
  for number, line in records.read_lines(pathlib.Path(path)):
    cells = line.split()
    if len(cells) != 6:
      raise strict_io.refusal(
        path, f'{strict_io.quoted(line)} is not query id, Q0, passage id, '
        'rank, score and name', 'give a TREC run file', number
      )  # fmt: skip
    query = query_rows.get(cells[0])
    if query is None:
      unknown += 1
    else:
      yield number, query, cells[2], _score(path, number, cells[4])
  if unknown:
    logs.log(f'{path}: left out {unknown:,} lines of other queries')


def _score(path, number, text):
  try:
    score = float(text)
  except ValueError:
    score = math.nan
  if not math.isfinite(score):
    raise strict_io.refusal(
      path,
      f'the score {strict_io.quoted(text)} is not a number',
      'correct the line',
      number,
    )
  return score


def _ranked(path, queries, passages, scores, num_queries):
  """Sorts lines by query and score, keeping each passage of a query once.

  Args:
    path: Path of the file that the lines come from.
    queries: (R,) int32 query rows.
    passages: (R,) int32 passage rows.
    scores: (R,) float64.
    num_queries: Q.
  """
  # lexsort is stable, so ties keep the order of the file.
  order = np.lexsort((-scores, queries))
  queries, passages, scores = queries[order], passages[order], scores[order]
  kept = keys.first_of_pairs(queries, passages)
  if again := len(queries) - len(kept):
    logs.log(
      f'{path}: left out {again:,} lines of a passage that its query has '
      'higher up'
    )
  return Ranked(
    np.searchsorted(queries[kept], np.arange(num_queries + 1)),
    passages[kept],
    scores[kept],
  )
