"""Starts or resumes a run, checking all that a restart reads.

A checkpoint holds everything; files of the run's folder are compared with it
and restored if damaged. Pick-ups record from which step on each refresh is
active, and are on disk before the first batch that uses the refresh.
"""

import json
import pathlib
from typing import NamedTuple

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.core import remote
from ance_jax.training import experiment
from ance_jax.training import negatives
from ance_jax.training import schedule

PICK_UPS_FILE = 'pickups.json'
WORK_FILE = 'work.json'
# Settings whose changes are not reported, because they do not affect training.
_OF_ONE_START = (
  'job', 'workdir', 'dry_run', 'debug', 'compilation_cache_dir',
  'progress_bars'
)  # fmt: skip


class Begun(NamedTuple):
  """A run at its first step of this process.

  Attributes:
    run: The run.
    params: Parameters by tower; None if they are in the checkpoint.
    step: Optimizer steps made.
    history: Lines of `metrics.jsonl` up to `step`.
    work: Operations of the steps so far, as `run_log.RunLog` counts them.
  """

  run: experiment.Experiment
  params: dict | None
  step: int
  history: bytes
  work: dict[int, list[float]]


def begin(config: config_lib.Config) -> Begun:
  """Returns the run at its newest whole checkpoint, or else at step 0."""
  splits = (config.train_split, config.dev_split)
  if distributed.is_first():
    atomic.remove_unfinished(config.workdir)
    # Copies newer files of the run from its `--remote_dir`, if any.
    if experiment.fetch(config, every=True):
      logs.log(f'{config.workdir} is brought up to {config.remote_dir}')
      remote.pull_file(f'{config.workdir}/{PICK_UPS_FILE}')
  step, saved = distributed.broadcast(
    lambda: checkpoint.newest_whole(config.workdir)
  )
  if saved is None:
    _check_never_trained(config.workdir)
    this, params = experiment.create(config, splits)
    negatives.check(this)
    logs.log(f'training {config.workdir} from step 0')
    return Begun(this, params, 0, b'', {})
  checkpoint.check_format(config.workdir, step, saved)
  experiment.check_same_run(config, step)
  if step > config.max_steps:
    raise errors.refusal(
      f'--max_steps={config.max_steps} is less than the {step} steps made',
      'raise it, or evaluate a checkpoint',
    )
  this = experiment.restore(config, splits, step)
  logs.log(
    f'training {config.workdir} goes on from the checkpoint of step {step}'
  )
  _say_what_changed(this, step, saved)
  history = b''
  if distributed.is_first():
    history = _restore_history(config, step)
  distributed.barrier('restored')
  work = json.loads(checkpoint.read_record(config.workdir, step)[WORK_FILE])
  work = {int(number): flops for number, flops in work.items()}
  return Begun(this, None, step, history, work)


def begin_pick_ups(run: experiment.Experiment) -> None:
  """Writes the empty history of pick-ups of a new run."""
  if distributed.is_first():
    _write_pick_ups(run.workdir, [])
  distributed.barrier('no pick-ups')


def pick_up(
  run: experiment.Experiment, step: int, refresh: int
) -> schedule.ActiveRefresh:
  """Records on disk that a refresh becomes active, before its first batch.

  Args:
    run: The run.
    step: Optimizer steps made before.
    refresh: Step of the weights of the refresh.

  Returns:
    The record, as before if it was there.
  """
  before = _pick_ups(run.workdir)
  for one in before:
    if one[:2] == (step, refresh):
      return one
  new = schedule.ActiveRefresh(step, refresh)
  if distributed.is_first():
    _write_pick_ups(run.workdir, [*before, new])
  return new


def record_shapes(
  run: experiment.Experiment, new: schedule.ActiveRefresh
) -> None:
  """Adds the shapes of an active refresh to its record on disk."""
  if distributed.is_first():
    before = _pick_ups(run.workdir)
    _write_pick_ups(
      run.workdir, [new if one[:2] == new[:2] else one for one in before]
    )


