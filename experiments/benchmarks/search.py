"""Exact search: FAISS flat on the host against --index=device.

    python experiments/benchmarks/search.py [--width=768] [--devices=1]

For each number of passages and of queries: seconds of the search for the best
200; of the processor's time in all threads, which other processes disturb less;
and of making the index once. Embeddings are random, of normal entries. On a GPU
the FAISS of PyPI stays on the host's cores, as it does in a run, and the
processor's time says nothing of the device.
"""

import argparse
import json
import os
import time

import jax
import numpy as np

from ance_jax.core import devices as devices_lib
from ance_jax.retrieval import index

TOP_K = 200


def secs_of(function):
  """Returns the seconds of a call, those of the processor, and its value."""
  start, busy = time.perf_counter(), time.process_time()
  found = function()
  return time.perf_counter() - start, time.process_time() - busy, found


def place(passages, devices, memory):
  """Returns the index when its blocks are on the devices."""
  built = index.place([passages], devices, memory)
  jax.block_until_ready(built.placed)
  return built


def measure(queries, built, rounds):
  """Returns the median seconds, and those of the processor, in each index.

  They are searched in turn.
  """
  secs = [[] for _ in built]
  for number in range(rounds + 1):
    found = []
    for one, taken in zip(built, secs, strict=True):
      *used, ranking = secs_of(
        lambda one=one: index.search(one, queries, TOP_K)
      )
      found.append(ranking)
      if number:  # The first compiles.
        taken.append(used)
  flat, ours = found
  np.testing.assert_allclose(ours.scores, flat.scores, rtol=1e-4, atol=1e-4)
  same = (ours.rows == flat.rows).mean()
  assert same > 0.999, f'{same:.2%} of the rows are the same'
  return [np.median(taken, 0).tolist() for taken in secs]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--width', type=int, default=768)
  parser.add_argument('--devices', type=int, default=1)
  parser.add_argument('--memory', type=int, default=4096)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument(
    '--passages', type=int, nargs='+', default=[10_000, 100_000, 300_000]
  )
  parser.add_argument('--queries', type=int, nargs='+', default=[1, 100, 2000])
  given = parser.parse_args()
  here = devices_lib.local(given.devices)
  name = f'{len(here)} {here[0].device_kind}'
  print(f'{name}, {os.cpu_count()} cores, {given.width} wide, top {TOP_K}')
  head = 'passages queries FAISS device times CPU CPU times'.split()
  print(''.join(f'{word:>11}' for word in head) + '   index made in')
  random, table = np.random.default_rng(0), []
  for number in given.passages:
    size = number, given.width
    passages = random.standard_normal(size, np.float32)
    flat_secs, _, flat = secs_of(
      lambda p=passages: index.build('Flat', '', [p])
    )
    our_secs, _, ours = secs_of(lambda p=passages: place(p, here, given.memory))
    for asked in given.queries:
      queries = random.standard_normal((asked, given.width), np.float32)
      theirs, found = measure(queries, (flat, ours), given.rounds)
      cells = (
        f'{a:11.3f}{b:11.3f}{a / b:11.2f}'
        for a, b in zip(theirs, found, strict=True)
      )
      print(
        f'{number:11,}{asked:11,}{"".join(cells)}   '
        f'{flat_secs:.2f} and {our_secs:.2f}',
        flush=True,
      )
      row = {'passages': number, 'queries': asked}
      table.append({**row, 'faiss_secs': theirs, 'secs': found})
  about = {'device': name, 'width': given.width, 'memory_mb': given.memory}
  print(json.dumps({**about, 'resident': ours.plan.resident, 'table': table}))


if __name__ == '__main__':
  main()
