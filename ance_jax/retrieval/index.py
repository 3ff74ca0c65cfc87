"""Embeddings -> a FAISS or device index -> rankings in (-score, row) order."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import pathlib
import re
from typing import NamedTuple

import faiss
import jax
import numpy as np

from ance_jax import errors
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.data import trec
from ance_jax.retrieval import device_index
from ance_jax.retrieval import factories

# Maximum number of vectors to train an index on.
_TRAINING_VECTORS = 262_144
# Passages to request beyond k while they tie with the last place; if more tie,
# the index decides which of them are ranked.
_MAX_TIES = 1024
# Of k-means, for topics of queries.
_ITERATIONS = 20
_QUERIES_AT_ONCE = 1024
# Pairs whose embeddings are copied into memory at once.
_PAIRS_AT_ONCE = 16_384


class Shared(NamedTuple):
  """An index that is distributed over the processes of a run.

  Attributes:
    part: Index of this process's blocks.
    rows: (n,) int32, passage row of each row of `part`.
    ntotal: N, rows of all parts.
  """

  part: faiss.Index | device_index.DeviceIndex
  rows: np.ndarray
  ntotal: int

  def search(
    self, queries: np.ndarray, k: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns (Q, k) scores and rows as FAISS does, equal in all processes.

    All processes must search the same queries. Exact parts give exact results.

    Args:
      queries: (Q, E) float32 embeddings.
      k: Rows per query, at most N.
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
      distributed.all_gather(part).swapaxes(0, 1).reshape(len(queries), -1)
      for part in (scores, rows)
    )
    # `top_k` requests more until the score falls, and sorts equal scores.
    order = np.argsort(-scores, axis=1, kind='stable')[:, :k]
    return tuple(np.take_along_axis(part, order, 1) for part in (scores, rows))


Index = faiss.Index | device_index.DeviceIndex | Shared


def make(factory: str, params: str, width: int) -> faiss.Index:
  """Returns an empty FAISS index for inner products.

  Args:
    factory: FAISS factory string, such as 'Flat' or 'IVF256,SQ8'.
    params: Search parameters for FAISS's ParameterSpace, or ''.
    width: E.

  Raises:
    BadInput: FAISS cannot parse `factory` or `params`.
  """
  try:
    index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    if params:
      faiss.ParameterSpace().set_index_parameters(index, params)
  except RuntimeError as error:
    raise errors.refusal(
      f'FAISS cannot make --index={factory} of {width} dimensions with '
      f'--index_params={params!r} ({_reason(error)})',
      'see the FAISS wiki for factory strings and their parameters',
    ) from error
  factories.check_params(params)
  return index


def bytes_per_vector(factory: str, params: str, width: int) -> int:
  """Returns the bytes per vector of an index, without its graph."""
  return make(factory, params, width).sa_code_size()


def check(
  factory: str,
  params: str,
  width: int,
  num_vectors: int,
  rows_per_block: int | None = None,
) -> None:
  """Raises `BadInput` if such an index cannot be built from `num_vectors`.

  Args:
    factory: As for `make`.
    params: As for `make`.
    width: As for `make`.
    num_vectors: N, vectors to index.
    rows_per_block: Vectors added per call; None for all.
  """
  factories.check(
    make(factory, params, width),
    factory,
    num_vectors,
    # The number that `_sample` takes.
    num_vectors // max(num_vectors // _TRAINING_VECTORS, 1),
    rows_per_block or num_vectors,
  )


def build(
  factory: str,
  params: str,
  blocks: Sequence[np.ndarray],
  *,
  center: bool = False,
) -> faiss.Index:
  """Returns the FAISS index of all blocks, for inner products.

  Args:
    factory: As for `make`.
    params: As for `make`.
    blocks: (rows, E) float32 arrays; ids are row numbers across blocks.
    center: Whether to subtract the mean of all rows from each. This lowers all
      scores of a query equally and keeps their order. If the embeddings fill a
      narrow cone, as ANCE's do, 16-bit numbers then spend their digits on the
      differences. (SQ8 gains nothing: it fits its range to each column.)

  Raises:
    BadInput: As `make`, or the corpus is too small to train the index.
  """
  mean = _mean(blocks) if center else np.float32(0)
  index = make(factory, params, blocks[0].shape[1])
  if not index.is_trained:
    sample = _sample(blocks) - mean
    logs.log(f'index: training {factory} on {len(sample):,} vectors')
    try:
      index.train(sample)
    except RuntimeError as error:
      raise errors.refusal(
        f'FAISS cannot train --index={factory} on {len(sample):,} vectors '
        f'({_reason(error)})',
        'choose a smaller one, or Flat',
      ) from error
  for block in logs.progress(blocks, 'index', total=len(blocks), unit='blocks'):
    index.add(np.ascontiguousarray(block - mean))
  return index


def place(
  blocks: Sequence[np.ndarray],
  devices: Sequence[jax.Device],
  memory: int,
  *,
  center: bool = False,
) -> device_index.DeviceIndex:
  """Returns the index of all blocks on the accelerators.

  Args:
    blocks: As for `build`.
    devices: Accelerators to use.
    memory: MiB per device for embeddings and scores.
    center: As for `build`.

  Raises:
    BadInput: As `device_index.place` does.
  """
  return device_index.place(
    blocks, devices, memory, _mean(blocks) if center else np.float32(0)
  )


def shared(
  part: faiss.Index | device_index.DeviceIndex, blocks: Sequence[np.ndarray]
) -> Shared:
  """Returns the index of all blocks, given this process's part.

  Args:
    part: Index of blocks p, p + P, p + 2 P, ... in process p of P.
    blocks: All blocks, as for `build`.
  """
  starts = np.cumsum([0, *map(len, blocks)])
  rows = [
    np.arange(starts[n], starts[n + 1])
    for n in range(distributed.index(), len(blocks), distributed.count())
  ]
  return Shared(part, np.concatenate(rows).astype(np.int32), int(starts[-1]))


def write(index: faiss.Index, path: str | pathlib.Path) -> None:
  """Writes a FAISS index to a file for `faiss.read_index`."""
  faiss.write_index(index, str(path))


def search(
  index: Index, queries: np.ndarray, k: int, what: str | None = None
) -> trec.Ranking:
  """Returns the k best passages of each query.

  Args:
    index: Index of passages.
    queries: (Q, E) float32 embeddings.
    k: Passages per query, at most N.
    what: Label of a progress bar; None for no bar.
  """
  if isinstance(index, device_index.DeviceIndex):
    scores, rows = device_index.search(index, queries, k, what)
    return trec.Ranking(rows, scores)
  return top_k(index.search, queries, k, index.ntotal, what, _QUERIES_AT_ONCE)


def search_pieces(
  index: Index,
  texts_of: np.ndarray,
  queries: np.ndarray,
  k: int,
  what: str | None = None,
) -> trec.Ranking:
  """Returns the k best texts of each query, scored by their best piece (MaxP).

  It ranks enough pieces to always find k texts, keeps the first, best piece of
  each text and then the first k texts.

  Args:
    index: Index of pieces.
    texts_of: (R,) int32, row of each piece's text, ascending.
    queries: As for `search`.
    k: Texts per query, at most the number of texts.
    what: As for `search`.
  """
  depth = min(k * int(np.bincount(texts_of).max()), len(texts_of))
  found = search(index, queries, depth, what)
  rows = np.where(found.rows < 0, -1, texts_of[found.rows])
  gone = trec.repeated(rows) | (rows < 0)
  first = gone.argsort(1, kind='stable')[:, :k]
  rows, scores = (
    np.take_along_axis(np.where(gone, missing, values), first, 1)
    for values, missing in ((rows, -1), (found.scores, -np.inf))
  )
  return trec.Ranking(rows.astype(np.int32), scores.astype(np.float32))


def exact_scores(
  blocks: Sequence[np.ndarray],
  queries: np.ndarray,
  rows: np.ndarray,
  texts_of: np.ndarray | None = None,
) -> np.ndarray:
  """Returns the exact scores of given passages, computed from embeddings.

  Thresholds and margins need them: an index that rounds or subtracts the mean
  returns other scores.

  Args:
    blocks: As for `build`.
    queries: (q, E) float32 embeddings.
    rows: (q, K) int32 passage rows, -1 for none.
    texts_of: As for `search_pieces`; None if passages are not split.

  Returns:
    (q, K) float32, -inf where `rows` is -1.
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


