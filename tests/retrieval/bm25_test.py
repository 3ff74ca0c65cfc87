"""BM25 against its formula, written out."""

import numpy as np
import pytest
import words_test

from ance_jax.retrieval import bm25

TEXTS = [
  'cats sleep',
  'a cat and a dog run and run',
  'dogs bark at cats while birds sing songs',
  'nothing of that kind here',
  'cats sleep',
]
# The same after stemming, without stop words.
WORDS = [
  'cat sleep',
  'cat dog run run',
  'dog bark cat while bird sing song',
  'noth kind here',
  'cat sleep',
]


@pytest.mark.parametrize(('k1', 'b'), [(0.9, 0.4), (1.2, 0.75)])
def test_scores_are_those_of_lucenes_bm25(k1, b):
  ranking = bm25.make_rank(TEXTS, k1=k1, b=b)(['running cats', 'birds'], 5)
  for query, place in ((['run', 'cat'], 0), (['bird'], 1)):
    documents = [words.split() for words in WORDS]
    expected = words_test.plain_bm25(query, documents, k1, b)
    order = np.lexsort((range(5), -np.array(expected)))
    found = ranking.rows[place]
    hits = [row for row in order.tolist() if expected[row] > 0]
    assert found[found >= 0].tolist() == hits
    np.testing.assert_allclose(
      ranking.scores[place][: len(hits)], np.array(expected)[hits], rtol=1e-5
    )


def test_passages_without_a_word_of_the_query_are_not_found():
  rank = bm25.make_rank(TEXTS, k1=0.9, b=0.4)
  assert rank(['zebra', ''], 3).rows.tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize('at_once', [1, 2, 256])
def test_equal_passages_are_ranked_by_row(at_once, monkeypatch):
  monkeypatch.setattr(bm25, '_QUERIES_AT_ONCE', at_once)
  rank = bm25.make_rank(TEXTS, k1=0.9, b=0.4)
  for k in (1, 2):
    rows = rank(['birds', 'dog run', 'sleeping cat'], k).rows
    assert rows[:, 0].tolist() == [2, 1, 0]
    assert rows[2].tolist() == [0, 4][:k]
