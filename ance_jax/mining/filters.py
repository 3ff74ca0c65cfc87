"""Ranked passages -> those that are kept as hard negatives: pure numpy.

Filters come in one order, and a candidate falls to the first that takes it, so
that what they took adds up. q queries, K ranked passages each; no larger array
is made, and no loop goes over queries.
"""

from typing import NamedTuple

import numpy as np

# In their order: what never is a negative; ranks; scores; a judge.
FILTERS = (
  'positive',
  'same text',
  'own text',
  'answer',
  'mine_from',
  'max_score',
  'min_score',
  'absolute_margin',
  'relative_margin',
  'no judge_run',
  'judge_max_score',
)
# Instead of the number of a filter: kept by all; no candidate.
KEPT, NONE = -1, -2


class Rules(NamedTuple):
  """What a candidate must be, besides no positive; None: anything.

  Attributes:
    mine_from: Ranks that are skipped. Ranks are those among what is neither a
      positive, nor of its text, nor the query itself, nor has an answer.
    mine_to: The last rank that is a candidate.
    max_score: Its score is at most this.
    min_score: Its score is at least this.
    absolute_margin: Its score is below p - margin; p is the least score of the
      query's positives. 0 or more. NV-Retriever's TopK-MarginPos.
    relative_margin: Its score is below p - margin * |p|: for positive scores
      p * (1 - margin), NV-Retriever's TopK-PercPos; with negative ones the
      product would be above p. 0 or more.
  """

  mine_from: int = 0
  mine_to: int = 100
  max_score: float | None = None
  min_score: float | None = None
  absolute_margin: float | None = None
  relative_margin: float | None = None


def taken_by(rows, scores, never, least, rules):
  """Returns which filter takes each ranked passage, but for a judge.

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
  taken = np.where(rows >= 0, KEPT, NONE).astype(np.int8)
  for name, which in never.items():
    _take(taken, name, which)
  left = taken == KEPT
  above = np.cumsum(left, 1) - left
  taken[above >= rules.mine_to] = NONE
  _take(taken, 'mine_from', above < rules.mine_from)
  if rules.max_score is not None:
    _take(taken, 'max_score', scores > rules.max_score)
  if rules.min_score is not None:
    _take(taken, 'min_score', scores < rules.min_score)
  for name in ('absolute_margin', 'relative_margin'):
    if (margin := getattr(rules, name)) is not None:
      below = thresholds(least, margin, relative=name == 'relative_margin')
      _take(taken, name, scores >= below[:, None])
  return taken


def take_judged(taken, judged, most):
  """Has a judge take what it scores above `most`, or not at all.

  Args:
    taken: As `taken_by` returns it; changed where it is KEPT.
    judged: (q, K) float, its scores, NaN where there is none.
    most: Its score of a negative is at most this.
  """
  _take(taken, 'no judge_run', np.isnan(judged))
  _take(taken, 'judge_max_score', judged > most)


def thresholds(least, margin, *, relative):
  """Returns the (q,) scores that a candidate must be below; see `Rules`."""
  ranked = np.isfinite(least)
  known = np.where(ranked, least, 0)
  margins = margin * np.abs(known) if relative else margin
  return np.where(ranked, known - margins, -np.inf).astype(least.dtype)


def choose(taken, number, random=None):
  """Returns which of the kept candidates are the negatives, (q, K) bool.

  Args:
    taken: As `taken_by` returns it.
    number: Negatives a query at most.
    random: numpy Generator to draw them with, evenly; None for the best.
  """
  kept = taken == KEPT
  if random is None:
    return kept & (np.cumsum(kept, 1) <= number)
  # What is not kept comes behind all that is.
  order = np.where(kept, random.random(kept.shape), 2).argsort(1)
  chosen = np.zeros(kept.shape, bool)
  np.put_along_axis(chosen, order[:, :number], True, 1)
  return chosen & kept


def packed(values, chosen, number, missing):
  """Returns the chosen values of each row, in their order, (q, number).

  Args:
    values: (q, K).
    chosen: (q, K) bool, at most `number` in a row.
    number: Columns.
    missing: What stands behind the last of a row.
  """
  block = np.full((len(values), number), missing, values.dtype)
  block[np.arange(number) < chosen.sum(1)[:, None]] = values[chosen]
  return block


def counts(taken):
  """Returns the candidates that each filter took, and of how many queries.

  Args:
    taken: As `taken_by` returns it.

  Returns:
    (F + 2, 2) int64: a row for each of FILTERS, then for KEPT, then for all.
  """
  masks = [taken == number for number in (*range(len(FILTERS)), KEPT)]
  masks.append(taken != NONE)
  return np.array([[mask.sum(), mask.any(1).sum()] for mask in masks])


def looked_up(ranking, places, passages, missing):
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


def _take(taken, name, which):
  taken[(taken == KEPT) & which] = FILTERS.index(name)
