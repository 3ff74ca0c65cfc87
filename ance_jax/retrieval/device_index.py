"""Exact top k by inner product on the accelerators, sharded and in blocks.

Each device searches one range of rows block by block, keeping its best k so
far; at the end the results of all devices are merged. Equal scores stay in row
order throughout: `lax.top_k` prefers the first of equals, and candidates are
always concatenated in row order.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from ance_jax import errors
from ance_jax.core import devices as devices_lib
from ance_jax.core import logs

# Limits on queries per batch and on rows per block and device.
_MOST_QUERIES, _MOST_ROWS = 1024, 65_536
# Smaller batches or blocks are not worth a kernel launch.
_LEAST_QUERIES, _LEAST_ROWS = 64, 128
# Bytes per score: the score and, where XLA implements top_k by sorting, input
# and output keys and rows, and scratch. Per candidate: its score and row.
_SCORE_BYTES, _CANDIDATE_BYTES = 24, 8
_MIB = 2**20


class Plan(NamedTuple):
  """How N rows are laid out over devices.

  Attributes:
    rows: Rows per block and device.
    blocks: Blocks per device, which holds `blocks * rows` consecutive rows.
    resident: Whether all blocks stay on the devices; if not, each batch of
      queries transfers them one by one.
  """

  rows: int
  blocks: int
  resident: bool


class DeviceIndex(NamedTuple):
  """Embeddings for search on the devices.

  Attributes:
    embeddings: (rows, E) float32 arrays in host memory.
    mean: (E,) float32 or 0, subtracted from each row.
    sharding: Splits rows over the devices.
    memory: MiB per device for embeddings and scores.
    plan: Layout of the rows.
    placed: The blocks on the devices, in order; empty if not resident.
  """

  embeddings: list[np.ndarray]
  mean: np.ndarray
  sharding: jax.sharding.NamedSharding
  memory: int
  plan: Plan
  placed: list[jax.Array]

  @property
  def ntotal(self) -> int:
    """N, as FAISS's indexes name it."""
    return sum(map(len, self.embeddings))


