"""FAISS against plain numpy: the same rows, the same order, ties included."""

import faiss
import numpy as np
import pytest

from ance_jax import errors
from ance_jax.core import devices
from ance_jax.retrieval import index


def integers(rows, width=4, high=3, seed=0):
  """Embeddings of small integers: exact scores, and many ties."""
  random = np.random.default_rng(seed)
  return random.integers(-high, high, (rows, width)).astype(np.float32)


def slow_top_k(queries, passages, k):
  """The k best by falling score and rising row."""
  scores = queries @ passages.T
  rows = np.array([np.lexsort((np.arange(len(s)), -s))[:k] for s in scores])
  return rows, np.take_along_axis(scores, rows, 1)


@pytest.mark.parametrize('k', [1, 7, 100, 300])
def test_flat_index_ranks_like_numpy_with_ties_in_row_order(k):
  passages, queries = integers(300), integers(40, seed=1)
  built = index.build('Flat', '', np.array_split(passages, 3))
  ranking = index.search(built, queries, k)
  rows, scores = slow_top_k(queries, passages, k)
  np.testing.assert_array_equal(ranking.rows, rows)
  np.testing.assert_array_equal(ranking.scores, scores)
  assert ranking.rows.dtype == np.int32


def test_a_tie_wider_than_the_first_look_is_resolved():
  passages = np.ones((500, 2), np.float32)
  passages[450:] = 2
  built = index.build('Flat', '', [passages])
  ranking = index.search(built, np.ones((3, 2), np.float32), 60)
  expected = [*range(450, 500), *range(10)]
  np.testing.assert_array_equal(ranking.rows, [expected] * 3)


def test_search_in_several_batches_is_that_of_one(monkeypatch):
  passages, queries = integers(50), integers(20, seed=1)
  built = index.build('Flat', '', [passages])
  whole = index.search(built, queries, 5)
  monkeypatch.setattr(index, '_QUERIES_AT_ONCE', 6)
  parts = index.search(built, queries, 5, 'search')
  np.testing.assert_array_equal(whole.rows, parts.rows)


def test_an_inverted_file_that_finds_too_little_says_so_with_minus_one():
  passages = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
  built = index.build('IVF16,Flat', 'nprobe=1', [passages])
  ranking = index.search(built, passages[:10], 200)
  missing = ranking.rows < 0
  assert missing.any(axis=1).all()
  assert (ranking.scores[missing] == -np.inf).all()
  assert (np.diff(missing.astype(int), axis=1) >= 0).all()


def test_search_parameters_reach_the_index():
  passages = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
  built = index.build('IVF16,Flat', 'nprobe=16', [passages])
  rows, _ = slow_top_k(passages[:10], passages, 5)
  np.testing.assert_array_equal(
    index.search(built, passages[:10], 5).rows, rows
  )


@pytest.mark.parametrize(
  ('factory', 'params', 'expected'),
  [
    ('PQ7', '', 'multiple of the number of subquantizers'),
    ('PQ4', '', 'PQ4 is trained on 256 vectors at least, and there are 150'),
    ('IVF8,PQ4x12', '', '4,096 vectors at least'),
    ('OPQ4,Flat', '', '256 vectors at least'),
    ('RQ4x8', '', '256 vectors at least'),
    ('RQ1x10_4x6', '', '1,024 vectors at least'),
    ('Flat,Refine(PQ4x8)', '', '256 vectors at least'),
    ('HNSW8_PQ4', '', '256 vectors at least'),
    ('IDMap,Flat', '', 'leave out IDMap'),
    ('IVF8,Flat,IDMap2', '', 'leave out IDMap'),
    ('IVF0,Flat', '', '0 lists for 150 passages; use from 1 to 150'),
    ('IVF151,Flat', '', '151 lists for 150'),
    ('HNSW1', '', 'fewer than 2 links'),  # FAISS would end the process.
    ('IVF8_HNSW0,Flat', '', 'fewer than 2 links'),
    ('NSG8', '', 'choose HNSW32'),
    ('PCA17,Flat', '', "17 dimensions of the embeddings' 16"),
    ('BFlat', '', '--index=BFlat .*could not parse index string BFlat'),
    ('IVF8,Flat', 'x', "--index_params='x'"),
    ('IVF8,Flat', 'nprobe=0', 'is not above 0'),
    ('IVF8,Flat', 'nprobe=3,max_codes=-1', 'is not above 0'),
    ('IVF8,Flat', 'efSearch=3', 'could not set parameter'),
  ],
)
def test_what_an_index_cannot_do_is_said_before_there_are_vectors(
  factory, params, expected
):
  with pytest.raises(errors.BadInput, match=expected):
    index.check(factory, params, 16, 150, rows_per_block=100)


