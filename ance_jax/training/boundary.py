"""Between two stretches of training: save, refresh, evaluate, pick up, report.

A boundary is a step at which something of this is due (schedule.py). Whether a
refresh is made here, in step, or beside training (background.py), what comes
into use is written to disk before the first batch of it.
"""

import collections
from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import numpy as np
import optax

from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import locks
from ance_jax.core import logs
from ance_jax.core import pace
from ance_jax.core import remote
from ance_jax.core import workdirs
from ance_jax.retrieval import corpus_index
from ance_jax.training import background
from ance_jax.training import checks
from ance_jax.training import diagnostics
from ance_jax.training import experiment
from ance_jax.training import refreshes
from ance_jax.training import resume
from ance_jax.training import schedule
from ance_jax.training import steps


class Show(NamedTuple):
  """How a run is shown, by a module above this one.

  Attributes:
    page: page(folder, path) writes the page of the run in a folder.
    end: end(folder) shows what came of the run, once it is over.
  """

  page: Callable
  end: Callable


class Parts(NamedTuple):
  """What the loop works with."""

  run: experiment.Experiment
  record: dict[str, bytes]
  lock: locks.Lock
  checkpoints: checkpoint.Checkpoints
  metrics: logs.Metrics
  pace: pace.Pace
  signs: checks.Signs
  compiles: collections.Counter
  optimizer: optax.GradientTransformation
  reader: background.Reader | None
  show: Show


def cross(parts, state, step, in_use):
  """Does what is due after `step` steps.

  Returns:
    The `resume.PickUp` of the negatives in use from here on, or None.
  """
  run, config = parts.run, parts.run.config
  parts.lock.check()
  if schedule.save_due(config, step):
    save(parts, state, step)
  in_step = parts.reader is None and not config.refresh_replay
  if in_step and schedule.refresh_due(config, step):
    parts.checkpoints.wait()
    before = in_use.refresh if in_use else None
    made = refreshes.refresh(run, step, before=before)
    if not made['mined']:
      _report(parts, made, None)
      return in_use
    at_once = schedule.comes_into_use(config, step) == step
    _report(parts, made, step - before if at_once and in_use else None)
  elif schedule.eval_due(config, step):
    made = _evaluate(run, state.params, in_use)
    logs.say(
      f'evaluation at step {step}: {refreshes.dev_summary(made["metrics"])}'
    )
    _report_metrics(parts, step, made)
  newer = _comes_into_use(parts, step, in_use)
  return in_use if newer is None else _pick_up(parts, step, newer, in_use)


def until(parts, step, in_use):
  """Returns the first step after `step` at which there may be a pick-up."""
  config = parts.run.config
  ends = [schedule.next_boundary(config, step)]
  ends += [one.step for one in resume.planned(parts.run) if one.step > step]
  if config.max_staleness and parts.reader:
    oldest = in_use.refresh if in_use else config.warmup_steps
    ends.append(max(oldest + config.max_staleness, step + 1))
  return min(ends)


def news(parts, step, in_use):
  """Returns whether to stop, and whether a refresh came in beside training.

  Several processes must do so after the same step: they ask each other now and
  then, as that waits for the devices.
  """
  several = distributed.count() > 1
  if several and step % parts.run.config.steps_per_log:
    return False, False
  newer = False
  if parts.reader and distributed.is_first():
    newer = parts.reader.newest(in_use, step) is not None and not any(
      one.step > step for one in resume.planned(parts.run)
    )
  here = np.array([logs.stop_requested(), newer])
  return distributed.gather(here).any(0).tolist()


def _comes_into_use(parts, step, in_use):
  """Returns the step of the refresh to pick up after `step`, or None."""
  run, config = parts.run, parts.run.config
  plan = resume.planned(run)
  if config.refresh_replay or any(one.step >= step for one in plan):
    here = [one.refresh for one in plan if one.step == step]
    return here[0] if here else None
  if parts.reader is None:
    return schedule.comes_into_use(config, step)
  if step == config.max_steps:
    return None
  newer = distributed.told(lambda: parts.reader.newest(in_use, step))
  of = newer if newer is not None else in_use.refresh if in_use else None
  if of is None and not config.warmup_steps:
    parts.checkpoints.wait()
    return parts.reader.wait(in_use, step, 0)
  age = step - (config.warmup_steps if of is None else of)
  if 0 < config.max_staleness <= age:
    parts.checkpoints.wait()
    return parts.reader.wait(in_use, step, step - config.max_staleness + 1)
  return newer


def _pick_up(parts, step, newer, in_use):
  """Returns the `resume.PickUp` of a refresh, which is on disk then."""
  run, other = parts.run, parts.run.config.refresh_replay
  if other or parts.reader:
    if other:
      made = refreshes.adopt(run, other, newer)
    else:
      made = refreshes.manifest(run, newer)
    _report(parts, made, step - in_use.refresh if in_use else None)
  if in_use:
    age = {'refresh/negatives_age': step - in_use.refresh}
    parts.metrics.write(step, age)
  picked_up = resume.PickUp(step, newer)
  resume.pick_up(run, picked_up)
  return picked_up


