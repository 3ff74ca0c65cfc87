"""Encodes, indexes, searches and scores a corpus; ranks it by BM25."""

from collections.abc import Callable
import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np

from ance_jax.core import atomic
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

# Dev queries whose results each evaluation saves, and results per query.
_NUM_EXAMPLES, _EXAMPLE_RESULTS = 3, 3
# Factory string of our index on the accelerators; all others are FAISS's.
ON_DEVICES = 'device'


class Settings(NamedTuple):
  """How to build an index.

  Attributes:
    factory: FAISS factory string, or `ON_DEVICES`.
    params: Search parameters in the syntax of FAISS's ParameterSpace, or ''.
    center: Whether to subtract the mean of all embeddings first.
    rows_per_block: Embeddings per block, the unit of encoding and indexing.
    memory_mb: MiB per device that `ON_DEVICES` may use.
  """

  factory: str = 'Flat'
  params: str = ''
  center: bool = False
  rows_per_block: int = 65_536
  memory_mb: int = 4096


class IndexedCorpus(NamedTuple):
  """The corpus, encoded and indexed with one set of parameters.

  Attributes:
    passage_index: Index of passages, or of their pieces.
    passage_hash: Hash of the parameters that encode passages.
    real_tokens: Share of computed tokens that are not padding; None if all
      embeddings existed.
    texts_of: (R,) int32, the passage row of each piece; None without pieces.
    blocks: Embeddings as `encoding.encode_corpus` returns them.
    exact: Whether a search returns the exact scores of the embeddings.
  """

  passage_index: index.Index
  passage_hash: str
  real_tokens: float | None
  texts_of: np.ndarray | None
  blocks: list[np.ndarray]
  exact: bool = False

  def search(
    self, queries: np.ndarray, k: int, what: str | None = None
  ) -> trec.Ranking:
    """Ranks passages; see `index.search`."""
    if self.texts_of is None:
      return index.search(self.passage_index, queries, k, what)
    return index.search_pieces(
      self.passage_index, self.texts_of, queries, k, what
    )

  def rank(self, queries: np.ndarray, k: int) -> trec.Ranking:
    """Returns the ranking of `search` with exact scores of the embeddings."""
    found = self.search(queries, k)
    if self.exact:
      return found
    return found._replace(scores=self.scores(queries, found.rows))

  def embeddings(self, passages: np.ndarray) -> np.ndarray:
    """Returns (..., E) float32 embeddings of passages or their first pieces."""
    rows = passages.ravel()
    if self.texts_of is not None:
      rows = np.searchsorted(self.texts_of, rows)
    return index.rows_of(self.blocks, rows).reshape(*passages.shape, -1)

  def search_flops(self, num_queries: int) -> int:
    """Returns the operations of a search; see `index.flops`."""
    return num_queries * index.flops(
      self.passage_index, self.blocks[0].shape[1]
    )

  def scores(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns (q, K) float32 scores of passages; see `index.exact_scores`."""
    return index.exact_scores(self.blocks, queries, rows, self.texts_of)


def check_index(
  settings: Settings,
  width: int,
  num_devices: int,
  num_vectors: int | None = None,
) -> None:
  """Raises `BadInput` if the index cannot be built.

  Args:
    settings: How to build the index.
    width: E, width of the embeddings.
    num_devices: Number of accelerators.
    num_vectors: Maximum number of passages or pieces; None if not yet known.
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
  passage_hash: str | None = None,
) -> IndexedCorpus:
  """Encodes and indexes a corpus.

  Args:
    retriever: Retriever that encodes the passages.
    passages: Token rows of the corpus.
    settings: How to build the index.
    folder: Folder of all embeddings; these go to a subfolder named by a hash of
      everything that their bits depend on.
    watch: Measures the phases 'encode' and 'index', and the operations.
    passage_hash: `retriever.passage_hash()`, if it is known.
  """
  pieces, encoder = passages.pieces(), retriever.passage_encoder
  # The number of pieces is known only after tokenizing.
  check_index(
    settings, encoder.embedding_size, len(retriever.devices), len(pieces)
  )
  passage_hash = passage_hash or retriever.passage_hash()
  kept = embeddings_folder(retriever, passages, settings, folder, passage_hash)
  with atomic.in_use(kept):
    with watch.phase('encode'):
      blocks, real_tokens = encode_corpus(retriever, passages, settings, kept)
    with watch.phase('index'):
      indexed = _indexed(blocks, settings, retriever.devices, passages)
  watch.add_flops(
    'encode',
    encoding.flops(
      encoder, retriever.config.body, pieces.lengths(), settings.rows_per_block
    ),
  )
  return indexed._replace(passage_hash=passage_hash, real_tokens=real_tokens)


