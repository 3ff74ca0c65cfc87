"""From token vectors to an embedding: pooling, and the layers behind it.

As sentence-transformers computes them in its Pooling and Dense modules, for
texts that are padded on the right.
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from ance_jax.models import bert

IDENTITY = 'Identity'
# Classes of torch.nn -> the same function, with torch's defaults.
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
  # Its slope is random in training, and this mean of it otherwise.
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
    kind: `DENSE`, a projection and an activation; `NORM`, a LayerNorm; or
      `UNIT`, which makes vectors of length 1.
    size: Width of what comes out of a projection; else 0.
    bias: Whether a projection has one.
    activation: Its activation, a key of `ACTIVATIONS`.
    residual: Whether what went in is added, projected if it is of another
      width.
  """

  kind: str
  size: int = 0
  bias: bool = True
  activation: str = IDENTITY
  residual: bool = False


def names(layers):
  """Returns the name of each layer among the parameters: head, head_1, ..."""
  found, counts = [], {}
  for layer in layers:
    name = {DENSE: 'head', NORM: 'head_norm', UNIT: ''}[layer.kind]
    number = counts.get(name, 0)
    counts[name] = number + 1
    found.append(f'{name}_{number}' if number else name)
  return found


def described(layers):
  """Returns what layers do, for people."""
  return ' > '.join(
    {
      DENSE: f'projection to {layer.size} ({layer.activation})',
      NORM: 'LayerNorm',
      UNIT: 'length 1',
    }[layer.kind]
    for layer in layers
  )


def pool(x, lengths, modes, skipped=0):
  """Returns (B, D * number of modes): the vectors of each mode, joined.

  Args:
    x: (B, L, D) float32 token vectors.
    lengths: (B,) int32, tokens of each text that are not padding.
    modes: Some of `choices.POOLINGS`.
    skipped: int, tokens at the start of each text that are left out: those of
      a prompt. Where nothing else is left, vectors are 0 (of `max`,
      sentence-transformers has minus infinity), and the first token's is its
      own.
  """
  places = jnp.arange(x.shape[1])
  kept = (places < lengths[:, None]) & (places >= skipped)
  count = jnp.maximum(lengths - skipped, 1) if skipped else lengths
  found = [_pooled(x, lengths, mode, kept, count, skipped) for mode in modes]
  return found[0] if len(found) == 1 else jnp.concatenate(found, -1)


def _pooled(x, lengths, mode, kept, count, skipped):
  """Returns the (B, D) vectors of one mode.

  Args:
    kept: (B, L) bool, the tokens that are pooled.
    count: (B,) int32, how many these are, at least 1.
    others: As for `pool`.
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
  """Returns the (B, D) vectors at one place of each text."""
  return jnp.take_along_axis(x, places[:, None, None], 1)[:, 0]


def unit(x):
  """Returns vectors of length 1, as torch's normalize has them."""
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def apply(layers, x):
  """Returns what layers make of vectors, inside of a Flax module.

  Args:
    layers: `Layer`s, in order.
    x: (B, D) float32.
  """
  for layer, name in zip(layers, names(layers), strict=True):
    if layer.kind == UNIT:
      x = unit(x)
    elif layer.kind == NORM:
      x = nn.LayerNorm(1e-5, use_fast_variance=False, name=name)(x)
    else:
      x = _projected(layer, name, x)
  return x


def _projected(layer, name, x):
  """Returns what a projection makes of (B, D) vectors."""

  def dense(bias, name):
    # Both papers' code starts it as the body is.
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
