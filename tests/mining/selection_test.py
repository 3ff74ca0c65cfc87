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
