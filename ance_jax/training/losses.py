"""Losses: pure functions of a batch's scores, with one value per query.

A loss takes `Columns` and depends only on differences of scores. To add one,
write a function here and a row in methods.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Columns(NamedTuple):
  """Scores of each query's positive and of C other passages.

  The positive has its own array because XLA rounds the differences differently
  within one array, which would change the bits of all runs.

  The teacher's scores have no gradient, and no meaning where not counted.

  Attributes:
    positive: (B,) float32, score of the drawn positive over the temperature.
    others: (B, C) float32, scores of the other passages over the temperature.
    counted: (B, C) bool, which of the others are negatives; false for other
      positives of the query and passages with the same text as one.
    taught_positive: (B,) float32, the teacher's score of the drawn positive
      over the teacher's temperature; None without a teacher.
    taught_others: (B, C) float32, the teacher's scores of the others.
  """

  positive: jax.Array
  others: jax.Array
  counted: jax.Array
  taught_positive: jax.Array | None = None
  taught_others: jax.Array | None = None


class Searched(NamedTuple):
  """Scores of the passages that a step found for each query, and their rank.

  Attributes:
    scores: (B, C) float32 over the temperature, in order of rank.
    relevant: (B, C) bool, which are positives.
    counted: (B, C) bool, which are positives or negatives.
    num_searched: K; the columns from K on are positives that the search did not
      find.
  """

  scores: jax.Array
  relevant: jax.Array
  counted: jax.Array
  num_searched: int


def softmax_nll(columns: Columns) -> jax.Array:
  """Returns the negative log-likelihood of each query's positive passage.

  Karpukhin et al. 2020 (DPR), eq. 2:
  -log( e^{s+} / (e^{s+} + sum_j e^{s_j-}) ).

  Returns:
    (B,) float32, nats.
  """
  positive, others, counted = columns[:3]
  return jax.nn.logsumexp(_above(positive, others, counted), 1)


def pairwise_nll(columns: Columns) -> jax.Array:
  """Returns the pairwise loss of the positive, averaged over negatives.

  Xiong et al. 2020 (ANCE), section 2:
  -log( e^{s+} / (e^{s+} + e^{s-}) ).

  Returns:
    (B,) float32, nats; 0 for a query without negatives.
  """
  positive, others, counted = columns[:3]
  pairs = jax.nn.softplus(others - positive[:, None])
  return jnp.where(counted, pairs, 0).sum(1) / jnp.maximum(counted.sum(1), 1)


def distillation(columns: Columns) -> jax.Array:
  """Returns the divergence of each query's scores from its teacher's.

  KL(p_t || p) = sum_j p_t(j) (log p_t(j) - log p(j)), j over the positive and
  the counted passages, both softmaxes of scores over their temperatures.

  Returns:
    (B,) float32, nats; 0 for a query without negatives.
  """
  positive, others, counted, taught_positive, taught_others = columns
  own = jax.nn.log_softmax(_above(positive, others, counted))
  taught = jax.nn.log_softmax(_above(taught_positive, taught_others, counted))
  # Left out are columns of no probability: 0 (-inf - -inf) is not a number.
  there = jnp.isfinite(taught)
  apart = jnp.where(there, taught, 0) - jnp.where(there, own, 0)
  return (jnp.exp(taught) * apart).sum(1)


def margin_mse(columns: Columns) -> jax.Array:
  """Returns the squared error of each query's margins, averaged over negatives.

  Hofstaetter et al. 2020, section 4.1: ((s+ - s_j) - (t+ - t_j))^2, in the
  scale of the teacher's scores t.

  Returns:
    (B,) float32; 0 for a query without negatives.
  """
  positive, others, counted, taught_positive, taught_others = columns
  errors = (others - positive[:, None]) - (
    jnp.where(counted, taught_others, 0) - taught_positive[:, None]
  )
  squares = jnp.where(counted, errors**2, 0)
  return squares.sum(1) / jnp.maximum(counted.sum(1), 1)


def lambda_rank(columns: Searched) -> jax.Array:
  """Returns the pairwise loss, weighted by what a swap does to the ranking.

  Zhan et al. 2021 (ADORE), section 5, as in its adore/train.py: the mean over
  pairs of a positive i and a negative j of |d_i - d_j| log(1 + e^{s_j - s_i}),
  where d is 1 / rank, and 0 for a positive that was not found.

  Returns:
    (B,) float32; 0 for a query without pairs.
  """
  scores, relevant, counted, num_searched = columns
  rank = jnp.maximum(jnp.cumsum(counted, 1), 1)
  found = jnp.arange(scores.shape[1]) < num_searched
  share = jnp.where(found, 1 / rank, 0)
  pairs = relevant[:, :, None] & (counted & ~relevant)[:, None]
  losses = jax.nn.softplus(scores[:, None] - scores[:, :, None])
  losses *= jnp.abs(share[:, None] - share[:, :, None])
  losses = jnp.where(pairs, losses, 0).sum((1, 2))
  return losses / jnp.maximum(pairs.sum((1, 2)), 1)


def _above(positive, others, counted):
  """Returns (B, 1 + C) scores minus the positive's, the positive first.

  ANCE's scores are around 745, where float32 resolves 6e-5, but differences of
  such scores are exact.
  """
  above = jnp.where(counted, others - positive[:, None], -jnp.inf)
  return jnp.concatenate([jnp.zeros_like(positive)[:, None], above], 1)
