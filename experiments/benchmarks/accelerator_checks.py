"""Parts of accelerator.py that check numbers, and raise where one is wrong."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import made
import numpy as np
import side_by_side

from ance_jax.core import devices
from ance_jax.data import tokens
from ance_jax.models import bi_encoder
from ance_jax.models import pretrained
from ance_jax.retrieval import encoding
from ance_jax.training import methods
from ance_jax.training import steps

_TEXTS, _PAIRS = 32, 16
# Arrays of NaN by their bytes. The small ones fill the gaps that earlier work
# left: an allocator takes the smallest that is large enough.
_CHUNKS = {2**28: 8, 2**24: 64, 2**20: 256, 2**16: 256}


def correct(sizes: made.Sizes, work: pathlib.Path) -> dict[str, float]:
  """Holds float32 against the CPU: embeddings, and the gradient of a step."""
  model, most = made.model(sizes, work), min(256, max(sizes.lengths))
  texts = made.texts(_TEXTS)
  rows = tokens.memory_rows(model.tokenizer, texts, most)
  here, host = devices.local(1), tuple(jax.devices('cpu')[:1])
  ours, on_host = (_embeddings(model, rows, where) for where in (here, host))
  found = {'embeddings, to the CPU': float(np.abs(ours - on_host).max())}
  if torch_peer := made.peer():
    folder = made.model_folder(work)
    embed = torch_peer.make_embed(folder, 'cpu', 'float32', most)
    theirs = float(np.abs(ours - embed(texts)).max())
    found['embeddings, to torch on the CPU'] = theirs
  settings, batch = made.settings(sizes, dtype='float32'), _pairs(sizes)
  ours, on_host = (
    _gradient(settings, model, batch.batch(0), where) for where in (here, host)
  )
  found['gradient, to the CPU'] = distance(ours, on_host)
  # Sums of 768 to 3,072 products in another order, in 12 layers: 5.1e-8 and
  # 5e-6 were seen, and 1e-3 where float32 is rounded before it is multiplied.
  for name, value in found.items():
    limit = 1e-4 if name.startswith('gradient') else 1e-5
    require(value < limit, f'{name}: {value:.1e} is not below {limit}')
  return found


def poisoned(sizes: made.Sizes, work: pathlib.Path) -> dict[str, float]:
  """Fills free memory with NaN before packed rows are computed.

  Values that a kernel leaves unwritten are NaN then. Two layers are enough to
  show it, and compile faster than twelve. The check compares the vectors of
  packed texts with one text per row, and the gradient with and without the
  kernel.
  """
  body = dataclasses.replace(made.retriever(sizes).body, num_layers=2)
  retriever = dataclasses.replace(made.retriever(sizes), body=body)
  params = bi_encoder.init(retriever, 0)
  pairs, found = _pairs(sizes), {}
  exact = _vectors(retriever, params, pairs, 'float32', packed=False)
  for dtype in ('float32', 'bfloat16'):
    packed, padded = (
      _vectors(retriever, params, pairs, dtype, packed=packed)
      for packed in (True, False)
    )
    found[f'{dtype} packed'] = distance(packed, exact)
    found[f'{dtype} padded'] = distance(padded, exact)
  model = pretrained.Model(retriever, None, params)
  for name, changes in (
    ('exact', {'dtype': 'float32'}),
    ('kernel', {'dtype': 'bfloat16'}),
    # What an asynchronous run does without it.
    ('no kernel', {'dtype': 'bfloat16', 'refresh_mode': 'async'}),
  ):
    settings = made.settings(sizes, attention_dropout_rate=0.0, **changes)
    gradient = _gradient(
      settings, model, pairs.batch(0), devices.local(1), poison_first=True
    )
    exact = gradient if name == 'exact' else exact
    found[f'gradient, {name}'] = distance(gradient, exact)
  value = found['float32 packed']
  # Sums in another order.
  require(value < 1e-5, f'float32 packed: {value:.1e} is not below 1e-5')
  for name, other in (
    ('bfloat16 packed', 'bfloat16 padded'),
    ('gradient, kernel', 'gradient, no kernel'),
  ):
    # Both round to 8 bits as often; only where a kernel rounds is its own.
    require(
      found[name] <= 2 * found[other],
      f'{name}: {found[name]:.1e} is more than twice {found[other]:.1e}',
    )
  return found


def require(is_right: bool, fact: str) -> None:
  """Raises `ArithmeticError` with a fact unless all is right."""
  if not is_right:
    raise ArithmeticError(fact)


def distance(first: np.ndarray, second: np.ndarray) -> float:
  """Returns the norm of the difference, relative to that of the second.

  Raises:
    ArithmeticError: One of the first is not finite.
  """
  require(np.isfinite(first).all(), 'a number is not finite')
  return float(np.linalg.norm(first - second) / np.linalg.norm(second))


def poison(device: jax.Device) -> None:
  """Leaves NaN in the memory that the next arrays are made in."""
  # Of a host's memory nothing is known.
  most = max(_CHUNKS) if device.memory_stats() else 2**20
  held = [
    jnp.full(size // 4, jnp.nan, jnp.float32, device=device)
    for size, number in _CHUNKS.items()
    for _ in range(number)
    if size <= most
  ]
  jax.block_until_ready(held)


def _pairs(sizes):
  """Returns packed pairs with the text lengths of a run."""
  most = min(256, max(sizes.lengths))
  return side_by_side.Pairs(
    made.token_rows(sizes, _PAIRS, made.QUERY_LENGTH, seed=0),
    made.token_rows(sizes, _PAIRS, most, seed=1),
    _PAIRS,
  )


def _embeddings(model, rows, here):
  """Returns the float32 embeddings of some passages."""
  encoder = encoding.make_encoder(
    model.config,
    bi_encoder.PASSAGE,
    dtype='float32',
    tokens_per_batch=8192,
    devices=here,
  )
  params = devices.replicate(jax.device_get(model.params), here)
  return encoding.encode_rows(encoder, params, rows, 'encode')[0]


def _vectors(retriever, params, pairs, dtype, packed):
  """Returns the (2 B, E) vectors of a batch's texts from poisoned memory.

  Args:
    retriever: Settings of the retriever.
    params: Parameters by tower.
    pairs: `side_by_side.Pairs` of one batch.
    dtype: Of the activations.
    packed: Whether texts share rows.
  """
  batch = pairs.batch(0)
  pack = jax.tree.map(lambda x: x[0], batch.packs[bi_encoder.TIED])
  pool = bi_encoder.Pooled(retriever, jnp.dtype(dtype))
  ids, lengths = pack.ids, pack.lengths
  if not packed:
    ids, lengths = one_text_a_row(pack)
  apply = jax.jit(
    lambda *arrays: pool.apply({'params': arrays[0]}, *arrays[1:])
  )
  arguments = jax.device_put((params[bi_encoder.TIED], ids, lengths))
  for _ in range(2):  # The first compiles.
    poison(devices.local(1)[0])
    vectors = np.asarray(apply(*arguments))
  vectors = vectors.reshape(-1, vectors.shape[-1])
  if packed:
    vectors = vectors[pack.lengths.ravel() > 0]
  return vectors


def one_text_a_row(pack: tuple) -> tuple[np.ndarray, np.ndarray]:
  """Returns (T, L) ids and (T,) lengths of a `Pack`'s texts, row by row."""
  length = pack.ids.shape[-1]
  ends = pack.lengths.cumsum(-1)
  row, slot = np.nonzero(pack.lengths)
  lengths, ids = pack.lengths[row, slot], np.zeros((len(row), length), np.int32)
  for text, (line, end) in enumerate(zip(row, ends[row, slot], strict=True)):
    ids[text, : lengths[text]] = pack.ids[line, end - lengths[text] : end]
  return ids, lengths


def _gradient(settings, model, batch, here, poison_first=False) -> np.ndarray:
  """Returns the gradient of a step as one vector."""
  gradient = jax.pmap(
    steps.make_gradient(settings, methods.METHODS['in_batch'], model.config),
    axis_name=devices.AXIS,
    in_axes=(None, 0, None),
    out_axes=None,
    devices=here,
  )
  batch = devices.shard(batch, here)
  params = devices.replicate(jax.device_get(model.params), here)
  for _ in range(1 + poison_first):  # The first compiles.
    if poison_first:
      poison(here[0])
    _, grads = gradient(params, batch, np.int32(0))
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(grads)]
  return np.concatenate(leaves).astype(np.float64)