@pytest.mark.parametrize(
  ('factory', 'params'),
  [
    ('Flat', ''),
    ('IVF150,Flat', 'nprobe=150'),
    ('IVF8_HNSW4,PQ4x4', 'nprobe=8'),
    ('PQ4x7', ''),
    ('LSQ1x8', ''),
    ('HNSW2', 'efSearch=1'),
    ('PCA16,SQ8', ''),
    ('PQ4x4,RFlat', ''),
    ('NSG8', ''),
  ],
)
def test_an_index_that_is_let_pass_can_be_built_and_searched(factory, params):
  passages = np.random.default_rng(0).normal(size=(150, 16)).astype(np.float32)
  index.check(factory, params, 16, 150, rows_per_block=150)
  built = index.build(factory, params, [passages])
  assert index.search(built, passages[:9], 5).rows.shape == (9, 5)


def test_an_index_that_cannot_be_trained_on_so_little_is_refused():
  with pytest.raises(errors.BadInput, match='train --index=PQ2 on 100 vectors'):
    index.build('PQ2', '', [integers(100)])


def test_training_takes_no_more_vectors_than_it_may(monkeypatch):
  monkeypatch.setattr(index, '_TRAINING_VECTORS', 64)
  taken = []
  real = faiss.IndexIVFFlat.train

  def train(self, vectors):
    taken.append(len(vectors))
    return real(self, vectors)

  monkeypatch.setattr(faiss.IndexIVFFlat, 'train', train)
  index.build('IVF1,Flat', '', np.array_split(integers(640), 2))
  assert taken == [64]


def test_lists_are_trained_on_a_sample_and_are_no_more_than_that(monkeypatch):
  monkeypatch.setattr(index, '_TRAINING_VECTORS', 64)
  index.check('IVF64,Flat', '', 16, 640)
  # Each vector, where every second one would be too few.
  index.check('IVF127,Flat', '', 16, 127)
  with pytest.raises(errors.BadInput, match='on 65 vectors .* there are 64'):
    index.check('IVF65,Flat', '', 16, 640)


@pytest.mark.parametrize(
  ('factory', 'least'), [('NSG8', 101), ('PQ4', 256), ('OPQ4,Flat', 256)]
)
def test_as_few_vectors_as_an_index_can_take_are_let_pass(factory, least):
  index.check(factory, '', 16, least)
  with pytest.raises(errors.BadInput, match=f'--index={factory} .*{least}'):
    index.check(factory, '', 16, least - 1)


def cone(rows, random, width=768):
  """Embeddings like ANCE's: cosine .97 between any two, scores around 745."""
  base = np.random.default_rng(0).normal(size=width)
  content = np.random.default_rng(1).normal(size=(64, width)) / 8
  x = base + 0.18 * (random.normal(size=(rows, 64)) @ content)
  x -= x.mean(1, keepdims=True)
  return (x / x.std(1, keepdims=True)).astype(np.float32)


def test_low_precision_keeps_the_top_200_of_a_narrow_cone_if_centered():
  random = np.random.default_rng(2)
  passages, queries = cone(5000, random), cone(16, random)
  exact = queries.astype(float) @ passages.T.astype(float)
  assert 730 < exact.mean() < 760
  assert exact.std(1).mean() < 6
  best = np.argsort(-exact, 1)[:, :200]

  def overlap(rows):
    pairs = zip(rows.tolist(), best.tolist(), strict=True)
    return np.mean([len(set(a) & set(b)) / 200 for a, b in pairs])

  kept, blocks = {}, np.array_split(passages, 3)
  for center in (False, True):
    for factory in ('Flat', 'SQfp16', 'SQbf16', 'SQ8'):
      built = index.build(factory, '', blocks, center=center)
      kept[factory, center] = overlap(index.search(built, queries, 200).rows)
  assert min(kept['Flat', False], kept['Flat', True]) > 0.995
  # Its range is that of the vectors it is trained on.
  assert kept['SQ8', True] > 0.9
  for factory in ('SQfp16', 'SQbf16'):
    assert kept[factory, True] > max(kept[factory, False], 0.95)


