"""Time and memory of `--job=mine` with a given ranking.

    python experiments/benchmarks/mine_job.py 10000 100000

For each number of queries, in a process of its own: writes a BEIR folder of
1,000,000 passages of 30 words, with a judged one a query, and a TREC run file
of 100 passages a query; then mines 8 negatives of each with a relative margin,
as triplets, and as ids. Prints a table and JSON. Memory is what is not the
cache of a file, seconds are of the CPU.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
import time

import numpy as np
import prepare

from ance_jax import config as config_lib
from ance_jax.jobs import mine
from ance_jax.mining import miner

PASSAGES, DEPTH, WORDS = 1_000_000, 100, 30


def main(numbers):
  """Prints the table, and the same as JSON."""
  found = prepare.each(__file__, numbers)
  for name in found[0]:
    cells = [f'{one[name]:18,.1f}' for one in found]
    print(f'{name:>26}' + ''.join(cells))
  print(json.dumps(found))


def one(number):
  """Returns {what: value} of mining the negatives of `number` queries."""
  peak = prepare.Peak()
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    ranking = _write(folder, number)
    settings = config_lib.Config(
      job='mine',
      workdir=str(folder / 'mined'),
      dataset='beir',
      data_dir=str(folder),
      dev_fraction=0.0,
      ranking=str(ranking),
      relative_margin=0.05,
      num_negatives=8,
      format='ids',
    )
    measured = {'queries': number, 'ranking, MB': ranking.stat().st_size / 1e6}
    seconds, block = [], miner.mine_block

    def timed(*arguments):
      start = time.process_time()
      mined = block(*arguments)
      seconds.append(time.process_time() - start)
      return mined

    miner.mine_block = timed
    start = time.process_time()
    job = mine._job(settings)
    measured['read, s'] = time.process_time() - start
    measured['memory, read, MB'] = peak.value
    mine._job = lambda config: job._replace(config=config)
    for form in ('ids', 'triplets'):
      start = time.process_time()
      mine.run(dataclasses.replace(settings, format=form))
      measured[f'mine and write {form}, s'] = time.process_time() - start
    measured['of it filters, s'] = sum(seconds) / 2
    measured['peak memory, MB'] = peak.value
    return measured


def _write(folder, number):
  """Writes the folder and the ranking; returns the path of the ranking."""
  random = np.random.default_rng(0)
  words = np.array([f'w{word:x}q' for word in range(200_000)])
  with open(folder / 'corpus.jsonl', 'w') as file:
    for row in range(PASSAGES):
      text = ' '.join(words[random.integers(len(words), size=WORDS)])
      file.write(f'{{"_id": "p{row}", "title": "", "text": "{text}"}}\n')
  positives = random.integers(PASSAGES, size=number)
  with open(folder / 'queries.jsonl', 'w') as file:
    for row in range(number):
      text = ' '.join(words[random.integers(len(words), size=8)])
      file.write(f'{{"_id": "q{row}", "text": "{text}"}}\n')
  (folder / 'qrels').mkdir()
  with open(folder / 'qrels' / 'train.tsv', 'w') as file:
    file.write('query-id\tcorpus-id\tscore\n')
    for row, passage in enumerate(positives):
      file.write(f'q{row}\tp{passage}\t1\n')
  path = folder / 'ranking.trec'
  with open(path, 'w') as file:
    for row, passage in enumerate(positives):
      ranked = random.integers(PASSAGES, size=DEPTH)
      ranked[random.integers(20)] = passage
      scores = np.sort(random.random(DEPTH))[::-1]
      for rank in range(DEPTH):
        file.write(f'q{row} Q0 p{ranked[rank]} {rank} {scores[rank]:.6f} x\n')
  return path


if __name__ == '__main__':
  if sys.argv[1] == '--one':
    print(json.dumps(one(int(sys.argv[2]))))
  else:
    main([int(number) for number in sys.argv[1:]])
