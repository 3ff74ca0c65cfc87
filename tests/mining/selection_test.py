"""Mining: never a positive or its text, never short, nothing uncounted."""

import numpy as np
import pytest

from ance_jax.mining import selection


def positives_of(pairs, groups, num_queries):
  queries, passages = np.array(pairs, np.int32).T
  return selection.make_positives(
    queries, passages, np.array(groups), num_queries
  )


def by_row(_, depth):
  """A ranking that has the passages in row order, for every query."""
  return np.tile(np.arange(depth, dtype=np.int32), (len(_), 1))


def slow_negatives(ranking, banned, k):
  return [row for row in ranking if row not in banned][:k]


@pytest.mark.parametrize('seed', range(3))
def test_negatives_are_the_best_that_are_neither_positive_nor_of_its_text(seed):
  random = np.random.default_rng(seed)
  num_queries, num_passages, k = 30, 80, 6
  groups = random.integers(50, size=num_passages)
  orders = np.array(
    [random.permutation(num_passages) for _ in range(num_queries)]
  )
  pairs = [(q, p) for q in range(num_queries) for p in orders[q, :5:2]]
  judged = positives_of(pairs, groups, num_queries)
  depths = []

  def rank(rows, depth):
    depths.append(depth)
    return orders[rows, :depth].astype(np.int32)

  negatives, counts = selection.hard_negatives(rank, judged, k, seed)
  dropped = 0
  for query, row in enumerate(negatives):
    mine_groups = {groups[p] for q, p in pairs if q == query}
    banned = {p for p in range(num_passages) if groups[p] in mine_groups}
    expected = slow_negatives(orders[query], banned, k)
    assert row.tolist() == expected
    dropped += len(set(orders[query, : depths[0]]) & banned)
  assert counts['judged'] == len(pairs)
  assert counts['judged'] + counts['same_text'] == dropped
  assert counts['random'] == 0


def test_a_planted_positive_at_the_top_is_dropped_and_counted():
  judged = positives_of([(0, 0), (0, 1), (1, 5)], [0, 1, 2, 0, 4, 5, 6, 7], 2)
  negatives, counts = selection.hard_negatives(by_row, judged, 3, 0)
  assert negatives.tolist() == [[2, 4, 5], [0, 1, 2]]
  # Passage 3 has the text of 0; query 1's positive is within its depth or not.
  assert counts['judged'] in (2, 3)
  assert counts['same_text'] == 1


def test_one_query_of_many_duplicates_does_not_deepen_the_others(monkeypatch):
  monkeypatch.setattr(selection, '_QUERIES_AT_ONCE', 2)
  groups = [0] * 50 + list(range(1, 51))
  judged = positives_of([(0, 0), (1, 60), (2, 61), (3, 62)], groups, 4)
  depths = {}

  def rank(rows, depth):
    depths.update(dict.fromkeys(rows.tolist(), depth))
    return by_row(rows, depth)

  negatives, _ = selection.hard_negatives(rank, judged, 4, 0)
  assert negatives[0].tolist() == [50, 51, 52, 53]
  assert depths[0] == 54
  assert sorted(depths.values())[:2] == [5, 5]


def test_a_ranking_that_ends_early_is_filled_up_with_random_negatives():
  judged = positives_of([(0, 3), (1, 4)], list(range(20)), 2)

  def rank(rows, depth):
    found = np.full((len(rows), depth), -1, np.int32)
    found[:, :3] = [3, 4, 5]
    return found

  negatives, counts = selection.hard_negatives(rank, judged, 6, 0)
  assert negatives[0, :2].tolist() == [4, 5]
  assert negatives[1, :2].tolist() == [3, 5]
  assert counts['random'] == 8
  assert ((negatives >= 0) & (negatives < 20)).all()
  assert all(len(set(row)) == 6 for row in negatives.tolist())
  assert 3 not in negatives[0]
  assert 4 not in negatives[1]
  again, _ = selection.hard_negatives(rank, judged, 6, 0)
  np.testing.assert_array_equal(negatives, again)


def test_no_two_batches_of_queries_are_filled_up_alike(monkeypatch):
  monkeypatch.setattr(selection, '_QUERIES_AT_ONCE', 2)
  judged = positives_of([(query, query) for query in range(6)], range(999), 6)

  def rank(rows, depth):
    return np.full((len(rows), depth), -1, np.int32)

  negatives, counts = selection.hard_negatives(rank, judged, 3, 0)
  assert counts['random'] == 18
  assert len({tuple(row) for row in negatives.tolist()}) == 6


