"""Runs the rows of the method table on one data set, tuned alike.

    python experiments/compare_methods.py experiments/nl2bash.flags FOLDER \
      --data_dir=DATA --seeds 0 1 2 --rates 5e-3 1e-2 2e-2

Each row is trained at each rate with the first seed; at the rate that is best
on dev, then with the other seeds; test is read once for each of those runs.
With --start, all rows of a seed go on from one run of in-batch negatives of so
many steps, for the steps that are left, and nothing else is warmed up. Runs
that are there are not made again. Writes table.md and results.json into the
folder, and figures.py draws them.
"""

import argparse
import dataclasses
import pathlib
import statistics

from ance_jax import flags
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import logs
from ance_jax.jobs import evaluate
from ance_jax.jobs import train
from ance_jax.training import experiment

# What differs between the rows; all else is the flagfile's.
ROWS = {
  'random': {},
  'in_batch': {},
  'bm25': {},
  'dpr': {},
  'ance': {},
  # Its batch is of triplets, 20 of a query.
  'ance_code': {'num_hard_negatives': 20, 'query_slices': 5},
  'ance_in_batch': {},
  # Mined once, from the model at the end of its warm-up.
  'ance_in_batch_once': {'method': 'ance_in_batch', 'max_refreshes': 1},
  'star': {},
  # Of two towers, as only the queries' is trained.
  'adore': {'tie_encoders': False, 'optimizer': 'adamw'},
  # Three episodes, and the rate of the last, of --start=500 on nl2bash.
  'ance_tele': {
    'max_refreshes': 3,
    'restart_from': 'warmup',
    'rate_steps': 300,
  },
  # Half of the loss is the teacher's.
  'guided': {'also_weight': 0.5, 'teacher_temperature': 0.05},
  'ance_guided': {'also_weight': 0.5, 'teacher_temperature': 0.05},
  'given': {'num_hard_negatives': 3},
  'distill_given': {
    'num_hard_negatives': 3,
    'also_weight': 0.5,
    'teacher_temperature': 0.05,
  },
  'margin_mse_given': {'num_hard_negatives': 3, 'teacher_temperature': 0.05},
}
# The flag that a row needs.
NEEDS = {
  'guided': 'guide',
  'ance_guided': 'guide',
  'given': 'negatives',
  'distill_given': 'negatives',
  'margin_mse_given': 'negatives',
}
MEASURES = {
  'mrr@10': 'MRR@10',
  'ndcg@10': 'nDCG@10',
  'recall@100': 'Recall@100',
}
CHOSEN_BY = 'mrr@10'
# Of all that a run does; each compilation is in one of them.
PHASES = [
  f'time/{name}_secs'
  for name in (
    'train',
    'encode',
    'index',
    'probe',
    'search',
    'mine',
    'evaluate',
  )
]


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('flagfile')
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--data_dir')
  parser.add_argument('--init_from')
  parser.add_argument('--guide', help='Of the rows guided and ance_guided.')
  parser.add_argument(
    '--negatives', help='Of the row given, and, with scores, of ..._given.'
  )
  parser.add_argument('--tokens_dir', help='Shared by the runs.')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0])
  parser.add_argument('--rates', type=float, nargs='+', default=[1e-2])
  parser.add_argument(
    '--rows',
    nargs='+',
    choices=list(ROWS),
    default=[row for row in ROWS if row not in NEEDS],
  )
  parser.add_argument('--start', type=int, default=0, metavar='STEPS')
  given = parser.parse_args()
  given_flags = {
    name: getattr(given, name)
    for name in ('data_dir', 'init_from', 'tokens_dir')
  }
  changes = {name: value for name, value in given_flags.items() if value}
  for row in set(given.rows) & NEEDS.keys():
    if not (needed := getattr(given, NEEDS[row])):
      parser.error(f'the row {row} needs --{NEEDS[row]}')
    ROWS[row][NEEDS[row]] = needed
  base = flags.from_flagfile(given.flagfile, **changes)
  compare(base, given.folder, given.seeds, given.rates, given.rows, given.start)


