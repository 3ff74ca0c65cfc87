"""The loop trains on the active negatives and mines new ones when due.

    ┌─────────────► pmapped steps on the active negatives ──────────────┐
    │                                                                   ▼
pick-up ◄── publish ◄── mine ◄── search ◄── index ◄── encode ◄── checkpoint
                             (refreshes.py)

Refreshes run synchronously or in the background (background.py); the loop is
identical.
"""

import collections
from collections.abc import Callable
from collections.abc import Iterable
import contextlib
import dataclasses
import functools
import json
import time

import numpy as np
import optax

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import checkpoint
from ance_jax.core import compiled
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import locks
from ance_jax.core import logs
from ance_jax.models import bi_encoder
from ance_jax.training import background
from ance_jax.training import batches
from ance_jax.training import checks
from ance_jax.training import diagnostics
from ance_jax.training import experiment
from ance_jax.training import guides
from ance_jax.training import methods
from ance_jax.training import optimizers
from ance_jax.training import packing
from ance_jax.training import refreshes
from ance_jax.training import resume
from ance_jax.training import run_log
from ance_jax.training import schedule
from ance_jax.training import searched
from ance_jax.training import steps
from ance_jax.training import topics as topics_lib


def run(
  config: config_lib.Config,
  *,
  leave: Callable,
  check_room: Callable,
  show: run_log.Show,
) -> dict[str, float] | None:
  """Trains a run; `jobs.train.run` documents results and errors.

  Args:
    config: Settings of the run.
    leave: Called at a second Ctrl-C.
    check_room: check_room(experiment) raises `BadInput` if the run does not fit
      on disk or in memory.
    show: Shows the run.
  """
  distributed.start(config)
  logs.use_bars(config.progress_bars)
  checks.before_reading(config)
  devices, _ = devices_lib.training_devices(config)
  compiled.enable_cache(config.compilation_cache_dir, devices)
  with logs.stop_signals(leave), contextlib.ExitStack() as stack:
    # A restart restores the following in order; a new run creates it.
    # 1. The lock of the folder, so that only this process trains in it.
    lock = stack.enter_context(contextlib.closing(locks.take(config.workdir)))
    # 2. From the newest whole checkpoint: settings, data, tokenizer and model,
    #    each compared with the current flags and files; lines of metrics.jsonl
    #    up to the checkpoint's step; pickups.json if it is damaged.
    begun = resume.begin(config)
    checks.of_run(begun.run)
    check_room(begun.run)
    if config.dry_run:
      return None
    compiles = stack.enter_context(compiled.count_compilations())
    experiment.write_flags(begun.run.config)
    # 3. The folder of checkpoints, without unfinished saves of a killed
    #    process, and metrics.jsonl, truncated after that step.
    checkpoints = stack.enter_context(checkpoint.Checkpoints(config.workdir))
    metrics = logs.Metrics(
      config.workdir, history=begun.history, step=begun.step
    )
    stack.enter_context(contextlib.closing(metrics))
    # 4. Parameters and optimizer state, on the devices.
    optimizer = optimizers.make(begun.run.config)
    state = _restore_state(begun, checkpoints, optimizer)
    # 5. The background refresher, if any.
    poller = background.open_poller(stack, begun.run)
    # 6. The refresh active one step earlier, because a refresh that became
    #    active after this step is picked up again.
    active_refresh = resume.active_at(begun.run, begun.step - 1)
    trainer = Trainer(
      begun.run,
      state,
      begun.step,
      active_refresh,
      optimizer=optimizer,
      lock=lock,
      checkpoints=checkpoints,
      poller=poller,
      log=run_log.RunLog(begun.run, metrics, compiles, show, begun.work),
      record=experiment.record(begun.run),
    )
    stack.callback(trainer.close)
    trainer.load_guide()
    return trainer.train()


