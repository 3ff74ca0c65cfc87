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

  Attributes:
    positive: (B,) float32, score of the drawn positive over the temperature.
    others: (B, C) float32, scores of the other passages over the temperature.
    counted: (B, C) bool, which of the others are negatives; false for other
      positives of the query and passages with the same text as one.
  """

  positive: jax.Array
  others: jax.Array
  counted: jax.Array


def softmax_nll(columns: Columns) -> jax.Array:
  """Returns the negative log-likelihood of each query's positive passage.

  Karpukhin et al. 2020 (DPR), eq. 2:
  -log( e^{s+} / (e^{s+} + sum_j e^{s_j-}) ).

  Returns:
    (B,) float32, nats.
  """
  positive, others, counted = columns
  # ANCE's scores are around 745, where float32 resolves 6e-5, but differences
  # of such scores are exact.
  above = jnp.where(counted, others - positive[:, None], -jnp.inf)
  above = jnp.concatenate([jnp.zeros_like(positive)[:, None], above], 1)
  return jax.nn.logsumexp(above, 1)


def pairwise_nll(columns: Columns) -> jax.Array:
  """Returns the pairwise loss of the positive, averaged over negatives.

  Xiong et al. 2020 (ANCE), section 2:
  -log( e^{s+} / (e^{s+} + e^{s-}) ).

  Returns:
    (B,) float32, nats; 0 for a query without negatives.
  """
  positive, others, counted = columns
  pairs = jax.nn.softplus(others - positive[:, None])
  return jnp.where(counted, pairs, 0).sum(1) / jnp.maximum(counted.sum(1), 1)
