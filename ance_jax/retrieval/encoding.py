"""The encoding pass: token rows -> embeddings, jitted, on all devices.

A corpus is encoded in blocks of consecutive rows, independent of the devices.
Each block is a folder that is published atomically; existing blocks are reused.
"""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from ance_jax.core import atomic
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.data import tokens as tokens_lib
from ance_jax.models import bert
from ance_jax.models import bi_encoder

# Batch lengths are rounded up to a multiple of this many tokens; smaller steps
# pad less and compile more.
_LENGTH_STEP = 16
# Maximum number of batches dispatched to the devices and not yet fetched.
_UNDER_WAY = 2


class Settings(NamedTuple):
  """How to encode texts; each setting affects the bits of the embeddings.

  Attributes:
    dtype: Type of the body's activations, by name.
    tokens_per_batch: Tokens per batch over all devices, padding included.
    chunks: Maximum number of pieces of a passage, whose score is that of its
      best piece (MaxP).
    whole_chunks: Whether to tokenize a passage once and then cut it; see
      `tokens.Cut`.
    kernel: As in `bert.Body`.
  """

  dtype: str = 'float32'
  tokens_per_batch: int = 4096
  chunks: int = 1
  whole_chunks: bool = False
  kernel: bool = True


class Encoder(NamedTuple):
  """The compiled pass for one side of a retriever.

  Attributes:
    encode: Jitted (params, ids, lengths) -> (rows, E) float32 embeddings, rows
      split over the devices.
    num_devices: Devices to use, all of this process.
    tokens_per_batch: Tokens per batch over these, padding included.
    max_length: Maximum number of tokens that the model can take.
    embedding_size: E.
  """

  encode: Callable
  num_devices: int
  tokens_per_batch: int
  max_length: int
  embedding_size: int


def make_encoder(
  retriever: bi_encoder.RetrieverConfig,
  side: str,
  *,
  dtype: str,
  tokens_per_batch: int,
  devices: Sequence[jax.Device],
  kernel: bool = True,
) -> Encoder:
  """Returns the encoder of one side.

  Args:
    retriever: Settings of the retriever.
    side: `bi_encoder.QUERY` or `bi_encoder.PASSAGE`.
    dtype: As in `Settings`.
    tokens_per_batch: As in `Settings`.
    devices: Accelerators to use.
    kernel: As in `Settings`.
  """
  whole, split = devices_lib.replicated(devices), devices_lib.split(devices)
  compiled = jax.jit(
    bi_encoder.make_encode(retriever, dtype, side, kernel=kernel),
    in_shardings=(whole, split, split),
    out_shardings=split,
  )

  def encode(params, ids, lengths):
    # With several processes, jit does not shard numpy arrays.
    return compiled(params, *jax.device_put((ids, lengths), split))

  return Encoder(
    encode,
    split.num_devices,
    tokens_per_batch,
    retriever.body.max_length,
    retriever.embedding_size,
  )


