"""Reads the systems to compare: the run files of `--runs`, scored by query."""

import dataclasses
import pathlib
import re
from typing import NamedTuple

import numpy as np

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import logs
from ance_jax.core import places
from ance_jax.core import strict_io
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import trec
from ance_jax.retrieval import metrics
from ance_jax.training import experiment


class System(NamedTuple):
  """A system to compare.

  Attributes:
    label: Name in tables.
    path: TREC run file.
    rows: (Q, K) int32 passage rows, best first, -1 for none.
    values: (Q,) float64 values by measure.
    missing: Number of queries that the run file lacks.
  """

  label: str
  path: str
  rows: np.ndarray
  values: dict[str, np.ndarray]
  missing: int


def data_folder(config: config_lib.Config) -> str:
  """Returns the first of `--runs` that is the folder of a run, or ''."""
  return next(filter(checkpoint.committed_steps, _names(config)), '')


def read(
  config: config_lib.Config,
) -> tuple[corpus_lib.Corpus, corpus_lib.Split, list[System]]:
  """Reads `--runs`, the corpus, and the split to score them on.

  Raises:
    BadInput: There are fewer than two runs, or their data differ.
  """
  names = _names(config)
  if len(names) < 2:
    raise errors.refusal(
      f'--runs={config.runs} names fewer than two runs',
      'give folders or TREC run files, separated by commas, the baseline first',
    )
  if len(set(names)) < len(names):
    raise errors.refusal(
      f'--runs={config.runs} names a run twice', 'leave one out'
    )
  paths = [_run_file(name, config.split) for name in names]
  # pydocs is in the folder of the run that it was built for.
  folder = data_folder(config) or config.workdir
  dataset = experiment.load_texts(
    dataclasses.replace(config, workdir=folder), (config.split,)
  )
  corpus, split = dataset.corpus, dataset.splits[config.split]
  if len(split.ids) < 2:
    raise errors.refusal(
      f'split {config.split!r} has one judged query, and two are needed',
      'name another --split',
    )
  return (
    corpus,
    split,
    [
      _system(label, path, corpus, split)
      for label, path in zip(_labels(names), paths, strict=True)
    ],
  )


def _names(config):
  return [name for name in config.runs.split(',') if name]


def _labels(names):
  """Returns the last part of each path, or whole paths if not distinct."""
  last = [pathlib.Path(name).name for name in names]
  return last if len(set(last)) == len(last) else names


def _run_file(name, split_name):
  """Returns the path of the run file for one name in `--runs`."""
  path = pathlib.Path(name)
  if not path.is_dir():
    return strict_io.regular(path)
  found = [
    *sorted(path.glob(f'{split_name}-model-*.trec')),
    *path.glob(f'{split_name}-bm25-0.trec'),
  ]
  if len(found) != 1:
    fact = f'no run file of {split_name!r}'
    cure = f'make it with --job=evaluate --split={split_name}'
    if places.problem(path):
      cure += f' {places.way_round(path)}, and name that folder'
    if found:
      there = ', '.join(file.name for file in found)
      fact = f'more than one run file of {split_name!r} ({there})'
      cure = 'name the file itself'
    raise strict_io.refusal(name, fact, cure)
  return found[0]


def _system(label, path, corpus, split):
  """Checks, reads and scores a run file."""
  _check_same_data(path, corpus, split)
  query_rows = {split.ids[row]: row for row in range(len(split.ids))}
  ranked = trec.read_run(path, query_rows, corpus.rows)
  sizes = np.diff(ranked.offsets)
  if not sizes.any():
    raise strict_io.refusal(
      path,
      f'none of the {len(query_rows):,} queries of the split, such as '
      f'{split.ids[0]!r}, is in it',
      'name a run of this data, or another --split',
    )
  if missing := int((sizes == 0).sum()):
    logs.log(f'{path}: {missing:,} queries are not in it, and count 0')
  most = metrics.depth(split, len(corpus.texts))
  rows = corpus_lib.padded(
    ranked.passages, ranked.offsets[:-1], np.minimum(sizes, most), -1
  )
  scores = np.zeros(rows.shape, np.float32)
  rows = metrics.without_own(trec.Ranking(rows, scores), split).rows
  values = metrics.by_query(rows, split, corpus.texts)
  return System(label, str(path), rows, values, missing)


def _check_same_data(path, corpus, split):
  """Raises `BadInput` if `--job=evaluate` recorded other data for the file."""
  noted = path.with_suffix('.json')
  if not re.search(r'-(model|bm25)-\d+$', noted.stem) or not noted.exists():
    return  # From another program; only its ids are checked.
  noted = atomic.read_json(noted)
  for key, here in (('corpus', corpus.hash), ('judgements', split.hash)):
    if noted.get(key, here) != here:
      raise strict_io.refusal(
        path,
        f'scored on {key} of hash {noted[key][:12]} instead of {here[:12]}',
        'leave the run out, or score it on this data',
      )
