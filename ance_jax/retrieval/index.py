"""Embeddings -> index, FAISS's or ours -> rankings in (-score, row) order."""

import functools
import re
from typing import NamedTuple

import faiss
import numpy as np

from ance_jax import errors
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.data import trec
from ance_jax.retrieval import device_index
from ance_jax.retrieval import factories

# Vectors that an index which needs training is trained on, at most.
_TRAINING_VECTORS = 262_144
# Passages that may share the last place's score before it is the index's choice
# which of them are ranked.
_MAX_TIES = 1024
_QUERIES_AT_ONCE = 1024
# Pairs whose embeddings are side by side in memory.
_PAIRS_AT_ONCE = 16_384


class Shared(NamedTuple):
  """An index of which each process of a run has a part.

  Attributes:
    part: The index of this process's blocks.
    rows: (n,) int32, the row over all blocks of each row of the part.
    ntotal: N, rows of all parts.
  """

  part: faiss.Index | device_index.DeviceIndex
  rows: np.ndarray
  ntotal: int

  def search(self, queries, k):
    """Returns scores and rows as FAISS does, the same in all processes.

    All of them must ask for the same queries. Of parts that search exactly the
    best of all are exact.

    Args:
      queries: (Q, E) float32 embeddings.
      k: Rows a query, at most N.
    """
    depth = min(k, len(self.rows))
    find = (
      functools.partial(device_index.search, self.part)
      if isinstance(self.part, device_index.DeviceIndex)
      else self.part.search
    )
    found_scores, found_rows = find(queries, depth)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int32)
    rows[:, :depth] = np.where(found_rows < 0, -1, self.rows[found_rows])
    scores[:, :depth] = np.where(found_rows < 0, -np.inf, found_scores)
    scores, rows = (
      distributed.gather(part).swapaxes(0, 1).reshape(len(queries), -1)
      for part in (scores, rows)
    )
    # `top_k` asks on until scores fall, and puts what is equal in order.
    order = np.argsort(-scores, axis=1, kind='stable')[:, :k]
    return tuple(np.take_along_axis(part, order, 1) for part in (scores, rows))


Index = faiss.Index | device_index.DeviceIndex | Shared


def make(factory, params, width):
  """Returns an empty FAISS index, by inner product.

  Args:
    factory: FAISS factory string, such as 'Flat' or 'IVF256,SQ8'.
    params: Search parameters as FAISS's ParameterSpace reads them, or ''.
    width: E, of the embeddings.

  Raises:
    BadInput: FAISS cannot read one of the two.
  """
  try:
    index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    if params:
      faiss.ParameterSpace().set_index_parameters(index, params)
  except RuntimeError as error:
    raise errors.BadInput(
      f'--index must be a FAISS factory string for {width} dimensions, and '
      f'--index_params parameters of it; found {factory!r} and {params!r} '
      f'({_reason(error)}); see the FAISS wiki.'
    ) from error
  if wrong := factories.problem_of_params(params):
    raise errors.BadInput(wrong)
  return index


def bytes_per_vector(factory, params, width):
  """Returns the bytes that a vector takes in such an index, without graphs."""
  return make(factory, params, width).sa_code_size()


def check(factory, params, width, num_vectors, rows_per_block=None):
  """Raises `BadInput` if such an index cannot be made of `num_vectors`.

  Args:
    factory: As for `make`.
    params: As for `make`.
    width: As for `make`.
    num_vectors: N, vectors that it is to hold.
    rows_per_block: Vectors that are added at once; None: all.
  """
  wrong = factories.problem(
    make(factory, params, width),
    factory,
    num_vectors,
    # As `_sample` takes them, of each block.
    num_vectors // max(num_vectors // _TRAINING_VECTORS, 1),
    rows_per_block or num_vectors,
  )
  if wrong:
    raise errors.BadInput(wrong)


def build(factory, params, blocks, *, center=False):
  """Returns the FAISS index of all blocks, by inner product.

  Args:
    factory: As for `make`.
    params: As for `make`.
    blocks: List of (rows, E) float32 arrays; index ids are row numbers over
      all of them.
    center: Whether the mean of all rows is taken from each. All scores of a
      query are then less by the same number, and their order is the same; where
      embeddings lie in a narrow cone, as ANCE's do, numbers of 16 bits have
      their digits for what differs. (SQ8 finds its range for each column: it
      gains nothing.)
  """
  mean = _mean(blocks) if center else np.float32(0)
  index = make(factory, params, blocks[0].shape[1])
  if not index.is_trained:
    sample = _sample(blocks) - mean
    logs.say(f'index: training {factory} on {len(sample):,} vectors')
    try:
      index.train(sample)
    except RuntimeError as error:
      raise errors.BadInput(
        '--index must be one that the corpus is large enough to train; found '
        f'{factory!r} with {len(sample):,} vectors ({_reason(error)}); '
        'choose a smaller one, or Flat.'
      ) from error
  for block in logs.progress(blocks, 'index', total=len(blocks), unit='blocks'):
    index.add(np.ascontiguousarray(block - mean))
  return index