def cluster(vectors: np.ndarray, number: int, seed: int) -> np.ndarray:
  """Returns the (Q,) int32 cluster of each of (Q, E) vectors, by k-means."""
  kmeans = faiss.Kmeans(
    vectors.shape[1], number, niter=_ITERATIONS, seed=seed,
    min_points_per_centroid=1, max_points_per_centroid=len(vectors),
  )  # fmt: skip
  kmeans.train(vectors)
  return kmeans.index.search(vectors, 1)[1][:, 0].astype(np.int32)


def rows_of(blocks: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
  """Returns the (P, E) float32 embeddings of (P,) int rows across blocks."""
  starts = np.cumsum([0, *map(len, blocks)])
  of_block = np.searchsorted(starts, rows, side='right') - 1
  found = np.empty((len(rows), blocks[0].shape[1]), np.float32)
  for number in np.unique(of_block):
    here = of_block == number
    found[here] = blocks[number][rows[here] - starts[number]]
  return found


def is_exact(index: Index) -> bool:
  """Returns whether an index compares queries with all vectors, unrounded."""
  part = index.part if isinstance(index, Shared) else index
  return isinstance(part, faiss.IndexFlat | device_index.DeviceIndex)


def flops(index: Index, width: int) -> int:
  """Returns the operations per query in an exact index, 0 for other indexes.

  Args:
    index: Index of passages.
    width: E.
  """
  return 2 * index.ntotal * width if is_exact(index) else 0


def top_k(
  find: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]],
  queries: np.ndarray,
  k: int,
  num_passages: int,
  what: str | None,
  queries_at_once: int,
) -> trec.Ranking:
  """Returns the ranking that `find` gives, with ties in row order.

  An index returns any of equally good passages, so `top_k` requests more until
  the score falls, but at most `_MAX_TIES` more: a collapsed encoder gives all
  passages the same score.

  Args:
    find: find(queries, k) -> (scores, rows), both (Q, k), best first; row -1
      for none.
    queries: (Q, ...), anything that `find` takes.
    k: Passages per query, at most `num_passages`.
    num_passages: Passages in the index.
    what: Label of a progress bar; None for no bar.
    queries_at_once: Queries to find passages for at once.
  """
  scores = np.empty((len(queries), k), np.float32)
  rows = np.empty((len(queries), k), np.int32)
  starts = range(0, len(queries), queries_at_once)
  if what:
    starts = logs.progress(starts, what, total=len(starts), unit='batches')
  for start in starts:
    part = slice(start, start + queries_at_once)
    _find_top_k(find, queries[part], num_passages, scores[part], rows[part])
  return trec.Ranking(rows, scores)


