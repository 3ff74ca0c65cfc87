"""Encodes, indexes, searches and scores a corpus; ranks it by BM25."""

import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np

from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import tokenized
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.data import trec
from ance_jax.retrieval import bm25 as bm25_lib
from ance_jax.retrieval import device_index
from ance_jax.retrieval import encoding
from ance_jax.retrieval import index
from ance_jax.retrieval import metrics
from ance_jax.retrieval import retriever as retriever_lib

# Dev queries whose results are kept at each evaluation, and results of each.
_NUM_EXAMPLES, _EXAMPLE_RESULTS = 3, 3
# The factory string that is no FAISS index.
ON_DEVICES = 'device'


class Settings(NamedTuple):
  """How an index is built.

  Attributes:
    factory: FAISS factory string, or `ON_DEVICES`.
    params: Search parameters as FAISS's ParameterSpace reads them, or ''.
    center: Whether the mean of all embeddings is taken from each first.
    rows_per_block: Embeddings of a block: the unit in which they are encoded
      and added.
    memory_mb: MiB of each device that `ON_DEVICES` may take.
  """

  factory: str = 'Flat'
  params: str = ''
  center: bool = False
  rows_per_block: int = 65_536
  memory_mb: int = 4096


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


def check_index(
  settings: Settings,
  width: int,
  num_devices: int,
  num_vectors: int | None = None,
):
  """Raises `BadInput` if an index could not be built of embeddings.

  Args:
    settings: How it would be built.
    width: E, of the embeddings.
    num_devices: Accelerators used.
    num_vectors: N, passages or their pieces, at most; None: not known yet.
  """
  if settings.factory != ON_DEVICES:
    if num_vectors is None:
      index.make(settings.factory, settings.params, width)
    else:
      index.check(
        settings.factory,
        settings.params,
        width,
        num_vectors,
        settings.rows_per_block,
      )
  elif num_vectors is not None:
    device_index.plan(num_vectors, width, num_devices, settings.memory_mb)


def index_corpus(
  retriever: retriever_lib.Retriever,
  passages: tokens.TokenRows,
  settings: Settings,
  folder: pathlib.Path,
  watch: logs.Stopwatch,
) -> IndexedCorpus:
  """Returns the `IndexedCorpus` of a retriever's parameters.

  Args:
    retriever: It encodes the passages.
    passages: Token rows of the corpus.
    settings: How the index is built.
    folder: Embeddings are kept in it, under a hash of all that their bits
      depend on.
    watch: For the phases 'encode' and 'index', and the work.
  """
  pieces, encoder = passages.pieces(), retriever.passage_encoder
  # Where passages are cut only now is it known how many pieces there are.
  check_index(
    settings, encoder.embedding_size, len(retriever.devices), len(pieces)
  )
  weights_hash = checkpoint.weights_hash(retriever.params)
  kept = embeddings_folder(retriever, passages, settings, folder, weights_hash)
  with atomic.in_use(kept):
    with watch.phase('encode'):
      blocks, real_tokens = encode_corpus(retriever, passages, settings, kept)
    with watch.phase('index'):
      passage_index = _index(blocks, settings, retriever.devices)
  work = encoding.flops(
    encoder, retriever.config.body, pieces.lengths(), settings.rows_per_block
  )
  watch.work('encode', work)
  return IndexedCorpus(
    passage_index,
    weights_hash,
    real_tokens,
    passages.texts_of_pieces(),
    blocks,
    _is_exact(passage_index, settings),
  )


def index_rows(
  retriever: retriever_lib.Retriever,
  passages: tokens.TokenRows,
  settings: Settings,
) -> IndexedCorpus:
  """Returns the `IndexedCorpus` of a few passages, of which nothing is kept."""
  pieces = passages.pieces()
  size, devices = retriever.passage_encoder.embedding_size, retriever.devices
  check_index(settings, size, len(devices), len(pieces))
  embeddings, _ = encoding.encode_rows(
    retriever.passage_encoder, retriever.params, pieces, 'encode passages'
  )
  size = settings.rows_per_block
  blocks = [embeddings[i : i + size] for i in range(0, len(pieces), size)]
  made = _index(blocks, settings, devices)
  return IndexedCorpus(
    made, '', None, passages.texts_of_pieces(), blocks,
    _is_exact(made, settings)
  )  # fmt: skip


def encode_corpus(
  retriever: retriever_lib.Retriever,
  passages: tokens.TokenRows,
  settings: Settings,
  folder: pathlib.Path,
):
  """Returns the embeddings of the corpus as `encoding.encode_corpus` does."""
  return encoding.encode_corpus(
    retriever.passage_encoder,
    retriever.params,
    passages.pieces(),
    folder,
    rows_per_block=settings.rows_per_block,
  )


def embeddings_folder(
  retriever: retriever_lib.Retriever,
  passages: tokens.TokenRows,
  settings: Settings,
  folder: pathlib.Path,
  weights_hash: str,
) -> pathlib.Path:
  """Returns the folder, in that of all, of embeddings by some parameters.

  Args:
    retriever: As for `index_corpus`; its parameters are not read.
    passages: As for `index_corpus`.
    settings: As for `index_corpus`.
    folder: As for `index_corpus`.
    weights_hash: Of the parameters.
  """
  devices, how = devices_lib.own(retriever.devices), retriever.settings
  about = [
    weights_hash,
    passages.hash,
    # Without a run, --init_from may be read with other pooling.
    retriever.config.to_dict(),
    how.dtype,
    not how.kernel,
    settings.rows_per_block,
    how.tokens_per_batch,
    len(devices),
    devices[0].device_kind,
  ]
  key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
  return folder / key


