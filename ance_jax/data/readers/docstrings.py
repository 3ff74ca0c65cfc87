"""Reads pydocs, which TFDS builds in the folder of a run."""

import contextlib
import io
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import pydocs
from ance_jax.data import records

_TEXTS = ('id', 'title', 'text', 'query', 'split')


def read(settings: records.Settings) -> corpus_lib.RawDataset:
  """Reads pydocs, which TFDS builds in its folder on the first call.

  A run keeps its first build, regardless of packages installed later.
  """
  folder = pathlib.Path(settings.pydocs_dir)
  if not settings.builds_pydocs:
    # The folder's run is only read; `find` would set a damaged build aside.
    atomic.read_manifest(folder)
  elif not atomic.find_valid(folder, {}):
    logs.log('pydocs: reading the docstrings of the installed packages')
    with (
      atomic.publish(folder, {}) as unfinished,
      # TFDS announces a download even if there is none.
      contextlib.redirect_stdout(io.StringIO()),
    ):
      tfds.disable_progress_bar()
      _builder(unfinished).download_and_prepare()
  builder = _builder(folder)
  table = builder.as_data_source('docstrings')
  rows = list(table.__getitems__(range(len(table))))
  column = {k: [row[k].decode() for row in rows] for k in _TEXTS}
  groups = np.array([row['group'] for row in rows])
  corpus = corpus_lib.make_corpus(
    column['id'], column['title'], column['text'], groups
  )
  logs.log(
    f'pydocs: {len(rows):,} passages, hash {corpus.hash[:12]}, read from '
    + ', '.join(map(' '.join, builder.info.metadata['versions'].items()))
  )
  judgements = _judgements(column['query'], column['split'], groups)

  def read_split(name):
    if name not in judgements:
      return None
    return corpus_lib.RawSplit(column['id'], column['query'], judgements[name])

  return corpus_lib.RawDataset(corpus, read_split, 'pydocs')


def _builder(folder):
  return pydocs.Pydocs(data_dir=folder, file_format='array_record')


def _judgements(queries, splits, groups):
  """Returns {split: judgements}, with one query per distinct summary.

  The positives are all passages of that summary and of their groups.
  """
  members, groups_of, first_row = {}, {}, {}
  for row, (query, split, group) in enumerate(
    zip(queries, splits, groups, strict=True)
  ):
    members.setdefault(group, []).append(row)
    groups_of.setdefault(pydocs.normal(query), set()).add(group)
    if split:
      first_row.setdefault(pydocs.normal(query), row)
  judgements = {split: {} for split in pydocs.SPLITS}
  for query, row in first_row.items():
    judgements[splits[row]].update(
      ((row, passage), 1)
      for group in groups_of[query]
      for passage in members[group]
    )
  return judgements