def index_rows(
  retriever: retriever_lib.Retriever,
  passages: tokens.TokenRows,
  settings: Settings,
) -> IndexedCorpus:
  """Encodes and indexes a few passages in memory, without saving them."""
  pieces, encoder = passages.pieces(), retriever.passage_encoder
  check_index(
    settings, encoder.embedding_size, len(retriever.devices), len(pieces)
  )
  embeddings, _ = encoding.encode_rows(
    encoder, retriever.params, pieces, 'encode passages'
  )
  size = settings.rows_per_block
  blocks = [embeddings[i : i + size] for i in range(0, len(pieces), size)]
  return _indexed(blocks, settings, retriever.devices, passages)


def encode_corpus(
  retriever: retriever_lib.Retriever,
  passages: tokens.TokenRows,
  settings: Settings,
  folder: pathlib.Path,
) -> tuple[list[np.ndarray], float | None]:
  """Encodes the corpus; see `encoding.encode_corpus`."""
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
  passage_hash: str,
) -> pathlib.Path:
  """Returns the subfolder for embeddings by a set of parameters.

  Args:
    retriever: As for `index_corpus`; its parameters are not read.
    passages: As for `index_corpus`.
    settings: As for `index_corpus`.
    folder: As for `index_corpus`.
    passage_hash: Hash of the parameters that encode passages.
  """
  devices, how = devices_lib.own(retriever.devices), retriever.settings
  config = retriever.config.to_dict()
  del config['body']['attention_dropout']  # Of training alone.
  about = [
    passage_hash,
    passages.hash,
    # Without a run, flags may override the pooling of --init_from.
    config,
    how.dtype,
    not how.kernel,
    settings.rows_per_block,
    how.tokens_per_batch,
    len(devices),
    devices[0].device_kind,
  ]
  return folder / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def prune_embeddings(kept: pathlib.Path) -> None:
  """Removes all embeddings except `kept` and those in use by another job."""
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

  The processes of a run share the work.

  Args:
    retriever: Retriever that encodes the queries.
    queries: Token rows of the split's queries.
    name: Name of the split.
    watch: Measures the phase 'encode', and the operations.
    rows: (q,) int query rows; None for all.
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
    # All processes must send arrays of equal size.
    parts = distributed.all_gather(
      np.pad(embeddings, ((0, size - len(embeddings)), (0, 0)))
    )
  watch.add_flops(
    'encode',
    encoding.flops(
      retriever.query_encoder, retriever.config.body, queries.lengths()[rows]
    ),
  )
  return parts.reshape(-1, embeddings.shape[1])[: len(rows)]


def evaluate(
  retriever: retriever_lib.Retriever,
  indexed: IndexedCorpus,
  data: tokenized.Dataset,
  split_name: str,
  watch: logs.Stopwatch,
) -> tuple[dict[str, float], trec.Ranking]:
  """Returns the value of each measure on a split, and its ranking."""
  queries = encode_queries(
    retriever, data.queries[split_name], split_name, watch
  )
  watch.add_flops('evaluate', indexed.search_flops(len(queries)))
  with watch.phase('evaluate'):
    split = data.splits[split_name]
    depth = metrics.depth(split, len(data.passages))
    ranking = metrics.without_own(
      indexed.search(queries, depth, f'search {split_name}'), split
    )
    return metrics.score(ranking.rows, split, data.corpus.texts), ranking


def examples(
  ranking: trec.Ranking,
  split: corpus_lib.Split,
  corpus: corpus_lib.Corpus,
  seed: int,
) -> list[dict]:
  """Returns the results of a few queries, the same ones at each call.

  Args:
    ranking: Ranking of all queries of the split.
    split: The split.
    corpus: The corpus.
    seed: Seed of the choice of queries.

  Returns:
    Dicts of 'query', 'place' (rank of the first relevant passage from 1, None
    if not ranked) and 'results' (names of the first passages).
  """
  queries = np.random.default_rng(seed).choice(
    len(split.ids), min(_NUM_EXAMPLES, len(split.ids)), replace=False
  )
  found = []
  for query in queries:
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


def passage_name(corpus: corpus_lib.Corpus, row: int) -> str:
  """Returns the title of a passage, or else its first 60 characters."""
  return corpus_lib.whole_title(corpus, row) or corpus.texts[row][:60]


def write_ids(path: pathlib.Path, data: tokenized.Dataset) -> None:
  """Writes the passage id of each embedding row, one per line.

  Args:
    path: File to write.
    data: Dataset of the encoded corpus.
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
) -> Callable[..., trec.Ranking]:
  """Indexes a corpus for BM25; see `bm25.make_rank`.

  Args:
    corpus: The corpus.
    splits: Splits whose queries to check in advance.
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


def _indexed(blocks, settings, devices, passages):
  """Returns the `IndexedCorpus` of all blocks, which the processes share."""
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
  if distributed.count() > 1:
    made = index.shared(made, blocks)
  return IndexedCorpus(
    made,
    '',
    None,
    passages.texts_of_pieces(),
    blocks,
    exact=index.is_exact(made) and not settings.center,
  )
