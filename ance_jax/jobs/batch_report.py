"""Shows a training batch as text: the columns of each query, and masks.

The batch is drawn as in training. Mined negatives (BM25's, the index's) appear
only if a run has already mined them.
"""

from typing import NamedTuple

import numpy as np

from ance_jax.data import corpus as corpus_lib
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import negatives as negatives_lib
from ance_jax.training import refreshes
from ance_jax.training import resume
from ance_jax.training import schedule
from ance_jax.training import topics as topics_lib

# Maximum number of queries, of counted and of masked columns per query, and of
# characters of a text.
_QUERIES, _COLUMNS, _CHARACTERS = 3, 4, 100


class Column(NamedTuple):
  """A passage that the loss compares with a query, except its own positive.

  Attributes:
    query: Index in the batch of the query that the passage was drawn for.
    number: 0 for that query's positive, from 1 for its negatives.
    passage: Passage row.
    masked: Why the loss ignores the passage; '' if it does not.
  """

  query: int
  number: int
  passage: int
  masked: str


def lines(run: experiment.Experiment) -> list[str]:
  """Returns some queries of a batch and their columns, as lines.

  It shows the batch of the first step or, if a run has mined, the first batch
  with the latest negatives.
  """
  config = run.config
  mined = resume.active_at(run, config.max_steps) if run.id else None
  method = schedule.method(config, mined, config.max_steps)
  negatives = _negatives(run, method, mined)
  unknown = negatives is None and method.sources not in ((), ('corpus',))
  number = 0 if unknown else schedule.num_negatives(config, method)
  topics = topics_lib.peek(run) if run.id else None
  drawn_from = experiment.training_data(run, method)
  rows, passages, _ = batches.draw_rows(
    drawn_from,
    mined.step if mined else 0,
    seed=config.seed,
    batch_size=config.batch_size,
    num_negatives=number,
    negatives=negatives,
    triplets=method.triplets and not unknown,
    draw=experiment.draw(config, method),
    topics=None if topics is None else batches.by_topic(topics, negatives),
  )
  name = next(n for n, row in methods.METHODS.items() if row is method)
  shown_lines = [f'  --method={name}, {len(rows):,} queries']
  if config.topics and topics is None:
    shown_lines[0] += ' of any topics, as only a run has those'
  if unknown:
    shown_lines.append(
      f'  each with {schedule.num_negatives(config, method)} of its own from '
      f'{" and ".join(method.sources)}, which only a run has: with '
      '--workdir=RUN they are shown'
    )
  for place in range(min(_QUERIES, len(rows))):
    found = columns(drawn_from, method, rows, passages, place)
    text = run.dataset.splits[config.train_split].texts[int(rows[place])]
    shown_lines += [
      f'  query {place + 1}: {_short(text)}',
      f'    positive: {shown(run.dataset.corpus, int(passages[place, 0]))}',
      f'    {_never_text(drawn_from, int(rows[place]))}',
    ]
    if found:
      shown_lines += _column_lines(run.dataset.corpus, found, place)
  return shown_lines


def columns(
  drawn_from: batches.TrainingData,
  method: methods.Method,
  rows: np.ndarray,
  passages: np.ndarray,
  place: int,
) -> list[Column]:
  """Returns the columns of a query in a batch, as in `steps.make_loss`.

  Args:
    drawn_from: Data that the batch was drawn from.
    method: Method of the batch.
    rows: (B,) int query rows.
    passages: (B, 1 + H) int passage rows, the positive first.
    place: Index of the query in the batch.
  """
  others = range(len(rows)) if method.in_batch else [place]
  return [
    Column(other, number, int(row), _why_masked(drawn_from, rows[place], row))
    for other in others
    for number, row in enumerate(passages[other])
    if number or other != place
  ]


def shown(corpus: corpus_lib.Corpus, row: int) -> str:
  """Returns the id and the beginning of a passage."""
  return f'[{corpus.ids[row]}] {_short(corpus_lib.whole_text(corpus, row))}'


def _negatives(run, method, mined):
  """Returns the negatives of a method, None if they do not exist yet."""
  if method.sources == ('given',):
    if not negatives_lib.given_to(run.dataset.splits[run.config.train_split]):
      return None
    return refreshes.of_table(run, 0, negatives_lib.take_given(run)[0], 0)
  return refreshes.peek(run, method, mined) if run.id else None


def _never_text(drawn_from, query):
  """Returns the numbers of passages that are never a negative of a query."""
  groups, banned = drawn_from.groups, drawn_from.positive_groups[query]
  positives = np.unique(
    drawn_from.positives[slice(*drawn_from.offsets[query : query + 2])]
  )
  of_positives = int(np.isin(groups, groups[positives]).sum())
  own = int(np.isin(groups, banned).sum()) - of_positives
  return (
    f'never its negative: {len(positives):,} positives, '
    f'{of_positives - len(positives):,} of their text, {own:,} of its own'
  )


def _why_masked(drawn_from, query, passage):
  groups = drawn_from.groups
  if groups[passage] not in drawn_from.positive_groups[query]:
    return ''
  positives = drawn_from.positives[
    slice(*drawn_from.offsets[query : query + 2])
  ]
  if passage in positives:
    return 'a positive of it, too'
  if groups[passage] in groups[positives]:
    return 'the text of a positive of it'
  return 'the text of the query itself'


def _column_lines(corpus, found, place):
  """Yields lines with the number of a query's columns, and some columns."""
  masked = [column for column in found if column.masked]
  counted = [column for column in found if not column.masked]
  yield (
    f'    {len(found):,} columns: {len(counted):,} count, {len(masked):,} are '
    'masked'
  )
  for column in (*counted[:_COLUMNS], *masked[:_COLUMNS]):
    kind = f'negative {column.number}' if column.number else 'positive'
    whose = 'own' if column.query == place else f'query {column.query + 1}'
    why = f' (masked: {column.masked})' if column.masked else ''
    yield f'      {whose}, {kind}{why}: {shown(corpus, column.passage)}'


def _short(text):
  text = ' '.join(text.split())
  return text if len(text) <= _CHARACTERS else f'{text[:_CHARACTERS]}...'
