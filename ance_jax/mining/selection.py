"""Excluded passages, random negatives and draws, in pure NumPy.

Q queries, K negatives each, N passages. No array has Q x K x positives entries,
and no loop covers all queries.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ance_jax.data import trec

_QUERIES_AT_ONCE = 1024
# Attempts to draw passages that `drop` does not name.
_TRIES = 20
# Purposes of random numbers; each query has one stream per purpose.
FILL, CHOOSE = range(2)


class Excluded(NamedTuple):
  """Passages that are not negatives of Q queries.

  Attributes:
    positives: (P,) int64, sorted, query row * N + passage row of each positive.
    grouped: (R,) int64, sorted, query row * N + text group of each positive
      and of each passage that is the query itself.
    own: (S,) int64, sorted, entries of `grouped` without a positive.
    num_excluded: (Q,) int, number of passages in each query's groups, all of
      which are excluded.
    groups: (N,) int, text group of each passage.
  """

  positives: np.ndarray
  grouped: np.ndarray
  own: np.ndarray
  num_excluded: np.ndarray
  groups: np.ndarray


def make_excluded(
  query_rows: np.ndarray,
  passage_rows: np.ndarray,
  groups: np.ndarray,
  num_queries: int,
  own: tuple[np.ndarray, np.ndarray] | None = None,
) -> Excluded:
  """Returns the excluded passages of Q queries.

  Args:
    query_rows: (P,) int query row of each positive.
    passage_rows: (P,) int passage row of each positive.
    groups: (N,) int, text group of each passage.
    num_queries: Q.
    own: (S,) int query rows and passage rows of passages that are the query
      itself.
  """
  size = len(groups)
  query_rows = query_rows.astype(np.int64)
  grouped = np.unique(query_rows * size + groups[passage_rows])
  own_rows, own_passages = ([], []) if own is None else own
  own_keys = np.asarray(own_rows, np.int64) * size + groups[own_passages]
  own_keys = np.setdiff1d(own_keys, grouped)
  grouped = np.union1d(grouped, own_keys)
  members = np.bincount(groups, minlength=size)[grouped % size]
  num = np.bincount(grouped // size, members, num_queries).astype(int)
  positives = np.unique(query_rows * size + passage_rows)
  return Excluded(positives, grouped, own_keys, num, groups)


def generator(seed: int, purpose: int, row: int) -> np.random.Generator:
  """Returns the generator of a query row, independent of its block."""
  key = np.array([seed, purpose << 56 | row], np.uint64)
  return np.random.Generator(np.random.Philox(key=key))


def fill(
  block: np.ndarray,
  queries: np.ndarray,
  excluded: Excluded,
  seed: int,
  drop: Callable | None = None,
) -> tuple[int, int]:
  """Fills each -1 of `block` with random passages that are not excluded.

  A query's draws depend only on the seed and its row, not on its block.

  Args:
    block: (q, K) int32 passage rows, modified in place.
    queries: (q,) int query rows; K plus a query's excluded passages is at most
      N.
    excluded: Excluded passages of all queries.
    seed: Seed of the draws.
    drop: drop((s,) query rows, (s, K) passage rows, -1 for none) -> (s, K)
      bool, passages to use only if 20 draws find no others.

  Returns:
    The number of passages drawn, and how many of them `drop` names.
  """
  (short,) = np.nonzero((block < 0).any(1))
  filled, drawn, tries = block[short], block[short] < 0, 0
  size, queries = len(excluded.groups), queries[short]
  keys = queries.astype(np.int64) * size
  randoms = [generator(seed, FILL, row) for row in queries.tolist()]
  while (empty := filled < 0).any():
    numbers = zip(randoms, empty.sum(1).tolist(), strict=True)
    filled[empty] = np.concatenate(
      [random.integers(size, size=number) for random, number in numbers]
    )
    filled[trec.repeated(filled)] = -1
    groups = keys[:, None] + excluded.groups[filled]
    filled[(filled >= 0) & empty & is_in(groups, excluded.grouped)] = -1
    if drop and tries < _TRIES:
      filled[drop(queries, np.where(empty, filled, -1))] = -1
    tries += 1
  block[short] = filled
  num_forced = 0
  if drop and tries > _TRIES:
    num_forced = int(drop(queries, np.where(drawn, filled, -1)).sum())
  return int(drawn.sum()), num_forced


def draw(
  random: np.random.Generator, negatives: np.ndarray, number: int
) -> np.ndarray:
  """Draws (q, H) columns from each row, repeating only after all are drawn.

  Args:
    random: Source of the draws.
    negatives: (q, K) int32 passage rows, padded with -1; for an empty row the
      columns point to a -1.
    number: H.
  """
  columns = np.empty((len(negatives), number), np.int64)
  for start in range(0, len(negatives), _QUERIES_AT_ONCE):
    block = negatives[start : start + _QUERIES_AT_ONCE]
    keys = random.random(block.shape)
    keys[block < 0] = 2  # Sorts last.
    there = np.maximum((block >= 0).sum(1), 1)[:, None]
    columns[start : start + len(block)] = np.take_along_axis(
      keys.argsort(1), np.arange(number) % there, 1
    )
  return columns


def overlap(first: np.ndarray, second: np.ndarray) -> float:
  """Returns the share of entries of `first` that the same row of `second` has.

  Args:
    first: (Q, K) int32 passage rows, distinct within a row, -1 for none.
    second: (Q, K) int32 passage rows, -1 for none.
  """
  keys = np.arange(len(first))[:, None] * (1 + max(first.max(), second.max()))
  there = first >= 0
  return float(
    np.isin((first + keys)[there], (second + keys)[second >= 0]).mean()
  )


def is_in(keys: np.ndarray, sorted_keys: np.ndarray) -> np.ndarray:
  """Returns a bool mask of the keys that are in `sorted_keys`."""
  if not len(sorted_keys):
    return np.zeros(keys.shape, bool)
  places = np.searchsorted(sorted_keys, keys)
  return sorted_keys[np.minimum(places, len(sorted_keys) - 1)] == keys
