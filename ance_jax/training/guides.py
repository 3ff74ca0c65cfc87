"""Encodes queries and passages with a guide: a fixed bi-encoder.

Solatorio 2024 (GISTEmbed): the guide sees which in-batch columns are likely
false negatives; its scores can also be a teacher's. It encodes all training
queries and passages once, and steps look its embeddings up. It may also be the
run itself, as its weights were at the active refresh.
"""

from collections.abc import Iterator
import contextlib

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.core import remote
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import tokenized
from ance_jax.models import bi_encoder
from ance_jax.retrieval import corpus_index
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import settings as settings_lib

_FOLDER, _FILE = 'guide', 'guide.json'


def make(run: experiment.Experiment) -> batches.Guide:
  """Encodes a run's training queries and its corpus with `--guide`.

  The passages' embeddings are kept beside token rows, for all runs there.
  """
  config, split = run.config, run.config.train_split
  # All that it reads, the guide's own folder says.
  own = config_lib.Config(
    init_from=config.guide,
    dtype=config.dtype,
    tokens_per_batch=config.tokens_per_batch,
    rows_per_block=config.rows_per_block,
  )
  logs.log(f'the guide is {config.guide}')
  model = experiment.load_model(own)
  retriever = experiment.make_retriever(own, model, run.devices)
  texts = corpus_lib.TextDataset(
    run.dataset.corpus, {split: run.dataset.splits[split]}
  )
  data = tokenized.make(
    texts, model.tokenizer, retriever.form, experiment.tokens_folder(config)
  )
  _check_same(run, retriever)
  settings = settings_lib.index(own)
  kept = corpus_index.embeddings_folder(
    retriever,
    data.passages,
    settings,
    experiment.tokens_folder(config) / _FOLDER,
    retriever.passage_hash(),
  )
  with atomic.in_use(kept):
    blocks, _ = corpus_index.encode_corpus(
      retriever, data.passages, settings, kept
    )
  queries = corpus_index.encode_queries(
    retriever, data.queries[split], split, logs.Stopwatch()
  )
  return batches.Guide(queries, blocks)


@contextlib.contextmanager
def of_refresh(
  run: experiment.Experiment, step: int
) -> Iterator[batches.Guide]:
  """Provides the embeddings by the run's own weights of a refresh.

  The passages are encoded again if an evaluation deleted their embeddings.

  Args:
    run: The run.
    step: Step of the refresh, whose checkpoint the run keeps.
  """
  shapes = bi_encoder.shapes(run.retriever.config)
  run = run.with_params(
    checkpoint.read_params(run.workdir, step, shapes, run.devices)
  )
  with run.embedded_corpus() as blocks:
    yield batches.Guide(
      run.encode_queries(run.config.train_split, logs.Stopwatch()), blocks
    )


def _check_same(run, retriever):
  """Raises `BadInput` for a guide of other weights than at the first start."""
  path = run.workdir / _FILE
  remote.pull_file(str(path))
  about = {'run': run.id, 'passage_hash': retriever.passage_hash()}
  if not retriever.config.tied:
    about['weights_hash'] = checkpoint.weights_hash(retriever.params)
  before = distributed.broadcast(
    lambda: atomic.read_json(path) if path.exists() else about
  )
  if before != about:
    raise errors.refusal(
      f'--guide={run.config.guide} has other weights than when the run in '
      f'{run.workdir} began',
      'give them back, or name another --workdir',
    )
  if distributed.is_first():
    atomic.write_json(path, about)
    remote.push(path)
