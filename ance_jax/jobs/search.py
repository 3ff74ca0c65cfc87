"""Searches from the terminal: `--job=search`."""

from collections.abc import Callable

from ance_jax import config as config_lib
from ance_jax.core import logs
from ance_jax.data import trec
from ance_jax.jobs import prompt
from ance_jax.training import experiment


def run(config: config_lib.Config) -> None:
  """Prints the results of `--query`, or of queries from the terminal."""
  if config.retriever == 'bm25':
    find, corpus, _ = experiment.rank_by_bm25(config, ())
  else:
    this, step = experiment.open(config, ())
    find, corpus = finder(this), this.dataset.corpus
    logs.log(f'searching {len(corpus.ids):,} passages with step {step}')
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


def finder(
  run: experiment.Experiment,
) -> Callable[[list[str], int], trec.Ranking]:
  """Indexes the corpus; returns find(queries, depth), its ranking."""
  indexed = run.index_corpus(logs.Stopwatch())

  def find(queries, depth):
    return indexed.search(run.retriever.encode_queries(queries), depth)

  return find
