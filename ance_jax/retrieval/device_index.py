"""Exact top k by inner product on the accelerators: sharded, in blocks.

Each device has one range of the rows and goes through it in blocks, the best k
of its rows so far in hand; at the end those of all devices are merged. What is
equal stays in row order at each of these turns: `lax.top_k` takes the first of
equals, and ranges, blocks and what is in hand come in the order of their rows.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from ance_jax import errors
from ance_jax.core import devices as devices_lib
from ance_jax.core import logs

# Queries that are searched at once, at most, and rows of a block on a device.
_MOST_QUERIES, _MOST_ROWS = 1024, 65_536
# A block of fewer rows, or for fewer queries, is not worth its start.
_LEAST_QUERIES, _LEAST_ROWS = 64, 128
# Of a score: itself, and where XLA sorts to find the best, keys and rows, in
# and out, and room. Of a candidate: its score and row.
_SCORE_BYTES, _CANDIDATE_BYTES = 24, 8
_MIB = 2**20


class Plan(NamedTuple):
  """How N rows are laid out over devices.

  Attributes:
    rows: Rows of a block on a device.
    blocks: Blocks of a device: it has the next `blocks * rows` rows.
    resident: Whether all of them stay on the devices, or come anew, one by
      one, for each batch of queries.
  """

  rows: int
  blocks: int
  resident: bool


class DeviceIndex(NamedTuple):
  """Embeddings to be searched on the devices.

  Attributes:
    embeddings: List of (rows, E) float32 arrays of the host.
    mean: What is taken from each row, (E,) float32 or 0.
    sharding: Of arrays whose rows are dealt out over the devices.
    memory: MiB of a device.
    plan: `Plan`.
    placed: The blocks on the devices, in order; empty if they do not stay.
  """

  embeddings: list[np.ndarray]
  mean: np.ndarray
  sharding: NamedSharding
  memory: int
  plan: Plan
  placed: list[jax.Array]


def plan(num_rows, width, num_devices, memory):
  """Returns the `Plan` that keeps embeddings within half of the memory.

  Args:
    num_rows: N.
    width: E.
    num_devices: Devices that the rows are dealt out to.
    memory: MiB of a device for embeddings and scores.

  Raises:
    BadInput: Not even a small block fits.
  """
  half, row = memory * _MIB // 2, 4 * width
  most = min(half // (_LEAST_QUERIES * _SCORE_BYTES), _MOST_ROWS)
  share = -(-num_rows // num_devices)
  if most:
    rows, blocks = _even(share, most)
    if rows * blocks * row <= half:
      return Plan(rows, blocks, True)
  # One is searched while the next one comes.
  most = min(most, half // (2 * row))
  if most < min(_LEAST_ROWS, share):
    needed = _LEAST_ROWS * max(2 * row, _LEAST_QUERIES * _SCORE_BYTES)
    raise errors.BadInput(
      f'--search_memory_mb must hold two blocks of {_LEAST_ROWS} passages, '
      f'{-(-2 * needed // _MIB)} MiB for embeddings of width {width}; found '
      f'{memory}; raise it.'
    )
  return Plan(*_even(share, most), False)


def queries_at_once(plan, width, num_devices, memory, k):
  """Returns how many queries have their scores in half of the memory.

  A power of two. Their embeddings and candidates are in it, too.

  Args:
    plan: `Plan`.
    width: As for `plan`.
    num_devices: As for `plan`.
    memory: As for `plan`.
    k: Candidates a query.

  Raises:
    BadInput: Not even one has.
  """
  # In hand before and after a block, found in it, joined; gathered, ordered.
  candidates = k * (6 + 4 * num_devices)
  a_query = plan.rows * _SCORE_BYTES + candidates * _CANDIDATE_BYTES + 8 * width
  number = min(memory * _MIB // 2 // a_query, _MOST_QUERIES)
  if not number:
    raise errors.BadInput(
      f'--search_memory_mb must hold the {k:,} candidates of a query, '
      f'{-(-2 * a_query // _MIB)} MiB; found {memory}; raise it.'
    )
  return 1 << (number.bit_length() - 1)


def place(embeddings, devices, memory, mean):
  """Returns the `DeviceIndex` of embeddings, on the devices if they fit.

  Args:
    embeddings: List of (rows, E) float32 arrays, whose rows are counted over
      all of them.
    devices: The accelerators used.
    memory: As for `plan`.
    mean: (E,) float32, or 0, taken from each row.

  Raises:
    BadInput: As `plan` does.
  """
  num_rows = sum(map(len, embeddings))
  made = plan(num_rows, embeddings[0].shape[1], len(devices), memory)
  sharding = devices_lib.split(devices)
  index = DeviceIndex(embeddings, mean, sharding, memory, made, [])
  if not made.resident:
    return index
  numbers = logs.progress(
    range(made.blocks), 'index', total=made.blocks, unit='blocks'
  )
  return index._replace(placed=[_block(index, number) for number in numbers])


def search(index, queries, k, what=None):
  """Returns scores and rows of the k best passages of each query.

  The host gives the devices a block, and waits for the one before it: they are
  not idle, and no third one takes memory.

  Args:
    index: `DeviceIndex`.
    queries: (Q, E) float32 embeddings.
    k: Passages a query, at most N.
    what: Name of the phase for a progress bar, or None for no bar.

  Returns:
    (Q, k) float32, falling, and (Q, k) int32, of equal scores by row. -inf and
    -1 in the place of a score that is no number.

  Raises:
    BadInput: As `queries_at_once` does.
  """
  num_rows = sum(map(len, index.embeddings))
  num_devices = len(index.sharding.device_set)
  # Few shapes, so that little is compiled: powers of two.
  depth = _power_of_two(k)
  width = queries.shape[1]
  size = min(
    queries_at_once(index.plan, width, num_devices, index.memory, depth),
    _power_of_two(len(queries)),
  )
  starts = range(0, len(queries), size)
  if what:
    starts = logs.progress(starts, what, total=len(starts), unit='batches')
  shape, found, before = (num_devices, size, depth), [], ()
  for start in starts:
    part = np.zeros((size, width), np.float32)
    part[: len(queries) - start] = queries[start : start + size]
    part = jax.device_put(part, _whole(index.sharding))
    best = (
      jnp.full(shape, -jnp.inf, jnp.float32, device=index.sharding),
      jnp.full(shape, -1, jnp.int32, device=index.sharding),
    )
    for number in range(index.plan.blocks):
      block = index.placed[number] if index.placed else _block(index, number)
      offsets = np.array([number, index.plan.blocks, num_rows], np.int32)
      best = _best_with(best, part, block, offsets, index.sharding)
      jax.block_until_ready(before)
      before = best
    found.append(_merged(best, index.sharding))
    # As late as the blocks.
    found[-2:-1] = jax.device_get(found[-2:-1])
  return tuple(
    np.concatenate(parts)[: len(queries), :k]
    for parts in zip(*jax.device_get(found), strict=True)
  )


@functools.partial(jax.jit, static_argnames='sharding')
def _best_with(best, queries, block, offsets, sharding):
  """Returns the best of each device, those of its next block among them.

  Args:
    best: (n, Q, k) float32 scores and int32 rows, a part on each device.
    queries: (Q, E) float32, whole on each device.
    block: (n * rows, E) float32, a part on each device.
    offsets: (3,) int32: the number of the block, blocks of a device, and N.
    sharding: Of the parts.
  """

  def on_a_device(best, queries, block, offsets):
    number, blocks, num_rows = offsets
    first = (lax.axis_index(devices_lib.AXIS) * blocks + number) * len(block)
    # On accelerators the default rounds float32 to less before products.
    scores = jnp.einsum(
      'qe,re->qr', queries, block, precision=lax.Precision.HIGHEST
    )
    # To top_k 0 is better than -0, and NaN the best of all.
    scores = jnp.where(scores == 0, 0, scores)
    there = first + jnp.arange(len(block)) < num_rows
    scores = jnp.where(there & (scores > -jnp.inf), scores, -jnp.inf)
    k = best[0].shape[-1]
    scores, rows = lax.top_k(scores, min(k, len(block)))
    rows = jnp.where(scores > -jnp.inf, rows + first, -1)
    joined = (
      jnp.concatenate([old[0], new], 1)
      for old, new in zip(best, (scores, rows), strict=True)
    )
    return jax.tree.map(lambda part: part[None], _first(*joined, k))

  split, whole = sharding.spec, PartitionSpec()
  return jax.shard_map(
    on_a_device,
    mesh=sharding.mesh,
    in_specs=(split, whole, split, whole),
    out_specs=split,
  )(best, queries, block, offsets)


@functools.partial(jax.jit, static_argnames='sharding')
def _merged(best, sharding):
  """Returns (Q, k) scores and rows of what all devices found, on each."""
  k = best[0].shape[-1]
  # Of a query, side by side in the order of the devices.
  beside = (part.swapaxes(0, 1).reshape(part.shape[1], -1) for part in best)
  return lax.with_sharding_constraint(_first(*beside, k), _whole(sharding))


def _first(scores, rows, k):
  """Returns the k best of each line, those further left first if equal."""
  scores, places = lax.top_k(scores, k)
  return scores, jnp.take_along_axis(rows, places, 1)


def _block(index, number):
  """Returns the block of this number of all devices, (n * rows, E)."""
  rows, blocks, _ = index.plan
  width = index.embeddings[0].shape[1]

  def part(where):
    device = (where[0].start or 0) // rows
    return _rows(index, (device * blocks + number) * rows, rows)

  shape = len(index.sharding.device_set) * rows, width
  return jax.make_array_from_callback(shape, index.sharding, part)


def _rows(index, start, number):
  """Returns (number, E) float32 embeddings from a row on, 0 behind the last."""
  found = np.zeros((number, index.embeddings[0].shape[1]), np.float32)
  first = 0
  for block in index.embeddings:
    low, high = max(start, first), min(start + number, first + len(block))
    if low < high:
      part = block[low - first : high - first] - index.mean
      found[low - start : high - start] = part
    first += len(block)
  return found


def _even(share, most):
  """Returns rows and number of blocks of at most so many rows, all equal."""
  blocks = max(-(-share // most), 1)
  return -(-share // blocks), blocks


def _power_of_two(number):
  """Returns the lowest power of two that is not below `number`."""
  return 1 << (number - 1).bit_length()


def _whole(sharding):
  return NamedSharding(sharding.mesh, PartitionSpec())
