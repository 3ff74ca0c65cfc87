"""The transformer body: BERT, RoBERTa, DistilBERT, MPNet.

Devlin et al. 2019, Liu et al. 2019, Sanh et al. 2019, Song et al. 2020. The
mathematics is theirs; three habits make it faster on CPUs and change only
rounding and which random numbers dropout draws: activations are (B L, D)
everywhere but in attention, attention weights are normalised after their
product with the values, and dropout masks are a hash of their position.
"""

import dataclasses
import functools
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np


def gelu(x):
  """Returns x times the normal distribution's share below it, as torch does.

  In float32 inside. Flax's own, by erfc, took 2.6 times as long on a CPU and,
  at the widths of BERT-base on a GPU, a quarter of the time of a layer.
  """
  wide = x.astype(jnp.float32)
  return (0.5 * wide * (1 + lax.erf(wide * np.float32(0.5**0.5)))).astype(
    x.dtype
  )


ACTIVATIONS = {
  'gelu': gelu,
  'gelu_new': lambda x: nn.gelu(x, approximate=True),
  'relu': nn.relu,
}
# Position embeddings that stand before that of the first token.
POSITIONS_BEFORE = {'bert': 0, 'roberta': 2, 'distilbert': 0, 'mpnet': 2}
# Rows of MPNet's relative bias: half of them for keys before the query.
NUM_BUCKETS = 32
# The weights' own standard deviation at the start, as in all four's code.
INITIALIZER = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class BodyConfig:
  """Sizes of a transformer body.

  Attributes:
    model_type: Key of `POSITIONS_BEFORE`; 'mpnet' has a relative bias too.
    vocab_size: Entries of the vocabulary.
    hidden_size: D, width of an activation.
    num_layers: Transformer layers.
    num_heads: Attention heads; they divide `hidden_size`.
    intermediate_size: Width of the feed-forward layers.
    max_positions: Rows of the position embedding.
    num_types: Rows of the token type embedding, of which retrievers use row 0
      alone; 0: there is none.
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
  def max_length(self):
    """Tokens that a text may have at most."""
    return self.max_positions - POSITIONS_BEFORE[self.model_type]


class Dropout(NamedTuple):
  """What decides which entries are dropped; None in its place: no dropout.

  Attributes:
    rate: () float32, share of entries that are dropped.
    seed: () uint32, another one each step.
    rows: (B,) uint32, number of each text in the whole batch, so that a text
      loses the same entries on however many devices the batch is dealt out.
  """

  rate: jax.Array
  seed: jax.Array
  rows: jax.Array


def flops(config, num_tokens, length):
  """Returns the operations of the forward pass, two for each multiply-add.

  Args:
    config: `BodyConfig`.
    num_tokens: Tokens, padding included.
    length: Those of a text.
  """
  width, inner = config.hidden_size, config.intermediate_size
  a_token = 2 * (4 * width**2 + 2 * width * inner) + 4 * length * width
  return config.num_layers * a_token * num_tokens


class Body(nn.Module):
  """Token ids -> the last layer's activations.

  Attributes:
    config: Sizes.
    dtype: Type of the activations; parameters are float32.
    remat: Whether the backward pass computes each layer anew from its input,
      instead of keeping all that is between (Chen et al. 2016).
    kernel: Whether attention may be cuDNN's, where it has one.
  """

  config: BodyConfig
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  kernel: bool = True

  @nn.compact
  def __call__(self, ids, lengths, dropout=None, types=None):
    """Returns (B, L, D) activations.

    Args:
      ids: (B, L) int32 token ids, padded on the right.
      lengths: (B,) int32, tokens of each text that are not padding.
      dropout: A `Dropout`, or None.
      types: (B, L) int32 token types, of pairs of texts; None: all are 0.
    """
    c = self.config
    batch, length = ids.shape
    first = POSITIONS_BEFORE[c.model_type]
    places = slice(first, first + length)
    x = self._table('word_embedding', c.vocab_size)[ids]
    x += self._table('position_embedding', c.max_positions)[places]
    if c.num_types:
      x += self._table('type_embedding', c.num_types)[
        0 if types is None else types
      ]
    x = x.astype(self.dtype).reshape(batch * length, -1)
    x = _layer_norm(c, self.dtype, 'embedding_norm')(x)
    x = drop(x, dropout, 0)
    real = jnp.arange(length) < lengths[:, None]
    bias = None
    if c.model_type == 'mpnet':
      bias = RelativeBias(c.num_heads, name='relative')(length)
    if self.remat:
      x = self._layers_in_a_loop(x, real, bias, dropout)
    else:
      for number in range(c.num_layers):
        layer = Layer(c, self.dtype, self.kernel, name=f'layer_{number}')
        x = layer(x, real, bias, dropout, 3 * number + 1)
    return x.reshape(batch, length, -1)

  def _layers_in_a_loop(self, x, real, bias, dropout):
    """Returns what the layers make of `x`, and keeps only what each is given.

    One after the other, XLA on CPUs would compute them all anew at once, and
    save 4%: it drops the barriers that are to keep them apart.
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
    return lax.scan(apply, x, (stacked, sites))[0]

  def _table(self, name, rows):
    return self.param(name, INITIALIZER, (rows, self.config.hidden_size))


