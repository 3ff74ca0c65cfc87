"""Scores a split: `--job=evaluate`."""

import pathlib

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.retrieval import metrics
from ance_jax.training import experiment


def run(config: config_lib.Config) -> dict[str, float]:
  """Scores `--split` with `--retriever`.

  Writes the scores as JSON, and a TREC run file, to `--workdir`.

  Returns:
    The value of each measure.
  """
  if config.retriever == 'bm25':
    if experiment.is_run(config.workdir):
      raise errors.refusal(
        f'{config.workdir} is the folder of a run, and scores of BM25 need one '
        'of their own',
        'name another --workdir, and the data',
      )
    find, corpus, splits = experiment.rank_by_bm25(config, (config.split,))
    split, step = splits[config.split], 0
    depth = metrics.depth(split, len(corpus.texts))
    ranking = metrics.without_own(find(list(split.texts), depth), split)
    scores = metrics.score(ranking.rows, split, corpus.texts)
  else:
    this, step = experiment.open(config, (config.split,))
    watch = logs.Stopwatch()
    scores, ranking = this.evaluate(
      this.index_corpus(watch), config.split, watch
    )
    corpus, split = this.dataset.corpus, this.dataset.splits[config.split]
  path = scores_path(config, step)
  atomic.write_json(
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
  logs.log(
    f'{config.split} at step {step}, {len(split.ids):,} queries: '
    + ', '.join(f'{name} {value:.4f}' for name, value in scores.items())
  )
  logs.log(f'run file: {path}')
  return scores


def scores_path(config: config_lib.Config, step: int) -> pathlib.Path:
  """Returns the path of the JSON file that `run` writes for a step."""
  return pathlib.Path(
    config.workdir, f'{config.split}-{config.retriever}-{step}.json'
  )
