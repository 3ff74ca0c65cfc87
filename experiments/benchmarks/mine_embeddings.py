"""Time and memory of `--job=mine` from embeddings, as many as ANCE's.

    python experiments/benchmarks/mine_embeddings.py 20000 100000

For each number of queries, in a process of its own: 1,000,000 passages of 30
words with random embeddings of width 64 in clusters, in blocks on the disk as
the encoding pass leaves them, and queries near their positive. They are put
where a model's embeddings would come from; index, search, filters and forms are
those of the job: IVF512,Flat with nprobe=8, 4 of the best 100 with a relative
margin, as triplets. Prints a table and JSON. Seconds are of the clock; memory
is what is not the cache of a file.
"""

import json
import pathlib
import sys
import tempfile
import time
import types

import numpy as np
import prepare

from ance_jax import config
from ance_jax.data import corpus as corpus_lib
from ance_jax.jobs import mine
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import index
from ance_jax.training import experiment

PASSAGES, WIDTH, CENTRES, WORDS = 1_000_000, 64, 2000, 30


def main(numbers):
  """Prints the table, and the same as JSON."""
  found = prepare.each(__file__, numbers)
  for name in found[0]:
    print(f'{name:>26}' + ''.join(f'{one[name]:14,.1f}' for one in found))
  print(json.dumps(found))


def one(number):
  """Returns {what: value} of mining the negatives of `number` queries."""
  peak, random = prepare.Peak(), np.random.default_rng(0)
  secs = dict.fromkeys(('build', 'search', 'exact_scores'), 0)
  with tempfile.TemporaryDirectory() as folder:
    settings = config.Config(
      job='mine',
      workdir=folder,
      index='IVF512,Flat',
      index_params='nprobe=8',
      relative_margin=0.05,
    )
    corpus = _corpus(random)
    blocks, queries, passages = _embeddings(
      pathlib.Path(folder), settings.rows_per_block, number, random
    )
    split = corpus_lib.make_split(
      corpus_lib.RawSplit(
        [f'q{row}' for row in range(number)],
        [f'what {row}' for row in range(number)],
        {(row, int(passage)): 1 for row, passage in enumerate(passages)},
      )
    )
    indexed = corpus_index.IndexedCorpus(
      index.build(settings.index, settings.index_params, blocks),
      '',
      None,
      None,
      blocks,
      settings.index == 'Flat',
    )
    run = types.SimpleNamespace(
      dataset=corpus_lib.TextDataset(corpus, {'train': split}),
      encode_queries=lambda *_, queries=queries: queries,
      index_corpus=lambda *_, indexed=indexed: indexed,
    )
    experiment.open = lambda *_, run=run: (run, 0)
    for name in secs:
      setattr(index, name, _timed(getattr(index, name), secs, name))
    before, start = peak.value, time.perf_counter()
    report = mine.run(settings)
    whole = time.perf_counter() - start
    written = pathlib.Path(folder, 'hard_negatives.triplets.jsonl')
    return {
      'queries': number,
      'triplets': report['negatives'],
      'written, MB': written.stat().st_size / 1e6,
      **{f'index.{name}, s': value for name, value in secs.items()},
      'filters, forms, file, s': whole - sum(secs.values()),
      'in all, s': whole,
      'memory before, MB': before,
      'peak memory, MB': peak.value,
    }


def _timed(function, secs, name):
  def timed(*arguments, **options):
    start = time.perf_counter()
    found = function(*arguments, **options)
    secs[name] += time.perf_counter() - start
    return found

  return timed


def _corpus(random):
  words = np.array([f'w{word:x}q' for word in range(200_000)])

  def passage(row):
    text = ' '.join(words[random.integers(len(words), size=WORDS)])
    return f'p{row}', '', text

  return corpus_lib.corpus_of(map(passage, range(PASSAGES)))


def _embeddings(folder, rows_per_block, number, random):
  """Returns blocks of passages, queries, and the positive of each query."""
  centres = random.normal(size=(CENTRES, WIDTH)).astype(np.float32)

  def near(rows, noise):
    rows = rows + noise * random.normal(size=rows.shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

  blocks = []
  for start in range(0, PASSAGES, rows_per_block):
    size = min(rows_per_block, PASSAGES - start)
    block = near(centres[random.integers(CENTRES, size=size)], 0.5)
    np.save(folder / f'{start}.npy', block)
    blocks.append(np.load(folder / f'{start}.npy', 'r'))
  passages = random.integers(PASSAGES, size=number)
  queries = np.empty((number, WIDTH), np.float32)
  for row, passage in enumerate(passages.tolist()):
    queries[row] = blocks[passage // rows_per_block][passage % rows_per_block]
  return blocks, near(queries, 0.05), passages


if __name__ == '__main__':
  if sys.argv[1] == '--one':
    print(json.dumps(one(int(sys.argv[2]))))
  else:
    main([int(number) for number in sys.argv[1:]])
