"""Mining: never a positive or its text, never short, nothing uncounted.

All of it on arrays: no model, no folder.
"""

import numpy as np
import pytest

from ance_jax.data import trec
from ance_jax.mining import candidates
from ance_jax.mining import filters
from ance_jax.mining import miner
from ance_jax.mining import selection


def make_task(rank, pairs, groups, num_queries, *, score=None, **rest):
  """Returns a `miner.Task`; `rest` is of it and of its settings."""
  queries, passages = np.array(sorted(pairs), np.int32).T
  excluded = selection.make_excluded(
    queries, passages, np.array(groups), num_queries
  )
  names = miner.Settings._fields
  settings = {name: rest.pop(name) for name in names if name in rest}

  def scored(rows, depth):
    found = rank(rows, depth)
    return found if isinstance(found, trec.Ranking) else with_scores(found)

  return miner.Task(
    candidates.CandidateSource('arrays', scored, score),
    (queries, passages),
    excluded,
    miner.Settings(**settings),
    **rest,
  )


def with_scores(rows):
  """A ranking whose scores fall by 1 a rank."""
  scores = np.tile(-np.arange(rows.shape[1], dtype=np.float32), (len(rows), 1))
  return trec.Ranking(rows, np.where(rows < 0, -np.inf, scores))


def mined(task, queries=None):
  """Returns (Q, K) negatives, their scores, {filter: count}, all `Mined`."""
  size = len(task.excluded.num_excluded)
  queries = miner.by_depth(task, 0, size) if queries is None else queries
  found = list(miner.mine(task, miner.blocks(task, queries)))
  order = np.argsort(np.concatenate([one.queries for one in found]))
  negatives = np.concatenate([one.negatives for one in found])[order]
  scores = np.concatenate([one.scores for one in found])[order]
  sums = sum(filters.counts(one.rejected)[:, 0] for one in found).tolist()
  names = (*filters.FILTERS, 'kept', 'candidates')
  return negatives, scores, dict(zip(names, sums, strict=True)), found


def total(found, name):
  return sum(int(np.sum(getattr(one, name))) for one in found)


def by_row(rows, depth):
  """A ranking that has the passages in row order, for every query."""
  return np.tile(np.arange(depth, dtype=np.int32), (len(rows), 1))


def nothing(rows, depth):
  return np.full((len(rows), depth), -1, np.int32)


@pytest.mark.parametrize('seed', range(3))
def test_negatives_are_the_best_that_are_neither_positive_nor_of_its_text(seed):
  random = np.random.default_rng(seed)
  num_queries, num_passages, k = 30, 80, 6
  groups = random.integers(50, size=num_passages)
  orders = np.array(
    [random.permutation(num_passages) for _ in range(num_queries)]
  )
  pairs = [(q, p) for q in range(num_queries) for p in orders[q, :5:2]]
  depths = []

  def rank(rows, depth):
    depths.append(depth)
    return orders[rows, :depth].astype(np.int32)

  task = make_task(rank, pairs, groups, num_queries, number=k)
  negatives, scores, counts, found = mined(task)
  dropped = 0
  for query, row in enumerate(negatives):
    mine_groups = {groups[p] for q, p in pairs if q == query}
    banned = {p for p in range(num_passages) if groups[p] in mine_groups}
    expected = [row for row in orders[query] if row not in banned][:k]
    assert row.tolist() == expected
    ranks = [orders[query].tolist().index(row) for row in expected]
    assert (-scores[query]).tolist() == ranks
    dropped += len(set(orders[query, : depths[0]]) & banned)
  assert counts['positive'] == len(pairs)
  assert counts['positive'] + counts['same text'] == dropped
  assert total(found, 'num_drawn') == 0
  assert (np.concatenate([one.found for one in found]) == k).all()


