"""The loop: train on the negatives in use, and at boundaries mine new ones.

    ┌─────────────► pmapped steps on the negatives in use ──────────────┐
    │                                                                   ▼
pick-up ◄── publish ◄── mine ◄── search ◄── index ◄── encode ◄── checkpoint
                             (refreshes.py)

Refreshes run synchronously or in the background (background.py); the loop is
identical.
"""

import contextlib
import functools
import math
import time

import jax

from ance_jax import errors
from ance_jax.core import checkpoint
from ance_jax.core import compiled
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import locks
from ance_jax.core import logs
from ance_jax.core import pace
from ance_jax.core import workdirs
from ance_jax.models import bi_encoder
from ance_jax.training import background
from ance_jax.training import batches
from ance_jax.training import boundary
from ance_jax.training import checks
from ance_jax.training import experiment
from ance_jax.training import optimizers
from ance_jax.training import refreshes
from ance_jax.training import resume
from ance_jax.training import schedule
from ance_jax.training import steps


def run(config, *, leave, check_room, show):
  """Trains a run; `jobs.train.run` says what it returns and raises.

  Args:
    config: `Config`.
    leave: What is called at a second Ctrl-C.
    check_room: check_room(experiment) raises `BadInput` if it cannot fit.
    show: `boundary.Show` of the run.
  """
  distributed.start(config)
  logs.use_bars(config.progress_bars)
  check(config)
  devices, _ = devices_lib.training_devices(config)
  compiled.keep(config.compilation_cache_dir, devices)
  with logs.stop_signals(leave), contextlib.ExitStack() as stack:
    lock = stack.enter_context(contextlib.closing(locks.take(config.workdir)))
    begun = resume.begin(config)
    checks.of_run(begun.run)
    check_room(begun.run)
    if config.dry_run:
      return None
    parts, state = _open(stack, lock, begun, show)
    return _loop(parts, state, begun.step)


def _loop(parts, state, step):
  """Trains from `step` to the end; returns {measure: value} on dev there."""
  config = parts.run.config
  # What came into use at this very step does so again.
  in_use = resume.picked_up(parts.run, step - 1)
  make_step = _step_maker(parts)
  while True:
    parts = boundary.levelled_off(parts)
    try:
      in_use = boundary.cross(parts, state, step, in_use)
    except errors.Stopped:
      # Of several processes each stops where it is, and no save comes together.
      if distributed.count() == 1:
        boundary.save(parts, state, step)
      raise
    if step == config.max_steps:
      return boundary.finish(parts)
    until = boundary.until(parts, step, in_use)
    state, step, stopped = _train(parts, make_step, state, step, until, in_use)
    if stopped:
      boundary.save(parts, state, step)
      raise errors.Stopped(f'training at step {step}')


def check(config):
  """Raises `BadInput` for what can be known before anything is read."""
  workdirs.require(config)
  num_devices = len(devices_lib.training_devices(config)[0])
  if config.batch_size % num_devices:
    raise errors.BadInput(
      f'--batch_size must divide over the {num_devices} devices; found '
      f'{config.batch_size}; set it to a multiple of {num_devices}.'
    )
  per_device = config.batch_size // num_devices
  if config.micro_batch_size and per_device % config.micro_batch_size:
    raise errors.BadInput(
      f'--micro_batch_size must divide the {per_device} queries of a device, '
      f'--batch_size={config.batch_size} over {num_devices}; found '
      f'{config.micro_batch_size}; set it to a divisor of {per_device}.'
    )
  checks.of_flags(config)


def _open(stack, lock, begun, show):
  """Returns (`boundary.Parts`, state); what must be closed is so by `stack`."""
  this, config = begun.run, begun.run.config
  compiles = stack.enter_context(compiled.counted())
  experiment.write_flags(config)
  checkpoints = stack.enter_context(checkpoint.Checkpoints(config.workdir))
  metrics = logs.Metrics(config.workdir, history=begun.history, step=begun.step)
  stack.enter_context(contextlib.closing(metrics))
  optimizer = optimizers.make(config)
  trained = steps.trees_of_run(config, this.retriever.config.towers)
  if begun.params is None:
    shapes = bi_encoder.shapes(this.retriever.config)
    like = steps.state_shapes(shapes, trained, optimizer, this.devices)
    state = distributed.locally(
      checkpoints.restore(begun.step, like), like.step.sharding
    )
  else:
    state = steps.init_state(begun.params, trained, optimizer, this.devices)
    resume.begin_pick_ups(this)
  record = experiment.record(this)
  reader = _open_reader(stack, this)
  steps_pace = pace.Pace(config.max_steps)
  parts = boundary.Parts(
    this,
    record,
    lock,
    checkpoints,
    metrics,
    steps_pace,
    checks.Signs(),
    compiles,
    optimizer,
    reader,
    show,
  )
  return parts, state


def _open_reader(stack, run):
  """Returns the `background.Reader` of refreshes beside training, or None."""
  config, worker = run.config, None
  if config.refresh_replay or config.refresh not in ('async', 'external'):
    return None
  if not schedule.num_refreshes(config):
    return None
  if config.refresh == 'async':
    others = devices_lib.training_devices(config)[1]
    there = run.on_devices(others) if others else run
    worker = stack.enter_context(contextlib.closing(background.Worker(there)))
  return stack.enter_context(contextlib.closing(background.Reader(run, worker)))


def _step_maker(parts):
  """Returns (method) -> (train_step, make_batch), compiled once each.

  `make_batch` takes (step, negatives) and places the batch on the devices.
  """
  run, config = parts.run, parts.run.config

  @functools.cache
  def make(method):
    data = experiment.training_data(run, method)
    train_step = steps.make_train_step(
      config, method, run.retriever.config, parts.optimizer, run.devices
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
        part=(distributed.index(), distributed.count()),
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
  negatives = refreshes.negatives_for(parts.run, method, in_use)
  prepared = logs.ahead(lambda n: make_batch(n, negatives), range(step, until))
  bar = logs.progress(
    prepared,
    'train',
    total=config.max_steps,
    done=step,
    unit='steps',
    stops=False,
    lines=False,
  )
  parts.pace.begin()
  start, waiting = time.perf_counter(), None
  stopped = newer = False
  for batch in bar:
    # The first one may have to be compiled for, which can take minutes.
    first = contextlib.nullcontext() if waiting else logs.working('first step')
    with first:
      state, metrics = train_step(state, batch)
    step += 1
    parts.checkpoints.check()
    parts.lock.check()
    stopped, newer = boundary.news(parts, step, in_use)
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
  parts.pace.seen(step)
  sign = parts.signs.seen(
    values['train/loss'],
    values['train/accuracy'],
    in_use.refresh if in_use else None,
  )
  if sign:
    logs.say(f'step {step}: {sign}')
  if step % config.steps_per_log == 0:
    rate = optimizers.learning_rate_schedule(config)(step - 1)
    values['train/learning_rate'] = float(rate)
    if in_use:
      values['train/negatives_age'] = step - in_use.refresh
    parts.metrics.write(step, values)
    if not logs.has_bars():
      logs.say(_line(config, step, values, parts.pace.text(step)))


def _line(config, step, values, rate):
  """Returns what is printed of a step."""
  shown = [
    f'step {step:,} of {config.max_steps:,}',
    f'loss {values["train/loss"]:.4g}',
    f'accuracy {values["train/accuracy"]:.1%}',
    f'learning rate {values["train/learning_rate"]:.3g}',
  ]
  return ' | '.join([*shown, rate] if rate else shown)
