"""Checks that a FAISS index can hold a corpus, before the corpus is encoded.

FAISS detects most problems only when the index is trained or filled, after
hours of encoding, and some of them crash the process.
"""

import re

import faiss

from ance_jax import errors

# Codewords of the product quantizer that OPQ trains.
_OPQ_VECTORS = 256
# Minimum number of vectors for which FAISS builds an NSG graph.
_LEAST_NSG = 101


def check(
  made: faiss.Index,
  factory: str,
  num_vectors: int,
  num_trained: int,
  rows_per_block: int,
) -> None:
  """Raises `BadInput` if an index cannot hold the vectors.

  Args:
    made: Empty index.
    factory: Factory string of the index.
    num_vectors: N, vectors to index.
    num_trained: Vectors to train the index on.
    rows_per_block: Vectors added per call.
  """
  for part in _parts(made):
    _check_part(part, factory, num_vectors, rows_per_block)
  least = max(map(_least_trained, _parts(made)))
  if least > num_trained:
    raise errors.refusal(
      f'--index={factory} is trained on {least:,} vectors at least, and there '
      f'are {num_trained:,}',
      'choose a smaller one, or Flat',
    )


def check_params(params: str) -> None:
  """Raises `BadInput` for invalid search parameters.

  Args:
    params: Comma-separated name=number pairs that FAISS has accepted.
  """
  if any(float(value) <= 0 for value in re.findall(r'=([^,; ]+)', params)):
    raise errors.refusal(
      f'--index_params={params} has a number that is not above 0', 'raise it'
    )


def _check_part(part, factory, num_vectors, rows_per_block):
  lists = getattr(part, 'nlist', 1)
  of_nsg = isinstance(part, faiss.IndexNSG)
  for wrong, fact, cure in (
    (
      not 1 <= lists <= num_vectors,
      f'has {lists:,} lists for {num_vectors:,} passages',
      f'use from 1 to {num_vectors:,} lists',
    ),
    (
      isinstance(part, faiss.IndexIDMap),
      'wants ids of its own, and the row of a passage is its id already',
      'leave out IDMap',
    ),
    (
      hasattr(part, 'hnsw') and _links(part.hnsw) < 2,
      'has a graph of fewer than 2 links',
      'write HNSW32',
    ),
    (
      of_nsg and not _LEAST_NSG <= num_vectors <= rows_per_block,
      f'needs between {_LEAST_NSG} passages and --rows_per_block='
      f'{rows_per_block}, and there are {num_vectors:,}',
      'choose HNSW32',
    ),
    *(
      (
        isinstance(turn, faiss.PCAMatrix | faiss.ITQTransform)
        and not 1 <= turn.d_out <= turn.d_in,
        f"makes {turn.d_out} dimensions of the embeddings' {turn.d_in}",
        f'lower that to {turn.d_in} at most',
      )
      for turn in _transforms(part)
    ),
  ):
    if wrong:
      raise errors.refusal(f'--index={factory} {fact}', cure)


def _links(hnsw):
  """Returns M, the links per vector on all levels but the lowest."""
  sizes = faiss.vector_to_array(hnsw.cum_nneighbor_per_level)
  return sizes[1] // 2 if len(sizes) > 1 else 0


def _least_trained(part):
  """Returns how many vectors training a part of an index requires."""
  sizes = [getattr(part, 'nlist', 1)]
  if hasattr(part, 'pq'):
    sizes.append(part.pq.ksub)
  if hasattr(part, 'aq') and not hasattr(part, 'lsq'):
    sizes.append(2 ** int(faiss.vector_to_array(part.aq.nbits).max()))
  if any(isinstance(t, faiss.OPQMatrix) for t in _transforms(part)):
    sizes.append(_OPQ_VECTORS)
  return max(sizes)


def _parts(index):
  """Yields an index and, recursively, all indexes inside it."""
  part = faiss.downcast_index(index)
  yield part
  for name in ('index', 'base_index', 'refine_index', 'quantizer', 'storage'):
    inner = getattr(part, name, None)
    if isinstance(inner, faiss.Index):
      yield from _parts(inner)


def _transforms(part):
  chain = getattr(part, 'chain', None)
  for number in range(chain.size() if chain else 0):
    yield faiss.downcast_VectorTransform(chain.at(number))
