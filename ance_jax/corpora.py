"""A dataset's name -> its corpus and splits: the only place for string ids.

Everywhere else a passage is its row in the corpus, and a query its row in its
split (int32).
"""

from collections.abc import Callable
import contextlib
import hashlib
import io
import json
import pathlib
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from ance_jax import beir
from ance_jax import config as config_lib
from ance_jax import handoff
from ance_jax import logs
from ance_jax.datasets import pydocs


class Strings:
  """An immutable list of strings in two arrays: one blob of UTF-8, offsets.

  21M Python strings take several times the memory of their text.
  """

  def __init__(self, items):
    blob, ends = bytearray(), [0]
    for item in items:
      # Half of a surrogate pair is valid JSON but not UTF-8.
      blob += item.encode('utf-8', 'replace')
      ends.append(len(blob))
    self._blob = bytes(blob)
    self._offsets = np.array(ends, np.int64)

  def __len__(self):
    return len(self._offsets) - 1

  def __getitem__(self, row):
    if not 0 <= row < len(self):
      raise IndexError(row)
    start, end = self._offsets[row : row + 2]
    return self._blob[start:end].decode()

  def update_hash(self, digest):
    """Feeds the text, and where it is cut, to a hashlib object."""
    digest.update(self._offsets)
    digest.update(self._blob)


class Corpus(NamedTuple):
  """All passages, in row order.

  Attributes:
    ids: N passage ids, all different.
    titles: N titles, some or all empty.
    texts: N texts, none empty.
    groups: (N,) int32; rows of equal number have the same text, or nearly.
    hash: SHA-256 of all this, in hexadecimal digits.
  """

  ids: Strings
  titles: Strings
  texts: Strings
  groups: np.ndarray
  hash: str


class Split(NamedTuple):
  """The judged queries of one split, and what they were judged on.

  Query row i was judged on the entries from offsets[i] to offsets[i + 1], in
  the order of the data.

  Attributes:
    ids: Q query ids, all different.
    texts: Q queries.
    offsets: (Q + 1,) int64.
    passages: (J,) int32, the judged passage rows.
    grades: (J,) int32; above 0 is relevant.
    hash: SHA-256 of all this, in hexadecimal digits.
    answers: Q lists of strings, what a text must hold one of to answer the
      query; None where the data has none.
  """

  ids: Strings
  texts: Strings
  offsets: np.ndarray
  passages: np.ndarray
  grades: np.ndarray
  hash: str
  answers: list[list[str]] | None = None

  def positives(self, *, last=False):
    """Returns the query and the passage rows, (P,) int32, of positives.

    Args:
      last: Whether only the last one of each query is given, in the order of
        the judgements.
    """
    judged = np.diff(self.offsets)
    queries = np.repeat(np.arange(len(judged), dtype=np.int32), judged)
    relevant = self.grades > 0
    queries, passages = queries[relevant], self.passages[relevant]
    if last:
      ends = np.append(queries[1:] != queries[:-1], True)
      queries, passages = queries[ends], passages[ends]
    return queries, passages


class Dataset(NamedTuple):
  """A corpus and its splits by name."""

  corpus: Corpus
  splits: dict[str, Split]


class _Source(NamedTuple):
  """What a reader gives: `judgements` takes the name of a split.

  It returns {(query row, passage row): grade}, or None if there is no such
  split; query rows are positions in `query_ids`. `splits_are_in` says for
  people what splits are there. `answers` is {query row: list of strings}.
  """

  corpus: Corpus
  query_ids: list[str]
  queries: list[str]
  judgements: Callable[[str], dict[tuple[int, int], int] | None]
  splits_are_in: str
  answers: dict[int, list[str]] | None = None


def load(config, split_names):
  """Reads the dataset of a run.

  Args:
    config: The run's `Config`; its data and split flags and workdir are read.
    split_names: Splits to read.

  Returns:
    A `Dataset` with these splits. Where the data has no dev split, a share of
    the training queries is it, by hash of their ids, and not in train.

  Raises:
    BadInput: The data cannot be used; the text names file and line, rule and
      cure.
  """
  source = _READERS[config.dataset](config)
  splits = {}
  for name in split_names:
    judgements = _judgements(source, name, config)
    if name == config.train_split:
      judgements = _with_positives(judgements, name)
    splits[name] = _make_split(source, judgements)
    logs.say(
      f'{name}: {len(splits[name].ids):,} queries, '
      f'{len(splits[name].passages):,} judged passages'
    )
  return Dataset(source.corpus, splits)


