"""Encodes the corpus: `--job=encode`."""

from ance_jax import config as config_lib
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.retrieval import corpus_index
from ance_jax.training import experiment
from ance_jax.training import settings


def run(config: config_lib.Config) -> None:
  """Writes the embeddings of the corpus, and its ids.

  Row i of the concatenated .npy files belongs to line i of ids.txt.
  """
  this, step = experiment.open(config, ())
  folder = this.embeddings_folder(this.retriever.passage_hash())
  with atomic.in_use(folder):
    blocks, real_tokens = corpus_index.encode_corpus(
      this.retriever, this.dataset.passages, settings.index(config), folder
    )
    corpus_index.write_ids(folder / 'ids.txt', this.dataset)
  made = (
    'there already' if real_tokens is None else f'{real_tokens:.1%} real tokens'
  )
  logs.log(
    f'embeddings of step {step}: {sum(map(len, blocks)):,} rows in '
    f'{len(blocks)} blocks, {made}: {folder}'
  )
