"""Hard negatives for other trainers: `--job=mine`.

The training queries' candidates come from a model, BM25 or a run file, filters
take some of them, and what is left is written in a form that others read. Each
filter counts what it took. Queries come in batches and the file grows with
them: what is in memory for all of them is their texts and embeddings, or a
given ranking.
"""

from collections.abc import Callable
import pathlib
from typing import NamedTuple

import numpy as np

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.core import workdirs
from ance_jax.data import answers
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import load
from ance_jax.jobs import forms
from ance_jax.jobs import mine_formats
from ance_jax.jobs import mine_report
from ance_jax.mining import candidates
from ance_jax.mining import filters
from ance_jax.mining import selection
from ance_jax.retrieval import corpus_index
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import negatives as negatives_lib

# Of a batch, at most: queries, and queries times ranked passages.
_QUERIES_AT_ONCE, _PLACES_AT_ONCE = 1024, 2**22
# A row for which all judged positives are positives.
_METHOD = methods.METHODS['ance']


class Task(NamedTuple):
  """All that stays as it is while batches of queries are mined.

  Attributes:
    config: `Config`.
    corpus: `corpus.Corpus`.
    split: `corpus.Split` of the training queries.
    source: `candidates.Source`.
    judged: (P,) int32 query rows, rising, and passage rows of positives.
    positives: `selection.Positives` of these.
    judge: As `candidates.judge` returns it.
  """

  config: config_lib.Config
  corpus: corpus_lib.Corpus
  split: corpus_lib.Split
  source: candidates.Source
  judged: tuple[np.ndarray, np.ndarray]
  positives: selection.Positives
  judge: Callable | None


def run(config):
  """Writes the hard negatives of the training queries, and a report of them.

  Returns:
    The report, a dict as it is in the JSON file.
  """
  _check_flags(config)
  workdirs.require(config)
  path, report_path = _paths(config)
  task = _task(config)
  _check_data(task)
  found = mine_report.Tally(task)
  with atomic.writing(path) as file:
    try:
      examples = _examples(task, found)
      for piece in mine_formats.encoded(config.format, examples, task.corpus):
        file.write(piece)
      logs.say(found.table())
      if not found.written:
        raise errors.BadInput(
          f'none of the {len(task.split.ids):,} training queries can be '
          f'written, as the lines above say; {_cure(config)}.'
        )
    except BaseException:
      pathlib.Path(file.name).unlink()  # Its folder may be anybody's.
      raise
  atomic.write_json(report_path, found.as_json())
  logs.say(found.examples_text())
  logs.say(f'hard negatives: {path}; report: {report_path}')
  return found.as_json()


def mine_batch(task, queries, random):
  """Returns the `mine_report.Mined` of (q,) query rows.

  Args:
    task: `Task`.
    queries: (q,) int, rising.
    random: numpy Generator, for all that is drawn.
  """
  config, number = task.config, task.config.num_negatives
  ranking = task.source.rank(queries, int(_depths(task)[queries].max()))
  of_query, positives, positive_scores = _positives_of(task, queries, ranking)
  least = np.full(len(queries), np.inf, positive_scores.dtype)
  np.minimum.at(least, of_query, positive_scores)
  taken = filters.taken_by(
    ranking.rows,
    ranking.scores,
    _never(task, queries, ranking.rows),
    least,
    _rules(config),
  )
  judged = _judged(task, queries, ranking.rows, taken)
  if judged is not None:
    filters.take_judged(taken, judged, config.judge_max_score)
  drawing = random if config.sampling == 'random' else None
  chosen = filters.choose(taken, number, drawing)
  negatives = filters.packed(ranking.rows, chosen, number, -1)
  scores = filters.packed(ranking.scores, chosen, number, np.nan)
  unwilling = 0
  if config.too_few == 'fill':
    place, column = np.nonzero(negatives < 0)
    drop = _dropper(task, queries, ranking.rows, taken)
    _, unwilling = selection.fill(
      negatives, queries, task.positives, random, drop
    )
    if task.source.score:
      drawn = negatives[place, column]
      scores[place, column] = task.source.score(queries[place], drawn)
  return mine_report.Mined(
    queries,
    of_query,
    positives,
    positive_scores,
    ranking,
    least,
    judged,
    taken,
    chosen.sum(1),
    negatives,
    scores,
    unwilling,
  )


