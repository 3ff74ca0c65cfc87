"""Runs the quickstart and its sisters over seeds, and prints README's table.

    python experiments/quickstart_table.py /tmp/ance_jax/table 0 1 2

Runs that are there are not made again. Test is read once for each row.
"""

import dataclasses
import pathlib
import statistics
import sys

from ance_jax import flags
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import logs
from ance_jax.jobs import evaluate
from ance_jax.jobs import report
from ance_jax.jobs import train
from ance_jax.training import experiment

MEASURES = {
  'mrr@10': 'MRR@10',
  'ndcg@10': 'nDCG@10',
  'recall@100': 'Recall@100',
}
FLAGFILES = {
  'refreshed': 'experiments/quickstart.flags',
  'frozen': 'experiments/quickstart_frozen.flags',
  'in-batch': 'experiments/quickstart_in_batch.flags',
}


def test_scores(settings, **changes):
  """Returns the test scores of a run's checkpoint, read once."""
  changed = dataclasses.replace(
    settings, job='evaluate', split='test', **changes
  )
  step = 0 if changed.retriever == 'bm25' else int(changed.checkpoint)
  path = evaluate.scores_path(changed, step)
  if path.exists():
    return atomic.read_json(path)['metrics']
  return evaluate.run(changed)


def main(folder, seeds):
  scores = {}
  for seed in seeds:
    for name, flagfile in FLAGFILES.items():
      workdir = str(pathlib.Path(folder) / f'{name}-{seed}')
      settings = flags.from_flagfile(flagfile, seed=int(seed), workdir=workdir)
      committed = checkpoint.committed_steps(workdir)
      if committed:
        experiment.check_same_run(settings, committed[-1])
      if settings.max_steps not in logs.series(workdir, 'dev/mrr@10'):
        train.run(settings)
      rows = {name: settings.max_steps}
      if name == 'refreshed':
        rows = {'untrained': 0, 'warm-up alone': settings.warmup_steps, **rows}
      for row, step in rows.items():
        found = test_scores(settings, checkpoint=str(step))
        scores.setdefault(row, []).append(found)
  bm25 = dataclasses.replace(
    settings, workdir=str(pathlib.Path(folder) / 'bm25')
  )
  scores['BM25'] = [test_scores(bm25, retriever='bm25')]
  print_table(scores)
  print_secs(folder, seeds)
  picture = pathlib.Path(folder) / 'curves.png'
  report.draw(
    [pathlib.Path(folder) / f'{name}-{seeds[0]}' for name in FLAGFILES], picture
  )
  print(f'curves of seed {seeds[0]}: {picture}')


def print_table(scores):
  """Prints mean and range over seeds as a Markdown table."""
  print('\n| test | ' + ' | '.join(MEASURES.values()) + ' |')
  print('|---' * (1 + len(MEASURES)) + '|')
  order = (
    'BM25',
    'untrained',
    'warm-up alone',
    'in-batch',
    'frozen',
    'refreshed',
  )
  for row in order:
    cells = []
    for name in MEASURES:
      values = [found[name] for found in scores[row]]
      cell = f'{statistics.mean(values):.4f}'
      if len(values) > 1:
        cell += f' ({min(values):.4f}-{max(values):.4f})'
      cells.append(cell)
    print(f'| {row} | ' + ' | '.join(cells) + ' |')


def print_secs(folder, seeds):
  """Prints the seconds of each phase, in the mean over seeds."""
  print()
  for name in FLAGFILES:
    totals = {}
    for seed in seeds:
      for line in logs.read(pathlib.Path(folder) / f'{name}-{seed}'):
        for key, value in line.items():
          if key.startswith('time/') and key.endswith('_secs'):
            totals[key] = totals.get(key, 0) + value / len(seeds)
    shown = (f'{k[5:-5]} {v:.0f} s' for k, v in sorted(totals.items()))
    print(f'{name}: ' + ', '.join(shown))


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2:])
