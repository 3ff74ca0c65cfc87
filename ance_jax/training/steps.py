"""Builds the pmapped training step from a row of the method table.

Inside the step, each of n devices sees B of the batch's n B queries. The state
has no leading axis and is the same on all devices.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from ance_jax import config as config_lib
from ance_jax import config_checks
from ance_jax.core import devices as devices_lib
from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.models import pooling
from ance_jax.training import columns as columns_lib
from ance_jax.training import experiment
from ance_jax.training import losses
from ance_jax.training import methods
from ance_jax.training import optimizers
from ance_jax.training import schedule
from ance_jax.training import searched

_AXIS = devices_lib.AXIS


class State(NamedTuple):
  """Training state, the same on all devices.

  Attributes:
    step: () int32, optimizer steps made.
    params: Parameters by tree, one tree per tower.
    opt_state: State of the optimizer by tree, for trained trees only.
  """

  step: jax.Array
  params: dict
  opt_state: dict


def init_state(
  params: dict,
  trained: Sequence[str],
  optimizer: optax.GradientTransformation,
  devices: Sequence[jax.Device],
) -> State:
  """Returns the state before the first step, on all devices.

  Args:
    params: Parameters by tree.
    trained: Names of the trees that need an optimizer state.
    optimizer: Optimizer of each of these trees.
    devices: Devices to hold the state.
  """
  opt_state = {name: optimizer.init(params[name]) for name in trained}
  state = State(jnp.zeros((), jnp.int32), params, opt_state)
  return devices_lib.replicate(state, devices)


def state_shapes(
  param_shapes: dict,
  trained: Sequence[str],
  optimizer: optax.GradientTransformation,
  devices: Sequence[jax.Device],
) -> State:
  """Returns a state of shapes, dtypes and shardings, as a restore target.

  The shardings are over all devices of all processes.

  Args:
    param_shapes: Shape and dtype of each parameter, by tree.
    trained: As for `init_state`.
    optimizer: As for `init_state`.
    devices: As for `init_state`.
  """
  step = jax.ShapeDtypeStruct((), jnp.int32)
  opt_state = {
    name: jax.eval_shape(optimizer.init, param_shapes[name]) for name in trained
  }
  state = State(step, param_shapes, opt_state)
  place = devices_lib.globally_replicated(devices)
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
    state,
  )


def make_loss(
  config: config_lib.Config,
  method: methods.Method,
  retriever: bi_encoder.RetrieverConfig,
) -> Callable:
  """Returns loss(params, batch, step, passages), a mean over all devices.

  It returns the loss and the accuracy. `passages` are for rows that search in
  the step, None for others.

  Args:
    config: Settings of the run; this reads the settings of the loss and of
      memory, the dropout rate, dtype and seed.
    method: Row of the method table.
    retriever: Settings of the retriever.
  """
  embed = _make_embed(config, retriever)
  if method.in_batch and config.micro_batch_size:
    embed = _in_pieces(embed, config.micro_batch_size)
  of_batch = columns_lib.make(config, method)
  narrow = config_checks.numbers(config.matryoshka_widths)

  def mean(values, right):
    # This mean over devices is inside the differentiated function and the mean
    # of the gradients is outside, so the gradient equals that of one device
    # with the whole batch (under pmap and both forms of shard_map).
    return lax.pmean((values.mean(), right.mean()), _AXIS)

  def loss_of(columns):
    values = getattr(losses, method.loss)(columns)
    if method.also and config.also_weight:
      also = getattr(losses, method.also)(columns)
      values += config.also_weight * (also - values)
    return values

  def loss(params, batch, step, everything=None):
    queries, passages = embed(params, batch, step)
    if method.searches:
      columns, right = searched.columns(
        queries, batch, everything, config.top_k, 1 / config.temperature
      )
      return mean(loss_of(columns), right)
    columns, right = of_batch(queries, passages, batch)
    values = loss_of(columns)
    for width in narrow:
      ends = (_cut(x, width, retriever.similarity) for x in (queries, passages))
      values += loss_of(of_batch(*ends, batch)[0])
    return mean(values / (1 + len(narrow)) if narrow else values, right)

  return loss


def _cut(embeddings, width, similarity):
  """Returns the first entries of embeddings, of length 1 for cosines."""
  embeddings = embeddings[..., :width]
  if similarity != 'cosine':
    return embeddings
  return pooling.unit(embeddings)


def make_gradient(
  config: config_lib.Config,
  method: methods.Method,
  retriever: bi_encoder.RetrieverConfig,
) -> Callable:
  """Returns gradient(params, batch, step, passages).

  It returns (loss, accuracy), and the gradient. All three are means over the
  whole batch, the same on all devices. The gradient covers the trees that the
  method trains. Takes the arguments of `make_loss`.
  """
  loss = make_loss(config, method, retriever)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss_and_grads(trained, params, batch, step, everything):
    return loss({**params, **trained}, batch, step, everything)

  if config.micro_batch_size and not method.in_batch:
    # Losses of different queries are independent, so gradients of pieces add.
    loss_and_grads = _accumulated(loss_and_grads, config.micro_batch_size)

  def gradient(params, batch, step, everything=None):
    trained = {name: params[name] for name in experiment.trees(method, params)}
    values, grads = loss_and_grads(trained, params, batch, step, everything)
    return values, lax.pmean(grads, _AXIS)

  return gradient


def flops(
  config: config_lib.Config,
  method: methods.Method,
  retriever: bi_encoder.RetrieverConfig,
  num_passages: int,
) -> int:
  """Returns the floating-point operations of a step.

  The backward pass counts as twice the forward pass. Forward operations that
  `--remat` or gradient caching repeat do not count.

  Args:
    config: Settings of the run.
    method: Row of the method table.
    retriever: Settings of the retriever.
    num_passages: Passages of the corpus, for rows that search them.
  """
  passages = config.batch_size * config.chunks
  passages *= 1 + schedule.num_negatives(config, method)
  search = 0
  if method.searches:
    passages = 0
    search = 2 * config.batch_size * num_passages * retriever.embedding_size
  return search + 3 * sum(
    bert.flops(retriever.body, number * length, length)
    for number, length in (
      (config.batch_size, retriever.query_length),
      (passages, retriever.passage_length),
    )
  )


def make_train_step(
  config: config_lib.Config,
  method: methods.Method,
  retriever: bi_encoder.RetrieverConfig,
  optimizer: optax.GradientTransformation,
  devices: Sequence[jax.Device],
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  """Returns train_step(state, batch, passages) -> (state, metrics), pmapped.

  Trees that the method does not train keep their parameters and moments.
  `state` is donated. Leaves of `batch` are (n, B, ...) for n devices;
  `passages` are `searched.Passages`, None for rows that do not search in the
  step. Metrics are () float32, the same on all devices: 'loss', in nats;
  'accuracy', share of queries whose positive scores above all their negatives;
  'grad_norm', before clipping; 'real_tokens', share of tokens that are not
  padding.
  """
  gradient = make_gradient(config, method, retriever)

  def train_step(state, batch, everything):
    (loss, accuracy), grads = gradient(
      state.params, batch, state.step, everything
    )
    grads = optimizers.of_trainable(config, grads)
    params, opt_state = dict(state.params), dict(state.opt_state)
    for name, grad in optimizers.clip(config, grads).items():
      updates, opt_state[name] = optimizer.update(
        grad, opt_state[name], params[name]
      )
      params[name] = optax.apply_updates(params[name], updates)
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
    in_axes=(None, 0, 0),
    out_axes=(None, None),
    devices=devices,
    donate_argnums=0,
  )


def _make_embed(config, retriever):
  """Returns embed(params, batch, step) -> (B, E), (B, (1 + H) C, E) float32.

  These are the embeddings of queries and of passages in C pieces each, with the
  step's dropout.
  """
  encode_queries, encode_passages = (
    bi_encoder.make_encode(retriever, config.dtype, side, config.remat)
    for side in (bi_encoder.QUERY, bi_encoder.PASSAGE)
  )

  def dropout(rows, step, max_length):
    if not config.dropout_rate:
      return None
    # Mixes the seed first because with seed ^ step alone, two seeds would have
    # the same masks at different steps.
    seed = bert.mix(jnp.uint32(config.seed))
    seed = bert.mix(step.astype(jnp.uint32) ^ seed)
    return bert.Dropout(
      jnp.float32(config.dropout_rate), seed, rows, max_length
    )

  def embed(params, batch, step):
    columns = batch.passage_ids.shape[1]
    # Numbers the texts of the whole batch: each query, then its passages.
    rows = batch.rows[:, None] * np.uint32(columns + 1)
    rows += jnp.arange(columns + 1, dtype=jnp.uint32)
    queries = encode_queries(
      params,
      batch.query_ids,
      batch.query_lengths,
      dropout(rows[:, 0], step, retriever.query_length),
    )
    if not columns:
      return queries, None
    passages = encode_passages(
      params,
      batch.passage_ids.reshape(-1, batch.passage_ids.shape[-1]),
      # Encodes missing pieces as one token, to stay finite.
      jnp.maximum(batch.passage_lengths.ravel(), 1),
      dropout(rows[:, 1:].ravel(), step, retriever.passage_length),
    )
    return queries, passages.reshape(*batch.passage_lengths.shape, -1)

  return embed


def _in_pieces(embed, size):
  """Returns an `embed` that holds the activations of one piece at a time.

  Its derivative is gradient caching (Gao et al. 2021, section 3.2): embed all
  pieces without keeping activations, take the gradient of the loss by the
  embeddings, then recompute and differentiate each piece. Dropout depends on
  the text's number in the whole batch, so the second pass has the same masks.

  Args:
    embed: Made by `_make_embed`.
    size: int, queries per piece.
  """

  def embed_in_pieces(params, batch, step):
    # The two passes are separate loops, which XLA's CSE cannot merge.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def embed_piece(piece):
      return embed(params, piece, step)

    embeddings = lax.map(embed_piece, _pieces(batch, size))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), embeddings)

  return embed_in_pieces


def _accumulated(loss_and_grads, size):
  """Returns a `loss_and_grads` that averages over pieces of the batch.

  Args:
    loss_and_grads: (trained, params, batch, step, passages) -> ((loss,
      accuracy), gradient by trained), each a mean over the batch's queries.
    size: int, queries per piece.
  """

  def accumulated(trained, params, batch, step, everything):
    def add(total, piece):
      new = loss_and_grads(trained, params, piece, step, everything)
      return jax.tree.map(jnp.add, total, new), None

    pieces = _pieces(batch, size)
    zero = jnp.float32(0)
    zeros = (zero, zero), jax.tree.map(jnp.zeros_like, trained)
    total, _ = lax.scan(add, zeros, pieces)
    return jax.tree.map(lambda x: x / len(pieces.rows), total)

  return accumulated


def _pieces(batch, size):
  """Returns the batch with leaves (B / size, size, ...)."""
  return jax.tree.map(
    lambda x: x.reshape(len(x) // size, size, *x.shape[1:]), batch
  )


def _real_tokens(batch):
  real = batch.query_lengths.sum() + batch.passage_lengths.sum()
  return real / (batch.query_ids.size + batch.passage_ids.size)
