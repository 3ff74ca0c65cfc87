"""Batches of one topic: clusters of the training queries.

Hofstaetter et al. 2021 (TAS-Balanced), section 4.1: k-means of the queries'
embeddings before training; the queries of a batch are of one cluster, so that
in-batch negatives are closer to them.
"""

import numpy as np

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.core import remote
from ance_jax.retrieval import index
from ance_jax.training import experiment

_FOLDER, _ARRAY = 'topics', 'topics.npy'


def make(run: experiment.Experiment, step: int) -> np.ndarray:
  """Returns the (Q,) int32 topic of each training query, made once per run.

  Args:
    run: The run, with its parameters after `step`.
    step: Optimizer steps made.

  Raises:
    BadInput: They are gone though training has begun.
  """
  config, split = run.config, run.config.train_split
  folder = run.workdir / _FOLDER
  about = {
    'run': run.id,
    'queries': run.dataset.queries[split].hash,
    'topics': config.topics,
    'seed': config.seed,
  }
  remote.pull(folder)
  if not distributed.broadcast(lambda: atomic.find_valid(folder, about)):
    if step:
      raise errors.refusal(
        f'{folder}, the topics of the training queries, is gone, and only the '
        'first weights can make it again',
        'restore a copy, or name another --workdir',
      )
    queries = run.encode_queries(split, logs.Stopwatch())
    if distributed.is_first():
      found = index.cluster(queries, config.topics, config.seed)
      sizes = np.bincount(found, minlength=config.topics)
      logs.log(
        f'{config.topics:,} topics of {sizes.min():,} to {sizes.max():,} '
        f'training queries, {int(np.median(sizes)):,} in the median'
      )
      with atomic.publish(folder, about) as unfinished:
        np.save(unfinished / _ARRAY, found)
    distributed.barrier('topics')
  if distributed.is_first():
    remote.push(folder)
  return atomic.load_array(folder / _ARRAY)


def peek(run: experiment.Experiment) -> np.ndarray | None:
  """Returns the topics that a run has on disk, as `make` does; None if none."""
  folder = run.workdir / _FOLDER
  is_there = run.config.topics and atomic.is_committed(folder)
  return atomic.load_array(folder / _ARRAY) if is_there else None
