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
_PAIRS_AT_ONCE = 2**16
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


def score_pairs(
  run: experiment.Experiment,
  score: Callable[[np.ndarray, np.ndarray], np.ndarray],
  queries: np.ndarray,
  passages: np.ndarray,
  *,
  about: dict[str, Any],
  keep: str,
  dealt: bool,
) -> np.ndarray:
  """Returns the (n,) float32 scores of pairs, NaN for none.

  Args:
    run: The run.
    score: As `scorer` returns it.
    queries: (n,) query rows.
    passages: (n,) passage rows.
    about: Fingerprint of the texts and of the teacher's name.
    keep: Name under which the run's folder has the parts until `forget`; '' to
      write nothing.
    dealt: Whether all processes call this, for the same pairs.
  """
  starts = range(0, len(queries), _PAIRS_AT_ONCE)

  def score_part(start):
    part = slice(start, start + _PAIRS_AT_ONCE)
    return score(queries[part], passages[part]).astype(np.float32)

  if not keep:
    parts = [score_part(start) for start in starts]
    return np.concatenate(parts or [np.zeros(0, np.float32)])
  teacher = _files(run.config.cross_encoder)
  digest = hashlib.sha256(json.dumps([about, teacher]).encode())
  for array in (queries, passages):
    digest.update(np.ascontiguousarray(array, np.int64))
  folder = run.workdir / _FOLDER / keep
  atomic.make_folder(folder)
  name = digest.hexdigest()[:16]
  paths = [folder / f'{name}-{start:012d}.npy' for start in starts]
  own = (distributed.index(), distributed.count()) if dealt else (0, 1)
  for path, start in list(zip(paths, starts, strict=True))[own[0] :: own[1]]:
    if not path.exists():
      with atomic.writing(path) as file:
        np.save(file, score_part(start))
  if dealt:
    distributed.barrier('taught')
  parts = [np.array(atomic.load_array(path)) for path in paths]
  return np.concatenate(parts or [np.zeros(0, np.float32)])


def with_twins(
  score: Callable[[np.ndarray, np.ndarray], np.ndarray],
  split: corpus_lib.Split,
  queries: np.ndarray,
  passages: np.ndarray,
  scores: np.ndarray,
) -> np.ndarray:
  """Returns (P,) scores of pairs; a query's twins may have missing ones."""
  found, twins = scores.copy(), split.twins()[queries]
  for place in np.flatnonzero(np.isnan(found) & twins).tolist():
    same = np.flatnonzero(split.groups == split.groups[queries[place]])
    theirs = score(same, np.full(len(same), passages[place]))
    found[place] = next((one for one in theirs if not np.isnan(one)), np.nan)
  return found


def forget(workdir: pathlib.Path, keep: str) -> None:
  """Removes the parts of a name, once what they are for is published."""
  shutil.rmtree(workdir / _FOLDER / keep, ignore_errors=True)


def _files(cross_encoder):
  """Returns [name, bytes, time] of each file of a model; [] without a folder.

  A name on the hub is pinned to a commit, whose files do not change.
  """
  if not cross_encoder:
    return []
  return [
    [path.name, path.stat().st_size, path.stat().st_mtime_ns]
    for path in sorted(pathlib.Path(cross_encoder).glob('*'))
    if path.is_file()
  ]
