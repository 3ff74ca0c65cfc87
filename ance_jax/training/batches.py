"""Rows -> training batches, a pure function of (seed, step, negatives).

No state and no number of devices or workers goes in, so a restarted run sees
the batches that it would have seen.
"""

import functools
from typing import NamedTuple

import numpy as np

from ance_jax.data import keys
from ance_jax.data import tokens
from ance_jax.mining import selection

# Purposes of random numbers, so that no two streams are the same.
_EPOCH, _POSITIVE, _NEGATIVE = range(3)


class Batch(NamedTuple):
  """One step's arrays. B queries, H negatives each, L tokens.

  Attributes:
    rows: (B,) uint32, number of the query in the batch.
    query_ids: (B, L) int32 token ids.
    query_lengths: (B,) int32, numbers of tokens.
    passage_ids: (B, (1 + H) C, L) int32 token ids, the positive first; C is 1,
      or the pieces of a passage.
    passage_lengths: (B, (1 + H) C) int32, numbers of tokens; 0 where a passage
      has no such piece.
    passage_groups: (B, 1 + H) int32, text groups.
    positive_groups: (B, P) int32, text groups of all positives of the query,
      and of itself where it is a passage, filled up with -1.
  """

  rows: np.ndarray
  query_ids: np.ndarray
  query_lengths: np.ndarray
  passage_ids: np.ndarray
  passage_lengths: np.ndarray
  passage_groups: np.ndarray
  positive_groups: np.ndarray


class Negatives(NamedTuple):
  """Negatives to draw from, of all or some of the queries.

  Attributes:
    rows: (q,) int query rows that have any.
    passages: (q, K) int32 passage rows; -1 at the end where there are fewer.
    since: int, step from which on the order of these queries counts; 0 if they
      are all queries, for then no refresh disturbs it.
  """

  rows: np.ndarray
  passages: np.ndarray
  since: int


class TrainingData(NamedTuple):
  """What batches are cut from.

  Attributes:
    queries: `TokenRows` of Q queries.
    passages: `TokenRows` of N passages.
    offsets: (Q + 1,) int64; the positives of query i are
      positives[offsets[i]:offsets[i + 1]], one at least.
    positives: (P,) int32 passage rows.
    positive_groups: (Q, G) int32, text groups of what is no negative of the
      query, filled up with -1.
    groups: (N,) int32, text group of each passage.
    query_length: Tokens that queries are padded to.
    passage_length: Tokens that passages, or their pieces, are padded to.
    pieces: C, pieces of a passage at most.
  """

  queries: tokens.TokenRows
  passages: tokens.TokenRows
  offsets: np.ndarray
  positives: np.ndarray
  positive_groups: np.ndarray
  groups: np.ndarray
  query_length: int
  passage_length: int
  pieces: int = 1


def judged(split, corpus, method, same_text=True):
  """Returns what positives are for a row of the method table.

  Queries of the same text share theirs. Where the last one alone is positive,
  it is the first here, before those of the other queries.

  Args:
    split: `corpus.Split`.
    corpus: `corpus.Corpus`.
    method: The row.
    same_text: Whether passages of a positive's text are positives.

  Returns:
    (P,) int32 query rows, sorted, and the passage rows of their positives; and
    the (N,) int32 groups of passages that are positives together.
  """
  queries, passages = split.shared_positives(last=method.last_positive)
  apart = np.arange(len(corpus.groups), dtype=np.int32)
  alone = method.last_positive or not same_text
  return queries, passages, apart if alone else corpus.groups


def training_data(
  split, corpus, queries, passages, retriever, method, same_text=True
):
  """Returns the `TrainingData` of a split whose queries have positives."""
  query_rows, positives, of_passage = judged(split, corpus, method, same_text)
  banned = np.stack([query_rows, positives])
  banned = np.concatenate([banned, split.own_passages()], 1)
  of_query, group = keys.unique_pairs(banned[0], of_passage[banned[1]])
  first = np.searchsorted(of_query, np.arange(len(queries)))
  column = np.arange(len(of_query)) - first[of_query]
  groups = np.full((len(queries), column.max() + 1), -1, np.int32)
  groups[of_query, column] = group
  if method.last_positive:
    first = np.unique(query_rows, return_index=True)[1]
    query_rows, positives = query_rows[first], positives[first]
  offsets = np.searchsorted(query_rows, np.arange(len(queries) + 1))
  return TrainingData(
    queries,
    passages,
    offsets,
    positives,
    groups,
    of_passage,
    retriever.query_length,
    retriever.passage_length,
    1 if passages.first is None else int(np.diff(passages.first).max()),
  )


def make_batch(
  data,
  step,
  *,
  seed,
  batch_size,
  num_negatives,
  negatives,
  triplets=False,
  part=(0, 1),
):
  """Returns the `Batch` of a step, or a part of it.

  Takes the arguments of `draw_rows`, and `part`: (index, count) of the slice
  of the batch's queries to return.
  """
  rows, passages = draw_rows(
    data,
    step,
    seed=seed,
    batch_size=batch_size,
    num_negatives=num_negatives,
    negatives=negatives,
    triplets=triplets,
  )
  number, parts = part
  size = batch_size // parts
  here = np.arange(number * size, (number + 1) * size)
  return _of_rows(data, here, rows[here], passages[here])


