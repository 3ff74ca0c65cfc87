"""What is due after which optimizer step: pure functions of the settings.

Nothing is counted on the way, so a restart has nothing to restore.
"""

import bisect
import dataclasses
import functools
import math

from ance_jax import config as config_lib
from ance_jax.training import methods


def method(config, mined):
  """Returns the row of the method table that a step is of.

  Args:
    config: The run's.
    mined: Whether the negatives of a refresh are in use.
  """
  row = methods.METHODS[config.method]
  if row.refreshes and config.warmup_steps and not mined:
    return methods.METHODS[config.warmup_method]
  return row


def rows(config: config_lib.Config) -> dict[str, methods.Method]:
  """Returns the rows that a run trains on, in order, by their flags."""
  first, last = (method(config, mined) for mined in (False, True))
  warmup = {} if first is last else {'warmup_method': first}
  return {**warmup, 'method': last}


def num_negatives(config, method):
  """Returns H, the negatives of its own that a query has in a step.

  Args:
    config: The run's.
    method: The row that the step is of.
  """
  if method.negatives == 'none':
    return 0
  # `--hard_negatives` is then what a refresh draws: a triplet has one of them,
  # and the warm-up of such a run is on triplets, too (run_train_warmup.sh).
  triplets = methods.METHODS[config.method].triplets
  return 1 if triplets else config.hard_negatives


def levelled_off(config, scores):
  """Returns the settings with the warm-up that dev's scores leave of it.

  It ends at the evaluation after `--warmup_until_plateau` of them in a row were
  no better than the best before, if that is earlier.

  Args:
    config: The run's.
    scores: {step: value} of the first measure of dev.
  """
  best, worse, every = -math.inf, 0, config.steps_per_eval
  for step in sorted(n for n in scores if n < config.warmup_steps):
    worse = 0 if scores[step] > best else worse + 1
    best = max(best, scores[step])
    if worse == config.warmup_until_plateau:
      end = min(step - step % every + every, config.warmup_steps)
      return dataclasses.replace(config, warmup_steps=end)
  return config


def refresh_due(config, step):
  """Returns whether negatives are mined with the weights of `step`."""
  steps = _refresh_steps(config)
  place = bisect.bisect_left(steps, step)
  return place < len(steps) and steps[place] == step


def comes_into_use(config, step):
  """Returns the step of the refresh that is picked up after `step`, or None.

  That of the same step, or, with `--refresh=delayed`, that of `refresh_delay`
  steps before. Where there is nothing else to train on, the first one is not
  delayed. Of refreshes beside training only time decides.
  """
  mined = step - _delay(config) if step else 0
  by_then = refresh_due(config, mined)
  return mined if by_then and bool(mined) == bool(step) else None


def refreshes_between(config, first, last):
  """Returns the steps of all refreshes after one step and before another."""
  return [n for n in _refresh_steps(config) if first < n < last]


def query_slice(config, step):
  """Returns which slice of the training queries a refresh at `step` mines.

  They take turns in a fixed order (ANCE, run_ann_data_gen.py:
  `output_num % chunk_factor`).
  """
  number = bisect.bisect_right(_refresh_steps(config), step) - 1
  return max(number, 0) % config.query_slices


def num_refreshes(config):
  """Returns how many refreshes a whole run makes, at most."""
  if config.warmup_until_plateau:
    earliest = min(config.steps_per_eval, config.warmup_steps)
    config = dataclasses.replace(config, warmup_steps=earliest)
  return len(_refresh_steps(config))


def num_saves(config):
  """Returns how many checkpoints a whole run saves, at least."""
  every = config.steps_per_checkpoint or config.steps_per_refresh
  return 1 + -(-config.max_steps // every)


def num_encodings(config):
  """Returns how often a whole run encodes the corpus, at least."""
  every = config.steps_per_eval
  evaluations = 1 + -(-config.max_steps // every) if every else 1
  return max(evaluations, num_refreshes(config) + 1)


def save_due(config, step):
  """Returns whether a checkpoint is saved after `step` optimizer steps."""
  every = config.steps_per_checkpoint or config.steps_per_refresh
  at_end = step == config.max_steps
  return step % every == 0 or at_end or refresh_due(config, step)


def eval_due(config, step):
  """Returns whether dev is evaluated after `step` steps, refresh or not."""
  every = config.steps_per_eval
  return step == config.max_steps or bool(every and step % every == 0)


def next_boundary(config, step):
  """Returns the first step after `step` at which more than training is due."""
  every = [config.steps_per_checkpoint or config.steps_per_refresh]
  every += [config.steps_per_eval] if config.steps_per_eval else []
  candidates = [config.max_steps] + [step - step % n + n for n in every]
  steps = _refresh_steps(config)
  for past in {step, step - _delay(config)}:
    later = steps[bisect.bisect_right(steps, past) :][:1]
    candidates += [n + step - past for n in later]
  return min(candidates)


def _delay(config):
  return config.refresh_delay if config.refresh == 'delayed' else 0


def _refresh_steps(config):
  """Returns the steps of all refreshes of a whole run, in order."""
  if not methods.METHODS[config.method].refreshes:
    return ()
  text = config.refresh_schedule or f'0-:{config.steps_per_refresh}'
  return _steps(
    text, config.warmup_steps, config.max_steps, config.max_refreshes
  )


@functools.lru_cache
def _steps(text, first, end, most):
  found, begins = [], config_lib.intervals(text)
  while first < end and (not most or len(found) < most):
    found.append(first)
    first += [every for begin, every in begins if begin <= first][-1]
  return tuple(found)
