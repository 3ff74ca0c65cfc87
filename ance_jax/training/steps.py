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

  def gradient(params, batch, step, everything=None):
    trained = {name: params[name] for name in experiment.trees(method, params)}
    values, grads = loss_and_grads(trained, params, batch, step, everything)
    return values, lax.pmean(grads, _AXIS)

  return gradient


def make_train_step(
  config: config_lib.Config,
  method: methods.Method,
  retriever: bi_encoder.RetrieverConfig,
  optimizer: optax.GradientTransformation,
  devices: Sequence[jax.Device],
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  """Returns train_step(state, batch, passages) -> (state, metrics), pmapped.

  Trees that the method does not train keep their parameters and moments.
  `state` is donated. Leaves of `batch` are (n, B, ...) for n devices, those of
  its packs (n, K, R, ...);
  `passages` are `searched.Passages`, None for rows that do not search in the
  step. Metrics are () float32, the same on all devices: 'loss', in nats;
  'accuracy', share of queries whose positive scores above all their negatives;
  'grad_norm', before clipping; 'real_tokens', share of tokens that are not
  padding; 'flops' and 'flops_real', operations with padding and without.
  """
  gradient = make_gradient(config, method, retriever)

  def search(batch, everything):
    if not method.searches:
      return jnp.float32(0)
    # N as float32: products of integers overflow.
    each = 2.0 * len(devices) * len(batch.rows) * retriever.embedding_size
    return each * everything.num_rows.astype(jnp.float32)

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
      **_work(batch, retriever, search(batch, everything)),
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


def _work(batch, retriever, search):
  """Returns the floating-point operations of a step, and its real tokens.

  The backward pass counts as twice the forward pass. Forward operations that
  `--remat` or gradient caching repeat do not count.

  Args:
    batch: `Batch`.
    retriever: Settings of the retriever.
    search: Operations of the search in the step, over all devices.

  Returns:
    Float32 metrics, all over all devices: 'flops', with padding; 'flops_real',
    as if each text were alone; 'real_tokens', share of tokens that are not
    padding.
  """
  sums = jnp.zeros(4)
  for pack in batch.packs.values():
    chunks, rows, length = pack.ids.shape
    lengths = pack.lengths.astype(jnp.float32)
    # Of several chunks those without texts are left out.
    used = lengths.any((1, 2)).sum() if chunks > 1 else jnp.float32(1)
    tokens = used * rows * length
    sums += jnp.stack(
      [
        tokens,
        # JAX cannot multiply an array by an int above 2^31.
        bert.flops(retriever.body, tokens, float(length)),
        lengths.sum(),
        bert.flops(retriever.body, lengths, lengths).sum(),
      ]
    )
  computed, flops, real, flops_real = lax.psum(sums, _AXIS)
  return {
    'flops': search + 3 * flops,
    'flops_real': search + 3 * flops_real,
    'real_tokens': real / computed,
  }


def _make_embed(config, retriever):
  """Returns embed(params, batch, step) -> (B, E), (B, (1 + H) C, E) float32.

  These are the embeddings of queries and of passages in C pieces each, with the
  step's dropout. Each device computes its rows of texts, which may be those of
  other devices' queries; then all pooled vectors go to all devices.
  """
  pool = bi_encoder.Pooled(
    retriever,
    jnp.dtype(config.dtype),
    config.remat,
    kernel=config.refresh_mode != 'async',  # As in `settings.encoding`.
  )
  embedded = bi_encoder.Embedded(retriever)

  rate, of_attention = config.dropout_rate, config.attention_dropout_rate
  if of_attention is None:
    of_attention = rate if retriever.body.attention_dropout else 0

  def chunk(params, pack, seed):
    of_text = functools.partial(jnp.where, pack.are_passages)
    dropout = None
    if rate or of_attention:
      dropout = bert.Dropout(
        jnp.float32(rate),
        jnp.float32(of_attention) if of_attention else None,
        seed,
        pack.numbers,
        of_text(retriever.passage_length, retriever.query_length),
      )
    skipped = retriever.query_prompt_tokens, retriever.passage_prompt_tokens
    skipped = of_text(*skipped[::-1]) if any(skipped) else 0
    return pool.apply(
      {'params': params}, pack.ids, pack.lengths, dropout, skipped
    )

  def embed(params, batch, step):
    # Mixes the seed first because with seed ^ step alone, two seeds would have
    # the same masks at different steps.
    seed = bert.mix(jnp.uint32(config.seed))
    seed = bert.mix(step.astype(jnp.uint32) ^ seed)
    found = {}
    for tower, pack in batch.packs.items():
      pooled = _in_chunks(functools.partial(chunk, seed=seed))(
        params[tower], pack
      )
      flat = pooled.reshape(-1, pooled.shape[-1])
      found[tower] = lax.all_gather(flat, _AXIS, tiled=True)

    def of(side, slots):
      # Only vectors of texts: that of an empty slot may have no direction.
      tower = retriever.tower(side)
      vectors = found[tower][slots.ravel()]
      x = embedded.apply({'params': params[tower]}, vectors)
      return x.reshape(*slots.shape, -1)

    queries = of(bi_encoder.QUERY, batch.slots[:, 0])
    if batch.slots.shape[1] == 1:
      return queries, None
    return queries, of(bi_encoder.PASSAGE, batch.slots[:, 1:])

  return embed


def _in_chunks(pool):
  """Returns pool(params, pack) that holds the activations of a chunk at a time.

  Its derivative is gradient caching (Gao et al. 2021, section 3.2): pool all
  chunks without keeping activations, take the gradient of the loss by the
  vectors, then recompute and differentiate each chunk. Dropout depends on the
  text's number in the whole batch, so the second pass has the same masks.

  Args:
    pool: pool(params, pack) -> (R, S, P) of a pack without its first axis.
  """

  def of_chunks(params, pack):
    if len(pack.ids) == 1:
      return pool(params, jax.tree.map(lambda x: x[0], pack))

    # The two passes are separate loops, which XLA's CSE cannot merge.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(one):
      def nothing(one):
        return jax.tree.map(
          lambda x: jnp.zeros(x.shape, x.dtype),
          jax.eval_shape(lambda one: pool(params, one), one),
        )

      # Chunks without texts cost nothing.
      there = one.lengths.any()
      return lax.cond(there, lambda one: pool(params, one), nothing, one)

    return lax.map(of_chunk, pack)

  return of_chunks
