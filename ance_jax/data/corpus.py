"""Corpus, queries and judgements as arrays; string ids stay here.

Everywhere else a passage is its row in the corpus, and a query its row in its
split (int32).
"""

import array
from collections.abc import Callable
import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np

from ance_jax.data import keys
from ance_jax.data import strings

# Between the parts of a title, such as address and title of a page: where text
# is tokenized, the separator goes in. A control character that no title has.
TITLE_PART = '\x1f'


class Corpus(NamedTuple):
  """All passages, in row order.

  Attributes:
    ids: N passage ids, all different.
    titles: N titles, some or all empty; `TITLE_PART` between their parts.
    texts: N texts.
    groups: (N,) int32; rows of equal number have the same text, or nearly.
    hash: SHA-256 of all this, in hexadecimal digits.
    rows: `strings.Rows` of the ids.
    keys: (N, 2) int64, of the text, and of title and text as one, to look for
      queries; None once that is done.
  """

  ids: strings.Strings
  titles: strings.Strings
  texts: strings.Strings
  groups: np.ndarray
  hash: str
  rows: strings.Rows | None = None
  keys: np.ndarray | None = None


class Given(NamedTuple):
  """Negatives that a file gives some queries, each once.

  Attributes:
    queries: (G,) int32 query rows, rising.
    passages: (G,) int32 passage rows, of a query in the order of the file.
    scores: (G,) float32 that the file has, NaN where it has none.
  """

  queries: np.ndarray
  passages: np.ndarray
  scores: np.ndarray

  def of(self, query):
    """Returns the passage rows of a query, in the order of the file."""
    return self.passages[
      slice(*np.searchsorted(self.queries, (query, query + 1)))
    ]

  def table(self, queries, most):
    """Returns (q, K) passage rows and scores of (q,) query rows, rising.

    Behind the last of a query they are -1 and NaN; K is `most` at most.
    """
    starts, ends = (
      np.searchsorted(self.queries, queries, side) for side in ('left', 'right')
    )
    sizes = np.minimum(ends - starts, most)
    there = np.arange(sizes.max(initial=0)) < sizes[:, None]
    places = (starts[:, None] + np.arange(there.shape[1]))[there]
    rows = np.full(there.shape, -1, np.int32)
    scores = np.full(there.shape, np.nan, np.float32)
    rows[there], scores[there] = self.passages[places], self.scores[places]
    return rows, scores


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
    negatives: Q lists of passage rows, best first, that the data brings as
      negatives; None where it has none.
    own: (Q,) int32 row of the passage with the query's id, -1 without one:
      it is never a result (BEIR: ignore_identical_ids). None: ids of queries
      have nothing to do with those of passages.
    protocol: Name of a row of `protocols.PROTOCOLS`.
    answers_are_patterns: Whether answers are regular expressions.
    missing: Q lists of the grades of judged passages that the corpus lacks:
      they are never found, but count in what could be. None without any.
    groups: (Q,) int32; queries of equal number have the same text. None: not
      looked for.
    same_text: (2, S) int32, query rows and the rows of the passages whose text,
      or title and text as one, is the query's. None: not looked for.
    given: `Given` of `--negatives`, or of the pairs; None without any.
    scores: (J,) float32, those that the same file has of judged passages, NaN
      where it has none; None without `given`.
  """

  ids: strings.Strings
  texts: strings.Strings
  offsets: np.ndarray
  passages: np.ndarray
  grades: np.ndarray
  hash: str
  answers: list[list[str]] | None = None
  negatives: list[list[int]] | None = None
  own: np.ndarray | None = None
  protocol: str = 'usual'
  answers_are_patterns: bool = False
  missing: list[list[int]] | None = None
  groups: np.ndarray | None = None
  same_text: np.ndarray | None = None
  given: Given | None = None
  scores: np.ndarray | None = None

  def positives(self, *, last=False):
    """Returns the query and the passage rows, (P,) int32, of positives.

    Each query's own judgements, by which it is evaluated; training goes by
    `shared_positives`.

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

  def shared_positives(self, *, last=False):
    """Returns `positives` that queries of the same text share: for training.

    A query's own come first.
    """
    pairs = self.positives(last=last)
    return keys.share(*pairs, self.groups) if self.twins().any() else pairs

  def twins(self):
    """Returns which queries have the text of another one, (Q,) bool."""
    if self.groups is None:
      return np.zeros(len(self.ids), bool)
    return np.bincount(self.groups)[self.groups] > 1

  def own_passages(self):
    """Returns (2, S) int32 query and passage rows of what is the query itself.

    Passages of its text, and that of its id where the protocol goes by ids.
    """
    pairs = np.zeros((2, 0), np.int32)
    if self.same_text is not None:
      pairs = self.same_text
    if self.own is not None:
      (with_own,) = np.nonzero(self.own >= 0)
      of_id = np.stack([with_own, self.own[with_own]])
      pairs = keys.unique_pairs(*np.concatenate([pairs, of_id], 1))
    return pairs