class RelativeBias(nn.Module):
  """Number of tokens -> what is added to the scores of all of MPNet's layers.

  A query and a key share a learned number a head with all pairs whose distance
  falls into the same bucket (Raffel et al. 2020, T5, section 2.1).
  """

  num_heads: int

  @nn.compact
  def __call__(self, length):
    """Returns (heads, L, L) float32, by query and key."""
    # Named so that it is not decayed: theirs is called a bias, too.
    table = self.param('bias', INITIALIZER, (NUM_BUCKETS, self.num_heads))
    place = np.arange(length)
    return table[buckets(place - place[:, None])].transpose(2, 0, 1)


class Layer(nn.Module):
  """One transformer layer, LayerNorm after each residual sum."""

  config: BodyConfig
  dtype: jnp.dtype
  kernel: bool = True

  @nn.compact
  def __call__(self, x, real, bias, dropout, site):
    """Returns (B L, D) activations.

    Args:
      x: (B L, D) activations.
      real: (B, L) bool, false for padding.
      bias: (heads, L, L) float32, added to the scores, or None.
      dropout: A `Dropout`, or None.
      site: int or () uint32, the first of three numbers for the layer's
        dropout masks.
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
    mixed = drop(mixed, dropout, site + 1)
    x = _layer_norm(c, self.dtype, 'attention_norm')(x + mixed)
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


def attention(query, key, value, real, bias, dropout, site):
  """Returns scaled dot-product attention (Vaswani et al. 2017, eq. 1).

  Args:
    query: (B, L, heads, d), as are `key` and `value`.
    key: What each query position is compared with.
    value: What is averaged.
    real: (B, L) bool, the positions that may be looked at; one at least.
    bias: (heads, L, L) float32, added to the scaled products, or None.
    dropout: A `Dropout` on the weights, or None.
    site: int or () uint32, number of the dropout mask.

  Returns:
    (B, L, heads, d) of the dtype of `value`.
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
  highest = lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(scores - highest)
  total = weights.sum(-1)
  weights = drop(weights, dropout, site).astype(value.dtype)
  mixed = jnp.einsum(
    'bhqk,bkhd->bqhd',
    weights,
    value,
    precision=precision(value.dtype),
    preferred_element_type=jnp.float32,
  )
  return (mixed / total.transpose(0, 2, 1)[..., None]).astype(value.dtype)


def _has_kernel(query):
  """Returns whether cuDNN has a kernel for this attention."""
  head_size = query.shape[-1]
  fits = head_size <= 128 and head_size % 8 == 0
  return fits and query.dtype == jnp.bfloat16 and jax.default_backend() == 'gpu'


def _attention_by_cudnn(query, key, value, real):
  """Returns `attention` by one kernel that keeps no scores (Dao et al. 2022).

  Where a text is padding it gives 0, which nothing looks at.
  """
  lengths = real.sum(1, dtype=jnp.int32)
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation='cudnn',
  )


def precision(dtype):
  """Returns how products of two arrays of a type are to be computed.

  Without it accelerators round float32 to some 10 bits before they multiply,
  and who wants that asks for bfloat16, which is faster yet.
  """
  return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def buckets(distance):
  """Returns the bucket of each entry of an int array: key less query place.

  Distances below 8 have one of their own, those from 8 to 127 share 8 that grow
  in powers of the square root of 2, and the last holds all from 91 on.
  """
  half = NUM_BUCKETS // 2
  far = np.abs(distance).astype(np.int64)
  # 8 + floor(log(far / 8) / log(128 / 8) * 8) without logarithms, whose
  # rounding decides at powers of 2: it is floor(log2(far ** 2)) + 2.
  shared = np.frexp((far * far).astype(np.float64))[1] + 1
  near = half // 2
  bucket = np.where(far < near, far, np.minimum(shared, half - 1))
  return bucket + half * (distance > 0)


def drop(x, dropout, site):
  """Returns `x` with a share of its entries 0, the others scaled up.

  Args:
    x: (B, ...) or (B L, D) array; its rows belong to the B texts in order.
    dropout: A `Dropout`, or None for `x` itself.
    site: int or () uint32, number of this mask; each mask of a step has its
      own.
  """
  if dropout is None:
    return x
  texts = len(dropout.rows)
  inner = (len(x) // texts, *x.shape[1:])
  key = mix(
    dropout.rows * np.uint32(0x9E3779B1) ^ mix(dropout.seed + jnp.uint32(site))
  )
  position = jnp.arange(np.prod(inner), dtype=jnp.uint32).reshape(1, *inner)
  bits = mix(position ^ key.reshape(texts, *[1] * len(inner)))
  # 24 bits: all of them, and no more, are exact in float32.
  kept = (bits >> 8) >= (dropout.rate * 2**24).astype(jnp.uint32)
  scale = (1 / (1 - dropout.rate)).astype(x.dtype)
  return jnp.where(kept.reshape(x.shape), x * scale, 0)


def mix(x):
  """Returns a hash of each entry of a uint32 array (MurmurHash3's end)."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _layer_norm(config, dtype, name):
  return nn.LayerNorm(
    epsilon=config.layer_norm_epsilon,
    dtype=dtype,
    use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits.
    name=name,
  )
