"""Builds training batches as a pure function of (seed, step, negatives).

Batches depend neither on state nor on the number of devices or workers, so a
restarted run sees the same batches.
"""

import functools
from typing import NamedTuple

import numpy as np

from ance_jax.data import corpus as corpus_lib
from ance_jax.data import keys
from ance_jax.data import tokens
from ance_jax.mining import selection
from ance_jax.models import bi_encoder
from ance_jax.retrieval import index
from ance_jax.training import methods
from ance_jax.training import packing

# Each purpose has its own stream of random numbers.
_EPOCH, _POSITIVE, _NEGATIVE, _TOPIC = range(4)


class Batch(NamedTuple):
  """Arrays of one step: B queries with H negatives each.

  Attributes:
    rows: (B,) uint32, index of the query in the whole batch.
    slots: (B, 1 + (1 + H) C) int32, indices of the query's vector and of its
      passages' vectors in the slots of all devices; the positive first, with C
      pieces per passage. Missing pieces have the index of the first piece.
    passage_lengths: (B, (1 + H) C) int32 numbers of tokens; 0 for pieces that a
      passage lacks.
    passage_groups: (B, 1 + H) int32 text groups.
    positive_groups: (B, P) int32 text groups of all positives of the query, and
      of the query itself if it is a passage, padded with -1.
    packs: Tokens of all texts, by tower.
    taught: (B, 1 + H) float32 scores by a teacher; None for rows without one.
    positive_rows: (B, P) int32 passage rows of all positives, padded with -1,
      for rows that search in the step; these have no passages otherwise.
    guide_queries: (B, G) float32 embeddings by the guide; None without one.
    guide_passages: (B, 1 + H, G) float32 embeddings by the guide.
  """

  rows: np.ndarray
  slots: np.ndarray
  passage_lengths: np.ndarray
  passage_groups: np.ndarray
  positive_groups: np.ndarray
  packs: dict[str, packing.Pack]
  taught: np.ndarray | None = None
  positive_rows: np.ndarray | None = None
  guide_queries: np.ndarray | None = None
  guide_passages: np.ndarray | None = None


class Negatives(NamedTuple):
  """Negatives of all or some queries, to draw from.

  Attributes:
    rows: (q,) int rows of the queries that have negatives.
    passages: (q, K) int32 passage rows, padded with -1.
    since: Step at which the order of these queries starts; 0 if they are all
      queries, so that refreshes do not restart the order.
    scores: (q, K) float32 scores of `passages` by the weights that mined them,
      NaN for none; None if nothing drawn depends on them.
    taught: (q, K) float32 scores by a teacher; None without one.
    first_pair: Index in `TrainingData.positives` of the first query's first.
    positive_scores: (p,) float32 scores of consecutive positives from there on.
    positive_taught: (p,) float32, the same by the teacher.
  """

  rows: np.ndarray
  passages: np.ndarray
  since: int
  scores: np.ndarray | None = None
  taught: np.ndarray | None = None
  first_pair: int = 0
  positive_scores: np.ndarray | None = None
  positive_taught: np.ndarray | None = None


class Draw(NamedTuple):
  """How a step draws its negatives from those of a query.

  Attributes:
    kind: A key of `methods.DRAWS`.
    a: Steepness of SimANS.
    b: Place of its peak, from the positive's score.
    scale: Factor of the scores, 1 / temperature.
  """

  kind: str = 'uniform'
  a: float = 0.5
  b: float = 0.0
  scale: float = 1.0


UNIFORM = Draw()


class Drawn(NamedTuple):
  """The rows of a batch.

  Attributes:
    queries: (B,) int query rows.
    passages: (B, 1 + H) int passage rows, the positive first.
    taught: As in `Batch`.
  """

  queries: np.ndarray
  passages: np.ndarray
  taught: np.ndarray | None = None


class Topics(NamedTuple):
  """The queries to draw from, by topic.

  Attributes:
    places: (q,) int, indices of the queries, those of a topic in a row.
    starts: (t + 1,) int, where each topic begins; none is empty.
  """

  places: np.ndarray
  starts: np.ndarray


