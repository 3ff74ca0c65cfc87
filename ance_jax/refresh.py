"""One refresh: encode -> index -> search -> mine -> evaluate -> publish.

It reads the parameters of a committed checkpoint from disk, also when it runs
inside of training, so that what is mined belongs to weights that a restart
would train on from; and it publishes a folder that is there whole or not at
all. It is a function of (checkpoint, data, settings): made again, the same.
"""

import numpy as np

from ance_jax import batches
from ance_jax import checkpoint
from ance_jax import config as config_lib
from ance_jax import encoders
from ance_jax import evaluate
from ance_jax import handoff
from ance_jax import logs
from ance_jax import methods
from ance_jax import mine
from ance_jax import negatives as negatives_lib
from ance_jax import runs
from ance_jax import schedule

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
  about = {
    'step': step,
    'weights_hash': weights_hash,
    **negatives_lib.sources(run),
  }
  about['query_slice'] = list(_query_slice(run, step))
  folder = _folder(run, step)
  if published := handoff.find(folder, about):
    return published
  indexed = evaluate.index_corpus(run, params, watch)
  negatives, mined = _mine(run, step, params, indexed, watch)
  if before is not None and _is_whole(run):
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
  """Returns the negatives of a refresh as a map, (q, K) or (q, H) int32.

  They are those of its slice's queries; -1 where a query has fewer. Where they
  are gone or damaged they are made again, of the checkpoint of their step.

  Raises:
    BadInput: That checkpoint is not there, or damaged too.
  """
  if not handoff.find(_folder(run, step), negatives_lib.sources(run)):
    logs.say(f'the refresh of step {step} is not there: it is made again')
    refresh(run, step)
  return handoff.load_array(_folder(run, step) / 'negatives.npy')


def negatives_for(run, method, step):
  """Returns the `batches.Negatives` to train on, or None for no table.

  Args:
    run: `runs.Run`.
    method: A row of the method table.
    step: int, that of the refresh in use; only for rows that refresh.

  Raises:
    BadInput: As for `load`; or no query has any negatives.
  """
  if method.negatives == 'bm25':
    table = negatives_lib.by_bm25(run)
    return batches.Negatives(np.arange(len(table)), table, 0)
  return _in_use(run, step) if method.refreshes else None


def _in_use(run, step):
  passages, (start, end) = load(run, step), _query_slice(run, step)
  rows, whole = np.arange(start, end), len(run.queries[run.config.train_split])
  any_left = passages[:, 0] >= 0
  if not any_left.any():
    raise config_lib.BadInput(
      'a refresh must leave negatives to a query at least; found that all '
      f'{len(rows):,} of the refresh of step {step} have an answer in each of '
      f'their top {run.config.top_k}; raise --top_k, or check the answers.'
    )
  if not any_left.all():
    rows, passages = rows[any_left], passages[any_left]
  since = step if len(rows) < whole or _row(run).triplets else 0
  return batches.Negatives(rows, passages, since)


def run(config):
  """Makes one refresh with `--checkpoint`: `--job=refresh`."""
  this, _, step = runs.read(config, (config.train_split, config.dev_split))
  if not runs.is_run(config.workdir):
    raise config_lib.BadInput(
      '--job=refresh must be given a run; found none in '
      f'{config.workdir}; train one there first.'
    )
  negatives_lib.check(this)
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
  line += f' | {negatives_lib.counts_text(found)}'
  if 'real_tokens' in found:
    line += f' | {found["real_tokens"]:.1%} real tokens'
  return line + ' | ' + ', '.join(f'{k} {v:.1f} s' for k, v in secs.items())


def dev_summary(values):
  """Returns the text of the first two and the last dev metric of `values`."""
  *first, last = [name for name in values if name.startswith('dev/')]
  return 'dev ' + ', '.join(
    f'{name.removeprefix("dev/")} {values[name]:.4f}'
    for name in (*first[:2], last)
  )


def _mine(run, step, params, indexed, watch):
  """Returns the negatives as `load` does, and counts of what was dropped."""
  config, method = run.config, _row(run)
  start, end = _query_slice(run, step)
  queries = evaluate.encode_queries(
    run, params, config.train_split, watch, np.arange(start, end)
  )

  def find(rows, depth):
    with watch.phase('search'):
      return indexed.search(queries[rows], depth).rows

  before = watch.secs.get('search', 0.0)
  with watch.phase('mine'):
    negatives, counts = negatives_lib.of_ranking(
      run, method, find, (start, end), f'search and mine {config.train_split}'
    )
    if method.triplets:
      seed = [config.seed, step]
      negatives = mine.draw(negatives, config.hard_negatives, seed)
  watch.secs['mine'] -= watch.secs['search'] - before
  return negatives, counts


def _row(run):
  return methods.METHODS[run.config.method]


def _is_whole(run):
  """Returns whether a refresh publishes all of each query's top K."""
  row = _row(run)
  return run.config.query_slices == 1 and not (
    row.triplets or row.without_answers
  )


def _query_slice(run, step):
  """Returns the first query row that a refresh mines, and the one behind."""
  whole = len(run.queries[run.config.train_split])
  size = whole // run.config.query_slices
  number = schedule.query_slice(run.config, step)
  # The last one takes what is left over, as in ANCE (run_ann_data_gen.py).
  last = number == run.config.query_slices - 1
  return number * size, whole if last else (number + 1) * size


def _folder(run, step):
  return run.workdir / 'refresh' / f'{step:08d}'
