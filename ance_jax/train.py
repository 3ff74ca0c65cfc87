"""The loop: train on the negatives in use, and at boundaries mine new ones.

    ┌─────────────► pmapped steps on the negatives in use ──────────────┐
    │                                                                   ▼
pick-up ◄── publish ◄── mine ◄── search ◄── index ◄── encode ◄── checkpoint
                             (refresh.py)

What is below is made in step, or beside it (watch.py): the loop is the same.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import time
from typing import NamedTuple

import jax
import numpy as np
import optax

from ance_jax import batches
from ance_jax import checkpoint
from ance_jax import compiled
from ance_jax import config as config_lib
from ance_jax import devices as devices_lib
from ance_jax import diagnostics
from ance_jax import encoders
from ance_jax import evaluate
from ance_jax import footprint
from ance_jax import handoff
from ance_jax import locks
from ance_jax import logs
from ance_jax import optimizers
from ance_jax import processes
from ance_jax import refresh
from ance_jax import remote
from ance_jax import report
from ance_jax import resume
from ance_jax import runs
from ance_jax import schedule
from ance_jax import steps
from ance_jax import watch


class _Parts(NamedTuple):
  """What the loop works with; none of it is replaced on the way."""

  run: runs.Run
  record: dict[str, bytes]
  lock: locks.Lock
  checkpoints: checkpoint.Checkpoints
  metrics: logs.Metrics
  compiles: collections.Counter
  optimizer: optax.GradientTransformation
  reader: watch.Reader | None


def run(config, *, leave=logs.interrupt):
  """Trains a retriever, or goes on from the newest checkpoint of its folder.

  Args:
    config: `Config`.
    leave: What is called at a second Ctrl-C; the first one ends the run with
      a checkpoint.

  Returns:
    {measure: value} on dev at the end; None with `--dry_run`.

  Raises:
    BadInput: The settings or the data cannot be used, or the run cannot fit.
    FloatingPointError: A loss was not finite.
    logs.Stopped: SIGTERM or Ctrl-C came; the newest checkpoint is whole.
  """
  processes.start(config)
  check(config)
  devices, _ = runs.training_devices(config)
  compiled.keep(config.compilation_cache_dir, devices)
  with logs.stop_signals(leave), contextlib.ExitStack() as stack:
    lock = stack.enter_context(contextlib.closing(locks.take(config.workdir)))
    begun = resume.begin(config)
    footprint.check(begun.run)
    if config.dry_run:
      return None
    parts, state = _open(stack, lock, begun)
    return _loop(parts, state, begun.step)


def _loop(parts, state, step):
  """Trains from `step` to the end; returns {measure: value} on dev there."""
  config = parts.run.config
  # What came into use at this very step does so again.
  in_use = resume.picked_up(parts.run, step - 1)
  make_step = _step_maker(parts)
  while True:
    parts = _levelled_off(parts)
    try:
      in_use = _boundary(parts, state, step, in_use)
    except logs.Stopped:
      # Of several processes each stops where it is, and no save comes together.
      if processes.count() == 1:
        _save(parts, state, step)
      raise
    if step == config.max_steps:
      parts.checkpoints.wait()
      _prune(parts)
      return _finish(parts.run)
    until = _until(parts, step, in_use)
    state, step, stopped = _train(parts, make_step, state, step, until, in_use)
    if stopped:
      _save(parts, state, step)
      raise logs.Stopped(f'training at step {step}')


def check(config):
  """Raises `BadInput` for what can be known before anything is read."""
  runs.require_workdir(config)
  num_devices = len(runs.training_devices(config)[0])
  if config.batch_size % num_devices:
    raise config_lib.BadInput(
      f'--batch_size must divide over the {num_devices} devices; found '
      f'{config.batch_size}; set it to a multiple of {num_devices}.'
    )
  per_device = config.batch_size // num_devices
  if config.micro_batch_size and per_device % config.micro_batch_size:
    raise config_lib.BadInput(
      f'--micro_batch_size must divide the {per_device} queries of a device, '
      f'--batch_size={config.batch_size} over {num_devices}; found '
      f'{config.micro_batch_size}; set it to a divisor of {per_device}.'
    )


def _open(stack, lock, begun):
  """Returns (`_Parts`, state); what has to be closed is so by `stack`."""
  this, config = begun.run, begun.run.config
  compiles = stack.enter_context(compiled.counted())
  runs.write_flags(config)
  checkpoints = stack.enter_context(checkpoint.Checkpoints(config.workdir))
  metrics = logs.Metrics(config.workdir, history=begun.history, step=begun.step)
  stack.enter_context(contextlib.closing(metrics))
  optimizer = optimizers.make(config)
  if begun.params is None:
    shapes = encoders.shapes(this.retriever)
    like = steps.state_shapes(shapes, optimizer, this.devices)
    state = processes.locally(
      checkpoints.restore(begun.step, like), like.step.sharding
    )
  else:
    state = steps.init_state(begun.params, optimizer, this.devices)
    resume.begin_pick_ups(this)
  record = runs.record(this)
  reader = _open_reader(stack, this)
  parts = _Parts(
    this, record, lock, checkpoints, metrics, compiles, optimizer, reader
  )
  return parts, state


def _open_reader(stack, run):
  """Returns the `watch.Reader` of refreshes beside training, or None."""
  config, worker = run.config, None
  if config.refresh_replay or config.refresh not in ('async', 'external'):
    return None
  if not schedule.num_refreshes(config):
    return None
  if config.refresh == 'async':
    others = runs.training_devices(config)[1]
    there = runs.beside(run, others) if others else run
    worker = stack.enter_context(contextlib.closing(watch.Worker(there)))
  return stack.enter_context(contextlib.closing(watch.Reader(run, worker)))


def _step_maker(parts):
  """Returns (method) -> (train_step, make_batch), compiled once each.

  `make_batch` takes (step, negatives) and places the batch on the devices.
  """
  run, config = parts.run, parts.run.config

  @functools.cache
  def make(method):
    data = runs.training_data(run, method)
    train_step = steps.make_train_step(
      config, method, run.retriever, parts.optimizer, run.devices
    )
    number = schedule.num_negatives(config, method)

    def make_batch(step, negatives):
      batch = batches.make_batch(
        data,
        step,
        seed=config.seed,
        batch_size=config.batch_size,
        num_negatives=number,
        negatives=negatives,
        triplets=method.triplets,
        part=(processes.index(), processes.count()),
      )
      return devices_lib.shard(batch, run.devices)

    return train_step, make_batch

  return make


def _train(parts, make_step, state, step, until, in_use):
  """Trains to `until`, to a newer refresh, or to a stop signal.

  Returns:
    The state, its step, and whether a stop signal came.
  """
  config = parts.run.config
  method = schedule.method(config, in_use is not None)
  train_step, make_batch = make_step(method)
  negatives = refresh.negatives_for(parts.run, method, in_use)
  prepared = batches.ahead(
    lambda n: make_batch(n, negatives), range(step, until)
  )
  bar = logs.progress(
    prepared,
    'train',
    total=config.max_steps,
    done=step,
    unit='steps',
    stops=False,
  )
  start, waiting = time.perf_counter(), None
  stopped = newer = False
  for batch in bar:
    state, metrics = train_step(state, batch)
    step += 1
    parts.checkpoints.check()
    parts.lock.check()
    stopped, newer = _news(parts, step, in_use)
    # The device works on this step while the host reads the last one's.
    if waiting:
      _log_step(parts, *waiting, in_use)
    waiting = step, metrics
    if stopped or newer:
      break
  _log_step(parts, *waiting, in_use)
  secs = time.perf_counter() - start
  parts.metrics.write(step, {'time/train_secs': secs})
  return state, step, stopped


def _log_step(parts, step, metrics, in_use):
  """Reads a step's metrics, and logs them where due."""
  config = parts.run.config
  values = jax.device_get(metrics)
  values = {f'train/{name}': float(value) for name, value in values.items()}
  # A gradient that is not finite has spoiled the parameters already.
  if not math.isfinite(values['train/loss'] + values['train/grad_norm']):
    raise FloatingPointError(
      f'a loss must be finite, and its gradient; found {values["train/loss"]} '
      f'and {values["train/grad_norm"]} at step {step}; '
      'the last checkpoint is whole: lower --learning_rate, or check the data.'
    )
  if step % config.steps_per_log == 0:
    rate = optimizers.learning_rate_schedule(config)(step - 1)
    values['train/learning_rate'] = float(rate)
    if in_use:
      values['train/negatives_age'] = step - in_use.refresh
    parts.metrics.write(step, values)


