"""Parts of accelerator.py that measure steps, encoding and search."""

from collections.abc import Callable
from collections.abc import Sequence
import pathlib
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import made
import numpy as np
import side_by_side

from ance_jax import config
from ance_jax.core import devices
from ance_jax.data import tokens
from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.retrieval import encoding
from ance_jax.retrieval import index
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import optimizers
from ance_jax.training import packing
from ance_jax.training import searched
from ance_jax.training import steps

# Calls or steps between two looks at the clock.
TIMES = 4
_TOP_K, _SEARCH_MB, _MSMARCO = 200, 40_000, 8_841_823
_ADORE_BATCH, _ADORE_TOP_K = 32, 200


class Stepper(NamedTuple):
  """A training step on one batch, again and again.

  Attributes:
    run: Makes `TIMES` steps, waits for them and returns their last metrics.
    temporary: Bytes that XLA sets aside besides the arguments.
  """

  run: Callable[[], dict[str, jax.Array]]
  temporary: int


def secs_each(
  functions: Sequence[Callable[[], object]], rounds: int
) -> list[float]:
  """Returns the median seconds of a call of each, called in turn."""
  secs = [[] for _ in functions]
  for number in range(rounds + 1):
    for function, found in zip(functions, secs, strict=True):
      start = time.perf_counter()
      function()
      if number:  # The first compiles.
        found.append(time.perf_counter() - start)
  return [statistics.median(found) for found in secs]


_PEAKS: dict[made.Sizes, tuple[float, float | None]] = {}


def matrix_peak(sizes: made.Sizes) -> tuple[float, float | None]:
  """Returns operations a second of a product of matrices, by jax and torch.

  Torch's is None where torch is missing.
  """
  if sizes in _PEAKS:
    return _PEAKS[sizes]
  size, times, torch_peer = sizes.matrix, 20, made.peer()
  matrix = jax.random.normal(jax.random.key(0), (size, size), sizes.dtype)
  product = jax.jit(jnp.matmul)

  def by_jax():
    for _ in range(times):
      out = product(matrix, matrix)
    out.block_until_ready()

  functions = [by_jax]
  if torch_peer:
    functions.append(torch_peer.make_product(size, times, sizes.dtype))
  found = [times * 2 * size**3 / s for s in secs_each(functions, sizes.rounds)]
  _PEAKS[sizes] = found[0], found[1] if torch_peer else None
  return _PEAKS[sizes]


