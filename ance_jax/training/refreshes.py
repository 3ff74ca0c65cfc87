"""One refresh: encode -> index -> search -> mine -> evaluate -> publish.

A refresh reads the parameters of a committed checkpoint from disk, even inside
training, so that the negatives belong to weights from which a restart would
resume. It publishes its folder atomically. It is a deterministic function of
(checkpoint, data, settings), and of the refresh before for a row with momentum.
"""

import collections
import pathlib
import shutil
from typing import Any
from typing import NamedTuple

import numpy as np

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.core import remote
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import trec
from ance_jax.mining import candidates
from ance_jax.mining import selection
from ance_jax.models import bi_encoder
from ance_jax.retrieval import corpus_index
from ance_jax.training import batches
from ance_jax.training import diagnostics
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import negatives as negatives_lib
from ance_jax.training import schedule
from ance_jax.training import teachers

_FOLDER = 'refresh'
# Format of a refresh's folder; a manifest without a format has format 1.
_FORMAT = 1
# Functions that mine once per run, by source.
_ONCE = {'bm25': negatives_lib.by_bm25, 'given': negatives_lib.by_given}
# Each source has a stream of random numbers of its own.
_DRAWN_FROM = 'index', 'lookahead', 'bm25', 'given'
# Names of a manifest's items in messages.
_NOUNS = {
  'run': 'run',
  'checkpoint': 'checkpoint',
  'tokenizer': 'tokenizer',
  'passages': 'corpus or tokenizer',
  'queries': 'split of queries or tokenizer',
  'judgements': 'set of judgements',
  'own': 'set of equal texts',
  'groups': 'corpus',
  'query_slice': 'slice of the training queries',
  'rules': 'set of rules for negatives',
  'hard_negatives': '--num_hard_negatives',
}


class Published(NamedTuple):
  """What later refreshes and evaluations compare with.

  Attributes:
    table: The negatives, memory-mapped.
    seen: The measurements, memory-mapped.
  """

  table: diagnostics.Table
  seen: diagnostics.Seen


def refresh(
  run: experiment.Experiment, step: int, *, before: int | None = None
) -> dict[str, Any]:
  """Mines the training queries' negatives with the checkpoint of a step.

  Args:
    run: The run, with the training and the dev split.
    step: Step of a committed checkpoint.
    before: Step of the refresh to compare the negatives with, if any.

  Returns:
    The manifest of the published folder: 'step', 'weights_hash', all other
    inputs of the negatives, 'metrics' by name, 'secs' and 'flops' by phase, and
    'examples'. An identical published refresh is reused. With
    `--refresh_trigger` the refresh may only evaluate dev; then 'mined' is false
    and nothing is published. The published files are checked when they are
    loaded.
  """
  config, watch = run.config, logs.Stopwatch()
  whose = checkpoint.identity(config.workdir, step)
  params = checkpoint.read_params(
    config.workdir, step, bi_encoder.shapes(run.retriever.config), run.devices
  )
  run = run.with_params(params)
  # Of one tower both are the same, and that takes a second.
  passage_hash = run.retriever.passage_hash()
  is_all = run.retriever.config.tied
  about = {
    'step': step,
    'checkpoint': whose,
    'weights_hash': passage_hash if is_all else checkpoint.weights_hash(params),
    'query_slice': list(_query_slice(run, step)),
    **_sources(run),
  }
  before_it = _step_before(run, step)
  if 'momentum' in _row(run).sources and before_it is not None:
    files = manifest(run, before_it)['files']
    about['momentum'] = [before_it, files['negatives.npy']]
  if found := distributed.broadcast(lambda: _find(run, step, about)):
    teachers.forget(run.workdir, str(step))
    return found
  indexed = run.index_corpus(watch, passage_hash)
  seen = diagnostics.probe(run, indexed, watch)
  last = None if before is None else read(run, before)
  if last and _is_fresh(run, seen, last):
    found, _ = assess(run, indexed, seen, last, watch)
    return {**about, **found, 'mined': False}
  mined, counts = _mine(run, step, indexed, watch)
  if last and _is_whole(run):
    probe = seen.rows
    counts['overlap'] = selection.overlap(
      mined.negatives[probe], last.table.passages[probe]
    )
  if indexed.real_tokens is not None:
    counts['real_tokens'] = indexed.real_tokens
  table = diagnostics.Table(_query_slice(run, step)[0], mined.negatives)
  found, now = assess(run, indexed, seen, last, watch, table)
  found['metrics'] |= {f'refresh/{name}': n for name, n in counts.items()}
  encoder = run.retriever.config
  made = {
    **about,
    **found,
    'format': _FORMAT,
    'mined': True,
    'lengths': [encoder.query_length, encoder.passage_length],
    'made_with': devices_lib.describe(run.devices),
  }
  return _publish(run, step, made, {**mined.arrays(), **now._asdict()})


