"""Detects runs that cannot learn, before the first step and during training.

Problems are logged; settings or data without any negatives raise an error.
"""

import collections
from collections.abc import Hashable

import jax
import numpy as np

from ance_jax import config as config_lib
from ance_jax import config_checks
from ance_jax import errors
from ance_jax.core import devices as devices_lib
from ance_jax.core import logs
from ance_jax.core import workdirs
from ance_jax.models import bi_encoder
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import optimizers
from ance_jax.training import schedule

# Share of a step's queries without a negative from which a warning is logged.
_IDLE = 0.01
# Number of steps that `Signs` looks at; bounds on their mean loss (nats) and
# accuracy for negatives that count as solved.
_STEPS, _SOLVED_LOSS, _SOLVED_ACCURACY = 50, 0.01, 0.999


def before_reading(config: config_lib.Config) -> None:
  """Raises `BadInput` for what can be known before anything is read."""
  workdirs.require(config)
  num_devices = len(devices_lib.training_devices(config)[0])
  if config.batch_size % num_devices:
    raise errors.refusal(
      f'--batch_size={config.batch_size} is not divisible by the {num_devices} '
      'devices',
      f'set it to a multiple of {num_devices}',
    )
  per_device = config.batch_size // num_devices
  if config.micro_batch_size and per_device % config.micro_batch_size:
    raise errors.refusal(
      f'--micro_batch_size={config.micro_batch_size} does not divide the '
      f'{per_device} queries of a device (--batch_size={config.batch_size} '
      f'over {num_devices})',
      f'set it to a divisor of {per_device}',
    )
  of_flags(config)


def of_flags(config: config_lib.Config) -> None:
  """Warns of flags that keep a run from learning.

  Raises:
    BadInput: The flags leave all queries without negatives.
  """
  for flag, row in schedule.rows(config).items():
    name = f'--{flag}={getattr(config, flag)}'
    if config.batch_size == 1 and row.in_batch and not row.sources:
      raise errors.refusal(
        f'--batch_size=1 leaves {name} no other query in the batch to take '
        'negatives from, and the loss would always be 0',
        'raise it',
      )
  if config.max_steps:
    for line in (*_of_learning_rate(config), *_of_refreshes(config)):
      logs.log(line)


def of_run(run: experiment.Experiment) -> None:
  """Warns of data or a model that keep a run from learning.

  Raises:
    BadInput: No query can ever have a negative.
  """
  config, split = run.config, run.config.train_split
  _check_sizes(run)
  for flag, row in schedule.rows(config).items():
    name = f'--{flag}={getattr(config, flag)}'
    if len(row.trains) == 1 and run.retriever.config.tied:
      raise errors.refusal(
        f'{name} trains the {row.trains[0]} tower alone, and the encoders '
        'share one',
        'set --notie_encoders, with --init_from=RUN of one that is trained',
      )
    _check_trainable(run, row)
    number = schedule.num_negatives(config, row)
    data = experiment.training_data(run, row)
    shares = idle_shares(data, row, config.batch_size, number)
    never = int((shares == 1).sum())
    if never == len(shares):
      raise errors.refusal(
        f'{name} finds no negative for any query of {split!r} ({never:,} in '
        'all), and the loss would always be 0: each passage that it takes for '
        'a query is a positive of it, or has the text of one',
        'add queries or passages, or choose another row',
      )
    if shares.mean() >= _IDLE:
      logs.log(
        f'{name}: about {shares.mean():.1%} of the queries of a step will have '
        'no negative, and a loss of 0, as all passages that it takes for them '
        f'are their positives ({never:,} of the {len(shares):,} training '
        'queries never have one)'
      )
  if run.retriever.config.similarity == 'cosine' and config.temperature >= 1:
    logs.log(
      'scores are cosines, at most 2 apart, and divided by --temperature='
      f'{config.temperature:g} the loss can hardly fall; 0.05 is usual'
    )


def _check_sizes(run):
  """Raises `BadInput` for widths or topics that there are not so many of."""
  config = run.config
  width = run.retriever.config.embedding_size
  number = len(run.dataset.splits[config.train_split].ids)
  widths = config_checks.numbers(config.matryoshka_widths)
  for wrong, fact in (
    (
      max(widths, default=0) >= width,
      f'--matryoshka_widths={config.matryoshka_widths} is not below the width '
      f'of embeddings, {width}',
    ),
    (
      config.topics > number,
      f'--topics={config.topics} is more than the {number:,} training queries',
    ),
  ):
    if wrong:
      raise errors.refusal(fact, 'lower it')


def _check_trainable(run, row):
  """Raises `BadInput` if `--trainable` leaves nothing of a row to train."""
  config = run.config
  if not config.trainable:
    return
  shapes = bi_encoder.shapes(run.retriever.config)
  paths = [
    path
    for tree in experiment.trees(row, shapes)
    for path, _ in jax.tree.leaves_with_path(shapes[tree])
  ]
  if not any(optimizers.is_trainable(config, path) for path in paths):
    names = sorted({'/'.join(part.key for part in path) for path in paths})
    raise errors.refusal(
      f'--trainable={config.trainable} matches no parameter, such as '
      f'{names[0]}, {names[len(names) // 2]} and {names[-1]}',
      'correct it',
    )


