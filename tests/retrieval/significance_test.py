"""The test, the interval and the correction against slow rewrites."""

import itertools

import numpy as np
import pytest

from ance_jax.retrieval import significance


def slow_p_value(values):
  """The share of all sign changes whose mean is as far from 0, one by one."""
  observed, as_far, number = abs(sum(values)), 0, 0
  for signs in itertools.product((1, -1), repeat=len(values)):
    total = sum(sign * value for sign, value in zip(signs, values, strict=True))
    as_far += abs(total) >= observed - 1e-12
    number += 1
  return as_far / number


def random_differences(number, seed, shift=0.0):
  """Differences as of reciprocal ranks: many of 0, and some that repeat."""
  random = np.random.default_rng(seed)
  places = random.integers(1, 6, (2, number))
  values = 1 / places[0] - 1 / places[1] + shift
  return np.where(random.random(number) < 0.3, 0.0, values)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('shift', [0.0, 0.2])
def test_with_few_queries_the_p_value_is_exact(seed, shift):
  values = random_differences(9, seed, shift)
  expected = slow_p_value(values.tolist())
  assert significance.p_value(values, 0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('shift', [0.1, 0.25])
def test_with_many_queries_it_is_exact_within_monte_carlo_error(shift):
  values = random_differences(16, 3, shift)
  expected = slow_p_value(values.tolist())
  assert 2**16 > significance.RESAMPLES
  assert 0.001 < expected < 0.9
  error = np.sqrt(expected * (1 - expected) / significance.RESAMPLES)
  assert abs(significance.p_value(values, 0) - expected) < 4 * error + 2e-4


def test_under_the_null_small_p_values_are_as_rare_as_they_say():
  random = np.random.default_rng(0)
  p_values = [
    significance.p_value(random.normal(size=10), seed) for seed in range(300)
  ]
  assert 0.02 < np.mean(np.array(p_values) <= 0.05) < 0.09


def test_no_difference_at_all_is_no_evidence():
  assert significance.p_value(np.zeros(50), 0) == 1
  assert significance.interval(np.zeros(50), 0) == (0, 0)


def test_the_interval_is_that_of_a_bootstrap_query_by_query():
  values = random_differences(60, 1, 0.1)
  random = np.random.default_rng(5)
  means = values[random.integers(60, size=(20_000, 60))].mean(1)
  expected = np.percentile(means, [2.5, 97.5])
  found = significance.interval(values, 0)
  # Less than an interval of 94 or 96 % differs by.
  assert found == pytest.approx(expected, abs=0.007)
  assert found[0] < values.mean() < found[1]


def test_the_same_seed_gives_the_same_and_another_seed_another_figure():
  values = random_differences(40, 2, 0.1)
  figures = [
    (significance.p_value(values, seed), *significance.interval(values, seed))
    for seed in (0, 0, 1)
  ]
  assert figures[0] == figures[1]
  assert figures[0] != figures[2]


def test_holm_is_the_textbook_case():
  # Holm 1979 by hand: 0.005 x 4, 0.01 x 3, 0.03 x 2, and no less for 0.04 x 1.
  found = significance.holm([0.01, 0.04, 0.03, 0.005])
  assert found == pytest.approx([0.03, 0.06, 0.06, 0.02])
  assert significance.holm([0.6, 0.7]) == [1.0, 1.0]
  assert significance.holm([0.3]) == [0.3]


def test_each_system_is_compared_with_the_baseline():
  random = np.random.default_rng(0)
  baseline = random.random(30)
  better = baseline + 0.1
  mixed = baseline + np.where(np.arange(30) < 10, 0.1, -0.1)
  mixed[-5:] = baseline[-5:]
  found = significance.differences(baseline, [better, mixed], 0)
  assert [(d.wins, d.losses, d.ties) for d in found] == [
    (30, 0, 0), (10, 15, 5)
  ]  # fmt: skip
  assert found[0].mean == pytest.approx(0.1)
  assert found[1].mean == pytest.approx(-0.5 / 30)
  assert (found[0].low, found[0].high) == pytest.approx((0.1, 0.1))
  assert found[0].p_holm == pytest.approx(2 * found[0].p)
  # Whatever else is compared, the figures of a system are the same.
  alone = significance.differences(baseline, [mixed], 0)[0]
  assert alone == found[1]._replace(p_holm=alone.p_holm)
