"""Filters ranked passages down to hard negatives, in pure numpy.

The filters run in a fixed order and each candidate counts for the first filter
that rejects it, so the counts add up. Arrays are at most (q, K), q queries with
K ranked passages each; only a random choice loops over queries.
"""

from typing import NamedTuple

import numpy as np

from ance_jax.data import trec
from ance_jax.mining import selection

# Order of the filters: never negatives, ranks, scores, second scorer.
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
# Values other than an index into FILTERS: kept by all filters, no candidate.
KEPT, NONE = -1, -2
# `warning` reports a relative margin that rejects more than this share.
_NEARLY_ALL = 0.9


class Rules(NamedTuple):
  """Rules that a candidate must satisfy; None disables a rule.

  Ranks skip passages that are a positive, have a positive's text, are the query
  itself or hold an answer. p is the lowest score of the query's positives.

  Attributes:
    skip_ranks: Number of top ranks to reject.
    max_rank: Last rank to consider.
    max_score: Highest score allowed.
    min_score: Lowest score allowed.
    absolute_margin: Scores must be below p - margin, margin >= 0.
      NV-Retriever's TopK-MarginPos.
    relative_margin: Scores must be below p - margin * |p|, margin >= 0. For
      positive scores this is p * (1 - margin), NV-Retriever's TopK-PercPos; for
      negative scores that product would be above p.
    z_margin: Scores must be below p - margin * the standard deviation of the
      query's scores, margin >= 0.
    center_scores: Whether `relative_margin` subtracts the query's mean score
      first, so that scores must be below p - margin * |p - mean|.
    num_scores: Number of top ranks from which to compute the mean and the
      standard deviation; None for all.
    rerank_max_score: Highest score by the second scorer allowed.
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
    """Returns the enabled filters after the first four, in order."""
    asked = {
      **dict.fromkeys(self.scored(), True),
      'skip_ranks': self.skip_ranks > 0,
      'no score_run': self.rerank_max_score is not None,
      'rerank_max_score': self.rerank_max_score is not None,
    }
    return [name for name in FILTERS if asked.get(name)]

  def scored(self) -> list[str]:
    """Returns the enabled filters that read scores, in order."""
    return [name for name in _OF_SCORES if getattr(self, name) is not None]


def rejected_by(
  rows: np.ndarray,
  scores: np.ndarray,
  never: dict[str, np.ndarray],
  least: np.ndarray,
  rules: Rules,
) -> np.ndarray:
  """Returns the filter that rejects each passage, without a second scorer.

  Args:
    rows: (q, K) int32 passage rows, best first, -1 for none.
    scores: (q, K) float scores of query and passage.
    never: (q, K) bool by filter, one of the first four of FILTERS; passages
      that are not negatives whatever their scores.
    least: (q,) float, lowest score of the query's positives; -inf if one was
      not ranked. All ranked passages score above that one, so each margin
      rejects all.
    rules: Rules to apply.

  Returns:
    (q, K) int8, an index into FILTERS, KEPT, or NONE after the last rank.
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
  """Rejects passages that a second scorer does not score or scores too high.

  Args:
    rejected: As `rejected_by` returns it; modified in place where KEPT.
    reranked: (q, K) float scores by the second scorer, NaN for none.
    most: Highest score that a negative may have.
  """
  _reject(rejected, 'no score_run', np.isnan(reranked))
  _reject(rejected, 'rerank_max_score', reranked > most)


def moments(
  scores: np.ndarray, counted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the (q,) means and standard deviations of each row's scores.

  Args:
    scores: (q, K) float.
    counted: (q, K) bool, scores to include; both results are 0 for a row with
      none.
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
  """Returns (q,) scores by margin, which candidates must be below; see `Rules`.

  Args:
    least: As for `rejected_by`.
    rules: Rules whose margins apply.
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
  """Returns a (q, K) bool mask of the kept candidates to use as negatives.

  Args:
    rejected: As `rejected_by` returns it.
    number: Maximum number of negatives per query.
    random: One generator per query, to draw uniformly; None takes the best.
  """
  kept = rejected == KEPT
  if random is None:
    return kept & (np.cumsum(kept, 1) <= number)
  # Rejected candidates get a key above all others, so they sort last.
  keys = np.array([one.random(kept.shape[1]) for one in random])
  order = np.where(kept, keys, 2).argsort(1)
  chosen = np.zeros(kept.shape, bool)
  np.put_along_axis(chosen, order[:, :number], True, 1)
  return chosen & kept


def compact(
  values: np.ndarray, chosen: np.ndarray, number: int, missing: float
) -> np.ndarray:
  """Returns the chosen values of each row, in order, as (q, number).

  Args:
    values: (q, K).
    chosen: (q, K) bool, at most `number` per row.
    number: Number of columns.
    missing: Padding of shorter rows.
  """
  block = np.full((len(values), number), missing, values.dtype)
  block[np.arange(number) < chosen.sum(1)[:, None]] = values[chosen]
  return block


def counts(rejected: np.ndarray) -> np.ndarray:
  """Counts the candidates that each filter rejected, and their queries.

  Args:
    rejected: As `rejected_by` returns it.

  Returns:
    (F + 2, 2) int64, candidates and queries per filter of FILTERS, then for
    KEPT, then in total.
  """
  size = len(FILTERS) + 2
  keys = size * np.arange(len(rejected))[:, None] + (rejected - NONE)
  of_query = np.bincount(keys.ravel(), minlength=size * len(rejected))
  # Columns: NONE, KEPT, then the filters.
  none, kept, *others = of_query.reshape(-1, size).T
  columns = np.stack([*others, kept, kept + sum(others)])
  return np.stack([columns.sum(1), (columns > 0).sum(1)], 1)


def warning(candidates: np.ndarray, rules: Rules) -> str:
  """Returns a warning if the relative margin rejects nearly all, else ''.

  Args:
    candidates: (F + 2,) int, first column of `counts`.
    rules: Rules that were applied.
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
  """Returns a ranking's scores of P pairs.

  Args:
    ranking: Ranking of q queries.
    places: (P,) int, index of each pair's query in the ranking.
    passages: (P,) int passage row of each pair.
    missing: Score of pairs that are not ranked.

  Returns:
    (P,) scores, of the dtype of the ranking's.
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
  """Returns (q, K) bool masks of the excluded passages, by filter.

  Args:
    rows: (q, K) int32 passage rows, -1 for none.
    queries: (q,) int query rows.
    excluded: Excluded passages of all queries.
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
