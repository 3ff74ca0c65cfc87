"""Losses against slow numpy and against finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ance_jax.training import losses


def slow_softmax_nll(positive, negatives, counted):
  values = []
  for s, row, keep in zip(positive, negatives, counted, strict=True):
    scores = np.array([s, *row[keep]])
    highest = scores.max()
    values.append(np.log(np.exp(scores - highest).sum()) + highest - s)
  return np.array(values)


def slow_pairwise_nll(positive, negatives, counted):
  values = []
  for s, row, keep in zip(positive, negatives, counted, strict=True):
    pairs = [-np.log(1 / (1 + np.exp(n - s))) for n in row[keep]]
    values.append(np.mean(pairs) if pairs else 0.0)
  return np.array(values)


PAIRS = [
  pytest.param(losses.softmax_nll, slow_softmax_nll, id='softmax'),
  pytest.param(losses.pairwise_nll, slow_pairwise_nll, id='pairwise'),
]


def scores(offset, spread):
  """Scores around `offset`, with columns that are left out of each row."""
  random = np.random.default_rng(0)
  positive = offset + spread * random.normal(size=5)
  negatives = offset + spread * random.normal(size=(5, 7))
  counted = random.random((5, 7)) < 0.6
  counted[0], counted[1] = True, False
  # What float32 holds, so that both sides are given the same.
  positive, negatives = (
    x.astype(np.float32).astype(float) for x in (positive, negatives)
  )
  return positive, negatives, counted


@pytest.mark.parametrize(('loss', 'slow'), PAIRS)
@pytest.mark.parametrize(('offset', 'spread'), [(0, 2), (745, 4)])
def test_value_is_that_of_the_formula(loss, slow, offset, spread):
  positive, negatives, counted = scores(offset, spread)
  found = loss(jnp.float32(positive), jnp.float32(negatives), counted)
  np.testing.assert_allclose(
    found, slow(positive, negatives, counted), rtol=1e-6, atol=1e-6
  )


@pytest.mark.parametrize(('loss', 'slow'), PAIRS)
@pytest.mark.parametrize(('offset', 'spread'), [(0, 2), (745, 4)])
def test_gradient_is_that_of_the_formula(loss, slow, offset, spread):
  positive, negatives, counted = scores(offset, spread)
  weights = np.arange(1.0, 6.0)
  by_positive, by_negatives = jax.grad(
    lambda p, n: (loss(p, n, counted) * weights).sum(), (0, 1)
  )(jnp.float32(positive), jnp.float32(negatives))

  def difference(which, place):
    arguments = [positive, negatives]
    values = []
    for step in (1e-5, -1e-5):
      moved = [a.copy() for a in arguments]
      moved[which][place] += step
      values.append((slow(*moved, counted) * weights).sum())
    return (values[0] - values[1]) / 2e-5

  for place in np.ndindex(positive.shape):
    assert by_positive[place] == pytest.approx(difference(0, place), abs=1e-5)
  for place in np.ndindex(negatives.shape):
    assert by_negatives[place] == pytest.approx(difference(1, place), abs=1e-5)


@pytest.mark.parametrize('loss', [losses.softmax_nll, losses.pairwise_nll])
def test_gradient_is_finite_with_far_scores_and_no_negative(loss):
  positive = jnp.float32([0, 0, 900])
  negatives = jnp.float32([[900, 0], [1, 2], [-900, 0]])
  counted = np.array([[True, True], [False, False], [True, True]])
  grads = jax.grad(lambda p, n: loss(p, n, counted).sum(), (0, 1))(
    positive, negatives
  )
  assert all(np.isfinite(g).all() for g in grads)
  assert grads[1][1].tolist() == [0, 0]
