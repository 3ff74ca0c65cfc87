"""The transformer body: BERT, RoBERTa, DistilBERT, MPNet.

Devlin et al. 2019, Liu et al. 2019, Sanh et al. 2019, Song et al. 2020. Three
choices make it faster on CPUs and change only rounding and the random numbers
of dropout: activations are (B L, D) except in attention, attention weights are
normalised after they are multiplied by the values, and each dropout mask is a
hash of the positions in it.
"""

import dataclasses
import functools
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def gelu(x: jax.Array) -> jax.Array:
  """Returns x times the standard normal CDF at x, as torch does, in float32.

  Flax computes it by erfc, which took 2.6 times as long on a CPU and a quarter
  of a layer's time on a GPU (widths of BERT-base).
  """
  wide = x.astype(jnp.float32)
  return (0.5 * wide * (1 + jax.lax.erf(wide * np.float32(0.5**0.5)))).astype(
    x.dtype
  )


ACTIVATIONS = {
  'gelu': gelu,
  'gelu_new': lambda x: nn.gelu(x, approximate=True),
  'relu': nn.relu,
}
# Row of the position embedding that the first token uses.
POSITIONS_BEFORE = {'bert': 0, 'roberta': 2, 'distilbert': 0, 'mpnet': 2}
# Rows of MPNet's relative bias; half of them are for keys before the query.
NUM_BUCKETS = 32
# Standard deviation of initial weights in the code of all four models.
INITIALIZER = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class BodyConfig:
  """Sizes of a transformer body.

  Attributes:
    model_type: Key of `POSITIONS_BEFORE`; 'mpnet' adds a relative bias.
    vocab_size: Entries of the vocabulary.
    hidden_size: D, width of an activation.
    num_layers: Transformer layers.
    num_heads: Attention heads, a divisor of `hidden_size`.
    intermediate_size: Width of the feed-forward layers.
    max_positions: Rows of the position embedding.
    num_types: Rows of the token type embedding, 0 without one. Retrievers use
      only row 0.
    layer_norm_epsilon: Added to the variance in LayerNorm.
    activation: Key of `ACTIVATIONS`.
  """

  model_type: str
  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  intermediate_size: int
  max_positions: int
  num_types: int
  layer_norm_epsilon: float
  activation: str

  @property
  def max_length(self) -> int:
    """Maximum number of tokens in a text."""
    return self.max_positions - POSITIONS_BEFORE[self.model_type]


class Dropout(NamedTuple):
  """Selects the entries to drop. Functions take None for no dropout.

  Attributes:
    rate: () float32, share of entries to drop.
    seed: () uint32, different at each step.
    rows: (B,) uint32, index of each text in the global batch, so that dropout
      does not depend on the number of devices.
    max_length: Most tokens that a text may have, by which entries of attention
      are numbered, so that dropout does not depend on the padding.
  """

  rate: jax.Array
  seed: jax.Array
  rows: jax.Array
  max_length: int


def flops(config: BodyConfig, num_tokens: int, length: int) -> int:
  """Returns the operations of the forward pass, two per multiply-add.

  Args:
    config: Sizes of the body.
    num_tokens: Tokens of all texts, padding included.
    length: Tokens per text, padding included.
  """
  width, inner = config.hidden_size, config.intermediate_size
  a_token = 2 * (4 * width**2 + 2 * width * inner) + 4 * length * width
  return config.num_layers * a_token * num_tokens