def encode_rows(
  encoder: Encoder,
  params: dict,
  token_rows: tokens_lib.TokenRows,
  what: str,
  rows: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
  """Encodes token rows.

  The host pads the next batches while the devices compute.

  Args:
    encoder: Encoder of the rows' side.
    params: Parameters by tower, on all devices.
    token_rows: Any object with `TokenRows`' length, `lengths` and `padded`.
    what: Label of the progress bar.
    rows: (n,) int, rows to encode; None for all.

  Returns:
    (n, E) float32 embeddings in the order of `rows`, and the number of tokens
    computed, padding included.
  """
  rows = np.arange(len(token_rows)) if rows is None else rows
  plan = batch_plan(token_rows.lengths()[rows], encoder)
  embeddings = np.empty((len(rows), encoder.embedding_size), np.float32)
  under_way = collections.deque()

  def padded(batch):
    places, size, length = batch
    wanted = np.pad(rows[places], (0, size - len(places)), constant_values=-1)
    return places, *token_rows.padded(wanted, length)

  def fetch():
    places, output = under_way.popleft()
    embeddings[places] = np.asarray(output)[: len(places)]

  for places, ids, lengths in logs.progress(
    logs.ahead(padded, plan),
    what,
    total=len(rows),
    unit='rows',
    count=lambda batch: len(batch[0]),
  ):
    under_way.append((places, encoder.encode(params, ids, lengths)))
    if len(under_way) > _UNDER_WAY:
      fetch()
  while under_way:
    fetch()
  return embeddings, sum(size * length for _, size, length in plan)


def batch_plan(
  lengths: np.ndarray, encoder: Encoder
) -> list[tuple[np.ndarray, int, int]]:
  """Sorts rows by length, longest first, and groups them into batches.

  Batches of equal length have equal size, so that each length is compiled once;
  only the last batch may not be full.

  Args:
    lengths: (n,) int, tokens of each row.
    encoder: Encoder of the rows.

  Returns:
    (places, size, length) of each batch: its (m,) int indices into `lengths`,
    its number of rows (at least m), and its padded length in tokens.
  """
  order = np.argsort(-lengths, kind='stable')
  plan, start = [], 0
  while start < len(order):
    longest = int(lengths[order[start]])
    length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, encoder.max_length)
    size = encoder.tokens_per_batch // length
    # Do not pad a few rows to thousands.
    size = min(size, 1 << (len(order) - 1).bit_length())
    size = max(size // encoder.num_devices, 1) * encoder.num_devices
    plan.append((order[start : start + size], size, length))
    start += size
  return plan


def encode_corpus(
  encoder: Encoder,
  params: dict,
  token_rows: tokens_lib.TokenRows,
  folder: str | pathlib.Path,
  *,
  rows_per_block: int,
) -> tuple[list[np.ndarray], float | None]:
  """Writes the embeddings of all passages as blocks of consecutive rows.

  The processes of a run encode the blocks in turn; existing blocks are kept.

  Args:
    encoder: Encoder of passages.
    params: Parameters by tower, on all devices.
    token_rows: Token rows of the corpus.
    folder: Folder of the blocks, specific to the weights and the corpus.
    rows_per_block: Passages per block; the last block may be smaller.

  Returns:
    The blocks, in order, as read-only memory maps (rows, E) float32; and the
    share of computed tokens that are not padding, None if none were computed.

  Raises:
    OSError: Another process has not written one of its blocks.
  """
  folder = pathlib.Path(folder)
  lengths = token_rows.lengths()
  real = computed = 0
  paths = []
  for start in range(0, len(token_rows), rows_per_block):
    rows = np.arange(start, min(start + rows_per_block, len(token_rows)))
    block = folder / f'{start // rows_per_block:05d}'
    paths.append(block / 'embeddings.npy')
    others = len(paths[:-1]) % distributed.count() != distributed.index()
    if others or atomic.find_valid(block, {}):
      continue
    what = f'encode block {len(paths)}/{-(-len(token_rows) // rows_per_block)}'
    embeddings, tokens = encode_rows(encoder, params, token_rows, what, rows)
    real, computed = real + lengths[rows].sum(), computed + tokens
    with atomic.publish(
      block, {'start': start, 'rows': len(rows)}
    ) as unfinished:
      np.save(unfinished / 'embeddings.npy', embeddings)
  # Also waits until all processes have written their blocks.
  real, computed = distributed.all_gather(
    np.array([real, computed], np.int64)
  ).sum(0)
  return (
    [atomic.load_array(path) for path in paths],
    float(real / computed) if computed else None,
  )


def flops(
  encoder: Encoder,
  body: bert.BodyConfig,
  lengths: np.ndarray,
  rows_per_block: int | None = None,
) -> int:
  """Returns the operations for encoding rows, padding included.

  It counts all rows, also those of existing blocks and other processes.

  Args:
    encoder: Encoder of the rows.
    body: Sizes of the body.
    lengths: (n,) int, tokens of each row.
    rows_per_block: As for `encode_corpus`; None for one block.
  """
  size = rows_per_block or max(len(lengths), 1)
  return sum(
    bert.flops(body, rows * length, length)
    for start in range(0, len(lengths), size)
    for _, rows, length in batch_plan(lengths[start : start + size], encoder)
  )


def make_encoders(
  retriever: bi_encoder.RetrieverConfig, **kwargs
) -> tuple[Encoder, Encoder]:
  """Returns the encoders of queries and passages; see `make_encoder`."""
  return tuple(
    make_encoder(retriever, side, **kwargs)
    for side in (bi_encoder.QUERY, bi_encoder.PASSAGE)
  )