def idle_shares(
  data: batches.TrainingData,
  row: methods.Method,
  batch_size: int,
  num_negatives: int,
) -> np.ndarray:
  """Returns the (Q,) probabilities that a query has no negative in a step.

  They are exactly 1 for queries that never have one, and 0 if negatives come
  from a table, which contains no positives and no queries without negatives.

  Args:
    data: Training data of the run.
    row: Row of the method table.
    batch_size: Queries per step.
    num_negatives: H, hard negatives per query in a step.
  """
  groups, number = data.groups, len(data.positive_groups)
  if row.sources not in ((), ('corpus',)):
    return np.zeros(number)
  if row.sources:
    taken = _weight_of_positives(data, np.bincount(groups))
    return (taken / len(groups)) ** num_negatives
  # Each query contributes one of its positives as a column to the others.
  counts = np.diff(data.offsets)
  weights = np.bincount(
    groups[data.positives], np.repeat(1 / counts, counts), groups.max() + 1
  )
  # Expected number of other queries whose column is a positive of this query.
  alike = np.round(_weight_of_positives(data, weights) - 1, 6)
  alike, places = np.unique(alike, return_inverse=True)
  shares = np.ones(len(alike))
  for drawn in range(min(batch_size, number) - 1):
    shares *= np.maximum(alike - drawn, 0) / (number - 1 - drawn)
  return shares[places]


class Signs:
  """Looks for signs in a run's losses that nothing is left to learn."""

  def __init__(self):
    self._negatives, self._said = None, False
    self._losses = collections.deque(maxlen=_STEPS)
    self._accuracies = collections.deque(maxlen=_STEPS)

  def seen(
    self, loss: float, accuracy: float, negatives: Hashable
  ) -> str | None:
    """Returns a warning about the last steps, or None.

    It warns at most once per value of `negatives`.

    Args:
      loss: Loss of the step, nats.
      accuracy: Share of queries in the step whose positive scores highest.
      negatives: Identifies the negatives that the step trained on.
    """
    if negatives != self._negatives:
      self.__init__()
      self._negatives = negatives
    self._losses.append(loss)
    self._accuracies.append(accuracy)
    if self._said or len(self._losses) < _STEPS:
      return None
    text = self._text()
    self._said = text is not None
    return text

  def _text(self):
    least, most = min(self._losses), max(self._losses)
    if least == most == 0:
      return (
        f'the loss was 0 in each of the last {_STEPS} steps: nothing is left '
        'to learn from these negatives'
      )
    if least == most:
      return (
        f'the loss was exactly {most:.6g} in each of the last {_STEPS} steps: '
        'nothing is learned, as if all texts had one embedding'
      )
    loss = sum(self._losses) / _STEPS
    accuracy = sum(self._accuracies) / _STEPS
    if loss < _SOLVED_LOSS and accuracy >= _SOLVED_ACCURACY:
      return (
        f'in the last {_STEPS} steps {accuracy:.1%} of the queries had their '
        f'positive above all negatives, at a mean loss of {loss:.2g}: little '
        'is left to learn from these negatives; harder ones or a larger batch '
        'would teach more'
      )
    return None


def _of_learning_rate(config):
  """Yields a warning if the learning rate does not reach its peak."""
  peak, end = optimizers.peak(config), config.max_steps
  if peak < config.learning_rate:
    reached = f'peaks at {peak:.3g}' if peak else 'stays at 0'
    yield (
      f'--lr_warmup_steps={config.lr_warmup_steps} is not over by --max_steps='
      f'{end}: the learning rate {reached} instead of --learning_rate='
      f'{config.learning_rate:g}; lower it, for example to {end // 10}'
    )

  restarts = methods.METHODS[config.method].restarts
  if 0 < config.rate_steps < end and not restarts:
    yield (
      f'--rate_steps={config.rate_steps} is less than --max_steps={end}: the '
      'learning rate is 0 from there on; raise it, or leave it out'
    )


def _of_refreshes(config):
  """Yields warnings about refreshes that never happen or are never used."""
  row = methods.METHODS[config.method]
  if not row.refreshes or config.refresh_replay:
    return
  number, end = schedule.num_refreshes(config), config.max_steps
  first = config.warmup_steps
  late = first + config.refresh_delay if first else 0
  if not number:
    yield (
      f'--warmup_steps={first} is not over by --max_steps={end}: nothing is '
      f'mined, and all steps are of --warmup_method={config.warmup_method}; '
      'lower it'
    )
  elif late >= end:
    yield (
      f'--refresh_delay={config.refresh_delay} puts the first mined negatives '
      f'in use at step {late}, and --max_steps={end}: they are never trained '
      'on; lower it'
    )
  elif number == 1 != config.max_refreshes and not row.once:
    name = (
      'refresh_schedule' if config.refresh_schedule else 'steps_per_refresh'
    )
    yield (
      f'--{name}={getattr(config, name)} leaves one refresh, at step {first}, '
      f'before --max_steps={end}: these negatives stay to the end; lower it, '
      'or set --max_refreshes=1 to say so'
    )
  if 0 < number < config.query_slices:
    yield (
      f'{number} refreshes mine {number} of the --query_slices='
      f'{config.query_slices}: what is in the others is never trained on with '
      'mined negatives'
    )


def _weight_of_positives(data, weights):
  """Returns (Q,) the total weight of a query's `positive_groups`.

  Args:
    data: `batches.TrainingData`.
    weights: (num_groups,) weight of each text group.
  """
  # Rows of `positive_groups` are padded with -1, which selects the 0.
  return np.append(weights, 0)[data.positive_groups].sum(1)
