"""The optimizer of a parameter tree (AdamW or ANCE's LAMB), and clipping."""

from collections.abc import Callable
from collections.abc import Sequence
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ance_jax import config as config_lib

# Decay rates of the moments: defaults of ANCE's utils/lamb.py and of torch.
_B1, _B2 = 0.9, 0.999
# ANCE's utils/lamb.py clamps a tensor's norm to [0, 10]. optax.lamb does not,
# and moves a word embedding of BERT's size eight times as far.
_MAX_WEIGHT_NORM = 10.0


class _Moments(NamedTuple):
  """Running means of the gradient and its square; trees like the parameters."""

  mean: optax.Updates
  square: optax.Updates


def learning_rate_schedule(config: config_lib.Config) -> optax.Schedule:
  """Returns learning_rate(update): linear warm-up, then linear decay to 0.

  Only rows that begin again at a refresh restart it, with their optimizer.
  ANCE's driver restarts it at each unless run with `--single_warmup`, as in its
  run_train.sh (drivers/run_ann.py).
  """
  rise = config.lr_warmup_steps
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, config.learning_rate, rise),
      optax.linear_schedule(
        config.learning_rate,
        0.0,
        max((config.rate_steps or config.max_steps) - rise, 1),
      ),
    ],
    [rise],
  )


def peak(config: config_lib.Config) -> float:
  """Returns the highest learning rate of a run's steps.

  It is `--learning_rate` unless the run ends during the warm-up.
  """
  rise = config.lr_warmup_steps
  if config.max_steps > rise:
    return config.learning_rate
  return config.learning_rate * max(config.max_steps - 1, 0) / rise


def make(config: config_lib.Config) -> optax.GradientTransformation:
  """Returns the optimizer for one trained tree of a run.

  Its learning rate depends on the number of updates of that tree.

  It does not decay biases and LayerNorm, like DPR (models/hf_models.py) and
  ANCE's OpenQA driver (utils/dpr_utils.py). ANCE's MS MARCO driver decays
  nothing.
  """

  def decayed(params):
    return jax.tree.map_with_path(
      lambda path, _: path[-1].key not in ('bias', 'scale'), params
    )

  made = {'adamw': optax.adamw, 'lamb': lamb}[config.optimizer](
    learning_rate_schedule(config),
    eps=config.adam_epsilon,
    weight_decay=config.weight_decay,
    mask=decayed,
  )
  if not config.trainable:
    return made

  def kinds(params):
    return jax.tree.map_with_path(
      lambda path, _: is_trainable(config, path), params
    )

  return optax.partition({True: made, False: optax.set_to_zero()}, kinds)


def is_trainable(config: config_lib.Config, path: Sequence) -> bool:
  """Returns whether `--trainable` names a parameter, by its path in a tree."""
  name = '/'.join(part.key for part in path)
  return re.search(config.trainable, name) is not None


def of_trainable(config: config_lib.Config, grads: dict) -> dict:
  """Returns gradients by tree, 0 where `--trainable` leaves a parameter out."""
  if not config.trainable:
    return grads
  return jax.tree.map_with_path(
    lambda path, grad: (
      grad if is_trainable(config, path[1:]) else jnp.zeros_like(grad)
    ),
    grads,
  )


def clip(config: config_lib.Config, grads: dict) -> dict:
  """Scales gradients to a norm of at most `--clip_norm`.

  The norm covers all trained trees together, for the mean loss over the
  global batch. DPR clips this gradient divided by its number of devices, so
  that its 2.0 on eight devices equals 16 here (train_dense_encoder.py detaches
  remote vectors).

  Args:
    config: Settings of the run; a `clip_norm` of 0 disables clipping.
    grads: Gradients by tree.
  """
  if not config.clip_norm:
    return grads
  clipping = optax.clip_by_global_norm(config.clip_norm)
  return clipping.update(grads, clipping.init(grads))[0]


def lamb(
  learning_rate: optax.ScalarOrSchedule,
  *,
  eps: float,
  weight_decay: float,
  mask: Callable[[optax.Params], optax.Params],
) -> optax.GradientTransformation:
  """Returns LAMB (You et al. 2020) as ANCE runs it (utils/lamb.py).

  For each tensor w: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2 without bias
  correction, u = m / (sqrt(v) + eps) + weight_decay w, and
  w -= learning_rate min(|w|, 10) / |u| u; where a norm is 0, the ratio is 1.

  Args:
    learning_rate: Constant or schedule.
    eps: Added to the root of the second moment.
    weight_decay: Share of the parameters to add to the update.
    mask: Maps the parameters to a tree of bool, true for those to decay.
  """
  return optax.chain(
    optax.GradientTransformation(_init_moments, _moments_update(eps)),
    optax.add_decayed_weights(weight_decay, mask),
    optax.GradientTransformation(lambda _: optax.EmptyState(), _trust_update),
    optax.scale_by_learning_rate(learning_rate),
  )


def _init_moments(params):
  zeros = jax.tree.map(jnp.zeros_like, params)
  return _Moments(zeros, jax.tree.map(jnp.copy, zeros))


def _moments_update(eps):
  def update(grads, moments, _=None):
    mean = optax.tree.update_moment(grads, moments.mean, _B1, 1)
    square = optax.tree.update_moment(grads, moments.square, _B2, 2)
    updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
    return updates, _Moments(mean, square)

  return update


def _trust_update(updates, state, params):
  def scaled(update, param):
    weight_norm = jnp.minimum(jnp.linalg.norm(param), _MAX_WEIGHT_NORM)
    update_norm = jnp.linalg.norm(update)
    known = (weight_norm > 0) & (update_norm > 0)
    # The inner `where` avoids 0 / 0.
    ratio = weight_norm / jnp.where(known, update_norm, 1)
    return jnp.where(known, ratio, 1) * update

  return jax.tree.map(scaled, updates, params), state