def _publish(run, step, made, arrays):
  """Publishes {name: array} with a manifest, and returns the manifest."""
  if distributed.is_first():
    with atomic.publish(folder(run, step), made) as unfinished:
      negatives_lib.save(unfinished, arrays)
    remote.push(folder(run, step))
  distributed.barrier('published')
  if distributed.is_first():
    teachers.forget(run.workdir, str(step))
  return atomic.read_json(folder(run, step) / atomic.MANIFEST)


def assess(
  run: experiment.Experiment,
  indexed: corpus_index.IndexedCorpus,
  seen: diagnostics.Probe,
  in_use: Published | None,
  watch: logs.Stopwatch,
  mined: diagnostics.Table | None = None,
) -> tuple[dict[str, Any], diagnostics.Seen]:
  """Evaluates dev and the probe with the current weights.

  Args:
    run: The run, with parameters.
    indexed: The corpus, indexed with the same parameters.
    seen: Probe of the same parameters.
    in_use: The active refresh, if any.
    watch: Times the phases.
    mined: Negatives mined by this refresh, if any.

  Returns:
    'metrics', 'secs', 'flops', 'examples' and 'passage_hash' for a manifest,
    and the measurements for the next comparison.
  """
  split, scores, ranking, examples = run.config.dev_split, {}, None, []
  if split in run.dataset.splits:
    scores, ranking = run.evaluate(indexed, split, watch)
    examples = corpus_index.examples(
      ranking, run.dataset.splits[split], run.dataset.corpus, run.config.seed
    )
  tables = {}
  if in_use is not None:
    tables['in_use'] = in_use.table
  else:
    for source in _once(schedule.method(run.config, None, 0)):
      made = _ONCE[source](run)
      tables[source] = diagnostics.Table(0, made.negatives)
  if mined is not None:
    tables['mined'] = mined
  with watch.phase('probe'):
    found, now = diagnostics.look(
      run, seen, indexed, ranking, tables, in_use.seen if in_use else None
    )
  values = {f'dev/{name}': value for name, value in scores.items()}
  values |= {f'probe/{name}': value for name, value in found.items()}
  return {
    'metrics': values,
    'secs': watch.secs,
    'flops': watch.flops,
    'examples': examples,
    'passage_hash': indexed.passage_hash,
  }, now


def manifest(run: experiment.Experiment, step: int) -> dict[str, Any]:
  """Returns the manifest of a refresh, as `refresh` does.

  A missing or damaged refresh is made again from the checkpoint of its step.

  Raises:
    BadInput: That checkpoint is missing or damaged too.
  """
  about = _sources(run)
  found = distributed.broadcast(lambda: _find(run, step, about))
  if not found:
    logs.log(f'the refresh of step {step} is not there: it is made again')
    found = refresh(run, step)
  return found


def load(run: experiment.Experiment, step: int) -> negatives_lib.Stored:
  """Returns a refresh's negatives, memory-mapped; the q queries are its slice.

  Raises:
    BadInput: As for `manifest`.
  """
  manifest(run, step)
  return negatives_lib.load(folder(run, step))


def read(run: experiment.Experiment, step: int) -> Published:
  """Returns a refresh for comparison; raises as `load` does."""
  start, stored = _query_slice(run, step)[0], load(run, step)
  arrays = (
    atomic.load_array(folder(run, step) / f'{name}.npy')
    for name in diagnostics.Seen._fields
  )
  table = diagnostics.Table(start, stored.negatives)
  return Published(table, diagnostics.Seen(*arrays))


def _find(run, step, about):
  """Returns `negatives.find` of a refresh, copied in first if it is remote."""
  remote.pull(folder(run, step))
  found = negatives_lib.find(folder(run, step), about)
  return found if found and _has_format(found) else None


def prune_embeddings(run: experiment.Experiment, made: dict[str, Any]) -> None:
  """Deletes all embeddings except those of a refresh or an evaluation.

  Args:
    run: The run.
    made: As `refresh` or `assess` returns it; a refresh of an older release has
      only 'weights_hash'.
  """
  passage_hash = made.get('passage_hash') or made['weights_hash']
  corpus_index.prune_embeddings(run.embeddings_folder(passage_hash))


