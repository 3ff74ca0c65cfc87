"""Losses: pure functions of the scores of a batch, one value per query.

A loss takes `Columns` and depends on differences of scores alone. To add one:
a function here and a row in methods.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Columns(NamedTuple):
  """What each query is scored against: its positive, and C other passages.

  The positive is no column of one array with the others: XLA then rounds their
  differences in another way, and runs would end with other bits.

  Attributes:
    positive: (B,) float32, score of the drawn positive over the temperature.
    others: (B, C) float32, the same of the other passages.
    counted: (B, C) bool, which of the others are negatives; false for other
      positives of the query, and for passages with the text of one.
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
  # ANCE's scores are around 745, which float32 holds to 6e-5; their differences
  # it holds exactly.
  above = jnp.where(counted, others - positive[:, None], -jnp.inf)
  above = jnp.concatenate([jnp.zeros_like(positive)[:, None], above], 1)
  return jax.nn.logsumexp(above, 1)


def pairwise_nll(columns: Columns) -> jax.Array:
  """Returns the mean over negatives of the loss of the positive against one.

  Xiong et al. 2020 (ANCE), section 2:
  -log( e^{s+} / (e^{s+} + e^{s-}) ).

  Returns:
    (B,) float32, nats; 0 for a query without any negative.
  """
  positive, others, counted = columns
  pairs = jax.nn.softplus(others - positive[:, None])
  return jnp.where(counted, pairs, 0).sum(1) / jnp.maximum(counted.sum(1), 1)
