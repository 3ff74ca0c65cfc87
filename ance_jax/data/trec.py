"""Rankings of other systems: TREC run files -> arrays.

The arrays take 16 bytes per line, and sorting the lines about 100.
"""

import functools
import itertools
import math
import os
import pathlib
from typing import NamedTuple

import numpy as np

from ance_jax.core import logs
from ance_jax.core import strict_io
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
    sizes = np.diff(self.offsets)[queries]
    there = np.arange(sizes.max(initial=0)) < sizes[:, None]
    places = (self.offsets[queries][:, None] + np.arange(there.shape[1]))[there]
    rows = np.full(there.shape, -1, np.int32)
    scores = np.full(there.shape, -np.inf)
    rows[there], scores[there] = self.passages[places], self.scores[places]
    return Ranking(rows, scores)


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
  parts = [[np.zeros(0, kind) for kind in (np.int32, np.int32, np.float64)]]
  for lines in _parts(_lines(path, query_rows)):
    numbers, queries, ids, scores = zip(*lines, strict=True)
    passages = passage_rows.many(ids)
    for number, an_id in itertools.compress(
      zip(numbers, ids, strict=True), passages < 0
    ):
      records.row(path, number, 'ranked passage', passage_rows, an_id)
    parts.append(
      [
        np.array(queries, np.int32),
        passages.astype(np.int32),
        np.array(scores, np.float64),
      ]
    )
  queries, passages, scores = map(np.concatenate, zip(*parts, strict=True))
  return _ranked(path, queries, passages, scores, len(query_rows))


def _lines(path, query_rows):
  """Yields (line number, query row, passage id, score) of a run file."""
  unknown = 0
  progress = functools.partial(
    logs.progress, what=f'read {pathlib.Path(path).name}', unit='bytes'
  )
  for number, line in strict_io.lines(path, progress):
    cells = line.split()
    if len(cells) != 6:
      raise strict_io.bad(
        path, 'a line of a run must be query id, Q0, passage id, rank, score '
        'and name', strict_io.quoted(line), 'give a TREC run file', number
      )  # fmt: skip
    query = query_rows.get(cells[0])
    if query is None:
      unknown += 1
    else:
      yield number, query, cells[2], _score(path, number, cells[4])
  if unknown:
    logs.log(f'{path}: left out {unknown:,} lines of other queries')


def _parts(items):
  """Yields lists of up to `_LINES_AT_ONCE` items."""
  while part := list(itertools.islice(items, _LINES_AT_ONCE)):
    yield part


def _score(path, number, text):
  try:
    score = float(text)
  except ValueError:
    score = math.nan
  if not math.isfinite(score):
    raise strict_io.bad(
      path, 'a score must be a number', strict_io.quoted(text), 'mend the line',
      number
    )  # fmt: skip
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
  by_pair = np.lexsort((passages, queries))
  again = np.zeros(len(order), bool)
  again[by_pair[1:]] = (
    (passages[by_pair[1:]] == passages[by_pair[:-1]])
    & (queries[by_pair[1:]] == queries[by_pair[:-1]])
  )  # fmt: skip
  if again.any():
    logs.log(
      f'{path}: left out {again.sum():,} lines of a passage that its query has '
      'higher up'
    )
    queries, passages, scores = (
      column[~again] for column in (queries, passages, scores)
    )
  offsets = np.searchsorted(queries, np.arange(num_queries + 1))
  return Ranked(offsets, passages, scores)