def _find_top_k(find, queries, num_passages, scores, rows):
  """Fills (Q, k) scores and rows as `top_k` does."""
  k = scores.shape[1]
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


def _reason(error):
  """Returns the message of a FAISS error without its source location."""
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
  """Sorts (Q, k) scores and rows by descending score, then by row."""
  scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
  wrong = (
    (scores[:, 1:] == scores[:, :-1]) & (rows[:, 1:] < rows[:, :-1])
  ).any(1)
  order = np.lexsort((rows[wrong], -scores[wrong]), axis=1)
  rows = rows.astype(np.int32)
  rows[wrong] = np.take_along_axis(rows[wrong], order, 1)
  scores[wrong] = np.take_along_axis(scores[wrong], order, 1)
  return scores, rows


def _mean(blocks):
  """Returns the (E,) float32 mean of all rows of all processes."""
  total = sum(block.sum(0, dtype=np.float64) for block in blocks)
  sums = distributed.all_gather(np.append(total, sum(map(len, blocks)))).sum(0)
  return (sums[:-1] / sums[-1]).astype(np.float32)


def _sample(blocks):
  """Returns evenly spaced rows of each block, (S, E) float32."""
  stride = max(sum(map(len, blocks)) // _TRAINING_VECTORS, 1)
  return np.concatenate([block[::stride] for block in blocks])
