"""The rules of a run by which a ranking becomes negatives; those of BM25.

What may not be a negative: judged passages, those of the same text, the query
itself, and for questions with answers those that hold one. Each rule counts
what it took.
"""

import hashlib

import numpy as np

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.data import answers
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.data import trec
from ance_jax.mining import selection
from ance_jax.retrieval import bm25
from ance_jax.retrieval import corpus_index
from ance_jax.training import batches
from ance_jax.training import methods
from ance_jax.training import schedule


def of_ranking(run, method, rank, rows, what, *, depth=None, least=None):
  """Returns the negatives that a row of the method table takes of a ranking.

  Args:
    run: `experiment.Run`.
    method: The row.
    rank: As for `selection.hard_negatives`, query rows counted from rows[0].
    rows: First training query row, and the one behind the last.
    what: Name of the phase for the progress bar.
    depth: K; None: --top_k.
    least: Negatives that a query is filled up to at random; None: K.

  Returns:
    (q, K) int32 passage rows, best first, -1 behind the last of a query that
    has fewer; and counts, as `counts_text` reads them.
  """
  config, split = run.config, run.splits[run.config.train_split]
  drop = None
  if drops_answers(config, split) and not method.without_answers:

    def drop(queries, ranking):
      return answers.held(
        ranking,
        [split.answers[rows[0] + query] for query in queries.tolist()],
        run.corpus.texts,
        split.answers_are_patterns,
        'match answers',
      )

  negatives, counts = selection.hard_negatives(
    rank,
    positives(split, run.corpus, method, rows, config.drop_same_text),
    depth or config.top_k,
    config.seed,
    what,
    drop=drop,
    least=least,
  )
  if method.without_answers:
    negatives, left_out = answers.without(
      negatives,
      split.answers[rows[0] : rows[1]],
      run.corpus.texts,
      split.answers_are_patterns,
      'leave out answers',
    )
    counts |= left_out
  return negatives, counts


def drops_answers(config, split):
  """Returns whether a passage with an answer is no negative of its query."""
  if config.drop_answers is not None:
    return config.drop_answers
  return split.answers is not None


def positives(split, corpus, method, rows, same_text=True):
  """Returns the `selection.Positives` of query rows from one to another.

  Args:
    split: `corpus.Split`.
    corpus: `corpus.Corpus`.
    method: A row of the method table.
    rows: The first query row, and the one behind the last.
    same_text: Whether passages of a positive's text are positives.
  """
  queries, passages, groups = batches.judged(split, corpus, method, same_text)

  def here(queries, passages):
    inside = (queries >= rows[0]) & (queries < rows[1])
    return queries[inside] - rows[0], passages[inside]

  return selection.make_positives(
    *here(queries, passages),
    groups,
    rows[1] - rows[0],
    own=here(*split.own_passages()),
  )


def by_bm25(run):
  """Returns the (Q, K) int32 negatives of BM25, mined once a run.

  Of the ranking in `--bm25_run`, or that which the data brings, or bm25s's.
  """
  config = run.config
  given = config.bm25_run
  about = {
    **sources(run),
    'k1': config.bm25_k1,
    'b': config.bm25_b,
    'language': config.bm25_language,
    # Named where there is none, too: a manifest is found by what it must hold.
    'bm25_run': given and atomic.file_hash(strict_io.regular(given)),
  }
  folder = run.workdir / 'bm25'

  def waiting():
    logs.say('waiting for the BM25 negatives of another process')

  with atomic.turn(run.workdir, waiting):
    if not atomic.find(folder, about):
      _publish_bm25(run, folder, about)
  return atomic.load_array(folder / 'negatives.npy')


def _publish_bm25(run, folder, about):
  split = run.splits[run.config.train_split]
  rank, where = _bm25_rank(run, split)
  negatives, counts = of_ranking(
    run,
    methods.METHODS['bm25'],
    rank,
    (0, len(split.ids)),
    'mine with BM25',
  )
  text = counts_text(counts)
  if counts['random']:
    text += (
      f' ({counts["random"] / negatives.size:.1%} of all) where BM25 found '
      'fewer than --top_k'
    )
  logs.say(f'BM25 negatives of {where}: {text}')
  with atomic.publish(folder, {**about, 'metrics': counts}) as unfinished:
    np.save(unfinished / 'negatives.npy', negatives)


def by_given(run):
  """Returns the (Q, K) int32 negatives that the data gives, -1 behind the last.

  At most the first --top_k of a query; one that has fewer than
  --hard_negatives is filled up to so many at random.
  """
  folder, about = run.workdir / 'given', sources(run)

  def waiting():
    logs.say('waiting for another process to take the given negatives')

  with atomic.turn(run.workdir, waiting):
    if not atomic.find(folder, about):
      _publish_given(run, folder, about)
  return atomic.load_array(folder / 'negatives.npy')


