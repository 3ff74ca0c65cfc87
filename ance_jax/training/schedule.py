"""Computes from the settings alone what is due after each optimizer step.

There are no counters, so a restart has none to restore.
"""

import bisect
import dataclasses
import functools
import math
from typing import NamedTuple

from ance_jax import config as config_lib
from ance_jax import config_checks
from ance_jax.training import methods


class ActiveRefresh(NamedTuple):
  """A refresh whose negatives are trained on from some step on.

  Attributes:
    step: Optimizer steps made before the first batch of them.
    refresh: Step of the weights that mined them.
    shapes: Shapes of the steps with them, as of `packing.to_json`; None until
      they are chosen.
  """

  step: int
  refresh: int
  shapes: dict | None = None


def method(
  config: config_lib.Config, active_refresh: ActiveRefresh | None, step: int
) -> methods.Method:
  """Returns the row of the method table that the next step uses.

  Until a refresh becomes active, it is the row of the warm-up.

  Args:
    config: Settings of the run.
    active_refresh: The first refresh that is active at some step, or a later
      one; None: there is none so far.
    step: Optimizer steps made.
  """
  row = methods.METHODS[config.method]
  is_mined = active_refresh is not None and active_refresh.step <= step
  if row.refreshes and config.warmup_steps and not is_mined:
    return methods.METHODS[config.warmup_method]
  return row


def rows(config: config_lib.Config) -> dict[str, methods.Method]:
  """Returns the run's rows of the method table, in order, by flag name."""
  first, last = method(config, None, 0), methods.METHODS[config.method]
  warmup = {} if first is last else {'warmup_method': first}
  return {**warmup, 'method': last}


def num_negatives(config: config_lib.Config, method: methods.Method) -> int:
  """Returns H, the hard negatives per query in a step.

  Args:
    config: Settings of the run.
    method: Row of the method table that the step uses.
  """
  if not method.sources or method.searches:
    return 0
  # With triplets a refresh draws `--num_hard_negatives`, one for each triplet.
  # Such a run also warms up on triplets (run_train_warmup.sh).
  triplets = methods.METHODS[config.method].triplets
  return 1 if triplets else config.num_hard_negatives


def first_weights(config: config_lib.Config) -> int | None:
  """Returns the step of the weights from which a row begins again, or None."""
  if not methods.METHODS[config.method].restarts:
    return None
  return config.warmup_steps if config.restart_from == 'warmup' else 0


def num_updates(
  config: config_lib.Config, active_refresh: ActiveRefresh | None, step: int
) -> int:
  """Returns the number of updates since the optimizer last began.

  Args:
    config: Settings of the run.
    active_refresh: The refresh that was active in the last of these steps.
    step: Optimizer steps made.
  """
  restarts = methods.METHODS[config.method].restarts and active_refresh
  return step - active_refresh.step if restarts else step


def end_of_warmup(config: config_lib.Config, scores: dict[int, float]) -> int:
  """Returns the step at which the warm-up ends, by the scores on dev so far.

  After `--warmup_until_plateau` consecutive evaluations without a new best, it
  ends at the next evaluation; at `--warmup_steps` at the latest.

  Args:
    config: Settings of the run.
    scores: {step: value} of dev's first measure.
  """
  best, worse, every = -math.inf, 0, config.steps_per_eval
  for step in sorted(n for n in scores if n < config.warmup_steps):
    worse = 0 if scores[step] > best else worse + 1
    best = max(best, scores[step])
    if worse == config.warmup_until_plateau:
      return min(step - step % every + every, config.warmup_steps)
  return config.warmup_steps


def refresh_due(config: config_lib.Config, step: int) -> bool:
  """Returns whether a refresh mines negatives with the weights of `step`."""
  steps = _refresh_steps(config)
  place = bisect.bisect_left(steps, step)
  return place < len(steps) and steps[place] == step


def comes_into_use(config: config_lib.Config, step: int) -> int | None:
  """Returns the step of the refresh to switch to after `step`, or None.

  This is the refresh of `step` itself or, with `--refresh_mode=delayed`, the
  one `refresh_delay` steps earlier. A refresh at step 0 is never delayed,
  because there are no other negatives. Background refreshes depend on time
  instead.
  """
  mined = step - _delay(config) if step else 0
  by_then = refresh_due(config, mined)
  return mined if by_then and bool(mined) == bool(step) else None


def refreshes_between(
  config: config_lib.Config, first: int, last: int
) -> list[int]:
  """Returns the steps of all refreshes after `first` and before `last`."""
  return [n for n in _refresh_steps(config) if first < n < last]


def query_slice(config: config_lib.Config, step: int) -> int:
  """Returns the number of the query slice that a refresh at `step` mines.

  Refreshes cycle through the slices (ANCE, run_ann_data_gen.py:
  `output_num % chunk_factor`).
  """
  number = bisect.bisect_right(_refresh_steps(config), step) - 1
  return max(number, 0) % config.query_slices


def num_refreshes(config: config_lib.Config) -> int:
  """Returns the maximum number of refreshes of a whole run."""
  if config.warmup_until_plateau:
    earliest = min(config.steps_per_eval, config.warmup_steps)
    config = dataclasses.replace(config, warmup_steps=earliest)
  return len(_refresh_steps(config))


def num_saves(config: config_lib.Config) -> int:
  """Returns the minimum number of checkpoints that a whole run saves."""
  every = config.steps_per_checkpoint or config.steps_per_refresh
  return 1 + -(-config.max_steps // every)


def num_encodings(config: config_lib.Config) -> int:
  """Returns the minimum number of times that a whole run encodes the corpus."""
  every = config.steps_per_eval
  evaluations = 1 + -(-config.max_steps // every) if every else 1
  return max(evaluations, num_refreshes(config) + 1)


def save_due(config: config_lib.Config, step: int) -> bool:
  """Returns whether to save a checkpoint after `step` optimizer steps."""
  every = config.steps_per_checkpoint or config.steps_per_refresh
  at_end = step == config.max_steps
  return step % every == 0 or at_end or refresh_due(config, step)


def eval_due(config: config_lib.Config, step: int) -> bool:
  """Returns whether to evaluate dev after `step` optimizer steps."""
  every = config.steps_per_eval
  return step == config.max_steps or bool(every and step % every == 0)


def next_boundary(config: config_lib.Config, step: int) -> int:
  """Returns the next step after `step` at which more than training is due."""
  every = [config.steps_per_checkpoint or config.steps_per_refresh]
  every += [config.steps_per_eval] if config.steps_per_eval else []
  candidates = [config.max_steps] + [step - step % n + n for n in every]
  steps = _refresh_steps(config)
  for past in {step, step - _delay(config)}:
    later = steps[bisect.bisect_right(steps, past) :][:1]
    candidates += [n + step - past for n in later]
  return min(candidates)


def _delay(config):
  return config.refresh_delay if config.refresh_mode == 'delayed' else 0


def _refresh_steps(config):
  """Returns the steps of all refreshes of a whole run, ascending."""
  if not methods.METHODS[config.method].refreshes:
    return ()
  text = config.refresh_schedule or f'0-:{config.steps_per_refresh}'
  row = methods.METHODS[config.method]
  most = 1 if row.once else config.max_refreshes
  return _steps(text, config.warmup_steps, config.max_steps, most)


@functools.lru_cache
def _steps(text, first, end, most):
  found, begins = [], config_checks.intervals(text)
  while first < end and (not most or len(found) < most):
    found.append(first)
    first += [every for begin, every in begins if begin <= first][-1]
  return tuple(found)