def fetch(run: experiment.Experiment, after: int) -> None:
  """Copies the newest refresh in from the run's `--remote_dir`, if it has one.

  Args:
    run: The run.
    after: Only a refresh of a later step is copied; -1 for any.
  """
  remote.pull_newest(run.workdir / _FOLDER, after)


def published(run: experiment.Experiment) -> list[int]:
  """Returns the steps of all refreshes in the run's folder, in order."""
  folders = (run.workdir / _FOLDER).glob('[0-9]*')
  return sorted(int(f.name) for f in folders if f.name.isdigit())


def refusal(run: experiment.Experiment, manifest: dict[str, Any]) -> str | None:
  """Returns why a refresh does not belong to the run; None if it does.

  Args:
    run: The run.
    manifest: Manifest of a folder among the run's refreshes.
  """
  if not _has_format(manifest):
    return f'it has format {manifest["format"]}, not {_FORMAT}'
  step = manifest.get('step')
  expected = {'step': step, 'rules': None, **_sources(run)}
  if isinstance(step, int):
    expected['query_slice'] = list(_query_slice(run, step))
  whose = checkpoint.identity(run.config.workdir, step)
  if whose:  # Otherwise its checkpoint may have been deleted.
    expected['checkpoint'] = whose
  for name, value in expected.items():
    if manifest.get(name) != value:
      return (
        f'it is of another {_NOUNS.get(name, f"--{name}")}, '
        f'{str(manifest.get(name))[:99]!r}, here {str(value)[:99]!r}'
      )
  return None


def _has_format(manifest):
  return manifest.get('format', 1) == _FORMAT


def adopt(run: experiment.Experiment, other: str, step: int) -> dict[str, Any]:
  """Publishes a refresh of another run as a refresh of this run.

  Args:
    run: A run with the same data and settings.
    other: Folder of the other run.
    step: Step of the refresh.

  Returns:
    The manifest, as `refresh` does.

  Raises:
    BadInput: The refresh is missing, or has other data or settings.
  """
  there = pathlib.Path(other) / _FOLDER / f'{step:08d}'
  manifest = atomic.read_manifest(there)
  whose = checkpoint.identity(run.config.workdir, step)
  ours = {'run': run.id, 'checkpoint': whose}
  wrong = refusal(run, {**manifest, **ours}) if manifest else 'it is not there'
  if wrong:
    raise errors.refusal(
      f'the refresh {there} cannot be replayed: {wrong}', 'replay another run'
    )
  if distributed.is_first():
    with atomic.publish(folder(run, step), {**manifest, **ours}) as unfinished:
      for name in manifest['files']:
        shutil.copyfile(there / name, unfinished / name)
    remote.push(folder(run, step))
  distributed.barrier('adopted')
  return atomic.read_manifest(folder(run, step))


def negatives_for(
  run: experiment.Experiment,
  method: methods.Method,
  in_use: schedule.ActiveRefresh | None,
) -> batches.Negatives | None:
  """Returns the negatives to train on, or None for rows without a table.

  Args:
    run: The run.
    method: Row of the method table.
    in_use: Active refresh, for rows that refresh.

  Raises:
    BadInput: As for `load`, or no query has any negatives.
  """
  if method.refreshes:
    since, step = in_use[:2]
    return of_table(run, _query_slice(run, step)[0], load(run, step), since)
  for source in _once(method):
    return of_table(run, 0, _ONCE[source](run), 0)
  return None


def peek(
  run: experiment.Experiment,
  method: methods.Method,
  in_use: schedule.ActiveRefresh | None,
) -> batches.Negatives | None:
  """Returns the negatives that a run has on disk, whatever their rules.

  Args:
    run: The run; nothing is written into its folder.
    method: Row of the method table.
    in_use: Active refresh, if any.

  Returns:
    As `negatives_for`, and None where nothing is published.
  """
  if in_use:
    since, step = in_use[:2]
    start, there = _query_slice(run, step)[0], folder(run, step)
  else:
    start, since = 0, 0
    there = next((run.workdir / name for name in _once(method)), None)
  if there is None or not atomic.is_committed(there):
    return None
  return of_table(run, start, negatives_lib.load(there), since)


def _once(method):
  """Returns the sources of a row that are mined once per run."""
  return [source for source in method.sources if source in _ONCE]