def _publish_given(run, folder, about):
  config, split = run.config, run.splits[run.config.train_split]
  given = given_to(split)
  sizes = np.array([len(given(row)) for row in range(len(split.ids))])
  negatives, counts = take_given(run)
  line = f'given negatives: {counts_text(counts)}'
  if counts['random']:
    line += f' where a query has fewer than {config.hard_negatives}'
  if none := int((sizes == 0).sum()):
    line += f' ({none:,} queries have none)'
  if cut := int(np.maximum(sizes - config.top_k, 0).sum()):
    line += f'; {cut:,} behind the first --top_k={config.top_k} of a query'
  logs.say(line)
  with atomic.publish(folder, {**about, 'metrics': counts}) as unfinished:
    np.save(unfinished / 'negatives.npy', negatives)


def take_given(run):
  """Returns what `by_given` does, not kept, and counts as `of_ranking` does."""
  config, split = run.config, run.splits[run.config.train_split]
  given = given_to(split)
  most = max(len(given(row)) for row in range(len(split.ids)))
  return of_ranking(
    run,
    methods.METHODS['given'],
    _given_rank(given),
    (0, len(split.ids)),
    'take the given negatives',
    depth=max(min(most, config.top_k), config.hard_negatives),
    least=config.hard_negatives,
  )


def given_to(split):
  """Returns given(query row) -> the passage rows that the data gives it.

  Of a file, or those of DPR's questions; None where there are none.
  """
  if split.given is not None:
    return split.given.of
  return split.negatives and split.negatives.__getitem__


