"""Mines hard negatives for other trainers: `--job=mine`.

A model, BM25 or a run file ranks candidates for the training queries, filters
reject some and count them, and the rest are written in a format that other
trainers read. Queries are processed and written in blocks, so that only their
texts and embeddings, or a given ranking, are in memory as a whole.
"""

import dataclasses
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import compiled
from ance_jax.core import devices as devices_lib
from ance_jax.core import logs
from ance_jax.core import workdirs
from ance_jax.data import corpus as corpus_lib
from ance_jax.jobs import forms
from ance_jax.jobs import mine_formats
from ance_jax.jobs import mine_report
from ance_jax.mining import candidates
from ance_jax.mining import miner
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import negatives as negatives_lib

# Default of --max_rank; sentence-transformers also searches for 100.
_MAX_RANK = 100


class Job(NamedTuple):
  """Settings and data of a mining job.

  Attributes:
    config: Settings of the job.
    corpus: All passages.
    split: Training queries.
    task: Inputs of the mining pipeline.
  """

  config: config_lib.Config
  corpus: corpus_lib.Corpus
  split: corpus_lib.Split
  task: miner.Task


def run(config: config_lib.Config) -> dict[str, Any]:
  """Writes hard negatives of the training queries and a report.

  Returns:
    The contents of the report's JSON file.
  """
  config = dataclasses.replace(
    config,
    max_rank=config.max_rank or _MAX_RANK,
    on_shortage=config.on_shortage or 'keep',
  )
  _check_flags(config)
  workdirs.require(config)
  path, report_path = _paths(config)
  job = _job(config)
  _check_data(job)
  found = mine_report.Tally(job)
  with atomic.writing(path) as file:
    try:
      file.writelines(
        mine_formats.encoded(config.format, _examples(job, found), job.corpus)
      )
      logs.log(found.table())
      if not found.written:
        raise errors.refusal(
          f'none of the {len(job.split.ids):,} training queries can be '
          'written, as the lines above say',
          _cure(config),
        )
    except BaseException:
      # Leave nothing behind, since the folder may not be a run's.
      pathlib.Path(file.name).unlink()
      raise
  atomic.write_json(report_path, found.as_json())
  logs.log(found.examples_text())
  logs.log(f'hard negatives: {path}; report: {report_path}')
  return found.as_json()


def _examples(job, found):
  """Yields an example for each query to write, in order.

  Args:
    job: `Job`.
    found: `mine_report.Tally` that counts all queries.
  """
  queries = np.arange(len(job.split.ids))
  blocks = logs.progress(
    miner.blocks(job.task, queries),
    'mine',
    total=len(queries),
    unit='queries',
    count=len,
  )
  for mined in miner.mine(job.task, blocks):
    written = mined.negatives[:, 0] >= 0
    if mine_report.only_full(job.config):
      written = mined.found == job.config.num_negatives
    if forms.FORMS[job.config.format].scored:
      written &= ~mine_report.unscored(mined)
    found.add(mined, written)
    for place in np.nonzero(written)[0].tolist():
      yield _example(job, mined, place)


def _example(job, mined, place):
  split, query = job.split, int(mined.queries[place])
  start, end = np.searchsorted(mined.of_query, (place, place + 1))
  if forms.FORMS[job.config.format].pairs:
    # Positives judged for a query of equal text are written with that query.
    judged = split.grades[slice(*split.offsets[query : query + 2])]
    end = start + (judged > 0).sum()
  of_query = slice(start, end)
  there = mined.negatives[place] >= 0

  def pairs(rows, scores):
    return list(zip(rows.tolist(), scores.tolist(), strict=True))

  return mine_formats.Example(
    split.ids[query],
    split.texts[query],
    split.answers[query] if split.answers else [],
    pairs(mined.positives[of_query], mined.positive_scores[of_query]),
    pairs(mined.negatives[place][there], mined.scores[place][there]),
  )


