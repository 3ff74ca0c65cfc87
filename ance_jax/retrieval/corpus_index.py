"""Encodes, indexes, searches and scores a corpus; ranks it by BM25."""

import hashlib
import json
from typing import NamedTuple

import numpy as np

from ance_jax import config as config_lib
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import workdirs
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import load
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.data import trec
from ance_jax.retrieval import bm25 as bm25_lib
from ance_jax.retrieval import device_index
from ance_jax.retrieval import encoding
from ance_jax.retrieval import index
from ance_jax.retrieval import metrics

# Dev queries whose results are kept at each evaluation, and results of each.
_NUM_EXAMPLES, _EXAMPLE_RESULTS = 3, 3
# Jobs that build no index.
_WITHOUT_INDEX = ('encode', 'prepare', 'inspect')


class IndexedCorpus(NamedTuple):
  """The corpus, encoded and indexed with one set of parameters.

  Attributes:
    passage_index: `index.Index` of passage rows, or those of their pieces.
    weights_hash: Hash of the parameters.
    real_tokens: Share of real tokens in what was computed; None if the
      embeddings were there.
    texts_of: (R,) int32, the passage row of each piece; None without pieces.
    blocks: Embeddings as `encoding.encode_corpus` returns them.
    exact: Whether a search gives the scores of the embeddings themselves.
  """

  passage_index: index.Index
  weights_hash: str
  real_tokens: float | None
  texts_of: np.ndarray | None
  blocks: list[np.ndarray]
  exact: bool = False

  def search(self, queries, k, what=None):
    """Returns the `trec.Ranking` of passages; see `index.search`."""
    if self.texts_of is None:
      return index.search(self.passage_index, queries, k, what)
    return index.search_pieces(
      self.passage_index, self.texts_of, queries, k, what
    )

  def rank(self, queries: np.ndarray, k: int) -> trec.Ranking:
    """Returns `search` with the scores of the embeddings, not an index's."""
    found = self.search(queries, k)
    if self.exact:
      return found
    return found._replace(scores=self.scores(queries, found.rows))

  def search_flops(self, num_queries):
    """Returns the operations of a search; 0 where nobody counts them."""
    width = self.blocks[0].shape[1]
    return num_queries * index.flops(self.passage_index, width)

  def scores(self, queries, rows):
    """Returns (q, K) float32 scores of passages; see `index.exact_scores`."""
    return index.exact_scores(self.blocks, queries, rows, self.texts_of)


def check_index(config, width, num_vectors=None):
  """Raises `BadInput` if a job could not build `--index` once it has encoded.

  Args:
    config: `Config`.
    width: E, of the embeddings.
    num_vectors: N, passages or their pieces, at most; None: not known yet.
  """
  if config.job in _WITHOUT_INDEX:
    return
  if config.index != config_lib.ON_DEVICES:
    if num_vectors is None:
      index.make(config.index, config.index_params, width)
    else:
      index.check(
        config.index,
        config.index_params,
        width,
        num_vectors,
        config.rows_per_block,
      )
  elif num_vectors is not None:
    num_devices = len(devices_lib.training_devices(config)[0])
    device_index.plan(num_vectors, width, num_devices, config.search_memory_mb)


def index_corpus(run, params, watch):
  """Returns the `IndexedCorpus` of parameters that lie on all devices.

  The embeddings are kept in the run's folder, under a hash of all that their
  bits depend on.

  Args:
    run: `experiment.Run`.
    params: Parameters by tower.
    watch: `logs.Stopwatch`, for the phases 'encode' and 'index', and the work.
  """
  # Where passages are cut only now is it known how many pieces there are.
  check_index(
    run.config, run.retriever.embedding_size, len(run.passages.pieces())
  )
  weights_hash = checkpoint.weights_hash(params)
  folder = embeddings_folder(run, weights_hash)
  with atomic.in_use(folder):
    with watch.phase('encode'):
      blocks, real_tokens = encode_corpus(run, params, folder)
    with watch.phase('index'):
      passage_index = _index(run, blocks)
  lengths = run.passages.pieces().lengths()
  _count_encoding(
    run, run.passage_encoder, lengths, watch, run.config.rows_per_block
  )
  return IndexedCorpus(
    passage_index,
    weights_hash,
    real_tokens,
    run.passages.texts_of_pieces(),
    blocks,
    index.is_exact(passage_index) and not run.config.center_passages,
  )


def encode_corpus(run, params, folder):
  """Returns the embeddings of the corpus as `encoding.encode_corpus` does."""
  return encoding.encode_corpus(
    run.passage_encoder,
    params,
    run.passages.pieces(),
    folder,
    rows_per_block=run.config.rows_per_block,
  )


def embeddings_folder(run, weights_hash):
  """Returns the folder of a run's embeddings with parameters of this hash."""
  devices = devices_lib.own(run.devices)
  about = [
    weights_hash,
    run.passages.hash,
    # Without a run, --init_from may be read with other pooling.
    run.retriever.to_dict(),
    run.config.dtype,
    run.config.refresh == 'async',  # See `experiment._encoders`.
    run.config.rows_per_block,
    run.config.tokens_per_batch,
    len(devices),
    devices[0].device_kind,
  ]
  key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
  return run.workdir / 'embeddings' / key


