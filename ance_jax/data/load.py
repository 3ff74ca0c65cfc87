"""Loads a dataset by name: its corpus and splits."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import importlib

import numpy as np

from ance_jax import errors
from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import datasets
from ance_jax.data import keys
from ance_jax.data import records
from ance_jax.data.readers import given


def load(
  settings: records.Settings, split_names: Sequence[str] | None
) -> corpus_lib.TextDataset:
  """Reads a dataset.

  Args:
    settings: Which data to read, and how to split it.
    split_names: Splits to read; None for train, dev and existing test splits,
      without dev if its share of train would be empty.

  Returns:
    The corpus and these splits. If the data has no dev split, a share of the
    training queries, selected by hash of their ids, moves from train to dev;
    with `--dev_fraction=0` dev is omitted.

  Raises:
    BadInput: The data cannot be used; the message names the file and line, the
      rule and the cure.
  """
  settings = settings._replace(protocol=protocol(settings))
  source = reader(settings.dataset)(settings)
  # Several checks read the same split.
  source = source._replace(read_split=functools.cache(source.read_split))
  if split_names is None:
    tests = [n for n in settings.test_splits if source.read_split(n)]
    dev = [settings.dev_split] * _has_dev(source, settings)
    split_names = (settings.train_split, *dev, *tests)
  if not settings.dev_fraction and not source.read_split(settings.dev_split):
    split_names = _without_dev(split_names, settings)
  splits = {}
  for name in split_names:
    judged = _judged(
      source, name, settings, alone=settings.dev_split not in split_names
    )
    judged = judged._replace(protocol=settings.protocol or judged.protocol)
    if judged.protocol == 'answers' and not judged.answers:
      raise errors.refusal(
        f'--protocol=answers is given, but split {name!r} has no answers',
        'add answers.jsonl, or leave the flag out',
      )
    _check_judged(judged, name, settings, source.corpus)
    if name == settings.train_split:
      judged = _with_negatives(_with_positives(judged, name), source, settings)
    if judged.protocol == 'beir' and datasets.READERS[settings.dataset].own_ids:
      rows = enumerate(source.corpus.rows.many(judged.query_ids).tolist())
      own = {query: row for query, row in rows if row >= 0}
      judged = judged._replace(own=own)
    splits[name] = corpus_lib.make_split(judged, source.corpus)
    logs.log(
      f'{name}: {len(splits[name].ids):,} queries, '
      f'{len(splits[name].passages):,} judged passages'
    )
  if settings.train_split in splits:
    _say_equal_texts(splits, settings.train_split)
  if datasets.READERS[settings.dataset].own_ids:
    _say_own(splits, source.corpus)
  return corpus_lib.TextDataset(source.corpus._replace(keys=None), splits)


def reader(
  name: str,
) -> Callable[[records.Settings], corpus_lib.RawDataset]:
  """Returns the reader of a dataset in the table of datasets."""
  module, _, function = datasets.READERS[name].function.rpartition('.')
  return getattr(
    importlib.import_module(f'ance_jax.data.readers.{module}'), function
  )


def _say_equal_texts(splits, train):
  """Prints how many training queries equal a passage or another query."""
  split = splits[train]
  counts = {
    'are passages of the corpus, too: none is its own negative': len(
      np.unique(split.same_text[0])
    ),
    'have the text of another: in training they share their positives': int(
      split.twins().sum()
    ),
  }
  for name, other in splits.items():
    if other is not split:
      what = f'have the text of a query of {name!r}: training goes by its own'
      counts[f'{what} judgements'] = corpus_lib.queries_shared(split, other)
  for what, number in counts.items():
    if number:
      logs.log(f'{train}: {number:,} queries {what}')


def protocol(settings: records.Settings) -> str | None:
  """Returns `--protocol`, which defaults to BEIR's for a set of BEIR."""
  of_beir = settings.dataset == 'beir' and settings.beir_set
  return settings.protocol or ('beir' if of_beir else None)


def _has_dev(source, settings):
  """Returns whether dev exists or its share of train is not empty."""
  if source.read_split(settings.dev_split) or not settings.dev_fraction:
    return True  # Without a fraction `_without_dev` drops dev and says so.
  train = source.read_split(settings.train_split)
  rows = train.judged_queries() if train else ()
  return any(
    keys.hash64(train.query_ids[row]) < settings.dev_fraction * 2**64
    for row in rows
  )


def _without_dev(split_names, settings):
  """Returns the split names without dev, for data that has no dev split.

  Raises:
    BadInput: The names include dev but not train.
  """
  dev, train = settings.dev_split, settings.train_split
  if dev in split_names and train not in split_names:
    raise errors.refusal(
      f'the data has no split {dev!r}, and --dev_fraction=0 holds none out of '
      f'{train!r}',
      'name another split',
    )
  if dev in split_names:
    logs.log(
      f'no split {dev!r} in the data, and --dev_fraction=0: nothing is scored '
      'on dev'
    )
  return [name for name in split_names if name != dev]


