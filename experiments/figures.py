"""Draws what compare_methods.py left, in the spirit of the paper's figures.

    python experiments/figures.py FOLDER

Writes FOLDER/dev.png: dev MRR@10 against queries, seconds and operations;
FOLDER/overlap.png: the share of the negatives of a step that are in the final
model's own top 100, its best ranked passages that are no positives (Xiong et
al. 2020, figure 3), without rows that search their negatives in the step;
FOLDER/gradients.png: training loss, and norm of the gradient before clipping
(figure 4). All are of the first seed.
"""

import io
import pathlib
import statistics
import sys

import compare_methods
from matplotlib import figure as figure_lib
import numpy as np
import PIL.Image

from ance_jax import flags
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.mining import candidates
from ance_jax.mining import miner
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import negatives as negatives_lib
from ance_jax.training import refreshes
from ance_jax.training import resume
from ance_jax.training import schedule
from ance_jax.training import topics as topics_lib

# Passages that a model ranks highest, as in the paper; steps looked at.
TOP, LOOKS = 100, 20


def main(folder):
  """Draws all three; returns {row with lists: what `overlaps` does}."""
  folder = pathlib.Path(folder)
  rows = atomic.read_json(folder / 'results.json')['rows']
  workdirs = {row: found['runs'][0] for row, found in rows.items()}
  draw_dev({row: [one] for row, one in workdirs.items()}, folder / 'dev.png')
  draw_gradients(workdirs, folder / 'gradients.png')
  shares = {
    row: overlaps(workdir)
    for row, workdir in workdirs.items()
    if not searches(workdir)
  }
  draw_overlap(shares, folder / 'overlap.png')
  return shares


def draw_dev(workdirs, path, before=(), styles=()):
  """Draws dev MRR@10 by row, against what the run has spent.

  That is queries, and seconds and operations of training, refreshes and
  evaluations.

  Args:
    workdirs: Folders of the runs, by row; their mean is drawn.
    path: Path of the picture.
    before: Operations that a row's run needed before it began, by row.
    styles: Arguments of `plot` by row.
  """
  figure, (by_query, by_secs, by_flops) = _figure(3)
  for row, of_row in workdirs.items():
    scores = _mean([logs.series(one, 'dev/mrr@10') for one in of_row])
    batch_size = flags.from_flagfile(f'{of_row[0]}/run.flags').batch_size
    secs = _mean([_secs_until(one) for one in of_row])
    flops = _mean([compare_methods.flops_until(one) for one in of_row])
    first = dict(before).get(row, 0)
    style = {'linestyle': '-', **dict(styles).get(row, {})}
    for axes, spent in (
      (by_query, [step * batch_size for step in scores]),
      (by_secs, [secs[step] for step in scores]),
      (by_flops, [(first + flops[step]) / 1e12 for step in scores]),
    ):
      axes.plot(spent, list(scores.values()), marker='.', label=row, **style)
  _label(by_query, 'queries', 'dev MRR@10')
  _label(by_secs, 'seconds of training, refreshes and evaluations', '', False)
  _label(by_flops, 'TFLOP of the same', '', False)
  _save(figure, path)


def draw_gradients(workdirs, path):
  """Draws training loss and gradient norm by row, on logarithmic axes."""
  figure, both = _figure()
  names = {'train/loss': 'loss, nats', 'train/grad_norm': 'gradient norm'}
  for axes, (name, label) in zip(both, names.items(), strict=True):
    for row, workdir in workdirs.items():
      series = logs.series(workdir, name)
      axes.plot(list(series), list(series.values()), label=row, linewidth=1)
    axes.set_yscale('log')
    _label(axes, 'step', label)
  _save(figure, path)


def draw_overlap(shares, path):
  """Draws the share of training negatives in the final model's top 100."""
  figure = figure_lib.Figure(figsize=(7, 4.5), layout='constrained')
  axes = figure.subplots()
  for row, found in shares.items():
    steps, values = zip(*found.items(), strict=True)
    axes.plot(steps, values, '.-', label=row)
  _label(axes, 'step', f"share of negatives in the final model's top {TOP}")
  axes.set_ylim(-0.02, 1.02)
  _save(figure, path)
  print('| row | first step | last step |\n|---|---|---|')
  for row, found in shares.items():
    steps = sorted(found)
    print(f'| `{row}` | {found[steps[0]]:.3f} | {found[steps[-1]]:.3f} |')


