"""Checks that a FAISS index can hold a corpus, before the corpus is encoded.

FAISS detects most problems only when the index is trained or filled, after
hours of encoding, and some of them crash the process.
"""

import re

import faiss

# Codewords of the product quantizer that OPQ trains.
_OPQ_VECTORS = 256
# Minimum number of vectors for which FAISS builds an NSG graph.
_LEAST_NSG = 101


def problem(
  made: faiss.Index,
  factory: str,
  num_vectors: int,
  num_trained: int,
  rows_per_block: int,
) -> str:
  """Returns an error message if an index cannot hold the vectors, else ''.

  Args:
    made: Empty index.
    factory: Factory string of the index.
    num_vectors: N, vectors to index.
    num_trained: Vectors to train the index on.
    rows_per_block: Vectors added per call.
  """
  for part in _parts(made):
    found = _problem_of(part, factory, num_vectors, rows_per_block)
    if found:
      return found
  least = max(map(_least_trained, _parts(made)))
  if least > num_trained:
    return (
      f'--index={factory} is trained on {least:,} vectors at least, and there '
      f'are {num_trained:,}; choose a smaller one, or Flat.'
    )
  return ''


def problem_of_params(params: str) -> str:
  """Returns an error message for invalid search parameters, else ''.

  Args:
    params: Comma-separated name=number pairs that FAISS has accepted.
  """
  if any(float(value) <= 0 for value in re.findall(r'=([^,; ]+)', params)):
    return f'--index_params must be above 0; found {params!r}; raise it.'
  return ''


def _problem_of(part, factory, num_vectors, rows_per_block):
  """Returns `problem` of one part of an index."""
  lists = getattr(part, 'nlist', 1)
  if not 1 <= lists <= num_vectors:
    return (
      '--index must have at most as many lists as the corpus has passages, '
      f'{num_vectors:,}, and one at least; found {lists:,} in {factory!r}; '
      'change it.'
    )
  if isinstance(part, faiss.IndexIDMap):
    return (
      f'--index={factory} wants ids of its own, and the row of a passage is '
      'its id already; leave out IDMap.'
    )
  if hasattr(part, 'hnsw') and _links(part.hnsw) < 2:
    return f'--index={factory} has a graph of fewer than 2 links; write HNSW32.'
  if isinstance(part, faiss.IndexNSG) and not (
    _LEAST_NSG <= num_vectors <= rows_per_block
  ):
    return (
      f'--index={factory} takes from {_LEAST_NSG} passages to those of one '
      f'--rows_per_block, {rows_per_block:,}, and there are {num_vectors:,}; '
      'choose HNSW32.'
    )
  return _problem_of_transforms(part, factory)


def _problem_of_transforms(part, factory):
  for transform in _transforms(part):
    turned = isinstance(transform, faiss.PCAMatrix | faiss.ITQTransform)
    if turned and not 1 <= transform.d_out <= transform.d_in:
      return (
        f'--index={factory} makes {transform.d_out} dimensions of the '
        f"embeddings' {transform.d_in}; lower that to {transform.d_in} at most."
      )
  return ''


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