def encode(sizes: made.Sizes, work: pathlib.Path) -> dict:
  """Encodes batches of texts of up to 7 tokens less than their length.

  Shares of the peak are on real tokens. The peer's body has the same batch.
  """
  model, torch_peer = made.model(sizes, work), made.peer()
  encode_them = jax.jit(
    bi_encoder.make_encode(model.config, sizes.dtype, bi_encoder.PASSAGE)
  )
  theirs = torch_peer and torch_peer.load(
    made.model_folder(work), dtype=sizes.dtype
  )
  found = _peaks(sizes)
  for length in sizes.lengths:
    size = max(sizes.tokens_per_batch // length, 1)
    rows = made.token_rows(sizes, size, length, seed=0, shortest=length - 7)
    ids, lengths = rows.padded(np.arange(size), length)
    ours_in = jax.device_put((ids, lengths))

    def by_jax(ours_in=ours_in):
      for _ in range(TIMES):
        out = encode_them(model.params, *ours_in)
      out.block_until_ready()

    functions = [by_jax]
    if torch_peer:
      functions.append(torch_peer.make_encode(theirs, ids, TIMES))
    secs = secs_each(functions, sizes.rounds)
    work_done = _flop(model.config.body, lengths)
    found[str(length)] = _table(
      sizes, secs, TIMES * work_done, TIMES * int(lengths.sum())
    )
  return found


def step(sizes: made.Sizes, work: pathlib.Path) -> dict:
  """Makes packed steps of pairs, by the most tokens of a passage.

  Activations are dropped, attention weights are not: so cuDNN's kernel attends.
  Operations are those of the step's metric `flops_real`.
  """
  model, torch_peer = made.model(sizes, work), made.peer()
  found = _peaks(sizes)
  for length in sizes.lengths:
    pairs = max(sizes.passage_tokens // length, 2)
    settings = made.settings(
      sizes, batch_size=pairs, attention_dropout_rate=0.0
    )
    sides = (
      made.token_rows(sizes, pairs, made.QUERY_LENGTH, seed=0),
      made.token_rows(sizes, pairs, length, seed=1),
    )
    batch = side_by_side.Pairs(*sides, pairs).batch(0)
    ours = make_stepper(settings, model.config, model.params, batch)
    functions = [ours.run]
    if torch_peer:
      functions.append(
        torch_peer.make_step(made.model_folder(work), sides, sizes.dtype, TIMES)
      )
    secs, metrics = secs_each(functions, sizes.rounds), ours.run()
    real = TIMES * float(metrics['flops_real'])
    number = TIMES * sum(int(side.lengths().sum()) for side in sides)
    found[str(length)] = {
      'pairs': pairs,
      'real_tokens': round(float(metrics['real_tokens']), 3),
      'ms': round(1e3 * secs[0] / TIMES, 2),
      **_table(sizes, secs, real, number),
    }
  return found


def fit(sizes: made.Sizes, work: pathlib.Path) -> dict:
  """Makes a step of 512 pairs of 32 and 256 tokens, all of full length.

  Without dropout of attention weights, which is to fit, and with it, which
  writes them to memory.
  """
  model, pairs = made.model(sizes, work), sizes.pairs_to_fit
  length = min(256, max(sizes.lengths))
  if torch_peer := made.peer():
    torch_peer.give_back()
  sides = (
    made.token_rows(sizes, pairs, number, seed=0, shortest=number)
    for number in (made.QUERY_LENGTH, length)
  )
  batch, found = side_by_side.Pairs(*sides, pairs).batch(0), {}
  for name, rate in (('attention kept', 0.0), ('attention dropped', None)):
    settings = made.settings(
      sizes, batch_size=pairs, attention_dropout_rate=rate
    )
    try:
      ours = make_stepper(settings, model.config, model.params, batch)
      [secs] = secs_each([ours.run], 1)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      found[name] = {'fits': False, 'error': str(error).splitlines()[0]}
      continue
    found[name] = {
      'fits': True,
      'ms': round(1e3 * secs / TIMES, 2),
      'temporary_gb': round(ours.temporary / 1e9, 2),
    }
    if stats := devices.local(1)[0].memory_stats():
      # Of the process so far.
      found[name]['peak_gb'] = round(stats['peak_bytes_in_use'] / 1e9, 2)
      found[name]['limit_gb'] = round(stats.get('bytes_limit', 0) / 1e9, 2)
  return found


def search(sizes: made.Sizes, work: pathlib.Path) -> dict:
  """Searches exactly on the device, two corpora; says more by their slope."""
  del work
  width, found, secs = sizes.body[1], {'top_k': _TOP_K}, []
  queries = made.embeddings(sizes.corpora[1], width)[: sizes.queries].copy()
  for number in sizes.corpora:
    passages = made.embeddings(sizes.corpora[1], width)[:number]
    start = time.perf_counter()
    built = index.place([passages], devices.local(1), _SEARCH_MB)
    jax.block_until_ready(built.placed)
    placed = time.perf_counter() - start
    index.search(built, queries[:1024], _TOP_K)  # Compiles.
    start = time.perf_counter()
    ranking = index.search(built, queries, _TOP_K)
    secs.append(time.perf_counter() - start)
    best = (queries[:8] @ passages.T).max(1)
    np.testing.assert_allclose(ranking.scores[:8, 0], best, rtol=1e-5)
    found[f'{number} passages'] = {
      'placed_secs': round(placed, 2),
      'secs': round(secs[-1], 3),
      'queries_per_sec': round(len(queries) / secs[-1], 1),
    }
  slope = (secs[1] - secs[0]) / (sizes.corpora[1] - sizes.corpora[0])
  # If they are all on the device, 27 GB at this width.
  found[f'{_MSMARCO} passages, extrapolated'] = {
    'secs': round(secs[1] + slope * (_MSMARCO - sizes.corpora[1]), 1)
  }
  return found


def adore(sizes: made.Sizes, work: pathlib.Path) -> dict:
  """Makes steps that search all passages, and says what the search is of it."""
  del work
  retriever = made.retriever(sizes, tied=False)
  settings = made.settings(
    sizes,
    method='adore',
    tie_encoders=False,
    batch_size=_ADORE_BATCH,
    top_k=_ADORE_TOP_K,
    attention_dropout_rate=0.0,
  )
  number = sizes.corpora[1]
  passages = searched.place(
    [made.embeddings(number, sizes.body[1])],
    np.arange(number, dtype=np.int32),
    devices.local(1),
  )
  ours = make_stepper(
    settings,
    retriever,
    bi_encoder.init(retriever, 0),
    _searching_batch(sizes, number),
    passages,
  )
  [secs], metrics = secs_each([ours.run], sizes.rounds), ours.run()
  search_flop = 2 * _ADORE_BATCH * number * retriever.embedding_size
  return {
    'queries': _ADORE_BATCH,
    'passages': number,
    'ms': round(1e3 * secs / TIMES, 2),
    'search_share_of_flops': round(search_flop / float(metrics['flops']), 3),
  }


def texts(sizes: made.Sizes, work: pathlib.Path) -> dict:
  """Compares texts to embeddings, tokenizing included; the texts are made."""
  model, torch_peer = made.model(sizes, work), made.peer()
  most = min(128, max(sizes.lengths))
  encoder = encoding.make_encoder(
    model.config,
    bi_encoder.PASSAGE,
    dtype=sizes.dtype,
    tokens_per_batch=sizes.tokens_per_batch,
    devices=devices.local(1),
  )
  given = made.texts(sizes.texts)

  def ours():
    rows = tokens.memory_rows(model.tokenizer, given, most)
    return encoding.encode_rows(encoder, model.params, rows, 'encode')

  functions = [ours]
  if torch_peer:
    embed = torch_peer.make_embed(
      made.model_folder(work), torch_peer.GPU, sizes.dtype, most
    )
    functions.append(lambda: embed(given))
  secs = secs_each(functions, min(sizes.rounds, 3))
  lengths = tokens.memory_rows(model.tokenizer, given, most).lengths()
  done = _flop(model.config.body, lengths)
  found = _peaks(sizes) | _table(sizes, secs, done, int(lengths.sum()))
  return found | {'texts_per_sec': round(len(given) / secs[0], 1)}


def make_stepper(
  settings: config.Config,
  retriever: bi_encoder.RetrieverConfig,
  params: dict,
  batch: batches.Batch,
  passages: searched.Passages | None = None,
) -> Stepper:
  """Returns the `Stepper` of a method, which begins at `params`."""
  here, optimizer = devices.local(1), optimizers.make(settings)
  method = methods.METHODS[settings.method]
  train_step = steps.make_train_step(
    settings, method, retriever, optimizer, here
  )
  # A step gives the memory of its state away.
  params = jax.tree.map(jnp.copy, params)
  trained = experiment.trees(method, params)
  state = [steps.init_state(params, trained, optimizer, here)]
  batch = devices.shard(batch, here)
  compiled = train_step.lower(state[0], batch, passages).compile()

  def run():
    for _ in range(TIMES):
      state[0], metrics = compiled(state[0], batch, passages)
    jax.block_until_ready((state[0], metrics))
    return metrics

  return Stepper(run, compiled.memory_analysis().temp_size_in_bytes)


def _searching_batch(sizes, number):
  """Returns a batch of queries whose positives are rows of the passages."""
  queries = made.token_rows(sizes, _ADORE_BATCH, made.QUERY_LENGTH, seed=0)
  rows = np.arange(_ADORE_BATCH, dtype=np.int32)
  multiple = 16 if sizes.is_small else 128
  data = batches.TrainingData(
    queries,
    made.token_rows(sizes, 0, made.QUERY_LENGTH, seed=0),
    np.arange(_ADORE_BATCH + 1),
    rows,
    rows[:, None],
    np.arange(number, dtype=np.int32),
    {bi_encoder.QUERY: -(-made.QUERY_LENGTH // multiple) * multiple},
    positive_rows=rows[:, None],
  )
  drawn = batches.Drawn(rows, np.zeros((len(rows), 0), np.int32))
  form = packing.Form(
    data.row_lengths, batches.num_texts(data, len(rows), -1), 1, 1
  )
  shapes = packing.choose([batches.assigned(data, drawn)], form)
  return batches.make_batch(data, drawn, shapes=shapes)


def _flop(body, lengths):
  """Returns the operations of encoding texts of some lengths."""
  # In float: products of these integers overflow.
  lengths = lengths.astype(np.float64)
  return bert.flops(body, lengths, lengths).sum()


def _peaks(sizes):
  """Returns the peaks in TFLOP/s."""
  names = 'peak_tflops', 'torch_peak_tflops'
  return {
    name: round(peak / 1e12, 4)
    for name, peak in zip(names, matrix_peak(sizes), strict=True)
    if peak
  }


def _table(sizes, secs, flop, number):
  """Returns tokens a second and shares of the peak, of torch if it ran.

  Args:
    sizes: `Sizes`, for the peaks.
    secs: Seconds of ours and, if it ran, of torch.
    flop: Operations of a call, on real tokens.
    number: Real tokens of a call.
  """
  found = {}
  sides = zip(('', 'torch_'), secs, matrix_peak(sizes), strict=False)
  for name, took, peak in sides:
    found[f'{name}tokens_per_sec'] = round(number / took)
    found[f'{name}share'] = round(flop / took / peak, 3)
  return found
