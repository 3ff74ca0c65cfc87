"""Excluded passages, random negatives and draws, in pure NumPy.

Q queries, K negatives each, N passages. No array has Q x K x positives entries,
and no loop covers all queries.
"""

from collections.abc import Callable
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ance_jax.data import trec

_QUERIES_AT_ONCE = 1024
# Attempts to draw passages that `drop` does not name.
_TRIES = 20
# Bins of equal width into which the margins of a query fall.
_NUM_BINS = 10
# Logarithm of the weight of passages to draw only after all others.
_LEAST = -1e300
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
  random: np.random.Generator,
  negatives: np.ndarray,
  number: int,
  log_weights: np.ndarray | None = None,
) -> np.ndarray:
  """Draws (q, H) columns from each row, repeating only after all are drawn.

  Args:
    random: Source of the draws.
    negatives: (q, K) int32 passage rows, padded with -1; for an empty row the
      columns point to a -1.
    number: H.
    log_weights: (q, K) float, logarithms of the weights by which the columns
      are drawn one after the other; None for equal weights.
  """
  columns = np.empty((len(negatives), number), np.int64)
  for start in range(0, len(negatives), _QUERIES_AT_ONCE):
    block = negatives[start : start + _QUERIES_AT_ONCE]
    keys = random.random(block.shape)
    if log_weights is not None:
      # The order of such sums is that of drawing by the weights without
      # replacement (Gumbel-top-k; Kool et al. 2019). log1p(-u) is finite.
      here = log_weights[start : start + len(block)]
      keys = np.log(-np.log1p(-keys)) - here
    keys[block < 0] = np.inf  # Sorts last.
    there = np.maximum((block >= 0).sum(1), 1)[:, None]
    columns[start : start + len(block)] = np.take_along_axis(
      keys.argsort(1), np.arange(number) % there, 1
    )
  return columns


def log_weights(
  kind: str, scores: np.ndarray, positive: np.ndarray, a: float, b: float
) -> np.ndarray:
  """Returns (q, K) logarithms of the weights by which negatives are drawn.

  'simans': exp(-a (s - s+ - b)^2), Zhou et al. 2022 (SimANS), eq. 5.
  'simans_abs': exp(-a |s - s+ - b|), its released code for MS MARCO.
  'bins': Each of 10 bins of equal width from the smallest to the largest margin
    s+ - s has the same weight if it is not empty, shared by what it holds;
    Hofstaetter et al. 2021 (TAS-Balanced), section 4.2.

  Args:
    kind: One of these names.
    scores: (q, K) float scores of the negatives, NaN for none.
    positive: (q,) float scores of the positives.
    a: Steepness.
    b: Place of the peak, from the positive's score.
  """
  above = scores.astype(np.float64) - positive[:, None]
  if kind == 'bins':
    return -np.log(_num_in_bin(-above))
  apart = np.abs(above - b)
  found = -a * (apart if kind == 'simans_abs' else apart**2)
  return np.nan_to_num(found, nan=_LEAST, neginf=_LEAST)


def _num_in_bin(margins):
  """Returns the number of entries in the bin of each of (q, K) margins."""
  there = ~np.isnan(margins)
  least, most = (
    find(margins, 1, where=there, initial=end, keepdims=True)
    for find, end in ((np.min, np.inf), (np.max, -np.inf))
  )
  width = np.where(most > least, most - least, 1) / _NUM_BINS
  bins = np.where(there, margins - least, 0) // width
  bins = np.minimum(bins, _NUM_BINS - 1).astype(int)
  keys = bins + _NUM_BINS * np.arange(len(bins))[:, None]
  counts = np.bincount(keys[there], minlength=_NUM_BINS * len(bins))
  return np.where(there, counts[keys], 1)


def union(tables: Iterable[np.ndarray]) -> np.ndarray:
  """Returns the (q, W) passages of all tables, each once, padded with -1.

  A row starts with the passages of the first table, in order, followed by new
  passages of the second and so on; W is the length of the longest row.

  Args:
    tables: (q, K) int32 passage rows each, padded with -1.
  """
  rows = np.concatenate([*tables], 1)
  kept = (rows >= 0) & ~trec.repeated(rows)
  width = max(int(kept.sum(1).max(initial=0)), 1)
  found = np.full((len(rows), width), -1, rows.dtype)
  found[np.arange(width) < kept.sum(1)[:, None]] = rows[kept]
  return found


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
