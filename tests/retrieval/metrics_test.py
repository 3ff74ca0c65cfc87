"""Measures against slow rewrites of their definitions."""

import numpy as np
import pytest
import pytrec_eval

from ance_jax.data import corpus as corpus_lib
from ance_jax.data import strings
from ance_jax.data import trec
from ance_jax.retrieval import metrics
from ance_jax.retrieval import protocols


def make_split(judgements, num_queries):
  """A split of {(query, passage): grade}."""
  pairs = sorted(judgements)
  counts = np.bincount([q for q, _ in pairs], minlength=num_queries)
  return corpus_lib.Split(
    strings.make(f'q{q}' for q in range(num_queries)),
    strings.make('' for _ in range(num_queries)),
    np.concatenate([[0], np.cumsum(counts)]),
    np.array([p for _, p in pairs], np.int32),
    np.array([judgements[pair] for pair in pairs], np.int32),
    '',
  )


def test_a_query_without_a_hit_counts_in_the_denominator():
  rows = np.array([[0, 1], [0, 1], [0, 1]], np.int32)
  split = make_split({(0, 0): 1, (1, 5): 1, (2, 7): 0}, 3)
  assert metrics.score(rows, split, None)['mrr@10'] == pytest.approx(1 / 3)


def test_the_order_of_the_ranking_counts_whatever_the_ids():
  # trec_eval by itself would put passage 9 before 10 where scores are equal.
  split = make_split({(0, 10): 1}, 1)
  for place, row in enumerate([[10, 9, 8], [9, 10, 8], [9, 8, 10]], 1):
    found = metrics.score(np.array([row], np.int32), split, None)
    assert found['mrr@10'] == pytest.approx(1 / place)


