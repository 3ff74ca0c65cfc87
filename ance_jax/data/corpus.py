"""Corpus, queries and judgements as arrays; string ids stay in here.

Everywhere else, a passage is its row in the corpus and a query its row in its
split (int32).
"""

import array
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np

from ance_jax.data import keys
from ance_jax.data import strings

# Separates the parts of a title, such as the URL and title of a page; replaced
# by the tokenizer's separator when text is tokenized. A control character that
# occurs in no title.
TITLE_PART = '\x1f'


class Corpus(NamedTuple):
  """All passages, in row order.

  Attributes:
    ids: N distinct passage ids.
    titles: N titles, possibly empty; `TITLE_PART` between their parts.
    texts: N texts.
    groups: (N,) int32; rows with equal numbers have (nearly) the same text.
    hash: SHA-256 of all the above, in hexadecimal.
    rows: Maps ids to rows.
    keys: (N, 2) int64 starts of keys of text and of title and text, to look up
      queries; None afterwards.
  """

  ids: strings.Strings
  titles: strings.Strings
  texts: strings.Strings
  groups: np.ndarray
  hash: str
  rows: strings.Rows | None = None
  keys: np.ndarray | None = None


class Given(NamedTuple):
  """Negatives that a file lists for some queries, each once.

  Attributes:
    queries: (G,) int32 query rows, ascending.
    passages: (G,) int32 passage rows, per query in file order.
    scores: (G,) float32 scores from the file, NaN for none.
  """

  queries: np.ndarray
  passages: np.ndarray
  scores: np.ndarray

  def of(self, query: int) -> np.ndarray:
    """Returns the passage rows of a query, in file order."""
    return self.passages[
      slice(*np.searchsorted(self.queries, (query, query + 1)))
    ]

  def table(
    self, queries: np.ndarray, most: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns (q, K) passage rows and scores of (q,) ascending query rows.

    K is at most `most`; shorter rows are padded with -1 and NaN.
    """
    starts, ends = (
      np.searchsorted(self.queries, queries, side) for side in ('left', 'right')
    )
    sizes = np.minimum(ends - starts, most)
    return (
      padded(self.passages, starts, sizes, -1),
      padded(self.scores, starts, sizes, np.nan),
    )


def padded(
  column: np.ndarray, starts: np.ndarray, sizes: np.ndarray, empty: float
) -> np.ndarray:
  """Returns slices of a column as rows, (q, max(sizes)), padded with `empty`.

  Args:
    column: (n,), of any type.
    starts: (q,) int, index of the first item of each slice.
    sizes: (q,) int, length of each slice.
    empty: Value that pads shorter slices.
  """
  there = np.arange(sizes.max(initial=0)) < sizes[:, None]
  rows = np.full(there.shape, empty, column.dtype)
  rows[there] = column[(starts[:, None] + np.arange(there.shape[1]))[there]]
  return rows


class Split(NamedTuple):
  """The judged queries of one split, with their judgements.

  Query row i has the judgements from offsets[i] to offsets[i + 1], in the order
  of the data.

  Attributes:
    ids: Q distinct query ids.
    texts: Q queries.
    offsets: (Q + 1,) int64.
    passages: (J,) int32, the judged passage rows.
    grades: (J,) int32; relevant if above 0.
    hash: SHA-256 of all of this, in hexadecimal.
    answers: Answers per query; a text that contains one of them answers the
      query. None if the data has none.
    negatives: Passage rows per query, best first, that the data lists as
      negatives; None if it has none.
    own: (Q,) int32 row of the passage with the query's id, or -1; never counted
      as a result (BEIR: ignore_identical_ids). None if query ids are unrelated
      to passage ids.
    protocol: Name of a row of `protocols.PROTOCOLS`.
    answers_are_patterns: Whether answers are regular expressions.
    missing: Grades per query of judged passages that the corpus lacks. They are
      never found, but metrics count them as findable. None without any.
    groups: (Q,) int32; queries with equal numbers have the same text. None if
      not computed.
    same_text: (2, S) int32, rows of queries and of passages whose text, or
      title and text, equals the query. None if not computed.
    given: Negatives from `--negatives` or from the pairs; None without any.
    scores: (J,) float32, scores of judged passages in the same file, NaN for
      none; None without `given`.
    added: Hash of the positives that `with_positives` added, '' without any;
      `hash` does not depend on them.
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
  added: str = ''

  def positives(self, *, last: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns (P,) int32 query rows and passage rows of the positives.

    Only each query's own judgements, as evaluation needs them; training uses
    `shared_positives`.

    Args:
      last: Whether to return only the last positive of each query, in the order
        of the judgements.
    """
    judged = np.diff(self.offsets)
    queries = np.repeat(np.arange(len(judged), dtype=np.int32), judged)
    relevant = self.grades > 0
    queries, passages = queries[relevant], self.passages[relevant]
    if last:
      ends = np.append(queries[1:] != queries[:-1], True)
      queries, passages = queries[ends], passages[ends]
    return queries, passages

  def with_positives(
    self, queries: np.ndarray, passages: np.ndarray
  ) -> 'Split':
    """Returns a copy in which more pairs are positives.

    Pairs that are judged keep their grades; others follow the judgements of
    their query, with grade 1.

    Args:
      queries: (P,) int query rows.
      passages: (P,) int passage rows.
    """
    judged = np.repeat(np.arange(len(self.ids)), np.diff(self.offsets))
    pairs = np.stack([queries, passages])
    pairs = np.concatenate([np.stack([judged, self.passages]), pairs], 1)
    first = keys.first_of_pairs(*pairs)
    queries, passages = pairs[:, first]
    added = first >= len(judged)
    old = np.minimum(first, len(judged) - 1)
    grades = np.where(added, 1, self.grades[old]).astype(np.int32)
    scores = self.scores
    if scores is not None:
      scores = np.where(added, np.nan, scores[old]).astype(np.float32)
    return self._replace(
      offsets=np.searchsorted(queries, np.arange(len(self.ids) + 1)),
      passages=passages.astype(np.int32),
      grades=grades,
      scores=scores,
      added=hashlib.sha256(pairs.tobytes()).hexdigest(),
    )

  def shared_positives(
    self, *, last: bool = False
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns `positives`, shared between queries with the same text.

    Used in training. A query's own positives come first.
    """
    pairs = self.positives(last=last)
    return keys.share(*pairs, self.groups) if self.twins().any() else pairs

  def twins(self) -> np.ndarray:
    """Returns whether another query has the same text, (Q,) bool."""
    if self.groups is None:
      return np.zeros(len(self.ids), bool)
    return np.bincount(self.groups)[self.groups] > 1

  def own_passages(self) -> np.ndarray:
    """Returns (2, S) int32 rows of queries and of the passages equal to them.

    A passage equals a query if it has its text or, where `own` is set, its id.
    """
    pairs = (
      np.zeros((2, 0), np.int32) if self.same_text is None else self.same_text
    )
    if self.own is not None:
      (with_own,) = np.nonzero(self.own >= 0)
      of_id = with_own, self.own[with_own]
      pairs = keys.unique_pairs(*np.append(pairs, of_id, 1))
    return pairs


class TextDataset(NamedTuple):
  """A corpus and its splits by name, as texts."""

  corpus: Corpus
  splits: dict[str, Split]


class RawSplit(NamedTuple):
  """A split as a reader finds it, including queries without judgements.

  Attributes:
    query_ids: Ids of all queries.
    queries: Their texts.
    judgements: {(row in query_ids, passage row): grade}, in the order of the
      data.
    answers: {row in query_ids: answers}, or None.
    negatives: {row in query_ids: passage rows, best first}, or None.
    own: {row in query_ids: row of the passage with that id}, or None.
    protocol: As in `Split`.
    answers_are_patterns: As in `Split`.
    all_count: Whether the split keeps queries without judgements.
    missing: {(row in query_ids, id of a passage that the corpus lacks): grade},
      or None.
    given: Negatives with rows in query_ids, or None.
    scores: {(row in query_ids, passage row): score} of judged passages that the
      file of `given` scores.
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

  def judged_queries(self) -> set[int]:
    """Returns the rows in query_ids of queries with judgements."""
    return {query for query, _ in [*self.judgements, *(self.missing or {})]}


class RawDataset(NamedTuple):
  """The result of a reader.

  Attributes:
    corpus: All passages.
    read_split: Reads a split by name; None if there is no such split.
    found: Where splits were searched and which exist, for messages.
    negatives: Path of a file with negatives for the training queries, for
      `given.attach`, or None.
  """

  corpus: Corpus
  read_split: Callable[[str], RawSplit | None]
  found: str
  negatives: pathlib.Path | None = None


def make_corpus(
  ids: Iterable[str],
  titles: Iterable[str],
  texts: Iterable[str],
  groups: Sequence[int] | np.ndarray | None = None,
) -> Corpus:
  """Returns the `Corpus` of three columns; see `corpus_of`."""
  return corpus_of(zip(ids, titles, texts, strict=True), groups)


def corpus_of(
  rows: Iterable[Sequence[str]],
  groups: Sequence[int] | np.ndarray | None = None,
) -> Corpus:
  """Returns the `Corpus` of passages.

  Takes about 80 bytes of memory per passage; a large corpus's texts are on
  disk.

  Args:
    rows: (id, title, text) of each passage, in row order; read once.
    groups: (N,) int, equal for texts that count as the same; None compares
      lower-cased words.
  """
  writers = [strings.Writer() for _ in range(3)]
  hashes, of_texts, starts = array.array('q'), bytearray(), bytearray()
  for an_id, title, text in rows:
    for writer, value in zip(writers, (an_id, title, text), strict=True):
      writer.add(value)
    hashes.append(strings.hashed(an_id))
    key, start = keys.of_passage(title, text)
    of_texts += key
    starts += start
  if groups is None:
    groups = np.unique(
      np.frombuffer(of_texts, f'S{keys.BYTES}'), return_inverse=True
    )[1]
  groups = np.asarray(groups, np.int32)
  columns = [writer.done() for writer in writers]
  digest = hashlib.sha256()
  for column in columns:
    column.update_hash(digest)
  digest.update(groups)
  return Corpus(
    *columns,
    groups,
    digest.hexdigest(),
    strings.Rows(columns[0], np.array(hashes, np.int64)),
    keys.as_starts(starts),
  )


def make_split(judged: RawSplit, corpus: Corpus | None = None) -> Split:
  """Returns a `RawSplit` as a `Split`, in the order of its queries.

  Args:
    judged: The split as read.
    corpus: Corpus, still with its keys, to find passages equal to a query; None
      skips that.
  """
  # By query; the sort is stable, so judgements keep the order of the data.
  pairs = sorted(judged.judgements, key=lambda pair: pair[0])
  counts = np.bincount(
    [query for query, _ in pairs], minlength=len(judged.query_ids)
  )
  rows = (
    np.arange(len(counts))
    if judged.all_count
    else np.array(sorted(judged.judged_queries()), np.int64)
  )
  ids = strings.make(judged.query_ids[row] for row in rows)
  texts = strings.make(judged.queries[row] for row in rows)
  offsets = np.concatenate([[0], np.cumsum(counts[rows])])
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
  if missing := _missing(judged, rows):
    digest.update(f'missing {missing}'.encode())
  given, scores = _given(judged, rows, pairs)
  for column in (*(given or ()), scores):
    if column is not None:
      digest.update(column)
  own = (
    np.array([judged.own.get(int(row), -1) for row in rows], np.int32)
    if judged.own
    else None
  )
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


def queries_shared(split: Split, other: Split) -> int:
  """Returns how many queries of `split` have the text of one of `other`."""
  return int(
    np.isin(keys.of_texts(split.texts), keys.of_texts(other.texts)).sum()
  )


def whole_text(corpus: Corpus, row: int) -> str:
  """Returns title and text of a passage, joined by a space."""
  title = whole_title(corpus, row)
  return f'{title} {corpus.texts[row]}' if title else corpus.texts[row]


def whole_title(corpus: Corpus, row: int) -> str:
  """Returns the title of a passage as one line."""
  return corpus.titles[row].replace(TITLE_PART, ' ')


def _given(judged, rows, pairs):
  """Returns `Split.given` and `Split.scores` of query rows and judged pairs."""
  if judged.given is None:
    return None, None
  queries = np.searchsorted(rows, judged.given.queries).astype(np.int32)
  scores = [judged.scores.get(pair, np.nan) for pair in pairs]
  return judged.given._replace(queries=queries), np.array(scores, np.float32)


def _missing(judged, rows):
  """Returns the grades of missing passages per query; None without any."""
  grades = {}
  for (query, _), grade in (judged.missing or {}).items():
    grades.setdefault(query, []).append(grade)
  return [grades.get(int(row), []) for row in rows] if grades else None