def place(blocks, devices, memory, *, center=False):
  """Returns the `device_index.DeviceIndex` of all blocks.

  Args:
    blocks: As for `build`.
    devices: The accelerators used.
    memory: MiB of each, for embeddings and scores.
    center: As for `build`.

  Raises:
    BadInput: As `device_index.place` does.
  """
  mean = _mean(blocks) if center else np.float32(0)
  return device_index.place(blocks, devices, memory, mean)


def shared(part, blocks):
  """Returns the `Shared` index of all blocks.

  Args:
    part: The index of every P-th block, from that of this process's number on.
    blocks: All blocks, as for `build`.
  """
  ends = np.cumsum([len(block) for block in blocks])
  here = range(distributed.index(), len(blocks), distributed.count())
  rows = [np.arange(ends[n] - len(blocks[n]), ends[n]) for n in here]
  return Shared(part, np.concatenate(rows).astype(np.int32), int(ends[-1]))


def write(index, path):
  """Writes a FAISS index to a file, as `faiss.read_index` reads it."""
  faiss.write_index(index, str(path))


def search(index, queries, k, what=None):
  """Returns the `Ranking` of the k best passages of each query.

  Args:
    index: An `Index`.
    queries: (Q, E) float32 embeddings.
    k: Passages a query, at most those in the index.
    what: Name of the phase for a progress bar, or None for no bar.
  """
  if isinstance(index, device_index.DeviceIndex):
    scores, rows = device_index.search(index, queries, k, what)
    return trec.Ranking(rows, scores)
  starts = range(0, len(queries), _QUERIES_AT_ONCE)
  if what:
    starts = logs.progress(starts, what, total=len(starts), unit='batches')
  parts = [
    top_k(
      index.search, queries[start : start + _QUERIES_AT_ONCE], k, index.ntotal
    )
    for start in starts
  ]
  return trec.Ranking(
    *(np.concatenate(part) for part in zip(*parts, strict=True))
  )


def search_pieces(index, texts_of, queries, k, what=None):
  """Returns the `Ranking` of the k best texts by the best of their pieces.

  So deep that k texts are found whatever the pieces of the best: of a text
  that comes back several times the first, which is the best, stays, and then
  all behind the first k are cut off (MaxP).

  Args:
    index: An `Index` of pieces.
    texts_of: (R,) int32, row of each piece's text, in order.
    queries: As for `search`.
    k: Texts a query, at most those that there are.
    what: As for `search`.
  """
  depth = min(k * int(np.bincount(texts_of).max()), len(texts_of))
  found = search(index, queries, depth, what)
  rows = np.where(found.rows < 0, -1, texts_of[found.rows])
  order = rows.argsort(1, kind='stable')
  ordered = np.take_along_axis(rows, order, 1)
  again = np.zeros(rows.shape, bool)
  np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
  last = (again | (rows < 0)).argsort(1, kind='stable')[:, :k]
  gone = np.take_along_axis(again | (rows < 0), last, 1)
  rows = np.where(gone, -1, np.take_along_axis(rows, last, 1))
  scores = np.take_along_axis(found.scores, last, 1)
  return trec.Ranking(
    rows.astype(np.int32), np.where(gone, -np.inf, scores).astype(np.float32)
  )


def exact_scores(blocks, queries, rows, texts_of=None):
  """Returns the scores of given passages by their embeddings, not an index's.

  An index that rounds, or has the mean taken out, ranks; what its scores are is
  its own affair, and no threshold or margin is meant for them.

  Args:
    blocks: As for `build`.
    queries: (q, E) float32 embeddings.
    rows: (q, K) int32 passage rows, -1 where there is none.
    texts_of: As for `search_pieces`, or None.

  Returns:
    (q, K) float32, -inf where there is none.
  """
  scores = np.full(rows.shape, -np.inf, np.float32)
  there = rows >= 0
  of_query, wanted = np.nonzero(there)[0], rows[there]
  if texts_of is None:
    scores[there] = _dots(blocks, queries, of_query, wanted)
  elif len(wanted):
    first = np.searchsorted(texts_of, wanted)
    number = np.searchsorted(texts_of, wanted, side='right') - first
    ends = np.cumsum(number)
    pieces = np.arange(ends[-1]) + np.repeat(first - ends + number, number)
    dots = _dots(blocks, queries, np.repeat(of_query, number), pieces)
    scores[there] = np.maximum.reduceat(dots, ends - number)
  return scores