def _boundary(parts, state, step, in_use):
  """Does what is due after `step` steps.

  Returns:
    The `resume.PickUp` of the negatives in use from here on, or None.
  """
  run, config = parts.run, parts.run.config
  parts.lock.check()
  if schedule.save_due(config, step):
    _save(parts, state, step)
  in_step = parts.reader is None and not config.refresh_replay
  if in_step and schedule.refresh_due(config, step):
    parts.checkpoints.wait()
    before = in_use.refresh if in_use else None
    made = refresh.refresh(run, step, before=before)
    if not made['mined']:
      _report(parts, made, None)
      return in_use
    at_once = schedule.comes_into_use(config, step) == step
    _report(parts, made, step - before if at_once and in_use else None)
  elif schedule.eval_due(config, step):
    made = _evaluate(run, state.params, in_use)
    logs.say(
      f'evaluation at step {step}: {refresh.dev_summary(made["metrics"])}'
    )
    _report_metrics(parts, step, made)
  newer = _comes_into_use(parts, step, in_use)
  return in_use if newer is None else _pick_up(parts, step, newer, in_use)


def _until(parts, step, in_use):
  """Returns the first step after `step` at which there may be a pick-up."""
  config = parts.run.config
  ends = [schedule.next_boundary(config, step)]
  ends += [one.step for one in resume.planned(parts.run) if one.step > step]
  if config.max_staleness and parts.reader:
    oldest = in_use.refresh if in_use else config.warmup_steps
    ends.append(max(oldest + config.max_staleness, step + 1))
  return min(ends)


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
  newer = processes.told(lambda: parts.reader.newest(in_use, step))
  of = newer if newer is not None else in_use.refresh if in_use else None
  if of is None and not config.warmup_steps:
    parts.checkpoints.wait()
    return parts.reader.wait(in_use, step, 0)
  age = step - (config.warmup_steps if of is None else of)
  if 0 < config.max_staleness <= age:
    parts.checkpoints.wait()
    return parts.reader.wait(in_use, step, step - config.max_staleness + 1)
  return newer