class Trainer:
  """Trains a run.

  Attributes:
    run: The run; its `warmup_steps` is the end of the warm-up known so far.
    state: Training state, on the devices.
    step: Optimizer steps made.
    active_refresh: Refresh whose negatives are trained on; None before the
      first.
  """

  def __init__(
    self,
    run: experiment.Experiment,
    state: steps.State,
    step: int,
    active_refresh: schedule.ActiveRefresh | None,
    *,
    optimizer: optax.GradientTransformation,
    lock: locks.Lock,
    checkpoints: checkpoint.Checkpoints,
    poller: background.RefreshPoller | None,
    log: run_log.RunLog,
    record: dict[str, bytes],
  ):
    self.run, self.state, self.step = run, state, step
    self.active_refresh = active_refresh
    self._optimizer, self._lock = optimizer, lock
    self._checkpoints, self._poller, self._log = checkpoints, poller, log
    # Files that each checkpoint holds, with the settings as given.
    self._record = record
    self._make_step = functools.cache(self._new_step)
    self._topics = functools.cache(self._make_topics)
    self._fixed_guide = functools.cache(lambda: guides.make(self.run))
    # The refresh whose weights are the guide, and what holds its embeddings.
    self._own_guide, self._guide_of = None, None
    self._holds_guide = contextlib.ExitStack()
    # Steps whose metrics are still on the devices.
    self._unlogged = collections.deque()
    # For rows that search in the step.
    self._passages = None
    # Shapes of the steps before the first refresh, as of `packing.to_json`.
    self._first_shapes = None
    self._began = None

  def train(self) -> dict[str, float]:
    """Trains from `step` to the end.

    Returns:
      Final dev scores by measure.

    Raises:
      errors.Stopped: The process received SIGTERM or Ctrl-C; the newest
        checkpoint is whole.
    """
    while True:
      self.end_warmup_on_plateau()
      try:
        self.save_if_due()
        made = self.refresh_if_due()
        if made is None:
          self.evaluate_if_due()
        if made is None or made['mined']:
          self.pick_up_if_due()
      except errors.Stopped:
        # Several processes stop at different places, so they cannot save.
        if distributed.count() == 1:
          self.save()
        raise
      if self.step == self.run.config.max_steps:
        return self.finish()
      for batch in self.begin_stretch():
        self.take_step(batch)
        stop, newer = self.poll()
        # The devices run this step while the host reads the previous one.
        self.log_steps(keep=1)
        if stop or newer:
          break
      self.end_stretch()
      if stop:
        self.save()
        raise errors.Stopped(f'training at step {self.step}')

  def load_guide(self) -> None:
    """Encodes with a fixed guide, to fail before the first refresh or never."""
    if self.run.config.guide not in ('', methods.OWN_GUIDE):
      self._fixed_guide()

  def close(self) -> None:
    """Lets others remove the embeddings of the guide."""
    self._holds_guide.close()

  def _guide(self):
    """Returns the `batches.Guide` of the steps to come, or None."""
    guide, active = self.run.config.guide, self.active_refresh
    if guide != methods.OWN_GUIDE:
      return self._fixed_guide() if guide else None
    if active and active.refresh != self._guide_of:
      self._holds_guide.close()
      self._own_guide = self._holds_guide.enter_context(
        guides.of_refresh(self.run, active.refresh)
      )
      self._guide_of = active.refresh
    return self._own_guide

  def end_warmup_on_plateau(self) -> None:
    """Ends the warm-up early if the scores on dev have reached a plateau.

    This changes `warmup_steps` of `self.run` only; the settings in checkpoints
    stay as given.
    """
    config, workdir = self.run.config, self.run.workdir
    if not config.warmup_until_plateau:
      return

    def end():
      name = next(iter(logs.dev_measures(workdir)), '')
      return schedule.end_of_warmup(config, logs.series(workdir, name))

    last = distributed.broadcast(end)
    if last != config.warmup_steps:
      logs.log(f'dev has levelled off: the warm-up ends at step {last}')
      config = dataclasses.replace(config, warmup_steps=last)
      self.run = self.run._replace(config=config)

  def save_if_due(self) -> None:
    """Starts to save a checkpoint if one is due after this step."""
    self._lock.check()
    if schedule.save_due(self.run.config, self.step):
      self.save()

  def save(self) -> None:
    """Starts to save a checkpoint, and deletes old checkpoints.

    All losses so far have been read and are finite.
    """
    self._lock.check()
    self._checkpoints.wait()
    self._prune()
    run = self.run
    committed = distributed.broadcast(
      lambda: checkpoint.committed_steps(run.workdir)
    )
    if self.step not in committed:
      record = {
        **self._record,
        logs.METRICS_FILE: self._log.metrics.history(),
        resume.PICK_UPS_FILE: (run.workdir / resume.PICK_UPS_FILE).read_bytes(),
        resume.WORK_FILE: json.dumps(self._log.work).encode(),
      }
      about = {'run': run.id, 'made_with': devices_lib.describe(run.devices)}
      everywhere = devices_lib.globally_replicated(run.devices)
      state = distributed.to_global(self.state, everywhere)
      self._checkpoints.save(state, self.step, record, about)
    if not committed:
      # The first checkpoint must be committed before anything is logged.
      self._checkpoints.wait()

  def _prune(self):
    """Deletes old checkpoints.

    A save in progress does not count as newest, as it may never be committed.
    """
    config = self.run.config
    committed = checkpoint.committed_steps(config.workdir)
    if not committed or not distributed.is_first():
      return
    newest = committed[-config.checkpoints_to_keep :]
    best = checkpoint.best(config.workdir, committed)
    # Keeps the checkpoints of the active and later refreshes, in case a refresh
    # is damaged and must be made again. A guide needs that of the refresh that
    # is active at whichever checkpoint training resumes from.
    is_guide = config.guide == methods.OWN_GUIDE
    active = resume.active_at(self.run, newest[0 if is_guide else -1])
    since = active.refresh if active else 0
    reads = background.claimed(config.workdir)
    mined = [n for n in refreshes.published(self.run) if n >= since]
    wanted = [*newest, best, *mined, reads]
    if (first := schedule.first_weights(config)) is not None:
      wanted.append(first)
    self._checkpoints.keep(wanted)

  def refresh_if_due(self) -> dict | None:
    """Mines new negatives if due after this step in this process.

    Returns:
      The manifest, whose 'mined' is false if the refresh was left out; None if
      no refresh is due.
    """
    config, active = self.run.config, self.active_refresh
    is_ours = self._poller is None and not config.refresh_replay
    if not is_ours or not schedule.refresh_due(config, self.step):
      return None
    self._checkpoints.wait()
    before = active.refresh if active else None
    made = refreshes.refresh(self.run, self.step, before=before)
    at_once = schedule.comes_into_use(config, self.step) == self.step
    ends = active and at_once and made['mined']
    self._log.log_refresh(made, self.step - before if ends else None)
    self._prune_embeddings(made)
    return made

  def evaluate_if_due(self) -> None:
    """Evaluates dev if due; refreshes evaluate it themselves."""
    if not schedule.eval_due(self.run.config, self.step):
      return
    run, watch = self.run.with_params(self.state.params), logs.Stopwatch()
    indexed = run.index_corpus(watch)
    seen = diagnostics.probe(run, indexed, watch)
    active = self.active_refresh
    last = refreshes.read(run, active.refresh) if active else None
    made, _ = refreshes.assess(run, indexed, seen, last, watch)
    self._log.log_evaluation(self.step, made)
    self._prune_embeddings(made)

  def _prune_embeddings(self, made):
    """Deletes embeddings of older weights unless a refresher does."""
    if self._poller is None and distributed.is_first():
      refreshes.prune_embeddings(self.run, made)

  def pick_up_if_due(self) -> None:
    """Activates a new refresh if any, recorded before its first batch."""
    newer = self._newer_refresh()
    if newer is None:
      return
    run, other = self.run, self.run.config.refresh_replay
    active = self.active_refresh
    age = self.step - active.refresh if active else None
    if other or self._poller:
      made = (
        refreshes.adopt(run, other, newer)
        if other
        else refreshes.manifest(run, newer)
      )
      self._log.log_refresh(made, age)
      self._prune_embeddings(made)
    if age is not None:
      self._log.metrics.write(self.step, {'refresh/negatives_age': age})
    self.active_refresh = resume.pick_up(run, self.step, newer)
    if self.step < run.config.max_steps:
      self.begin_again()

  def begin_again(self) -> None:
    """Gives a row that restarts its first weights and a new optimizer.

    The checkpoint of this step has the weights before, so that a killed run
    comes by here again.
    """
    run = self.run
    first = schedule.first_weights(run.config)
    if first is None:
      return
    self._checkpoints.wait()
    params = checkpoint.read_params(
      run.workdir, first, bi_encoder.shapes(run.retriever.config), run.devices
    )
    trained = experiment.trees_of_run(run.config, params)
    state = steps.init_state(params, trained, self._optimizer, run.devices)
    self.state = state._replace(step=self.state.step)
    if self.step > first:
      logs.log(f'step {self.step}: training begins again, from step {first}')

  def _newer_refresh(self):
    """Returns the step of the refresh to pick up after this step, or None."""
    config, step, poller = self.run.config, self.step, self._poller
    replayed = resume.to_replay(self.run)
    if config.refresh_replay or any(one.step >= step for one in replayed):
      here = [one.refresh for one in replayed if one.step == step]
      return here[0] if here else None
    if poller is None:
      return schedule.comes_into_use(config, step)
    if step == config.max_steps:
      return None
    active = self.active_refresh
    newer = distributed.broadcast(lambda: poller.newest(active, step))
    of = newer if newer is not None else active.refresh if active else None
    if of is None and not config.warmup_steps:
      self._checkpoints.wait()
      return poller.wait(active, step, 0)
    age = step - (config.warmup_steps if of is None else of)
    if 0 < config.max_staleness <= age and self._more_come(of):
      self._checkpoints.wait()
      return poller.wait(active, step, step - config.max_staleness + 1)
    return newer

  def _more_come(self, last):
    """Returns whether a refresh is scheduled after that of a step, or None."""
    config, last = self.run.config, -1 if last is None else last
    return bool(schedule.refreshes_between(config, last, config.max_steps))

  def begin_stretch(self) -> Iterable:
    """Returns the batches up to the next step with more than training due."""
    config, active = self.run.config, self.active_refresh
    method = schedule.method(config, active, self.step)
    self._train_step, data, draw, make_batch = self._make_step(method)
    negatives = refreshes.negatives_for(self.run, method, active)
    if method.searches and self._passages is None:
      self._passages = self._place_passages(method)
    topics = None
    if config.topics:
      topics = batches.by_topic(self._topics(), negatives)
    guide = self._guide()
    shapes = self._shapes(
      method, data, lambda step: draw(step, negatives, topics)
    )
    batches_ahead = logs.ahead(
      lambda step: make_batch(step, negatives, topics, guide, shapes),
      range(self.step, self._end_of_stretch()),
    )
    self._log.begin_stretch()
    self._began = time.perf_counter()
    return logs.progress(
      batches_ahead,
      'train',
      total=config.max_steps,
      done=self.step,
      unit='steps',
      stops=False,
      lines=False,
    )

  def _make_topics(self):
    return topics_lib.make(self.run.with_params(self.state.params), self.step)

  def _place_passages(self, method):
    """Returns the `searched.Passages` of a row that searches in the step.

    Their tower is not trained, so that they stay to the end.
    """
    run = self.run.with_params(self.state.params)
    with run.embedded_corpus() as blocks:
      groups = experiment.training_data(run, method).groups
      return searched.place(blocks, groups, run.devices)

  def _end_of_stretch(self):
    """Returns the next step at which more than training may be due."""
    config, active, step = self.run.config, self.active_refresh, self.step
    ends = [schedule.next_boundary(config, step)]
    ends += [n.step for n in resume.to_replay(self.run) if n.step > step]
    of = active.refresh if active else None
    if config.max_staleness and self._poller and self._more_come(of):
      oldest = active.refresh if active else config.warmup_steps
      ends.append(max(oldest + config.max_staleness, step + 1))
    return min(ends)

  def _shapes(self, method, data, draw):
    """Returns the `packing.Shapes` of steps with the active negatives.

    They depend on the lengths of what the coming steps draw, and on the shapes
    of the refresh before, so that they seldom change.

    Args:
      method: Row of the method table.
      data: `batches.TrainingData` of the row.
      draw: draw(step) -> `batches.Drawn` of a step.
    """
    run, config, active = self.run, self.run.config, self.active_refresh
    each = config.batch_size // len(run.devices)
    form = packing.Form(
      data.row_lengths,
      batches.num_texts(
        data, config.batch_size, schedule.num_negatives(config, method)
      ),
      len(run.devices),
      each // (config.micro_batch_size or each),
    )
    known = active.shapes if active else self._first_shapes
    if found := packing.from_json(known, form):
      return found
    first = active.step if active else 0
    sample = [
      batches.assigned(data, draw(step))
      for step in packing.sampled(first, first + config.steps_per_refresh)
    ]
    before = resume.active_at(run, active.step - 1) if active else None
    before = packing.from_json(before.shapes, form) if before else None
    shapes = packing.choose(sample, form, before)
    known = packing.to_json(shapes)
    if active:
      self.active_refresh = active._replace(shapes=known)
      resume.record_shapes(run, self.active_refresh)
    else:
      self._first_shapes = known
    return shapes

  def _new_step(self, method):
    """Returns a row's train_step, its data, and what makes its batches.

    The last two are draw(step, negatives, topics) and make_batch(step,
    negatives, topics, guide, shapes).
    """
    run, config = self.run, self.run.config
    data = experiment.training_data(run, method)
    train_step = steps.make_train_step(
      config, method, run.retriever.config, self._optimizer, run.devices
    )

    def draw(step, negatives, topics):
      return batches.draw_rows(
        data,
        step,
        seed=config.seed,
        batch_size=config.batch_size,
        num_negatives=schedule.num_negatives(config, method),
        negatives=negatives,
        triplets=method.triplets,
        draw=experiment.draw(config, method),
        topics=topics,
      )

    def make_batch(step, negatives, topics, guide, shapes):
      batch = batches.make_batch(
        data,
        draw(step, negatives, topics),
        shapes=shapes,
        guide=guide,
        part=(distributed.index(), distributed.count()),
      )
      return devices_lib.shard(batch, run.devices)

    return train_step, data, draw, make_batch

  def take_step(self, batch: batches.Batch) -> None:
    """Dispatches an optimizer step; its metrics are read later."""
    # The first step may compile for minutes.
    is_first = not self._unlogged
    with logs.working('first step') if is_first else contextlib.nullcontext():
      self.state, metrics = self._train_step(self.state, batch, self._passages)
    self.step += 1
    self._unlogged.append((self.step, metrics))
    self._checkpoints.check()
    self._lock.check()

  def poll(self) -> tuple[bool, bool]:
    """Returns (stop_requested, new_refresh_available).

    Several processes must leave the stretch after the same step. They only
    synchronize every `steps_per_log` steps, because it waits for the devices.
    """
    several = distributed.count() > 1
    if several and self.step % self.run.config.steps_per_log:
      return False, False
    newer = False
    if self._poller and distributed.is_first():
      found = self._poller.newest(self.active_refresh, self.step)
      newer = found is not None and not any(
        one.step > self.step for one in resume.to_replay(self.run)
      )
    here = np.array([logs.stop_requested(), newer])
    return distributed.all_gather(here).any(0).tolist()

  def log_steps(self, *, keep: int = 0) -> None:
    """Reads and logs the metrics of all steps but the last `keep`."""
    while len(self._unlogged) > keep:
      step, metrics = self._unlogged.popleft()
      self._log.log_step(step, metrics, self.active_refresh)

  def end_stretch(self) -> None:
    """Logs the remaining steps of a stretch, and its duration."""
    self.log_steps()
    secs = time.perf_counter() - self._began
    self._log.metrics.write(self.step, {'time/train_secs': secs})

  def finish(self) -> dict[str, float]:
    """Ends the run; returns final dev scores by measure."""
    self._checkpoints.wait()
    self._prune()
    return self._log.finish()


def _restore_state(begun, checkpoints, optimizer):
  """Returns the `steps.State` of a checkpoint or of a new run."""
  run = begun.run
  trained = experiment.trees_of_run(run.config, run.retriever.config.towers)
  if begun.params is not None:
    resume.begin_pick_ups(run)
    return steps.init_state(begun.params, trained, optimizer, run.devices)
  shapes = bi_encoder.shapes(run.retriever.config)
  like = steps.state_shapes(shapes, trained, optimizer, run.devices)
  return distributed.to_local(
    checkpoints.restore(begun.step, like), like.step.sharding
  )