def by_topic(topics: np.ndarray, negatives: Negatives | None) -> Topics:
  """Returns the topics of the queries that a step draws.

  Args:
    topics: (Q,) int32 topic of each query.
    negatives: As for `draw_rows`.
  """
  if negatives is not None:
    topics = topics[negatives.rows]
  places = np.argsort(topics, kind='stable')
  starts = np.flatnonzero(np.diff(topics[places], prepend=-1))
  return Topics(places, np.append(starts, len(places)))


class Guide(NamedTuple):
  """A guide's embeddings.

  Attributes:
    queries: (Q, G) float32, of the training queries.
    blocks: Blocks of (rows, G) float32, of all passages, memory-mapped.
  """

  queries: np.ndarray
  blocks: list[np.ndarray]

  def of_batch(
    self, queries: np.ndarray, passages: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the embeddings of a batch.

    Args:
      queries: (B,) int query rows.
      passages: (B, C) int passage rows.

    Returns:
      (B, G) and (B, C, G) float32.
    """
    found = index.rows_of(self.blocks, passages.ravel())
    return self.queries[queries], found.reshape(*passages.shape, -1)


class TrainingData(NamedTuple):
  """Tokens and judgements from which batches are built.

  Attributes:
    queries: Tokens of Q queries.
    passages: Tokens of N passages.
    offsets: (Q + 1,) int64; the positives of query i are
      positives[offsets[i]:offsets[i + 1]], at least one.
    positives: (P,) int32 passage rows.
    positive_groups: (Q, G) int32 text groups that are never negatives of the
      query, padded with -1.
    groups: (N,) int32 text group of each passage.
    row_lengths: L, tokens of a row, by tower.
    pieces: C, maximum number of pieces per passage.
    positive_rows: (Q, P) int32, `positives` as rows padded with -1, for rows
      that search in the step.
  """

  queries: tokens.TokenRows
  passages: tokens.TokenRows
  offsets: np.ndarray
  positives: np.ndarray
  positive_groups: np.ndarray
  groups: np.ndarray
  row_lengths: dict[str, int]
  pieces: int = 1
  positive_rows: np.ndarray | None = None


def judged(
  split: corpus_lib.Split,
  corpus: corpus_lib.Corpus,
  method: methods.Method,
  same_text: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the positives under a row of the method table.

  Queries with the same text share positives. If only a query's last positive
  counts, that one comes first, before the positives of equal queries.

  Args:
    split: Split of the queries.
    corpus: The corpus.
    method: Row of the method table.
    same_text: Whether passages with a positive's text are positives too.

  Returns:
    (P,) int32 query rows, sorted; (P,) int32 passage rows of their positives;
    (N,) int32 group of each passage, where a positive makes its whole group
    positive.
  """
  queries, passages = split.shared_positives(last=method.last_positive)
  apart = np.arange(len(corpus.groups), dtype=np.int32)
  alone = method.last_positive or not same_text
  return queries, passages, apart if alone else corpus.groups


def training_data(
  split: corpus_lib.Split,
  corpus: corpus_lib.Corpus,
  queries: tokens.TokenRows,
  passages: tokens.TokenRows,
  retriever: bi_encoder.RetrieverConfig,
  method: methods.Method,
  same_text: bool = True,
  multiple: int = 16,
) -> TrainingData:
  """Returns the data of a split in which every query has a positive.

  Rows of tokens are as long as the longest text of their tower, rounded up to
  a `multiple`.
  """
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
  longest = {bi_encoder.QUERY: int(queries.lengths().max(initial=1))}
  positive_rows = None
  if not method.searches:
    longest[bi_encoder.PASSAGE] = int(passages.lengths().max(initial=1))
  row_lengths = {}
  for side, length in longest.items():
    tower = retriever.tower(side)
    rounded = -(-length // multiple) * multiple
    row_lengths[tower] = max(rounded, row_lengths.get(tower, 0))
  if method.searches:
    positive_rows = corpus_lib.padded(
      positives, offsets[:-1], np.diff(offsets), -1
    )
  return TrainingData(
    queries,
    passages,
    offsets,
    positives,
    groups,
    of_passage,
    row_lengths,
    1 if passages.first is None else int(np.diff(passages.first).max()),
    positive_rows,
  )


def make_batch(
  data: TrainingData,
  drawn: Drawn,
  *,
  shapes: packing.Shapes,
  guide: Guide | None = None,
  part: tuple[int, int] = (0, 1),
) -> Batch:
  """Returns a batch, or a slice of its queries and of its rows of tokens.

  Args:
    data: The training data.
    drawn: The rows of the whole batch, from `draw_rows`.
    shapes: The shapes that a step may have.
    guide: The guide, if there is one.
    part: (index, count) of the slice.
  """
  slots, packs, lengths = pack(data, drawn, shapes, part)
  number, parts = part
  size = len(drawn.queries) // parts
  here = np.arange(number * size, (number + 1) * size)
  queries, passages, taught = (
    None if column is None else column[here] for column in drawn
  )
  is_searched = data.positive_rows is not None
  if is_searched:
    passages = passages[:, :0]
  batch = Batch(
    here.astype(np.uint32),
    slots[here],
    lengths[here, 1:],
    data.groups[passages],
    data.positive_groups[queries],
    packs,
    taught,
  )
  if is_searched:
    return batch._replace(
      taught=None, positive_rows=data.positive_rows[queries]
    )
  if guide:
    of_queries, of_passages = guide.of_batch(queries, passages)
    batch = batch._replace(guide_queries=of_queries, guide_passages=of_passages)
  return batch


def assigned(data: TrainingData, drawn: Drawn) -> dict[str, packing.Assigned]:
  """Returns where a batch's texts are in their rows, by tower."""
  lengths = _texts(data, drawn)[1]
  return {
    tower: packing.assign(lengths[:, columns].ravel(), row_length)
    for tower, row_length, columns in _towers(data)
  }


def num_texts(
  data: TrainingData, batch_size: int, num_negatives: int
) -> dict[str, int]:
  """Returns the number of texts of a batch, by tower."""
  texts = range(1 + (1 + num_negatives) * data.pieces)
  return {
    tower: batch_size * len(texts[columns])
    for tower, _, columns in _towers(data)
  }


def pack(
  data: TrainingData,
  drawn: Drawn,
  shapes: packing.Shapes,
  part: tuple[int, int] = (0, 1),
) -> tuple[np.ndarray, dict[str, packing.Pack], np.ndarray]:
  """Packs the tokens of a batch.

  Args:
    data: The training data.
    drawn: The rows of the batch.
    shapes: The shapes that a step may have.
    part: (index, count) of the rows of tokens to return.

  Returns:
    (B, 1 + (1 + H) C) int32, `Batch.slots`; the packs of a part by tower; and
    (B, 1 + (1 + H) C) int32 numbers of tokens, 0 for pieces that are absent.
  """
  rows, lengths = _texts(data, drawn)
  found = {
    tower: packing.assign(lengths[:, columns].ravel(), length, shapes.slots)
    for tower, length, columns in _towers(data)
  }
  counts = {tower: one.count for tower, one in found.items()}
  shape = shapes.fitting(counts)
  slots, packs = np.zeros(lengths.shape, np.int32), {}
  for tower, row_length, columns in _towers(data):
    one, total = found[tower], shapes.total(shape[tower])
    of_all = shapes.places(shape[tower], np.maximum(one.rows, 0))
    slots[:, columns] = (of_all * shapes.slots + one.slots).reshape(
      len(slots), -1
    )
    size = total // part[1]
    row = of_all - part[0] * size
    here = np.flatnonzero((one.rows >= 0) & (row >= 0) & (row < size))
    of_batch, column = np.divmod(here, lengths[:, columns].shape[1])
    column += columns.start or 0
    ids = np.full((size, row_length), data.queries.pad_id, np.int32)
    starts = row[here] * row_length + one.starts[here]
    for texts, are_here in (
      (data.queries, column == 0),
      (data.passages, column > 0),
    ):
      texts.copy(
        rows[of_batch[are_here], column[are_here]],
        ids.reshape(-1),
        starts[are_here],
      )
    slot = row[here], one.slots[here]
    of_slots = np.zeros((3, size, shapes.slots), np.uint32)
    of_slots[0][slot] = lengths[of_batch, column]
    of_slots[1][slot] = of_batch * lengths.shape[1] + column
    of_slots[2][slot] = column > 0
    chunked = (-1, shape[tower].rows)
    packs[tower] = packing.Pack(
      ids.reshape(*chunked, row_length),
      *(
        array.reshape(*chunked, shapes.slots).astype(dtype)
        for array, dtype in zip(
          of_slots, (np.int32, np.uint32, bool), strict=True
        )
      ),
    )
  # Absent pieces.
  firsts = np.repeat(slots[:, 1 :: data.pieces], data.pieces, 1)
  slots[:, 1:] = np.where(lengths[:, 1:] > 0, slots[:, 1:], firsts)
  return slots, packs, lengths.astype(np.int32)


def _towers(data):
  """Returns (tower, row length, columns of `_texts`) of each tower."""
  columns = {
    bi_encoder.TIED: slice(None),
    bi_encoder.QUERY: slice(0, 1),
    bi_encoder.PASSAGE: slice(1, None),
  }
  return [
    (tower, length, columns[tower])
    for tower, length in data.row_lengths.items()
  ]


def _texts(data, drawn):
  """Returns the token rows of a batch's texts, and their numbers of tokens.

  Both are (B, 1 + (1 + H) C) int: the query, then the pieces of its passages.
  Pieces that a passage lacks are -1, of 0 tokens. Other texts count at least
  one, padding, to stay finite.
  """
  queries, passages = drawn.queries, drawn.passages
  if data.positive_rows is not None:
    passages = passages[:, :0]
  pieces = data.passages.rows_of_pieces(passages.ravel(), data.pieces)
  rows = pieces.reshape(len(queries), passages.shape[1] * data.pieces)
  lengths = data.passages.lengths_of(rows)
  lengths[:, :: data.pieces] = np.maximum(lengths[:, :: data.pieces], 1)
  of_queries = np.maximum(data.queries.lengths_of(queries), 1)
  return (
    np.append(queries[:, None], rows, 1),
    np.append(of_queries[:, None], lengths, 1),
  )


def draw_rows(
  data: TrainingData,
  step: int,
  *,
  seed: int,
  batch_size: int,
  num_negatives: int,
  negatives: Negatives | None,
  triplets: bool = False,
  draw: Draw = UNIFORM,
  topics: Topics | None = None,
) -> Drawn:
  """Returns the query rows of a step and the passage rows of each query.

  Each epoch has a new order of queries and may end in the middle of a batch.
  The positive is drawn uniformly from all positives of the query. (ANCE,
  section 2, sums over pairs, so there queries with more positives weigh more.)
  Negatives are drawn without repetition from the query's row of `negatives`, by
  weights that depend on `draw`.

  Args:
    data: The training data.
    step: Number of steps made before.
    seed: Seed of the run.
    batch_size: B, in queries, or in triplets with `triplets`.
    num_negatives: H, per query.
    negatives: Negatives to draw from; None for the whole corpus.
    triplets: Whether to visit each query once with each column of its row of
      `negatives`, in order, instead of drawing; H is 1.
    draw: How to draw.
    topics: If given, all queries of a step are of one topic, drawn uniformly.
  """
  places, columns = _visits(
    data, step, seed, batch_size, negatives, triplets, topics
  )
  rows = places if negatives is None else negatives.rows[places]
  random = _random(seed, _POSITIVE, step).random(batch_size)
  starts, ends = data.offsets[rows], data.offsets[rows + 1]
  # random <= 1 - 2**-53, so its product with a count is below the count.
  picks = starts + (random * (ends - starts)).astype(int)
  positives = data.positives[picks][:, None]
  random = _random(seed, _NEGATIVE, step)
  if negatives is None:
    drawn = random.integers(len(data.groups), size=(batch_size, num_negatives))
    return Drawn(rows, np.append(positives, drawn, 1))
  pairs = picks - negatives.first_pair
  if columns is None:
    columns = _columns(random, negatives, places, pairs, num_negatives, draw)
  entries = places[:, None], columns
  passages = np.append(positives, negatives.passages[entries], 1)
  if negatives.taught is None:
    return Drawn(rows, passages)
  of_positives = negatives.positive_taught[pairs, None]
  taught = np.append(of_positives, negatives.taught[entries], 1)
  return Drawn(rows, passages, taught)


def _visits(data, step, seed, batch_size, negatives, triplets, topics):
  """Returns (B,) indices of a step's queries, and the columns of triplets.

  The indices are into `negatives`, or are query rows without any; the columns
  are (B, 1), or None where they are drawn. Takes the arguments of `draw_rows`.
  """
  if topics is not None:
    random = _random(seed, _TOPIC, step)
    return _of_one_topic(random, topics, batch_size), None
  if negatives is None:
    number = len(data.offsets) - 1
    return _places(seed, step, batch_size, number, 0), None
  if triplets:
    places, column = _triplets(seed, step, batch_size, negatives)
    return places, column[:, None]
  # `since` is 0 unless queries are missing, so refreshes keep the order.
  since, number = negatives.since, len(negatives.rows)
  return _places(seed, step - since, batch_size, number, since), None


def _columns(random, negatives, places, pairs, number, draw):
  """Returns the (B, H) columns of `negatives` that a step draws.

  Args:
    random: Generator.
    negatives: `Negatives`.
    places: (B,) int, index of each query in `negatives`.
    pairs: (B,) int, index of each query's positive in `positive_scores`.
    number: H.
    draw: `Draw`.
  """
  passages = negatives.passages[places]
  scores = positive = weights = None
  if draw.kind in ('simans', 'simans_abs'):
    scores, positive = negatives.scores, negatives.positive_scores
  elif draw.kind == 'bins':
    scores, positive = negatives.taught, negatives.positive_taught
  if scores is not None:
    weights = selection.log_weights(
      draw.kind,
      scores[places] * draw.scale,
      positive[pairs] * draw.scale,
      draw.a,
      draw.b,
    )
  if draw.kind == 'top':
    there = np.maximum((passages >= 0).sum(1), 1)[:, None]
    return np.arange(number) % there
  return selection.draw(random, passages, number, weights)


def _triplets(seed, step, batch_size, negatives):
  """Returns (B,) indices into `negatives`, and the column of each.

  Each refresh has its own order of queries, which repeats after the last query
  (ANCE, drivers/run_ann.py). In ANCE's code each of n devices reads every n-th
  query, so a batch has at least n queries; here one query follows another on
  any number of devices.
  """
  number, width = negatives.passages.shape
  triplets = (step - negatives.since) * batch_size + np.arange(batch_size)
  visits, columns = np.divmod(triplets, width)
  order = _order(seed, negatives.since, 0, number)
  return order[visits % number], columns


def _of_one_topic(random, topics, batch_size):
  """Returns (B,) indices of queries, repeated only after all of the topic."""
  number = random.integers(len(topics.starts) - 1)
  members = topics.places[slice(*topics.starts[number : number + 2])]
  return np.resize(random.permutation(members), batch_size)


def _places(seed, step, batch_size, number, since):
  """Returns (B,) indices below `number`: a slice of the epochs' orders."""
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
  """Returns an independent generator for each (seed, purpose, number)."""
  key = np.array([seed, purpose << 56 | number], np.uint64)
  return np.random.Generator(np.random.Philox(key=key))
