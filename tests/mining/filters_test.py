"""Filters of candidates, against a loop that follows the words of `Rules`."""

import numpy as np
import pytest

from ance_jax.data import trec
from ance_jax.mining import filters


def slowly(rows, scores, never, least, rules, judged, most):
  """Returns the names of what takes each candidate, a list of lists."""
  found = []
  for query in range(len(rows)):
    names, rank = [], 0
    for column in range(rows.shape[1]):
      score, below = scores[query, column], least[query]
      out = [name for name, which in never.items() if which[query, column]]
      if rows[query, column] < 0 or rank >= rules.mine_to:
        names.append(None)
        continue
      if out:
        names.append(out[0])
        continue
      rank += 1
      judge = judged[query, column]
      relative = below - rules.relative_margin * abs(below)
      tests = {
        'mine_from': rank <= rules.mine_from,
        'max_score': score > rules.max_score,
        'min_score': score < rules.min_score,
        'absolute_margin': not score < below - rules.absolute_margin,
        'relative_margin': not score < relative,
        'no judge_run': np.isnan(judge),
        'judge_max_score': judge > most,
      }
      names.append(next((n for n, taken in tests.items() if taken), 'kept'))
    found.append(names)
  return found


def many(seed, shape=(60, 50)):
  """Returns random arguments of `taken_by`, with queries of all kinds."""
  random = np.random.default_rng(seed)
  rows = np.stack([random.permutation(90)[: shape[1]] for _ in range(shape[0])])
  rows[random.random(shape).cumsum(1) > 20] = -1
  scores = -np.sort(-random.normal(size=shape), 1)
  never = {
    name: (random.random(shape) < 0.1) & (rows >= 0)
    for name in ('positive', 'same text', 'own text', 'answer')
  }
  least = random.normal(size=shape[0])
  least[:5] = -np.inf
  judged = random.random(shape)
  judged[random.random(shape) < 0.3] = np.nan
  rules = filters.Rules(3, 35, 1.5, -1.5, 0.1, 0.3)
  return rows, scores, never, least, rules, judged, 0.5


@pytest.mark.parametrize('seed', range(3))
def test_each_candidate_falls_to_the_first_filter_that_takes_it(seed):
  *arguments, judged, most = many(seed)
  taken = filters.taken_by(*arguments)
  filters.take_judged(taken, judged, most)
  names = (*filters.FILTERS, None, 'kept')  # -2 and -1 from the end.
  found = [[names[number] for number in row] for row in taken.tolist()]
  expected = slowly(*arguments, judged, most)
  assert found == expected
  assert {name for row in found for name in row} == set(names)
  counts = filters.counts(taken)
  for name, (candidates, queries) in zip(
    (*filters.FILTERS, 'kept'), counts[:-1].tolist(), strict=True
  ):
    assert candidates == sum(row.count(name) for row in expected)
    assert queries == sum(name in row for row in expected)
  assert counts[-1, 0] == counts[:-1, 0].sum()


def test_a_rule_that_is_not_given_takes_nothing():
  rows, scores, _, least, *_ = many(0)
  taken = filters.taken_by(rows, scores, {}, least, filters.Rules(0, 100))
  assert set(taken.ravel().tolist()) == {filters.KEPT, filters.NONE}
  assert ((taken == filters.KEPT) == (rows >= 0)).all()


def test_margins_are_those_of_nv_retriever_also_below_zero():
  least = np.array([0.8, -0.8, -np.inf])
  perc_pos = filters.thresholds(least, 0.05, relative=True)
  np.testing.assert_allclose(perc_pos, [0.8 * 0.95, -0.84, -np.inf])
  margin_pos = filters.thresholds(least, 0.05, relative=False)
  np.testing.assert_allclose(margin_pos, [0.75, -0.85, -np.inf])
  # What is at the bound is not below it.
  rules = filters.Rules(absolute_margin=0.0)
  taken = filters.taken_by(
    np.array([[1, 2]]), np.array([[0.5, 0.25]]), {}, np.array([0.5]), rules
  )
  assert [filters.FILTERS[taken[0, 0]], taken[0, 1]] == [
    'absolute_margin', filters.KEPT
  ]  # fmt: skip


def test_the_best_are_chosen_or_some_drawn_evenly():
  taken = np.full((4000, 6), filters.KEPT, np.int8)
  taken[:, 0], taken[0, 2:] = 0, 3
  best = filters.choose(taken, 2)
  assert best[1].tolist() == [False, True, True, False, False, False]
  assert best[0].sum() == 1
  drawn = filters.choose(taken, 2, np.random.default_rng(0))
  assert drawn[0].tolist() == best[0].tolist()
  assert (drawn[1:].sum(1) == 2).all()
  assert not drawn[:, 0].any()
  np.testing.assert_allclose(drawn[:, 1:].mean(0), 0.4, atol=0.03)
  values = np.arange(24000).reshape(4000, 6)
  packed = filters.packed(values, drawn, 2, -1)
  assert packed[0].tolist() == [1, -1]
  assert (np.diff(packed[1:]) > 0).all()
  assert np.isin(packed[packed >= 0], values[drawn]).all()


def test_scores_are_looked_up_by_pair():
  random = np.random.default_rng(1)
  rows = np.stack([random.permutation(40)[:9] for _ in range(20)])
  rows[:, 7:] = -1
  ranking = trec.Ranking(rows, random.random(rows.shape))
  places, passages = np.divmod(np.arange(20 * 50), 50)
  found = filters.looked_up(ranking, places, passages, -7.0)
  expected = np.full((20, 50), -7.0)
  np.put_along_axis(expected, rows[:, :7], ranking.scores[:, :7], 1)
  np.testing.assert_array_equal(found.reshape(20, 50), expected)
  nothing = trec.Ranking(np.full((2, 0), -1), np.zeros((2, 0)))
  assert filters.looked_up(nothing, np.array([1]), np.array([3]), 0.5) == [0.5]
