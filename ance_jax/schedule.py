"""What is due after which optimizer step: pure functions of the settings.

Nothing is counted on the way, so a restart has nothing to restore.
"""

from ance_jax import methods


def method_at(config, step):
  """Returns the row of the method table that the step after `step` is of."""
  method = methods.METHODS[config.method]
  if method.refreshes and step < config.warmup_steps:
    return methods.METHODS[config.warmup_method]
  return method


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


def refresh_due(config, step):
  """Returns whether negatives are mined after `step` optimizer steps."""
  if not method_at(config, step).refreshes or step >= config.max_steps:
    return False
  number, rest = divmod(step - config.warmup_steps, config.steps_per_refresh)
  return rest == 0 and (
    not config.max_refreshes or number < config.max_refreshes
  )


def query_slice(config, step):
  """Returns which slice of the training queries a refresh at `step` mines.

  They take turns in a fixed order (ANCE, run_ann_data_gen.py:
  `output_num % chunk_factor`).
  """
  since = max(step - config.warmup_steps, 0)
  return since // config.steps_per_refresh % config.query_slices


def num_refreshes(config):
  """Returns how many refreshes a whole run makes."""
  last = config.max_steps - 1
  if not method_at(config, last).refreshes:
    return 0
  number = (last - config.warmup_steps) // config.steps_per_refresh + 1
  return min(number, config.max_refreshes or number)


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
  if methods.METHODS[config.method].refreshes:
    since = max(step - config.warmup_steps, -1)
    number = since // config.steps_per_refresh + 1
    candidates.append(config.warmup_steps + number * config.steps_per_refresh)
  return min(candidates)
