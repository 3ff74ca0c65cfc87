"""Counts right answers that are hidden, among the negatives that rules draw.

    python experiments/hidden_positives.py experiments/insuranceqa.flags \
      FOLDER MODEL --data_dir=DATA

Of each training query with several judged passages one is kept, and the others
are hidden: what is drawn of them is a false negative, without any doubt. MODEL
ranks, a folder or name on the hub; nothing is trained. Prints, for each rule,
hidden ones in 1,000 that are drawn, with the standard error, and the share of
queries that have no negative left.
"""

import argparse
import dataclasses
import math

import numpy as np

from ance_jax import flags
from ance_jax.core import logs
from ance_jax.mining import candidates
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import negatives
from ance_jax.training import refreshes

DRAWN = 7
# Cosines are at most 1; SimANS weighs scores over such a temperature.
SIMANS = {'temperature': 0.05, 'simans_a': 0.5}
RULES = {
  'the first 7': {'draw': 'top'},
  'uniform of the first 50': {'top_k': 50},
  'uniform of the first 200': {},
  'SimANS': {'draw': 'simans', **SIMANS},
  'SimANS, b -1': {'draw': 'simans', **SIMANS, 'simans_b': -1.0},
  'SimANS for MS MARCO': {'draw': 'simans_abs', 'simans_a': 3.0},
  'relative margin .05, the first 7': {'relative_margin': 0.05, 'draw': 'top'},
  'centred margin .05, the first 7': {
    'relative_margin': 0.05, 'center_scores': True, 'draw': 'top'
  },
  'centred margin .2, the first 7': {
    'relative_margin': 0.2, 'center_scores': True, 'draw': 'top'
  },
  'z margin .5, the first 7': {'z_margin': 0.5, 'draw': 'top'},
  'z margin 2, the first 7': {'z_margin': 2.0, 'draw': 'top'},
}  # fmt: skip


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('flagfile')
  parser.add_argument('folder')
  parser.add_argument('model')
  parser.add_argument('--data_dir')
  given = parser.parse_args()
  config = flags.from_flagfile(
    given.flagfile,
    job='evaluate',
    workdir=given.folder,
    init_from=given.model,
    **({'data_dir': given.data_dir} if given.data_dir else {}),
    # The model's own, where the flagfile has those of its encoder.
    pooling=None,
    similarity=None,
    query_length=None,
    passage_length=None,
    top_k=200,
    on_shortage='keep',
  )
  print(table(count(config)))


def count(config, rules=RULES):
  """Returns {rule: (hidden drawn, all drawn, share of queries with none)}.

  Args:
    config: `Config` whose `init_from` ranks.
    rules: Settings by name of the rule.
  """
  run, _ = experiment.open(config, (config.train_split,))
  watch = logs.Stopwatch()
  indexed = run.index_corpus(watch)
  vectors = run.encode_queries(config.train_split, watch)
  source = candidates.of_index(indexed, vectors, 'model')
  run, hidden = _hide(run)
  found = {}
  for name, changes in rules.items():
    ruled = run._replace(config=dataclasses.replace(config, **changes))
    drawn = _draw(ruled, source)
    # Only queries that have a hidden one.
    there = np.isin(drawn.queries, hidden[0])
    keys = (drawn.queries[there, None].astype(np.int64) << 32) + (
      drawn.passages[there, 1:]
    )
    wrong = np.isin(keys, (hidden[0].astype(np.int64) << 32) + hidden[1])
    number = len(np.unique(hidden[0]))
    found[name] = int(wrong.sum()), wrong.size, 1 - int(there.sum()) / number
  return found


def _hide(run):
  """Returns the run with one positive a query, and the pairs that it lost."""
  split = run.dataset.splits[run.config.train_split]
  queries, passages = split.positives()
  random = np.random.default_rng(run.config.seed).random(len(queries))
  order = np.lexsort((random, queries))
  first = order[np.unique(queries[order], return_index=True)[1]]
  kept = np.zeros(len(queries), bool)
  kept[first] = True
  alone = split._replace(
    offsets=np.searchsorted(queries[kept], np.arange(len(split.ids) + 1)),
    passages=passages[kept],
    grades=np.ones(int(kept.sum()), np.int32),
  )
  splits = {**run.dataset.splits, run.config.train_split: alone}
  data = run.dataset._replace(splits=splits)
  return run._replace(dataset=data), (queries[~kept], passages[~kept])


def _draw(run, source):
  """Returns the `batches.Drawn` of a step that has each query once."""
  config, method = run.config, methods.METHODS['ance']
  number = len(run.dataset.splits[config.train_split].ids)
  mined, _ = negatives.select_negatives(
    run, method, source, (0, number), 'mine'
  )
  stored = negatives.Stored(mined.rows, mined.scores, mined.positive_scores)
  table = refreshes.of_table(run, 0, stored, 0)
  return batches.draw_rows(
    experiment.training_data(run, method),
    0,
    seed=config.seed,
    batch_size=len(table.rows),
    num_negatives=DRAWN,
    negatives=table,
    draw=experiment.draw(config, method),
  )


def table(found):
  """Returns the counts as a Markdown table."""
  lines = [
    f'| rule | hidden ones in 1,000 drawn ({DRAWN} a query) | queries left '
    'with none |',
    '|---|---|---|',
  ]
  for name, (wrong, number, none) in found.items():
    share = wrong / number
    error = math.sqrt(share * (1 - share) / number)
    lines.append(
      f'| {name} | {1000 * share:.1f} ± {1000 * error:.1f} | {none:.1%} |'
    )
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
