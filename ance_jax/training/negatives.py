"""Selects negatives from rankings by a run's rules; caches BM25's and given.

Never negatives are judged passages, passages with the same text, the query
itself and, if questions have answers, passages that hold one. Each rule counts
the passages that it rejects.
"""

from collections.abc import Callable
import hashlib
import math
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.mining import candidates
from ance_jax.mining import filters
from ance_jax.mining import known_answers
from ance_jax.mining import miner
from ance_jax.mining import selection
from ance_jax.models import snapshots
from ance_jax.retrieval import bm25
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import schedule
from ance_jax.training import teachers


class Stored(NamedTuple):
  """Negatives of consecutive training queries, with scores where known.

  Attributes:
    negatives: (q, K) int32 passage rows, best first, padded with -1.
    scores: (q, K) float32, NaN if unknown, by the source.
    positive_scores: (P,) float32 scores of these queries' positives, in the
      order of `Split.shared_positives`.
    taught: (q, K) float32 scores by the teacher; None without one.
    positive_taught: (P,) float32 scores of the positives by the teacher.
  """

  negatives: np.ndarray
  scores: np.ndarray | None = None
  positive_scores: np.ndarray | None = None
  taught: np.ndarray | None = None
  positive_taught: np.ndarray | None = None

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns the arrays to save, by name."""
    found = self._asdict()
    return {name: found[name] for name in found if found[name] is not None}


def load(folder: pathlib.Path) -> Stored:
  """Returns what a folder stores, memory-mapped."""
  paths = {name: folder / f'{name}.npy' for name in Stored._fields}
  return Stored(
    **{n: atomic.load_array(p) for n, p in paths.items() if p.exists()}
  )


def select_negatives(
  run: experiment.Experiment,
  method: methods.Method,
  source: candidates.CandidateSource,
  rows: tuple[int, int],
  what: str,
  *,
  number: int | None = None,
  least: int | None = None,
  holds_answer: known_answers.KnownAnswers | None = None,
) -> tuple[miner.Table, dict[str, int]]:
  """Returns the negatives that a row of the method table takes from a ranking.

  Args:
    run: The run.
    method: Row of the method table.
    source: Ranks passages for training query rows.
    rows: First training query row, and one past the last.
    what: Name of the phase for the progress bar.
    number: K; None for --top_k.
    least: Minimum number of negatives per query; None for K.
    holds_answer: Answer matches of earlier refreshes; None to match all again.

  Returns:
    The negatives, and counts by name of metric.
  """
  split = run.dataset.splits[run.config.train_split]
  if not (method.without_answers or drops_answers(run.config, split)):
    holds_answer = None
  elif holds_answer is None:
    holds_answer = candidates.answer_matcher(run.dataset.corpus, split)
  in_task = None if method.without_answers else holds_answer
  task = _task(run, method, source, number or run.config.top_k, least, in_task)
  found = miner.mine_table(task, *rows, what)
  counts = _counts(task, found)
  if method.without_answers:
    held = holds_answer(np.arange(*rows), found.rows)
    counts['answers'] = int(held.sum())
    kept, number = (found.rows >= 0) & ~held, found.rows.shape[1]
    found = found._replace(
      rows=filters.compact(found.rows, kept, number, -1),
      scores=filters.compact(found.scores, kept, number, np.nan),
    )
  if method.without_answers or task.settings.on_shortage != 'fill':
    counts['no_negatives'] = int((found.rows[:, 0] < 0).sum())
  return found, counts


def _task(run, method, source, number, least, holds_answer):
  """Returns the `miner.Task` for a row of the method table."""
  config, split = run.config, run.dataset.splits[run.config.train_split]
  settings = _settings(config, method, number, least)
  rerank = None
  if settings.rules.rerank_max_score is not None:
    rerank = teachers.scorer(run, split)
  return miner.Task(
    source,
    split.shared_positives(last=method.last_positive),
    excluded(split, run.dataset.corpus, method, config.drop_same_text),
    settings,
    holds_answer,
    rerank,
  )


def _settings(config, method, number, least):
  """Returns `miner.Settings`, with the run's rules except in its warm-up."""
  if methods.METHODS[config.method].sources != method.sources:
    return miner.Settings(number, least=least, seed=config.seed)
  rules = rules_of(config, config.top_k)
  if (
    method.teacher == 'mined'
    and config.score_run
    and rules.rerank_max_score is None
  ):
    rules = rules._replace(rerank_max_score=math.inf)  # Only those it scores.
  # Without these rules, any lower rank may replace an excluded passage.
  if rules.max_rank is None and (
    rules.scored()
    or rules.rerank_max_score is not None
    or config.choose == 'random'
  ):
    rules = rules._replace(max_rank=number + rules.skip_ranks)
  return miner.Settings(
    number,
    rules,
    config.choose,
    config.on_shortage or 'fill',
    least,
    config.seed,
  )


