"""Retrieval measures through ir-measures, and TREC run files."""

import ir_measures
import numpy as np

from ance_jax import handoff

MEASURES = {
  'mrr@10': ir_measures.RR @ 10,
  'ndcg@10': ir_measures.nDCG @ 10,
  'recall@1': ir_measures.R @ 1,
  'recall@5': ir_measures.R @ 5,
  'recall@20': ir_measures.R @ 20,
  'recall@100': ir_measures.R @ 100,
}
DEPTH = 100


def score(rows, split):
  """Returns {measure: mean over all judged queries} of a ranking.

  Args:
    rows: (Q, K) int32 passage rows, best first, -1 where there is none; K is
      `DEPTH`, or all passages of a smaller corpus.
    split: The `data.Split` of the Q queries.
  """
  # trec_eval breaks ties of scores by id. Falling ranks as scores keep our
  # order, and rows serve as ids.
  run = {
    str(query): {
      str(row): float(-place) for place, row in enumerate(ranking) if row >= 0
    }
    for query, ranking in enumerate(rows.tolist())
  }
  judged = np.repeat(np.arange(len(split.ids)), np.diff(split.offsets))
  qrels = {}
  for query, row, grade in zip(
    judged.tolist(), split.passages.tolist(), split.grades.tolist(), strict=True
  ):
    qrels.setdefault(str(query), {})[str(row)] = grade
  by_name = {str(measure): name for name, measure in MEASURES.items()}
  totals = dict.fromkeys(MEASURES, 0.0)
  for found in ir_measures.iter_calc(MEASURES.values(), qrels, run):
    totals[by_name[str(found.measure)]] += found.value
  return {name: total / len(split.ids) for name, total in totals.items()}


def write_run(path, ranking, split, corpus, tag):
  """Writes a TREC run file, whole or not at all.

  Args:
    path: The file.
    ranking: An `index.Ranking` of the split's queries.
    split: A `data.Split`.
    corpus: The `data.Corpus`.
    tag: Name of the run, the last column.
  """
  with handoff.writing(path) as file:
    for query, (rows, scores) in enumerate(
      zip(ranking.rows.tolist(), ranking.scores.tolist(), strict=True)
    ):
      for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1):
        if row >= 0:
          line = (
            f'{split.ids[query]} Q0 {corpus.ids[row]} {rank} {score!r} {tag}'
          )
          file.write(f'{line}\n'.encode())