def test_run_file_has_the_columns_of_trec_and_leaves_out_what_was_not_found(
  tmp_path,
):
  corpus = corpus_lib.Corpus(
    strings.make(['a', 'b', 'c']), None, None, None, ''
  )
  ranking = trec.Ranking(
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


def random_run(num_queries, num_passages, depth):
  """A ranking with ties, short rows and an empty one, and graded judgements.

  Judged passages may be missing from the ranking, and those of equal text (even
  rows and the next) are judged apart, as in MS MARCO.
  """
  random = np.random.default_rng(7)
  rows = np.array(
    [random.permutation(num_passages)[:depth] for _ in range(num_queries)],
    np.int32,
  )
  rows[1, depth // 2 :] = -1
  rows[2] = -1
  judgements = {
    (q, int(p)): int(random.integers(4))
    for q in range(num_queries)
    for p in random.permutation(num_passages)[: random.integers(1, 12)]
  }
  return rows, judgements


def slow_protocol(name, rows, judgements):
  """A protocol's binary measures by its script's rule, one query at a time."""
  least = 2 if name == 'trec_dl' else 1
  measures = protocols.PROTOCOLS[name].measures
  totals = dict.fromkeys(measures, 0.0)
  for query, ranking in enumerate(rows.tolist()):
    ranking = [p for p in ranking if p >= 0]
    grades = {p: g for (q, p), g in judgements.items() if q == query}
    relevant = {p for p, g in grades.items() if g >= least}
    right = [p in relevant for p in ranking]
    for measure in measures:
      kind, k = measure.split('@')
      k = int(k)
      if kind == 'mrr' and any(right[:k]):
        totals[measure] += 1 / (right[:k].index(True) + 1)
      if kind == 'recall' and relevant:
        totals[measure] += sum(right[:k]) / len(relevant)
      if kind == 'capped_recall' and relevant:
        totals[measure] += sum(right[:k]) / min(k, len(relevant))
      if kind == 'map' and relevant:
        hits = [i for i, r in enumerate(right[:k]) if r]
        precisions = [(n + 1) / (place + 1) for n, place in enumerate(hits)]
        totals[measure] += sum(precisions) / len(relevant)
      if kind == 'ndcg':
        gains = [grades.get(p, 0) for p in ranking[:k]]
        best = sorted(grades.values(), reverse=True)[:k]
        totals[measure] += dcg(gains) / dcg(best) if dcg(best) else 0
  return {name: total / len(rows) for name, total in totals.items()}


def dcg(gains):
  return sum(gain / np.log2(place + 2) for place, gain in enumerate(gains))


@pytest.mark.parametrize(
  'name', [n for n, p in protocols.PROTOCOLS.items() if not p.by_answers]
)
def test_each_protocol_follows_the_rule_of_its_script(name):
  rows, judgements = random_run(20, 1500, protocols.PROTOCOLS[name].depth + 3)
  split = make_split(judgements, 20)._replace(protocol=name)
  found = metrics.score(rows, split, None)
  depth = protocols.PROTOCOLS[name].depth
  slow = slow_protocol(name, rows[:, :depth], judgements)
  assert found == pytest.approx(slow, abs=1e-6)


def test_the_passage_with_the_id_of_a_query_is_no_result_for_it():
  rows = np.array([[4, 2, 7], [1, 4, -1], [5, 6, 7]], np.int32)
  judged = {(0, 2): 1, (1, 4): 1, (2, 6): 1}
  split = make_split(judged, 3)._replace(
    protocol='beir', own=np.array([4, -1, 7], np.int32)
  )
  assert [metrics.depth(split, size) for size in (5000, 60)] == [101, 60]
  scores = np.array([[3, 2, 1], [3, 2, -np.inf], [3, 2, 1]], np.float32)
  found = metrics.without_own(trec.Ranking(rows, scores), split)
  assert found.rows.tolist() == [[2, 7, -1], [1, 4, -1], [5, 6, -1]]
  assert found.scores.tolist() == [[2, 1, -np.inf], [3, 2, -np.inf]] + [
    [3, 2, -np.inf]
  ]
  found = metrics.score(found.rows, split, None)
  assert found['mrr@10'] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)


def test_accuracy_is_the_share_of_questions_with_an_answer_in_the_first_k():
  texts = ['a red fox', 'the Blue dog', 'nothing', 'red', 'b1ue']
  rows = np.array([[2, 1, 0], [2, 4, 1], [0, 2, -1]], np.int32)
  split = make_split({(0, 2): 1}, 3)._replace(
    protocol='answers', answers=[['RED'], ['green', 'blue dog'], ['cat']]
  )
  found = metrics.score(rows, split, texts)
  assert found == {
    'accuracy@20': pytest.approx(2 / 3),
    'accuracy@1': 0,
    'accuracy@5': pytest.approx(2 / 3),
    'accuracy@100': pytest.approx(2 / 3),
  }
  patterns = split._replace(
    answers=[[r'r.d\b'], [r'^b\due$'], ['(cat']], answers_are_patterns=True
  )
  with pytest.raises(Exception, match='missing'):
    metrics.score(rows, patterns, texts)
  patterns = patterns._replace(answers=[[r'FOX$'], [r'^b\due$'], [r'c\w+t']])
  assert metrics.score(rows, patterns, texts)['accuracy@5'] == pytest.approx(
    2 / 3
  )


def with_missing(split, missing):
  """A split whose corpus lacks {query row: grades}."""
  return split._replace(
    missing=[missing.get(query, []) for query in range(len(split.ids))]
  )


@pytest.mark.parametrize('name', ['usual', 'beir', 'trec_dl', 'msmarco_doc'])
def test_passages_that_the_corpus_lacks_count_as_pytrec_eval_has_them(name):
  rows, judgements = random_run(20, 1500, 1000)
  random = np.random.default_rng(3)
  # Query 19 has nothing else; others have grades of either sign, or none.
  judgements = {
    pair: int(random.integers(-2, 4)) for pair in judgements if pair[0] < 19
  }
  missing = {q: random.integers(-2, 4, size=q % 5).tolist() for q in range(19)}
  missing[19] = [2, 1]
  split = with_missing(make_split(judgements, 20), missing)
  found = metrics.score(rows, split._replace(protocol=name), None)
  qrels = {f'q{q}': {} for q in range(20)}
  for (query, passage), grade in judgements.items():
    qrels[f'q{query}'][f'{passage:05d}'] = grade
  for query, grades in missing.items():
    lacking = {f'gone {place}': grade for place, grade in enumerate(grades)}
    qrels[f'q{query}'].update(lacking)
  run = {
    f'q{q}': {
      f'{p:05d}': -float(i) for i, p in enumerate(r) if p >= 0
    } or {'none': 0.0}
    for q, r in enumerate(rows)
  }  # fmt: skip
  least = 2 if name == 'trec_dl' else 1
  graded = pytrec_eval.RelevanceEvaluator(qrels, {'ndcg_cut.10'}).evaluate(run)
  binary = pytrec_eval.RelevanceEvaluator(
    qrels, {'recall', 'map_cut.1000'}, relevance_level=least
  ).evaluate(run)
  assert len(graded) == 20
  compared = {'ndcg@10': (graded, 'ndcg_cut_10')}
  for k in (5, 20, 100, 1000):
    compared[f'recall@{k}'] = binary, f'recall_{k}'
  compared['map@1000'] = binary, 'map_cut_1000'
  for measure in compared.keys() & found.keys():
    values, theirs = compared[measure]
    mean = sum(value[theirs] for value in values.values()) / 20
    assert found[measure] == pytest.approx(mean, abs=1e-6), measure


def test_capped_recall_counts_what_the_corpus_lacks():
  # BEIR's recall_cap: 30 found of at most 100, and of 50; 70 are judged 0.
  judged = {(q, row): 1 for q in range(2) for row in range(30)}
  split = with_missing(
    make_split(judged, 2), {0: [1] * 90, 1: [2] * 20 + [0] * 70}
  )
  rows = np.tile(np.arange(100, dtype=np.int32), (2, 1))
  found = metrics.by_query(rows, split._replace(protocol='beir'), None)
  assert found['capped_recall@100'] == pytest.approx([0.3, 0.6])
  assert metrics.first_relevant(rows[:, 30:], split, None, [0, 1]) == [None] * 2


@pytest.mark.parametrize(
  ('name', 'first', 'depth'),
  [
    ('usual', 'mrr@10', 100),
    ('beir', 'ndcg@10', 100),
    ('msmarco', 'mrr@10', 1000),
    ('trec_dl', 'ndcg@10', 1000),
    ('msmarco_doc', 'mrr@100', 100),
    ('trec_dl_doc', 'ndcg@10', 100),
    ('answers', 'accuracy@20', 100),
  ],
)
def test_the_official_measure_is_first_and_all_are_of_whole_rankings(
  name, first, depth
):
  assert next(iter(protocols.PROTOCOLS[name].measures)) == first
  split = make_split({(0, 1): 1}, 1)._replace(protocol=name)
  found = [metrics.depth(split, size) for size in (depth - 1, depth + 1)]
  assert found == [depth - 1, depth]


def test_the_first_relevant_passages_are_of_the_queries_asked_for():
  rows = np.array([[4, 2, 7], [1, 4, 0], [5, 6, 7]], np.int32)
  split = make_split({(0, 7): 1, (1, 1): 1, (1, 4): 0, (2, 6): 2}, 3)
  assert metrics.first_relevant(rows, split, None, [2, 1, 0]) == [2, 1, 3]
  assert metrics.first_relevant(rows, split, None, [0, 2]) == [3, 2]
  split = split._replace(protocol='answers', answers=[['c'], ['e'], ['h']])
  found = metrics.first_relevant(rows, split, list('abcdefgh'), [2, 1, 0])
  assert found == [3, 2, 2]
