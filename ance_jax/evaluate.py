"""Encode, index, search, score; and the jobs that do only that."""

import hashlib
import json
import pathlib
from typing import NamedTuple

import numpy as np

from ance_jax import checkpoint
from ance_jax import config as config_lib
from ance_jax import corpora
from ance_jax import data
from ance_jax import devices as devices_lib
from ance_jax import encode
from ance_jax import errors
from ance_jax import handoff
from ance_jax import index
from ance_jax import lexical
from ance_jax import logs
from ance_jax import metrics
from ance_jax import processes
from ance_jax import prompt
from ance_jax import runs
from ance_jax import tokenizer as tokenizer_lib
from ance_jax import tokens
from ance_jax import workdirs

# Dev queries whose results are kept at each evaluation, and results of each.
_NUM_EXAMPLES, _EXAMPLE_RESULTS = 3, 3


class IndexedCorpus(NamedTuple):
  """The corpus as some weights see it.

  Attributes:
    passage_index: `index.Index` of passage rows, or those of their pieces.
    weights_hash: Hash of the parameters.
    real_tokens: Share of real tokens in what was computed; None if the
      embeddings were there.
    texts_of: (R,) int32, the passage row of each piece; None without pieces.
    blocks: Embeddings as `encode.encode_corpus` returns them.
  """

  passage_index: index.Index
  weights_hash: str
  real_tokens: float | None
  texts_of: np.ndarray | None
  blocks: list[np.ndarray]

  def search(self, queries, k, what=None):
    """Returns the `rankings.Ranking` of passages; see `index.search`."""
    if self.texts_of is None:
      return index.search(self.passage_index, queries, k, what)
    return index.search_pieces(
      self.passage_index, self.texts_of, queries, k, what
    )

  def search_flops(self, num_queries):
    """Returns the operations of a search; 0 where nobody counts them."""
    width = self.blocks[0].shape[1]
    return num_queries * index.flops(self.passage_index, width)

  def scores(self, queries, rows):
    """Returns (q, K) float32 scores of passages; see `index.exact_scores`."""
    return index.exact_scores(self.blocks, queries, rows, self.texts_of)


def index_corpus(run, params, watch):
  """Returns the `IndexedCorpus` of parameters that lie on all devices.

  The embeddings are kept in the run's folder, under a hash of all that their
  bits depend on.

  Args:
    run: `runs.Run`.
    params: Parameters by tower.
    watch: `logs.Stopwatch`, for the phases 'encode' and 'index', and the work.
  """
  # Where passages are cut only now is it known how many pieces there are.
  runs.check_index(
    run.config, run.retriever.embedding_size, len(run.passages.pieces())
  )
  weights_hash = checkpoint.weights_hash(params)
  folder = _embeddings_folder(run, weights_hash)
  with handoff.in_use(folder):
    with watch.phase('encode'):
      blocks, real_tokens = _encode_corpus(run, params, folder)
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
  )


def prune_embeddings(run, weights_hash):
  """Removes the embeddings of all weights but those of this hash.

  Those that another job makes or reads at this moment stay, too.
  """
  kept = _embeddings_folder(run, weights_hash)
  for folder in kept.parent.glob('*'):
    if folder != kept:
      handoff.remove_unused(folder)