def compare(base, folder, seeds, rates, rows, start=0):
  """Trains and scores the rows; writes results.json and table.md.

  Args:
    base: `Config` of what all rows share.
    folder: Path of the folder of the runs.
    seeds: List of int.
    rates: List of float, peak learning rates that each row is tried at.
    rows: Names of rows.
    start: Steps of the run that all rows go on from; 0: from random weights.

  Returns:
    Rate, folders, test scores, seconds and operations of the runs by row.
  """
  results = {}
  for row in rows:
    first = [_run(base, folder, row, rate, seeds[0], start) for rate in rates]
    tried = {rate: _dev(run) for rate, run in zip(rates, first, strict=True)}
    best = max(tried, key=tried.get)
    chosen = [_run(base, folder, row, best, seed, start) for seed in seeds]
    results[row] = {
      'rate': best,
      'dev by rate': {f'{rate:g}': score for rate, score in tried.items()},
      'runs': [run.workdir for run in chosen],
      'test': [test_scores(run) for run in chosen],
      'secs': [seconds(run.workdir) for run in chosen],
      'flops': [max(flops_until(run.workdir).values()) for run in chosen],
    }
    atomic.write_json(folder / 'results.json', {'rows': results})
    atomic.write_text(folder / 'table.md', table(results))
  print(table(results))
  return results


def table(results):
  """Returns mean and range over seeds as a Markdown table."""
  columns = [
    *MEASURES.values(),
    'rate',
    'train s',
    'refresh and dev s',
    'TFLOP',
  ]
  lines = ['| row | ' + ' | '.join(columns) + ' |']
  lines.append('|---' * (1 + len(columns)) + '|')
  for row, found in results.items():
    cells = [f'`{row}`']
    cells += [cell([s[name] for s in found['test']]) for name in MEASURES]
    cells.append(f'{found["rate"]:g}')
    for kind in ('train', 'other'):
      cells.append(f'{statistics.mean(s[kind] for s in found["secs"]):.0f}')
    cells.append(f'{statistics.mean(found["flops"]) / 1e12:,.0f}')
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def cell(values):
  """Returns the mean of some scores and, of several, their range."""
  text = f'{statistics.mean(values):.4f}'
  if len(values) > 1:
    text += f' ({min(values):.4f}-{max(values):.4f})'
  return text


def _run(base, folder, row, rate, seed, start):
  """Returns the `Config` of a run that is over, made if it is not there."""
  config = dataclasses.replace(
    base,
    workdir=str(folder / f'{row}-{rate:g}-{seed}'),
    learning_rate=rate,
    seed=seed,
    **{'method': row, **ROWS[row]},
  )
  if start:
    begin = dataclasses.replace(
      base,
      workdir=str(folder / f'start-{seed}'),
      method='in_batch',
      max_steps=start,
      seed=seed,
    )
    train_once(begin)
    config = dataclasses.replace(
      config,
      init_from=begin.workdir,
      max_steps=base.max_steps - start,
      warmup_steps=0,
    )
  train_once(config)
  return config


def train_once(config):
  """Trains, if that was not done, under the same settings."""
  committed = checkpoint.committed_steps(config.workdir)
  if committed:
    experiment.check_same_run(config, committed[-1])
  if config.max_steps not in logs.series(config.workdir, f'dev/{CHOSEN_BY}'):
    train.run(config)


def _dev(config):
  return logs.series(config.workdir, f'dev/{CHOSEN_BY}')[config.max_steps]


def test_scores(config):
  """Returns the test scores of a run's end, read once."""
  config = dataclasses.replace(config, job='evaluate', split='test')
  path = evaluate.scores_path(config, config.max_steps)
  if path.exists():
    return atomic.read_json(path)['metrics']
  return evaluate.run(config)


def seconds(workdir):
  """Returns the seconds of a run in training, and in all else."""
  secs = {'train': 0.0, 'other': 0.0}
  for line in logs.read(workdir):
    for name, value in line.items():
      if name in PHASES:
        kind = 'train' if name == 'time/train_secs' else 'other'
        secs[kind] += value
  return secs


def flops_until(workdir):
  """Returns {step: operations up to there}, at each evaluation.

  Counts training, encoding, searching and evaluating, but not the work of
  a fixed guide or a cross-encoder.
  """
  others, found = 0.0, {}
  for line in logs.read(workdir):
    new = {n: v for n, v in line.items() if n.startswith('flops/')}
    # flops/train is cumulative.
    if (training := new.pop('flops/train', None)) is not None:
      others += sum(new.values())
      found[line['step']] = others + training
  return found


if __name__ == '__main__':
  main()
