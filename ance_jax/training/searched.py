"""Lets a step search its own negatives among passages that stay (ADORE).

Zhan et al. 2021, section 5: the tower of passages is frozen, so that the index
never ages, and each step takes the negatives of its very weights. The devices
share the passages; each searches its own, and scores of passages, never their
embeddings, travel between devices.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from ance_jax.core import devices as devices_lib
from ance_jax.retrieval import device_index
from ance_jax.training import batches
from ance_jax.training import losses

_AXIS = devices_lib.AXIS
# Scores of a block are (queries of the whole batch, rows) on each device.
_ROWS_AT_ONCE = 65_536


class Passages(NamedTuple):
  """All N passages, as an argument of the step, n devices' parts.

  Device i has the rows from i * b * r on, in b blocks of r rows, with rows of 0
  after the last passage.

  Attributes:
    blocks: (n, b, r, E) float32 embeddings; inside of the step (b, r, E).
    groups: (n, b, r) int32 text groups.
    num_rows: (n,) int32, N.
  """

  blocks: jax.Array
  groups: jax.Array
  num_rows: jax.Array


def place(
  embeddings: Sequence[np.ndarray],
  groups: np.ndarray,
  devices: Sequence[jax.Device],
) -> Passages:
  """Places the passages on this process's devices.

  Args:
    embeddings: Blocks of (rows, E) float32, N rows in all.
    groups: (N,) int32 text groups.
    devices: The devices of all processes.
  """
  rows, blocks = device_index.even(
    -(-len(groups) // len(devices)), _ROWS_AT_ONCE
  )
  own, sharding = devices_lib.own(devices), devices_lib.split(devices)
  starts = [devices.index(device) * blocks * rows for device in own]

  def placed(part, *shape):
    def of_device(where):
      start = starts[where[0].start or 0]
      return part(start, blocks * rows).reshape(1, blocks, rows, *shape)

    whole = len(own), blocks, rows, *shape
    return jax.make_array_from_callback(whole, sharding, of_device)

  def part_of_groups(start, number):
    found = np.zeros(number, np.int32)
    here = groups[start : start + number]
    found[: len(here)] = here
    return found

  return Passages(
    placed(
      lambda *part: device_index.rows_between(embeddings, *part),
      embeddings[0].shape[1],
    ),
    placed(part_of_groups),
    jax.device_put(np.full(len(own), len(groups), np.int32), sharding),
  )


def columns(
  queries: jax.Array,
  batch: batches.Batch,
  passages: Passages,
  k: int,
  scale: float,
) -> tuple[losses.Searched, jax.Array]:
  """Searches for each query's columns, on each device for its own queries.

  They are the k best passages and, for a query with no positive among these,
  all of its positives. A passage in the text group of a positive is relevant.

  Args:
    queries: (B, E) float32 embeddings, with gradient.
    batch: The queries' batch; this reads all of their positives, and the groups
      of passages that are no negatives.
    passages: The device's part of the passages.
    k: K, at most N.
    scale: Factor of the scores, 1 / temperature.

  Returns:
    The columns, and (B,) bool, whether a positive scores above all negatives.
  """
  everyone = lax.all_gather(queries, _AXIS, tiled=True)
  rows = _search(lax.stop_gradient(everyone), passages, k)
  positives = lax.all_gather(batch.positive_rows, _AXIS, tiled=True)
  rows = jnp.concatenate([rows, positives], 1)
  scores, groups = _of_rows(everyone, rows, passages)
  start = lax.axis_index(_AXIS) * len(queries)
  found = lax.dynamic_slice_in_dim(rows, start, len(queries))[:, :k] >= 0
  is_positive = batch.positive_rows >= 0
  of_positives = jnp.where(is_positive, groups[:, k:], -1)
  groups = groups[:, :k, None]
  relevant = found & (groups == of_positives[:, None]).any(-1)
  never = (groups == batch.positive_groups[:, None]).any(-1)
  added = is_positive & ~relevant.any(1, keepdims=True)
  counted = jnp.concatenate([found & (relevant | ~never), added], 1)
  relevant = jnp.concatenate([relevant, added], 1)
  best, other = (
    jnp.where(counted & which, scores, -jnp.inf).max(1)
    for which in (relevant, ~relevant)
  )
  return losses.Searched(scores * scale, relevant, counted, k), other < best


def _search(queries, passages, k):
  """Returns the (Q, k) rows of the best passages of all devices.

  Among equal scores the lower row comes first.
  """
  blocks, rows, _ = passages.blocks.shape
  first = lax.axis_index(_AXIS) * blocks * rows

  def search_block(best, block):
    number, block = block
    start = first + number * rows
    best = device_index.best_with(
      best, queries, block, start, passages.num_rows
    )
    return best, None

  # Marks the arrays as different on each device.
  zero = first * 0
  best = (
    jnp.full((len(queries), k), -jnp.inf) + zero,
    jnp.full((len(queries), k), -1, jnp.int32) + zero,
  )
  best, _ = lax.scan(search_block, best, (jnp.arange(blocks), passages.blocks))
  best = (lax.all_gather(x, _AXIS, axis=1, tiled=True) for x in best)
  return device_index.first(*best, k)[1]


def _of_rows(queries, rows, passages):
  """Returns (B, C) scores and text groups of (n B, C) passages, -1 for none.

  Each device computes those of its passages, for the queries of all devices.
  """
  blocks, size, width = passages.blocks.shape
  local = rows - lax.axis_index(_AXIS) * blocks * size
  here = (rows >= 0) & (local >= 0) & (local < blocks * size)
  local = jnp.where(here, local, 0)
  embeddings = passages.blocks.reshape(-1, width)[local]
  scores = jnp.einsum(
    'qe,qce->qc', queries, embeddings, precision=lax.Precision.HIGHEST
  )
  groups = passages.groups.ravel()[local]
  return tuple(
    lax.psum_scatter(
      jnp.where(here, x, 0), _AXIS, scatter_dimension=0, tiled=True
    )
    for x in (scores, groups)
  )
