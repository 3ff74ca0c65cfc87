"""The encoding pass: token rows -> embeddings, jitted, over all devices.

A corpus is encoded in blocks of consecutive rows, whatever the devices, each a
folder that is there whole or not at all; what is there is not made again.
"""

import collections
from collections.abc import Callable
import pathlib
from typing import NamedTuple

import jax
import numpy as np

from ance_jax.core import atomic
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.models import bert
from ance_jax.models import bi_encoder

# Tokens that batch lengths are rounded up to: finer steps pad less and compile
# more.
_LENGTH_STEP = 16
# Batches that the devices have been given and the host has not fetched.
_UNDER_WAY = 2


class Settings(NamedTuple):
  """How texts are encoded; their bits depend on all of it.

  Attributes:
    dtype: Type that the body computes in, by name.
    tokens_per_batch: Tokens of a batch over all devices, padding included.
    chunks: Pieces of a passage at most, the best of which is its score (MaxP).
    whole_chunks: Whether a passage is tokenized once and then cut; see
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
      dealt out over the devices.
    num_devices: Number of these, all of this process.
    tokens_per_batch: Tokens of a batch over these, padding included.
    max_length: Tokens that the model can take.
    embedding_size: E.
  """

  encode: Callable
  num_devices: int
  tokens_per_batch: int
  max_length: int
  embedding_size: int


def make_encoder(
  retriever, side, *, dtype, tokens_per_batch, devices, kernel=True
):
  """Returns the `Encoder` of one side, `bi_encoder.QUERY` or `PASSAGE`.

  Args:
    retriever: `bi_encoder.RetrieverConfig`.
    side: Whose texts it encodes.
    dtype: As in `Settings`.
    tokens_per_batch: As in `Settings`.
    devices: The accelerators used.
    kernel: As in `Settings`.
  """
  whole, split = devices_lib.replicated(devices), devices_lib.split(devices)
  compiled = jax.jit(
    bi_encoder.make_encode(retriever, dtype, side, kernel=kernel),
    in_shardings=(whole, split, split),
    out_shardings=split,
  )

  def encode(params, ids, lengths):
    # Where there are other processes, jit does not deal out what numpy holds.
    return compiled(params, *jax.device_put((ids, lengths), split))

  return Encoder(
    encode,
    split.num_devices,
    tokens_per_batch,
    retriever.body.max_length,
    retriever.embedding_size,
  )


def encode_rows(encoder, params, token_rows, what, rows=None):
  """Returns the embeddings of some token rows, in their order.

  The host pads the next batches while the devices work on those before.

  Args:
    encoder: An `Encoder`.
    params: Parameters by tower, on all devices.
    token_rows: `TokenRows`.
    what: Name of the phase for the progress bar.
    rows: (n,) int, rows to encode; None for all.

  Returns:
    (n, E) float32, and the number of tokens computed, padding included.
  """
  rows = np.arange(len(token_rows)) if rows is None else rows
  plan = batch_plan(token_rows.lengths()[rows], encoder)
  embeddings = np.empty((len(rows), encoder.embedding_size), np.float32)
  under_way = collections.deque()

  def padded(batch):
    places, size, length = batch
    wanted = np.full(size, -1)
    wanted[: len(places)] = rows[places]
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


def batch_plan(lengths, encoder):
  """Returns how rows of these lengths are put into batches, longest first.

  Batches of equal length have equal size, so that each length is compiled once;
  only the last one is not full.

  Args:
    lengths: (n,) int, tokens of each row.
    encoder: An `Encoder`.

  Returns:
    A list of (places, size, length): the (m,) int places in `lengths` that are
    in the batch, its rows (m at least), and the tokens it is padded to.
  """
  order = np.argsort(-lengths, kind='stable')
  plan, start = [], 0
  while start < len(order):
    longest = int(lengths[order[start]])
    length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, encoder.max_length)
    size = encoder.tokens_per_batch // length
    # A handful of rows is not padded to thousands.
    size = min(size, 1 << (len(order) - 1).bit_length())
    size = max(size // encoder.num_devices, 1) * encoder.num_devices
    plan.append((order[start : start + size], size, length))
    start += size
  return plan


def encode_corpus(encoder, params, token_rows, folder, *, rows_per_block):
  """Writes the embeddings of all passages as blocks of consecutive rows.

  The processes of a run take turns with them.

  Args:
    encoder: An `Encoder`.
    params: Parameters by tower, on all devices.
    token_rows: `TokenRows` of the corpus.
    folder: Where the blocks are, named for the weights and the corpus; blocks
      that are there are kept.
    rows_per_block: Passages of a block; the last one may be smaller.

  Returns:
    The blocks, in order, as read-only memory maps (rows, E) float32; and the
    share of real tokens in what was computed, None if nothing was.

  Raises:
    OSError: A block that another process was to write is not there.
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
    if others or atomic.find(block, {}):
      continue
    what = f'encode block {len(paths)}/{-(-len(token_rows) // rows_per_block)}'
    embeddings, tokens = encode_rows(encoder, params, token_rows, what, rows)
    real, computed = real + lengths[rows].sum(), computed + tokens
    about = {'start': start, 'rows': len(rows)}
    with atomic.publish(block, about) as unfinished:
      np.save(unfinished / 'embeddings.npy', embeddings)
  # None is read before all are written.
  counts = distributed.gather(np.array([real, computed], np.int64))
  real, computed = counts.sum(0)
  share = float(real / computed) if computed else None
  return [atomic.load_array(path) for path in paths], share


def flops(encoder, body, lengths, rows_per_block=None):
  """Returns the operations that encoding rows takes, padding included.

  Whether or not they are there already, and whoever does it.

  Args:
    encoder: An `Encoder`.
    body: `bert.BodyConfig`.
    lengths: (n,) int, tokens of each row.
    rows_per_block: As for `encode_corpus`; None: all rows together.
  """
  size = rows_per_block or max(len(lengths), 1)
  return sum(
    bert.flops(body, rows * length, length)
    for start in range(0, len(lengths), size)
    for _, rows, length in batch_plan(lengths[start : start + size], encoder)
  )


def make_encoders(retriever, **kwargs):
  """Returns the `Encoder` of queries and that of passages."""
  return tuple(
    make_encoder(retriever, side, **kwargs)
    for side in (bi_encoder.QUERY, bi_encoder.PASSAGE)
  )
