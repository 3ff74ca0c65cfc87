"""One refresh: encode -> index -> search -> mine -> evaluate -> publish.

It reads the parameters of a committed checkpoint from disk, also when it runs
inside of training, so that what is mined belongs to weights that a restart
would train on from; and it publishes a folder that is there whole or not at
all. It is a function of (checkpoint, data, settings): made again, the same.
"""

import numpy as np

from ance_jax import checkpoint
from ance_jax import config as config_lib
from ance_jax import encoders
from ance_jax import evaluate
from ance_jax import handoff
from ance_jax import index
from ance_jax import lexical
from ance_jax import logs
from ance_jax import mine
from ance_jax import runs
from ance_jax import schedule
from ance_jax import tokens

# Queries that the overlap of two refreshes is measured on, at most.
_PROBE_QUERIES = 2048


def refresh(run, step, *, before=None):
  """Mines the training queries' negatives with the checkpoint of a step.

  Args:
    run: `runs.Run` with the training and the dev split.
    step: int, step of a committed checkpoint.
    before: int, step of the refresh whose negatives these are compared with,
      or None.

  Returns:
    The manifest of the published folder: 'step', 'weights_hash', what else the
    negatives depend on, 'metrics' by name, 'secs' by phase, and 'examples'. If
    that very refresh was published before, it is taken.
  """
  config, watch = run.config, logs.Stopwatch()
  params = checkpoint.read_params(
    config.workdir, step, encoders.shapes(run.retriever), run.devices
  )
  weights_hash = checkpoint.weights_hash(params)
  about = {'step': step, 'weights_hash': weights_hash, **_sources(run)}
  folder = _folder(run, step)
  if published := handoff.find(folder, about):
    return published
  indexed = evaluate.index_corpus(run, params, watch)
  negatives, mined = _mine(run, params, indexed, watch)
  if before is not None:
    probe = slice(None, None, -(-len(negatives) // _PROBE_QUERIES))
    mined['overlap'] = mine.overlap(negatives[probe], load(run, before)[probe])
  if indexed.real_tokens is not None:
    mined['real_tokens'] = indexed.real_tokens
  scores, ranking = evaluate.evaluate(
    run, params, indexed, config.dev_split, watch
  )
  values = {f'dev/{name}': value for name, value in scores.items()}
  values |= {f'refresh/{name}': value for name, value in mined.items()}
  shown = evaluate.examples(run, ranking, config.dev_split)
  manifest = {**about, 'metrics': values, 'secs': watch.secs, 'examples': shown}
  with handoff.publish(folder, manifest) as unfinished:
    np.save(unfinished / 'negatives.npy', negatives)
  return handoff.read_manifest(folder)


def load(run, step):
  """Returns the (Q, K) int32 negatives of a refresh, as a map.

  Where it is gone or damaged it is made again, of the checkpoint of its step.

  Raises:
    BadInput: That checkpoint is not there, or damaged too.
  """
  if not handoff.find(_folder(run, step), _sources(run)):
    logs.say(f'the refresh of step {step} is not there: it is made again')
    refresh(run, step)
  return handoff.load_array(_folder(run, step) / 'negatives.npy')


def bm25_negatives(run):
  """Returns the (Q, K) int32 negatives of BM25, mined once a run."""
  config = run.config
  about = {**_sources(run), 'k1': config.bm25_k1, 'b': config.bm25_b}
  folder = run.workdir / 'bm25'
  if not handoff.find(folder, about):
    split = run.splits[config.train_split]
    texts = list(tokens.passage_texts(run.corpus, tokens.SPACE))
    rank = lexical.make_rank(texts, k1=config.bm25_k1, b=config.bm25_b)

    def find(rows, depth):
      return rank([split.texts[int(row)] for row in rows], depth, None).rows

    negatives, counts = mine.hard_negatives(
      find, _positives(run), config.top_k, config.seed, 'mine with BM25'
    )
    logs.say(f'BM25 negatives: {_counts(counts)}')
    with handoff.publish(folder, {**about, 'metrics': counts}) as unfinished:
      np.save(unfinished / 'negatives.npy', negatives)
  return handoff.load_array(folder / 'negatives.npy')


def check(run):
  """Raises `BadInput` for settings that would stop the run later."""
  config = run.config
  index.check(
    config.index,
    config.index_params,
    run.retriever.embedding_size,
    len(run.passages),
  )
  steps = (0, config.max_steps)
  rows = [schedule.method_at(config, step) for step in steps]
  mined = any(row.negatives in ('bm25', 'index') for row in rows)
  if mined or config.job == 'refresh':
    _check_depth(run)


def _check_depth(run):
  config = run.config
  most = int(_positives(run).banned.max())
  if config.top_k + most > len(run.passages):
    raise config_lib.BadInput(
      '--top_k and the positives of a query must together be at most the '
      f'{len(run.passages):,} passages of the corpus; found {config.top_k} and '
      f'up to {most}; lower --top_k.'
    )
  if config.hard_negatives > config.top_k:
    raise config_lib.BadInput(
      '--hard_negatives, drawn from the top k, must be at most --top_k; found '
      f'{config.hard_negatives} and {config.top_k}; change one.'
    )


def run(config):
  """Makes one refresh with `--checkpoint`: `--job=refresh`."""
  this, _, step = runs.read(config, (config.train_split, config.dev_split))
  if not runs.is_run(config.workdir):
    raise config_lib.BadInput(
      '--job=refresh must be given a run; found none in '
      f'{config.workdir}; train one there first.'
    )
  check(this)
  logs.say(summary(refresh(this, step)))


def summary(manifest, negatives_age=None):
  """Returns the one line that a person sees of a refresh.

  Args:
    manifest: What `refresh` returned.
    negatives_age: int, age in steps of the negatives that end here, or None.
  """
  values, secs = manifest['metrics'], manifest['secs']
  found = {k.removeprefix('refresh/'): v for k, v in values.items()}
  line = f'refresh at step {manifest["step"]}: {dev_summary(values)}'
  if negatives_age is not None:
    line += f' | negatives_age {negatives_age}'
  if 'overlap' in found:
    line += f' | overlap with the last {found["overlap"]:.1%}'
  line += f' | {_counts(found)}'
  if 'real_tokens' in found:
    line += f' | {found["real_tokens"]:.1%} real tokens'
  return line + ' | ' + ', '.join(f'{k} {v:.1f} s' for k, v in secs.items())


def dev_summary(values):
  """Returns the text of the dev metrics among `values`."""
  return 'dev ' + ', '.join(
    f'{name.removeprefix("dev/")} {values[name]:.4f}'
    for name in ('dev/mrr@10', 'dev/ndcg@10', 'dev/recall@100')
  )


def _mine(run, params, indexed, watch):
  """Returns the (Q, K) int32 negatives, and counts of what was dropped."""
  config = run.config
  queries = evaluate.encode_queries(run, params, config.train_split, watch)

  def find(rows, depth):
    with watch.phase('search'):
      return index.search(indexed.faiss_index, queries[rows], depth).rows

  before = watch.secs.get('search', 0.0)
  with watch.phase('mine'):
    negatives, counts = mine.hard_negatives(
      find,
      _positives(run),
      config.top_k,
      config.seed,
      f'search and mine {config.train_split}',
    )
  watch.secs['mine'] -= watch.secs['search'] - before
  return negatives, counts


def _positives(run):
  queries, passages = run.splits[run.config.train_split].positives()
  return mine.make_positives(
    queries,
    passages,
    run.corpus.groups,
    len(run.queries[run.config.train_split]),
  )


def _sources(run):
  """Returns what negatives depend on, besides the weights."""
  config = run.config
  return {
    'passages': run.passages.hash,
    'queries': run.queries[config.train_split].hash,
    'judgements': run.splits[config.train_split].hash,
    'groups': run.corpus.hash,
    'index': config.index,
    'index_params': config.index_params,
    'top_k': config.top_k,
    'seed': config.seed,
  }


def _counts(counts):
  return (
    f'dropped {counts["judged"]:,} judged, {counts["same_text"]:,} of their '
    f'text; {counts["random"]:,} drawn at random'
  )


def _folder(run, step):
  return run.workdir / 'refresh' / f'{step:08d}'
