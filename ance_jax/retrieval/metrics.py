"""Computes a protocol's measures by ir-measures, and writes TREC run files."""

from collections.abc import Sequence
import math
import pathlib

import ir_measures
import numpy as np

from ance_jax.core import atomic
from ance_jax.data import answers
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import trec
from ance_jax.retrieval import protocols


def protocol(split: corpus_lib.Split) -> protocols.Protocol:
  """Returns the protocol of a split."""
  return protocols.PROTOCOLS[split.protocol]


def depth(split: corpus_lib.Split, num_passages: int) -> int:
  """Returns how many passages to rank per query of a split."""
  return min(protocol(split).depth + (split.own is not None), num_passages)


def score(
  rows: np.ndarray, split: corpus_lib.Split, texts: Sequence[str]
) -> dict[str, float]:
  """Returns {measure: mean over all judged queries} of a ranking.

  Args:
    rows: As for `by_query`.
    split: Split of the Q queries.
    texts: As for `by_query`.
  """
  return {
    name: mean(values) for name, values in by_query(rows, split, texts).items()
  }


def mean(values: np.ndarray) -> float:
  """Returns the mean of (Q,) float64, rounded once and independent of order."""
  return math.fsum(values) / len(values)


def by_query(
  rows: np.ndarray, split: corpus_lib.Split, texts: Sequence[str]
) -> dict[str, np.ndarray]:
  """Returns {measure: (Q,) float64} of a ranking, 0 for queries without hits.

  Args:
    rows: (Q, K) int32 passage rows, best first, -1 for none; K is `depth`, or
      all passages of a smaller corpus. Apply `without_own` first.
    split: Split of the Q queries.
    texts: Texts of all passages, read only if the protocol checks answers.
  """
  chosen = protocol(split)
  rows = rows[:, : chosen.depth]
  # trec_eval breaks ties by id; negated places as scores preserve our order.
  # Row numbers serve as ids.
  run = {
    str(query): {
      str(row): float(-place) for place, row in enumerate(ranking) if row >= 0
    }
    for query, ranking in enumerate(rows.tolist())
  }
  qrels = _right(rows, split, texts) if chosen.by_answers else _judged(split)
  names = {}
  for name, text in chosen.measures.items():
    names.setdefault(ir_measures.parse_measure(text), []).append(name)
  values = {name: np.zeros(len(split.ids)) for name in chosen.measures}
  for found in ir_measures.iter_calc(list(names), qrels, run):
    for name in names[found.measure]:
      value = found.value
      if name.startswith(protocols.CAPPED):
        value *= _uncapped(qrels[found.query_id], int(name.split('@')[1]))
      values[name][int(found.query_id)] = value
  return values


def first_relevant(
  rows: np.ndarray,
  split: corpus_lib.Split,
  texts: Sequence[str],
  queries: Sequence[int],
) -> list[int | None]:
  """Returns the rank of each query's first relevant passage, from 1, or None.

  A passage is relevant if its grade is above 0 or, if the protocol checks
  answers, if its text contains one.

  Args:
    rows: As for `by_query`.
    split: Split of the Q queries.
    texts: As for `by_query`.
    queries: q query rows.
  """
  rows = rows[queries]
  if protocol(split).by_answers:
    right = answers.held(
      rows,
      [split.answers[query] for query in queries],
      texts,
      split.answers_are_patterns,
    )
  else:
    of_query, positives = split.positives()
    right = np.array(
      [
        np.isin(ranking, positives[of_query == query])
        for query, ranking in zip(queries, rows, strict=True)
      ]
    ).reshape(rows.shape)
  return [int(r.argmax()) + 1 if r.any() else None for r in right]


def without_own(ranking: trec.Ranking, split: corpus_lib.Split) -> trec.Ranking:
  """Removes from each ranking the passage that has the query's id.

  Args:
    ranking: Ranking of the split's queries.
    split: Split of the Q queries.

  Returns:
    A ranking of the same shape; rankings that lost a passage end with row -1
    and score -inf.
  """
  if split.own is None:
    return ranking
  own = (ranking.rows == split.own[:, None]) & (ranking.rows >= 0)
  order = np.argsort(own, 1, kind='stable')
  rows, scores = (
    np.take_along_axis(np.where(own, missing, values), order, 1)
    for values, missing in ((ranking.rows, -1), (ranking.scores, -np.inf))
  )
  return trec.Ranking(rows, scores.astype(np.float32))


def write_run(
  path: pathlib.Path,
  ranking: trec.Ranking,
  split: corpus_lib.Split,
  corpus: corpus_lib.Corpus,
  tag: str,
) -> None:
  """Writes a TREC run file atomically.

  Args:
    path: File.
    ranking: Ranking of the split's queries.
    split: Split of the Q queries.
    corpus: The ranked passages.
    tag: Name of the run, the last column.
  """
  with atomic.writing(path) as file:
    for query, rows, scores in zip(
      split.ids, ranking.rows.tolist(), ranking.scores.tolist(), strict=True
    ):
      for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1):
        if row >= 0:
          file.write(
            f'{query} Q0 {corpus.ids[row]} {rank} {score!r} {tag}\n'.encode()
          )


def _judged(split):
  """Returns the judgements in the form that ir-measures takes, rows as ids."""
  judged = np.repeat(np.arange(len(split.ids)), np.diff(split.offsets))
  qrels = {}
  for query, row, grade in zip(
    judged.tolist(), split.passages.tolist(), split.grades.tolist(), strict=True
  ):
    qrels.setdefault(str(query), {})[str(row)] = grade
  for query, grades in enumerate(split.missing or ()):
    for place, grade in enumerate(grades):
      # No row has this id.
      qrels.setdefault(str(query), {})[f'missing {place}'] = grade
  return qrels


def _right(rows, split, texts):
  """Returns as qrels for ir-measures the ranked passages with an answer."""
  held = answers.held(rows, split.answers, texts, split.answers_are_patterns)
  return {
    # 'none' makes ir-measures count queries without a right passage.
    str(query): {'none': 1, **{str(row): 1 for row in ranking[right].tolist()}}
    for query, (ranking, right) in enumerate(zip(rows, held, strict=True))
  }


def _uncapped(judged, k):
  relevant = sum(grade > 0 for grade in judged.values())
  return relevant / min(k, relevant) if relevant else 0.0
