"""Filters of candidates, against a loop that follows the words of `Rules`."""

import numpy as np
import pytest

from ance_jax.data import trec
from ance_jax.mining import filters
from ance_jax.mining import selection


def slow_moments(rows, scores, never, number):
  """Returns mean and standard deviation of the first scores of a query."""
  places = [c for c, row in enumerate(rows) if row >= 0]
  left = [c for c in places if not any(which[c] for which in never.values())]
  return np.mean(scores[left[:number]]), np.std(scores[left[:number]])


def slowly(rows, scores, never, least, rules, reranked, most):
  """Returns the names of what rejects each candidate, a list of lists."""
  found = []
  for query in range(len(rows)):
    names, rank = [], 0
    of_query = {name: which[query] for name, which in never.items()}
    mean, spread = slow_moments(
      rows[query], scores[query], of_query, rules.num_scores
    )
    for column in range(rows.shape[1]):
      score, below = scores[query, column], least[query]
      out = [name for name, which in never.items() if which[query, column]]
      if rows[query, column] < 0 or rank >= rules.max_rank:
        names.append(None)
        continue
      if out:
        names.append(out[0])
        continue
      rank += 1
      again = reranked[query, column]
      centre = mean if rules.center_scores else 0
      relative = below - rules.relative_margin * abs(below - centre)
      tests = {
        'skip_ranks': rank <= rules.skip_ranks,
        'max_score': score > rules.max_score,
        'min_score': score < rules.min_score,
        'absolute_margin': not score < below - rules.absolute_margin,
        'relative_margin': not score < relative,
        'z_margin': not score < below - rules.z_margin * spread,
        'no score_run': np.isnan(again),
        'rerank_max_score': again > most,
      }
      names.append(next((n for n, rejects in tests.items() if rejects), 'kept'))
    found.append(names)
  return found


RULES = filters.Rules(
  skip_ranks=3, max_rank=35, max_score=1.5, min_score=-1.5,
  absolute_margin=0.1, relative_margin=0.3, z_margin=0.3, num_scores=20,
)  # fmt: skip


def many(seed, shape=(60, 50)):
  """Returns random arguments of `rejected_by`, with queries of all kinds."""
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
  reranked = random.random(shape)
  reranked[random.random(shape) < 0.3] = np.nan
  return rows, scores, never, least, RULES, reranked, 0.5


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('center_scores', [False, True])
def test_each_candidate_falls_to_the_first_filter_that_rejects_it(
  seed, center_scores
):
  *arguments, rules, reranked, most = many(seed)
  rules = rules._replace(center_scores=center_scores)
  rejected = filters.rejected_by(*arguments, rules)
  filters.reject_reranked(rejected, reranked, most)
  names = (*filters.FILTERS, None, 'kept')  # -2 and -1 from the end.
  found = [[names[number] for number in row] for row in rejected.tolist()]
  expected = slowly(*arguments, rules, reranked, most)
  assert found == expected
  assert {name for row in found for name in row} == set(names)
  counts = filters.counts(rejected)
  for name, (candidates, queries) in zip(
    (*filters.FILTERS, 'kept'), counts[:-1].tolist(), strict=True
  ):
    assert candidates == sum(row.count(name) for row in expected)
    assert queries == sum(name in row for row in expected)
  assert counts[-1, 0] == counts[:-1, 0].sum()
  there = [any(row) for row in expected]  # None is behind the last rank.
  assert counts[-1, 1] == sum(there)


def test_a_rule_that_is_not_given_takes_nothing():
  rows, scores, _, least, *_ = many(0)
  rejected = filters.rejected_by(rows, scores, {}, least, filters.Rules())
  assert set(rejected.ravel().tolist()) == {filters.KEPT, filters.NONE}
  assert ((rejected == filters.KEPT) == (rows >= 0)).all()
  assert filters.Rules().filters() == []
  # What is at a bound is allowed.
  rules = filters.Rules(max_score=0.5, min_score=0.25)
  rejected = filters.rejected_by(
    np.arange(4)[None],
    np.array([[0.51, 0.5, 0.25, 0.24]]),
    {},
    least[:1],
    rules,
  )
  assert (rejected == filters.KEPT).tolist() == [[False, True, True, False]]
  filters.reject_reranked(rejected, np.array([[0, 0.3, 0.31, 0]]), 0.3)
  assert (rejected == filters.KEPT).tolist() == [[False, True, False, False]]
  # In the order of FILTERS; a bound of 0 is one.
  rules = filters.Rules(2, 9, 0.0, z_margin=0.0, rerank_max_score=0.0)
  names = ['skip_ranks', 'max_score', 'z_margin', *filters.FILTERS[-2:]]
  assert rules.filters() == names
  assert rules.scored() == ['max_score', 'z_margin']


