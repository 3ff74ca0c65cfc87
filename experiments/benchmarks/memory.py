"""Memory and time of a training step: --micro_batch_size and --remat.

    python experiments/benchmarks/memory.py

An encoder of MiniLM's sizes (6 layers, width 384), random tokens, 64 queries of
32 tokens and passages of 128, dropout 0.1, float32, one device. Memory is what
XLA sets aside for the step besides parameters, optimizer state and batch; time
is the median of steps in turn. The last line is a JSON object.
"""

import json
import statistics
import time

import jax
import numpy as np
import side_by_side

from ance_jax import config
from ance_jax.core import devices
from ance_jax.data import tokens
from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.training import methods
from ance_jax.training import optimizers
from ance_jax.training import steps

QUERIES, QUERY_LENGTH, PASSAGE_LENGTH, ROUNDS = 64, 32, 128, 3
RETRIEVER = bi_encoder.RetrieverConfig(
  bert.BodyConfig('bert', 30_522, 384, 6, 12, 1536, 512, 2, 1e-12, 'gelu'),
  tied=True,
  pooling='mean',
  head_size=0,
  head_norm=True,
  similarity='cosine',
  query_length=QUERY_LENGTH,
  passage_length=PASSAGE_LENGTH,
  title_separator=' ',
)
WAYS = {
  'plain': {},
  '--remat': {'remat': True},
  '--micro_batch_size=8': {'micro_batch_size': 8},
  'both': {'remat': True, 'micro_batch_size': 8},
}
# One row with in-batch columns, one with a hard negative a query.
ROWS = {'in_batch': 0, 'ance': 1}


def texts(number, length):
  """Returns the `tokens.TokenRows` of random texts of full length."""
  ids = np.random.default_rng(0).integers(1, 30_522, number * length)
  offsets = np.arange(0, len(ids) + 1, length)
  return tokens.TokenRows(ids.astype(np.uint16), offsets, 0, '')


def make_batch(num_negatives, pieces, here):
  """Returns a batch in so many pieces, on the devices `here`."""
  pairs = side_by_side.Pairs(
    texts(QUERIES, QUERY_LENGTH),
    texts(QUERIES * (1 + num_negatives), PASSAGE_LENGTH),
    QUERIES,
    pieces,
  )
  return devices.shard(pairs.batch(0), here)


def measure(row):
  """Returns {way: {'MB': temporary memory, 'secs': of a step}} of a row."""
  here = (jax.devices()[0],)
  made, compiled, found = {}, {}, {}
  for way, changes in WAYS.items():
    settings = config.Config(
      batch_size=QUERIES, temperature=0.05, lr_warmup_steps=0, **changes
    )
    optimizer = optimizers.make(settings)
    shapes = steps.state_shapes(
      bi_encoder.shapes(RETRIEVER), RETRIEVER.towers, optimizer, here
    )
    train_step = steps.make_train_step(
      settings, methods.METHODS[row], RETRIEVER, optimizer, here
    )
    size = settings.micro_batch_size or QUERIES
    made[way] = make_batch(ROWS[row], QUERIES // size, here)
    compiled[way] = train_step.lower(shapes, made[way], None).compile()
    size = compiled[way].memory_analysis().temp_size_in_bytes
    found[way] = {'MB': round(size / 1e6), 'secs': []}
  state = steps.init_state(
    bi_encoder.init(RETRIEVER, 0), RETRIEVER.towers, optimizer, here
  )
  for number in range(ROUNDS + 1):
    for way in WAYS:
      start = time.perf_counter()
      state, metrics = compiled[way](state, made[way], None)
      jax.block_until_ready((state, metrics))
      if number:
        found[way]['secs'].append(time.perf_counter() - start)
  return found


def main():
  print(f'{"row":10}{"":22}{"MB":>8}{"secs":>8}{"to plain":>10}')
  result = {}
  for row in ROWS:
    result[row] = measure(row)
    plain = result[row]['plain']['secs']
    for way, found in result[row].items():
      pairs = zip(found['secs'], plain, strict=True)
      found['ratio'] = round(statistics.median(a / b for a, b in pairs), 2)
      found['secs'] = round(statistics.median(found['secs']), 2)
      print(
        f'{row:10}{way:22}{found["MB"]:8,}{found["secs"]:8.2f}'
        f'{found["ratio"]:10.2f}'
      )
  print(json.dumps(result))


if __name__ == '__main__':
  main()
