"""Token vectors -> an embedding: pooling and the layers after it.

Equivalent to the Pooling and Dense modules of sentence-transformers, for texts
padded on the right.
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
  skipped: int = 0,
) -> jax.Array:
  """Returns (B, D * number of modes), the concatenated vectors of all modes.

  Args:
    x: (B, L, D) float32 token vectors.
    lengths: (B,) int32, tokens per text without padding.
    modes: Keys of `choices.POOLINGS`.
    skipped: Number of prompt tokens to leave out at the start of each text.
      Texts without other tokens pool to 0 (sentence-transformers gives minus
      infinity for `max`), except that `cls` takes their first token.
  """
  places = jnp.arange(x.shape[1])
  kept = (places < lengths[:, None]) & (places >= skipped)
  count = jnp.maximum(lengths - skipped, 1) if skipped else lengths
  return jnp.concatenate(
    [_pooled(x, lengths, mode, kept, count, skipped) for mode in modes], -1
  )


def _pooled(x, lengths, mode, kept, count, skipped):
  """Returns the (B, D) vectors of one mode.

  Args:
    x: As for `pool`.
    lengths: As for `pool`.
    mode: Key of `choices.POOLINGS`.
    kept: (B, L) bool, the tokens to pool.
    count: (B,) int32, number of these tokens, at least 1.
    skipped: As for `pool`.
  """
  if mode == 'cls':
    if not skipped:
      return x[:, 0]
    return _at(x, jnp.where(lengths > skipped, skipped, 0))
  if mode == 'lasttoken':
    return _at(x, lengths - 1) * (lengths > skipped)[:, None]
  if mode == 'max':
    highest = jnp.where(kept[..., None], x, -jnp.inf).max(1)
    return jnp.where(kept.any(1)[:, None], highest, 0)
  if mode == 'mean':
    weights = kept / count[:, None]
  elif mode == 'mean_sqrt_len_tokens':
    weights = kept / jnp.sqrt(count)[:, None]
  else:
    weights = kept * jnp.arange(1, x.shape[1] + 1)
    weights = weights / jnp.maximum(weights.sum(1, keepdims=True), 1)
  return jnp.einsum('bld,bl->bd', x, weights, precision=bert.precision(x.dtype))


def _at(x, places):
  """Returns the (B, D) vectors at one position of each text."""
  return jnp.take_along_axis(x, places[:, None, None], 1)[:, 0]


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
