"""What is drawn, and what two tables have in common."""

import numpy as np
import pytest

from ance_jax.mining import selection


def test_drawn_are_some_of_each_row_once_and_evenly(monkeypatch):
  monkeypatch.setattr(selection, '_QUERIES_AT_ONCE', 1000)
  table = np.arange(5) + 10 * np.arange(3000)[:, None]

  def draw(seed):
    columns = selection.draw(np.random.default_rng(seed), table, 2)
    return np.take_along_axis(table, columns, 1)

  drawn = draw([0, 7])
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
  assert (drawn != draw([0, 8])).any()
  np.testing.assert_array_equal(drawn, draw([0, 7]))


def test_overlap_is_the_share_of_common_entries():
  first = np.array([[1, 2, 3, 4], [1, 2, 3, 4]])
  second = np.array([[4, 3, 9, 8], [5, 6, 7, 8]])
  assert selection.overlap(first, second) == pytest.approx((2 + 0) / 8)
  assert selection.overlap(first, first) == 1
  # What a row lacks is no entry, and none of the row before it.
  short = np.array([[1, 2, 3, 4], [7, -1, -1, -1]])
  assert selection.overlap(short, first) == pytest.approx(4 / 5)
  assert selection.overlap(first, short) == pytest.approx(4 / 8)


def test_a_short_row_is_drawn_from_as_often_as_it_has_to_be():
  table = np.array([[3, 4, -1, -1], [5, -1, -1, -1], [-1, -1, -1, -1]])
  columns = selection.draw(np.random.default_rng(0), table, 3)
  drawn = np.take_along_axis(table, columns, 1)
  assert set(drawn[0].tolist()) == {3, 4}
  assert drawn[1].tolist() == [5, 5, 5]
  assert drawn[2].tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
  ('kind', 'b', 'expected'),
  [
    ('simans', 0.0, [0.083299, 0.543176, 0.373319, 0.000206]),
    ('simans', -1.0, [0.008248, 0.241042, 0.742462, 0.008248]),
    ('simans_abs', 0.0, [0.009, 0.810198, 0.18078, 0.000022]),
  ],
)
def test_simans_weighs_as_the_paper_and_its_code(kind, b, expected):
  """Formula worked by hand for a positive of 10; 3 is a of the MARCO code."""
  scores = np.array([[12, 10.5, 9, 6]])
  a = 3.0 if kind == 'simans_abs' else 0.5
  found = np.exp(selection.log_weights(kind, scores, np.array([10.0]), a, b))
  np.testing.assert_allclose(found / found.sum(), [expected], atol=1e-6)


def test_bins_share_their_weight():
  """Margins 0, 1, 1.2, 9, 10: bins of 0, of 1 and 1.2, and of 9 and 10."""
  margins = np.array([[0, 1, 1.2, 9, 10], [4, 4, np.nan, np.nan, np.nan]])
  positive = np.array([20.0, 5.0])
  found = np.exp(
    selection.log_weights('bins', positive[:, None] - margins, positive, 0, 0)
  )
  third, sixth = found[0].sum() / 3, found[0].sum() / 6
  np.testing.assert_allclose(found[0], [third, *[sixth] * 4])
  np.testing.assert_allclose(found[1, :2], 0.5)


def test_columns_are_drawn_by_their_weights_without_repetition():
  """Shares of 20,000 draws of two, by the rule worked out in a loop."""
  weights = np.array([0.083299, 0.543176, 0.373319, 0.000206])
  number = 20_000
  rows = np.tile(np.arange(4, dtype=np.int32), (number, 1))
  found = selection.draw(
    np.random.default_rng(0), rows, 2, np.tile(np.log(weights), (number, 1))
  )
  assert (found[:, 0] != found[:, 1]).all()
  first = weights / weights.sum()
  expected = [
    first[j]
    + sum(first[i] * first[j] / (1 - first[i]) for i in range(4) if i != j)
    for j in range(4)
  ]
  shares = np.bincount(found.ravel(), minlength=4) / number
  np.testing.assert_allclose(shares, expected, atol=0.012)


def test_a_query_of_a_later_block_is_drawn_for_by_its_own_weights(monkeypatch):
  monkeypatch.setattr(selection, '_QUERIES_AT_ONCE', 4)
  rows = np.tile(np.arange(6, dtype=np.int32), (10, 1))
  heavy = np.arange(10) * 5 % 6
  weights = np.where(rows == heavy[:, None], 0.0, -1000.0)
  found = selection.draw(np.random.default_rng(0), rows, 1, weights)
  assert found[:, 0].tolist() == heavy.tolist()


def test_a_passage_without_a_score_is_drawn_after_all_others():
  scores = np.array([[1.0, np.nan, 2.0, np.nan]])
  weights = selection.log_weights('simans', scores, np.array([0.0]), 0.5, 0.0)
  rows = np.array([[5, 6, 7, -1]], np.int32)
  for seed in range(20):
    random = np.random.default_rng(seed)
    found = selection.draw(random, rows, 4, weights)[0].tolist()
    assert found[2] == 1
    assert set(found[:2]) == {0, 2}
    assert found[3] == found[0]


def test_a_union_has_each_passage_once_in_the_order_of_the_tables():
  tables = (
    np.array([[1, 3, 4], [7, -1, -1], [-1, -1, -1]], np.int32),
    np.array([[3, 4], [-1, -1], [-1, -1]], np.int32),
    np.array([[5, 1, 6], [7, 7, 8], [-1, -1, -1]], np.int32),
  )
  expected = [[1, 3, 4, 5, 6], [7, 8, -1, -1, -1], [-1] * 5]
  assert selection.union(tables).tolist() == expected
