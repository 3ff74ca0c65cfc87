"""The optimizers against their rules in slow numpy; the learning rate."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from ance_jax.training import optimizers

# Tensors whose norms are below, far above, and exactly 0, as new biases are.
SHAPES = {
  'dense': {'kernel': ((6, 5), 0.3), 'bias': ((5,), 0.0)},
  'word_embedding': ((200, 8), 2.0),
  'norm': {'scale': ((8,), 0.5)},
}
STEPS = 4


def draw(random, scale=None):
  def array(leaf):
    shape, std = leaf
    std = std if scale is None else scale
    return (random.standard_normal(shape) * std).astype(np.float32)

  return jax.tree.map(array, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def train(config, params, gradients):
  """Returns the parameters after one step with each of the gradients."""
  optimizer = optimizers.make(config)
  state = optimizer.init(params)
  for grads in gradients:
    clipped = optimizers.clip(config, grads)
    updates, state = optimizer.update(clipped, state, params)
    params = optax.apply_updates(params, updates)
  return jax.tree.map(np.asarray, params)


def slow_step(config, name, w, g, m, v, step):
  """Returns the next (w, m, v) of one tensor, float64, and its trust ratio."""
  rate = config.learning_rate * (1 - step / config.max_steps)
  m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
  if config.optimizer == 'adamw':
    corrected = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
    update = corrected[0] / (np.sqrt(corrected[1]) + config.adam_epsilon)
  else:
    update = m / (np.sqrt(v) + config.adam_epsilon)
  if name not in ('bias', 'scale'):
    update = update + config.weight_decay * w
  ratio = 1.0
  if config.optimizer == 'lamb':
    norms = min(np.linalg.norm(w), 10), np.linalg.norm(update)
    ratio = norms[0] / norms[1] if min(norms) > 0 else 1.0
  return w - rate * ratio * update, m, v, ratio


@pytest.mark.parametrize('optimizer', ['adamw', 'lamb'])
def test_steps_are_those_of_the_rule(tiny, optimizer):
  config = dataclasses.replace(
    tiny,
    optimizer=optimizer,
    learning_rate=0.05,
    lr_warmup_steps=0,
    max_steps=10,
    weight_decay=0.1,
    clip_norm=1.0,
  )
  random = np.random.default_rng(0)
  params = draw(random)
  gradients = [draw(random, 1.0) for _ in range(STEPS)]
  found = train(config, params, gradients)
  clipped = []
  for grads in gradients:
    leaves = jax.tree.leaves(grads)
    norm = np.sqrt(sum((g.astype(float) ** 2).sum() for g in leaves))
    assert norm > config.clip_norm
    clipped.append(jax.tree.map(lambda g, n=norm: g.astype(float) / n, grads))
  ratios = {}
  for path, start in jax.tree.leaves_with_path(params):
    w, m, v = start.astype(float), 0.0, 0.0
    for step, grads in enumerate(clipped):
      (g,) = (x for p, x in jax.tree.leaves_with_path(grads) if p == path)
      w, m, v, ratio = slow_step(config, path[-1].key, w, g, m, v, step)
      ratios[path[-1].key, step] = ratio
    (got,) = (x for p, x in jax.tree.leaves_with_path(found) if p == path)
    # Of float32 parameters of up to 8, four times rounded.
    np.testing.assert_allclose(got, w, rtol=1e-6, atol=2e-6)
    assert np.abs(w - start).max() > 1e-3
  if optimizer == 'lamb':
    # A bias that is 0 moves by the plain rate once, and is clamped to none.
    assert ratios['bias', 0] == 1
    assert ratios['bias', 1] != 1


def test_lamb_clamps_the_norm_of_a_tensor_to_ten(tiny):
  config = dataclasses.replace(
    tiny, optimizer='lamb', lr_warmup_steps=0, clip_norm=0, weight_decay=0
  )
  random = np.random.default_rng(0)
  params = draw(random)
  norm = np.linalg.norm(params['word_embedding'])
  assert norm > 50
  grads = draw(random, 1e-3)
  new = train(config, params, [grads])['word_embedding']
  moved = np.linalg.norm(new - params['word_embedding'])
  # A trust ratio of 10 / |u| times |u|; float32 parameters of norm 80 round.
  assert moved == pytest.approx(config.learning_rate * 10, rel=1e-4)


def test_lamb_leaves_a_tensor_without_gradient_where_it_is(tiny):
  config = dataclasses.replace(tiny, optimizer='lamb', lr_warmup_steps=0)
  params = draw(np.random.default_rng(0))
  zeros = jax.tree.map(np.zeros_like, params)
  found = train(config, params, [zeros, zeros])
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_parameter_is_named_without_the_tower_that_it_is_in(tiny):
  config = dataclasses.replace(tiny, trainable='^norm/')
  grads = {'tied': draw(np.random.default_rng(0), 1.0)}
  found = optimizers.of_trainable(config, grads)
  moving = {
    name
    for name, tree in found['tied'].items()
    if any(leaf.any() for leaf in jax.tree.leaves(tree))
  }
  assert moving == {'norm'}


def test_learning_rate_rises_to_its_peak_and_falls_to_zero_at_the_end(tiny):
  config = dataclasses.replace(tiny, lr_warmup_steps=10, max_steps=110)
  rate = optimizers.learning_rate_schedule(config)
  found = [float(rate(s)) for s in (0, 5, 10, 60, 110, 120)]
  peak = config.learning_rate
  np.testing.assert_allclose(
    found, [0, peak / 2, peak, peak / 2, 0, 0], atol=1e-6 * peak
  )
