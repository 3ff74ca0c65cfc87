"""Parses files of given negatives in the formats of many miners.

These are `--job=mine`, sentence-transformers, FlagEmbedding, Tevatron and DPR:
texts, titles and texts, or ids; one line per query or one line per pair.
"""

import collections
from collections.abc import Iterator
import itertools
import math
import pathlib
import re
from typing import NamedTuple

from ance_jax.core import strict_io
from ance_jax.data import records

FORM = '{"query": ..., "positive": ..., "negative": ...}'
_QUERY = ('anchor', 'query', 'question', 'query_text')
_QUERY_ID, _ROW_ID = ('query_id', 'qid'), ('_id', 'id')
# A text, an object with one, or a list of these. The last ones are columns of
# pairs, or of lists with labels that say which passages are positive.
_POSITIVES = (
  'positive', 'pos', 'positive_passages', 'positive_ctxs', 'answer',
  'passage', 'document', 'passages', 'documents', 'docs',
)  # fmt: skip
_NEGATIVES = ('negative', 'neg', 'negative_passages', 'hard_negative_ctxs')
_NUMBERED = re.compile(r'negative_?([0-9]{1,9})')
# A list of ids, or of texts, recognized by not being valid ids.
_POSITIVE_IDS = ('positive_ids', 'positive_document_ids', 'positives')
_NEGATIVE_IDS = ('negative_ids', 'negative_document_ids', 'negatives')
_POSITIVE_SCORES = ('positive_scores', 'pos_scores')
_NEGATIVE_SCORES = ('negative_scores', 'neg_scores')
_LABELS, _SCORES = ('label', 'labels'), ('score', 'scores')
_PASSAGE_IDS = ('docid', 'passage_id', 'psg_id', '_id', 'id')
# An unknown key that contains one of these is an error.
_TELLING = ('neg', 'pos', 'score', 'label')


class Passage(NamedTuple):
  """A passage as given in a file.

  Attributes:
    id: Its id, or None.
    title: Its title, or ''.
    text: Its text; None if the file has only the id.
    score: Score of query and passage; NaN for none.
  """

  id: str | None
  title: str
  text: str | None
  score: float = math.nan

  @property
  def whole(self) -> str:
    """Title and text joined; the id if there is no text."""
    text = self.id if self.text is None else self.text
    return f'{self.title} {text}' if self.title else text


class Record(NamedTuple):
  """One line about a query; its id or text may be None, but not both."""

  line: int
  query_id: str | None
  query: str | None
  positives: list[Passage]
  negatives: list[Passage]


def read(path: pathlib.Path, counts: collections.Counter) -> Iterator[Record]:
  """Yields the `Record` of each line of a file.

  Args:
    path: JSON lines or a JSON array; decompressed if its name ends in .gz.
    counts: Counter of corrections, for `records.say_counts`.
  """
  for line, record in records.objects(path, FORM):
    yield _Line(path, line, record, counts).read()


