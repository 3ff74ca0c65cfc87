"""Retrieval measures of a protocol through ir-measures, TREC run files."""

import math

import ir_measures
import numpy as np

from ance_jax.core import atomic
from ance_jax.data import answers
from ance_jax.retrieval import protocols


def protocol(split):
  """Returns the `protocols.Protocol` of a `corpus.Split`."""
  return protocols.PROTOCOLS[split.protocol]


def depth(split, num_passages):
  """Returns how many passages must be ranked for each query of a split."""
  own = split.own is not None
  return min(protocol(split).depth + own, num_passages)


def score(rows, split, texts):
  """Returns {measure: mean over all judged queries} of a ranking.

  Args:
    rows: As for `by_query`.
    split: The `corpus.Split` of the queries.
    texts: As for `by_query`.
  """
  found = by_query(rows, split, texts)
  return {name: mean(values) for name, values in found.items()}


def mean(values):
  """Returns the mean of (Q,) float64, rounded once: in any order the same."""
  return math.fsum(values) / len(values)


def by_query(rows, split, texts):
  """Returns {measure: (Q,) float64} of a ranking; nothing found counts 0.

  Args:
    rows: (Q, K) int32 passage rows, best first, -1 where there is none; K is
      `depth`, or all passages of a smaller corpus. See `without_own`.
    split: The `corpus.Split` of the Q queries.
    texts: Texts of all passages, looked at where answers count.
  """
  chosen = protocol(split)
  rows = rows[:, : chosen.depth]
  # trec_eval breaks ties of scores by id. Falling ranks as scores keep our
  # order, and rows serve as ids.
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


def first_relevant(rows, split, texts, queries):
  """Returns the place of each query's first relevant passage, from 1.

  Relevant is a grade above 0, or, where answers count, a text with an answer.

  Args:
    rows: As for `by_query`.
    split: The `corpus.Split` of the Q queries.
    texts: As for `by_query`.
    queries: q query rows.

  Returns:
    A list of q places, None where no passage of the ranking is relevant.
  """
  rows = rows[queries]
  if protocol(split).by_answers:
    given = [split.answers[query] for query in queries]
    right = answers.held(rows, given, texts, split.answers_are_patterns)
  else:
    of_query, positives = split.positives()
    right = np.array(
      [
        np.isin(ranking, positives[of_query == query])
        for query, ranking in zip(queries, rows, strict=True)
      ]
    ).reshape(rows.shape)
  return [int(r.argmax()) + 1 if r.any() else None for r in right]


def without_own(ranking, split):
  """Returns a ranking without the passages that have their query's id.

  Args:
    ranking: `trec.Ranking` of the split's queries.
    split: A `corpus.Split`.

  Returns:
    A `trec.Ranking` of the same shape; -1, and -inf as the score, at the
    end of what one was taken from.
  """
  if split.own is None:
    return ranking
  own = (ranking.rows == split.own[:, None]) & (ranking.rows >= 0)
  order = np.argsort(own, 1, kind='stable')
  rows = np.where(own, -1, ranking.rows)
  scores = np.where(own, -np.inf, ranking.scores).astype(np.float32)
  return ranking._replace(
    rows=np.take_along_axis(rows, order, 1),
    scores=np.take_along_axis(scores, order, 1),
  )


def write_run(path, ranking, split, corpus, tag):
  """Writes a TREC run file, whole or not at all.

  Args:
    path: The file.
    ranking: A `trec.Ranking` of the split's queries.
    split: A `corpus.Split`.
    corpus: The `corpus.Corpus`.
    tag: Name of the run, the last column.
  """
  with atomic.writing(path) as file:
    for query, (rows, scores) in enumerate(
      zip(ranking.rows.tolist(), ranking.scores.tolist(), strict=True)
    ):
      for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1):
        if row >= 0:
          line = (
            f'{split.ids[query]} Q0 {corpus.ids[row]} {rank} {score!r} {tag}'
          )
          file.write(f'{line}\n'.encode())


def _judged(split):
  """Returns the judgements as ir-measures takes them, rows as ids."""
  judged = np.repeat(np.arange(len(split.ids)), np.diff(split.offsets))
  qrels = {}
  for query, row, grade in zip(
    judged.tolist(), split.passages.tolist(), split.grades.tolist(), strict=True
  ):
    qrels.setdefault(str(query), {})[str(row)] = grade
  for query, grades in enumerate(split.missing or ()):
    for place, grade in enumerate(grades):
      # An id that no row has.
      qrels.setdefault(str(query), {})[f'missing {place}'] = grade
  return qrels


def _right(rows, split, texts):
  """Returns which ranked passages hold an answer, as ir-measures takes it."""
  held = answers.held(rows, split.answers, texts, split.answers_are_patterns)
  return {
    # A query of which nothing is right counts, too.
    str(query): {'none': 1, **{str(row): 1 for row in ranking[right].tolist()}}
    for query, (ranking, right) in enumerate(zip(rows, held, strict=True))
  }


def _uncapped(judged, k):
  relevant = sum(grade > 0 for grade in judged.values())
  return relevant / min(k, relevant) if relevant else 0.0