def rows_of(blocks, rows):
  """Returns the (P, E) float32 embeddings of (P,) int rows over all blocks."""
  ends = np.cumsum([len(block) for block in blocks])
  of_block = np.searchsorted(ends, rows, side='right')
  found = np.empty((len(rows), blocks[0].shape[1]), np.float32)
  for number in np.unique(of_block):
    here = of_block == number
    block = blocks[number]
    found[here] = block[rows[here] - (ends[number] - len(block))]
  return found


def flops(index, width):
  """Returns the operations of a query in an exact index; 0: nobody counts them.

  Args:
    index: An `Index`.
    width: E.
  """
  part = index.part if isinstance(index, Shared) else index
  if isinstance(part, device_index.DeviceIndex):
    number = sum(map(len, part.embeddings))
  else:
    number = part.ntotal if isinstance(part, faiss.IndexFlat) else 0
  if isinstance(index, Shared) and number:
    number = index.ntotal
  return 2 * number * width


def top_k(find, queries, k, num_passages):
  """Returns the `Ranking` that `find` gives, with its ties in row order.

  Which of equally good passages an index returns is its own choice, so that
  more are asked for until the score falls (up to `_MAX_TIES` more: an encoder
  that has collapsed gives every passage one score).

  Args:
    find: find(queries, k) -> (scores, rows), both (Q, k), best first; row -1
      where nothing was found.
    queries: Array with one entry a query.
    k: Passages a query, at most `num_passages`.
    num_passages: Passages in the index.
  """
  scores = np.empty((len(queries), k), np.float32)
  rows = np.empty((len(queries), k), np.int32)
  depth, most = min(k + 1, num_passages), min(k + _MAX_TIES, num_passages)
  open_ended = np.arange(len(queries))
  while len(open_ended):
    found_scores, found_rows = _ordered(*find(queries[open_ended], depth))
    scores[open_ended] = found_scores[:, :k]
    rows[open_ended] = found_rows[:, :k]
    tied = found_scores[:, k - 1] == found_scores[:, -1]
    open_ended = open_ended[tied & (found_rows[:, -1] >= 0)]
    if depth == most:
      break
    depth = min(2 * depth, most)
  return trec.Ranking(rows, scores)


def _reason(error):
  """Returns what an error of FAISS says, without where in its source it was."""
  return re.split(r'Error: |\.cpp:\d+: ', str(error))[-1].strip()


def _dots(blocks, queries, of_query, rows):
  """Returns the (P,) float32 dot products of pairs of embeddings."""
  dots = np.empty(len(rows), np.float32)
  for start in range(0, len(rows), _PAIRS_AT_ONCE):
    part = slice(start, start + _PAIRS_AT_ONCE)
    found = rows_of(blocks, rows[part])
    dots[part] = np.einsum('pe,pe->p', queries[of_query[part]], found)
  return dots


def _ordered(scores, rows):
  """Returns (Q, k) scores and rows, best first, equal scores by row."""
  scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
  swapped = (scores[:, 1:] == scores[:, :-1]) & (rows[:, 1:] < rows[:, :-1])
  wrong = swapped.any(1)
  order = np.lexsort((rows[wrong], -scores[wrong]), axis=1)
  rows = rows.astype(np.int32)
  rows[wrong] = np.take_along_axis(rows[wrong], order, 1)
  scores[wrong] = np.take_along_axis(scores[wrong], order, 1)
  return scores, rows


def _mean(blocks):
  """Returns the (E,) float32 mean of the rows of all processes' blocks."""
  total = sum(block.sum(0, dtype=np.float64) for block in blocks)
  number = np.float64(sum(map(len, blocks)))
  sums = distributed.gather(np.append(total, number)).sum(0)
  return (sums[:-1] / sums[-1]).astype(np.float32)


def _sample(blocks):
  """Returns evenly spaced rows of all blocks, (S, E) float32."""
  num_rows = sum(map(len, blocks))
  stride = max(num_rows // _TRAINING_VECTORS, 1)
  return np.concatenate([block[::stride] for block in blocks])
