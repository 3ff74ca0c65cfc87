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
# Rows longer than twice this many tokens attend in parts, so that no array of
# (heads, L, L) is stored.
_QUERIES_AT_ONCE = 512


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
    attention_dropout: Share of attention weights dropped when the checkpoint
      was trained; 0 says that it was trained without.
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
  attention_dropout: float = dataclasses.field(default=0.1, compare=False)

  @property
  def max_length(self) -> int:
    """Maximum number of tokens in a text."""
    return self.max_positions - POSITIONS_BEFORE[self.model_type]


class Dropout(NamedTuple):
  """Selects the entries to drop. Functions take None for no dropout.

  Each mask is a function of the text, the place in it and the channel or, for
  attention weights, of the text, the head and two places; so it depends neither
  on padding nor on which texts share a row or a device.

  Attributes:
    rate: () float32, share of activations to drop.
    attention_rate: () float32, share of attention weights to drop; None for
      none.
    seed: () uint32, different at each step.
    numbers: (R,) or (R, S) uint32, number of each text in the global batch.
    max_length: int, or an array like `numbers`: the most tokens that each text
      may have, by which its attention weights are numbered.
  """

  rate: jax.Array
  attention_rate: jax.Array | None
  seed: jax.Array
  numbers: jax.Array
  max_length: int | jax.Array


class Layout(NamedTuple):
  """Which token of which text is where in R rows of L tokens.

  Attributes:
    texts: (R, L) int32, the text in its row that each token is of; -1 for
      padding.
    places: (1, L) or (R, L) int32, place of each token in its text.
    is_packed: Whether a row may have several texts.
  """

  texts: jax.Array
  places: jax.Array
  is_packed: bool


def layout(lengths: jax.Array, length: int) -> Layout:
  """Returns the `Layout` of rows of texts, one after another, then padding.

  Args:
    lengths: (R,) int32, tokens of each row's one text, or (R, S) of its texts
      in order; 0 for no text.
    length: L, tokens per row.
  """
  at = jnp.arange(length, dtype=jnp.int32)
  if lengths.ndim == 1:
    texts = jnp.where(at < lengths[:, None], 0, -1)
    return Layout(texts, at[None], False)
  ends = jnp.cumsum(lengths, 1)
  before = ends[:, None] <= at[:, None]
  texts = before.sum(-1, dtype=jnp.int32)
  # Padding is behind the last text, and counts its places from there.
  starts = jnp.where(before, lengths[:, None], 0).sum(-1)
  real = at < ends[:, -1:]
  return Layout(jnp.where(real, texts, -1), at - starts, True)