def _counts(task, table):
  """Returns the counts of a `miner.Table` by name of metric."""
  rules = task.settings.rules
  by_filter = dict(
    zip(filters.FILTERS, table.rejected[:-2].tolist(), strict=True)
  )
  found = {
    'judged': by_filter['positive'],
    'same_text': by_filter['same text'],
    'own_text': by_filter['own text'],
    'random': table.num_drawn,
  }
  if task.holds_answer:
    found['answers'] = by_filter['answer']
  if task.holds_answer or rules.filters():
    found['for_want_of_others'] = table.num_forced
  if warning := filters.warning(table.rejected, rules):
    logs.log(warning)
  return found | {_metric(name): by_filter[name] for name in rules.filters()}


def _metric(name):
  """Returns the metric name of a filter."""
  return name.replace(' ', '_')


def known_of(run: experiment.Experiment) -> known_answers.KnownAnswers | None:
  """Returns the answer matches of earlier refreshes; None if unused."""
  config, split = run.config, run.dataset.splits[run.config.train_split]
  row = methods.METHODS[config.method]
  if not (row.without_answers or drops_answers(config, split)):
    return None
  return known_answers.KnownAnswers(
    candidates.answer_matcher(run.dataset.corpus, split),
    run.workdir / 'answers',
    run.dataset.corpus,
    split,
  )


def rules_of(config: config_lib.Config, num_scores: int) -> filters.Rules:
  """Returns the rules in the settings; `num_scores` is as for `Rules`."""
  return filters.Rules(
    skip_ranks=config.skip_ranks,
    max_rank=config.max_rank,
    max_score=config.max_score,
    min_score=config.min_score,
    absolute_margin=config.absolute_margin,
    relative_margin=config.relative_margin,
    z_margin=config.z_margin,
    center_scores=config.center_scores,
    num_scores=num_scores,
    rerank_max_score=config.rerank_max_score,
  )


def teach(
  run: experiment.Experiment,
  method: methods.Method,
  found: Stored,
  first: int,
  *,
  keep: str,
  dealt: bool = False,
) -> tuple[Stored, dict[str, int]]:
  """Adds the teacher's scores, for a row of the method table with a teacher.

  Negatives without a score are dropped, and so are all negatives of a query
  with a positive that has none.

  Args:
    run: The run.
    method: Row of the method table.
    found: Negatives of consecutive training queries.
    first: Row of the first query.
    keep: As for `teachers.score_pairs`.
    dealt: As for `teachers.score_pairs`.

  Returns:
    The negatives with scores, and counts by name of metric.
  """
  if method.teacher != 'mined':
    return found, {}
  split = run.dataset.splits[run.config.train_split]
  score = teachers.scorer(run, split, raw=True)
  queries, positives = split.shared_positives(last=method.last_positive)
  rows = found.negatives
  pairs = slice(*np.searchsorted(queries, (first, first + len(rows))))

  def score_pairs(queries, passages):
    return teachers.score_pairs(
      run, score, queries, passages, about=sources(run), keep=keep, dealt=dealt
    )

  positive_taught = teachers.with_twins(
    score, split, queries[pairs], positives[pairs],
    score_pairs(queries[pairs], positives[pairs]),
  )  # fmt: skip
  unknown = queries[pairs][np.isnan(positive_taught)] - first
  kept = rows >= 0
  kept[unknown] = False
  of_query, _ = np.nonzero(kept)
  taught = np.full(rows.shape, np.nan, np.float32)
  taught[kept] = score_pairs(first + of_query, rows[kept])
  scored, number = ~np.isnan(taught), rows.shape[1]
  counts = {
    'without_teacher': int((kept & ~scored).sum()),
    'queries_without_teacher': len(np.unique(unknown)),
    'no_negatives': int((~scored.any(1)).sum()),
  }
  columns = {
    'negatives': filters.compact(rows, scored, number, -1),
    'taught': filters.compact(taught, scored, number, np.nan),
  }
  if found.scores is not None:
    columns['scores'] = filters.compact(found.scores, scored, number, np.nan)
  return found._replace(**columns, positive_taught=positive_taught), counts


