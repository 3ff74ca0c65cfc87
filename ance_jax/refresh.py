"""One refresh: encode -> index -> search -> mine -> evaluate -> publish.

It reads the parameters of a committed checkpoint from disk, also when it runs
inside of training, so that what is mined belongs to weights that a restart
would train on from; and it publishes a folder that is there whole or not at
all. It is a function of (checkpoint, data, settings): made again, the same.
"""

import numpy as np

from ance_jax import answers
from ance_jax import batches
from ance_jax import checkpoint
from ance_jax import config as config_lib
from ance_jax import encoders
from ance_jax import evaluate
from ance_jax import handoff
from ance_jax import index
from ance_jax import lexical
from ance_jax import logs
from ance_jax import methods
from ance_jax import mine
from ance_jax import runs
from ance_jax import schedule
from ance_jax import tokenizer as tokenizer_lib
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
  if not handoff.find(_folder(run, step), _sources(run)):
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
    table = bm25_negatives(run)
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


def bm25_negatives(run):
  """Returns the (Q, K) int32 negatives of BM25, mined once a run."""
  config = run.config
  about = {**_sources(run), 'k1': config.bm25_k1, 'b': config.bm25_b}
  folder = run.workdir / 'bm25'
  if not handoff.find(folder, about):
    split = run.splits[config.train_split]
    negatives, counts = mine.hard_negatives(
      _given_rank(split) if split.negatives else _bm25_rank(run, split),
      _positives(run, methods.METHODS['bm25'], (0, len(split.ids))),
      config.top_k,
      config.seed,
      'mine with BM25',
    )
    where = ' of the data' if split.negatives else ''
    logs.say(f'BM25 negatives{where}: {_counts(counts)}')
    with handoff.publish(folder, {**about, 'metrics': counts}) as unfinished:
      np.save(unfinished / 'negatives.npy', negatives)
  return handoff.load_array(folder / 'negatives.npy')


def _bm25_rank(run, split):
  """Returns rank(query rows, depth) -> passage rows by BM25."""
  config = run.config
  texts = list(tokens.passage_texts(run.corpus, tokenizer_lib.SPACE))
  rank = lexical.make_rank(texts, k1=config.bm25_k1, b=config.bm25_b)

  def find(rows, depth):
    return rank([split.texts[int(row)] for row in rows], depth, None).rows

  return find


def _given_rank(split):
  """Returns rank(query rows, depth) -> passage rows that the data brings."""

  def find(rows, depth):
    found = np.full((len(rows), depth), -1, np.int32)
    for place, row in enumerate(rows):
      given = split.negatives[int(row)][:depth]
      found[place, : len(given)] = given
    return found

  return find


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
  _check_queries(run)


def _check_queries(run):
  """Raises `BadInput` where a row cannot have the queries that it needs."""
  config, split = run.config, run.splits[run.config.train_split]
  if config.query_slices > len(split.ids):
    raise config_lib.BadInput(
      f'--query_slices must be at most the {len(split.ids):,} training '
      f'queries; found {config.query_slices}; lower it.'
    )
  if config.query_slices > 1 and not _row(run).refreshes:
    raise config_lib.BadInput(
      '--query_slices must be 1 for rows that do not mine from the index; '
      f'found {config.query_slices} with --method={config.method}; leave it '
      'out.'
    )
  if _row(run).without_answers:
    given = split.answers or [[] for _ in range(len(split.ids))]
    without = sum(not texts for texts in given)
    if without:
      raise config_lib.BadInput(
        f'--method={config.method} must have answers to each training query, '
        f'in answers.jsonl; found {without:,} queries without; add them, or '
        'use another row.'
      )


def _check_depth(run):
  config = run.config
  slices = (0, len(run.splits[config.train_split].ids))
  most = int(_positives(run, _row(run), slices).banned.max())
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
      return index.search(indexed.faiss_index, queries[rows], depth).rows

  before = watch.secs.get('search', 0.0)
  with watch.phase('mine'):
    negatives, counts = mine.hard_negatives(
      find,
      _positives(run, method, (start, end)),
      config.top_k,
      config.seed,
      f'search and mine {config.train_split}',
    )
    if method.without_answers:
      split = run.splits[config.train_split]
      negatives, left_out = answers.without(
        negatives,
        split.answers[start:end],
        run.corpus.texts,
        split.answers_are_patterns,
        'leave out answers',
      )
      counts |= left_out
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


def _positives(run, method, rows):
  """Returns the `mine.Positives` of query rows from one to another."""
  split = run.splits[run.config.train_split]
  queries, passages, groups = batches.judged(split, run.corpus, method)
  if split.own is not None:
    (with_own,) = np.nonzero(split.own >= 0)
    queries = np.concatenate([queries, with_own])
    passages = np.concatenate([passages, split.own[with_own]])
  here = (queries >= rows[0]) & (queries < rows[1])
  return mine.make_positives(
    queries[here] - rows[0], passages[here], groups, rows[1] - rows[0]
  )


def _sources(run):
  """Returns what negatives depend on, besides the weights."""
  config = run.config
  split = run.splits[config.train_split]
  return {
    **({} if split.own is None else {'own': True}),
    'passages': run.passages.hash,
    'queries': run.queries[config.train_split].hash,
    'judgements': split.hash,
    'groups': run.corpus.hash,
    'index': config.index,
    'index_params': config.index_params,
    'center_passages': config.center_passages,
    'top_k': config.top_k,
    'hard_negatives': config.hard_negatives,
    'method': config.method,
    'seed': config.seed,
  }


def _counts(counts):
  text = (
    f'dropped {counts["judged"]:,} judged, {counts["same_text"]:,} of their '
    f'text; {counts["random"]:,} drawn at random'
  )
  if 'answers' in counts:
    text += (
      f'; {counts["answers"]:,} with an answer left out, '
      f'{counts["no_negatives"]:,} queries without negatives'
    )
  return text


def _folder(run, step):
  return run.workdir / 'refresh' / f'{step:08d}'