def test_all_passages_that_may_be_drawn_are_drawn_once_where_few_are_left():
  judged = positives_of([(0, 3), (1, 4)], list(range(8)), 2)

  def rank(rows, depth):
    return np.full((len(rows), depth), -1, np.int32)

  negatives, _ = selection.hard_negatives(rank, judged, 7, 0)
  assert sorted(negatives[0]) == [0, 1, 2, 4, 5, 6, 7]
  assert sorted(negatives[1]) == [0, 1, 2, 3, 5, 6, 7]


def test_queries_come_back_in_their_own_order(monkeypatch):
  monkeypatch.setattr(selection, '_QUERIES_AT_ONCE', 3)
  judged = positives_of([(q, 90 + q % 3) for q in range(10)], range(100), 10)

  def rank(rows, depth):
    return (rows[:, None] + np.arange(depth)).astype(np.int32)

  negatives, _ = selection.hard_negatives(rank, judged, 2, 0)
  assert negatives[:, 0].tolist() == list(range(10))


def test_drawn_are_some_of_each_row_once_and_evenly(monkeypatch):
  monkeypatch.setattr(selection, '_QUERIES_AT_ONCE', 1000)
  table = np.arange(5) + 10 * np.arange(3000)[:, None]
  drawn = selection.draw(table, 2, [0, 7])
  assert drawn.shape == (3000, 2)
  assert (drawn[:, 0] != drawn[:, 1]).all()
  assert np.isin(drawn - table[:, :1], np.arange(5)).all()
  share = np.bincount((drawn % 10)[:, 0], minlength=5) / 3000
  # Five standard deviations of a share of 1/5 of 3,000.
  np.testing.assert_allclose(share, 0.2, atol=0.037)
  # No two blocks of queries draw the same.
  columns = (drawn - table[:, :1]).reshape(3, 1000, 2)
  assert (columns[0] != columns[1]).any()
  assert (columns[1] != columns[2]).any()
  assert (drawn != selection.draw(table, 2, [0, 8])).any()
  np.testing.assert_array_equal(drawn, selection.draw(table, 2, [0, 7]))


def test_overlap_is_the_share_of_common_entries():
  first = np.array([[1, 2, 3, 4], [1, 2, 3, 4]])
  second = np.array([[4, 3, 9, 8], [5, 6, 7, 8]])
  assert selection.overlap(first, second) == pytest.approx((2 + 0) / 8)
  assert selection.overlap(first, first) == 1


@pytest.mark.parametrize('seed', range(3))
def test_what_drop_names_is_no_negative_and_the_next_take_its_place(seed):
  random = np.random.default_rng(seed)
  num_queries, num_passages, k = 20, 60, 5
  orders = np.array(
    [random.permutation(num_passages) for _ in range(num_queries)]
  )
  named = random.random((num_queries, num_passages)) < 0.3
  pairs = [(q, int(orders[q, 1])) for q in range(num_queries)]
  judged = positives_of(pairs, np.arange(num_passages), num_queries)

  def rank(rows, depth):
    return orders[rows, :depth].astype(np.int32)

  def drop(rows, ranking):
    return (ranking >= 0) & named[rows[:, None], ranking]

  negatives, counts = selection.hard_negatives(rank, judged, k, seed, drop=drop)
  answers = 0
  for query, row in enumerate(negatives):
    banned = {*np.nonzero(named[query])[0].tolist(), pairs[query][1]}
    expected = slow_negatives(orders[query], banned, k)
    looked_at = orders[query, : 2 * k + 1].tolist()
    answers += len(set(looked_at) & banned - {pairs[query][1]})
    # Of 11 looked at, 5 are nearly always left; others are drawn.
    found = [p for p in expected if p in looked_at]
    assert row.tolist()[: len(found)] == found
    assert len(set(row.tolist())) == k
    assert not set(row.tolist()) & banned
  assert counts['answers'] == answers
  assert counts['for_want_of_others'] == 0


def test_a_query_of_which_all_is_named_keeps_random_ones_and_says_so():
  judged = positives_of([(0, 0), (1, 1)], np.arange(9), 2)

  def drop(rows, ranking):
    return (ranking >= 0) & (rows[:, None] == 1)

  negatives, counts = selection.hard_negatives(by_row, judged, 3, 0, drop=drop)
  assert negatives[0].tolist() == [1, 2, 3]
  assert 1 not in negatives[1]
  assert len(set(negatives[1].tolist())) == 3
  assert counts['for_want_of_others'] == 3