def drops_answers(config: config_lib.Config, split: corpus_lib.Split) -> bool:
  """Returns whether passages that hold an answer are never negatives."""
  if config.drop_answers is not None:
    return config.drop_answers
  return split.answers is not None


def excluded(
  split: corpus_lib.Split,
  corpus: corpus_lib.Corpus,
  method: methods.Method,
  same_text: bool = True,
) -> selection.Excluded:
  """Returns the passages that are never negatives of a split's queries.

  Args:
    split: Split of the queries.
    corpus: The corpus.
    method: Row of the method table.
    same_text: Whether passages with a positive's text are positives too.
  """
  queries, passages, groups = batches.judged(split, corpus, method, same_text)
  return selection.make_excluded(
    queries, passages, groups, len(split.ids), own=split.own_passages()
  )


def find(folder: pathlib.Path, about: dict) -> dict | None:
  """Returns `atomic.find_valid` of negatives that were mined by the same rules.

  A manifest has 'rules' only if any are set, so `atomic.find_valid` alone would
  ignore rules that are no longer set.
  """
  found = atomic.find_valid(folder, about)
  return found if found and found.get('rules') == about.get('rules') else None


def by_bm25(run: experiment.Experiment) -> Stored:
  """Returns the negatives of BM25, mined once per run.

  The ranking comes from `--bm25_run`, else from the data, else from bm25s.
  """
  config, given = run.config, run.config.bm25_run
  about = {
    **sources(run),
    'k1': config.bm25_k1,
    'b': config.bm25_b,
    'language': config.bm25_language,
    # Also present if empty, so that a manifest with a run file does not match.
    'bm25_run': given and atomic.file_hash(strict_io.regular(given)),
  }
  return _once(
    run,
    'bm25',
    about,
    _mine_bm25,
    'waiting for the BM25 negatives of another process',
  )


def by_given(run: experiment.Experiment) -> Stored:
  """Returns the negatives given by the data.

  A query keeps at most its first --top_k. If it has fewer than
  --num_hard_negatives, random passages fill it up to that number.
  """
  return _once(
    run,
    'given',
    sources(run),
    _mine_given,
    'waiting for another process to take the given negatives',
  )


def _once(run, name, about, mine, waiting):
  """Returns negatives that one process mines once per run.

  Args:
    run: `experiment.Experiment`.
    name: Name of their folder.
    about: All inputs to them.
    mine: mine(run) -> (`Stored`, counts by name of metric).
    waiting: Line to log while another process mines them.
  """
  folder = run.workdir / name
  with atomic.exclusive(run.workdir, lambda: logs.log(waiting)):
    if not find(folder, about):
      made, counts = mine(run)
      with atomic.publish(folder, {**about, 'metrics': counts}) as unfinished:
        save(unfinished, made.arrays())
      teachers.forget(run.workdir, name)
  return load(folder)