def flops(
  config: BodyConfig,
  num_tokens: int | jax.Array,
  length: int | float | jax.Array,
) -> int | float | jax.Array:
  """Returns the operations of the forward pass, two per multiply-add.

  Args:
    config: Sizes of the body.
    num_tokens: Tokens of all texts, padding included, a number or an array.
    length: Tokens per row, padding included, a number or an array.
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
    """Returns (R, L, D) activations.

    Args:
      ids: (R, L) int32 token ids, padded on the right.
      lengths: (R,) int32, tokens of each row's one text without padding; or
        (R, S) of the texts that share a row, one after another, 0 for none. No
        token sees another text.
      dropout: None for no dropout.
      types: (R, L) int32 token types for pairs of texts; None for all 0.
    """
    c = self.config
    rows, length = ids.shape
    where = layout(lengths, length)
    masks = None if dropout is None else _of_tokens(dropout, where)
    x = self._table('word_embedding', c.vocab_size)[ids]
    x += self._table('position_embedding', c.max_positions)[
      POSITIONS_BEFORE[c.model_type] + where.places
    ]
    if c.num_types:
      x += self._table('type_embedding', c.num_types)[
        0 if types is None else types
      ]
    x = x.astype(self.dtype).reshape(rows * length, -1)
    x = _layer_norm(c, self.dtype, 'embedding_norm')(x)
    x = drop(x, masks, 0)
    bias = (
      RelativeBias(c.num_heads, name='relative')(length)
      if c.model_type == 'mpnet'
      else None
    )
    if self.remat:
      x = self._layers_in_a_loop(x, where, bias, masks)
    else:
      for number in range(c.num_layers):
        x = Layer(c, self.dtype, self.kernel, name=f'layer_{number}')(
          x, where, bias, masks, 3 * number + 1
        )
    return x.reshape(rows, length, -1)

  def _layers_in_a_loop(self, x, where, bias, masks):
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
      return layer.apply({'params': params}, x, where, bias, masks, site), None

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
    where: Layout,
    bias: jax.Array | None,
    masks: '_Masks | None',
    site: int | jax.Array,
  ) -> jax.Array:
    """Returns (R L, D) activations.

    Args:
      x: (R L, D) activations.
      where: The texts in the rows.
      bias: (heads, L, L) float32, added to the attention scores.
      masks: None for no dropout.
      site: () uint32, number of the first of the layer's three dropout masks.
    """
    c = self.config
    heads = (*where.texts.shape, c.num_heads, c.hidden_size // c.num_heads)
    query, key, value = (
      self._dense(c.hidden_size, name)(x).reshape(heads)
      for name in ('query', 'key', 'value')
    )
    keeps_all = masks is None or masks.attention_rate is None
    if self.kernel and keeps_all and bias is None and _has_kernel(query):
      mixed = _attention_by_cudnn(query, key, value, where)
    else:
      mixed = attention(query, key, value, where, bias, masks, site)
    mixed = self._dense(c.hidden_size, 'output')(mixed.reshape(x.shape))
    x = _layer_norm(c, self.dtype, 'attention_norm')(
      x + drop(mixed, masks, site + 1)
    )
    inner = ACTIVATIONS[c.activation](self._dense(c.intermediate_size, 'up')(x))
    inner = drop(self._dense(c.hidden_size, 'down')(inner), masks, site + 2)
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
  where: Layout,
  bias: jax.Array | None,
  masks: '_Masks | None',
  site: int | jax.Array,
) -> jax.Array:
  """Returns scaled dot-product attention (Vaswani et al. 2017, eq. 1).

  Each token attends to the tokens of its own text; what padding gets has no
  meaning.

  Args:
    query: (R, L, heads, d).
    key: (R, L, heads, d).
    value: (R, L, heads, d).
    where: The texts in the rows; a row that is not packed has at least one
      token.
    bias: (heads, L, L) float32, added to the scaled products.
    masks: Applied to the attention weights; None for no dropout.
    site: () uint32, number of the dropout mask.

  Returns:
    (R, L, heads, d), of the dtype of `value`.
  """
  length, size = query.shape[1], _QUERIES_AT_ONCE
  if masks is not None and masks.attention_rate is None:
    masks = None
  if length <= 2 * size or bias is not None:
    return _attend(query, where.texts, masks, key, value, where, bias, site)

  def parts(x):
    """(R, L, ...) -> (parts, R, size, ...), the last token repeated."""
    rest = [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, [(0, 0), (0, -length % size), *rest], mode='edge')
    return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)

  if masks is not None:
    masks = masks._replace(
      **{
        name: jnp.broadcast_to(getattr(masks, name), where.texts.shape)
        for name in ('numbers', 'places', 'strides')
      }
    )

  @jax.checkpoint
  def of_part(part):
    query, texts, by_token = part
    of_queries = masks and masks._replace(**by_token)
    return _attend(query, texts, of_queries, key, value, where, None, site)

  by_token = masks and {
    name: parts(getattr(masks, name))
    for name in ('numbers', 'places', 'strides')
  }
  mixed = jax.lax.map(of_part, (parts(query), parts(where.texts), by_token))
  mixed = jnp.moveaxis(mixed, 0, 1).reshape(len(query), -1, *query.shape[2:])
  return mixed[:, :length]


def _attend(query, texts, masks, key, value, where, bias, site):
  """Returns `attention` for some of the tokens.

  Args:
    query: (R, q, heads, d).
    texts: (R, q) int32, the text of each of these tokens.
    masks: Dropout masks of these tokens; None for no dropout.
    key: As for `attention`.
    value: As for `attention`.
    where: The texts of all tokens.
    bias: (heads, q, L) float32.
    site: As for `attention`.
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
  visible = _visible(texts, where)
  scores = jnp.where(visible[:, None], scores, -jnp.inf)
  weights = jnp.exp(
    scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  )
  total = weights.sum(-1)
  if masks is not None:
    number = _weight_numbers(masks, where.places, query.shape[2])
    number = number ^ _keys(masks, site)[:, None, :, None]
    weights = _kept(weights, number, masks.attention_rate)
  weights = weights.astype(value.dtype)
  mixed = jnp.einsum(
    'bhqk,bkhd->bqhd',
    weights,
    value,
    precision=precision(value.dtype),
    preferred_element_type=jnp.float32,
  )
  return (mixed / total.transpose(0, 2, 1)[..., None]).astype(value.dtype)


