"""Columns of a batch: what is scored against each query, and what counts.

All of this runs inside the pmapped step, on one device's B of the batch's n B
queries.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp

from ance_jax import config as config_lib
from ance_jax.core import devices as devices_lib
from ance_jax.training import losses
from ance_jax.training import methods

_AXIS = devices_lib.AXIS


def make(
  config: config_lib.Config, method: methods.Method
) -> Callable[..., tuple[losses.Columns, jax.Array]]:
  """Returns of_batch(queries, passages, batch), the columns of a row.

  `queries` are (B, E) float32 embeddings, `passages` (B, (1 + H) C, E). It
  returns `losses.Columns`, and (B,) bool, whether the positive scores above all
  passages that count as negatives.

  Args:
    config: Settings of the run; this reads the settings of the loss.
    method: Row of the method table.
  """
  scale = 1 / config.temperature

  def of_batch(queries, passages, batch):
    positive = _positive_scores(queries, passages, batch)
    others, groups = _other_scores(method, queries, passages, batch)
    # Passages in the text group of any positive are not negatives. This also
    # masks the positive itself if it is among the columns.
    counted = (groups[..., None] != batch.positive_groups[:, None]).all(-1)
    if config.mask_above is not None:
      counted &= others <= positive[:, None] + config.mask_above
    # Before the first refresh, --guide=refresh has none.
    if has_guide := batch.guide_queries is not None:
      guided = _by_guide(method, batch)
    if config.guide_margin is not None and has_guide:
      counted &= guided[1] <= guided[0][:, None] - config.guide_margin
    right = jnp.where(counted, others, -jnp.inf).max(1) < positive
    logits = others * scale
    if config.hardness_weight:
      harder = lax.stop_gradient(config.hardness_weight * others)
      logits += jnp.where(_weighed(config, method, batch), harder, 0)
    if config.symmetric_columns and method.in_batch:
      more = _both_sides(queries, passages, batch)
      if config.mask_above is not None:
        most = positive[:, None] + config.mask_above
        more = [(s, there & (s <= most)) for s, there in more]
      logits = jnp.concatenate([logits, *(s * scale for s, _ in more)], 1)
      counted = jnp.concatenate([counted, *(there for _, there in more)], 1)
    columns = losses.Columns(positive * scale, logits, counted)
    if method.teacher:
      taught = batch.taught
      taught = guided if taught is None else (taught[:, 0], taught[:, 1:])
      taught = (x / config.teacher_temperature for x in taught)
      columns = losses.Columns(*columns[:3], *taught)
    return columns, right

  return of_batch


def _positive_scores(queries, passages, batch):
  """Returns the (B,) scores of the positives."""
  number = _num_pieces(batch)
  if number == 1:
    return _scores('be,be->b', queries, passages[:, 0])
  own = _scores('be,bce->bc', queries, passages[:, :number])
  return _best(own, batch.passage_lengths[:, :number], number)[:, 0]


def _other_scores(method, queries, passages, batch):
  """Returns (B, C) scores and (1 or B, C) text groups of the columns.

  The columns are the query's own negatives or, with in-batch negatives, all
  passages of the whole batch, in the same order on any number of devices.
  """
  number = _num_pieces(batch)
  lengths, groups = batch.passage_lengths[:, number:], batch.passage_groups
  if not method.in_batch:
    own = _scores('be,bhe->bh', queries, passages[:, number:])
    return _best(own, lengths, number), groups[:, 1:]
  flat = passages.reshape(-1, passages.shape[-1])
  everyone, groups, lengths = (
    lax.all_gather(x, _AXIS, tiled=True)
    for x in (flat, groups.ravel(), batch.passage_lengths.ravel())
  )
  scores = _scores('be,ce->bc', queries, everyone)
  return _best(scores, lengths[None], number), groups[None]


def _by_guide(method, batch):
  """Returns the guide's scores, (B,) of the positives and (B, C) of others."""
  queries, passages = batch.guide_queries, batch.guide_passages
  positive = _scores('be,be->b', queries, passages[:, 0])
  if not method.in_batch:
    return positive, _scores('be,bhe->bh', queries, passages[:, 1:])
  flat = passages.reshape(-1, passages.shape[-1])
  everyone = lax.all_gather(flat, _AXIS, tiled=True)
  return positive, _scores('be,ce->bc', queries, everyone)


def _weighed(config, method, batch):
  """Returns (1 or B, 1 or C) bool, which columns `--hardness_weight` is for."""
  if not method.in_batch or config.hardness_columns == 'all':
    return jnp.ones((1, 1), bool)
  everyone = lax.all_gather(batch.rows, _AXIS, tiled=True)
  whose = jnp.repeat(everyone, batch.passage_groups.shape[1])
  return batch.rows[:, None] == whose


def _both_sides(queries, passages, batch):
  """Returns the (B, nB) scores of columns of `--symmetric_columns`, and masks.

  For query i these are query j, for its positive the positive of j and query j,
  for all other queries j of the batch that do not share a positive with it (Li
  et al. 2023, GTE, section 3.3).
  """
  first = passages[:, 0]
  rows, other_queries, other_first, groups, never = (
    lax.all_gather(x, _AXIS, tiled=True)
    for x in (
      batch.rows,
      queries,
      first,
      batch.passage_groups[:, 0],
      batch.positive_groups,
    )
  )
  apart = batch.rows[:, None] != rows
  apart &= (groups[:, None] != batch.positive_groups[:, None]).all(-1)
  apart &= (batch.passage_groups[:, :1, None] != never).all(-1)
  return [
    (_scores('be,ce->bc', one, others), apart)
    for one, others in (
      (queries, other_queries),
      (first, other_first),
      (first, other_queries),
    )
  ]


def _num_pieces(batch):
  """Returns C, pieces per passage."""
  return batch.passage_lengths.shape[1] // batch.passage_groups.shape[1]


def _best(scores, lengths, number):
  """Returns (B, c) scores of passages, the best of their pieces' (MaxP).

  Args:
    scores: (B, c number) float32 scores of pieces.
    lengths: (B or 1, c number) int32, 0 for missing pieces.
    number: int, pieces per passage.
  """
  if number == 1:
    return scores
  scores = jnp.where(lengths > 0, scores, -jnp.inf)
  return scores.reshape(len(scores), -1, number).max(-1)


def _scores(equation, queries, passages):
  # Accelerators round float32 inputs by default, which reorders scores that are
  # close together.
  return jnp.einsum(
    equation, queries, passages, precision=lax.Precision.HIGHEST
  )
