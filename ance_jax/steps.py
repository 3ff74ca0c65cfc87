"""The pmapped training step, built from one row of the method table.

Inside, a device sees its part of the batch: B queries of the whole batch's
n B. The state has no leading axis; it is the same on all devices.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from ance_jax import bert
from ance_jax import devices as devices_lib
from ance_jax import encoders

_AXIS = devices_lib.AXIS


class State(NamedTuple):
  """What training changes, alike on all devices.

  Attributes:
    step: () int32, optimizer steps made.
    params: Parameters by tower.
    opt_state: The optimizer's.
  """

  step: jax.Array
  params: dict
  opt_state: tuple


def init_state(params, optimizer, devices):
  """Returns the `State` before the first step, on all devices."""
  state = State(jnp.zeros((), jnp.int32), params, optimizer.init(params))
  return devices_lib.replicate(state, devices)


def state_shapes(param_shapes, optimizer, devices):
  """Returns a `State` of shapes, dtypes and places, to restore one into.

  Args:
    param_shapes: The tree of parameters, with a shape and dtype for each.
    optimizer: As for `init_state`.
    devices: As for `init_state`.
  """
  step = jax.ShapeDtypeStruct((), jnp.int32)
  state = State(
    step, param_shapes, jax.eval_shape(optimizer.init, param_shapes)
  )
  place = devices_lib.replicated(devices)
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    state,
  )


def make_loss(config, method, retriever):
  """Returns loss(params, batch, step) -> (loss, accuracy), means over devices.

  Args:
    config: The run's; its temperature, dropout rate, dtype and seed are read.
    method: A row of the method table.
    retriever: A `Retriever`.
  """
  encode_queries, encode_passages = (
    encoders.make_encode(retriever, config.dtype, side)
    for side in (encoders.QUERY, encoders.PASSAGE)
  )

  def dropout(rows, step):
    if not config.dropout_rate:
      return None
    # Mixed before the step comes in: seed ^ step alone would give two seeds
    # the same masks at other steps.
    seed = bert.mix(jnp.uint32(config.seed))
    seed = bert.mix(step.astype(jnp.uint32) ^ seed)
    return bert.Dropout(jnp.float32(config.dropout_rate), seed, rows)

  def loss(params, batch, step):
    columns = batch.passage_ids.shape[1]
    # Each text of the whole batch has a number: the query, then its passages.
    rows = batch.rows[:, None] * np.uint32(columns + 1)
    rows += jnp.arange(columns + 1, dtype=jnp.uint32)
    queries = encode_queries(
      params, batch.query_ids, batch.query_lengths, dropout(rows[:, 0], step)
    )
    passages = encode_passages(
      params,
      batch.passage_ids.reshape(-1, batch.passage_ids.shape[-1]),
      batch.passage_lengths.ravel(),
      dropout(rows[:, 1:].ravel(), step),
    ).reshape(*batch.passage_groups.shape, -1)
    positive = _scores('be,be->b', queries, passages[:, 0])
    negatives, groups = _negative_scores(method, queries, passages, batch)
    # A passage of the same text group as any of the positives is no negative,
    # and with it the positive itself, where it is among the columns.
    counted = (groups[..., None] != batch.positive_groups[:, None]).all(-1)
    scale = 1 / config.temperature
    losses = method.loss(positive * scale, negatives * scale, counted)
    right = jnp.where(counted, negatives, -jnp.inf).max(1) < positive
    # With the mean over devices taken here, inside of what is differentiated,
    # and that of the gradients outside, the gradient is that of one device
    # with the whole batch (shared by pmap and both forms of shard_map).
    return lax.pmean((losses.mean(), right.mean()), _AXIS)

  return loss


def make_train_step(config, method, retriever, optimizer, devices):
  """Returns train_step(state, batch) -> (state, metrics), pmapped.

  `state` is donated. Leaves of `batch` are (n, B, ...) for n devices. Metrics
  are () float32, alike on all devices: 'loss', nats; 'accuracy', share of
  queries whose positive is above all their negatives; 'grad_norm', before
  clipping; 'real_tokens', share of tokens that are not padding.
  """
  loss_and_grads = jax.value_and_grad(
    make_loss(config, method, retriever), has_aux=True
  )

  def train_step(state, batch):
    (loss, accuracy), grads = loss_and_grads(state.params, batch, state.step)
    grads = lax.pmean(grads, _AXIS)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      'loss': loss,
      'accuracy': accuracy,
      'grad_norm': optax.tree.norm(grads),
      'real_tokens': lax.pmean(_real_tokens(batch), _AXIS),
    }
    return State(state.step + 1, params, opt_state), metrics

  return jax.pmap(
    train_step,
    axis_name=_AXIS,
    in_axes=(None, 0),
    out_axes=(None, None),
    devices=devices,
    donate_argnums=0,
  )


def _real_tokens(batch):
  real = batch.query_lengths.sum() + batch.passage_lengths.sum()
  return real / (batch.query_ids.size + batch.passage_ids.size)


def _negative_scores(method, queries, passages, batch):
  """Returns (B, C) scores and (1 or B, C) text groups of the columns.

  Without in-batch negatives the columns are the query's own; with them, all
  passages of the whole batch, in its order on any number of devices.
  """
  if not method.in_batch:
    own = _scores('be,bhe->bh', queries, passages[:, 1:])
    return own, batch.passage_groups[:, 1:]
  flat = passages.reshape(-1, passages.shape[-1])
  everyone = lax.all_gather(flat, _AXIS, tiled=True)
  groups = lax.all_gather(batch.passage_groups.ravel(), _AXIS, tiled=True)
  return _scores('be,ce->bc', queries, everyone), groups[None]


def _scores(equation, queries, passages):
  # Accelerators round float32 inputs by default; in a space where all scores
  # lie close together that reorders them.
  return jnp.einsum(
    equation, queries, passages, precision=lax.Precision.HIGHEST
  )