def _news(parts, step, in_use):
  """Returns whether to stop, and whether a refresh came in beside training.

  Several processes must do so after the same step: they ask each other now and
  then, as that waits for the devices.
  """
  several = processes.count() > 1
  if several and step % parts.run.config.steps_per_log:
    return False, False
  newer = False
  if parts.reader and processes.is_first():
    newer = parts.reader.newest(in_use, step) is not None and not any(
      one.step > step for one in resume.planned(parts.run)
    )
  here = np.array([logs.stop_requested(), newer])
  return processes.gather(here).any(0).tolist()


def _pick_up(parts, step, newer, in_use):
  """Returns the `resume.PickUp` of a refresh, which is on disk then."""
  run, other = parts.run, parts.run.config.refresh_replay
  if other or parts.reader:
    if other:
      made = refresh.adopt(run, other, newer)
    else:
      made = handoff.read_manifest(refresh.folder(run, newer))
    _report(parts, made, step - in_use.refresh if in_use else None)
  if in_use:
    age = {'refresh/negatives_age': step - in_use.refresh}
    parts.metrics.write(step, age)
  picked_up = resume.PickUp(step, newer)
  resume.pick_up(run, picked_up)
  return picked_up


def _report(parts, made, age):
  """Prints a refresh, and logs what it found.

  Args:
    parts: `_Parts`.
    made: Its manifest.
    age: Steps that the negatives were old that end here; None: none end.
  """
  logs.say(refresh.summary(made, age))
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
  if not processes.is_first():
    return
  examples = run.workdir / runs.EXAMPLES_FOLDER
  handoff.make_folder(examples)
  shown = examples / f'{step:08d}.json'
  handoff.write_json(shown, {'examples': made['examples']})
  report.write_page(run.workdir, run.workdir / report.PAGE_FILE)
  for path in (shown, run.workdir / report.PAGE_FILE):
    remote.push(path)
  if parts.reader is None:
    evaluate.prune_embeddings(run, made['weights_hash'])