def of_table(
  run: experiment.Experiment,
  start: int,
  stored: negatives_lib.Stored,
  since: int,
) -> batches.Negatives:
  """Returns the negatives to train on, without queries that have none.

  Args:
    run: The run.
    start: Row of the first query.
    stored: Negatives of consecutive queries.
    since: Step at which they become active.

  Raises:
    BadInput: No query has any negatives.
  """
  stored, first_pair = _of_drawn(run, start, stored)
  passages, scores, positive_scores, taught, positive_taught = stored
  rows = start + np.arange(len(passages))
  whole = len(run.dataset.queries[run.config.train_split])
  any_left = passages[:, 0] >= 0
  if not any_left.any():
    raise errors.refusal(
      f'mining left none of {len(rows):,} training queries a negative of its '
      f'top {run.config.top_k}, as the line of its counts says',
      'loosen the filter that rejected most, or raise --top_k',
    )
  if not any_left.all():
    rows, passages, scores, taught = (
      None if column is None else column[any_left]
      for column in (rows, passages, scores, taught)
    )
  since = since if len(rows) < whole or _row(run).triplets else 0
  return batches.Negatives(
    rows,
    passages,
    since,
    scores,
    taught,
    first_pair,
    positive_scores,
    positive_taught,
  )


def _of_drawn(run, start, stored):
  """Keeps the scores of positives that a step may draw.

  Of rows with one positive a query, these are the first of each query.

  Returns:
    The `Stored`, and the index of its first positive in `TrainingData`.
  """
  if stored.positive_scores is None and stored.positive_taught is None:
    return stored, 0
  split, last = (
    run.dataset.splits[run.config.train_split],
    _row(run).last_positive,
  )
  queries, _ = split.shared_positives(last=last)
  begin = int(np.searchsorted(queries, start))
  if not last:
    return stored, begin
  here = queries[begin:][: len(stored.positive_scores)]
  first = np.unique(here, return_index=True)[1]
  return stored._replace(positive_scores=stored.positive_scores[first]), start


def summary(manifest: dict[str, Any], negatives_age: int | None = None) -> str:
  """Returns the log line of a refresh.

  Args:
    manifest: Manifest, as `refresh` returns it.
    negatives_age: Age in steps of the negatives that it replaces, if any.
  """
  values, secs = manifest['metrics'], manifest['secs']
  found = {k.removeprefix('refresh/'): v for k, v in values.items()}
  line = f'refresh at step {manifest["step"]}: {dev_summary(values)}'
  if not manifest['mined']:
    share = values['probe/overlap']
    return f'{line} | left out, as {share:.1%} of what is in use is still hard'
  if negatives_age is not None:
    line += f' | negatives_age {negatives_age}'
  if 'overlap' in found:
    line += f' | overlap with the last {found["overlap"]:.1%}'
  line += f' | {negatives_lib.counts_text(found)}'
  if values.get('probe/above_positive') == 0:
    line += ' | no negative scores as high as its positive: little to learn'
  if 'real_tokens' in found:
    line += f' | {found["real_tokens"]:.1%} real tokens'
  return line + ' | ' + ', '.join(f'{k} {v:.1f} s' for k, v in secs.items())


def dev_summary(values: dict[str, float]) -> str:
  """Returns the first two and the last dev metric of `values` as text.

  Without a dev split, it has the rank of training positives instead.
  """
  names = [name for name in values if name.startswith('dev/')]
  if not names:
    rank = values['probe/positive_rank']
    return f'no dev split, median rank of training positives {rank:g}'
  *first, last = names
  return 'dev ' + ', '.join(
    f'{name.removeprefix("dev/")} {values[name]:.4f}'
    for name in (*first[:2], last)
  )


def _mine(run, step, indexed, watch):
  """Returns the `Stored` negatives of a refresh and the counts of the rules."""
  config, method = run.config, _row(run)
  start, end = _query_slice(run, step)
  queries = run.encode_queries(config.train_split, watch, np.arange(start, end))
  by_index = candidates.of_index(indexed, queries, f'step {step}', start)
  counts, known = collections.Counter(), negatives_lib.known_of(run)

  def mined_from(source):
    found, counted = negatives_lib.select_negatives(
      run,
      method,
      source._replace(rank=_timed(source.rank, indexed, watch)),
      (start, end),
      f'search and mine {config.train_split}',
      holds_answer=known,
    )
    counts.update(counted)
    return found

  before = watch.secs.get('search', 0.0)
  with watch.phase('mine'):
    found = mined_from(by_index)
    rows, scores = found.rows, found.scores
    if len(method.sources) > 1:
      ahead = _lookahead(run, indexed, by_index, (start, end))
      tables = {
        'index': lambda: rows,
        'lookahead': lambda: mined_from(ahead).rows,
        'momentum': lambda: _negatives_before(run, step, len(queries)),
        **{n: lambda n=n: _ONCE[n](run).negatives[start:end] for n in _ONCE},
      }
      rows = selection.union(
        _some_of(config, tables[name](), name, step) for name in method.sources
      )
      scores = indexed.scores(queries, rows)
      counts['no_negatives'] = int((rows[:, 0] < 0).sum())
    if method.triplets:
      random = np.random.default_rng([config.seed, step])
      columns = selection.draw(random, rows, config.num_hard_negatives)
      rows = np.take_along_axis(rows, columns, 1)
      scores = np.take_along_axis(scores, columns, 1)
    made = negatives_lib.Stored(rows, scores, found.positive_scores)
    made, taught = negatives_lib.teach(
      run, method, made, start, keep=str(step), dealt=True
    )
    # Other processes read the file at the next refresh, after a barrier.
    if known and distributed.is_first():
      known.save()
  watch.secs['mine'] -= watch.secs['search'] - before
  return made, {**counts, **taught}