def _judgements(source, name, config):
  judgements = source.judgements(name)
  held_out_names = (config.train_split, config.dev_split)
  if name in held_out_names and source.judgements(config.dev_split) is None:
    want_held_out = name == config.dev_split
    of_train = source.judgements(config.train_split) or {}
    judgements = {
      (query, passage): grade
      for (query, passage), grade in of_train.items()
      if _held_out(source.query_ids[query], config) == want_held_out
    }
    share = f'{config.dev_fraction:.0%} of {config.train_split!r}, by hash'
    if want_held_out:
      logs.say(f'no split {name!r} in the data: it is {share} of the query id')
  if not judgements:
    raise config_lib.BadInput(
      f'split {name!r} must have judged queries; found none in '
      f'{source.splits_are_in}; name another split, or add its judgements.'
    )
  return judgements


def _held_out(query_id, config):
  digest = hashlib.blake2b(query_id.encode(), digest_size=8).digest()
  return int.from_bytes(digest) < config.dev_fraction * 2**64


def _with_positives(judgements, name):
  """Returns the judgements of the queries that have a positive passage."""
  useful = {query for (query, _), grade in judgements.items() if grade > 0}
  without = len({query for query, _ in judgements} - useful)
  if without:
    logs.say(f'{name}: left out {without:,} queries without a positive passage')
  if not useful:
    raise config_lib.BadInput(
      f'split {name!r} must have queries with a positive passage; found '
      f'{without:,} queries, none with a grade above 0; check the judgements.'
    )
  return {pair: g for pair, g in judgements.items() if pair[0] in useful}


def _make_split(source, judgements):
  """Returns the `Split` of {(query row, passage row): grade}, in order."""
  # By query, and what was judged on each in the order of the data.
  pairs = sorted(judgements, key=lambda pair: pair[0])
  rows, counts = np.unique([query for query, _ in pairs], return_counts=True)
  ids = Strings(source.query_ids[row] for row in rows)
  texts = Strings(source.queries[row] for row in rows)
  offsets = np.concatenate([[0], np.cumsum(counts)])
  passages = np.array([passage for _, passage in pairs], np.int32)
  grades = np.array([judgements[pair] for pair in pairs], np.int32)
  digest = hashlib.sha256()
  ids.update_hash(digest)
  texts.update_hash(digest)
  for array in (offsets, passages, grades):
    digest.update(array)
  answers = None
  if source.answers:
    answers = [source.answers.get(int(row), []) for row in rows]
    digest.update(json.dumps(answers).encode())
  return Split(
    ids, texts, offsets, passages, grades, digest.hexdigest(), answers
  )


def _make_corpus(ids, titles, texts, groups):
  digest = hashlib.sha256()
  for strings in (ids, titles, texts):
    strings.update_hash(digest)
  groups = np.asarray(groups, np.int32)
  digest.update(groups)
  return Corpus(ids, titles, texts, groups, digest.hexdigest())


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
  corpus = _make_corpus(
    Strings(column['id']),
    Strings(column['title']),
    Strings(column['text']),
    groups,
  )
  versions = builder.info.metadata['versions']
  names = ', '.join(f'{name} {version}' for name, version in versions.items())
  logs.say(
    f'pydocs: {len(rows):,} passages, hash {corpus.hash[:12]}, read from '
    f'{names}'
  )
  judgements = _pydocs_judgements(column['query'], column['split'], groups)
  return _Source(
    corpus, column['id'], column['query'], judgements.get, 'pydocs'
  )


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


def _read_beir(config):
  """Returns the BEIR folder `--data_dir`."""
  folder = beir.open_folder(config.data_dir)
  ids, titles, texts = beir.read_corpus(folder)
  groups = np.unique([_text_key(t) for t in texts], return_inverse=True)[1]
  corpus = _make_corpus(Strings(ids), Strings(titles), Strings(texts), groups)
  logs.say(
    f'{folder.name}: {len(ids):,} passages, {len(ids) - groups.max() - 1:,} of '
    f'them the same text as another, hash {corpus.hash[:12]}'
  )
  query_ids, queries = beir.read_queries(folder)
  passage_rows = {passage_id: row for row, passage_id in enumerate(ids)}
  query_rows = {query_id: row for row, query_id in enumerate(query_ids)}

  def judgements(split):
    return beir.read_qrels(folder, split, query_rows, passage_rows)

  found = beir.qrels_found(folder)
  answers = beir.read_answers(folder, query_rows)
  return _Source(corpus, query_ids, queries, judgements, found, answers)


def _text_key(text):
  """Returns what two passages of the same text share, as bytes."""
  normal = ' '.join(text.lower().split()).encode('utf-8', 'replace')
  return hashlib.blake2b(normal, digest_size=12).digest()


_READERS = {'pydocs': _read_pydocs, 'beir': _read_beir}
