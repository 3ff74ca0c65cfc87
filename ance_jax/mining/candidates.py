"""Sources of candidates, second scorers, and the answer matcher.

An index, BM25, a run file or lists of passages rank the candidates; a
cross-encoder or another run file may rescore them.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from ance_jax.core import logs
from ance_jax.data import answers
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import trec
from ance_jax.mining import filters
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import rerank


class CandidateSource(NamedTuple):
  """Ranks candidates and scores pairs.

  Attributes:
    name: Name for log lines.
    rank: rank((q,) query rows, depth) -> `trec.Ranking` of any width.
    score: score((P,) query rows, (P,) passage rows) -> (P,) float32; None if
      only ranked passages have scores.
  """

  name: str
  rank: Callable[[np.ndarray, int], trec.Ranking]
  score: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


def of_index(
  indexed: corpus_index.IndexedCorpus,
  queries: np.ndarray,
  name: str,
  first: int = 0,
) -> CandidateSource:
  """Returns a source that searches an index and scores by embeddings.

  Args:
    indexed: The corpus.
    queries: (q, E) float32 embeddings of consecutive queries.
    name: Name for log lines.
    first: Row of the first query.
  """

  def rank(rows, depth):
    return indexed.rank(queries[rows - first], depth)

  def score(rows, passages):
    return indexed.scores(queries[rows - first], passages[:, None])[:, 0]

  return CandidateSource(name, rank, score)


def of_bm25(rank: Callable, split: corpus_lib.Split) -> CandidateSource:
  """Returns a source that ranks by BM25.

  Args:
    rank: Made by `bm25.make_rank`.
    split: Split of the queries.
  """

  def find(rows, depth):
    return rank([split.texts[row] for row in rows.tolist()], depth, None)

  return CandidateSource('BM25', find)


def of_run_file(
  path: str, corpus: corpus_lib.Corpus, split: corpus_lib.Split
) -> CandidateSource:
  """Returns a source that reads a TREC run file of the training queries."""
  ranked = _read_run(path, corpus, split)
  if without := int((np.diff(ranked.offsets) == 0).sum()):
    logs.log(f'{path}: {without:,} training queries are not in it')
  return CandidateSource(path, lambda rows, _: ranked.block(rows))


def of_lists(
  passages_of: Callable[[int], np.ndarray], name: str
) -> CandidateSource:
  """Returns a source of unscored lists, passages_of(query row) -> rows."""

  def rank(rows, depth):
    found = np.full((len(rows), depth), -1, np.int32)
    for place, row in enumerate(rows.tolist()):
      given = passages_of(row)[:depth]
      found[place, : len(given)] = given
    return trec.Ranking(found, np.full(found.shape, np.nan, np.float32))

  return CandidateSource(name, rank)


def reranker(
  corpus: corpus_lib.Corpus,
  split: corpus_lib.Split,
  *,
  score_run: str = '',
  cross_encoder: str = '',
  devices: Sequence[jax.Device] = (),
  dtype: str = 'float32',
  tokens_per_batch: int = 0,
  raw: bool = False,
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  """Returns a `miner.Task.rerank` of a TREC run file or a cross-encoder.

  With neither, the scores are those that the data gives to the split's pairs.

  Args:
    corpus: The corpus.
    split: The training queries.
    score_run: Path of the run file, or ''.
    cross_encoder: As for `rerank.load`.
    devices: As for `rerank.load`.
    dtype: As for `rerank.load`.
    tokens_per_batch: As for `rerank.load`.
    raw: As for `rerank.load`.
  """
  if not (score_run or cross_encoder):
    return _by_data(split)
  if score_run:
    ranked = _read_run(score_run, corpus, split)

    def by_file(of_query, passages):
      queries, places = np.unique(of_query, return_inverse=True)
      block = ranked.block(queries)
      return filters.lookup_scores(block, places, passages, np.nan)

    return by_file
  score = rerank.load(
    cross_encoder,
    devices=devices,
    dtype=dtype,
    tokens_per_batch=tokens_per_batch,
    raw=raw,
  )

  def by_texts(of_query, passages):
    pairs = zip(of_query.tolist(), passages.tolist(), strict=True)
    return score(
      (split.texts[query], corpus_lib.whole_text(corpus, passage))
      for query, passage in pairs
    )

  return by_texts


def _by_data(split):
  """Returns a `miner.Task.rerank` of the scores that come with a split."""
  given, judged = split.given, np.diff(split.offsets)
  queries = np.concatenate(
    [given.queries, np.arange(len(judged)).repeat(judged)]
  )
  keys = (queries.astype(np.int64) << 32) + np.concatenate(
    [given.passages, split.passages]
  )
  keys, first = np.unique(keys, return_index=True)
  scores = np.concatenate([given.scores, split.scores])[first]

  def by_data(of_query, passages):
    wanted = (of_query.astype(np.int64) << 32) + passages
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, scores[places], np.nan)

  return by_data


def answer_matcher(
  corpus: corpus_lib.Corpus, split: corpus_lib.Split
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  """Returns a `miner.Task.holds_answer` that applies DPR's rule."""
  match = answers.matcher(
    split.answers, corpus.texts, split.answers_are_patterns
  )

  def holds_answer(queries, rows):
    found, there = np.zeros(rows.shape, bool), rows >= 0
    for place in np.flatnonzero(there.any(1)).tolist():
      asked = rows[place, there[place]].tolist()
      found[place, there[place]] = match(int(queries[place]), asked)
    return found

  return holds_answer


def _read_run(path, corpus, split):
  query_rows = {split.ids[row]: row for row in range(len(split.ids))}
  return trec.read_run(path, query_rows, corpus.rows)
