"""Rows -> training batches, a pure function of (seed, step, negatives).

No state and no number of devices or workers goes in, so a restarted run sees
the batches that it would have seen.
"""

import collections
from concurrent import futures
import functools
from typing import NamedTuple

import numpy as np

from ance_jax import tokens

# Purposes of random numbers, so that no two streams are the same.
_EPOCH, _POSITIVE, _NEGATIVE = range(3)
_AHEAD = 2


class Batch(NamedTuple):
  """One step's arrays. B queries, H negatives each, L tokens.

  Attributes:
    rows: (B,) uint32, number of the query in the batch.
    query_ids: (B, L) int32 token ids.
    query_lengths: (B,) int32, numbers of tokens.
    passage_ids: (B, 1 + H, L) int32 token ids, the positive first.
    passage_lengths: (B, 1 + H) int32, numbers of tokens.
    passage_groups: (B, 1 + H) int32, text groups.
    positive_groups: (B, P) int32, text groups of all positives of the query,
      filled up with -1.
  """

  rows: np.ndarray
  query_ids: np.ndarray
  query_lengths: np.ndarray
  passage_ids: np.ndarray
  passage_lengths: np.ndarray
  passage_groups: np.ndarray
  positive_groups: np.ndarray


class TrainingData(NamedTuple):
  """What batches are cut from.

  Attributes:
    queries: `TokenRows` of Q queries.
    passages: `TokenRows` of N passages.
    offsets: (Q + 1,) int64; the positives of query i are
      positives[offsets[i]:offsets[i + 1]], one at least.
    positives: (P,) int32 passage rows.
    positive_groups: (Q, G) int32, text groups of these, filled up with -1.
    groups: (N,) int32, text group of each passage.
    query_length: Tokens that queries are padded to.
    passage_length: Tokens that passages are padded to.
  """

  queries: tokens.TokenRows
  passages: tokens.TokenRows
  offsets: np.ndarray
  positives: np.ndarray
  positive_groups: np.ndarray
  groups: np.ndarray
  query_length: int
  passage_length: int


def training_data(split, corpus, queries, passages, retriever):
  """Returns the `TrainingData` of a split whose queries have positives."""
  query_rows, positives = split.positives()
  offsets = np.searchsorted(query_rows, np.arange(len(queries) + 1))
  pairs = np.unique(np.stack([query_rows, corpus.groups[positives]], 1), axis=0)
  first = np.searchsorted(pairs[:, 0], np.arange(len(queries)))
  column = np.arange(len(pairs)) - first[pairs[:, 0]]
  groups = np.full((len(queries), column.max() + 1), -1, np.int32)
  groups[pairs[:, 0], column] = pairs[:, 1]
  return TrainingData(
    queries,
    passages,
    offsets,
    positives,
    groups,
    corpus.groups,
    retriever.query_length,
    retriever.passage_length,
  )


def make_batch(data, step, *, seed, batch_size, num_negatives, negatives):
  """Returns the `Batch` of a step.

  Queries come in a new order each epoch; an epoch ends in the middle of a batch
  where it has to. The positive is drawn from all of the query's, its negatives
  without repetition from its row of `negatives`.

  Args:
    data: `TrainingData`.
    step: int, the number of steps made before.
    seed: int, of the run.
    batch_size: B, queries.
    num_negatives: H, a query.
    negatives: (Q, K) int32 passage rows to draw from, K at least H, or None to
      draw from the whole corpus.
  """
  rows = _query_rows(seed, step, batch_size, len(data.queries))
  random = _random(seed, _POSITIVE, step).random(batch_size)
  starts, ends = data.offsets[rows], data.offsets[rows + 1]
  # Below 1, random times the count is rounded to the count now and then.
  picks = np.minimum(starts + (random * (ends - starts)).astype(int), ends - 1)
  passages = data.positives[picks][:, None]
  if num_negatives:
    random = _random(seed, _NEGATIVE, step)
    shape = batch_size, num_negatives
    if negatives is None:
      drawn = random.integers(len(data.passages), size=shape)
    else:
      columns = random.random((batch_size, negatives.shape[1])).argsort(1)
      drawn = negatives[rows[:, None], columns[:, :num_negatives]]
    passages = np.concatenate([passages, drawn], 1)
  query_ids, query_lengths = data.queries.padded(rows, data.query_length)
  passage_ids, passage_lengths = data.passages.padded(
    passages.ravel(), data.passage_length
  )
  return Batch(
    np.arange(batch_size, dtype=np.uint32),
    query_ids,
    query_lengths,
    passage_ids.reshape(*passages.shape, -1),
    passage_lengths.reshape(passages.shape),
    data.groups[passages],
    data.positive_groups[rows],
  )


def ahead(make, items):
  """Yields make(item) for each item in order, made ahead on a thread."""
  with futures.ThreadPoolExecutor(1) as pool:
    waiting = collections.deque()
    for item in items:
      waiting.append(pool.submit(make, item))
      if len(waiting) > _AHEAD:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def _query_rows(seed, step, batch_size, num_queries):
  """Returns (B,) query rows: a part of the epochs' orders in a row."""
  places = step * batch_size + np.arange(batch_size)
  epochs, place_in_epoch = np.divmod(places, num_queries)
  rows = np.empty(batch_size, np.int64)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    rows[here] = _epoch_order(seed, int(epoch), num_queries)[
      place_in_epoch[here]
    ]
  return rows


@functools.lru_cache(maxsize=2)
def _epoch_order(seed, epoch, num_queries):
  return _random(seed, _EPOCH, epoch).permutation(num_queries)


def _random(seed, purpose, number):
  """Returns a generator of its own for each (seed, purpose, number)."""
  key = np.array([seed, purpose << 56 | number], np.uint64)
  return np.random.Generator(np.random.Philox(key=key))