def _visible(texts, where):
  """Returns (R, 1 or q, L) bool, whether a token sees another.

  In packed rows padding is a text of its own, so that each token sees one.

  Args:
    texts: (R, q) int32, the texts of the tokens that see.
    where: The texts of all tokens.
  """
  if not where.is_packed:
    return (where.texts >= 0)[:, None]
  return texts[:, :, None] == where.texts[:, None]


def _has_kernel(query):
  """Returns whether cuDNN has an attention kernel for this `query`."""
  head_size = query.shape[-1]
  return (
    head_size <= 128
    and head_size % 8 == 0
    and query.dtype == jnp.bfloat16
    and jax.default_backend() == 'gpu'
  )


def _attention_by_cudnn(query, key, value, where):
  """Returns `attention` by a kernel that stores no scores (Dao et al. 2022).

  Its output is 0 at padding. The kernel itself leaves whatever was in memory
  there, and in the gradients, and 0 times that may be NaN.
  """
  real = where.texts >= 0
  if where.is_packed:
    visible = {'mask': _visible(where.texts, where)[:, None]}
  else:
    lengths = real.sum(1, dtype=jnp.int32)
    visible = {'query_seq_lengths': lengths, 'key_value_seq_lengths': lengths}
  real = real[..., None, None]
  query, key, value = (jnp.where(real, x, 0) for x in (query, key, value))
  mixed = jax.nn.dot_product_attention(
    query, key, value, implementation='cudnn', **visible
  )
  return jnp.where(real, mixed, 0)


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


class _Masks(NamedTuple):
  """A `Dropout` by token.

  Attributes:
    rate: As in `Dropout`.
    attention_rate: As in `Dropout`.
    seed: As in `Dropout`.
    numbers: (R, 1 or L) uint32, number of each token's text.
    places: (1 or R, L) uint32, place of each token in its text.
    strides: () or (R, 1 or L) uint32, most tokens of each token's text.
  """

  rate: jax.Array
  attention_rate: jax.Array | None
  seed: jax.Array
  numbers: jax.Array
  places: jax.Array
  strides: jax.Array


def _of_tokens(dropout, where):
  """Returns the `_Masks` of a `Dropout` in a `Layout`."""

  def by_token(of_texts):
    of_texts = jnp.asarray(of_texts, jnp.uint32)
    if not of_texts.ndim:
      return of_texts
    if not where.is_packed:
      return of_texts[:, None]
    # What is dropped of padding does not matter.
    return jnp.take_along_axis(of_texts, jnp.maximum(where.texts, 0), 1)

  places = where.places.astype(jnp.uint32)
  numbers, strides = by_token(dropout.numbers), by_token(dropout.max_length)
  return _Masks(*dropout[:3], numbers, places, strides)


def _keys(masks, site):
  """Returns (R, 1 or L) uint32, different for each text, step and site."""
  seed = mix(masks.seed + jnp.uint32(site))
  return mix(masks.numbers * np.uint32(0x9E3779B1) ^ seed)


def _weight_numbers(masks, places, heads):
  """Returns the (1 or R, heads, q, L) number of each entry of attention.

  Args:
    masks: Dropout masks of the q query tokens.
    places: (1 or R, L) int32, places of all tokens.
    heads: Number of heads.
  """
  head = jnp.arange(heads, dtype=jnp.uint32)[:, None, None]
  strides = masks.strides
  if strides.ndim:
    strides = strides[:, None, :, None]
  rows = head * strides + masks.places[:, None, :, None]
  return rows * strides + places.astype(jnp.uint32)[:, None, None]


def drop(
  x: jax.Array, masks: _Masks | None, site: int | jax.Array
) -> jax.Array:
  """Returns `x` with a share of its entries set to 0 and the others scaled up.

  Args:
    x: (R L, D) activations.
    masks: None returns `x` unchanged.
    site: () uint32, number of the mask, unique within a step.
  """
  if masks is None:
    return x
  width = x.shape[-1]
  channels = jnp.arange(width, dtype=jnp.uint32)
  numbers = masks.places[..., None] * np.uint32(width) + channels
  numbers = numbers ^ _keys(masks, site)[..., None]
  return _kept(x, numbers.reshape(x.shape), masks.rate)


def _kept(x, numbers, rate):
  """Returns `x`, without those entries that the hash of their number drops."""
  # float32 holds every 24-bit integer exactly.
  kept = (mix(numbers) >> 8) >= (rate * 2**24).astype(jnp.uint32)
  scale = (1 / (1 - rate)).astype(x.dtype)
  return jnp.where(kept, x * scale, 0)


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
