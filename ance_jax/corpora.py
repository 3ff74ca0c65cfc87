"""A dataset's name -> its corpus and splits."""

import contextlib
import functools
import hashlib
import io
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from ance_jax import beir
from ance_jax import config as config_lib
from ance_jax import data
from ance_jax import dpr
from ance_jax import handoff
from ance_jax import logs
from ance_jax import msmarco
from ance_jax import pairs
from ance_jax.datasets import pydocs


def load(config, split_names):
  """Reads the dataset of a run.

  Args:
    config: The run's `Config`; its data and split flags and workdir are read.
    split_names: Splits to read; None: train, dev and the test splits that are
      there.

  Returns:
    A `data.Dataset` with these splits. Where the data has no dev split, a
    share of the training queries is it, by hash of their ids, and not in train;
    with `--dev_fraction=0` none is, and there is no such split beside train.

  Raises:
    BadInput: The data cannot be used; the text names file and line, rule and
      cure.
  """
  source = _READERS[config.dataset](config)
  # Whether there is a dev split is asked more than once.
  source = source._replace(read_split=functools.cache(source.read_split))
  if split_names is None:
    tests = [n for n in config_lib.TEST_SPLITS if source.read_split(n)]
    split_names = (config.train_split, config.dev_split, *tests)
  if not config.dev_fraction and not source.read_split(config.dev_split):
    split_names = _without_dev(split_names, config)
  splits = {}
  for name in split_names:
    alone = config.dev_split not in split_names
    judged = _judged(source, name, config, alone)
    if config.protocol:
      judged = judged._replace(protocol=config.protocol)
    if judged.protocol == 'answers' and not judged.answers:
      raise config_lib.BadInput(
        '--protocol=answers must be for data with answers; found none for '
        f'split {name!r}; add answers.jsonl, or leave it out.'
      )
    if name == config.train_split:
      judged = _with_positives(judged, name)
    splits[name] = data.make_split(judged, source.corpus)
    logs.say(
      f'{name}: {len(splits[name].ids):,} queries, '
      f'{len(splits[name].passages):,} judged passages'
    )
  if config.train_split in splits:
    _say_equal_texts(splits, config.train_split)
  return data.Dataset(source.corpus._replace(keys=None), splits)


def _say_equal_texts(splits, train):
  """Prints how many training queries equal a passage, or another query."""
  split = splits[train]
  counts = {
    'are passages of the corpus, too: none is its own negative': len(
      np.unique(split.own_passages()[0])
    ),
    'have the text of another: in training they share their positives': int(
      split.twins().sum()
    ),
  }
  for name, other in splits.items():
    if other is not split:
      what = f'have the text of a query of {name!r}: training goes by its own'
      counts[f'{what} judgements'] = data.queries_shared(split, other)
  for what, number in counts.items():
    if number:
      logs.say(f'{train}: {number:,} queries {what}')


def _without_dev(split_names, config):
  """Returns the names of the splits but dev's, of data that has none.

  Raises:
    BadInput: It is dev that was asked for.
  """
  dev, train = config.dev_split, config.train_split
  if dev in split_names and train not in split_names:
    raise config_lib.BadInput(
      f'the data has no split {dev!r}, and --dev_fraction=0 holds none out of '
      f'{train!r}; name another split.'
    )
  if dev in split_names:
    logs.say(
      f'no split {dev!r} in the data, and --dev_fraction=0: nothing is scored '
      'on dev'
    )
  return [name for name in split_names if name != dev]


def _judged(source, name, config, alone):
  judged = source.read_split(name)
  held_out_names = (config.train_split, config.dev_split)
  if name in held_out_names and source.read_split(config.dev_split) is None:
    want_held_out = name == config.dev_split
    judged = source.read_split(config.train_split)
    if judged:
      kept = {
        (query, passage): grade
        for (query, passage), grade in judged.judgements.items()
        if _held_out(judged.query_ids[query], config) == want_held_out
      }
      judged = judged._replace(judgements=kept)
    share = f'{config.dev_fraction:.0%} of {config.train_split!r}, by hash'
    if want_held_out:
      logs.say(f'no split {name!r} in the data: it is {share} of the query id')
    elif alone and config.dev_fraction:
      logs.say(
        f'no split {config.dev_split!r} in the data: {share} of the query id, '
        'is held out for it (--dev_fraction)'
      )
  if not judged or not (judged.judgements or judged.all_count):
    raise config_lib.BadInput(
      f'split {name!r} must have judged queries; found none in {source.found}; '
      'name another split, or add its judgements.'
    )
  return judged


def _held_out(query_id, config):
  digest = hashlib.blake2b(query_id.encode(), digest_size=8).digest()
  return int.from_bytes(digest) < config.dev_fraction * 2**64


def _with_positives(judged, name):
  """Returns the `Judged` of the queries that have a positive passage."""
  pairs = judged.judgements
  useful = {query for (query, _), grade in pairs.items() if grade > 0}
  without = len({query for query, _ in pairs} - useful)
  if without:
    logs.say(f'{name}: left out {without:,} queries without a positive passage')
  if not useful:
    raise config_lib.BadInput(
      f'split {name!r} must have queries with a positive passage; found '
      f'{without:,} queries, none with a grade above 0; check the judgements.'
    )
  kept = {pair: g for pair, g in pairs.items() if pair[0] in useful}
  return judged._replace(judgements=kept, all_count=False)


def _read_pydocs(config):
  """Returns pydocs, built by TFDS in the workdir on the first call.

  A run keeps the set it began with, whatever is installed later.
  """
  folder = pathlib.Path(config.workdir) / 'datasets'
  if not handoff.find(folder, {}):
    logs.say('pydocs: reading the docstrings of the installed packages')
    with handoff.publish(folder, {}) as unfinished:
      # TFDS announces a download, whether there is one or not.
      with contextlib.redirect_stdout(io.StringIO()):
        tfds.disable_progress_bar()
        _pydocs_builder(unfinished).download_and_prepare()
  builder = _pydocs_builder(folder)
  table = builder.as_data_source('docstrings')
  rows = list(table.__getitems__(range(len(table))))
  column = {k: [row[k].decode() for row in rows] for k in _PYDOCS_TEXTS}
  groups = np.array([row['group'] for row in rows])
  corpus = data.make_corpus(
    column['id'], column['title'], column['text'], groups
  )
  versions = builder.info.metadata['versions']
  names = ', '.join(f'{name} {version}' for name, version in versions.items())
  logs.say(
    f'pydocs: {len(rows):,} passages, hash {corpus.hash[:12]}, read from '
    f'{names}'
  )
  judgements = _pydocs_judgements(column['query'], column['split'], groups)

  def read_split(name):
    if name not in judgements:
      return None
    return data.Judged(column['id'], column['query'], judgements[name])

  return data.Source(corpus, read_split, 'pydocs')


def _pydocs_builder(folder):
  return pydocs.Pydocs(data_dir=folder, file_format='array_record')


_PYDOCS_TEXTS = ('id', 'title', 'text', 'query', 'split')


def _pydocs_judgements(queries, splits, groups):
  """Returns {split: judgements}; equal summaries are one query.

  Its positives are all passages of that summary, and those of their groups.
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
    for group in groups_of[query]:
      for passage in members[group]:
        judgements[splits[row]][row, passage] = 1
  return judgements


_READERS = {
  'pydocs': _read_pydocs,
  'beir': beir.read,
  'pairs': pairs.read,
  'msmarco': msmarco.read_passages,
  'msmarco_titled': msmarco.read_titled_passages,
  'msmarco_doc': msmarco.read_documents,
  'dpr': dpr.read,
}
