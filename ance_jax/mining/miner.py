"""The mining pipeline: ranked passages -> hard negatives, per block of queries.

candidates -> exclude -> filter -> choose -> fill on shortage. Refreshes, the
negatives of BM25 and of files, and --job=mine all call it. It handles no models
or folders, only functions of rows.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ance_jax.core import logs
from ance_jax.data import trec
from ance_jax.mining import candidates
from ance_jax.mining import filters
from ance_jax.mining import selection

# Maximum per block: queries, and queries times ranked passages.
_QUERIES_AT_ONCE, _PLACES_AT_ONCE = 1024, 2**22


class Settings(NamedTuple):
  """How to mine.

  Attributes:
    number: Maximum number of negatives per query.
    rules: Rules of the filters.
    choose: 'top' takes the best remaining candidates, 'random' draws from
      them uniformly.
    on_shortage: For a query with fewer negatives than `least`, whether to
      'keep' them, 'drop' them all, or 'fill' up with random passages.
    least: Negatives that a query needs; None for `number`.
    seed: Seed of all draws, which also depend on the query's row.
  """

  number: int
  rules: filters.Rules = filters.Rules()
  choose: str = 'top'
  on_shortage: str = 'fill'
  least: int | None = None
  seed: int = 0


class Task(NamedTuple):
  """Inputs that all blocks of queries share.

  Attributes:
    source: Source of candidates.
    positives: (P,) int query rows, ascending, and passage rows of positives.
    excluded: Passages that are not negatives.
    settings: How to mine.
    holds_answer: holds_answer((q,) query rows, (q, K) passage rows, -1 for
      none) -> (q, K) bool, passages that answer the query and so are not
      negatives; None skips the check.
    rerank: rerank((P,) query rows, (P,) passage rows) -> (P,) scores of a
      second scorer, NaN for pairs that it does not score; None for no second
      scorer.
  """

  source: candidates.CandidateSource
  positives: tuple[np.ndarray, np.ndarray]
  excluded: selection.Excluded
  settings: Settings
  holds_answer: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
  rerank: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


class Mined(NamedTuple):
  """Candidates and negatives of q queries.

  Attributes:
    queries: (q,) int query rows.
    pairs: (P,) int, indices into `Task.positives` of these queries' positives.
    of_query: (P,) int, index into `queries` of each positive, ascending.
    positives: (P,) int32 passage row of each positive.
    positive_scores: (P,) float, -inf if not ranked.
    ranking: Ranking of the q queries.
    least: (q,) float, lowest of each query's `positive_scores`.
    reranked: (q, K) float scores of the second scorer, if there is one.
    rejected: (q, K) int8, as `filters.rejected_by` returns it.
    found: (q,) int, negatives that passed the filters, at most `number`.
    negatives: (q, number) int32, padded with -1.
    scores: (q, number) float, NaN if unknown.
    num_drawn: Number of negatives drawn at random.
    num_forced: Number of these that a filter rejects, used because the draws
      found no others.
  """

  queries: np.ndarray
  pairs: np.ndarray
  of_query: np.ndarray
  positives: np.ndarray
  positive_scores: np.ndarray
  ranking: trec.Ranking
  least: np.ndarray
  reranked: np.ndarray | None
  rejected: np.ndarray
  found: np.ndarray
  negatives: np.ndarray
  scores: np.ndarray
  num_drawn: int
  num_forced: int


class Table(NamedTuple):
  """The negatives of consecutive queries.

  Attributes:
    rows: (q, K) int32 passage rows, best first, padded with -1.
    scores: (q, K) float32, NaN if unknown.
    positive_scores: (P,) float32 scores of these queries' positives in the
      order of `Task.positives`, -inf if not ranked.
    rejected: (F + 2,) int, first column of `filters.counts`.
    num_drawn: As in `Mined`.
    num_forced: As in `Mined`.
  """

  rows: np.ndarray
  scores: np.ndarray
  positive_scores: np.ndarray
  rejected: np.ndarray
  num_drawn: int
  num_forced: int


def depths(task: Task) -> np.ndarray:
  """Returns the (Q,) int search depths that leave enough candidates.

  The depth includes all passages that may be excluded, and doubles the window
  if passages with an answer are.
  """
  number, rules = task.settings.number, task.settings.rules
  window = rules.max_rank or number + rules.skip_ranks
  if task.holds_answer:
    window *= 2
  return window + task.excluded.num_excluded


def blocks(task: Task, queries: np.ndarray) -> Iterator[np.ndarray]:
  """Splits (Q,) query rows into blocks whose rankings fit in memory."""
  deep = np.minimum(depths(task), len(task.excluded.groups))[queries]
  start = 0
  while start < len(queries):
    size = _QUERIES_AT_ONCE
    while (
      size > 1 and size * deep[start : start + size].max() > _PLACES_AT_ONCE
    ):
      size //= 2
    yield queries[start : start + size]
    start += size


def by_depth(task: Task, start: int, end: int) -> np.ndarray:
  """Returns the query rows from `start` to `end`, sorted by search depth.

  A block is searched as deep as its deepest query, so sorting keeps one query
  with thousands of duplicates from deepening the search of others.
  """
  return start + np.argsort(depths(task)[start:end], kind='stable')


def mine_table(task: Task, start: int, end: int, what: str) -> Table:
  """Mines consecutive queries.

  Args:
    task: Inputs of the pipeline.
    start: First query row.
    end: Last query row plus one.
    what: Label of the progress bar.
  """
  first, last = np.searchsorted(task.positives[0], (start, end))
  shape = end - start, task.settings.number
  rows = np.full(shape, -1, np.int32)
  scores = np.full(shape, np.nan, np.float32)
  positive_scores = np.full(last - first, np.nan, np.float32)
  rejected, num_drawn, num_forced = 0, 0, 0
  parts = blocks(task, by_depth(task, start, end))
  parts = logs.progress(parts, what, total=shape[0], unit='queries', count=len)
  for mined in mine(task, parts):
    places = mined.queries - start
    rows[places], scores[places] = mined.negatives, mined.scores
    positive_scores[mined.pairs - first] = mined.positive_scores
    rejected += filters.counts(mined.rejected)[:, 0]
    num_drawn += mined.num_drawn
    num_forced += mined.num_forced
  return Table(rows, scores, positive_scores, rejected, num_drawn, num_forced)


def mine(task: Task, blocks: Iterable[np.ndarray]) -> Iterator[Mined]:
  """Ranks and mines each block of (q,) int query rows."""
  deep = depths(task)
  for queries in blocks:
    depth = min(int(deep[queries].max()), len(task.excluded.groups))
    yield mine_block(task, queries, task.source.rank(queries, depth))


def mine_block(task: Task, queries: np.ndarray, ranking: trec.Ranking) -> Mined:
  """Mines one block of (q,) int query rows from their ranking."""
  pairs, of_query = _pairs_of(task.positives[0], queries)
  positives = task.positives[1][pairs]
  positive_scores = _positive_scores(
    task, queries, ranking, of_query, positives
  )
  least = np.full(len(queries), np.inf, positive_scores.dtype)
  np.minimum.at(least, of_query, positive_scores)
  rejected, reranked = _rejected(task, queries, ranking, least)
  chosen = _chosen(task.settings, queries, rejected)
  negatives, scores, num_drawn, num_forced = _negatives(
    task, queries, ranking, rejected, chosen
  )
  return Mined(
    queries,
    pairs,
    of_query,
    positives,
    positive_scores,
    ranking,
    least,
    reranked,
    rejected,
    chosen.sum(1),
    negatives,
    scores,
    num_drawn,
    num_forced,
  )


def _pairs_of(query_rows, queries):
  """Returns the indices of the queries' pairs, and of each pair's query."""
  starts, ends = (
    np.searchsorted(query_rows, queries, side) for side in ('left', 'right')
  )
  sizes = ends - starts
  of_query = np.repeat(np.arange(len(queries)), sizes)
  before = np.cumsum(sizes) - sizes
  return np.arange(len(of_query)) + (starts - before)[of_query], of_query


def _positive_scores(task, queries, ranking, of_query, passages):
  if task.source.score:
    return task.source.score(queries[of_query], passages)
  found = filters.lookup_scores(ranking, of_query, passages, -np.inf)
  return np.where(np.isnan(found), -np.inf, found)  # Lists have no scores.


def _rejected(task, queries, ranking, least):
  """Returns the filter that rejects each candidate, and the second scores.

  Cross-encoders are slow, so they rescore only candidates that filters keep.
  """
  rules, rows = task.settings.rules, ranking.rows
  never = filters.find_excluded(rows, queries, task.excluded)
  if task.holds_answer:
    excluded = np.any(list(never.values()), 0)
    never['answer'] = task.holds_answer(queries, np.where(excluded, -1, rows))
  rejected = filters.rejected_by(rows, ranking.scores, never, least, rules)
  if not task.rerank:
    return rejected, None
  reranked = np.full(rows.shape, np.nan)
  left = rejected == filters.KEPT
  reranked[left] = task.rerank(queries[np.nonzero(left)[0]], rows[left])
  filters.reject_reranked(rejected, reranked, rules.rerank_max_score)
  return rejected, reranked


def _chosen(settings, queries, rejected):
  random = None
  if settings.choose == 'random':
    random = [
      selection.generator(settings.seed, selection.CHOOSE, row)
      for row in queries.tolist()
    ]
  return filters.choose(rejected, settings.number, random)


def _negatives(task, queries, ranking, rejected, chosen):
  """Returns `negatives`, `scores`, `num_drawn` and `num_forced` of `Mined`."""
  settings = task.settings
  number, least = settings.number, settings.least or settings.number
  negatives = filters.compact(ranking.rows, chosen, number, -1)
  scores = filters.compact(ranking.scores, chosen, number, np.nan)
  short = chosen.sum(1) < least
  if settings.on_shortage == 'drop':
    negatives[short], scores[short] = -1, np.nan
  if settings.on_shortage != 'fill' or not short.any():
    return negatives, scores, 0, 0
  place, column = np.nonzero(negatives[:, :least] < 0)
  drop = _make_drop(task, queries, ranking.rows, rejected)
  num_drawn, num_forced = selection.fill(
    negatives[:, :least], queries, task.excluded, settings.seed, drop
  )
  if task.source.score:
    drawn = negatives[place, column]
    scores[place, column] = task.source.score(queries[place], drawn)
  return negatives, scores, num_drawn, num_forced


def _make_drop(task, queries, rows, rejected):
  """Returns a `drop` for `selection.fill` that names rejected passages."""
  size = len(task.excluded.groups)
  keys = queries[:, None].astype(np.int64) * size + rows
  # -1, which no pair has, keeps the array non-empty.
  known = np.sort(np.append(keys[rejected >= 0], -1))

  def drop(asked, drawn):
    keys = np.where(drawn < 0, -2, asked[:, None] * size + drawn)
    named = selection.is_in(keys, known)
    if task.holds_answer:
      named |= task.holds_answer(asked, np.where(named, -1, drawn))
    return named

  return drop
