"""Token vectors -> an embedding: pooling and the layers after it.

Equivalent to the Pooling and Dense modules of sentence-transformers, for rows
with one text or several, padded on the right.
"""

from collections.abc import Sequence
import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from ance_jax.models import bert

IDENTITY = 'Identity'
# Class of torch.nn -> the same function with torch's defaults.
ACTIVATIONS = {
  'CELU': jax.nn.celu,
  'ELU': jax.nn.elu,
  'GELU': lambda x: jax.nn.gelu(x, approximate=False),
  'Hardshrink': lambda x: jnp.where(jnp.abs(x) > 0.5, x, 0),
  'Hardsigmoid': jax.nn.hard_sigmoid,
  'Hardswish': jax.nn.hard_swish,
  'Hardtanh': jax.nn.hard_tanh,
  IDENTITY: lambda x: x,
  'LeakyReLU': lambda x: jax.nn.leaky_relu(x, 0.01),
  'LogSigmoid': jax.nn.log_sigmoid,
  'LogSoftmax': jax.nn.log_softmax,
  'Mish': jax.nn.mish,
  # At inference; in training the slope is random, with this mean.
  'RReLU': lambda x: jax.nn.leaky_relu(x, (1 / 8 + 1 / 3) / 2),
  'ReLU': jax.nn.relu,
  'ReLU6': jax.nn.relu6,
  'SELU': jax.nn.selu,
  'SiLU': jax.nn.silu,
  'Sigmoid': jax.nn.sigmoid,
  'Softmax': jax.nn.softmax,
  'Softmin': lambda x: jax.nn.softmax(-x),
  'Softplus': jax.nn.softplus,
  'Softshrink': lambda x: jnp.sign(x) * jax.nn.relu(jnp.abs(x) - 0.5),
  'Softsign': jax.nn.soft_sign,
  'Tanh': jnp.tanh,
  'Tanhshrink': lambda x: x - jnp.tanh(x),
}
# Kinds of a `Layer`.
DENSE, NORM, UNIT = 'dense', 'norm', 'unit'


@dataclasses.dataclass(frozen=True)
class Layer:
  """A layer between pooling and embedding.

  Attributes:
    kind: `DENSE`, a projection with an activation; `NORM`, a LayerNorm; or
      `UNIT`, which scales vectors to length 1.
    size: Output width of a projection; 0 for other kinds.
    bias: Whether the projection has a bias.
    activation: Activation of the projection, a key of `ACTIVATIONS`.
    residual: Whether to add the input, projected if its width is not `size`.
  """

  kind: str
  size: int = 0
  bias: bool = True
  activation: str = IDENTITY
  residual: bool = False


def names(layers: Sequence[Layer]) -> list[str]:
  """Returns each layer's key in the parameters: head, head_1, ..."""
  found = [
    {DENSE: 'head', NORM: 'head_norm', UNIT: ''}[layer.kind] for layer in layers
  ]
  return [
    f'{name}_{found[:place].count(name)}' if name in found[:place] else name
    for place, name in enumerate(found)
  ]


def described(layers: Sequence[Layer]) -> str:
  """Returns a description of the layers for log lines."""
  return ' > '.join(
    {
      DENSE: f'projection to {layer.size} ({layer.activation})',
      NORM: 'LayerNorm',
      UNIT: 'length 1',
    }[layer.kind]
    for layer in layers
  )


def pool(
  x: jax.Array,
  lengths: jax.Array,
  modes: Sequence[str],
  skipped: int | jax.Array = 0,
) -> jax.Array:
  """Returns (..., D * number of modes), the concatenated vectors of all modes.

  Args:
    x: (R, L, D) float32 token vectors.
    lengths: (R,) or (R, S) int32, tokens of each text, as for `bert.Body`; the
      vectors have the same leading axes. That of a text of 0 tokens is finite
      and has no meaning.
    modes: Keys of `choices.POOLINGS`.
    skipped: Number of prompt tokens to leave out at the start of each text, for
      all or of the shape of `lengths`. Texts without other tokens pool to 0
      (sentence-transformers gives minus infinity for `max`), except that `cls`
      takes their first token.
  """
  leading = lengths.shape
  lengths = lengths.reshape(len(x), -1)
  if not isinstance(skipped, int):
    skipped = skipped.reshape(lengths.shape)
  pooled = [_pooled(x, lengths, mode, skipped) for mode in modes]
  return jnp.concatenate(pooled, -1).reshape(*leading, -1)


def _pooled(x, lengths, mode, skipped):
  """Returns the (R, S, D) vectors of one mode.

  Args:
    x: As for `pool`.
    lengths: (R, S) int32.
    mode: Key of `choices.POOLINGS`.
    skipped: int or (R, S).
  """
  ends = jnp.cumsum(lengths, 1)
  starts = ends - lengths
  first = starts + skipped
  if mode == 'cls':
    return _at(x, jnp.where(lengths > skipped, first, starts))
  if mode == 'lasttoken':
    return _at(x, ends - 1) * (lengths > skipped)[..., None]
  at = jnp.arange(x.shape[1])
  # (R, S, L), the tokens to pool.
  kept = (at < ends[..., None]) & (at >= first[..., None])
  if mode == 'max':
    return _highest(x, kept)
  count = jnp.maximum(lengths - skipped, 1)[..., None]
  if mode == 'mean':
    weights = kept / count
  elif mode == 'mean_sqrt_len_tokens':
    weights = kept / jnp.sqrt(count)
  else:
    weights = kept * (at + 1 - starts[..., None])
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1)
  return jnp.einsum(
    'rld,rsl->rsd', x, weights, precision=bert.precision(x.dtype)
  )


def _highest(x, kept):
  """Returns the (R, S, D) largest entries of the tokens of each text."""

  @jax.checkpoint
  def of_text(kept):
    highest = jnp.where(kept[..., None], x, -jnp.inf).max(1)
    return jnp.where(kept.any(1)[:, None], highest, 0)

  # One text of each row at a time, to hold (R, L, D) and not S times as much.
  return jnp.moveaxis(jax.lax.map(of_text, jnp.moveaxis(kept, 1, 0)), 0, 1)


def _at(x, places):
  """Returns the (R, S, D) vectors at one token of each text."""
  # A row may have fewer than S texts.
  places = jnp.clip(places, 0, x.shape[1] - 1)
  return jnp.take_along_axis(x, places[..., None], 1)


def unit(x: jax.Array) -> jax.Array:
  """Scales vectors to length 1, with the epsilon of torch's `normalize`."""
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def apply(layers: Sequence[Layer], x: jax.Array) -> jax.Array:
  """Applies layers to (B, D) float32 vectors, inside a Flax module."""
  for layer, name in zip(layers, names(layers), strict=True):
    if layer.kind == UNIT:
      x = unit(x)
    elif layer.kind == NORM:
      x = nn.LayerNorm(1e-5, use_fast_variance=False, name=name)(x)
    else:
      x = _projected(layer, name, x)
  return x


def _projected(layer, name, x):
  """Applies a projection to (B, D) vectors."""

  def dense(bias, name):
    # The code of ANCE and of DPR initializes it like the body.
    return nn.Dense(
      layer.size,
      use_bias=bias,
      precision=bert.precision(x.dtype),
      kernel_init=bert.INITIALIZER,
      name=name,
    )

  out = ACTIVATIONS[layer.activation](dense(layer.bias, name)(x))
  if not layer.residual:
    return out
  if x.shape[-1] == layer.size:
    return out + x
  return out + dense(False, f'{name}_residual')(x)