class Dataset(NamedTuple):
  """A corpus and its splits by name."""

  corpus: Corpus
  splits: dict[str, Split]


class Judged(NamedTuple):
  """A split as a reader finds it: queries, of which some are judged.

  Attributes:
    query_ids: Ids of all queries, a list of strings.
    queries: Their texts.
    judgements: {(row in query_ids, passage row): grade}, in the order of the
      data.
    answers: {row in query_ids: list of strings}, or None.
    negatives: {row in query_ids: list of passage rows, best first}, or None.
    own: {row in query_ids: row of the passage of that id}, or None.
    protocol: As in `Split`.
    answers_are_patterns: As in `Split`.
    all_count: Whether queries that nothing was judged on are in the split.
    missing: {(row in query_ids, id of a passage that the corpus lacks): grade},
      or None.
    given: `Given`, of rows in query_ids, or None.
    scores: {(row in query_ids, passage row): score} of some of what was judged,
      by the file of `given`.
  """

  query_ids: list[str]
  queries: list[str]
  judgements: dict[tuple[int, int], int]
  answers: dict[int, list[str]] | None = None
  negatives: dict[int, list[int]] | None = None
  own: dict[int, int] | None = None
  protocol: str = 'usual'
  answers_are_patterns: bool = False
  all_count: bool = False
  missing: dict[tuple[int, str], int] | None = None
  given: Given | None = None
  scores: dict[tuple[int, int], float] | None = None

  def judged_queries(self):
    """Returns the set of rows in query_ids that something was judged on."""
    return {query for query, _ in [*self.judgements, *(self.missing or {})]}


class Source(NamedTuple):
  """What a reader gives.

  Attributes:
    corpus: `Corpus`.
    read_split: read_split(name) -> `Judged`, or None if there is no such split.
    found: Where splits were looked for, and what is there, for people.
    negatives: Path of a file that gives the training queries negatives, as
      `given.attach` reads it, or None.
  """

  corpus: Corpus
  read_split: Callable[[str], Judged | None]
  found: str
  negatives: pathlib.Path | None = None


class CorpusWriter:
  """Makes a `Corpus` of passages that come one after the other.

  What it holds in memory is about 80 bytes a passage, and no text of a large
  corpus.
  """

  def __init__(self):
    self._columns = [strings.Writer() for _ in range(3)]
    self._hashes = array.array('q')
    self._keys, self._starts = bytearray(), bytearray()

  def add(self, an_id, title, text):
    """Adds the next row."""
    for column, value in zip(self._columns, (an_id, title, text), strict=True):
      column.add(value)
    self._hashes.append(strings.hashed(an_id))
    key, starts = keys.of_passage(title, text)
    self._keys += key
    self._starts += starts

  def __len__(self):
    return len(self._hashes)

  def done(self, groups=None):
    """Returns the `Corpus`.

    Args:
      groups: (N,) int, equal where texts are the same; None: where their words
        are, in lower case.
    """
    if groups is None:
      found = np.frombuffer(self._keys, f'S{keys.BYTES}')
      groups = np.unique(found, return_inverse=True)[1]
    columns = [writer.done() for writer in self._columns]
    digest = hashlib.sha256()
    for column in columns:
      column.update_hash(digest)
    groups = np.asarray(groups, np.int32)
    digest.update(groups)
    rows = strings.Rows(columns[0], np.array(self._hashes, np.int64))
    starts = keys.as_starts(self._starts)
    return Corpus(*columns, groups, digest.hexdigest(), rows, starts)