def encode_queries(run, params, split_name, watch, rows=None):
  """Returns the (q, E) float32 embeddings of a split's queries.

  Those of all, or of the (q,) int query rows that are given. Each process of a
  run encodes its part of them.
  """
  queries = run.queries[split_name]
  rows = np.arange(len(queries)) if rows is None else rows
  size = -(-len(rows) // processes.count())
  first = processes.index() * size
  with watch.phase('encode'):
    embeddings, _ = encode.encode_rows(
      run.query_encoder,
      params,
      queries,
      f'encode {split_name} queries',
      rows[first : first + size],
    )
    # All send as much.
    part = np.zeros((size, embeddings.shape[1]), np.float32)
    part[: len(embeddings)] = embeddings
    parts = processes.gather(part)
  _count_encoding(run, run.query_encoder, queries.lengths()[rows], watch)
  return parts.reshape(-1, embeddings.shape[1])[: len(rows)]


def evaluate(run, params, indexed, split_name, watch):
  """Returns {measure: value} of a split, and the `rankings.Ranking` of it."""
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
  title = corpus.titles[row].replace(data.TITLE_PART, ' ')
  return title or corpus.texts[row][:60]


def run(config):
  """Scores `--split` with `--retriever`: `--job=evaluate`.

  Writes the scores as JSON, and a TREC run file, into the folder.

  Returns:
    {measure: value}.
  """
  if config.retriever == 'bm25':
    if runs.is_run(config.workdir):
      raise errors.BadInput(
        'the scores of BM25 must have a folder of their own; found a run in '
        f'{config.workdir}; name another --workdir, and the data.'
      )
    find, corpus, splits = bm25(config, (config.split,))
    split, step = splits[config.split], 0
    depth = metrics.depth(split, len(corpus.texts))
    ranking = metrics.without_own(find(list(split.texts), depth), split)
    scores = metrics.score(ranking.rows, split, corpus.texts)
  else:
    this, params, step = runs.read(config, (config.split,))
    watch = logs.Stopwatch()
    indexed = index_corpus(this, params, watch)
    scores, ranking = evaluate(this, params, indexed, config.split, watch)
    corpus, split = this.corpus, this.splits[config.split]
  path = scores_path(config, step)
  handoff.write_json(
    path,
    {
      'queries': len(split.ids),
      'protocol': split.protocol,
      'metrics': scores,
      'corpus': corpus.hash,
      'judgements': split.hash,
    },
  )
  path = path.with_suffix('.trec')
  metrics.write_run(path, ranking, split, corpus, f'ance_jax-{step}')
  logs.say(
    f'{config.split} at step {step}, {len(split.ids):,} queries: '
    + ', '.join(f'{name} {value:.4f}' for name, value in scores.items())
  )
  logs.say(f'run file: {path}')
  return scores


def scores_path(config, step):
  """Returns the path of the JSON file that `run` writes for a step."""
  name = f'{config.split}-{config.retriever}-{step}.json'
  return pathlib.Path(config.workdir) / name


def write_embeddings(config):
  """Writes the embeddings of the corpus, and its ids: `--job=encode`.

  Row i of the .npy files, one behind the other, is line i of ids.txt.
  """
  this, params, step = runs.read(config, ())
  folder = _embeddings_folder(this, checkpoint.weights_hash(params))
  with handoff.in_use(folder):
    blocks, real_tokens = _encode_corpus(this, params, folder)
    write_ids(folder / 'ids.txt', this)
  made = (
    'there already' if real_tokens is None else f'{real_tokens:.1%} real tokens'
  )
  logs.say(
    f'embeddings of step {step}: {sum(map(len, blocks)):,} rows in '
    f'{len(blocks)} blocks, {made}: {folder}'
  )


def write_ids(path, run):
  """Writes a passage id a line, as rows of embeddings are: each piece has one.

  Args:
    path: `pathlib.Path` of the file.
    run: `runs.Run`.
  """
  rows = run.passages.texts_of_pieces()
  rows = range(len(run.corpus.ids)) if rows is None else rows.tolist()
  with handoff.writing(path) as file:
    file.writelines(f'{run.corpus.ids[row]}\n'.encode() for row in rows)


def embedding_files(run, params):
  """Returns the paths of the .npy files that `index_corpus` left, in order."""
  folder = _embeddings_folder(run, checkpoint.weights_hash(params))
  return sorted(folder.glob('[0-9]*/embeddings.npy'))


def search(config):
  """Answers `--query`, or queries from the terminal: `--job=search`."""
  if config.retriever == 'bm25':
    find, corpus, _ = bm25(config, ())
  else:
    find, corpus = _model_finder(config)
  depth = min(config.num_results, len(corpus.texts))
  for query in [config.query] if config.query else prompt.queries():
    ranking = find([query], depth)
    for place, (row, score) in enumerate(
      zip(ranking.rows[0].tolist(), ranking.scores[0].tolist(), strict=True), 1
    ):
      if row >= 0:
        logs.say(
          f'{place:3d}  {score:8.3f}  {corpus.ids[row]}  {corpus.titles[row]}\n'
          f'     {corpus.texts[row][:200]}'
        )
    if (ranking.rows < 0).all():
      logs.say('nothing found')


def _model_finder(config):
  this, params, step = runs.read(config, ())
  indexed = index_corpus(this, params, logs.Stopwatch())
  logs.say(f'searching {len(this.passages):,} passages with step {step}')

  def find(queries, depth):
    retriever = this.retriever
    texts = [retriever.query_prompt + query for query in queries]
    rows = tokens.memory_rows(this.tokenizer, texts, retriever.query_length)
    embeddings, _ = encode.encode_rows(
      this.query_encoder, params, rows, 'encode the query'
    )
    return indexed.search(embeddings, depth)

  return find, this.corpus


def bm25(config, split_names):
  """Returns BM25's rank, as `lexical.make_rank` does, the corpus and splits."""
  workdirs.require(config)
  corpus, splits = corpora.load(config, split_names)
  texts = list(tokens.passage_texts(corpus, tokenizer_lib.SPACE))
  rank = lexical.make_rank(
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
  own = blocks[processes.index() :: processes.count()]
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
  return index.shared(made, blocks) if processes.count() > 1 else made


def _count_encoding(run, encoder, lengths, watch, rows_per_block=None):
  work = encode.flops(encoder, run.retriever.body, lengths, rows_per_block)
  watch.work('encode', work)


def _encode_corpus(run, params, folder):
  return encode.encode_corpus(
    run.passage_encoder,
    params,
    run.passages.pieces(),
    folder,
    rows_per_block=run.config.rows_per_block,
  )


def _embeddings_folder(run, weights_hash):
  devices = devices_lib.own(run.devices)
  about = [
    weights_hash,
    run.passages.hash,
    # Without a run, --init_from may be read with other pooling.
    run.retriever.to_dict(),
    run.config.dtype,
    run.config.refresh == 'async',  # See `runs._encoders`.
    run.config.rows_per_block,
    run.config.tokens_per_batch,
    len(devices),
    devices[0].device_kind,
  ]
  key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
  return run.workdir / 'embeddings' / key
