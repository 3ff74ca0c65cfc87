"""The optimizer of a tree of parameters: AdamW or ANCE's LAMB; clipping."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ance_jax import config as config_lib

# Decay of the moments: the defaults of ANCE's utils/lamb.py and of torch.
_B1, _B2 = 0.9, 0.999
# utils/lamb.py of ANCE clamps the norm of a tensor to [0, 10]; optax.lamb does
# not, and moves a word embedding of BERT's size eight times as far.
_MAX_WEIGHT_NORM = 10.0


class _Moments(NamedTuple):
  """Running means of the gradient and of its square, as the parameters are."""

  mean: optax.Updates
  square: optax.Updates


def learning_rate_schedule(config):
  """Returns learning_rate(step): a straight line up, and one down to 0.

  No refresh restarts it. ANCE's driver does restart it unless it is given
  `--single_warmup`, as its run_train.sh gives it (drivers/run_ann.py).
  """
  rise = config.lr_warmup_steps
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, config.learning_rate, rise),
      optax.linear_schedule(
        config.learning_rate, 0.0, max(config.max_steps - rise, 1)
      ),
    ],
    [rise],
  )


def peak(config):
  """Returns the highest learning rate of a run's steps, the first one being 0.

  It is `--learning_rate` unless the run is over before.
  """
  rise = config.lr_warmup_steps
  if config.max_steps > rise:
    return config.learning_rate
  return config.learning_rate * max(config.max_steps - 1, 0) / rise


def make(config: config_lib.Config) -> optax.GradientTransformation:
  """Returns the optimizer that each trained tree of a run has for itself.

  Its learning rate follows the number of updates that the tree has had.

  Biases and LayerNorm are not decayed, as in DPR (models/hf_models.py) and
  ANCE's OpenQA driver (utils/dpr_utils.py); its MS MARCO driver decays nothing.
  """

  def decayed(params):
    return jax.tree.map_with_path(
      lambda path, _: path[-1].key not in ('bias', 'scale'), params
    )

  return {'adamw': optax.adamw, 'lamb': lamb}[config.optimizer](
    learning_rate_schedule(config),
    eps=config.adam_epsilon,
    weight_decay=config.weight_decay,
    mask=decayed,
  )


def clip(config: config_lib.Config, grads: dict) -> dict:
  """Returns the gradients scaled to a norm of `--clip_norm` at most.

  The norm is over all trained trees together, of the gradient of the mean over
  the whole batch. DPR clips that gradient divided by its number of devices, so
  that its 2.0 on eight is 16 here (train_dense_encoder.py: remote vectors are
  detached).

  Args:
    config: The run's; a `--clip_norm` of 0 clips nothing.
    grads: Gradients by tree.
  """
  if not config.clip_norm:
    return grads
  clipping = optax.clip_by_global_norm(config.clip_norm)
  return clipping.update(grads, clipping.init(grads))[0]


def lamb(learning_rate, *, eps, weight_decay, mask):
  """Returns LAMB (You et al. 2020) as ANCE runs it (utils/lamb.py).

  For each tensor w: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2 without bias
  correction, u = m / (sqrt(v) + eps) + weight_decay w, and
  w -= learning_rate min(|w|, 10) / |u| u; where a norm is 0, the ratio is 1.

  Args:
    learning_rate: Number, or function of the step.
    eps: Added to the root of the second moment.
    weight_decay: Share of the parameters that is added to the update.
    mask: Function of the parameters' tree -> tree of bool, what is decayed.
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
    # The inner where keeps 0 / 0 out.
    ratio = weight_norm / jnp.where(known, update_norm, 1)
    return jnp.where(known, ratio, 1) * update

  return jax.tree.map(scaled, updates, params), state
