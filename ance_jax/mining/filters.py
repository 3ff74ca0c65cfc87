"""Ranked passages -> those that are kept as hard negatives: pure numpy.

Filters come in one order, and a candidate falls to the first that rejects it,
so that what they rejected adds up. q queries, K ranked passages each; no larger
array is made, and no loop goes over queries.
"""

from typing import NamedTuple

import numpy as np

from ance_jax.data import trec
from ance_jax.mining import selection

# In their order: what never is a negative; ranks; scores; a second scorer.
FILTERS = (
  'positive',
  'same text',
  'own text',
  'answer',
  'skip_ranks',
  'max_score',
  'min_score',
  'absolute_margin',
  'relative_margin',
  'z_margin',
  'no score_run',
  'rerank_max_score',
)
_OF_SCORES = FILTERS[5:10]
# Instead of the number of a filter: kept by all; no candidate.
KEPT, NONE = -1, -2
# Share of the candidates above which a relative margin rejects nearly all.
_NEARLY_ALL = 0.9


class Rules(NamedTuple):
  """What a candidate must be, besides no positive; None: anything.

  Ranks count passages that are neither a positive, nor of its text, nor the
  query itself, nor have an answer. p is the least score of the query's
  positives.

  Attributes:
    skip_ranks: Ranks that are skipped.
    max_rank: The last rank that is a candidate.
    max_score: Its score is at most this.
    min_score: Its score is at least this.
    absolute_margin: Its score is below p - margin. 0 or more. NV-Retriever's
      TopK-MarginPos.
    relative_margin: Its score is below p - margin * |p|: for positive scores
      p * (1 - margin), NV-Retriever's TopK-PercPos; with negative ones the
      product would be above p. 0 or more.
    z_margin: Its score is below p - margin * the standard deviation of the
      query's scores. 0 or more.
    center_scores: Whether `relative_margin` is of scores less the query's mean
      score: below p - margin * |p - mean|.
    num_scores: Ranks, from the first, whose scores the mean and the standard
      deviation are of.
    rerank_max_score: Its score by a second scorer is at most this.
  """

  skip_ranks: int = 0
  max_rank: int | None = None
  max_score: float | None = None
  min_score: float | None = None
  absolute_margin: float | None = None
  relative_margin: float | None = None
  z_margin: float | None = None
  center_scores: bool = False
  num_scores: int | None = None
  rerank_max_score: float | None = None

  def filters(self) -> list[str]:
    """Returns those of FILTERS that are asked for, besides the first four."""
    asked = {
      **dict.fromkeys(self.scored(), True),
      'skip_ranks': self.skip_ranks > 0,
      'no score_run': self.rerank_max_score is not None,
      'rerank_max_score': self.rerank_max_score is not None,
    }
    return [name for name in FILTERS if asked.get(name)]

  def scored(self) -> list[str]:
    """Returns those of FILTERS that are asked for and read the scores."""
    return [name for name in _OF_SCORES if getattr(self, name) is not None]


def rejected_by(
  rows: np.ndarray,
  scores: np.ndarray,
  never: dict[str, np.ndarray],
  least: np.ndarray,
  rules: Rules,
) -> np.ndarray:
  """Returns which filter rejects each ranked passage, but for a second scorer.

  Args:
    rows: (q, K) int32 passage rows, best first, -1 where there is none.
    scores: (q, K) float, of the query and the passage.
    never: {one of the first of FILTERS: (q, K) bool}, what is no negative
      whatever its score is.
    least: (q,) float, the least score of the query's positives; -inf if one
      was not ranked, for then it is below all that was: no margin lets any of
      them pass.
    rules: `Rules`.

  Returns:
    (q, K) int8, a place in FILTERS, KEPT, or NONE behind the last rank.
  """
  rejected = np.where(rows >= 0, KEPT, NONE).astype(np.int8)
  for name, which in never.items():
    _reject(rejected, name, which)
  left = rejected == KEPT
  above = np.cumsum(left, 1) - left
  if rules.max_rank is not None:
    rejected[above >= rules.max_rank] = NONE
  if rules.skip_ranks:
    _reject(rejected, 'skip_ranks', above < rules.skip_ranks)
  if rules.max_score is not None:
    _reject(rejected, 'max_score', scores > rules.max_score)
  if rules.min_score is not None:
    _reject(rejected, 'min_score', scores < rules.min_score)
  mean, spread = 0, 0
  if rules.z_margin is not None or rules.center_scores:
    mean, spread = moments(
      scores, left & (above < (rules.num_scores or np.inf))
    )
  for name, below in thresholds(least, rules, mean, spread).items():
    _reject(rejected, name, scores >= below[:, None])
  return rejected


def reject_reranked(
  rejected: np.ndarray, reranked: np.ndarray, most: float
) -> None:
  """Rejects what a second scorer scores above `most`, or not at all.

  Args:
    rejected: As `rejected_by` returns it; changed where it is KEPT.
    reranked: (q, K) float, its scores, NaN where there is none.
    most: Its score of a negative is at most this.
  """
  _reject(rejected, 'no score_run', np.isnan(reranked))
  _reject(rejected, 'rerank_max_score', reranked > most)