def test_queries_of_many_duplicates_do_not_deepen_the_others(monkeypatch):
  monkeypatch.setattr(miner, '_QUERIES_AT_ONCE', 2)
  groups = [0] * 50 + list(range(1, 51))
  depths = {}

  def rank(rows, depth):
    depths.update(dict.fromkeys(rows.tolist(), depth))
    return by_row(rows, depth)

  pairs = [(0, 0), (1, 60), (2, 0), (3, 62)]
  negatives, *_ = mined(make_task(rank, pairs, groups, 4, number=4))
  assert negatives[0].tolist() == [50, 51, 52, 53]
  assert depths == {0: 54, 1: 5, 2: 54, 3: 5}


@pytest.mark.parametrize(
  ('settings', 'answers', 'expected'),
  [
    ({'number': 3}, False, [4, 5]),
    ({'number': 3}, True, [7, 8]),
    ({'number': 3, 'rules': filters.Rules(skip_ranks=2)}, False, [6, 7]),
    ({'number': 3, 'rules': filters.Rules(2, 6)}, False, [7, 8]),
    ({'number': 3, 'rules': filters.Rules(2, 6)}, True, [13, 14]),
  ],
)
def test_so_deep_is_searched_that_what_is_excluded_leaves_enough(
  settings, answers, expected
):
  holds_answer = (lambda *_: None) if answers else None
  task = make_task(
    by_row, [(0, 3), (1, 4), (1, 5)], range(20), 2,
    holds_answer=holds_answer, **settings,
  )  # fmt: skip
  assert miner.depths(task).tolist() == expected


def test_a_ranking_that_ends_early_is_filled_up_with_random_negatives():
  def rank(rows, depth):
    found = np.full((len(rows), depth), -1, np.int32)
    found[:, :3] = [3, 4, 5]
    return found

  task = make_task(rank, [(0, 3), (1, 4)], range(20), 2, number=6)
  negatives, scores, _, found = mined(task)
  assert negatives[0, :2].tolist() == [4, 5]
  assert negatives[1, :2].tolist() == [3, 5]
  assert total(found, 'num_drawn') == 8
  assert ((negatives >= 0) & (negatives < 20)).all()
  assert all(len(set(row)) == 6 for row in negatives.tolist())
  assert 3 not in negatives[0]
  assert 4 not in negatives[1]
  assert np.isfinite(scores[:, :2]).all()
  assert np.isnan(scores[:, 2:]).all()
  again, *_ = mined(task)
  np.testing.assert_array_equal(negatives, again)

  def score(queries, passages):
    return (100 * queries + passages).astype(np.float32)

  task = task._replace(source=task.source._replace(score=score))
  negatives, scores, _, (one,) = mined(task)
  drawn = negatives + np.array([[0], [100]])
  np.testing.assert_array_equal(scores[:, 2:], drawn[:, 2:])
  assert one.positive_scores.tolist() == [3, 104]


@pytest.mark.parametrize('choose', ['top', 'random'])
def test_what_is_drawn_depends_on_the_seed_and_the_query_row_alone(
  choose, monkeypatch
):
  random = np.random.default_rng(0)
  orders = np.array([random.permutation(99) for _ in range(40)], np.int32)

  def rank(rows, depth):
    found = orders[rows, :depth].copy()
    found[:, 30:] = -1
    found[rows % 3 == 0, 2:] = -1
    return found

  def mine(queries, **changes):
    settings = {'number': 6, 'choose': choose, 'rules': filters.Rules(0, 20)}
    settings |= changes
    pairs = [(q, int(orders[q, q % 7])) for q in range(40)]
    task = make_task(rank, pairs, range(99), 40, **settings)
    return mined(task, queries)[0]

  whole = mine(np.arange(40))
  assert (whole >= 0).all()
  for size in (1, 7):
    monkeypatch.setattr(miner, '_QUERIES_AT_ONCE', size)
    np.testing.assert_array_equal(mine(np.arange(40)), whole)
    np.testing.assert_array_equal(mine(None), whole)
    np.testing.assert_array_equal(mine(np.arange(9, 23)), whole[9:23])
  others = mine(np.arange(40), seed=1)
  short = np.arange(40) % 3 == 0
  assert (others[short, 2:] != whole[short, 2:]).any(1).all()
  if choose == 'top':
    np.testing.assert_array_equal(others[~short], whole[~short])
    return
  ranks = {
    tuple(order.tolist().index(row) for row in rows)
    for order, rows in zip(orders[~short], whole[~short], strict=True)
  }
  assert len(ranks) == sum(~short)  # No two queries have the same ones.