def levelled_off(parts):
  """Returns the parts with the end of the warm-up that dev says by now."""
  run, config = parts.run, parts.run.config
  if not config.warmup_until_plateau:
    return parts

  def end():
    name = next(iter(logs.dev_measures(run.workdir)), '')
    scores = logs.series(run.workdir, name)
    return schedule.levelled_off(config, scores).warmup_steps

  config = dataclasses.replace(config, warmup_steps=distributed.told(end))
  if config != run.config:
    logs.say(
      f'dev has levelled off: the warm-up ends at step {config.warmup_steps}'
    )
  return parts._replace(run=run._replace(config=config))


def save(parts, state, step):
  """Begins to save a checkpoint, and deletes those that are not kept.

  The losses up to here were read, and are finite.
  """
  parts.lock.check()
  parts.checkpoints.wait()
  _prune(parts)
  run, workdir = parts.run, parts.run.workdir
  committed = distributed.told(lambda: checkpoint.committed_steps(workdir))
  if step not in committed:
    record = {
      **parts.record,
      logs.METRICS_FILE: parts.metrics.history(),
      resume.PICK_UPS_FILE: (workdir / resume.PICK_UPS_FILE).read_bytes(),
    }
    about = {'run': run.id, 'made_with': devices_lib.describe(run.devices)}
    everywhere = devices_lib.globally_replicated(run.devices)
    state = distributed.globally(state, everywhere)
    parts.checkpoints.save(state, step, record, about)
  if not committed:
    # Whatever is logged from here on, there is a checkpoint before it.
    parts.checkpoints.wait()


def _prune(parts):
  """Deletes the committed checkpoints that are not kept.

  What is being saved does not count: it may never be committed.
  """
  config = parts.run.config
  committed = checkpoint.committed_steps(config.workdir)
  if committed and distributed.is_first():
    newest = committed[-config.checkpoints_to_keep :]
    best = checkpoint.best(config.workdir, committed)
    # A damaged refresh is made again: of what is in use, and what will be.
    in_use = resume.picked_up(parts.run, committed[-1])
    since = in_use.refresh if in_use else 0
    mined = [n for n in refreshes.published(parts.run) if n >= since]
    reads = background.claimed(config.workdir)
    parts.checkpoints.keep([*newest, best, *mined, reads])


def _evaluate(run, params, in_use):
  """Returns what a refresh's manifest says of these weights, without mining."""
  run, watch = run.with_params(params), logs.Stopwatch()
  indexed = run.index_corpus(watch)
  seen = diagnostics.probe(run, indexed, watch)
  step = in_use.refresh if in_use else None
  return refreshes.assess(run, indexed, seen, step, watch)[0]


def _report(parts, made, age):
  """Prints a refresh, and logs what it found.

  Args:
    parts: `Parts`.
    made: Its manifest.
    age: Steps that the negatives were old that end here; None: none end.
  """
  logs.say(refreshes.summary(made, age))
  _report_metrics(parts, made['step'], made)


def _report_metrics(parts, step, made):
  """Logs what was found with the weights of `step`, and draws the page."""
  run = parts.run
  secs = {f'time/{name}_secs': value for name, value in made['secs'].items()}
  secs['time/compiles'] = parts.compiles.pop('compiles', 0)
  secs['time/compile_secs'] = parts.compiles.pop('compile_secs', 0)
  flops = {f'flops/{name}': value for name, value in made['flops'].items()}
  flops['flops/train'] = _train_flops(run, step)
  parts.metrics.write(step, {**made['metrics'], **secs, **flops})
  if not distributed.is_first():
    return
  shown = []
  if made['examples']:
    examples = run.workdir / workdirs.EXAMPLES_FOLDER
    atomic.make_folder(examples)
    shown = [examples / f'{step:08d}.json']
    atomic.write_json(shown[0], {'examples': made['examples']})
  parts.show.page(run.workdir, run.workdir / workdirs.PAGE_FILE)
  for path in (*shown, run.workdir / workdirs.PAGE_FILE):
    remote.push(path)
  if parts.reader is None:
    corpus_index.prune_embeddings(run.embeddings_folder(made['weights_hash']))


def _train_flops(run, step):
  """Returns the operations of all steps up to `step`."""
  pick_ups = resume.planned(run)
  mined = min([one.step for one in pick_ups] + [step])
  return sum(
    number
    * steps.flops(
      run.config, schedule.method(run.config, is_mined), run.retriever.config
    )
    for number, is_mined in ((mined, False), (step - mined, True))
  )


def finish(parts):
  """Shows what came of it; returns {measure: value} on dev at the end."""
  parts.checkpoints.wait()
  _prune(parts)
  workdir, config = parts.run.workdir, parts.run.config
  if distributed.is_first():
    parts.show.end(workdir)
    for name in (logs.METRICS_FILE, workdirs.PAGE_FILE, 'curves.png'):
      remote.push(workdir / name)
  distributed.wait('finished')
  return {
    name.removeprefix('dev/'): logs.series(workdir, name)[config.max_steps]
    for name in logs.dev_measures(workdir)
  }