def _examples(task, found):
  """Yields the `mine_formats.Example` of each query that is written, in order.

  Args:
    task: `Task`.
    found: `mine_report.Tally`, which is told of all queries.
  """
  random = np.random.default_rng(task.config.seed)
  for queries in logs.progress(
    _batches(_depths(task)),
    'mine',
    total=len(task.split.ids),
    unit='queries',
    count=len,
  ):
    mined = mine_batch(task, queries, random)
    written = mined.negatives[:, 0] >= 0
    if mine_report.only_full(task.config):
      written = mined.found == task.config.num_negatives
    if forms.FORMS[task.config.format].scored:
      written &= ~mine_report.unscored(mined)
    found.add(mined, written)
    for place in np.nonzero(written)[0].tolist():
      yield _example(task, mined, place)


def _example(task, mined, place):
  split, query = task.split, int(mined.queries[place])
  start, end = np.searchsorted(mined.of_query, (place, place + 1))
  if forms.FORMS[task.config.format].pairs:
    # The pairs of a query of the same text are written with that query.
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


def _depths(task):
  """Returns the (Q,) int depths that leave `--mine_to` without positives."""
  config = task.config
  depths = config.mine_to + task.positives.banned
  if negatives_lib.drops_answers(config, task.split):
    depths = depths + config.mine_to
  return np.minimum(depths, len(task.corpus.texts))


def _batches(depths):
  """Yields (q,) int query rows, so many that their rankings fit in memory."""
  start = 0
  while start < len(depths):
    size = _QUERIES_AT_ONCE
    while size > 1 and (
      size * depths[start : start + size].max() > _PLACES_AT_ONCE
    ):
      size //= 2
    yield np.arange(start, min(start + size, len(depths)))
    start += size


def _positives_of(task, queries, ranking):
  """Returns place in `queries`, passage row and score of each positive."""
  of_query, passages = task.judged
  here = slice(*np.searchsorted(of_query, (queries[0], queries[-1] + 1)))
  of_query, passages = of_query[here], passages[here]
  places = of_query - queries[0]
  if task.source.score:
    return places, passages, task.source.score(of_query, passages)
  scores = filters.looked_up(ranking, places, passages, -np.inf)
  return places, passages, scores


def _never(task, queries, rows):
  """Returns what is no negative whatever its score, for `filters.taken_by`."""
  positives, there = task.positives, rows >= 0
  keys = queries[:, None].astype(np.int64) * len(positives.groups)
  judged = there & selection.is_in(keys + rows, positives.judged)
  grouped = selection.is_in(keys + positives.groups[rows], positives.grouped)
  own = there & selection.is_in(keys + positives.groups[rows], positives.own)
  never = {
    'positive': judged,
    'same text': there & grouped & ~judged & ~own,
    'own text': own,
  }
  if negatives_lib.drops_answers(task.config, task.split):
    asked = np.where(grouped, -1, rows)
    never['answer'] = _held(task, queries, asked)
  return never


def _held(task, queries, rows):
  """Returns which passages hold an answer of their query, (q, K) bool."""
  split = task.split
  return answers.held(
    rows,
    [split.answers[query] for query in queries.tolist()],
    task.corpus.texts,
    split.answers_are_patterns,
  )


def _judged(task, queries, rows, taken):
  """Returns the judge's (q, K) scores of what filters left; else NaN; or None.

  A cross-encoder takes its time: it is not asked about what is no negative.
  """
  if task.judge is None:
    return None
  scores = np.full(rows.shape, np.nan)
  left = taken == filters.KEPT
  scores[left] = task.judge(queries[np.nonzero(left)[0]], rows[left])
  return scores


def _rules(config):
  names = filters.Rules._fields
  return filters.Rules(**{name: getattr(config, name) for name in names})


def _dropper(task, queries, rows, taken):
  """Returns the `drop` of `selection.fill`: what a filter took is not drawn."""
  size = len(task.corpus.texts)
  keys = queries[:, None].astype(np.int64) * size + rows
  # One that nothing has, so that there is one.
  took = np.sort(np.append(keys[taken >= 0], -1))

  def drop(asked, drawn):
    keys = np.where(drawn < 0, -2, asked[:, None] * size + drawn)
    named = selection.is_in(keys, took)
    if negatives_lib.drops_answers(task.config, task.split):
      named |= _held(task, asked, np.where(named, -1, drawn))
    return named

  return drop