def test_no_two_queries_are_filled_up_alike():
  pairs = [(query, query) for query in range(6)]
  task = make_task(nothing, pairs, range(999), 6, number=3)
  negatives, _, _, found = mined(task)
  assert total(found, 'num_drawn') == 18
  assert len({tuple(row) for row in negatives.tolist()}) == 6


def test_all_passages_that_may_be_drawn_are_drawn_once_where_few_are_left():
  task = make_task(nothing, [(0, 3), (1, 4)], range(8), 2, number=7)
  negatives, *_ = mined(task)
  assert sorted(negatives[0]) == [0, 1, 2, 4, 5, 6, 7]
  assert sorted(negatives[1]) == [0, 1, 2, 3, 5, 6, 7]


def test_a_block_has_so_many_queries_that_their_rankings_fit(monkeypatch):
  monkeypatch.setattr(miner, '_PLACES_AT_ONCE', 60)
  pairs = [(query, query) for query in range(11)]
  # The positive of the last has 40 passages of its text, so its depth is 59.
  groups = [*range(60), *[10] * 39]
  task = make_task(by_row, pairs, groups, 11, number=19)
  for order in (np.arange(11)[::-1], np.arange(1, 11)):
    found = list(miner.blocks(task, order))
    assert max(map(len, found)) == 2
    sizes = [len(part) * miner.depths(task)[part].max() for part in found]
    assert max(sizes) <= 60
    np.testing.assert_array_equal(np.concatenate(found), order)


@pytest.mark.parametrize('seed', range(3))
def test_a_passage_with_an_answer_is_no_negative_and_the_next_takes_its_place(
  seed,
):
  random = np.random.default_rng(seed)
  num_queries, num_passages, k = 20, 60, 5
  orders = np.array(
    [random.permutation(num_passages) for _ in range(num_queries)]
  )
  named = random.random((num_queries, num_passages)) < 0.3
  pairs = [(q, int(orders[q, 1])) for q in range(num_queries)]

  def rank(rows, depth):
    return orders[rows, :depth].astype(np.int32)

  def holds_answer(rows, ranking):
    return (ranking >= 0) & named[rows[:, None], ranking]

  task = make_task(
    rank, pairs, range(num_passages), num_queries, number=k, seed=seed,
    holds_answer=holds_answer,
  )  # fmt: skip
  negatives, _, counts, found = mined(task)
  answers = 0
  for query, row in enumerate(negatives):
    banned = {*np.nonzero(named[query])[0].tolist(), pairs[query][1]}
    looked_at = orders[query, : 2 * k + 1].tolist()
    answers += len(set(looked_at) & banned - {pairs[query][1]})
    # Of 11 looked at, 5 are nearly always left; others are drawn.
    expected = [p for p in looked_at if p not in banned][:k]
    assert row.tolist()[: len(expected)] == expected
    assert len(set(row.tolist())) == k
    assert not set(row.tolist()) & banned
  assert counts['answer'] == answers
  assert total(found, 'num_forced') == 0


def test_a_query_of_which_all_is_named_keeps_random_ones_and_says_so():
  def holds_answer(rows, ranking):
    return (ranking >= 0) & (rows[:, None] == 1)

  task = make_task(
    by_row, [(0, 0), (1, 1)], range(9), 2, number=3, holds_answer=holds_answer
  )
  negatives, _, _, found = mined(task)
  assert negatives[0].tolist() == [1, 2, 3]
  assert 1 not in negatives[1]
  assert len(set(negatives[1].tolist())) == 3
  assert total(found, 'num_forced') == 3


