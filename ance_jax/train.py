"""The loop: train on the negatives in use, and at boundaries mine new ones.

    ┌─────────────► pmapped steps on the negatives in use ──────────────┐
    │                                                                   ▼
pick-up ◄── publish ◄── mine ◄── search ◄── index ◄── encode ◄── checkpoint
                             (refresh.py)
"""

import contextlib
import functools
import json
import math
import time
from typing import NamedTuple

import optax

from ance_jax import batches
from ance_jax import checkpoint
from ance_jax import config as config_lib
from ance_jax import devices as devices_lib
from ance_jax import encoders
from ance_jax import evaluate
from ance_jax import handoff
from ance_jax import logs
from ance_jax import metrics as metrics_lib
from ance_jax import refresh
from ance_jax import report
from ance_jax import runs
from ance_jax import schedule
from ance_jax import steps

_PICK_UPS = 'pickups.jsonl'


class _Parts(NamedTuple):
  """What the loop works with; none of it is replaced on the way."""

  run: runs.Run
  data: batches.TrainingData
  checkpoints: checkpoint.Checkpoints
  metrics: logs.Metrics
  optimizer: optax.GradientTransformation


def run(config):
  """Trains a retriever, or goes on from the newest checkpoint of its folder.

  Args:
    config: `Config`.

  Returns:
    {measure: value} on dev at the end.

  Raises:
    BadInput: The settings or the data cannot be used.
    FloatingPointError: A loss was not finite.
    logs.Stopped: SIGTERM or Ctrl-C came; the newest checkpoint is whole.
  """
  check(config)
  with logs.stop_signals(), contextlib.ExitStack() as stack:
    this, params, step = _begin(config)
    checkpoints = stack.enter_context(
      contextlib.closing(checkpoint.Checkpoints(config.workdir))
    )
    metrics = stack.enter_context(
      contextlib.closing(logs.Metrics(config.workdir, step=step))
    )
    optimizer = steps.make_optimizer(config)
    if params is None:
      shapes = encoders.shapes(this.retriever)
      like = steps.state_shapes(shapes, optimizer, this.devices)
      state = checkpoints.restore(step, like)
    else:
      state = steps.init_state(params, optimizer, this.devices)
    data = batches.training_data(
      this.splits[config.train_split],
      this.corpus,
      this.queries[config.train_split],
      this.passages,
      this.retriever,
    )
    parts = _Parts(this, data, checkpoints, metrics, optimizer)
    in_use = _picked_up(this, step)
    make_step = _step_maker(parts)
    while True:
      try:
        in_use = _boundary(parts, state, step, in_use)
      except logs.Stopped:
        _save(parts, state, step)
        raise
      if step == config.max_steps:
        checkpoints.wait()
        _prune(parts)
        return _finish(this)
      until = schedule.next_boundary(config, step)
      state, step = _train(parts, make_step, state, step, until, in_use)
      if logs.stop_requested():
        _save(parts, state, step)
        raise logs.Stopped(f'training at step {step}')


def check(config):
  """Raises `BadInput` for what can be known before anything is read."""
  runs.require_workdir(config)
  num_devices = len(devices_lib.local(config.num_devices))
  if config.batch_size % num_devices:
    raise config_lib.BadInput(
      f'--batch_size must divide over the {num_devices} devices; found '
      f'{config.batch_size}; set it to a multiple of {num_devices}.'
    )
  runs.check_same_run(config)


def _begin(config):
  """Returns (Run, parameters, step); no parameters where a run goes on."""
  splits = (config.train_split, config.dev_split)
  handoff.remove_unfinished(config.workdir)
  step, saved = checkpoint.newest_whole(config.workdir)
  if saved is None:
    this, params = runs.begin(config, splits)
    refresh.check(this)
    runs.write(this)
    logs.say(f'training {config.workdir} from step 0')
    return this, params, 0
  if step > config.max_steps:
    raise config_lib.BadInput(
      f'--max_steps must be at least the {step} steps made; found '
      f'{config.max_steps}; raise it, or evaluate a checkpoint.'
    )
  this = runs.go_on(config, splits)
  runs.write_flags(config)
  logs.say(
    f'training {config.workdir} goes on from the checkpoint of step {step}'
  )
  return this, None, step


def _step_maker(parts):
  """Returns (method) -> (train_step, make_batch), compiled once each.

  `make_batch` takes (step, negatives) and places the batch on the devices.
  """
  config = parts.run.config

  @functools.cache
  def make(method):
    train_step = steps.make_train_step(
      config, method, parts.run.retriever, parts.optimizer, parts.run.devices
    )
    own = method.negatives != 'none'

    def make_batch(step, negatives):
      batch = batches.make_batch(
        parts.data,
        step,
        seed=config.seed,
        batch_size=config.batch_size,
        num_negatives=config.hard_negatives if own else 0,
        negatives=negatives,
      )
      return devices_lib.shard(batch, parts.run.devices)

    return train_step, make_batch

  return make


def _negatives(run, method, in_use):
  """Returns the (Q, K) int32 negatives of a row, or None for no table."""
  if method.negatives == 'index':
    return refresh.load(run, in_use)
  return refresh.bm25_negatives(run) if method.negatives == 'bm25' else None