def prune_embeddings(run, weights_hash):
  """Removes the embeddings of all weights but those of this hash.

  Those that another job makes or reads at this moment stay, too.
  """
  kept = embeddings_folder(run, weights_hash)
  for folder in kept.parent.glob('*'):
    if folder != kept:
      atomic.remove_unused(folder)


def encode_queries(run, params, split_name, watch, rows=None):
  """Returns the (q, E) float32 embeddings of a split's queries.

  Those of all, or of the (q,) int query rows that are given. Each process of a
  run encodes its part of them.
  """
  queries = run.queries[split_name]
  rows = np.arange(len(queries)) if rows is None else rows
  size = -(-len(rows) // distributed.count())
  first = distributed.index() * size
  with watch.phase('encode'):
    embeddings, _ = encoding.encode_rows(
      run.query_encoder,
      params,
      queries,
      f'encode {split_name} queries',
      rows[first : first + size],
    )
    # All send as much.
    part = np.zeros((size, embeddings.shape[1]), np.float32)
    part[: len(embeddings)] = embeddings
    parts = distributed.gather(part)
  _count_encoding(run, run.query_encoder, queries.lengths()[rows], watch)
  return parts.reshape(-1, embeddings.shape[1])[: len(rows)]


def evaluate(run, params, indexed, split_name, watch):
  """Returns {measure: value} of a split, and the `trec.Ranking` of it."""
  queries = encode_queries(run, params, split_name, watch)
  watch.work('evaluate', indexed.search_flops(len(queries)))
  with watch.phase('evaluate'):
    split = run.splits[split_name]
    depth = metrics.depth(split, len(run.passages))
    ranking = indexed.search(queries, depth, f'search {split_name}')
    ranking = metrics.without_own(ranking, split)
    return metrics.score(ranking.rows, split, run.corpus.texts), ranking


def examples(run, ranking, split_name):
  """Returns what the index found for a few queries, the same at each call.

  Returns:
    A list of dicts: 'query', 'place' of the first relevant passage (None
    beyond the ranking), and 'results', the first passages' names.
  """
  split = run.splits[split_name]
  random = np.random.default_rng(run.config.seed)
  size = min(_NUM_EXAMPLES, len(split.ids))
  found = []
  for query in random.choice(len(split.ids), size, replace=False):
    judged = slice(*split.offsets[query : query + 2])
    relevant = split.passages[judged][split.grades[judged] > 0]
    (places,) = np.nonzero(np.isin(ranking.rows[query], relevant))
    found.append(
      {
        'query': split.texts[int(query)],
        'place': int(places[0]) + 1 if len(places) else None,
        'results': [
          passage_name(run.corpus, int(row))
          for row in ranking.rows[query, :_EXAMPLE_RESULTS]
          if row >= 0
        ],
      }
    )
  return found


def passage_name(corpus, row):
  """Returns the title of a passage, or where it has none how it begins."""
  return corpus_lib.whole_title(corpus, row) or corpus.texts[row][:60]


def write_ids(path, run):
  """Writes a passage id a line, as rows of embeddings are: each piece has one.

  Args:
    path: `pathlib.Path` of the file.
    run: `experiment.Run`.
  """
  rows = run.passages.texts_of_pieces()
  rows = range(len(run.corpus.ids)) if rows is None else rows.tolist()
  with atomic.writing(path) as file:
    file.writelines(f'{run.corpus.ids[row]}\n'.encode() for row in rows)


def embedding_files(run, params):
  """Returns the paths of the .npy files that `index_corpus` left, in order."""
  folder = embeddings_folder(run, checkpoint.weights_hash(params))
  return sorted(folder.glob('[0-9]*/embeddings.npy'))


def bm25(config, split_names):
  """Returns BM25's rank, as `bm25.make_rank` does, the corpus and splits."""
  workdirs.require(config)
  corpus, splits = load.load(config, split_names)
  texts = list(tokens.passage_texts(corpus, tokenizer_lib.SPACE))
  rank = bm25_lib.make_rank(
    texts,
    k1=config.bm25_k1,
    b=config.bm25_b,
    language=config.bm25_language,
    queries=[text for split in splits.values() for text in split.texts],
  )
  return rank, corpus, splits


def _index(run, blocks):
  """Returns the `index.Index` of all blocks, of which each process has some."""
  config = run.config
  own = blocks[distributed.index() :: distributed.count()]
  if config.index == config_lib.ON_DEVICES:
    made = index.place(
      own,
      devices_lib.own(run.devices),
      config.search_memory_mb,
      center=config.center_passages,
    )
  else:
    made = index.build(
      config.index, config.index_params, own, center=config.center_passages
    )
  return index.shared(made, blocks) if distributed.count() > 1 else made


def _count_encoding(run, encoder, lengths, watch, rows_per_block=None):
  work = encoding.flops(encoder, run.retriever.body, lengths, rows_per_block)
  watch.work('encode', work)