def plan(num_rows: int, width: int, num_devices: int, memory: int) -> Plan:
  """Returns a layout whose embeddings fit into half of the memory.

  Args:
    num_rows: N.
    width: E.
    num_devices: Devices that share the rows.
    memory: MiB per device for embeddings and scores.

  Raises:
    BadInput: Not even a small block fits.
  """
  half, row = memory * _MIB // 2, 4 * width
  most = min(half // (_LEAST_QUERIES * _SCORE_BYTES), _MOST_ROWS)
  share = -(-num_rows // num_devices)
  if most:
    rows, blocks = even(share, most)
    if rows * blocks * row <= half:
      return Plan(rows, blocks, True)
  # One block is searched while the next is transferred.
  most = min(most, half // (2 * row))
  if most < min(_LEAST_ROWS, share):
    needed = _LEAST_ROWS * max(2 * row, _LEAST_QUERIES * _SCORE_BYTES)
    raise errors.refusal(
      f'--search_memory_mb={memory} does not hold two blocks of {_LEAST_ROWS} '
      f'passages of width {width}',
      f'raise it to {-(-2 * needed // _MIB)} at least',
    )
  return Plan(*even(share, most), False)


def queries_at_once(
  plan: Plan, width: int, num_devices: int, memory: int, k: int
) -> int:
  """Returns how many queries fit into half of the memory, a power of two.

  Counts the scores, candidates and embeddings of the queries.

  Args:
    plan: Layout of the rows.
    width: E.
    num_devices: As for `plan`.
    memory: As for `plan`.
    k: Candidates per query.

  Raises:
    BadInput: Not even one query fits.
  """
  # The best before and after a block, those found in it, all concatenated; at
  # the end gathered from all devices and sorted.
  candidates = k * (6 + 4 * num_devices)
  a_query = plan.rows * _SCORE_BYTES + candidates * _CANDIDATE_BYTES + 8 * width
  number = min(memory * _MIB // 2 // a_query, _MOST_QUERIES)
  if not number:
    raise errors.refusal(
      f'--search_memory_mb={memory} does not hold the {k:,} candidates of a '
      'query',
      f'raise it to {-(-2 * a_query // _MIB)} at least',
    )
  return 1 << (number.bit_length() - 1)


def place(
  embeddings: list[np.ndarray],
  devices: Sequence[jax.Device],
  memory: int,
  mean: np.ndarray | np.float32,
) -> DeviceIndex:
  """Makes an index of embeddings, and puts it on the devices if it fits.

  Args:
    embeddings: (rows, E) float32 blocks; rows are numbered across blocks.
    devices: Accelerators to use.
    memory: As for `plan`.
    mean: (E,) float32 or 0, subtracted from each row.

  Raises:
    BadInput: As `plan` does.
  """
  made = plan(
    sum(map(len, embeddings)), embeddings[0].shape[1], len(devices), memory
  )
  sharding = devices_lib.split(devices)
  index = DeviceIndex(embeddings, mean, sharding, memory, made, [])
  if not made.resident:
    return index
  return index._replace(
    placed=[
      _block(index, number)
      for number in logs.progress(
        range(made.blocks), 'index', total=made.blocks, unit='blocks'
      )
    ]
  )


def search(
  index: DeviceIndex, queries: np.ndarray, k: int, what: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns scores and rows of the k best passages of each query.

  The host enqueues a block before it waits for the previous one, so that the
  devices are never idle and hold at most two blocks.

  Args:
    index: The passages.
    queries: (Q, E) float32 embeddings.
    k: Passages per query, at most N.
    what: Label of a progress bar; None for no bar.

  Returns:
    (Q, k) float32 scores, descending, and (Q, k) int32 rows, ascending among
    equal scores. Passages whose score is NaN or -inf give -inf and -1.

  Raises:
    BadInput: As `queries_at_once` does.
  """
  num_devices = len(index.sharding.device_set)
  # Powers of two limit the number of shapes to compile.
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
    part = queries[start : start + size]
    part = jax.device_put(
      np.pad(part, ((0, size - len(part)), (0, 0))), _whole(index.sharding)
    )
    best = (
      jnp.full(shape, -jnp.inf, jnp.float32, device=index.sharding),
      jnp.full(shape, -1, jnp.int32, device=index.sharding),
    )
    for number in range(index.plan.blocks):
      block = index.placed[number] if index.placed else _block(index, number)
      offsets = np.array([number, index.plan.blocks, index.ntotal], np.int32)
      best = _best_with(best, part, block, offsets, index.sharding)
      jax.block_until_ready(before)
      before = best
    found.append(_merged(best, index.sharding))
    # Fetch the previous batch while the devices compute this one.
    found[-2:-1] = jax.device_get(found[-2:-1])
  return tuple(
    np.concatenate(parts)[: len(queries), :k]
    for parts in zip(*jax.device_get(found), strict=True)
  )


@functools.partial(jax.jit, static_argnames='sharding')
def _best_with(best, queries, block, offsets, sharding):
  """Returns the best of each device after it has searched its next block.

  Args:
    best: (n, Q, k) float32 scores and int32 rows, one slice per device.
    queries: (Q, E) float32, replicated.
    block: (n * rows, E) float32, `rows` rows per device.
    offsets: (3,) int32: number of the block, blocks per device, and N.
    sharding: Sharding of `best` and `block`.
  """

  def on_a_device(best, queries, block, offsets):
    number, blocks, num_rows = offsets
    start = (lax.axis_index(devices_lib.AXIS) * blocks + number) * len(block)
    here = jax.tree.map(lambda part: part[0], best)
    here = best_with(here, queries, block, start, num_rows)
    return jax.tree.map(lambda part: part[None], here)

  split, whole = sharding.spec, jax.sharding.PartitionSpec()
  return jax.shard_map(
    on_a_device,
    mesh=sharding.mesh,
    in_specs=(split, whole, split, whole),
    out_specs=split,
  )(best, queries, block, offsets)


def best_with(
  best: tuple[jax.Array, jax.Array],
  queries: jax.Array,
  block: jax.Array,
  start: jax.Array,
  num_rows: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns the best of one device after it has searched one more block.

  Args:
    best: (Q, k) float32 scores and (Q, k) int32 rows, -inf and -1 for none.
    queries: (Q, E) float32 embeddings.
    block: (rows, E) float32.
    start: () int32, row of the first passage of the block.
    num_rows: () int32, N; later rows are padding.
  """
  # By default accelerators round float32 before they multiply.
  scores = jnp.einsum(
    'qe,re->qr', queries, block, precision=lax.Precision.HIGHEST
  )
  # top_k ranks 0 above -0, and NaN above everything.
  scores = jnp.where(scores == 0, 0, scores)
  there = start + jnp.arange(len(block)) < num_rows
  scores = jnp.where(there & (scores > -jnp.inf), scores, -jnp.inf)
  k = best[0].shape[-1]
  scores, rows = lax.top_k(scores, min(k, len(block)))
  rows = jnp.where(scores > -jnp.inf, rows + start, -1)
  joined = (
    jnp.concatenate(pair, 1) for pair in zip(best, (scores, rows), strict=True)
  )
  return first(*joined, k)


@functools.partial(jax.jit, static_argnames='sharding')
def _merged(best, sharding):
  """Returns the (Q, k) best scores and rows over all devices, replicated."""
  k = best[0].shape[-1]
  # (Q, n * k), in the order of the devices.
  beside = (part.swapaxes(0, 1).reshape(part.shape[1], -1) for part in best)
  return lax.with_sharding_constraint(first(*beside, k), _whole(sharding))


def first(
  scores: jax.Array, rows: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the k best columns of each line, equal ones from left to right."""
  scores, places = lax.top_k(scores, k)
  return scores, jnp.take_along_axis(rows, places, 1)


def _block(index, number):
  """Returns block `number` of every device, (n * rows, E) in total."""
  rows, blocks, _ = index.plan

  def part(where):
    device = (where[0].start or 0) // rows
    start = (device * blocks + number) * rows
    return rows_between(index.embeddings, start, rows) - index.mean

  shape = len(index.sharding.device_set) * rows, index.embeddings[0].shape[1]
  return jax.make_array_from_callback(shape, index.sharding, part)


def rows_between(
  embeddings: Sequence[np.ndarray], start: int, number: int
) -> np.ndarray:
  """Returns `number` rows from `start`, (number, E) float32, padded with 0.

  Args:
    embeddings: Blocks of (rows, E) float32.
    start: First row, counted over all blocks.
    number: Number of rows.
  """
  found = np.zeros((number, embeddings[0].shape[1]), np.float32)
  begin = 0
  for block in embeddings:
    low, high = max(start, begin), min(start + number, begin + len(block))
    if low < high:
      found[low - start : high - start] = block[low - begin : high - begin]
    begin += len(block)
  return found


def even(share: int, most: int) -> tuple[int, int]:
  """Returns (rows, blocks) of equal blocks that hold at most `most` rows."""
  blocks = max(-(-share // most), 1)
  return -(-share // blocks), blocks


def _power_of_two(number):
  """Returns the smallest power of two that is at least `number`."""
  return 1 << (number - 1).bit_length()


def _whole(sharding):
  return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
