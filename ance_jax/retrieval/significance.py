"""Whether a mean difference over queries may be chance: tests and intervals.

Smucker et al. 2007 compare such tests for retrieval: the randomisation test
assumes least.
"""

from typing import NamedTuple

import numpy as np
import scipy  # Its parts are imported once they are used.

from ance_jax.retrieval import metrics

# Of the test and of the interval; numbers that are drawn for them at once.
RESAMPLES, _MOST_DRAWN = 9999, 2**22
_CONFIDENCE = 0.95


class Difference(NamedTuple):
  """How a system differs from the baseline.

  Attributes:
    mean: Mean difference.
    low: Lower end of its 95 % interval.
    high: Upper end.
    wins: Queries that the system does better than the baseline.
    losses: Queries that it does worse.
    ties: Queries without a difference.
    p: Two-sided p-value.
    p_holm: The same after Holm's correction for all comparisons.
  """

  mean: float
  low: float
  high: float
  wins: int
  losses: int
  ties: int
  p: float
  p_holm: float


def differences(baseline, others, seed):
  """Returns a list of the `Difference` of each system from the baseline.

  Each draws the same random numbers, whatever else is compared.

  Args:
    baseline: (Q,) float64, the values of a measure by query.
    others: List of the same of other systems.
    seed: int.
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


def p_value(values, seed):
  """Returns how often chance alone gives such a mean difference, two-sided.

  If the systems were alike, each query's difference would as likely have the
  other sign. All signs are tried where that is no more than `RESAMPLES`.

  Args:
    values: (Q,) float64, differences by query.
    seed: int.
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


def interval(values, seed):
  """Returns the percentile interval of a mean difference: (low, high).

  Queries are drawn with both of their values, so that it is paired.

  Args:
    values: (Q,) float64, differences by query.
    seed: int.
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
      # BCa has no value where all differences are equal.
      method='percentile',
      rng=np.random.default_rng(seed),
    ).confidence_interval
  )


def holm(p_values):
  """Returns the p-values times the tests that are left, smallest first.

  Holm 1979: with them, the chance of any false discovery is kept.
  """
  order = np.argsort(p_values, kind='stable')
  adjusted, highest = [0.0] * len(p_values), 0.0
  for place, number in enumerate(order.tolist()):
    highest = max(highest, p_values[number] * (len(p_values) - place))
    adjusted[number] = min(highest, 1.0)
  return adjusted
