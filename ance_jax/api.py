"""Retrievers in Python: load one, encode, index, search, mine hard negatives.

    retriever = api.load('OWNER/NAME')  # Or the folder of a run or a model.
    index = api.index(retriever, passages)
    ranking = index.search(queries, top_k=10)
    negatives = api.mine(index, queries, positives)

Texts are lists of strings, results are NumPy arrays. The retriever applies its
own prompts, lengths, titles and lower-casing, as in the jobs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ance_jax import errors
from ance_jax.core import checkpoint as checkpoint_lib
from ance_jax.core import devices as devices_lib
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import trec
from ance_jax.mining import candidates
from ance_jax.mining import filters
from ance_jax.mining import miner
from ance_jax.models import pretrained
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import encoding as encoding_lib
from ance_jax.retrieval import retriever as retriever_lib
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import negatives as negatives_lib
from ance_jax.training import settings as settings_lib

_MAX_RANK = 100


class Index(NamedTuple):
  """Passages, encoded and indexed.

  Attributes:
    retriever: What encoded them, and encodes the queries.
    corpus: The passages; a row is a place in the lists that they came in.
    indexed: Their embeddings, and the index of these.
  """

  retriever: retriever_lib.Retriever
  corpus: corpus_lib.Corpus
  indexed: corpus_index.IndexedCorpus

  def search(self, queries: Sequence[str], top_k: int = 10) -> trec.Ranking:
    """Returns the rows and scores of the best `top_k` passages of each query.

    Both arrays are (q, K), best first; K is the number of passages at most.
    """
    return self.indexed.search(
      self.retriever.encode_queries(queries), min(top_k, len(self.corpus.ids))
    )


def load(
  init_from: str,
  *,
  checkpoint: str = 'last',
  query_prompt: str | None = None,
  passage_prompt: str | None = None,
  query_length: int | None = None,
  passage_length: int | None = None,
  pooling: str | None = None,
  similarity: str | None = None,
  encoding: encoding_lib.Settings | None = None,
  num_devices: int = 0,
) -> retriever_lib.Retriever:
  """Returns a retriever, of which `encode_queries` is a method.

  What is None is as the run or the model has it; the flags of the same names
  say what the values mean.

  Args:
    init_from: The folder of a run or of a model, or a name on the hub, as for
      `--init_from`.
    checkpoint: Which checkpoint of a run: a step, 'last' or 'best'.
    query_prompt: Put before each query.
    passage_prompt: Put before each passage.
    query_length: Tokens of a query at most.
    passage_length: Tokens of a passage at most.
    pooling: How token vectors become one.
    similarity: 'dot' or 'cosine'.
    encoding: How texts are encoded; None: as the run does, else as the
      defaults of `encoding.Settings` say.
    num_devices: Local accelerators to use; 0: all.

  Raises:
    BadInput: It cannot be read; the text says why.
  """
  if pretrained.is_run(init_from):
    step = checkpoint_lib.choose(init_from, checkpoint)
    of_run = settings_lib.encoding(experiment.settings(init_from, step))
    checkpoint, encoding = str(step), encoding or of_run
  model = pretrained.load(
    pretrained.Settings(
      init_from,
      checkpoint,
      query_prompt=query_prompt,
      passage_prompt=passage_prompt,
      query_length=query_length,
      passage_length=passage_length,
      pooling=pooling,
      similarity=similarity,
    )
  )
  return retriever_lib.make(model, devices_lib.local(num_devices), encoding)


def index(
  retriever: retriever_lib.Retriever,
  passages: Sequence[str],
  titles: Sequence[str] | None = None,
  settings: corpus_index.Settings | None = None,
) -> Index:
  """Returns the index of some passages, in memory.

  Args:
    retriever: What encodes them.
    passages: N texts.
    titles: N titles, '' for none; None: there are none.
    settings: How the index is built; None: as the defaults of
      `corpus_index.Settings` say, a FAISS index that searches exactly.

  Raises:
    BadInput: There are no passages, or too few for the index.
  """
  if not len(passages):
    raise errors.refusal('there are no passages to index', 'give one at least')
  rows = retriever.passage_rows(passages, titles)
  corpus = corpus_lib.make_corpus(
    list(map(str, range(len(passages)))),
    titles or [''] * len(passages),
    passages,
  )
  return Index(
    retriever,
    corpus,
    corpus_index.index_rows(
      retriever, rows, settings or corpus_index.Settings()
    ),
  )


def mine(
  index: Index,
  queries: Sequence[str],
  positives: Sequence[Sequence[int]],
  *,
  num_negatives: int = 4,
  rules: filters.Rules | None = None,
  choose: str = 'top',
  on_shortage: str = 'keep',
  same_text: bool = True,
  seed: int = 0,
) -> miner.Table:
  """Returns hard negatives of each query, as `--job=mine` finds them.

  None is a positive, a copy of one, or the query itself; queries of the same
  text share their positives.

  Args:
    index: The passages.
    queries: Q texts.
    positives: The rows of each query's positive passages, one at least.
    num_negatives: K, of a query.
    rules: Which candidates are taken, by rank and score; None: the first 100.
    choose: 'top' for the best of these, 'random' for any.
    on_shortage: What happens to a query with fewer than K: 'keep' them, 'drop'
      all of them, or 'fill' up with random passages.
    same_text: Whether a copy of a positive is a positive.
    seed: Seed of all random draws.

  Returns:
    `rows` (Q, K) int32, best first, padded with -1; `scores`
    (Q, K) float32, NaN there; and counts.

  Raises:
    BadInput: The arguments do not go together, or with the passages.
  """
  rules = rules or filters.Rules(max_rank=_MAX_RANK)
  settings = miner.Settings(
    num_negatives,
    rules._replace(num_scores=rules.num_scores or rules.max_rank),
    choose,
    on_shortage,
    seed=seed,
  )
  _check(settings)
  split = _split(index.corpus, queries, positives)
  excluded = negatives_lib.excluded(
    split,
    index.corpus,
    methods.METHODS['ance'],  # For which all judged positives are positives.
    same_text,
  )
  most, size = int(excluded.num_excluded.max()), len(index.corpus.ids)
  if on_shortage == 'fill' and num_negatives + most > size:
    raise errors.refusal(
      f"on_shortage='fill' needs {num_negatives} passages besides those that "
      f'may be no negative of a query, up to {most}; there are {size}',
      'lower num_negatives',
    )
  task = miner.Task(
    candidates.of_index(
      index.indexed, index.retriever.encode_queries(queries), 'the index'
    ),
    split.shared_positives(),
    excluded,
    settings,
  )
  return miner.mine_table(task, 0, len(queries), 'mine')


def _check(settings):
  """Raises `BadInput` for `miner.Settings` that no mining can follow."""
  for name, known in (
    ('choose', ('top', 'random')),
    ('on_shortage', ('keep', 'drop', 'fill')),
  ):
    value = getattr(settings, name)
    if value not in known:
      raise errors.refusal(
        f'{name}={value!r} is unknown', f'use one of {", ".join(known)}'
      )
  number, rules = settings.number, settings.rules
  if number > (rules.max_rank or np.inf) - rules.skip_ranks:
    raise errors.refusal(
      f'num_negatives={number} does not fit between '
      f'skip_ranks={rules.skip_ranks} and max_rank={rules.max_rank}',
      'change one of the three',
    )


def _split(corpus, queries, positives):
  """Returns the `corpus.Split` of queries and the rows of their positives."""
  judgements = {
    (query, int(row)): 1 for query, rows in enumerate(positives) for row in rows
  }
  judged = len({query for query, _ in judgements})
  if not len(queries) or not len(queries) == len(positives) == judged:
    raise errors.refusal(
      f'{len(queries):,} queries have {len(positives):,} lists of positives, '
      f'{judged:,} of them not empty',
      'give each query its list, and leave queries without a positive out',
    )
  rows = [row for _, row in judgements]
  size = len(corpus.ids)
  if not 0 <= min(rows) <= max(rows) < size:
    raise errors.refusal(
      f'positives are rows of the passages, from 0 to {size - 1}; found '
      f'{min(rows)} to {max(rows)}',
      'give the places of the positives in the list of passages',
    )
  return corpus_lib.make_split(
    corpus_lib.RawSplit(
      list(map(str, range(len(queries)))), list(queries), judgements
    ),
    corpus,
  )
