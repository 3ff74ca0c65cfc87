"""Search and mining against sentence-transformers' `mine_hard_negatives`.

    python experiments/benchmarks/mine.py

Embeddings are given to both: random ones of width 384 in clusters, the size of
InsuranceQA (27,413 passages, 8,000 queries, 13,162 pairs). 20 of the best 200
that are no positives. Nothing is encoded, so nothing is padded.
"""

import datasets
import numpy as np
import sentence_transformers
from sentence_transformers import util
import side_by_side
import torch

from ance_jax import index
from ance_jax import mine

PASSAGES, QUERIES, PAIRS, WIDTH, TOP_K, KEPT = (
  27_413,
  8000,
  13_162,
  384,
  200,
  20,
)


class Given(sentence_transformers.SentenceTransformer):
  """A model whose embeddings are looked up by text."""

  def __init__(self, embeddings):
    super().__init__(modules=[torch.nn.Identity()], device='cpu')
    self.given = embeddings

  def _look_up(self, texts, **_):
    rows = np.stack([self.given[text] for text in texts])
    return torch.from_numpy(rows)

  encode = encode_query = encode_document = _look_up


def main():
  random = np.random.default_rng(0)
  centres = random.normal(size=(200, WIDTH)).astype(np.float32)

  def embed(count):
    noise = random.normal(size=(count, WIDTH)).astype(np.float32)
    rows = centres[random.integers(200, size=count)] + noise
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

  passages, queries = embed(PASSAGES), embed(QUERIES)
  pair_queries = np.sort(
    np.concatenate(
      [np.arange(QUERIES), random.integers(QUERIES, size=PAIRS - QUERIES)]
    )
  )
  # Positives that the queries rank high, as after training.
  near = index.search(index.build('Flat', '', [passages]), queries, 40).rows
  picks = random.integers(40, size=PAIRS)
  pairs = np.unique(
    np.stack([pair_queries, near[pair_queries, picks]], 1), axis=0
  )
  texts = [f'passage {row}' for row in range(PASSAGES)]
  asked = [f'query {row}' for row in range(QUERIES)]
  model = Given(
    dict(zip(asked, queries, strict=True))
    | dict(zip(texts, passages, strict=True))
  )
  table = datasets.Dataset.from_dict(
    {
      'query': [asked[q] for q, _ in pairs],
      'passage': [texts[p] for _, p in pairs],
    }
  )
  positives = mine.make_positives(
    pairs[:, 0], pairs[:, 1], np.arange(PASSAGES), QUERIES
  )

  def ours():
    built = index.build('Flat', '', [passages])

    def rank(rows, depth):
      return index.search(built, queries[rows], depth).rows

    negatives, _ = mine.hard_negatives(rank, positives, TOP_K, 0)
    columns = random.random(negatives.shape).argsort(1)[:, :KEPT]
    return np.take_along_axis(negatives, columns, 1)

  def theirs():
    return util.mine_hard_negatives(
      table,
      model,
      corpus=texts,
      range_max=TOP_K,
      num_negatives=KEPT,
      sampling_strategy='random',
      output_format='n-tuple',
      verbose=False,
    )

  print(f'{len(ours())} queries mined here, {len(theirs())} pairs there')
  side_by_side.compare(
    f'search and mine, {QUERIES} queries x {PASSAGES} passages',
    ours,
    theirs,
    units=QUERIES,
    unit='queries',
    rounds=3,
  )


if __name__ == '__main__':
  main()
