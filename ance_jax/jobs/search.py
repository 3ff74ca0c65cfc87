"""Searches from the terminal: `--job=search`."""

from ance_jax import config as config_lib
from ance_jax.core import logs
from ance_jax.jobs import prompt
from ance_jax.training import experiment


def run(config: config_lib.Config) -> None:
  """Prints the results of `--query`, or of queries from the terminal."""
  if config.retriever == 'bm25':
    find, corpus, _ = experiment.rank_by_bm25(config, ())
  else:
    find, corpus = _model_finder(config)
  depth = min(config.num_results, len(corpus.texts))
  for query in [config.query] if config.query else prompt.queries():
    ranking = find([query], depth)
    for place, (row, score) in enumerate(
      zip(ranking.rows[0].tolist(), ranking.scores[0].tolist(), strict=True), 1
    ):
      if row >= 0:
        logs.log(
          f'{place:3d}  {score:8.3f}  {corpus.ids[row]}  {corpus.titles[row]}\n'
          f'     {corpus.texts[row][:200]}'
        )
    if (ranking.rows < 0).all():
      logs.log('nothing found')


def _model_finder(config):
  this, step = experiment.open(config, ())
  indexed = this.index_corpus(logs.Stopwatch())
  corpus = this.dataset.corpus
  logs.log(f'searching {len(corpus.ids):,} passages with step {step}')

  def find(queries, depth):
    return indexed.search(this.retriever.encode_queries(queries), depth)

  return find, corpus