def draw_rows(
  data, step, *, seed, batch_size, num_negatives, negatives, triplets=False
):
  """Returns the query rows of a step, and the passages of each.

  Queries come in a new order each epoch; an epoch ends in the middle of a batch
  where it has to. The positive is drawn from all of the query's. (ANCE's sum,
  section 2, is over pairs: there a query with more positives weighs more.) Its
  negatives are drawn without repetition from its row of `negatives`.

  Args:
    data: `TrainingData`.
    step: int, the number of steps made before.
    seed: int, of the run.
    batch_size: B, queries; with `triplets` these.
    num_negatives: H, a query.
    negatives: `Negatives` to draw from, or None for the whole corpus.
    triplets: Whether nothing is drawn, but a query comes once with each column
      of its row of `negatives`, one after the other; H is 1.

  Returns:
    (B,) int query rows, and (B, 1 + H) int passage rows, the positive first.
  """
  if negatives is None:
    places = _places(seed, step, batch_size, len(data.offsets) - 1, 0)
    rows = places
  elif triplets:
    places, column = _triplets(seed, step, batch_size, negatives)
    rows = negatives.rows[places]
  else:
    # As if all steps were of these negatives, unless queries are missing.
    made = step - negatives.since
    places = _places(
      seed, made, batch_size, len(negatives.rows), negatives.since
    )
    rows = negatives.rows[places]
  random = _random(seed, _POSITIVE, step).random(batch_size)
  starts, ends = data.offsets[rows], data.offsets[rows + 1]
  # random is 1 - 2**-53 at most: its product with a count is below the count.
  picks = starts + (random * (ends - starts)).astype(int)
  passages = data.positives[picks][:, None]
  if triplets:
    drawn = negatives.passages[places, column][:, None]
    passages = np.concatenate([passages, drawn], 1)
  elif num_negatives:
    random = _random(seed, _NEGATIVE, step)
    if negatives is None:
      shape = batch_size, num_negatives
      drawn = random.integers(len(data.groups), size=shape)
    else:
      drawn = draw(random, negatives.passages[places], num_negatives)
    passages = np.concatenate([passages, drawn], 1)
  return rows, passages


def _of_rows(data, here, rows, passages):
  """Returns the `Batch` of (B,) query rows with (B, n) passages each.

  Args:
    data: `TrainingData`.
    here: (B,) int, numbers of the queries in the whole batch.
    rows: Query rows.
    passages: Passage rows, the positive first.
  """
  query_ids, query_lengths = data.queries.padded(rows, data.query_length)
  passage_ids, passage_lengths = _padded_passages(data, passages)
  return Batch(
    here.astype(np.uint32),
    query_ids,
    query_lengths,
    passage_ids,
    passage_lengths,
    data.groups[passages],
    data.positive_groups[rows],
  )


def _padded_passages(data, passages):
  """Returns token ids and lengths of (B, n) passages, or of their pieces."""
  if data.passages.first is None:
    ids, lengths = data.passages.padded(passages.ravel(), data.passage_length)
  else:
    ids, lengths = data.passages.padded_pieces(
      passages.ravel(), data.passage_length, data.pieces
    )
  size = len(passages)
  return ids.reshape(size, -1, ids.shape[-1]), lengths.reshape(size, -1)


def draw(random, passages, number):
  """Returns (B, H) of the passages, each once while there are any.

  Args:
    random: numpy Generator.
    passages: (B, K) int32, one at least in each row, -1 behind the last.
    number: H.
  """
  columns = selection.draw(random, passages, number)
  return np.take_along_axis(passages, columns, 1)


def _triplets(seed, step, batch_size, negatives):
  """Returns (B,) places in `negatives`, and the column of each.

  A new refresh begins at the first query of an order of its own, and where its
  queries are through, the same order begins again (ANCE, drivers/run_ann.py).
  There each device reads every n-th query, so that a batch of n devices holds n
  or more of them; here, on any number of devices, they come one by one.
  """
  number, width = negatives.passages.shape
  triplets = (step - negatives.since) * batch_size + np.arange(batch_size)
  visits, columns = np.divmod(triplets, width)
  order = _order(seed, negatives.since, 0, number)
  return order[visits % number], columns


def _places(seed, step, batch_size, number, since):
  """Returns (B,) of `number` places: a part of the epochs' orders in a row."""
  visits = step * batch_size + np.arange(batch_size)
  epochs, place_in_epoch = np.divmod(visits, number)
  places = np.empty(batch_size, np.int64)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    order = _order(seed, since, int(epoch), number)
    places[here] = order[place_in_epoch[here]]
  return places


@functools.lru_cache(maxsize=2)
def _order(seed, since, epoch, number):
  return _random(seed, _EPOCH, since << 24 | epoch).permutation(number)


def _random(seed, purpose, number):
  """Returns a generator of its own for each (seed, purpose, number)."""
  key = np.array([seed, purpose << 56 | number], np.uint64)
  return np.random.Generator(np.random.Philox(key=key))
