"""Does it hurt that negatives are of older weights, and from where on?

    python experiments/staleness.py experiments/nl2bash.flags FOLDER \
      --data_dir=DATA --seeds 0 1

Two ways to be stale (the paper's figure 5 is the first): fewer refreshes, one
every so many steps; and --refresh_mode=delayed, one every --delay_every steps
that comes into use so many steps after its weights were made. All runs of a
seed go on from one of in-batch negatives. Writes staleness.md, staleness.json
and staleness.png into the folder; runs that are there are not made again.
"""

import argparse
import dataclasses
import pathlib
import statistics

import compare_methods
from matplotlib import figure

from ance_jax import flags
from ance_jax.core import atomic
from ance_jax.core import logs

MEASURE = compare_methods.CHOSEN_BY
KINDS = {
  'every': 'steps between refreshes',
  'delay': 'steps that each refresh is late',
}


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('flagfile')
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--data_dir')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0])
  parser.add_argument('--rate', type=float, default=1e-2)
  parser.add_argument('--start', type=int, default=500, metavar='STEPS')
  parser.add_argument(
    '--every', type=int, nargs='+', default=[25, 50, 100, 250]
  )
  parser.add_argument(
    '--delays', type=int, nargs='+', default=[25, 50, 100, 200]
  )
  parser.add_argument('--delay_every', type=int, default=50)
  given = parser.parse_args(arguments)
  changes = {'data_dir': given.data_dir} if given.data_dir else {}
  base = flags.from_flagfile(given.flagfile, **changes)
  found = {'every': {}, 'delay': {}}
  for every in given.every:
    changes = {'steps_per_refresh': every}
    found['every'][every] = _runs(base, given, f'every-{every}', changes)
    _write(given.folder, found)
  for delay in given.delays:
    changes = {
      'steps_per_refresh': given.delay_every,
      'refresh_mode': 'delayed',
      'refresh_delay': delay,
    }
    found['delay'][delay] = _runs(base, given, f'delay-{delay}', changes)
    _write(given.folder, found)
  print((given.folder / 'staleness.md').read_text())


def _runs(base, given, name, changes):
  """Returns scores, ages and seconds of the runs of all seeds."""
  found = {'dev': [], 'test': [], 'age': [], 'train': [], 'other': []}
  for seed in given.seeds:
    begin = dataclasses.replace(
      base,
      workdir=str(given.folder / f'start-{seed}'),
      method='in_batch',
      max_steps=given.start,
      seed=seed,
    )
    compare_methods.train_once(begin)
    config = dataclasses.replace(
      base,
      workdir=str(given.folder / f'{name}-{seed}'),
      init_from=begin.workdir,
      method='ance',
      warmup_steps=0,
      max_steps=base.max_steps - given.start,
      learning_rate=given.rate,
      seed=seed,
      **changes,
    )
    compare_methods.train_once(config)
    dev = logs.series(config.workdir, f'dev/{MEASURE}')
    ages = logs.series(config.workdir, 'train/negatives_age')
    secs = compare_methods.seconds(config.workdir)
    found['dev'].append(dev[config.max_steps])
    found['test'].append(compare_methods.test_scores(config)[MEASURE])
    found['age'].append(statistics.mean(ages.values()))
    for kind in ('train', 'other'):
      found[kind].append(secs[kind])
  return found


def _write(folder, found):
  atomic.write_json(folder / 'staleness.json', found)
  names = f'dev {MEASURE}', f'test {MEASURE}', 'mean age', 'train s', 'other s'
  lines = ['| | steps | ' + ' | '.join(names) + ' |', '|---' * 7 + '|']
  for kind, text in KINDS.items():
    for steps, runs in found[kind].items():
      cells = [_mean(runs['dev'], '.4f'), _mean(runs['test'], '.4f')]
      cells += [_mean(runs[n], '.0f') for n in ('age', 'train', 'other')]
      lines.append(f'| {text} | {steps} | ' + ' | '.join(cells) + ' |')
  atomic.write_text(folder / 'staleness.md', '\n'.join(lines) + '\n')
  _draw(folder / 'staleness.png', found)


def _mean(values, form):
  text = f'{statistics.mean(values):{form}}'
  if form == '.4f' and len(values) > 1:
    text += f' ({min(values):{form}}-{max(values):{form}})'
  return text


def _draw(path, found):
  """Draws dev and test against each kind of staleness, a point a seed."""
  drawn = figure.Figure((9, 3.5), layout='constrained')
  axes = drawn.subplots(1, 2, sharey=True)
  for axis, (kind, text) in zip(axes, KINDS.items(), strict=True):
    for split, color in (('dev', 'C0'), ('test', 'C1')):
      steps = list(found[kind])
      means = [statistics.mean(found[kind][n][split]) for n in steps]
      axis.plot(steps, means, color=color, label=split)
      for n in steps:
        scores = found[kind][n][split]
        axis.plot([n] * len(scores), scores, '.', color=color)
    axis.set_xlabel(text)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel(MEASURE)
  axes[0].legend()
  drawn.savefig(path, dpi=120)


if __name__ == '__main__':
  main()
