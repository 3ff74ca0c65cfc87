"""What is no negative of a query; random negatives; draws. Pure NumPy.

Q queries, K negatives each, N passages. No array of Q x K x positives is made,
and no loop goes over all queries.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_QUERIES_AT_ONCE = 1024
# Draws for a query of passages that `drop` does not name.
_TRIES = 20
# Streams of random numbers, one a query and purpose.
FILL, CHOOSE = range(2)


class Excluded(NamedTuple):
  """The positives of Q queries, and all else that is no negative of them.

  Attributes:
    positives: (P,) int64, sorted, query row * N + passage row of each positive.
    grouped: (R,) int64, sorted, query row * N + text group of each positive,
      and of each passage that is the query itself.
    own: (S,) int64, sorted, those of `grouped` that are of no positive.
    num_excluded: (Q,) int, passages in these groups: what a query may not have.
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
  """Returns the `Excluded` of (P,) int query rows and their passage rows.

  Args:
    query_rows: Of the positives.
    passage_rows: Of the positives.
    groups: (N,) int, text group of each passage.
    num_queries: Q.
    own: (S,) int query and passage rows of passages that are the query itself,
      or None.
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
  """Returns the random numbers of a query row, whatever block it is in."""
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

  The draws of a query depend on the seed and its row alone.

  Args:
    block: (q, K) int32 passage rows; it is changed.
    queries: (q,) int query rows; K and the excluded passages of each are
      together at most N.
    excluded: `Excluded`.
    seed: Of the draws.
    drop: drop((s,) query rows, (s, K) passage rows, -1 for none) -> (s, K)
      bool, passages that are drawn only where 20 draws found no other.

  Returns:
    How many were drawn, and how many of them `drop` names all the same.
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
    filled[_repeated(filled)] = -1
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
  """Returns (q, H) columns drawn from each row, each once while there are any.

  Args:
    random: numpy Generator.
    negatives: (q, K) int32 passage rows, -1 behind the last of a row. Of a row
      without any the columns are of a -1.
    number: H.
  """
  columns = np.empty((len(negatives), number), np.int64)
  for start in range(0, len(negatives), _QUERIES_AT_ONCE):
    block = negatives[start : start + _QUERIES_AT_ONCE]
    keys = random.random(block.shape)
    keys[block < 0] = 2  # Behind all that are there.
    there = np.maximum((block >= 0).sum(1), 1)[:, None]
    columns[start : start + len(block)] = np.take_along_axis(
      keys.argsort(1), np.arange(number) % there, 1
    )
  return columns


def overlap(first: np.ndarray, second: np.ndarray) -> float:
  """Returns the mean share of entries of a row that the other's row has, too.

  Args:
    first: (Q, K) int32 passage rows, all different in a row, or -1 for none.
    second: (Q, K) int32.
  """
  keys = np.arange(len(first))[:, None] * (2 + max(first.max(), second.max()))
  there = first >= 0
  return float(
    np.isin((first + keys)[there], (second + keys)[second >= 0]).mean()
  )


def _repeated(block):
  """Returns where (q, K) `block` holds what its row has further left."""
  order = block.argsort(1, kind='stable')
  ordered = np.take_along_axis(block, order, 1)
  repeated = np.zeros(block.shape, bool)
  again = ordered[:, 1:] == ordered[:, :-1]
  np.put_along_axis(repeated, order[:, 1:], again, 1)
  return repeated


def is_in(keys, sorted_keys):
  """Returns whether each of `keys` is one of `sorted_keys`."""
  if not len(sorted_keys):
    return np.zeros(keys.shape, bool)
  places = np.searchsorted(sorted_keys, keys)
  return sorted_keys[np.minimum(places, len(sorted_keys) - 1)] == keys