def active_at(
  run: experiment.Experiment, step: int
) -> schedule.ActiveRefresh | None:
  """Returns the refresh that is active after `step` steps, or None."""
  past = [one for one in _pick_ups(run.workdir) if one.step <= step]
  return past[-1] if past else None


def to_replay(run: experiment.Experiment) -> list[schedule.ActiveRefresh]:
  """Returns the recorded pick-ups to repeat, in order.

  They are from an earlier process, which may have passed its newest checkpoint,
  or from another run with `--refresh_replay`.
  """
  return _pick_ups(pathlib.Path(run.config.refresh_replay or run.workdir))


def _say_what_changed(run, step, saved):
  """Prints the settings and versions that changed since the checkpoint.

  Args:
    run: `experiment.Experiment`.
    step: int, step of the checkpoint.
    saved: Manifest of the checkpoint.
  """
  before = experiment.settings(run.workdir, step)
  for name, old, new in config_lib.differences(
    before, run.config, may_change=True
  ):
    if name not in (*_OF_ONE_START, *config_lib.LAUNCH):
      logs.log(f'--{name} is {new!r} from here on; it was {old!r}')
  now = devices_lib.describe(run.devices)
  changed = [
    f'{name} {old!r} -> {now[name]!r}'
    for name, old in saved['made_with'].items()
    if old != now[name]
  ]
  if changed:
    logs.log(f'not bit-equal to what it was to be: {", ".join(changed)}')


def _check_never_trained(workdir):
  """Raises `BadInput` for a run that has lost all of its checkpoints.

  The first checkpoint is committed before the first line of metrics.
  """
  steps = [line['step'] for line in logs.read(workdir)]
  damaged = list(pathlib.Path(workdir).glob(f'{checkpoint.DAMAGED}-*'))
  if steps or damaged:
    last = max(steps, default=0)
    raise errors.refusal(
      f'the run in {workdir} has no whole checkpoint (damaged: '
      f'{len(damaged)}), but metrics up to step {last}',
      'restore a copy of its checkpoints, or name another --workdir',
    )


def _restore_history(config, step):
  """Restores a run's history where it is damaged.

  Returns:
    The lines of `metrics.jsonl` that the checkpoint of `step` holds, plus the
    lines of a final evaluation at `step` that is not due again.
  """
  path = pathlib.Path(config.workdir)
  record = checkpoint.read_record(path, step)
  lines, metrics = record[logs.METRICS_FILE], path / logs.METRICS_FILE
  found = metrics.read_bytes() if metrics.exists() else b''
  again = f'it is again as the checkpoint of step {step} has it'
  if not found.startswith(lines):
    logs.log(f'{metrics} is missing or was changed: {again}')
  elif not (
    schedule.refresh_due(config, step) or schedule.eval_due(config, step)
  ):
    begins = json.dumps({'step': step})[:-1].encode() + b','
    later = found[len(lines) :].splitlines(keepends=True)
    lines += b''.join(
      line for line in later if line.startswith(begins) and line[-1:] == b'\n'
    )
  try:
    atomic.read_json(path / PICK_UPS_FILE)
  except errors.Damaged as damaged:
    logs.log(f'{damaged} Now {again}.')
    atomic.write_bytes(path / PICK_UPS_FILE, record[PICK_UPS_FILE])
  return lines


def _pick_ups(workdir):
  """Returns the `ActiveRefresh`es recorded in a run's folder, in order."""
  found = atomic.read_json(workdir / PICK_UPS_FILE)['pickups']
  return [schedule.ActiveRefresh(**one) for one in found]


def _write_pick_ups(workdir, pick_ups):
  pick_ups = [one._asdict() for one in pick_ups]
  atomic.write_json(workdir / PICK_UPS_FILE, {'pickups': pick_ups})
  remote.push(workdir / PICK_UPS_FILE)
