"""Batches: every query once an epoch, any positive, the negatives given."""

import threading

import jax
import numpy as np
import padded
import pytest

from ance_jax.core import logs
from ance_jax.data import tokens
from ance_jax.training import batches
from ance_jax.training import packing

NUM_QUERIES, NUM_PASSAGES = 10, 40


def rows_of(lengths, first=1):
  """Token rows whose tokens tell the row: all are row + first."""
  ids = np.concatenate([np.full(n, r + first) for r, n in enumerate(lengths)])
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  return tokens.TokenRows(ids.astype(np.uint16), offsets, 0, '')


@pytest.fixture
def data():
  """Query i has the positives i and i + 10; passages i and i + 20 one text."""
  groups = np.arange(NUM_PASSAGES) % 20
  positive_groups = np.stack([np.arange(10), np.arange(10) + 10], 1)
  return batches.TrainingData(
    rows_of([2 + i % 3 for i in range(NUM_QUERIES)]),
    rows_of([1 + i % 5 for i in range(NUM_PASSAGES)]),
    np.arange(0, 22, 2),
    np.stack([np.arange(10), np.arange(10) + 10], 1).ravel(),
    positive_groups,
    groups,
    {'tied': 8},
  )


def make(
  data, step, table=None, num_negatives=2, batch_size=4, seed=0, **kwargs
):
  negatives = kwargs.pop('negatives', None)
  if table is not None:
    negatives = batches.Negatives(np.arange(len(table)), table, 0)
  part = kwargs.pop('part', (0, 1))
  drawn = batches.draw_rows(
    data,
    step,
    seed=seed,
    batch_size=batch_size,
    num_negatives=num_negatives,
    negatives=negatives,
    **kwargs,
  )
  return batches.make_batch(data, drawn, shapes=any_batch(data), part=part)


def any_batch(data, num_devices=6, chunks=1):
  form = packing.Form(data.row_lengths, {}, num_devices, chunks)
  shape = packing.Shape(chunks, 4)
  return packing.Shapes(form, 32, (dict.fromkeys(data.row_lengths, shape),))


def rows_in(batch):
  """(B,) query rows and (B, 1 + H) passage rows, by their tokens."""
  found = [[ids[0] - 1 for ids in texts] for texts in padded.texts(batch)]
  return np.array(found)[:, 0], np.array(found)[:, 1:]


def test_each_epoch_shows_each_query_once_in_an_order_of_its_own(data):
  seen = np.concatenate([rows_in(make(data, s))[0] for s in range(10)])
  epochs = seen.reshape(4, NUM_QUERIES)
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
  assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_batch_depends_on_seed_and_step_alone(data):
  first, again = make(data, 3), make(data, 3)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  others = make(data, 4), make(data, 3, seed=1)
  for other in others:
    assert padded.texts(first) != padded.texts(other)


def test_any_positive_of_the_query_comes_first(data):
  seen = set()
  for step in range(60):
    queries, passages = rows_in(make(data, step))
    positives = passages[:, 0]
    assert ((positives == queries) | (positives == queries + 10)).all()
    seen |= set(zip(queries.tolist(), positives.tolist(), strict=True))
  assert len(seen) == 2 * NUM_QUERIES


def test_every_column_of_the_table_is_drawn(data):
  planted = np.arange(100).reshape(10, 10) % 30 + 10
  drawn = {
    pair
    for step in range(200)
    for pair in seen_in(make(data, step, planted, num_negatives=1))
  }
  assert len(drawn) == planted.size


def seen_in(batch):
  """(query, negative) of each row of a batch, as rows."""
  queries, passages = rows_in(batch)
  return list(zip(queries.tolist(), passages[:, 1].tolist(), strict=True))


def test_triplets_are_all_negatives_of_a_query_in_a_row_then_the_next(data):
  table = 10 + np.arange(6).reshape(2, 3)
  negatives = batches.Negatives(np.array([4, 7]), table, since=100)
  seen = [
    pair
    for step in range(100, 106)
    for pair in seen_in(
      make(data, step, num_negatives=1, negatives=negatives, triplets=True)
    )
  ]
  of_query = {
    4: [(4, n) for n in (10, 11, 12)],
    7: [(7, n) for n in (13, 14, 15)],
  }
  first = seen[0][0]
  # 24 triplets of 6 different ones: the same order four times.
  assert seen == 4 * (of_query[first] + of_query[11 - first])


def test_a_refresh_gives_its_triplets_an_order_of_its_own(data):
  table = np.arange(10)[:, None] + 10
  orders = []
  for since in (0, 30, 60):
    negatives = batches.Negatives(np.arange(10), table, since)
    batch = make(
      data, since, num_negatives=1, batch_size=10, negatives=negatives,
      triplets=True
    )  # fmt: skip
    orders.append([query for query, _ in seen_in(batch)])
  assert all(sorted(order) == list(range(10)) for order in orders)
  assert orders[0] != orders[1] != orders[2]


def test_a_slice_is_shown_an_epoch_at_a_time_from_its_refresh_on(data):
  rows = np.array([2, 5, 6, 9])
  table = np.arange(8).reshape(4, 2) + 20
  negatives = batches.Negatives(rows, table, since=7)
  pairs = [
    pair
    for step in (7, 8, 9, 10)
    for pair in seen_in(
      make(data, step, num_negatives=1, batch_size=3, negatives=negatives)
    )
  ]
  for epoch in (pairs[:4], pairs[4:8], pairs[8:]):
    assert sorted(query for query, _ in epoch) == rows.tolist()
  for query, negative in pairs:
    assert negative in table[rows.tolist().index(query)]