class Body(nn.Module):
  """Token ids -> activations of the last layer.

  Attributes:
    config: Sizes.
    dtype: Type of the activations; parameters are float32.
    remat: Whether the backward pass recomputes each layer from its input
      instead of storing the activations inside it (Chen et al. 2016).
    kernel: Whether to use cuDNN's attention where cuDNN supports the input.
  """

  config: BodyConfig
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  kernel: bool = True

  @nn.compact
  def __call__(
    self,
    ids: jax.Array,
    lengths: jax.Array,
    dropout: Dropout | None = None,
    types: jax.Array | None = None,
  ) -> jax.Array:
    """Returns (B, L, D) activations.

    Args:
      ids: (B, L) int32 token ids, padded on the right.
      lengths: (B,) int32, tokens per text without padding.
      dropout: None for no dropout.
      types: (B, L) int32 token types for pairs of texts; None for all 0.
    """
    c = self.config
    batch, length = ids.shape
    first = POSITIONS_BEFORE[c.model_type]
    x = self._table('word_embedding', c.vocab_size)[ids]
    x += self._table('position_embedding', c.max_positions)[
      first : first + length
    ]
    if c.num_types:
      x += self._table('type_embedding', c.num_types)[
        0 if types is None else types
      ]
    x = x.astype(self.dtype).reshape(batch * length, -1)
    x = _layer_norm(c, self.dtype, 'embedding_norm')(x)
    x = drop(x, dropout, 0)
    real = jnp.arange(length) < lengths[:, None]
    bias = (
      RelativeBias(c.num_heads, name='relative')(length)
      if c.model_type == 'mpnet'
      else None
    )
    if self.remat:
      x = self._layers_in_a_loop(x, real, bias, dropout)
    else:
      for number in range(c.num_layers):
        x = Layer(c, self.dtype, self.kernel, name=f'layer_{number}')(
          x, real, bias, dropout, 3 * number + 1
        )
    return x.reshape(batch, length, -1)

  def _layers_in_a_loop(self, x, real, bias, dropout):
    """Applies all layers to `x`, storing only the input of each.

    It scans because XLA on CPUs drops the optimization barriers between
    unrolled layers and recomputes all layers at once, which saves only 4%.
    """
    params = [
      self.variables['params'][f'layer_{number}']
      for number in range(self.config.num_layers)
    ]
    layer = Layer(self.config, self.dtype, self.kernel, parent=None)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def apply(x, one):
      params, site = one
      return layer.apply({'params': params}, x, real, bias, dropout, site), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    sites = 3 * jnp.arange(len(params), dtype=jnp.uint32) + 1
    return jax.lax.scan(apply, x, (stacked, sites))[0]

  def _table(self, name, rows):
    return self.param(name, INITIALIZER, (rows, self.config.hidden_size))


class RelativeBias(nn.Module):
  """Number of tokens -> the bias added to the attention scores of every layer.

  MPNet learns one bias per head and bucket of query-key distances (Raffel et
  al. 2020, T5, section 2.1).
  """

  num_heads: int

  @nn.compact
  def __call__(self, length: int) -> jax.Array:
    """Returns (heads, L, L) float32, indexed by head, query and key."""
    # The optimizer does not decay a parameter named 'bias'; MPNet also names
    # it a bias.
    table = self.param('bias', INITIALIZER, (NUM_BUCKETS, self.num_heads))
    place = np.arange(length)
    return table[buckets(place - place[:, None])].transpose(2, 0, 1)


class Layer(nn.Module):
  """A transformer layer with a LayerNorm after each residual sum."""

  config: BodyConfig
  dtype: jnp.dtype
  kernel: bool = True

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    real: jax.Array,
    bias: jax.Array | None,
    dropout: Dropout | None,
    site: int | jax.Array,
  ) -> jax.Array:
    """Returns (B L, D) activations.

    Args:
      x: (B L, D) activations.
      real: (B, L) bool, false for padding.
      bias: (heads, L, L) float32, added to the attention scores.
      dropout: None for no dropout.
      site: () uint32, number of the first of the layer's three dropout masks.
    """
    c = self.config
    heads = (*real.shape, c.num_heads, c.hidden_size // c.num_heads)
    query, key, value = (
      self._dense(c.hidden_size, name)(x).reshape(heads)
      for name in ('query', 'key', 'value')
    )
    if self.kernel and dropout is None and bias is None and _has_kernel(query):
      mixed = _attention_by_cudnn(query, key, value, real)
    else:
      mixed = attention(query, key, value, real, bias, dropout, site)
    mixed = self._dense(c.hidden_size, 'output')(mixed.reshape(x.shape))
    x = _layer_norm(c, self.dtype, 'attention_norm')(
      x + drop(mixed, dropout, site + 1)
    )
    inner = ACTIVATIONS[c.activation](self._dense(c.intermediate_size, 'up')(x))
    inner = drop(self._dense(c.hidden_size, 'down')(inner), dropout, site + 2)
    return _layer_norm(c, self.dtype, 'norm')(x + inner)

  def _dense(self, width, name):
    return nn.Dense(
      width,
      dtype=self.dtype,
      precision=precision(self.dtype),
      kernel_init=INITIALIZER,
      name=name,
    )


def attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  real: jax.Array,
  bias: jax.Array | None,
  dropout: Dropout | None,
  site: int | jax.Array,
) -> jax.Array:
  """Returns scaled dot-product attention (Vaswani et al. 2017, eq. 1).

  Args:
    query: (B, L, heads, d).
    key: (B, L, heads, d).
    value: (B, L, heads, d).
    real: (B, L) bool, false for padding; at least one true per text.
    bias: (heads, L, L) float32, added to the scaled products.
    dropout: Applied to the attention weights; None for no dropout.
    site: () uint32, number of the dropout mask.

  Returns:
    (B, L, heads, d), of the dtype of `value`.
  """
  scores = jnp.einsum(
    'bqhd,bkhd->bhqk',
    query,
    key,
    precision=precision(query.dtype),
    preferred_element_type=jnp.float32,
  )
  scores *= np.float32(query.shape[-1] ** -0.5)
  if bias is not None:
    scores += bias
  scores = jnp.where(real[:, None, None], scores, -jnp.inf)
  weights = jnp.exp(
    scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  )
  total = weights.sum(-1)
  weights = drop(weights, dropout, site, _numbers(weights, dropout))
  weights = weights.astype(value.dtype)
  mixed = jnp.einsum(
    'bhqk,bkhd->bqhd',
    weights,
    value,
    precision=precision(value.dtype),
    preferred_element_type=jnp.float32,
  )
  return (mixed / total.transpose(0, 2, 1)[..., None]).astype(value.dtype)