def test_centered_scores_are_less_by_one_number_a_query():
  passages, queries = integers(300, width=8) + 5, integers(9, width=8, seed=1)
  blocks = np.array_split(passages, 2)
  plain = index.search(index.build('Flat', '', blocks), queries, 20)
  centered = index.search(
    index.build('Flat', '', blocks, center=True), queries, 20
  )
  less = queries @ passages.mean(0)
  # Ties are broken by rounding once the mean is taken off.
  np.testing.assert_allclose(
    centered.scores + less[:, None], plain.scores, rtol=0, atol=1e-4
  )


@pytest.mark.parametrize(
  ('seed', 'on_devices'), [(0, False), (1, False), (2, True)]
)
def test_texts_are_ranked_by_their_best_piece_and_cut_behind_k_of_them(
  seed, on_devices
):
  random = np.random.default_rng(seed)
  numbers = random.integers(1, 5, 40)
  texts_of = np.repeat(np.arange(40, dtype=np.int32), numbers)
  # Few values, so that pieces of one text and of others tie.
  pieces = random.integers(-2, 3, (len(texts_of), 4)).astype(np.float32)
  queries = random.integers(-2, 3, (9, 4)).astype(np.float32)
  built = (
    index.place([pieces], devices.local(2), 1)
    if on_devices
    else index.build('Flat', '', [pieces])
  )
  found = index.search_pieces(built, texts_of, queries, 7)
  scores = queries @ pieces.T
  for query in range(9):
    best = {text: scores[query, texts_of == text].max() for text in range(40)}
    first = {
      text: np.nonzero((texts_of == text) & (scores[query] == best[text]))[0][0]
      for text in best
    }
    expected = sorted(best, key=lambda t: (-best[t], first[t]))[:7]
    assert found.rows[query].tolist() == expected
    assert found.scores[query].tolist() == [best[t] for t in expected]


def test_texts_that_an_inverted_file_does_not_reach_are_left_out():
  texts_of = np.array([0, 0, 1, 2], np.int32)

  class Found:
    ntotal = 4

    def search(self, queries, k):
      scores = np.full((len(queries), k), -np.inf, np.float32)
      rows = np.full((len(queries), k), -1)
      scores[:, :3], rows[:, :3] = [3, 2, 1], [1, 0, 3]
      return scores, rows

  found = index.search_pieces(Found(), texts_of, np.zeros((1, 2)), 3)
  assert found.rows.tolist() == [[0, 2, -1]]
  assert found.scores.tolist() == [[3, 1, -np.inf]]


@pytest.mark.parametrize('pieces', [False, True])
def test_exact_scores_are_of_the_embeddings_whatever_the_index(
  pieces, monkeypatch
):
  monkeypatch.setattr(index, '_PAIRS_AT_ONCE', 7)
  random = np.random.default_rng(3)
  blocks = [random.normal(size=(n, 6)).astype(np.float32) for n in (5, 1, 8)]
  texts_of = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 6, 6, 7], np.int32)
  queries = random.normal(size=(4, 6)).astype(np.float32)
  rows = random.integers(-1, 8, size=(4, 9)).astype(np.int32)
  scores = index.exact_scores(
    blocks, queries, rows, texts_of if pieces else None
  )
  dots = queries.astype(np.float64) @ np.concatenate(blocks).T
  for query, row in np.ndindex(rows.shape):
    passage = rows[query, row]
    own = dots[query][texts_of == passage] if pieces else dots[query, [passage]]
    expected = own.max() if passage >= 0 else -np.inf
    np.testing.assert_allclose(scores[query, row], expected, rtol=1e-5)
