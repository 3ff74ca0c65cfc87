"""Measures against slow rewrites of their definitions."""

import numpy as np
import pytest

from ance_jax import data
from ance_jax import index
from ance_jax import metrics


def make_split(judgements, num_queries):
  """A split of {(query, passage): grade}."""
  pairs = sorted(judgements)
  counts = np.bincount([q for q, _ in pairs], minlength=num_queries)
  return data.Split(
    data.Strings(f'q{q}' for q in range(num_queries)),
    data.Strings('' for _ in range(num_queries)),
    np.concatenate([[0], np.cumsum(counts)]),
    np.array([p for _, p in pairs], np.int32),
    np.array([judgements[pair] for pair in pairs], np.int32),
    '',
  )


def slow_scores(rows, judgements):
  """Every measure for one query after another, by its definition."""
  totals = dict.fromkeys(metrics.MEASURES, 0.0)
  for query, ranking in enumerate(rows.tolist()):
    grades = {p: g for (q, p), g in judgements.items() if q == query}
    relevant = {p for p, g in grades.items() if g > 0}
    places = [i for i, p in enumerate(ranking[:10]) if p in relevant]
    totals['mrr@10'] += 1 / (places[0] + 1) if places else 0
    gain = [
      grades.get(p, 0) / np.log2(i + 2) for i, p in enumerate(ranking[:10])
    ]
    best = sorted(grades.values(), reverse=True)[:10]
    ideal = sum(g / np.log2(i + 2) for i, g in enumerate(best))
    totals['ndcg@10'] += sum(gain) / ideal if ideal else 0
    for k in (1, 5, 20, 100):
      hits = len(relevant & set(ranking[:k]))
      totals[f'recall@{k}'] += hits / len(relevant) if relevant else 0
  return {name: total / len(rows) for name, total in totals.items()}


@pytest.mark.parametrize('seed', range(3))
def test_measures_are_those_of_their_definitions(seed):
  random = np.random.default_rng(seed)
  rows = np.array([random.permutation(130)[:100] for _ in range(25)], np.int32)
  rows[3, 40:] = -1
  rows[4] = -1
  judgements = {
    (q, int(p)): int(random.integers(4))
    for q in range(25)
    for p in random.permutation(130)[: random.integers(1, 9)]
  }
  found = metrics.score(rows, make_split(judgements, 25))
  assert found == pytest.approx(slow_scores(rows, judgements), abs=1e-6)


def test_a_query_without_a_hit_counts_in_the_denominator():
  rows = np.array([[0, 1], [0, 1], [0, 1]], np.int32)
  split = make_split({(0, 0): 1, (1, 5): 1, (2, 7): 0}, 3)
  assert metrics.score(rows, split)['mrr@10'] == pytest.approx(1 / 3)


def test_the_order_of_the_ranking_counts_whatever_the_ids():
  # trec_eval by itself would put passage 9 before 10 where scores are equal.
  split = make_split({(0, 10): 1}, 1)
  for place, row in enumerate([[10, 9, 8], [9, 10, 8], [9, 8, 10]], 1):
    found = metrics.score(np.array([row], np.int32), split)
    assert found['mrr@10'] == pytest.approx(1 / place)


def test_run_file_has_the_columns_of_trec_and_leaves_out_what_was_not_found(
  tmp_path,
):
  corpus = data.Corpus(data.Strings(['a', 'b', 'c']), None, None, None, '')
  ranking = index.Ranking(
    np.array([[2, 0], [1, -1]], np.int32),
    np.array([[1.5, 0.25], [3, -np.inf]], np.float32),
  )
  path = tmp_path / 'run.trec'
  metrics.write_run(path, ranking, make_split({(0, 1): 1}, 2), corpus, 'tag')
  assert path.read_text().splitlines() == [
    'q0 Q0 c 1 1.5 tag',
    'q0 Q0 a 2 0.25 tag',
    'q1 Q0 b 1 3.0 tag',
  ]