def check(run):
  """Raises `BadInput` for settings that would stop the run later."""
  config = run.config
  num_rows, width = len(run.passages.pieces()), run.retriever.embedding_size
  most = num_rows // distributed.count()
  if -(-num_rows // config.rows_per_block) < distributed.count():
    raise errors.BadInput(
      f'--rows_per_block must leave each of {distributed.count()} processes a '
      f'block of the {num_rows:,} passages; found {config.rows_per_block}; '
      f'lower it to {most} at most.'
    )
  corpus_index.check_index(config, width, num_rows)
  rows = [schedule.method(config, mined) for mined in (False, True)]
  mined = any(row.negatives in ('bm25', 'index') for row in rows)
  if mined or config.job == 'refresh':
    _check_depth(run)
  _check_given(run, any(row.negatives == 'given' for row in rows))
  _check_queries(run)


def sources(run):
  """Returns what negatives depend on, besides the weights."""
  config = run.config
  split = run.splits[config.train_split]
  return {
    'own': _equal_texts(split),
    'drop_same_text': config.drop_same_text,
    'drop_answers': drops_answers(config, split),
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


def _equal_texts(split):
  """Returns a hash of what queries equal, passages or others; or False."""
  own, shared = split.own_passages(), np.stack(split.shared_positives())
  if not own.size and not split.twins().any():
    return False
  return hashlib.sha256(own.tobytes() + shared.tobytes()).hexdigest()


def counts_text(counts):
  """Returns what the rules took, for people."""
  text = (
    f'dropped {counts["judged"]:,} judged, {counts["same_text"]:,} of their '
    f"text, {counts['own_text']:,} of the query's own; {counts['random']:,} "
    'drawn at random'
  )
  if 'answers' in counts:
    text += f'; {counts["answers"]:,} with an answer left out'
  if counts.get('for_want_of_others'):
    text += f', {counts["for_want_of_others"]:,} kept for want of others'
  if 'no_negatives' in counts:
    text += f', {counts["no_negatives"]:,} queries without negatives'
  return text


def _bm25_rank(run, split):
  """Returns rank(query rows, depth) -> passage rows, and whose it is."""
  config = run.config
  if config.bm25_run:
    rows = {split.ids[row]: row for row in range(len(split.ids))}
    ranked = trec.read_run(config.bm25_run, rows, run.corpus.rows)
    without = int((np.diff(ranked.offsets) == 0).sum())
    if without:
      logs.say(f'{config.bm25_run}: {without:,} training queries are not in it')
    return _given_rank(ranked.of), config.bm25_run
  if split.negatives:
    return _given_rank(split.negatives.__getitem__), 'the data'
  texts = list(tokens.passage_texts(run.corpus, tokenizer_lib.SPACE))
  rank = bm25.make_rank(
    texts,
    k1=config.bm25_k1,
    b=config.bm25_b,
    language=config.bm25_language,
    queries=list(split.texts),
  )

  def find(rows, depth):
    return rank([split.texts[int(row)] for row in rows], depth, None).rows

  return find, 'bm25s'


def _given_rank(ranked):
  """Returns rank(query rows, depth) of ranked(query row) -> passage rows."""

  def find(rows, depth):
    found = np.full((len(rows), depth), -1, np.int32)
    for place, row in enumerate(rows):
      given = ranked(int(row))[:depth]
      found[place, : len(given)] = given
    return found

  return find


def _check_queries(run):
  """Raises `BadInput` where a row cannot have the queries that it needs."""
  config, split = run.config, run.splits[run.config.train_split]
  if config.warmup_until_plateau and config.dev_split not in run.splits:
    raise errors.BadInput(
      f'--warmup_until_plateau={config.warmup_until_plateau} needs dev to end '
      'the warm-up by, and there is none; leave it out, or raise '
      '--dev_fraction.'
    )
  if config.query_slices > len(split.ids):
    raise errors.BadInput(
      f'--query_slices must be at most the {len(split.ids):,} training '
      f'queries; found {config.query_slices}; lower it.'
    )
  row = methods.METHODS[config.method]
  if config.refresh_trigger and (row.triplets or not row.refreshes):
    raise errors.BadInput(
      '--refresh_trigger must be 0 for rows that do not mine from the index, '
      'or that train on triplets; found '
      f'{config.refresh_trigger} with --method={config.method}; leave it out.'
    )
  if config.query_slices > 1 and not row.refreshes:
    raise errors.BadInput(
      '--query_slices must be 1 for rows that do not mine from the index; '
      f'found {config.query_slices} with --method={config.method}; leave it '
      'out.'
    )
  given = split.answers or [[] for _ in range(len(split.ids))]
  without = sum(not texts for texts in given)
  if methods.METHODS[config.method].without_answers and without:
    raise errors.BadInput(
      f'--method={config.method} must have answers to each training query, '
      f'in answers.jsonl; found {without:,} queries without; add them, or '
      'use another row.'
    )
  if config.drop_answers and not split.answers:
    raise errors.BadInput(
      '--drop_answers must be with data that has answers; found none to the '
      'training queries; leave it out.'
    )


def _check_given(run, wanted):
  """Raises `BadInput` where a row has no given negatives, or no room."""
  config, split = run.config, run.splits[run.config.train_split]
  if not wanted:
    if split.given is not None and config.job == 'train':
      logs.say(
        f'--method={config.method} takes none of the given negatives; '
        'given and given_in_batch do'
      )
    return
  if not given_to(split):
    raise errors.BadInput(
      'the data gives no negatives, on which the rows given and given_in_batch '
      'train; set --negatives to a file of them, or use another row.'
    )
  most = _most_banned(run, methods.METHODS['given'])
  if config.hard_negatives + most > len(run.passages):
    raise errors.BadInput(
      f'--hard_negatives={config.hard_negatives} and up to {most} positives of '
      f'a query are more than the {len(run.passages):,} passages of the '
      'corpus; lower --hard_negatives.'
    )
  if config.hard_negatives > config.top_k:
    raise errors.BadInput(
      '--hard_negatives, drawn from the first --top_k, must be at most that; '
      f'found {config.hard_negatives} and {config.top_k}; change one.'
    )


def _most_banned(run, method):
  """Returns the most passages that a query may not have as negatives."""
  config, split = run.config, run.splits[run.config.train_split]
  rows = (0, len(split.ids))
  found = positives(split, run.corpus, method, rows, config.drop_same_text)
  return int(found.banned.max())


def _check_depth(run):
  config = run.config
  # Of the warm-up's row more may be positives.
  rows = {methods.METHODS[config.method], schedule.method(config, False)}
  most = max(_most_banned(run, row) for row in rows)
  if most == len(run.passages):
    raise errors.BadInput(
      f'all {most:,} passages of the corpus are positives of one training '
      'query, have the text of one, or are the query itself, and no negative '
      'can be mined for it; add passages, or leave the query out.'
    )
  if config.top_k + most > len(run.passages):
    raise errors.BadInput(
      '--top_k and the positives of a query must together be at most the '
      f'{len(run.passages):,} passages of the corpus; found {config.top_k} and '
      f'up to {most}; lower --top_k.'
    )
  if config.hard_negatives > config.top_k:
    raise errors.BadInput(
      '--hard_negatives, drawn from the top k, must be at most --top_k; found '
      f'{config.hard_negatives} and {config.top_k}; change one.'
    )
