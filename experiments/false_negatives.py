"""What another model thinks of the negatives that each row was trained on.

    python experiments/false_negatives.py FOLDER JUDGE

FOLDER is one that compare_methods.py made; JUDGE a folder or hub name of a
model that knows the subject, such as all-MiniLM-L6-v2. For the first seed of
each row it prints the share of negatives, over 20 steps, that the judge scores
at least as high as the positive of their query: among these are those that are
right, and only not judged to be. The second share is of the query's own alone,
without those of the other queries. Rows that search in the step are left out.
"""

import pathlib
import sys

import figures
import numpy as np

from ance_jax import config as config_lib
from ance_jax import flags
from ance_jax.core import atomic
from ance_jax.retrieval import encoding
from ance_jax.training import experiment
from ance_jax.training import schedule

# Settings that say what the training queries and passages are.
_DATA = ('dataset', 'data_dir', 'train_split', 'dev_split', 'dev_fraction')


def main(folder, judge):
  """Prints the table; returns {row: share of all}."""
  folder = pathlib.Path(folder)
  rows = atomic.read_json(folder / 'results.json')['rows']
  shares, of_own, embeddings = {}, {}, None
  for row, found in rows.items():
    if figures.searches(found['runs'][0]):
      continue
    config = flags.from_flagfile(f'{found["runs"][0]}/run.flags')
    run, last = experiment.open(config, (config.train_split, config.dev_split))
    if embeddings is None:
      embeddings = _embed(config, folder / 'judge', judge)
    batches = sum((batch for _, batch in figures.drawn(run, last)), [])
    shares[row] = share_above(batches, *embeddings)
    # Of a warm-up, too.
    methods = schedule.rows(config).values()
    if number := min(schedule.num_negatives(config, one) for one in methods):
      own = [
        (query, positive, found[:number]) for query, positive, found in batches
      ]
      of_own[row] = share_above(own, *embeddings)
  print('| row | negatives at or above the positive | of the own |')
  print('|---|---|---|')
  for row, share in shares.items():
    own = f'{of_own[row]:.1%}' if row in of_own else ''
    print(f'| `{row}` | {share:.1%} | {own} |')
  return shares


def share_above(batch, queries, passages):
  """Returns the share of negatives that score at least as the positive does.

  Args:
    batch: List of (query row, row of the positive, (n,) rows of negatives).
    queries: (Q, E) float32 embeddings.
    passages: (N, E) float32.
  """
  above = []
  for query, positive, negatives in batch:
    scores = passages[[positive, *negatives]] @ queries[query]
    above.append(scores[1:] >= scores[0])
  return float(np.mean(np.concatenate(above)))


def _embed(config, workdir, judge):
  """Returns the judge's embeddings of training queries and of the corpus."""
  config = config_lib.Config(
    job='evaluate',
    workdir=str(workdir),
    init_from=judge,
    tokens_per_batch=4096,
    **{name: getattr(config, name) for name in _DATA},
  )
  run, _ = experiment.open(config, (config.train_split,))
  queries = run.dataset.queries[config.train_split]
  return [
    encoding.encode_rows(encoder, run.retriever.params, rows, what)[0]
    for encoder, rows, what in (
      (run.retriever.query_encoder, queries, "judge's queries"),
      (run.retriever.passage_encoder, run.dataset.passages, "judge's passages"),
    )
  ]


if __name__ == '__main__':
  main(*sys.argv[1:])