def _candidates(config):
  """Returns the source of candidates, the corpus and the training queries."""
  name = config.train_split
  if config.ranking:
    corpus, splits = experiment.load_texts(config, (name,))
    source = candidates.of_run_file(config.ranking, corpus, splits[name])
  elif config.retriever == 'bm25':
    rank, corpus, splits = experiment.rank_by_bm25(config, (name,))
    source = candidates.of_bm25(rank, splits[name])
  else:
    run, step = experiment.open(config, (name,))
    corpus, splits = run.dataset.corpus, run.dataset.splits
    watch = logs.Stopwatch()
    source = candidates.of_index(
      run.index_corpus(watch),
      run.encode_queries(name, watch),
      f'the model at step {step}',
    )
  return source, corpus, splits[name]


def _job(config):
  source, corpus, split = _candidates(config)
  drops_answers = negatives_lib.drops_answers(config, split)
  reranks = config.rerank_max_score is not None
  task = miner.Task(
    source,
    split.shared_positives(),
    # As for a method that uses all judged positives.
    negatives_lib.excluded(
      split, corpus, methods.METHODS['ance'], config.drop_same_text
    ),
    _settings(config),
    candidates.answer_matcher(corpus, split) if drops_answers else None,
    _reranker(config, corpus, split) if reranks else None,
  )
  return Job(config, corpus, split, task)


def _settings(config):
  """Returns the `miner.Settings` of the flags."""
  return miner.Settings(
    config.num_negatives,
    negatives_lib.rules_of(config, config.max_rank),
    config.choose,
    config.on_shortage,
    seed=config.seed,
  )


def _reranker(config, corpus, split):
  """Returns the `miner.Task.rerank` of the flags."""
  devices = ()
  if config.cross_encoder:
    devices = devices_lib.local(config.num_devices)
    compiled.enable_cache(config.compilation_cache_dir, devices)
  return candidates.reranker(
    corpus,
    split,
    score_run=config.score_run,
    cross_encoder=config.cross_encoder,
    devices=devices,
    dtype=config.dtype,
    tokens_per_batch=config.tokens_per_batch,
  )


def _cure(config):
  """Returns the cure for the case that no query can be written."""
  cure = 'loosen the filters that rejected most'
  if mine_report.only_full(config):
    cure += ', lower --num_negatives, or set --on_shortage=fill'
  if forms.FORMS[config.format].scored:
    cure += ', or have a model score (--init_from), which scores everything'
  return cure


def _paths(config):
  """Returns the paths of the file and its report, after checking both."""
  ending = 'json' if forms.FORMS[config.format].array else 'jsonl'
  path = pathlib.Path(
    config.output or f'{config.workdir}/hard_negatives.{config.format}.{ending}'
  )
  if path.is_dir():
    raise errors.refusal(f'{path} is a folder', 'name a file as --output')
  if not path.parent.is_dir():
    raise errors.refusal(
      f'{path.parent} is not a folder, and {path.name} is to be written there',
      'make it, or name another --output',
    )
  paths = path, path.with_suffix('.report.json')
  for there in paths:
    if there.exists() and not config.overwrite:
      raise errors.refusal(
        f'{there} is there already', 'name another --output, or set --overwrite'
      )
  return paths


def _check_flags(config):
  """Raises `BadInput` for flags that contradict each other."""
  if config.num_negatives > config.max_rank - config.skip_ranks:
    raise errors.refusal(
      f'--num_negatives={config.num_negatives} does not fit between '
      f'--skip_ranks={config.skip_ranks} and --max_rank={config.max_rank}',
      'change one of the three',
    )
  if config.ranking and config.retriever == 'bm25':
    raise errors.refusal(
      '--ranking and --retriever=bm25 both choose what ranks the passages',
      'give only one',
    )


def _check_data(job):
  """Raises `BadInput` for flags that do not fit the data."""
  config, size = job.config, len(job.corpus.texts)
  if config.drop_answers and not job.split.answers:
    raise errors.refusal(
      '--drop_answers needs answers, and the training queries have none',
      'leave it out',
    )
  most = int(job.task.excluded.num_excluded.max())
  if config.on_shortage == 'fill' and config.num_negatives + most > size:
    raise errors.refusal(
      f'--on_shortage=fill needs {config.num_negatives} passages besides those '
      'that are no negatives of a query (its positives, its own text), up to '
      f'{most}, and the corpus has {size:,}',
      'lower --num_negatives',
    )