def _judged(source, name, settings, alone):
  judged = source.read_split(name)
  sides = (settings.train_split, settings.dev_split)
  if name in sides and source.read_split(settings.dev_split) is None:
    judged = source.read_split(settings.train_split)
    if judged and judged.judged_queries():
      judged = _side(judged, name, settings)
    share = f'{settings.dev_fraction:.0%} of {settings.train_split!r}, by hash'
    no_dev = f'no split {settings.dev_split!r} in {source.found}'
    if name == settings.dev_split:
      logs.log(f'{no_dev}: it is {share} of the query id')
    elif alone and settings.dev_fraction:
      logs.log(
        f'{no_dev}: {share} of the query id, is held out for it '
        '(--dev_fraction)'
      )
  if not judged or not (judged.judged_queries() or judged.all_count):
    raise errors.refusal(
      f'no judged queries of split {name!r} are in {source.found}',
      'name another split, or add its judgements',
    )
  return judged


def _side(judged, name, settings):
  """Returns the train or dev part of a split, divided by hash of the ids."""
  queries = judged.judged_queries()
  places = {query: keys.hash64(judged.query_ids[query]) for query in queries}
  limit, is_dev = settings.dev_fraction * 2**64, name == settings.dev_split
  side = {query for query in queries if (places[query] < limit) == is_dev}
  if not side:
    cure = (
      f'raise it to {min(places.values()) / 2**64 + 1e-4:.4f}'
      if is_dev
      else f'lower it to {max(places.values()) / 2**64 - 5e-5:.4f} at most'
    )
    if len(queries) == 1:
      cure = 'add queries'
    raise errors.refusal(
      f'--dev_fraction={settings.dev_fraction:g} leaves no query to {name!r}: '
      f'it holds out that share of the {len(queries):,} judged queries of '
      f'{settings.train_split!r}, by hash of the query id, because there is no '
      f'split {settings.dev_split!r}',
      f'{cure}, add judgements of {settings.dev_split!r}, or train without '
      'them: --dev_fraction=0',
    )
  return _of_queries(judged, side)


def _of_queries(judged, queries):
  """Returns a copy with only the judgements of some query rows."""
  judgements, missing = (
    {pair: grade for pair, grade in pairs.items() if pair[0] in queries}
    for pairs in (judged.judgements, judged.missing or {})
  )
  return judged._replace(judgements=judgements, missing=missing)


def _check_judged(judged, name, settings, corpus):
  """Prints how many judged passages the corpus lacks.

  Raises:
    BadInput: The corpus has no relevant passage, so all scores would be 0.
  """
  missing = judged.missing or {}
  relevant = any(grade > 0 for grade in judged.judgements.values())
  if (
    judged.judgements
    and judged.protocol != 'answers'
    and not (missing or relevant)
  ):
    raise _no_positive(name, len(judged.judged_queries()))
  if not missing:
    return
  ids = list(dict.fromkeys(an_id for _, an_id in missing))[:3]
  shown = ', '.join(map(strict_io.quoted, ids))
  check = 'check that the corpus and the judgements belong together'
  if not relevant:
    raise errors.refusal(
      f'the corpus has none of the relevant passages of {name!r}, which judges '
      f'{shown}, but ids such as {strict_io.quoted(corpus.ids[0])}',
      check,
    )
  lacking, total = len(missing), len(missing) + len(judged.judgements)
  what = 'they are never found, and stay in the denominators, as in trec_eval'
  if name == settings.train_split:
    what = 'they are left out of training, and never found in evaluation'
  elif judged.protocol == 'answers':
    what = 'protocol answers looks at texts alone'
  line = f'{name}: the corpus lacks {lacking:,} of {total:,} judged passages'
  logs.log(
    f'warning: {line}, such as {shown}; {check}; {what}'
    if 10 * lacking > total
    else f'{line}; {what}'
  )


def _with_positives(judged, name):
  """Returns a copy with only the queries that have a positive passage."""
  useful = {
    query for (query, _), grade in judged.judgements.items() if grade > 0
  }
  without = len(judged.judged_queries() - useful)
  if without:
    logs.log(f'{name}: left out {without:,} queries without a positive passage')
  if not useful:
    raise _no_positive(name, without)
  return _of_queries(judged, useful)._replace(all_count=False)


def _with_negatives(judged, source, settings):
  """Returns a copy with the negatives of `--negatives` or of the data."""
  path = settings.negatives or source.negatives
  if not path:
    return judged
  judged = given.attach(strict_io.regular(path), judged, source.corpus)
  if settings.negatives and judged.given is None:
    raise errors.refusal(
      f'{path} gives no training query a negative of the corpus (a query is '
      'found by its id or text, a passage by its id, its text, or title and '
      'text)',
      'give the file of this dataset',
    )
  return judged


def _no_positive(name, queries):
  return errors.refusal(
    f'none of the {queries:,} queries of split {name!r} has a positive passage '
    '(a grade above 0)',
    'check the judgements',
  )


def _say_own(splits, corpus):
  """Prints how many queries have the id of a passage, if any do."""
  ids = list({an_id for split in splits.values() for an_id in split.ids})
  own = int((corpus.rows.many(ids) >= 0).sum())
  if own:
    what = (
      'is left out of their results (protocol beir)'
      if {split.protocol for split in splits.values()} == {'beir'}
      else 'may be a result of theirs; --protocol=beir leaves it out'
    )
    logs.log(
      f'{own:,} of {len(ids):,} queries have the id of a passage, which {what}'
    )