@pytest.mark.parametrize('on_shortage', ['keep', 'drop', 'fill'])
def test_a_query_short_of_negatives_keeps_them_or_not_or_is_filled_up(
  on_shortage,
):
  def rank(rows, depth):
    found = by_row(rows, depth)
    found[rows == 1, 3:] = -1
    found[rows == 2, 5:] = -1
    return found

  task = make_task(
    rank, [(0, 0), (1, 1), (2, 0)], range(30), 3, number=5, least=4,
    on_shortage=on_shortage,
  )  # fmt: skip
  negatives, scores, _, (one,) = mined(task)
  assert negatives[0].tolist() == [1, 2, 3, 4, 5]
  # As many as are needed are enough.
  assert negatives[2].tolist() == [1, 2, 3, 4, -1]
  assert one.found.tolist() == [5, 2, 4]
  expected = {'keep': [0, 2], 'drop': [], 'fill': [0, 2]}[on_shortage]
  assert negatives[1, : len(expected)].tolist() == expected
  filled = 2 * (on_shortage == 'fill')
  assert (
    (negatives[1] >= 0).sum()
    == len(expected) + filled
    == 2 * bool(expected) + filled
  )
  assert one.num_drawn == filled
  np.testing.assert_array_equal(
    np.isnan(scores[1]), np.arange(5) >= len(expected)
  )


def test_fill_takes_nothing_that_a_filter_rejected():
  rules = filters.Rules(skip_ranks=2, max_rank=9, absolute_margin=3.0)
  for seed in range(8):
    task = make_task(
      by_row, [(0, 4)], range(14), 1, number=9, seed=seed, rules=rules
    )
    negatives, _, counts, (one,) = mined(task)
    # Positive at rank 5, of score -4: the next two are within the margin.
    assert negatives[0, :2].tolist() == [8, 9]
    assert counts['skip_ranks'] == 2
    assert counts['absolute_margin'] == 5
    drawn = set(negatives[0, 2:].tolist())
    # 10 to 13 are drawn first; then there is nothing but what was rejected.
    assert {10, 11, 12, 13} < drawn
    assert 4 not in drawn
    assert one.num_forced == 3


def test_a_table_counts_what_is_forced_in_all_blocks(monkeypatch):
  monkeypatch.setattr(miner, '_QUERIES_AT_ONCE', 1)
  task = make_task(
    by_row, [(0, 0), (1, 1)], range(9), 2, number=3,
    holds_answer=lambda _, ranking: ranking >= 0,
  )  # fmt: skip
  table = miner.mine_table(task, 0, 2, 'mine')
  assert table.num_forced == table.num_drawn == 6


def test_num_excluded_counts_all_passages_with_an_excluded_text():
  groups = np.array([0, 0, 1, 2, 2, 3])
  # The second query is its own positive, and another passage.
  own = np.array([0, 1, 1, 2]), np.array([3, 2, 5, 1])
  excluded = selection.make_excluded(
    np.array([0, 1]), np.array([0, 2]), groups, 3, own
  )
  assert excluded.num_excluded.tolist() == [4, 2, 2]
  # Query row x 6 + group, of what is no positive.
  assert excluded.own.tolist() == [0 + 2, 6 + 3, 12 + 0]


def test_a_second_scorer_is_asked_about_what_the_others_left():
  asked = []

  def rerank(queries, passages):
    asked.extend(zip(queries.tolist(), passages.tolist(), strict=True))
    return np.where(passages == 7, np.nan, passages % 2)

  rules = filters.Rules(1, 8, max_score=-2, rerank_max_score=0.5)
  task = make_task(
    by_row, [(0, 0), (1, 3)], range(20), 2, number=8, rules=rules,
    on_shortage='keep', rerank=rerank,
  )  # fmt: skip
  negatives, _, counts, (one,) = mined(task)
  assert asked == [(0, p) for p in range(2, 9)] + [
    (1, p) for p in (2, 4, 5, 6, 7, 8)
  ]
  assert [[p for p in row if p >= 0] for row in negatives.tolist()] == [
    [2, 4, 6, 8], [2, 4, 6, 8]
  ]  # fmt: skip
  assert counts['no score_run'] == 2
  assert counts['rerank_max_score'] == 3
  assert np.isnan(one.reranked[:, 0]).all()