def overlaps(workdir):
  """Returns {step: share of its batch's negatives in the final top 100}.

  The negatives are what the steps draw, with those of the other queries where
  the row has them.
  """
  config = flags.from_flagfile(f'{workdir}/run.flags')
  run, last = experiment.open(config, (config.train_split, config.dev_split))
  best = _final_best(run)
  return {
    step: float(
      np.mean(np.concatenate([np.isin(n, best[q]) for q, _, n in batch]))
    )
    for step, batch in drawn(run, last)
  }


def searches(workdir):
  """Returns whether a run's steps search their negatives: no file has them."""
  config = flags.from_flagfile(f'{workdir}/run.flags')
  return methods.METHODS[config.method].searches


def drawn(run, last):
  """Yields step and batch of some steps of a run, the first and last with them.

  A batch is a list of (query row, row of its positive, (n,) rows of its
  negatives), those of the other queries too where the row has them.

  Args:
    run: `experiment.Experiment` with the training split.
    last: int, step that the run ended at.
  """
  config = run.config
  for step in np.linspace(0, last - 1, LOOKS).astype(int).tolist():
    active = resume.active_at(run, step)
    method = schedule.method(config, active, step)
    negatives, topics = refreshes.negatives_for(run, method, active), None
    if config.topics:
      topics = batches.by_topic(topics_lib.make(run, last), negatives)
    queries, passages, _ = batches.draw_rows(
      experiment.training_data(run, method),
      step,
      seed=config.seed,
      batch_size=config.batch_size,
      num_negatives=schedule.num_negatives(config, method),
      negatives=negatives,
      triplets=method.triplets,
      draw=experiment.draw(config, method),
      topics=topics,
    )
    found = []
    for place, query in enumerate(queries):
      of_query = passages[place, 1:]
      if method.in_batch:
        of_query = np.append(of_query, np.delete(passages, place, 0))
      found.append((int(query), int(passages[place, 0]), of_query))
    yield step, found


def _final_best(run):
  """Returns the (Q, TOP) passage rows that the final model ranks highest."""
  watch, split = logs.Stopwatch(), run.config.train_split
  indexed = run.index_corpus(watch)
  queries = run.encode_queries(split, watch)
  task = miner.Task(
    candidates.of_index(indexed, queries, 'the final model'),
    run.dataset.splits[split].shared_positives(),
    negatives_lib.excluded(
      run.dataset.splits[split], run.dataset.corpus, methods.METHODS['ance']
    ),
    miner.Settings(TOP, seed=run.config.seed),
  )
  return miner.mine_table(task, 0, len(queries), 'mine').rows


def _secs_until(workdir):
  """Returns {step: seconds of all that was done up to there}."""
  total, secs = 0.0, {}
  for line in logs.read(workdir):
    total += sum(line.get(name, 0) for name in compare_methods.PHASES)
    secs[line['step']] = total
  return secs


def _mean(series):
  """Returns {step: mean value} of several {step: value}."""
  return {
    step: statistics.mean(one[step] for one in series) for step in series[0]
  }


def _figure(number=2):
  figure = figure_lib.Figure(figsize=(6 * number, 4.5), layout='constrained')
  return figure, figure.subplots(1, number)


def _label(axes, x, y, with_legend=True):
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  axes.grid(alpha=0.3)
  if with_legend:
    axes.legend()


def _save(figure, path):
  with atomic.writing(path) as file, io.BytesIO() as png:
    figure.savefig(png, format='png', dpi=110)
    # A picture of 64 colors has a third of the bytes.
    image = PIL.Image.open(png).convert('RGB').quantize(64)
    image.save(file, 'png', optimize=True)
  print(path)


if __name__ == '__main__':
  main(sys.argv[1])
