"""Where `--job=mine` has candidates from, and who judges them.

A model, BM25 or a run file; a cross-encoder or a run file.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ance_jax.core import logs
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import trec
from ance_jax.mining import filters
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import rerank


class Source(NamedTuple):
  """Where candidates and their scores come from.

  Attributes:
    name: For people.
    rank: rank((q,) query rows, depth) -> `trec.Ranking`, as wide as it
      likes.
    score: score((P,) query rows, (P,) passage rows) -> (P,) float32; None where
      only what is ranked has a score.
  """

  name: str
  rank: Callable
  score: Callable | None


def judge(config, corpus, split):
  """Returns judge((P,) query rows, rising, (P,) passage rows) -> (P,) scores.

  NaN where it has none. None where no judge is asked for.
  """
  if config.judge_run:
    ranked = trec.read_run(config.judge_run, query_rows(split), corpus.rows)

    def of_file(of_query, passages):
      queries, places = np.unique(of_query, return_inverse=True)
      return filters.looked_up(ranked.block(queries), places, passages, np.nan)

    return of_file
  if not config.judge:
    return None
  score = rerank.load(config)

  def of_texts(of_query, passages):
    pairs = zip(of_query.tolist(), passages.tolist(), strict=True)
    return score(
      (split.texts[query], corpus_lib.whole_text(corpus, passage))
      for query, passage in pairs
    )

  return of_texts


def query_rows(split):
  """Returns {query id: row} of a split."""
  return {split.ids[row]: row for row in range(len(split.ids))}


def of_run_file(path, corpus, split):
  """Returns the `Source` of a TREC run file of the training queries."""
  ranked = trec.read_run(path, query_rows(split), corpus.rows)
  if without := int((np.diff(ranked.offsets) == 0).sum()):
    logs.say(f'{path}: {without:,} training queries are not in it')
  return Source(path, lambda rows, _: ranked.block(rows), None)


def of_bm25(rank, split):
  """Returns the `Source` of a rank of `corpus_index.bm25`."""

  def find(rows, depth):
    return rank([split.texts[row] for row in rows.tolist()], depth, None)

  return Source('BM25', find, None)


def of_model(run, params, step):
  """Returns the `Source` of a model: its parameters, at a step of its run."""
  watch = logs.Stopwatch()
  indexed = corpus_index.index_corpus(run, params, watch)
  name = run.config.train_split
  queries = corpus_index.encode_queries(run, params, name, watch)

  def rank(rows, depth):
    found = indexed.search(queries[rows], depth).rows
    return trec.Ranking(found, indexed.scores(queries[rows], found))

  def score(rows, passages):
    return indexed.scores(queries[rows], passages[:, None])[:, 0]

  return Source(f'the model at step {step}', rank, score)