def prune_embeddings(kept: pathlib.Path):
  """Removes the folders of all embeddings beside one.

  Those that another job makes or reads at this moment stay, too.
  """
  for folder in kept.parent.glob('*'):
    if folder != kept:
      atomic.remove_unused(folder)


def encode_queries(
  retriever: retriever_lib.Retriever,
  queries: tokens.TokenRows,
  name: str,
  watch: logs.Stopwatch,
  rows: np.ndarray | None = None,
) -> np.ndarray:
  """Returns the (q, E) float32 embeddings of a split's queries.

  Each process of a run encodes its part of them.

  Args:
    retriever: It encodes them.
    queries: Token rows of the split's queries.
    name: The split's.
    watch: For the phase 'encode', and the work.
    rows: (q,) int query rows; None: all.
  """
  rows = np.arange(len(queries)) if rows is None else rows
  size = -(-len(rows) // distributed.count())
  first = distributed.index() * size
  with watch.phase('encode'):
    embeddings, _ = encoding.encode_rows(
      retriever.query_encoder,
      retriever.params,
      queries,
      f'encode {name} queries',
      rows[first : first + size],
    )
    # All send as much.
    part = np.zeros((size, embeddings.shape[1]), np.float32)
    part[: len(embeddings)] = embeddings
    parts = distributed.gather(part)
  work = encoding.flops(
    retriever.query_encoder, retriever.config.body, queries.lengths()[rows]
  )
  watch.work('encode', work)
  return parts.reshape(-1, embeddings.shape[1])[: len(rows)]


def evaluate(
  retriever: retriever_lib.Retriever,
  indexed: IndexedCorpus,
  data: tokenized.Dataset,
  split_name: str,
  watch: logs.Stopwatch,
) -> tuple[dict[str, float], trec.Ranking]:
  """Returns {measure: value} of a split, and the `trec.Ranking` of it."""
  queries = encode_queries(
    retriever, data.queries[split_name], split_name, watch
  )
  watch.work('evaluate', indexed.search_flops(len(queries)))
  with watch.phase('evaluate'):
    split = data.splits[split_name]
    depth = metrics.depth(split, len(data.passages))
    ranking = indexed.search(queries, depth, f'search {split_name}')
    ranking = metrics.without_own(ranking, split)
    return metrics.score(ranking.rows, split, data.corpus.texts), ranking


def examples(
  ranking: trec.Ranking,
  split: corpus_lib.Split,
  corpus: corpus_lib.Corpus,
  seed: int,
) -> list[dict]:
  """Returns what was found for a few queries, the same at each call.

  Args:
    ranking: Of all queries of the split.
    split: The split.
    corpus: The corpus.
    seed: For the choice of the queries.

  Returns:
    A list of dicts: 'query', 'place' of the first relevant passage (None
    beyond the ranking), and 'results', the first passages' names.
  """
  random = np.random.default_rng(seed)
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
          passage_name(corpus, int(row))
          for row in ranking.rows[query, :_EXAMPLE_RESULTS]
          if row >= 0
        ],
      }
    )
  return found


def passage_name(corpus, row):
  """Returns the title of a passage, or where it has none how it begins."""
  return corpus_lib.whole_title(corpus, row) or corpus.texts[row][:60]


def write_ids(path: pathlib.Path, data: tokenized.Dataset):
  """Writes a passage id a line, as rows of embeddings are: each piece has one.

  Args:
    path: Of the file.
    data: Its corpus is the one that was encoded.
  """
  rows = data.passages.texts_of_pieces()
  rows = range(len(data.corpus.ids)) if rows is None else rows.tolist()
  with atomic.writing(path) as file:
    file.writelines(f'{data.corpus.ids[row]}\n'.encode() for row in rows)


def bm25(
  corpus: corpus_lib.Corpus,
  splits: dict[str, corpus_lib.Split],
  *,
  k1: float,
  b: float,
  language: str,
):
  """Returns BM25's rank of a corpus, as `bm25.make_rank` does.

  Args:
    corpus: The corpus.
    splits: Their queries are among those that will be asked.
    k1: As for `bm25.make_rank`.
    b: As for `bm25.make_rank`.
    language: As for `bm25.make_rank`.
  """
  return bm25_lib.make_rank(
    list(tokens.passage_texts(corpus, tokenizer_lib.SPACE)),
    k1=k1,
    b=b,
    language=language,
    queries=[text for split in splits.values() for text in split.texts],
  )


def _is_exact(made, settings):
  return index.is_exact(made) and not settings.center


def _index(blocks, settings, devices):
  """Returns the `index.Index` of all blocks, of which each process has some."""
  own = blocks[distributed.index() :: distributed.count()]
  if settings.factory == ON_DEVICES:
    made = index.place(
      own,
      devices_lib.own(devices),
      settings.memory_mb,
      center=settings.center,
    )
  else:
    made = index.build(
      settings.factory, settings.params, own, center=settings.center
    )
  return index.shared(made, blocks) if distributed.count() > 1 else made