def _has_kernel(query):
  """Returns whether cuDNN has an attention kernel for this `query`."""
  head_size = query.shape[-1]
  return (
    head_size <= 128
    and head_size % 8 == 0
    and query.dtype == jnp.bfloat16
    and jax.default_backend() == 'gpu'
  )


def _attention_by_cudnn(query, key, value, real):
  """Returns `attention` by a kernel that stores no scores (Dao et al. 2022).

  Its output is 0 at padding. The kernel itself leaves whatever was in memory
  there, and in the gradients, and 0 times that may be NaN.
  """
  lengths = real.sum(1, dtype=jnp.int32)
  real = real[..., None, None]
  query, key, value = (jnp.where(real, x, 0) for x in (query, key, value))
  mixed = jax.nn.dot_product_attention(
    query,
    key,
    value,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation='cudnn',
  )
  return jnp.where(real, mixed, 0)


def _numbers(weights, dropout):
  """Returns a (heads, L, L) number for each entry of a text's attention."""
  if dropout is None:
    return None
  _, heads, length, _ = weights.shape
  head, query, key = (
    jnp.arange(number, dtype=jnp.uint32) for number in (heads, length, length)
  )
  rows = head[:, None] * dropout.max_length + query
  return rows[..., None] * dropout.max_length + key


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
  """Returns the precision at which to multiply arrays of a dtype.

  By default accelerators round float32 to about 10 bits before they multiply;
  users who accept that choose bfloat16, which is faster still.
  """
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def buckets(distance: np.ndarray) -> np.ndarray:
  """Returns the bucket of each distance, an int: key minus query position.

  Each distance below 8 has its own bucket. Larger ones share 8 buckets whose
  bounds grow by powers of the square root of 2; the last starts at 91.
  """
  half = NUM_BUCKETS // 2
  far = np.abs(distance).astype(np.int64)
  # 8 + floor(log(far / 8) / log(128 / 8) * 8) equals floor(log2(far ** 2)) + 2,
  # which frexp computes exactly; logarithms round wrongly at powers of 2.
  shared = np.frexp((far * far).astype(np.float64))[1] + 1
  near = half // 2
  return half * (distance > 0) + np.where(
    far < near, far, np.minimum(shared, half - 1)
  )


def drop(
  x: jax.Array,
  dropout: Dropout | None,
  site: int | jax.Array,
  numbers: jax.Array | None = None,
) -> jax.Array:
  """Returns `x` with a share of its entries set to 0 and the others scaled up.

  Args:
    x: (B, ...) or (B L, D); its rows belong to the B texts in order.
    dropout: None returns `x` unchanged.
    site: () uint32, number of the mask, unique within a step.
    numbers: uint32 number of each entry of a text; None: in their order.
  """
  if dropout is None:
    return x
  texts = len(dropout.rows)
  inner = (len(x) // texts, *x.shape[1:])
  key = mix(
    dropout.rows * np.uint32(0x9E3779B1) ^ mix(dropout.seed + jnp.uint32(site))
  )
  if numbers is None:
    numbers = jnp.arange(np.prod(inner), dtype=jnp.uint32).reshape(inner)
  bits = mix(numbers[None] ^ key.reshape(texts, *[1] * len(inner)))
  # float32 holds every 24-bit integer exactly.
  kept = (bits >> 8) >= (dropout.rate * 2**24).astype(jnp.uint32)
  scale = (1 / (1 - dropout.rate)).astype(x.dtype)
  return jnp.where(kept.reshape(x.shape), x * scale, 0)


def mix(x: jax.Array) -> jax.Array:
  """Returns a hash of each uint32 entry: the finalizer of MurmurHash3."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _layer_norm(config: BodyConfig, dtype, name):
  return nn.LayerNorm(
    epsilon=config.layer_norm_epsilon,
    dtype=dtype,
    use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits.
    name=name,
  )
