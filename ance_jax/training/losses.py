"""Losses on scores: pure functions, one value a query.

B queries, C columns of negatives. All take `counted`, false where a column is
no negative of the query: a positive of it, or a duplicate of one.
"""

import jax
import jax.numpy as jnp


def softmax_nll(positive, negatives, counted):
  """Returns the negative log-likelihood of each query's positive passage.

  Karpukhin et al. 2020 (DPR), eq. 2:
  -log( e^{s+} / (e^{s+} + sum_j e^{s_j-}) ).

  Args:
    positive: (B,) float32, score of the positive.
    negatives: (B, C) float32, scores of the columns.
    counted: (B, C) bool, columns that are in the sum.

  Returns:
    (B,) float32, nats.
  """
  # ANCE's scores are around 745, which float32 holds to 6e-5; their differences
  # it holds exactly.
  above = jnp.where(counted, negatives - positive[:, None], -jnp.inf)
  above = jnp.concatenate([jnp.zeros_like(positive)[:, None], above], 1)
  return jax.nn.logsumexp(above, 1)


def pairwise_nll(positive, negatives, counted):
  """Returns the mean over negatives of that of the positive against one.

  Xiong et al. 2020 (ANCE), section 2:
  -log( e^{s+} / (e^{s+} + e^{s-}) ).

  Args:
    positive: (B,) float32, score of the positive.
    negatives: (B, C) float32, scores of the columns.
    counted: (B, C) bool, columns that are in the mean.

  Returns:
    (B,) float32, nats; 0 for a query without any negative.
  """
  pairs = jax.nn.softplus(negatives - positive[:, None])
  return jnp.where(counted, pairs, 0).sum(1) / jnp.maximum(counted.sum(1), 1)