def moments(
  scores: np.ndarray, counted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the (q,) means and standard deviations of some scores of each row.

  Args:
    scores: (q, K) float.
    counted: (q, K) bool, which of them count; 0 and 0 where none does.
  """
  number = np.maximum(counted.sum(1), 1)
  mean = np.where(counted, scores, 0).sum(1, dtype=np.float64) / number
  apart = np.where(counted, scores - mean[:, None], 0)
  return mean, np.sqrt((apart**2).sum(1) / number)


def thresholds(
  least: np.ndarray,
  rules: Rules,
  mean: np.ndarray | float = 0,
  spread: np.ndarray | float = 0,
) -> dict[str, np.ndarray]:
  """Returns {margin: (q,) scores that a candidate must be below}; see `Rules`.

  Args:
    least: As for `rejected_by`.
    rules: `Rules`.
    mean: (q,) mean scores, for `center_scores`.
    spread: (q,) standard deviations of scores, for `z_margin`.
  """
  ranked = np.isfinite(least)
  known = np.where(ranked, least, 0)
  units = {
    'absolute_margin': 1,
    'relative_margin': np.abs(known - (mean if rules.center_scores else 0)),
    'z_margin': spread,
  }
  return {
    name: np.where(ranked, known - getattr(rules, name) * unit, -np.inf).astype(
      least.dtype
    )
    for name, unit in units.items()
    if getattr(rules, name) is not None
  }


def choose(
  rejected: np.ndarray,
  number: int,
  random: list[np.random.Generator] | None = None,
) -> np.ndarray:
  """Returns which of the kept candidates are the negatives, (q, K) bool.

  Args:
    rejected: As `rejected_by` returns it.
    number: Negatives a query at most.
    random: Generator of each query to draw them with, evenly; None for the
      best.
  """
  kept = rejected == KEPT
  if random is None:
    return kept & (np.cumsum(kept, 1) <= number)
  # What is not kept comes behind all that is.
  keys = np.array([one.random(kept.shape[1]) for one in random])
  order = np.where(kept, keys, 2).argsort(1)
  chosen = np.zeros(kept.shape, bool)
  np.put_along_axis(chosen, order[:, :number], True, 1)
  return chosen & kept


def compact(
  values: np.ndarray, chosen: np.ndarray, number: int, missing: float
) -> np.ndarray:
  """Returns the chosen values of each row, in their order, (q, number).

  Args:
    values: (q, K).
    chosen: (q, K) bool, at most `number` in a row.
    number: Columns.
    missing: Value behind the last of a row.
  """
  block = np.full((len(values), number), missing, values.dtype)
  block[np.arange(number) < chosen.sum(1)[:, None]] = values[chosen]
  return block


def counts(rejected: np.ndarray) -> np.ndarray:
  """Returns the candidates that each filter rejected, and of how many queries.

  Args:
    rejected: As `rejected_by` returns it.

  Returns:
    (F + 2, 2) int64: a row for each of FILTERS, then for KEPT, then for all.
  """
  size = len(FILTERS) + 2
  keys = size * np.arange(len(rejected))[:, None] + (rejected - NONE)
  of_query = np.bincount(keys.ravel(), minlength=size * len(rejected))
  # Columns are NONE, KEPT, and the filters.
  none, kept, *others = of_query.reshape(-1, size).T
  columns = np.stack([*others, kept, kept + sum(others)])
  return np.stack([columns.sum(1), (columns > 0).sum(1)], 1)


def warning(candidates: np.ndarray, rules: Rules) -> str:
  """Returns a line on a relative margin that rejects nearly all, or ''.

  Args:
    candidates: (F + 2,) int, candidates as `counts` has them.
    rules: `Rules`.
  """
  place = FILTERS.index('relative_margin')
  share = candidates[place] / max(candidates[place:-1].sum(), 1)
  if rules.center_scores or share <= _NEARLY_ALL:
    return ''
  return (
    f'--relative_margin={rules.relative_margin} rejected {share:.1%} of the '
    'candidates that reached it: dot products are often so alike that none is '
    'that much below a positive; add --center_scores, or use --z_margin'
  )


def lookup_scores(
  ranking: trec.Ranking,
  places: np.ndarray,
  passages: np.ndarray,
  missing: float,
) -> np.ndarray:
  """Returns the scores that a ranking gives to some pairs.

  Args:
    ranking: `trec.Ranking` of q queries.
    places: (P,) int, which of these queries a pair is of.
    passages: (P,) int, its passage row.
    missing: Score of what is not ranked.

  Returns:
    (P,) of the type of the ranking's scores.
  """
  of_query, column = np.nonzero(ranking.rows >= 0)
  if not len(of_query):
    return np.full(len(places), missing, ranking.scores.dtype)
  rows = ranking.rows[of_query, column].astype(np.int64)
  size = max(rows.max(), np.max(passages, initial=0)) + 1
  keys = of_query * size + rows
  order = keys.argsort(kind='stable')
  keys, wanted = keys[order], np.asarray(places) * size + passages
  at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  values = ranking.scores[of_query, column][order][at]
  return np.where(keys[at] == wanted, values, missing).astype(values.dtype)


def find_excluded(
  rows: np.ndarray, queries: np.ndarray, excluded: selection.Excluded
) -> dict[str, np.ndarray]:
  """Returns {filter: (q, K) bool} of the passages that are excluded.

  Args:
    rows: (q, K) int32 passage rows, -1 where there is none.
    queries: (q,) int query rows.
    excluded: `selection.Excluded`.
  """
  there = rows >= 0
  keys = queries[:, None].astype(np.int64) * len(excluded.groups)
  grouped = keys + excluded.groups[rows]
  positive = there & selection.is_in(keys + rows, excluded.positives)
  own = there & selection.is_in(grouped, excluded.own)
  alike = there & selection.is_in(grouped, excluded.grouped)
  return {
    'positive': positive,
    'same text': alike & ~positive & ~own,
    'own text': own,
  }


def _reject(rejected, name, which):
  rejected[(rejected == KEPT) & which] = FILTERS.index(name)