def test_the_spread_is_of_the_first_candidates_whatever_the_block(monkeypatch):
  """And of no positive; a query with many duplicates deepens its block."""
  random = np.random.default_rng(3)
  orders = np.array([random.permutation(90) for _ in range(8)], np.int32)
  table = -np.sort(-random.normal(size=(8, 90)), 1).astype(np.float32)
  groups = np.maximum(np.arange(90), 40)
  pairs = [(q, int(orders[q, 8])) for q in range(7)] + [(7, 5)]
  rules = filters.Rules(0, 20, z_margin=0.3, num_scores=15)
  tables = []
  for size in (8, 3, 1):
    monkeypatch.setattr(miner, '_QUERIES_AT_ONCE', size)
    task = make_task(
      lambda rows, depth: trec.Ranking(
        orders[rows, :depth], table[rows, :depth]
      ),
      pairs, groups, 8, number=20, rules=rules, on_shortage='keep',
    )  # fmt: skip
    tables.append(mined(task)[0])
  np.testing.assert_array_equal(tables[0], tables[1])
  np.testing.assert_array_equal(tables[0], tables[2])
  for query in range(7):
    of_text = groups == groups[pairs[query][1]]
    left = [c for c, p in enumerate(orders[query]) if not of_text[p]]
    spread = np.std(table[query, left[:15]])
    below = table[query, 8] - 0.3 * spread
    kept = [orders[query, c] for c in left[:20] if table[query, c] < below]
    assert [p for p in tables[0][query] if p >= 0] == kept
    assert kept


def test_scores_of_positives_come_with_their_pairs():
  """In the order of the pairs, whatever the order of the queries."""
  pairs = [(0, 2), (0, 9), (1, 1), (3, 0), (3, 3)]
  task = make_task(by_row, pairs, range(10), 4, number=2)
  (one,) = miner.mine(task, [np.array([3, 0, 1])])
  assert one.of_query.tolist() == [0, 0, 1, 1, 2]
  assert one.pairs.tolist() == [3, 4, 0, 1, 2]
  assert one.positives.tolist() == [0, 3, 2, 9, 1]
  # Depth 2 + 2: the passage in row 9 is not ranked.
  assert one.positive_scores.tolist() == [0, -3, -2, -np.inf, -1]
  assert one.least.tolist() == [-3, -np.inf, -1]


def test_what_is_drawn_has_the_scores_of_its_own_query():
  """Of a slice, and whatever the order of the queries."""

  def score(queries, passages):
    return (100 * queries + passages).astype(np.float32)

  task = make_task(
    lambda rows, depth: rows[:, None] + np.zeros((1, depth), np.int32),
    [(query, 10 + query) for query in range(5)],
    np.arange(20),
    5,
    score=score,
    number=4,
    on_shortage='fill',
  )
  for order in ([3, 2], [4, 0, 1]):
    queries = np.array(order)
    one = miner.mine_block(task, queries, task.source.rank(queries, 1))
    assert one.num_drawn == 3 * len(order)
    drawn = one.negatives[:, 1:]
    np.testing.assert_array_equal(
      one.scores[:, 1:], 100 * queries[:, None] + drawn
    )


@pytest.mark.parametrize('rank', [by_row, nothing])
def test_all_passages_but_positives_may_be_drawn(rank):
  """Also those that are ranked too low to be taken, or not at all."""
  task = make_task(
    rank,
    [(0, 0), (1, 4)],
    np.arange(6),
    2,
    number=5,
    on_shortage='fill',
    rules=filters.Rules(max_rank=2),
  )
  negatives, _, _, found = mined(task)
  assert sorted(negatives[0].tolist()) == [1, 2, 3, 4, 5]
  assert sorted(negatives[1].tolist()) == [0, 1, 2, 3, 5]
  assert not total(found, 'num_forced')