class _Line:
  """Parser of one record of a file.

  Args:
    path: The file.
    line: Number of the line, or of the object in an array.
    record: The dict.
    counts: As for `read`.
  """

  def __init__(self, path, line, record, counts):
    self._path, self._line, self._counts = path, line, counts
    self._record, self._left = record, set(record)

  def read(self):
    """Returns the `Record`."""
    query, query_id, row_id = (
      self._take(names)[1] for names in (_QUERY, _QUERY_ID, _ROW_ID)
    )
    query_id = row_id if query_id is None else query_id
    if query is None and query_id is None:
      raise self._bad(
        f'no query among {records.keys_of(self._record)}',
        f'give each line as {FORM}',
      )
    if not isinstance(query, str | None):
      raise self._bad(
        f'the query {_shown(query)} is not a string', 'give its text'
      )
    positives, negatives = self._sides()
    self._check_left()
    records.count_surrogates(query or '', self._counts)
    return Record(
      self._line,
      None if query_id is None else str(query_id),
      query,
      self._with_text(positives),
      self._with_text(negatives),
    )

  def _sides(self):
    """Returns positives and negatives, with None for null entries."""
    positives = self._passages(_POSITIVES) + self._ids(_POSITIVE_IDS)
    negatives = self._passages(_NEGATIVES) + self._ids(_NEGATIVE_IDS)
    for name in sorted(
      filter(_NUMBERED.fullmatch, self._record),
      key=lambda name: int(_NUMBERED.match(name)[1]),
    ):
      negatives += self._passages((name,))
    # DPR's negative_ctxs are drawn at random, so only used without others.
    others = self._passages(('negative_ctxs',))
    negatives = negatives or others
    return self._labelled(
      self._with_scores(positives, *self._take(_POSITIVE_SCORES)),
      self._with_scores(negatives, *self._take(_NEGATIVE_SCORES)),
    )

  def _labelled(self, positives, negatives):
    """Splits passages by labels or scores that cover both sides.

    A label of 1 or 0 says which side a passage is on. In a list with scores,
    the first passage is the positive (sentence-transformers,
    `mine_hard_negatives`).
    """
    name, values = self._take((*_LABELS, *_SCORES))
    if values is None:
      return positives, negatives
    both = positives + negatives
    values = values if isinstance(values, list) else [values]
    if name in _LABELS and not negatives:
      if len(values) != len(both) or not set(values) <= {0, 1}:
        raise self._bad(
          f'{name!r} is not 1 or 0 for each passage: {_shown(values)}',
        )
      pairs = list(zip(both, values, strict=True))
      return [p for p, v in pairs if v], [p for p, v in pairs if not v]
    if len(both) < 2:
      raise self._bad(
        f'{name!r} of one passage does not say whether it is positive: '
        f'{_shown(values)}',
        'give a label of 1 or 0',
      )
    if len(values) == len(both) - 1:
      what = 'margins, which are not read: only scores are'
      self._counts[what] += len(values)
      return positives, negatives
    both = self._with_scores(both, name, values)
    number = len(positives) if negatives else 1
    return both[:number], both[number:]

  def _take(self, names):
    """Returns (name, value) of the only present key, or (None, None)."""
    self._left.difference_update(names)
    found = [name for name in names if self._record.get(name) is not None]
    if len(found) > 1:
      raise self._bad(
        f'the line has more than one of {", ".join(map(repr, found))}',
        'leave one out',
      )
    return (found[0], self._record[found[0]]) if found else (None, None)

  def _passages(self, names):
    """Returns the passages under a key, with None for null entries."""
    there = any(name in self._record for name in names)
    name, value = self._take(names)
    if isinstance(value, dict) and all(
      isinstance(some, list) for some in value.values()
    ):  # Keyed by system, as in sentence-transformers/msmarco-hard-negatives.
      value = list(itertools.chain.from_iterable(value.values()))
    values = value if isinstance(value, list) else [value] * there
    return [self._passage(name, value) for value in values]

  def _passage(self, name, value):
    if value is None:
      return None
    if isinstance(value, str):
      return Passage(None, '', value)
    if type(value) is int:  # A number can only be an id.
      return Passage(str(value), '', None)
    if not isinstance(value, dict):
      raise self._bad(
        f'{name!r} has {_shown(value)}, which is not a text, id or object',
        'give its text',
      )
    an_id = next((value[key] for key in _PASSAGE_IDS if key in value), None)
    if an_id is None and 'text' not in value:
      raise self._bad(
        f"an object in {name!r} has no 'text' and no id, but "
        f'{records.keys_of(value)}',
      )
    title, text = value.get('title') or '', value.get('text')
    if not isinstance(title, str) or not isinstance(text, str | None):
      raise self._bad(
        f"the 'title' or 'text' of a passage is not a string: {_shown(value)}"
      )
    an_id = None if an_id is None else str(an_id)
    return Passage(an_id, title, text, self._score(value.get('score')))

  def _ids(self, names):
    name, values = self._take(names)
    if values is None:
      return []
    if not isinstance(values, list) or not all(
      isinstance(value, str | int) for value in values
    ):
      raise self._bad(f'{name!r} is not a list of ids: {_shown(values)}')
    return [
      Passage(None, '', value)
      if ' ' in value or not value.isascii()
      else Passage(value, '', None)
      for value in map(str, values)
    ]

  def _with_scores(self, passages, name, values):
    """Returns the passages with their scores; the same if there are none."""
    if values is None:
      return passages
    if not isinstance(values, list) or len(values) != len(passages):
      raise self._bad(
        f'{name!r} is not a list of {len(passages)} scores, one for each '
        f'passage: {_shown(values)}'
      )
    return [
      passage and passage._replace(score=self._score(value))
      for passage, value in zip(passages, values, strict=True)
    ]

  def _score(self, value):
    """Returns a score as a float; some of DPR's are strings."""
    try:
      score = math.nan if value is None else float(value)
    except (TypeError, ValueError):
      score = math.inf
    if math.isinf(score):
      raise self._bad(f'the score {_shown(value)} is not a number')
    return score

  def _with_text(self, passages):
    """Returns the non-empty passages; counts the others."""
    there = [
      p
      for p in passages
      if p and (p.id is not None if p.text is None else p.whole.strip())
    ]
    for passage in there:
      records.count_surrogates(passage.whole, self._counts)
    left_out = len(passages) - len(there)
    self._counts['passages that are null or empty, left out'] += left_out
    return there

  def _check_left(self):
    """Counts unknown keys, and rejects those that may matter."""
    for name in sorted(self._left):
      if any(part in name.lower() for part in _TELLING):
        raise self._bad(
          f'{name!r} is none of the keys that are read',
          f'give each line as {FORM}',
        )
      self._counts[f'lines with {name!r}, which is not read'] += 1

  def _bad(self, fact, cure='correct it'):
    return strict_io.refusal(self._path, fact, cure, self._line)


def _shown(value):
  return repr(value)[:80]