def test_margins_are_those_of_nv_retriever_also_below_zero():
  least = np.array([0.8, -0.8, -np.inf])

  def bounds(*moments, **rules):
    (found,) = filters.thresholds(
      least, filters.Rules(**rules), *moments
    ).values()
    return found

  perc_pos = bounds(relative_margin=0.05)
  np.testing.assert_allclose(perc_pos, [0.8 * 0.95, -0.84, -np.inf])
  margin_pos = bounds(absolute_margin=0.05)
  np.testing.assert_allclose(margin_pos, [0.75, -0.85, -np.inf])
  moments = np.array([0.6, -0.6, 0.0]), np.array([0.1, 0.2, 0.3])
  centred = bounds(*moments, relative_margin=0.5, center_scores=True)
  np.testing.assert_allclose(centred, [0.7, -0.9, -np.inf])
  spread = bounds(*moments, z_margin=2.0)
  np.testing.assert_allclose(spread, [0.6, -1.2, -np.inf])
  # What is at the bound is not below it.
  rules = filters.Rules(absolute_margin=0.0)
  rejected = filters.rejected_by(
    np.array([[1, 2]]), np.array([[0.5, 0.25]]), {}, np.array([0.5]), rules
  )
  assert [filters.FILTERS[rejected[0, 0]], rejected[0, 1]] == [
    'absolute_margin', filters.KEPT
  ]  # fmt: skip


def test_scores_that_are_all_alike_need_a_margin_of_what_they_differ_by():
  """Dot products of ANCE: around 745, a few apart."""
  random = np.random.default_rng(0)
  scores = -np.sort(-random.normal(745, 2, (200, 60)), 1).astype(np.float32)
  rows = np.tile(np.arange(60), (200, 1))
  least = scores[:, 5] + np.float32(0.01)
  shares, lines = {}, {}
  for name, rules in {
    'plain': filters.Rules(relative_margin=0.05),
    'centred': filters.Rules(relative_margin=0.05, center_scores=True),
    'z': filters.Rules(z_margin=0.05),
  }.items():
    rejected = filters.rejected_by(rows, scores, {}, least, rules)
    shares[name] = (rejected == filters.KEPT).mean()
    lines[name] = filters.warning(filters.counts(rejected)[:, 0], rules)
  assert shares['plain'] == 0
  assert min(shares['centred'], shares['z']) > 0.8
  assert lines['plain'].startswith('--relative_margin=0.05 rejected 100.0%')
  assert not lines['centred']
  assert not lines['z']


def test_no_line_is_printed_of_a_margin_that_rejects_nine_in_ten():
  counts = np.zeros(len(filters.FILTERS) + 2, int)
  place = filters.FILTERS.index('relative_margin')
  rules = filters.Rules(relative_margin=0.1)
  counts[0] = 1000  # Did not reach it.
  counts[[place, place + 1, -2]] = 90, 4, 6
  assert not filters.warning(counts, rules)
  counts[place] = 91
  assert '90.1% of the candidates' in filters.warning(counts, rules)
  assert not filters.warning(counts, rules._replace(center_scores=True))


def test_the_best_are_chosen_or_some_drawn_evenly():
  rejected = np.full((4000, 6), filters.KEPT, np.int8)
  rejected[:, 0], rejected[0, 2:] = 0, 3
  best = filters.choose(rejected, 2)
  assert best[1].tolist() == [False, True, True, False, False, False]
  assert best[0].sum() == 1
  randoms = [selection.generator(0, selection.CHOOSE, n) for n in range(4000)]
  drawn = filters.choose(rejected, 2, randoms)
  assert drawn[0].tolist() == best[0].tolist()
  assert (drawn[1:].sum(1) == 2).all()
  assert not drawn[:, 0].any()
  np.testing.assert_allclose(drawn[:, 1:].mean(0), 0.4, atol=0.03)
  values = np.arange(24000).reshape(4000, 6)
  compact = filters.compact(values, drawn, 2, -1)
  assert compact[0].tolist() == [1, -1]
  assert (np.diff(compact[1:]) > 0).all()
  assert np.isin(compact[compact >= 0], values[drawn]).all()


def test_scores_are_looked_up_by_pair():
  random = np.random.default_rng(1)
  rows = np.stack([random.permutation(40)[:9] for _ in range(20)])
  rows[:, 7:] = -1
  ranking = trec.Ranking(rows, random.random(rows.shape))
  places, passages = np.divmod(np.arange(20 * 50), 50)
  found = filters.lookup_scores(ranking, places, passages, -7.0)
  expected = np.full((20, 50), -7.0)
  np.put_along_axis(expected, rows[:, :7], ranking.scores[:, :7], 1)
  np.testing.assert_array_equal(found.reshape(20, 50), expected)
  nothing = trec.Ranking(np.full((2, 0), -1), np.zeros((2, 0)))
  assert filters.lookup_scores(nothing, np.array([1]), np.array([3]), 0.5) == [
    0.5
  ]
