"""Rankings + judgements -> hard negatives: pure numpy.

Q queries, K negatives each, N passages. No array of Q x K x positives is made,
and no loop goes over queries.
"""

from typing import NamedTuple

import numpy as np

from ance_jax.core import logs

_QUERIES_AT_ONCE = 1024
# Draws for a query of passages that `drop` does not name.
_TRIES = 20


class Positives(NamedTuple):
  """The positives of Q queries, and all else that is no negative of them.

  Attributes:
    judged: (P,) int64, sorted, query row * N + passage row of each positive.
    grouped: (R,) int64, sorted, query row * N + text group of each positive,
      and of each passage that is the query itself.
    own: (S,) int64, sorted, those of `grouped` that are of no positive.
    banned: (Q,) int, passages in these groups: what a query may not have.
    groups: (N,) int, text group of each passage.
  """

  judged: np.ndarray
  grouped: np.ndarray
  own: np.ndarray
  banned: np.ndarray
  groups: np.ndarray


def make_positives(query_rows, passage_rows, groups, num_queries, own=None):
  """Returns the `Positives` of (P,) int query rows and their passage rows.

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
  banned = np.bincount(grouped // size, members, num_queries).astype(int)
  judged = np.unique(query_rows * size + passage_rows)
  return Positives(judged, grouped, own_keys, banned, groups)


def hard_negatives(
  rank, positives, top_k, seed, what='mine', drop=None, least=None
):
  """Returns the best `top_k` passages of each query that are no positives.

  A positive is what was judged relevant, and each passage of its text group;
  the query itself is no negative either.
  As many more are asked for as can be dropped, so that no query is left short;
  where the ranking itself ends early (an inverted file that visits too few
  lists, BM25 without a common word), passages drawn at random fill it up.

  Args:
    rank: rank(query rows, depth) -> (q, depth) passage rows, best first, -1
      where there is none.
    positives: `Positives`.
    top_k: K, negatives a query; K and any query's banned passages together are
      at most N.
    seed: For the passages drawn at random.
    what: Name of the phase for the progress bar.
    drop: drop((q,) query rows, (q, depth) passage rows, -1 for none) -> (q,
      depth) bool, candidates that are no negatives either; twice as many are
      asked for then, and drawn ones are asked about, too. Or None.
    least: Negatives that a query is filled up to; None: K.

  Returns:
    (Q, K) int32 passage rows, best first, -1 behind the last, and a dict of
    counts over all queries: 'judged', 'same_text' and 'own_text', candidates
    that were dropped as positives, as passages of their text, and as the query
    itself; 'random', that were drawn; with `drop` also 'answers', that it
    names, and 'for_want_of_others', negatives that it names, too, of a query
    of which it names nearly all passages.
  """
  num_passages = len(positives.groups)
  depths = top_k + positives.banned
  # Of similar depth together, for one query with thousands of duplicates is
  # not to make the search deep for all.
  order = np.argsort(depths, kind='stable')
  negatives = np.empty((len(depths), top_k), np.int32)
  counts = {'judged': 0, 'same_text': 0, 'own_text': 0, 'random': 0}
  if drop:
    depths = depths + top_k
    counts |= {'answers': 0, 'for_want_of_others': 0}
  random = np.random.default_rng(seed)
  starts = range(0, len(order), _QUERIES_AT_ONCE)
  for start in logs.progress(starts, what, total=len(starts), unit='batches'):
    queries = order[start : start + _QUERIES_AT_ONCE]
    depth = min(int(depths[queries].max()), num_passages)
    ranking = rank(queries, depth)
    keys = queries[:, None].astype(np.int64) * num_passages
    found = ranking >= 0
    grouped = keys + positives.groups[ranking]
    banned = found & is_in(grouped, positives.grouped)
    kept = found & ~banned
    if drop:
      dropped = kept & drop(queries, np.where(kept, ranking, -1))
      counts['answers'] += int(dropped.sum())
      kept &= ~dropped
    for name, taken in (
      ('same_text', banned),
      ('judged', found & is_in(keys + ranking, positives.judged)),
      ('own_text', found & is_in(grouped, positives.own)),
    ):
      counts[name] += int(taken.sum())
    place = np.cumsum(kept, 1)
    short = np.maximum(top_k - place[:, -1], 0)
    kept &= place <= top_k
    block = np.full((len(queries), top_k), -1, np.int32)
    block[np.arange(top_k) < (top_k - short)[:, None]] = ranking[kept]
    drawn, unwilling = fill(block[:, :least], queries, positives, random, drop)
    counts['random'] += drawn
    if drop:
      counts['for_want_of_others'] += unwilling
    negatives[queries] = block
  counts['same_text'] -= counts['judged'] + counts['own_text']
  return negatives, counts


def fill(block, queries, positives, random, drop=None):
  """Fills each -1 of `block` with passages at random that are no positives.

  Args:
    block: (q, K) int32 passage rows; it is changed.
    queries: (q,) int query rows; K and the banned passages of each are together
      at most N.
    positives: `Positives`.
    random: numpy Generator.
    drop: As for `hard_negatives`.

  Returns:
    How many there were, and how many of them `drop` names all the same.
  """
  (short,) = np.nonzero((block < 0).any(1))
  filled, unwilling, tries = block[short], 0, 0
  keys = queries[short].astype(np.int64) * len(positives.groups)
  while (empty := filled < 0).any():
    drawn = random.integers(len(positives.groups), size=empty.sum())
    filled[empty] = drawn
    filled[_repeated(filled)] = -1
    groups = keys[:, None] + positives.groups[filled]
    filled[(filled >= 0) & empty & is_in(groups, positives.grouped)] = -1
    if drop:
      named = drop(queries[short], np.where(empty, filled, -1))
      if tries < _TRIES:
        filled[named] = -1
      else:
        unwilling += int(named.sum())
      tries += 1
  num_filled = int((block[short] < 0).sum())
  block[short] = filled
  return num_filled, unwilling


def draw(negatives, number, seed):
  """Returns some of each row, drawn evenly without repetition, as drawn.

  Args:
    negatives: (q, K) int32 passage rows.
    number: H, entries a row, at most K.
    seed: Of the draw, as numpy's `default_rng` takes it.

  Returns:
    (q, H) int32 passage rows.
  """
  random = np.random.default_rng(seed)
  drawn = np.empty((len(negatives), number), np.int32)
  for start in range(0, len(negatives), _QUERIES_AT_ONCE):
    block = negatives[start : start + _QUERIES_AT_ONCE]
    columns = random.random(block.shape).argsort(1)[:, :number]
    drawn[start : start + len(block)] = np.take_along_axis(block, columns, 1)
  return drawn


def overlap(first, second):
  """Returns the mean share of entries of a row that the other's row has, too.

  Args:
    first: (Q, K) int32 passage rows, all different in a row.
    second: (Q, K) int32.
  """
  keys = np.arange(len(first))[:, None] * (1 + max(first.max(), second.max()))
  return float(np.isin(first + keys, second + keys).mean())


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