def _candidates(config):
  """Returns the `candidates.Source`, the corpus and the training queries."""
  name = config.train_split
  if config.ranking:
    corpus, splits = load.load(config, (name,))
    source = candidates.of_run_file(config.ranking, corpus, splits[name])
  elif config.retriever == 'bm25':
    rank, corpus, splits = corpus_index.bm25(config, (name,))
    source = candidates.of_bm25(rank, splits[name])
  else:
    run, params, step = experiment.read(config, (name,))
    corpus, splits = run.corpus, run.splits
    source = candidates.of_model(run, params, step)
  return source, corpus, splits[name]


def _task(config):
  source, corpus, split = _candidates(config)
  judge = candidates.judge(config, corpus, split)
  positives = negatives_lib.positives(
    split, corpus, _METHOD, (0, len(split.ids)), config.drop_same_text
  )
  judged = split.shared_positives()
  return Task(config, corpus, split, source, judged, positives, judge)


def _cure(config):
  """Returns what to do where nothing can be written, in the imperative."""
  cure = 'loosen the filters that took most'
  if mine_report.only_full(config):
    cure += ', lower --num_negatives, or set --too_few=fill'
  if forms.FORMS[config.format].scored:
    cure += ', or have a model score (--init_from), which scores everything'
  return cure


def _paths(config):
  """Returns the paths of the file and of its report, both free."""
  ending = 'json' if forms.FORMS[config.format].array else 'jsonl'
  name = f'hard_negatives.{config.format}.{ending}'
  path = pathlib.Path(config.output or pathlib.Path(config.workdir, name))
  if path.is_dir() or not path.parent.is_dir():
    found = 'a folder' if path.is_dir() else f'no folder {path.parent}'
    raise errors.BadInput(
      f'--output must be a file in a folder that is there; found {found} for '
      f'{path}; name another.'
    )
  paths = path, path.with_suffix('.report.json')
  for there in paths:
    if there.exists() and not config.overwrite:
      raise errors.BadInput(
        f'--output and its report must be new files; found {there}; name '
        'another, or give --overwrite.'
      )
  return paths


def _check_flags(config):
  """Raises `BadInput` for flags of mining that do not go together."""
  if config.num_negatives > config.mine_to - config.mine_from:
    raise errors.BadInput(
      '--num_negatives must fit between --mine_from and --mine_to; found '
      f'{config.num_negatives} for ranks {config.mine_from + 1} to '
      f'{config.mine_to}; change one of the three.'
    )
  scores = config.min_score, config.max_score
  if None not in scores and scores[0] > scores[1]:
    raise errors.BadInput(
      '--min_score must be at most --max_score; found '
      f'{scores[0]} and {scores[1]}; change one.'
    )
  judges = [name for name in (config.judge, config.judge_run) if name]
  if len(judges) != (config.judge_max_score is not None):
    raise errors.BadInput(
      '--judge_max_score must be given with one judge, --judge or --judge_run, '
      f'and they with it; found {config.judge_max_score} and '
      f'{" and ".join(judges) or "none"}; give one of each.'
    )
  if config.ranking and config.retriever == 'bm25':
    raise errors.BadInput(
      '--ranking must be without --retriever=bm25; found both; leave one out.'
    )


def _check_data(task):
  """Raises `BadInput` for flags that do not go with the data."""
  config, size = task.config, len(task.corpus.texts)
  if config.drop_answers and not task.split.answers:
    raise errors.BadInput(
      '--drop_answers must be with data that has answers; found none to the '
      'training queries; leave it out.'
    )
  most = int(task.positives.banned.max())
  if config.too_few == 'fill' and config.num_negatives + most > size:
    raise errors.BadInput(
      '--too_few=fill must have as many passages as --num_negatives and those '
      'that may be no negative of a query (its positives, its own text) '
      f'together; found {size:,} for {config.num_negatives} and up to {most}; '
      'lower --num_negatives.'
    )