def save(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes {name: array} as files of a folder."""
  for name, array in arrays.items():
    np.save(folder / f'{name}.npy', array)


def _mine_bm25(run):
  split = run.dataset.splits[run.config.train_split]
  source = _bm25_source(run, split)
  found, counts = select_negatives(
    run,
    methods.METHODS['bm25'],
    source,
    (0, len(split.ids)),
    'mine with BM25',
  )
  text = counts_text(counts)
  if counts['random']:
    text += (
      f' ({counts["random"] / found.rows.size:.1%} of all) where BM25 found '
      'fewer than --top_k'
    )
  logs.log(f'BM25 negatives of {source.name}: {text}')
  return Stored(found.rows), counts


def _mine_given(run):
  config, split = run.config, run.dataset.splits[run.config.train_split]
  given = given_to(split)
  sizes = np.array([len(given(row)) for row in range(len(split.ids))])
  made, counts = take_given(run, keep='given')
  line = f'given negatives: {counts_text(counts)}'
  if counts['random']:
    line += f' where a query has fewer than {config.num_hard_negatives}'
  if none := int((sizes == 0).sum()):
    line += f' ({none:,} queries have none)'
  if cut := int(np.maximum(sizes - config.top_k, 0).sum()):
    line += f'; {cut:,} after the first --top_k={config.top_k} of a query'
  logs.log(line)
  return made, counts


def take_given(
  run: experiment.Experiment, *, keep: str = ''
) -> tuple[Stored, dict[str, int]]:
  """Returns the negatives of `by_given`, uncached, and counts of the rules.

  Args:
    run: The run.
    keep: As for `teachers.score_pairs`.
  """
  config, split = run.config, run.dataset.splits[run.config.train_split]
  given = given_to(split)
  most = max(len(given(row)) for row in range(len(split.ids)))
  method = _row_with(config, 'given')
  found, counts = select_negatives(
    run,
    method,
    candidates.of_lists(given, 'the data'),
    (0, len(split.ids)),
    'take the given negatives',
    number=max(min(most, config.top_k), config.num_hard_negatives),
    least=config.num_hard_negatives,
  )
  made, taught = teach(run, method, Stored(found.rows), 0, keep=keep)
  return made, {**counts, **taught}


def _row_with(config, source):
  """Returns the row of `--method` if it has a source, or that of the source."""
  row = methods.METHODS[config.method]
  return row if source in row.sources else methods.METHODS[source]


def given_to(split: corpus_lib.Split) -> Callable[[int], np.ndarray] | None:
  """Returns given(query row) -> passage rows of the negatives in the data.

  They are from a file or from DPR's questions; None if there are none.
  """
  if split.given is not None:
    return split.given.of
  return split.negatives and split.negatives.__getitem__


def check(run: experiment.Experiment) -> None:
  """Raises `BadInput` for settings that would make the run fail later."""
  config, count = run.config, distributed.count()
  num_rows = len(run.dataset.passages.pieces())
  if -(-num_rows // config.rows_per_block) < count:
    raise errors.refusal(
      f'--rows_per_block={config.rows_per_block} leaves some of the {count} '
      f'processes without a block ({num_rows:,} passages)',
      f'set it to at most {num_rows // count}',
    )
  experiment.check_index(config, run.retriever.config.embedding_size, num_rows)
  used = {n for row in schedule.rows(config).values() for n in row.sources}
  is_mined = config.job == 'refresh' or not used.isdisjoint(
    ('bm25', 'index', 'searched')
  )
  if is_mined:
    # The row of the warm-up may have more positives.
    _check_room(run, 'top_k', schedule.rows(config).values())
  _check_given(run, 'given' in used)
  drawn, top_k = config.num_hard_negatives, config.top_k
  if drawn > top_k and (is_mined or 'given' in used):
    raise errors.refusal(
      f'--num_hard_negatives={drawn} is more than --top_k={top_k}, from which '
      'they are drawn',
      'change one',
    )
  _check_rules(run)
  _check_queries(run)


def sources(run: experiment.Experiment) -> dict[str, Any]:
  """Returns the fingerprint of all inputs to negatives except the weights."""
  config = run.config
  split = run.dataset.splits[config.train_split]
  return {
    'own': _equal_texts(split),
    'drop_same_text': config.drop_same_text,
    'drop_answers': drops_answers(config, split),
    'passages': run.dataset.passages.hash,
    'queries': run.dataset.queries[config.train_split].hash,
    'judgements': split.hash,
    'groups': run.dataset.corpus.hash,
    'index': config.index,
    'index_params': config.index_params,
    'center_passages': config.center_passages,
    'top_k': config.top_k,
    'hard_negatives': config.num_hard_negatives,
    'method': config.method,
    'seed': config.seed,
    **_rules(config),
  }


def _rules(config):
  """Returns {'rules': rules of the run that are set}; {} if none is."""
  rules = {
    name: getattr(config, name)
    for name in (*config_lib.MINING_RULES, 'negatives_per_source')
    if getattr(config, name) != getattr(config_lib.Config, name)
  }
  if config.cross_encoder:
    rules['cross_encoder'] = snapshots.pinned(config.cross_encoder)
  if config.score_run:
    path = strict_io.regular(config.score_run)
    rules['score_run'] = atomic.file_hash(path)
  return {'rules': rules} if rules else {}


def _equal_texts(split):
  """Returns a hash of the passages and queries that queries equal, or False."""
  own, shared = split.own_passages(), np.stack(split.shared_positives())
  if not own.size and not split.twins().any():
    return False
  return hashlib.sha256(own.tobytes() + shared.tobytes()).hexdigest()


def counts_text(counts: dict[str, int]) -> str:
  """Returns the counts of the rules as text for a log line."""
  text = (
    f'dropped {counts["judged"]:,} judged, {counts["same_text"]:,} of their '
    f"text, {counts['own_text']:,} of the query's own; {counts['random']:,} "
    'drawn at random'
  )
  if 'answers' in counts:
    text += f'; {counts["answers"]:,} with an answer left out'
  if counts.get('for_want_of_others'):
    text += f', {counts["for_want_of_others"]:,} kept for want of others'
  for name in filters.FILTERS[4:]:
    if number := counts.get(_metric(name)):
      text += f'; {name} {number:,}'
  if counts.get('queries_without_teacher'):
    text += (
      f'; {counts["queries_without_teacher"]:,} queries have a positive that '
      'the teacher does not score'
    )
  if number := counts.get('without_teacher'):
    text += f'; {number:,} the teacher does not score'
  if 'no_negatives' in counts:
    text += f', {counts["no_negatives"]:,} queries without negatives'
  return text


def _bm25_source(run, split):
  """Returns the `candidates.CandidateSource` to use as BM25."""
  config = run.config
  if config.bm25_run:
    return candidates.of_run_file(config.bm25_run, run.dataset.corpus, split)
  if split.negatives:
    return candidates.of_lists(split.negatives.__getitem__, 'the data')
  texts = list(tokens.passage_texts(run.dataset.corpus, tokenizer_lib.SPACE))
  rank = bm25.make_rank(
    texts,
    k1=config.bm25_k1,
    b=config.bm25_b,
    language=config.bm25_language,
    queries=list(split.texts),
  )
  return candidates.of_bm25(rank, split)._replace(name='bm25s')


def _check_queries(run):
  """Raises `BadInput` if the splits lack what the settings need."""
  config, split = run.config, run.dataset.splits[run.config.train_split]
  row, method = methods.METHODS[config.method], f'--method={config.method}'
  number, slices = len(split.ids), config.query_slices
  answered = sum(map(bool, split.answers or ()))
  for is_wrong, fact, cure in (
    (
      config.warmup_until_plateau
      and config.dev_split not in run.dataset.splits,
      f'--warmup_until_plateau={config.warmup_until_plateau} needs dev to end '
      'the warm-up by, and there is none',
      'leave it out, or raise --dev_fraction',
    ),
    (
      slices > number,
      f'--query_slices={slices} is more than the {number:,} training queries',
      'lower it',
    ),
    (
      config.refresh_trigger and (row.triplets or not row.refreshes),
      f'--refresh_trigger={config.refresh_trigger} cannot be used with '
      f'{method}, which does not mine from the index, or trains on triplets',
      'leave it out',
    ),
    (
      slices > 1 and not row.refreshes,
      f'--query_slices={slices} cannot be used with {method}, which does not '
      'mine from the index',
      'leave it out',
    ),
    (
      row.without_answers and answered < number,
      f'{method} needs answers, and {number - answered:,} training queries '
      'have none in answers.jsonl',
      'add them, or use another row',
    ),
    (
      config.drop_answers and not split.answers,
      '--drop_answers needs answers, and the training queries have none',
      'leave it out',
    ),
  ):
    if is_wrong:
      raise errors.refusal(fact, cure)


def _check_given(run, wanted):
  """Raises `BadInput` if given negatives are missing or do not fit."""
  config, split = run.config, run.dataset.splits[run.config.train_split]
  if not wanted:
    if split.given is not None and config.job == 'train':
      logs.log(
        f'--method={config.method} takes none of the given negatives; '
        'given and given_in_batch do'
      )
    return
  if not given_to(split):
    raise errors.refusal(
      f'the data gives no negatives, on which --method={config.method} trains',
      'set --negatives to a file of them, or use another row',
    )
  row = methods.METHODS[config.method]
  second = config.cross_encoder or config.score_run
  if row.teacher == 'mined' and 'given' in row.sources and not second:
    given = split.given
    if given is None or np.isnan(given.scores).all():
      raise errors.refusal(
        f'--method={config.method} needs a teacher, and the given negatives '
        'have no scores',
        'set --negatives to a file with scores, --cross_encoder or --score_run',
      )
  _check_room(run, 'num_hard_negatives', [methods.METHODS['given']])


def _check_room(run, name, rows):
  """Raises `BadInput` if the corpus has too few passages that may be negatives.

  Args:
    run: `experiment.Experiment`.
    name: Flag of the number of negatives.
    rows: Rows of the method table that take them.
  """
  config, split = run.config, run.dataset.splits[run.config.train_split]
  corpus, number = run.dataset.corpus, len(run.dataset.passages)
  most = max(
    int(excluded(split, corpus, row, config.drop_same_text).num_excluded.max())
    for row in rows
  )
  if most == number:
    raise errors.refusal(
      f'all {most:,} passages of the corpus are positives of one training '
      'query, have the text of one, or are the query itself, so that it can '
      'have no negative',
      'add passages, or leave the query out',
    )
  asked = getattr(config, name)
  if asked + most > number:
    raise errors.refusal(
      f'--{name}={asked} and up to {most} positives of a query are more than '
      f'the {number:,} passages of the corpus',
      f'lower --{name}',
    )


def _check_rules(run):
  """Raises `BadInput` for rules that the run cannot apply."""
  config, split = run.config, run.dataset.splits[run.config.train_split]
  last = config.max_rank
  if last is not None and config.top_k > last - config.skip_ranks:
    raise errors.refusal(
      f'--top_k={config.top_k} does not fit between --skip_ranks='
      f'{config.skip_ranks} and --max_rank={last}',
      'change one of the three',
    )
  row = methods.METHODS[config.method]
  # A run file may be for --positive_min_score alone.
  of_verdicts = {'score_run', 'positive_min_score'}
  rules = _rules(config).get('rules', {}).keys() - of_verdicts
  if row.searches and rules:
    raise errors.refusal(
      f'--{min(rules)} is a rule for mined negatives, and --method='
      f'{config.method} searches its own in the step',
      'leave it out',
    )
  scored = _settings(config, row, config.top_k, None).rules.scored()
  unscored = 'given' in row.sources or (
    'bm25' in row.sources and split.negatives and not config.bm25_run
  )
  if scored and unscored:
    raise errors.refusal(
      f'--{scored[0]} needs scores, and the negatives that the data gives to '
      f'--method={config.method} have none',
      'leave it out',
    )