def test_missing_negatives_are_never_drawn_and_few_come_again(data):
  table = np.array([[30, 31, -1, -1], [32, -1, -1, -1], [33, 34, 35, 36]])
  negatives = batches.Negatives(np.array([1, 3, 8]), table, since=0)
  of_query = dict(zip([1, 3, 8], table, strict=True))
  for step in range(20):
    batch = make(data, step, num_negatives=3, negatives=negatives)
    queries, passages = rows_in(batch)
    for query, row in zip(queries, passages[:, 1:], strict=True):
      there = of_query[int(query)][of_query[int(query)] >= 0]
      assert set(row.tolist()) <= set(there.tolist())
      assert len(set(row.tolist())) == min(3, len(there))


def test_corpus_negatives_cover_the_corpus(data):
  drawn = {
    int(n)
    for step in range(200)
    for n in rows_in(make(data, step, num_negatives=2))[1][:, 1:].ravel()
  }
  assert drawn == set(range(NUM_PASSAGES))


def test_lengths_and_groups_belong_to_the_rows(data):
  batch = make(data, 0)
  queries, passages = rows_in(batch)
  np.testing.assert_array_equal(batch.passage_lengths, 1 + passages % 5)
  np.testing.assert_array_equal(batch.passage_groups, passages % 20)
  np.testing.assert_array_equal(
    batch.positive_groups, np.stack([queries, queries + 10], 1)
  )
  for query, texts in zip(queries, padded.texts(batch), strict=True):
    assert [len(text) for text in texts[1:]] == [
      1 + (text[0] - 1) % 5 for text in texts[1:]
    ]
    assert len(texts[0]) == 2 + query % 3


def test_ahead_makes_the_next_ones_on_a_thread_while_one_is_used():
  makers, third = {}, threading.Event()

  def make(number):
    makers[number] = threading.current_thread()
    if number == 2:
      third.set()
    return number

  given = logs.ahead(make, range(9))
  assert next(given) == 0
  assert third.wait(timeout=60)
  # Not the whole epoch: what is made has to be kept.
  assert max(makers) < 4
  assert threading.main_thread() not in makers.values()
  assert list(given) == list(range(1, 9))
  assert len(set(makers.values())) == 1


def test_ahead_gives_what_was_made_before_an_error():
  def make(number):
    if number == 2:
      raise ValueError('two')
    return number

  given = logs.ahead(make, range(9))
  assert [next(given), next(given)] == [0, 1]
  with pytest.raises(ValueError, match='two'):
    next(given)


def test_parts_of_a_batch_are_the_whole_in_order(data):
  table = np.arange(40).reshape(10, 4)
  whole, *parts = (
    make(data, 3, table, batch_size=6, part=part)
    for part in ((0, 1), (0, 3), (1, 3), (2, 3))
  )
  assert whole.rows.tolist() == list(range(6))
  joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
  jax.tree.map(np.testing.assert_array_equal, joined, whole)


def test_no_two_streams_of_random_numbers_are_the_same(data):
  streams = {
    (seed, purpose, number): batches._random(seed, purpose, number).random()
    for seed in (0, 1, 2)
    for purpose in (batches._EPOCH, batches._POSITIVE, batches._NEGATIVE)
    for number in (0, 1, 2, 1 << 24, 2 << 24, (1 << 24) + 1, 2**31 << 24)
  }
  assert len(set(streams.values())) == len(streams)
  # An epoch's order has its refresh and its number in it.
  orders = {
    tuple(batches._order(seed, since, epoch, 40))
    for seed in (0, 1)
    for since in (0, 1, 2)
    for epoch in (0, 1, 2)
  }
  assert len(orders) == 18


def test_queries_of_a_step_are_of_one_topic(data):
  """Topics are drawn alike, however many queries they have."""
  number = len(data.offsets) - 1
  topics = np.where(np.arange(number) < 2, 4, np.arange(number) % 3)
  kept = np.array([row for row in range(number) if row not in (3, 5)])
  table = batches.Negatives(kept, np.arange(3 * len(kept)).reshape(-1, 3), 0)
  for negatives, there in ((None, np.arange(number)), (table, kept)):
    by_topic = batches.by_topic(topics, negatives)
    seen = []
    for step in range(400):
      drawn = batches.draw_rows(
        data, step, seed=0, batch_size=4, num_negatives=2,
        negatives=negatives, topics=by_topic,
      )  # fmt: skip
      (topic,) = set(topics[drawn.queries])
      members = there[topics[there] == topic]
      assert set(drawn.queries) <= set(members)
      assert len(set(drawn.queries)) == min(4, len(members))
      seen.append(topic)
      if negatives is not None:
        place = np.searchsorted(kept, drawn.queries)
        assert (drawn.passages[:, 1:] // 3 == place[:, None]).all()
    shares = np.bincount(seen)[[0, 1, 2, 4]] / 400
    np.testing.assert_allclose(shares, 0.25, atol=0.11)


def test_the_best_of_a_list_that_is_too_short_come_in_turn(data):
  table = np.array([[5, 6, 7, -1, -1], [8, -1, -1, -1, -1]], np.int32)
  drawn = batches.draw_rows(
    data, 0, seed=0, batch_size=2, num_negatives=4,
    negatives=batches.Negatives(np.array([1, 3]), table, 0),
    draw=batches.Draw('top'),
  )  # fmt: skip
  found = dict(zip(drawn.queries.tolist(), drawn.passages[:, 1:], strict=True))
  assert found[1].tolist() == [5, 6, 7, 5]
  assert found[3].tolist() == [8, 8, 8, 8]