def _train(parts, make_step, state, step, until, in_use):
  """Returns (state, step) after training to `until`, or to a stop signal."""
  config = parts.run.config
  method = schedule.method_at(config, step)
  train_step, make_batch = make_step(method)
  negatives = _negatives(parts.run, method, in_use)
  prepared = batches.ahead(
    lambda n: make_batch(n, negatives), range(step, until)
  )
  bar = logs.progress(
    prepared, 'train', total=config.max_steps, done=step, unit='steps'
  )
  start, waiting = time.perf_counter(), None
  try:
    for batch in bar:
      state, metrics = train_step(state, batch)
      step += 1
      parts.checkpoints.check()
      # The device works on this step while the host reads the last one's.
      if waiting:
        _log_step(parts, *waiting, in_use)
      waiting = step, metrics
  except logs.Stopped:
    pass  # The caller saves what was made up to here.
  if waiting:
    _log_step(parts, *waiting, in_use)
  secs = time.perf_counter() - start
  parts.metrics.write(step, {'time/train_secs': secs})
  return state, step


def _log_step(parts, step, metrics, in_use):
  """Reads a step's metrics, and logs them where due."""
  config = parts.run.config
  values = {f'train/{name}': float(value) for name, value in metrics.items()}
  # A gradient that is not finite has spoiled the parameters already.
  if not math.isfinite(values['train/loss'] + values['train/grad_norm']):
    raise FloatingPointError(
      f'a loss must be finite, and its gradient; found {values["train/loss"]} '
      f'and {values["train/grad_norm"]} at step {step}; '
      'the last checkpoint is whole: lower --learning_rate, or check the data.'
    )
  if step % config.steps_per_log == 0:
    rate = steps.learning_rate_schedule(config)(step - 1)
    values['train/learning_rate'] = float(rate)
    if schedule.method_at(config, step - 1).refreshes:
      values['train/negatives_age'] = step - in_use
    parts.metrics.write(step, values)


def _boundary(parts, state, step, in_use):
  """Does what is due after `step` steps.

  Returns:
    The step of the refresh whose negatives are in use from here on, or None.
  """
  run, config = parts.run, parts.run.config
  if schedule.save_due(config, step):
    _save(parts, state, step)
  if schedule.refresh_due(config, step):
    parts.checkpoints.wait()
    # A restart may come back to a boundary whose refresh was picked up.
    before = _picked_up(run, step - 1)
    made = refresh.refresh(run, step, before=before)
    age = None if before is None else step - before
    logs.say(refresh.summary(made, age))
    if age is not None:
      made['metrics']['refresh/negatives_age'] = age
    _pick_up(run, step)
    in_use = step
  elif schedule.eval_due(config, step):
    made = _evaluate(run, state.params)
    logs.say(
      f'evaluation at step {step}: {refresh.dev_summary(made["metrics"])}'
    )
  else:
    return in_use
  secs = {f'time/{name}_secs': value for name, value in made['secs'].items()}
  parts.metrics.write(step, {**made['metrics'], **secs})
  examples = run.workdir / 'examples'
  examples.mkdir(exist_ok=True)
  handoff.write_text(
    examples / f'{step:08d}.json', json.dumps(made['examples'], indent=1)
  )
  evaluate.prune_embeddings(run, made['weights_hash'])
  return in_use


def _evaluate(run, params):
  """Returns what a refresh's manifest says of dev, without mining."""
  watch, split = logs.Stopwatch(), run.config.dev_split
  indexed = evaluate.index_corpus(run, params, watch)
  scores, ranking = evaluate.evaluate(run, params, indexed, split, watch)
  return {
    'metrics': {f'dev/{name}': value for name, value in scores.items()},
    'secs': watch.secs,
    'examples': evaluate.examples(run, ranking, split),
    'weights_hash': indexed.weights_hash,
  }


def _save(parts, state, step):
  """Begins to save a checkpoint, and deletes those that are not kept.

  The losses up to here were read, and are finite.
  """
  parts.checkpoints.wait()
  _prune(parts)
  if step not in checkpoint.committed_steps(parts.run.config.workdir):
    parts.checkpoints.save(state, step)


def _prune(parts):
  """Deletes the committed checkpoints that are not kept.

  What is being saved does not count: it may never be committed.
  """
  config = parts.run.config
  committed = checkpoint.committed_steps(config.workdir)
  if committed:
    newest = committed[-config.checkpoints_to_keep :]
    in_use = _picked_up(parts.run, committed[-1])
    best = checkpoint.best(config.workdir, committed)
    parts.checkpoints.keep([*newest, best, in_use])


def _pick_up(run, step):
  """Records on disk, before the first batch, which refresh is in use."""
  if _picked_up(run, step) != step:
    history = [*_pick_ups(run), {'step': step, 'refresh': step}]
    text = ''.join(json.dumps(entry) + '\n' for entry in history)
    handoff.write_text(run.workdir / _PICK_UPS, text)


def _picked_up(run, step):
  """Returns the step of the refresh in use after `step` steps, or None."""
  past = [e['refresh'] for e in _pick_ups(run) if e['step'] <= step]
  return past[-1] if past else None


def _pick_ups(run):
  """Returns all pick-ups of the run: dicts of 'step' and 'refresh'."""
  path = run.workdir / _PICK_UPS
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def _finish(run):
  """Shows what came of it; returns {measure: value} on dev at the end."""
  workdir, config = run.config.workdir, run.config
  report.draw([workdir], run.workdir / 'curves.png')
  logs.say(report.table(workdir))
  shown = sorted((run.workdir / 'examples').glob('*.json'))
  first, last = (
    (int(path.stem), json.loads(path.read_text()))
    for path in (shown[0], shown[-1])
  )
  logs.say(report.compare_examples(first, last))
  logs.say(f'curves: {run.workdir / "curves.png"}')
  return {
    name: logs.series(workdir, f'dev/{name}')[config.max_steps]
    for name in metrics_lib.MEASURES
  }