def _some_of(config, table, name, step):
  """Returns `--negatives_per_source` of each row of a source's (q, K) table."""
  if not config.negatives_per_source or name == 'momentum':
    return table
  place = _DRAWN_FROM.index(name)
  random = np.random.default_rng([config.seed, step, place])
  columns = selection.draw(random, table, config.negatives_per_source)
  return np.take_along_axis(table, columns, 1)


def _timed(rank, indexed, watch):
  """Returns a `rank` that adds its seconds and operations to the watch."""

  def timed(rows, depth):
    watch.add_flops('search', indexed.search_flops(len(rows)))
    with watch.phase('search'):
      return rank(rows, depth)

  return timed


def _lookahead(run, indexed, by_index, rows):
  """Returns a source that ranks by the first positive of each query.

  Sun et al. 2022 (ANCE-Tele), section 3.2. The scores are the query's own.

  Args:
    run: `experiment.Experiment`.
    indexed: `corpus_index.IndexedCorpus`.
    by_index: Source that ranks by the query.
    rows: First query row, and one past the last.
  """
  split = run.dataset.splits[run.config.train_split]
  queries, positives = split.shared_positives(last=_row(run).last_positive)
  first = positives[np.searchsorted(queries, np.arange(*rows))]
  ahead = candidates.of_index(indexed, indexed.embeddings(first), '', rows[0])

  def rank(of_query, depth):
    found = ahead.rank(of_query, depth).rows
    scores = by_index.score(of_query.repeat(found.shape[1]), found.ravel())
    return trec.Ranking(found, scores.reshape(found.shape))

  return by_index._replace(rank=rank)


def _negatives_before(run, step, number):
  """Returns the (q, K) negatives of the scheduled refresh before a step."""
  before = _step_before(run, step)
  if before is None:
    return np.full((number, 1), -1, np.int32)
  return load(run, before).negatives


def _step_before(run, step):
  """Returns the step of the scheduled refresh before a step, or None."""
  return next(reversed(schedule.refreshes_between(run.config, -1, step)), None)


def _is_fresh(run, seen, last):
  """Returns whether the negatives of `last` are still hard enough."""
  trigger = run.config.refresh_trigger
  if not trigger:
    return False
  return diagnostics.stale_overlap(seen, last.table) >= trigger


def _row(run):
  return methods.METHODS[run.config.method]


def _is_whole(run):
  """Returns whether a refresh publishes the whole top K of all queries."""
  row = _row(run)
  return run.config.query_slices == 1 and not (
    row.triplets or row.without_answers
  )


def _query_slice(run, step):
  """Returns the first query row that a refresh mines, and one past the last."""
  whole = len(run.dataset.queries[run.config.train_split])
  size = whole // run.config.query_slices
  number = schedule.query_slice(run.config, step)
  # The last slice takes the remainder, as in ANCE (run_ann_data_gen.py).
  last = number == run.config.query_slices - 1
  return number * size, whole if last else (number + 1) * size


def _sources(run):
  """Returns the fingerprint of a refresh's inputs except the weights."""
  flavour = tokenizer_lib.flavour(run.retriever.tokenizer)
  flavour['title_separator'] = run.retriever.config.title_separator
  return {'run': run.id, 'tokenizer': flavour, **negatives_lib.sources(run)}


def folder(run: experiment.Experiment, step: int) -> pathlib.Path:
  """Returns the folder of the refresh with the weights of a step."""
  return run.workdir / _FOLDER / f'{step:08d}'
