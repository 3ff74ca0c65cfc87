"""Scores mined negatives by a teacher, in parts that a killed run finds again.

A cross-encoder takes hours for what a refresh mines, so that each process
scores its share of the parts, and each part is on disk once it is scored.
"""

from collections.abc import Callable
import hashlib
import json
import pathlib
import shutil
from typing import Any

import numpy as np

from ance_jax.core import atomic
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.data import corpus as corpus_lib
from ance_jax.mining import candidates
from ance_jax.training import experiment

# Pairs of query and passage in a part.
_PAIRS_AT_ONCE = 2**20
_FOLDER = 'taught'


def scorer(
  run: experiment.Experiment, split: corpus_lib.Split, *, raw: bool = False
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  """Returns the `candidates.reranker` of the run's settings."""
  config = run.config
  return candidates.reranker(
    run.dataset.corpus,
    split,
    score_run=config.score_run,
    cross_encoder=config.cross_encoder,
    devices=devices_lib.own(run.devices) if config.cross_encoder else (),
    dtype=config.dtype,
    tokens_per_batch=config.tokens_per_batch,
    raw=raw,
  )


def of_pairs(
  score: Callable[[np.ndarray, np.ndarray], np.ndarray],
  split: corpus_lib.Split,
  queries: np.ndarray,
  passages: np.ndarray,
) -> np.ndarray:
  """Returns (P,) float32 scores; a query's twins may have them as well."""
  found = score(queries, passages).astype(np.float32)
  twins = split.twins()[queries]
  for place in np.flatnonzero(np.isnan(found) & twins).tolist():
    same = np.flatnonzero(split.groups == split.groups[queries[place]])
    theirs = score(same, np.full(len(same), passages[place]))
    found[place] = next((one for one in theirs if not np.isnan(one)), np.nan)
  return found


def of_table(
  run: experiment.Experiment,
  score: Callable[[np.ndarray, np.ndarray], np.ndarray],
  rows: np.ndarray,
  kept: np.ndarray,
  first: int,
  *,
  about: dict[str, Any],
  keep: bool,
  dealt: bool,
) -> np.ndarray:
  """Returns (q, K) float32 scores, NaN where `kept` is false.

  Args:
    run: The run.
    score: As `scorer` returns it.
    rows: (q, K) int32 passage rows of consecutive queries.
    kept: (q, K) bool, which of them to score.
    first: Row of the first query.
    about: Fingerprint of the teacher and the texts.
    keep: Whether to keep the parts in the run's folder until `forget`.
    dealt: Whether all processes call this, for the same rows.
  """
  at_once = max(_PAIRS_AT_ONCE // rows.shape[1], 1)
  parts = [
    slice(start, start + at_once) for start in range(0, len(rows), at_once)
  ]

  def score_part(part):
    of_query, column = np.nonzero(kept[part])
    taught = np.full(rows[part].shape, np.nan, np.float32)
    taught[of_query, column] = score(
      first + part.start + of_query, rows[part][of_query, column]
    )
    return taught

  if not keep:
    return np.concatenate([score_part(part) for part in parts])
  digest = hashlib.sha256(json.dumps([about, first, rows.shape]).encode())
  for array in (rows, kept):
    digest.update(np.ascontiguousarray(array))
  folder = run.workdir / _FOLDER / digest.hexdigest()[:16]
  atomic.make_folder(folder)
  paths = [folder / f'{part.start:09d}.npy' for part in parts]
  own = (distributed.index(), distributed.count()) if dealt else (0, 1)
  for number in range(own[0], len(parts), own[1]):
    if not paths[number].exists():
      with atomic.writing(paths[number]) as file:
        np.save(file, score_part(parts[number]))
  if dealt:
    distributed.barrier('taught')
  return np.concatenate([atomic.load_array(path) for path in paths])


def forget(workdir: pathlib.Path) -> None:
  """Removes all parts, once what they are for is published."""
  shutil.rmtree(workdir / _FOLDER, ignore_errors=True)
