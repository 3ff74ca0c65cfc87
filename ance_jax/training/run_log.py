"""Logs a run: printed lines, metrics.jsonl, examples and the HTML page."""

import collections
from collections.abc import Callable
import math
from typing import NamedTuple

import jax

from ance_jax.core import atomic
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.core import pace
from ance_jax.core import remote
from ance_jax.core import workdirs
from ance_jax.training import checks
from ance_jax.training import experiment
from ance_jax.training import optimizers
from ance_jax.training import refreshes
from ance_jax.training import schedule


class Show(NamedTuple):
  """Functions that show a run, passed in because they are in jobs.

  Attributes:
    page: page(folder, path) writes the page of the run in a folder.
    end: end(folder) shows the results of the finished run.
  """

  page: Callable
  end: Callable


class RunLog:
  """Logs the steps, refreshes and evaluations of a run."""

  def __init__(
    self,
    run: experiment.Experiment,
    metrics: logs.Metrics,
    compiles: collections.Counter,
    show: Show,
    work: dict[int, list[float]],
  ):
    """Creates the log of a run.

    Args:
      run: The run.
      metrics: Writes metrics.jsonl.
      compiles: 'compiles' and 'compile_secs' since the last log.
      show: Shows the run.
      work: Operations of all steps up to the last and to each checkpoint
        before, with padding and without, by step; empty before the first.
    """
    self.work = work or {0: [0.0, 0.0]}
    self.metrics, self._run, self._show = metrics, run, show
    self._compiles, self._signs = compiles, checks.Signs()
    self._pace = pace.Pace(run.config.max_steps)

  def begin_stretch(self) -> None:
    """Restarts the clock of steps, to exclude the time between stretches."""
    self._pace.begin()

  def log_step(
    self,
    step: int,
    metrics: dict[str, jax.Array],
    active_refresh: schedule.ActiveRefresh | None,
  ) -> None:
    """Reads a step's metrics from the devices, and logs them if due.

    Args:
      step: Number of the step, from 1.
      metrics: Metrics that the train step returned.
      active_refresh: Refresh whose negatives the step used, if any.

    Raises:
      FloatingPointError: The loss or its gradient was not finite.
    """
    config = self._run.config
    values = jax.device_get(metrics)
    self._count(step, values.pop('flops'), values.pop('flops_real'))
    values = {f'train/{name}': float(value) for name, value in values.items()}
    # A gradient that is not finite has already corrupted the parameters.
    if not math.isfinite(values['train/loss'] + values['train/grad_norm']):
      raise FloatingPointError(
        f'step {step} has a loss of {values["train/loss"]} and a gradient norm '
        f'of {values["train/grad_norm"]}, which must be finite; lower '
        '--learning_rate, or check the data: the last checkpoint is whole.'
      )
    self._pace.seen(step)
    refresh = active_refresh.refresh if active_refresh else None
    sign = self._signs.seen(
      values['train/loss'], values['train/accuracy'], refresh
    )
    if sign:
      logs.log(f'step {step}: {sign}')
    if step % config.steps_per_log == 0:
      made = schedule.num_updates(config, active_refresh, step)
      rate = optimizers.learning_rate_schedule(config)(made - 1)
      values['train/learning_rate'] = float(rate)
      if refresh is not None:
        values['train/negatives_age'] = step - refresh
      self.metrics.write(step, values)
      if not logs.has_bars():
        logs.log(_line(config, step, values, self._pace.text(step)))

  def _count(self, step, *flops):
    """Adds the operations of a step."""
    last = max(self.work)
    before = self.work[last]
    if not schedule.save_due(self._run.config, last):
      del self.work[last]
    # In float32 the total would lose the small increments.
    self.work[step] = [
      old + float(new) for old, new in zip(before, flops, strict=True)
    ]

  def log_refresh(self, made: dict, age: int | None) -> None:
    """Logs a refresh.

    Args:
      made: Manifest of the refresh.
      age: Age in steps of the negatives that it replaces, if any.
    """
    logs.log(refreshes.summary(made, age))
    self._log_made(made['step'], made)

  def log_evaluation(self, step: int, made: dict) -> None:
    """Logs an evaluation, as `refreshes.assess` returns it, at `step`."""
    logs.log(
      f'evaluation at step {step}: {refreshes.dev_summary(made["metrics"])}'
    )
    self._log_made(step, made)

  def _log_made(self, step, made):
    """Writes metrics and examples of a refresh or an evaluation, and the page.

    Args:
      step: Step of the weights.
      made: 'metrics', 'secs', 'flops' and 'examples', as in a manifest.
    """
    secs = {f'time/{name}_secs': value for name, value in made['secs'].items()}
    secs['time/compiles'] = self._compiles.pop('compiles', 0)
    secs['time/compile_secs'] = self._compiles.pop('compile_secs', 0)
    flops = {f'flops/{name}': value for name, value in made['flops'].items()}
    # A refresh beside training is of an earlier step.
    if step in self.work:
      flops['flops/train'], flops['flops_real/train'] = self.work[step]
    self.metrics.write(step, {**made['metrics'], **secs, **flops})
    if not distributed.is_first():
      return
    workdir, written = self._run.workdir, []
    if made['examples']:
      examples = workdir / workdirs.EXAMPLES_FOLDER
      atomic.make_folder(examples)
      written = [examples / f'{step:08d}.json']
      atomic.write_json(written[0], {'examples': made['examples']})
    self._show.page(workdir, workdir / workdirs.PAGE_FILE)
    for path in (*written, workdir / workdirs.PAGE_FILE):
      remote.push(path)

  def finish(self) -> dict[str, float]:
    """Shows the finished run; returns its final dev scores by measure."""
    workdir, last = self._run.workdir, self._run.config.max_steps
    if distributed.is_first():
      self._show.end(workdir)
      for name in (logs.METRICS_FILE, workdirs.PAGE_FILE, 'curves.png'):
        remote.push(workdir / name)
    distributed.barrier('finished')
    return {
      name.removeprefix('dev/'): logs.series(workdir, name)[last]
      for name in logs.dev_measures(workdir)
    }


def _line(config, step, values, rate):
  """Returns the line to print for a step."""
  shown = [
    f'step {step:,} of {config.max_steps:,}',
    f'loss {values["train/loss"]:.4g}',
    f'accuracy {values["train/accuracy"]:.1%}',
    f'learning rate {values["train/learning_rate"]:.3g}',
  ]
  return ' | '.join([*shown, rate] if rate else shown)
