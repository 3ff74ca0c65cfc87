"""Significance tests and confidence intervals of mean differences over queries.

Smucker et al. 2007 compare such tests for retrieval; the randomisation test
makes the fewest assumptions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy  # Imports its submodules on first use.

from ance_jax.retrieval import metrics

# Resamples of test and interval; maximum of numbers drawn at once.
RESAMPLES, _MOST_DRAWN = 9999, 2**22
_CONFIDENCE = 0.95


class Difference(NamedTuple):
  """How a system differs from the baseline.

  Attributes:
    mean: Mean difference.
    low: Lower end of the mean's 95 % interval.
    high: Upper end of the interval.
    wins: Queries on which the system beats the baseline.
    losses: Queries on which the baseline beats the system.
    ties: Queries without a difference.
    p: Two-sided p-value.
    p_holm: p-value after Holm's correction for all comparisons.
  """

  mean: float
  low: float
  high: float
  wins: int
  losses: int
  ties: int
  p: float
  p_holm: float


def differences(
  baseline: np.ndarray, others: Sequence[np.ndarray], seed: int
) -> list[Difference]:
  """Compares each system with the baseline.

  Each comparison draws the same random numbers, regardless of the others.

  Args:
    baseline: (Q,) float64, values of a measure by query.
    others: (Q,) float64 values of each other system.
    seed: Seed of the resampling.
  """
  by_query = [values - baseline for values in others]
  p_values = [p_value(values, seed) for values in by_query]
  return [
    Difference(
      metrics.mean(values),
      *interval(values, seed),
      int((values > 0).sum()),
      int((values < 0).sum()),
      int((values == 0).sum()),
      p,
      p_holm,
    )
    for values, p, p_holm in zip(
      by_query, p_values, holm(p_values), strict=True
    )
  ]


def p_value(values: np.ndarray, seed: int) -> float:
  """Returns the two-sided p-value of a mean difference, by random sign flips.

  If the systems were equal, each query's difference would be as likely to have
  the other sign. All sign patterns are tried if there are at most `RESAMPLES`.

  Args:
    values: (Q,) float64, differences by query.
    seed: Seed of the resampling.
  """
  return float(
    scipy.stats.permutation_test(
      (values,),
      np.mean,
      permutation_type='samples',
      vectorized=True,
      n_resamples=RESAMPLES,
      batch=max(1, _MOST_DRAWN // len(values)),
      rng=np.random.default_rng(seed),
    ).pvalue
  )


def interval(values: np.ndarray, seed: int) -> tuple[float, float]:
  """Returns (low, high), the bootstrap interval of a mean difference.

  Percentile method, paired: it resamples queries with both of their values.

  Args:
    values: (Q,) float64, differences by query.
    seed: Seed of the resampling.
  """
  return tuple(
    float(end)
    for end in scipy.stats.bootstrap(
      (values,),
      np.mean,
      vectorized=True,
      n_resamples=RESAMPLES,
      batch=max(1, _MOST_DRAWN // len(values)),
      confidence_level=_CONFIDENCE,
      # BCa is undefined if all differences are equal.
      method='percentile',
      rng=np.random.default_rng(seed),
    ).confidence_interval
  )


def holm(p_values: Sequence[float]) -> list[float]:
  """Returns p-values adjusted for multiple tests by Holm's method (1979).

  The i-th smallest of n is multiplied by n - i + 1, which bounds the chance of
  any false discovery.
  """
  order, adjusted = np.argsort(p_values), np.empty(len(p_values))
  factors = np.arange(len(p_values), 0, -1)
  highest = np.maximum.accumulate(np.take(p_values, order) * factors)
  adjusted[order] = np.minimum(highest, 1)
  return adjusted.tolist()