def _levelled_off(parts):
  """Returns the parts with the end of the warm-up that dev says by now."""
  run, config = parts.run, parts.run.config
  if not config.warmup_until_plateau:
    return parts

  def end():
    name = next(iter(logs.dev_measures(run.workdir)), '')
    scores = logs.series(run.workdir, name)
    return schedule.levelled_off(config, scores).warmup_steps

  config = dataclasses.replace(config, warmup_steps=processes.told(end))
  if config != run.config:
    logs.say(
      f'dev has levelled off: the warm-up ends at step {config.warmup_steps}'
    )
  return parts._replace(run=run._replace(config=config))


def _train_flops(run, step):
  """Returns the operations of all steps up to `step`."""
  pick_ups = resume.planned(run)
  mined = min([one.step for one in pick_ups] + [step])
  return sum(
    number
    * steps.flops(
      run.config, schedule.method(run.config, is_mined), run.retriever
    )
    for number, is_mined in ((mined, False), (step - mined, True))
  )


def _evaluate(run, params, in_use):
  """Returns what a refresh's manifest says of these weights, without mining."""
  watch = logs.Stopwatch()
  indexed = evaluate.index_corpus(run, params, watch)
  seen = diagnostics.probe(run, params, indexed, watch)
  step = in_use.refresh if in_use else None
  return refresh.assess(run, params, indexed, seen, step, watch)[0]


def _save(parts, state, step):
  """Begins to save a checkpoint, and deletes those that are not kept.

  The losses up to here were read, and are finite.
  """
  parts.lock.check()
  parts.checkpoints.wait()
  _prune(parts)
  run, workdir = parts.run, parts.run.workdir
  committed = processes.told(lambda: checkpoint.committed_steps(workdir))
  if step not in committed:
    record = {
      **parts.record,
      logs.METRICS_FILE: parts.metrics.history(),
      resume.PICK_UPS_FILE: (workdir / resume.PICK_UPS_FILE).read_bytes(),
    }
    about = {'run': run.id, 'made_with': devices_lib.describe(run.devices)}
    everywhere = devices_lib.globally_replicated(run.devices)
    state = processes.globally(state, everywhere)
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
  if committed and processes.is_first():
    newest = committed[-config.checkpoints_to_keep :]
    best = checkpoint.best(config.workdir, committed)
    # A damaged refresh is made again: of what is in use, and what will be.
    in_use = resume.picked_up(parts.run, committed[-1])
    since = in_use.refresh if in_use else 0
    mined = [n for n in refresh.published(parts.run) if n >= since]
    reads = watch.claimed(config.workdir)
    parts.checkpoints.keep([*newest, best, *mined, reads])


def _finish(run):
  """Shows what came of it; returns {measure: value} on dev at the end."""
  workdir, config = run.workdir, run.config
  if processes.is_first():
    report.draw([workdir], workdir / 'curves.png')
    logs.say(report.table(workdir))
    shown = report.examples(workdir)
    logs.say(report.compare_examples(shown[0], shown[-1]))
    logs.say(f'curves: {workdir / "curves.png"}')
    logs.say(f'page: {workdir / report.PAGE_FILE}')
    for name in (logs.METRICS_FILE, report.PAGE_FILE, 'curves.png'):
      remote.push(workdir / name)
  processes.wait('finished')
  return {
    name.removeprefix('dev/'): logs.series(workdir, name)[config.max_steps]
    for name in logs.dev_measures(workdir)
  }