def make_corpus(ids, titles, texts, groups=None):
  """Returns the `Corpus` of three lists of strings; see `CorpusWriter`."""
  writer = CorpusWriter()
  for row in zip(ids, titles, texts, strict=True):
    writer.add(*row)
  return writer.done(groups)


def make_split(judged, corpus=None):
  """Returns the `Split` of a `Judged`, in the order of its queries.

  Args:
    judged: `Judged`.
    corpus: `Corpus` with its keys, in which queries are looked for, or None.
  """
  # By query, and what was judged on each in the order of the data.
  pairs = sorted(judged.judgements, key=lambda pair: pair[0])
  counts = np.bincount(
    [query for query, _ in pairs], minlength=len(judged.query_ids)
  )
  rows = np.arange(len(counts))
  if not judged.all_count:
    rows = np.array(sorted(judged.judged_queries()), np.int64)
  counts = counts[rows]
  ids = strings.make(judged.query_ids[row] for row in rows)
  texts = strings.make(judged.queries[row] for row in rows)
  offsets = np.concatenate([[0], np.cumsum(counts)])
  passages = np.array([passage for _, passage in pairs], np.int32)
  grades = np.array([judged.judgements[pair] for pair in pairs], np.int32)
  digest = hashlib.sha256()
  ids.update_hash(digest)
  texts.update_hash(digest)
  for column in (offsets, passages, grades):
    digest.update(column)
  lists = []
  for by_row in (judged.answers, judged.negatives):
    found = by_row and [by_row.get(int(row), []) for row in rows]
    if found:
      digest.update(json.dumps(found).encode())
    lists.append(found or None)
  missing = _missing(judged, rows)
  if missing:
    digest.update(f'missing {missing}'.encode())
  given, scores = _given(judged, rows, pairs)
  for column in (*(given or ()), scores):
    if column is not None:
      digest.update(column)
  own = None
  if judged.own:
    own = np.array([judged.own.get(int(row), -1) for row in rows], np.int32)
  return Split(
    ids,
    texts,
    offsets,
    passages,
    grades,
    digest.hexdigest(),
    *lists,
    own,
    judged.protocol,
    judged.answers_are_patterns,
    missing,
    keys.groups(texts),
    corpus and keys.found(texts, corpus.keys),
    given,
    scores,
  )


def queries_shared(split, other):
  """Returns how many queries of a split have the text of one of another."""
  known = keys.of_texts(other.texts)
  return int(np.isin(keys.of_texts(split.texts), known).sum())


def whole_text(corpus, row):
  """Returns title and text of a passage as one, with a space between."""
  title = whole_title(corpus, row)
  return f'{title} {corpus.texts[row]}' if title else corpus.texts[row]


def whole_title(corpus, row):
  """Returns the title of a passage as one line."""
  return corpus.titles[row].replace(TITLE_PART, ' ')


def _given(judged, rows, pairs):
  """Returns `Split.given` and `Split.scores` of query rows and judged pairs."""
  if judged.given is None:
    return None, None
  places = np.searchsorted(rows, judged.given.queries)
  given = judged.given._replace(queries=places.astype(np.int32))
  scores = [judged.scores.get(pair, np.nan) for pair in pairs]
  return given, np.array(scores, np.float32)


def _missing(judged, rows):
  """Returns the grades of missing passages by query, None without any."""
  grades = {}
  for (query, _), grade in (judged.missing or {}).items():
    grades.setdefault(query, []).append(grade)
  return [grades.get(int(row), []) for row in rows] if grades else None
