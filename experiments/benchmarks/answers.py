"""Times which candidates hold an answer, at a first refresh and at later ones.

    python experiments/benchmarks/answers.py DATA [--depth=100] [--moved=0.3]

DATA is a folder in BEIR's form with answers, such as SQuAD. Candidates of the
first refresh are BM25's; at the second, so many of them are others. Prints
seconds, and bytes on disk.
"""

import argparse
import pathlib
import tempfile
import time

import numpy as np

from ance_jax import config as config_lib
from ance_jax.mining import candidates
from ance_jax.mining import known_answers
from ance_jax.retrieval import corpus_index
from ance_jax.training import experiment


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('data')
  parser.add_argument('--depth', type=int, default=100)
  parser.add_argument('--moved', type=float, default=0.3)
  given = parser.parse_args()
  config = config_lib.Config(dataset='beir', data_dir=given.data)
  corpus, splits = experiment.load_texts(config, ('train',))
  split = splits['train']
  rank = corpus_index.bm25(corpus, splits, k1=0.9, b=0.4, language='english')
  queries = np.arange(len(split.ids))
  rows = rank(list(split.texts), given.depth).rows
  random = np.random.default_rng(0)
  moved = random.random(rows.shape) < given.moved
  later = np.where(
    moved, random.integers(len(corpus.texts), size=rows.shape), rows
  )
  print(f'{len(queries):,} queries, {rows.shape[1]} candidates each')
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder) / 'answers'
    for name, table in (('first', rows), ('again', rows), ('later', later)):
      begun = time.perf_counter()
      memory = known_answers.KnownAnswers(
        candidates.answer_matcher(corpus, split), folder, corpus, split
      )
      held = np.concatenate(
        [
          memory(queries[i : i + 1024], table[i : i + 1024])
          for i in range(0, len(queries), 1024)
        ]
      )
      memory.save()
      secs = time.perf_counter() - begun
      size = sum(path.stat().st_size for path in folder.iterdir())
      print(
        f'{name}: {secs:.1f} s, {held.mean():.2%} hold an answer, '
        f'{size / 2**20:,.0f} MiB on disk'
      )


if __name__ == '__main__':
  main()
