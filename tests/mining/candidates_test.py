"""Candidates have the scores of their own query, exact ones of embeddings."""

from types import SimpleNamespace

import numpy as np
import pytest

from ance_jax.core import devices
from ance_jax.data import corpus as corpus_lib
from ance_jax.mining import candidates
from ance_jax.retrieval import corpus_index


def test_a_second_run_file_scores_pairs_of_any_queries(tmp_path):
  texts = list('wxyz')
  corpus = corpus_lib.make_corpus(list('abcd'), [''] * 4, list('abcd'))
  split = corpus_lib.make_split(
    corpus_lib.RawSplit(texts, texts, {(query, 0): 1 for query in range(4)})
  )
  (tmp_path / 'run').write_text(
    'z Q0 c 1 9.5 t\nz Q0 b 2 8.5 t\nx Q0 c 1 0.5 t\nx Q0 a 2 0.25 t\n'
  )
  score = candidates.reranker(corpus, split, score_run=str(tmp_path / 'run'))
  # Query 2 is not in the file, and 0 is not asked about.
  found = score(np.array([1, 1, 2, 3, 3, 1]), np.array([0, 2, 2, 2, 0, 1]))
  nan = np.nan
  np.testing.assert_array_equal(found, [0.25, 0.5, nan, 9.5, nan, nan])


@pytest.mark.parametrize('are_patterns', [False, True])
def test_a_passage_holds_an_answer_of_its_own_query(are_patterns):
  corpus = corpus_lib.make_corpus(list('abc'), [''] * 3, ['one', 'two', 'six'])
  split = SimpleNamespace(
    answers=[['one'], ['t.o'], ['six', 'one']],
    answers_are_patterns=are_patterns,
  )
  holds = candidates.answer_matcher(corpus, split)
  rows = np.array([[2, -1, 0], [-1, -1, -1], [1, 0, 2]])
  found = holds(np.array([2, 0, 1]), rows)
  expected = [[True, False, True], [False] * 3, [are_patterns, False, False]]
  assert found.tolist() == expected


def test_scores_that_come_with_the_data_are_found_for_each_of_its_pairs():
  split = SimpleNamespace(
    given=corpus_lib.Given(
      np.array([0, 0, 1]), np.array([3, 1, 4]), np.array([0.3, 0.1, 1.4])
    ),
    offsets=np.array([0, 1, 3]),
    passages=np.array([2, 0, 5]),
    scores=np.array([0.2, 1.0, 1.5]),
  )
  score = candidates.reranker(None, split)
  queries, passages = np.divmod(np.arange(14), 7)
  nan = np.nan
  expected = [nan, 0.1, 0.2, 0.3, nan, nan, nan]
  expected += [1.0, nan, nan, nan, 1.4, 1.5, nan]
  np.testing.assert_array_equal(score(queries, passages), expected)


@pytest.mark.parametrize('raw', [False, True])
def test_a_cross_encoder_scores_texts_raw_where_it_is_asked_to(
  raw, monkeypatch
):
  asked = {}

  def load(folder, **settings):
    asked.update(settings, folder=folder)
    return lambda pairs: np.array([len(a) + len(b) / 8 for a, b in pairs])

  monkeypatch.setattr(candidates.rerank, 'load', load)
  corpus = corpus_lib.make_corpus(['a', 'b'], ['', 'ti'], ['xyz', 'text'])
  split = SimpleNamespace(texts=['q', 'query'])
  score = candidates.reranker(
    corpus, split, cross_encoder='folder', dtype='bfloat16', raw=raw
  )
  found = score(np.array([1, 0]), np.array([0, 1]))
  assert found.tolist() == [5 + 3 / 8, 1 + 7 / 8]
  assert asked['raw'] == raw
  assert (asked['folder'], asked['dtype']) == ('folder', 'bfloat16')


@pytest.mark.parametrize('center', [False, True])
@pytest.mark.parametrize('factory', ['Flat', 'SQ8', corpus_index.ON_DEVICES])
def test_candidates_have_the_scores_of_the_embeddings_whatever_the_index(
  factory, center
):
  random = np.random.default_rng(0)
  rows = random.normal(3, 1, size=(90, 8)).astype(np.float32)
  queries = random.normal(size=(5, 8)).astype(np.float32)
  settings = corpus_index.Settings(factory, center=center)
  passages = SimpleNamespace(texts_of_pieces=lambda: None)
  indexed = corpus_index._indexed(
    [rows[:40], rows[40:]], settings, devices.local(1), passages
  )
  source = candidates.of_index(indexed, queries, 'the index', first=3)
  found = source.rank(np.arange(3, 8), 6)
  expected = np.take_along_axis(queries @ rows.T, found.rows, 1)
  np.testing.assert_allclose(found.scores, expected, atol=1e-4)


def test_of_a_list_are_ranked_as_many_as_are_asked_for():
  lists = [[], [4, 7], [], [0, 1, 3]]
  source = candidates.of_lists(lambda row: np.array(lists[row]), 'the lists')
  rows = source.rank(np.array([3, 1, 0]), 2).rows
  assert rows.tolist() == [[0, 1], [4, 7], [-1, -1]]
