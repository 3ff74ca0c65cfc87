"""Losses against slow numpy and against finite differences in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ance_jax.training import losses
from ance_jax.training import methods


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


def make_columns(offset, spread):
  """Scores around `offset`, with columns that are left out of each row."""
  random = np.random.default_rng(0)
  positive = offset + spread * random.normal(size=5)
  others = offset + spread * random.normal(size=(5, 7))
  counted = random.random((5, 7)) < 0.6
  counted[0], counted[1] = True, False
  # What float32 holds, so that both sides are given the same.
  positive, others = (
    x.astype(np.float32).astype(float) for x in (positive, others)
  )
  return losses.Columns(positive, others, counted)


def on_device(columns):
  return jax.tree.map(jnp.asarray, columns)


@pytest.mark.parametrize(('loss', 'slow'), PAIRS)
@pytest.mark.parametrize(('offset', 'spread'), [(0, 2), (745, 4)])
def test_value_is_that_of_the_formula(loss, slow, offset, spread):
  columns = make_columns(offset, spread)
  np.testing.assert_allclose(
    loss(on_device(columns)), slow(*columns[:3]), rtol=1e-6, atol=1e-6
  )


@pytest.mark.parametrize(('loss', 'slow'), PAIRS)
@pytest.mark.parametrize(('offset', 'spread'), [(0, 2), (745, 4)])
def test_gradient_is_that_of_the_formula(loss, slow, offset, spread):
  *scores, counted = make_columns(offset, spread)[:3]
  weights = np.arange(1.0, 6.0)
  found = jax.grad(
    lambda scores: (loss(losses.Columns(*scores, counted)) * weights).sum()
  )([jnp.float32(x) for x in scores])

  def difference(which, place):
    values = []
    for step in (1e-5, -1e-5):
      moved = [a.copy() for a in scores]
      moved[which][place] += step
      values.append((slow(*moved, counted) * weights).sum())
    return (values[0] - values[1]) / 2e-5

  for which, gradient in enumerate(found):
    for place in np.ndindex(gradient.shape):
      expected = difference(which, place)
      assert gradient[place] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
  'name',
  sorted(
    {
      row.loss
      for row in methods.METHODS.values()
      if not (row.searches or row.teacher)
    }
  ),
)
def test_a_loss_depends_on_differences_of_scores_alone(name):
  """`diagnostics.gradient_norms` calls each with the positive's score as 0."""
  loss = getattr(losses, name)
  columns = make_columns(0, 2)
  moved = columns._replace(
    positive=np.zeros(5), others=columns.others - columns.positive[:, None]
  )
  found, expected = (loss(on_device(one)) for one in (moved, columns))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('loss', [losses.softmax_nll, losses.pairwise_nll])
def test_gradient_is_finite_with_far_scores_and_no_negative(loss):
  positive = jnp.float32([0, 0, 900])
  others = jnp.float32([[900, 0], [1, 2], [-900, 0]])
  counted = np.array([[True, True], [False, False], [True, True]])
  grads = jax.grad(
    lambda p, n: loss(losses.Columns(p, n, counted)).sum(), (0, 1)
  )(positive, others)
  assert all(np.isfinite(g).all() for g in grads)
  assert grads[1][1].tolist() == [0, 0]


def slow_distillation(columns):
  values = []
  for s, row, keep, t, taught in zip(*columns, strict=True):
    own, teacher = np.array([s, *row[keep]]), np.array([t, *taught[keep]])
    p, q = (
      np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (own, teacher)
    )
    values.append((q * (np.log(q) - np.log(p))).sum())
  return np.array(values)


def slow_margin_mse(columns):
  values = []
  for s, row, keep, t, taught in zip(*columns, strict=True):
    apart = (s - row[keep]) - (t - taught[keep])
    values.append((apart**2).mean() if keep.any() else 0.0)
  return np.array(values)


TAUGHT = [
  pytest.param(losses.distillation, slow_distillation, id='distillation'),
  pytest.param(losses.margin_mse, slow_margin_mse, id='margin_mse'),
]


def make_taught(offset, spread):
  """As `make_columns`, with scores of a teacher where a column is counted."""
  columns = make_columns(offset, spread)
  random = np.random.default_rng(1)
  taught = np.where(columns.counted, 3 * random.normal(size=(5, 7)), np.nan)
  return columns._replace(
    taught_positive=3 * random.normal(size=5).astype(np.float32),
    taught_others=taught.astype(np.float32),
  )


@pytest.mark.parametrize(('loss', 'slow'), TAUGHT)
@pytest.mark.parametrize(('offset', 'spread'), [(0, 2), (745, 4)])
def test_value_by_a_teacher_is_that_of_the_formula(loss, slow, offset, spread):
  columns = make_taught(offset, spread)
  found = loss(on_device(columns))
  np.testing.assert_allclose(found, slow(columns), rtol=1e-5, atol=1e-5)
  assert found[1] == 0  # No column is counted.


@pytest.mark.parametrize(('loss', 'slow'), TAUGHT)
def test_gradient_by_a_teacher_is_that_of_the_formula(loss, slow):
  columns = make_taught(0, 2)
  found = jax.grad(
    lambda positive, others: loss(
      on_device(columns)._replace(positive=positive, others=others)
    ).sum(),
    (0, 1),
  )(*(jnp.float32(x) for x in columns[:2]))
  for which, gradient in enumerate(found):
    for place in np.ndindex(gradient.shape):
      ends = []
      for step in (1e-5, -1e-5):
        moved = [x.copy() for x in columns[:2]]
        moved[which][place] += step
        ends.append(slow([*moved, *columns[2:]]).sum())
      expected = (ends[0] - ends[1]) / 2e-5
      assert gradient[place] == pytest.approx(expected, abs=1e-4)


def test_a_teacher_gives_the_worked_values():
  """Of torch's kl_div and mse_loss on these scores."""
  columns = losses.Columns(
    jnp.array([1.0]),
    jnp.array([[2.0, 0.0]]),
    jnp.ones((1, 2), bool),
    jnp.array([2.0]),
    jnp.array([[1.0, -1.0]]),
  )
  assert losses.distillation(columns) == pytest.approx([0.469363], abs=1e-6)
  assert losses.margin_mse(columns) == pytest.approx([4.0])
