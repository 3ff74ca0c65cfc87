"""Finds likely false negatives in a ranking or a file: `--job=audit`.

For some training queries, reports by rank the share of passages that were
judged relevant, are the query itself, or are neither but have a positive's
text, nearly its text, an answer, or a rank above the first positive; with
examples.
"""

import itertools
import pathlib

import numpy as np

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.core import workdirs
from ance_jax.data import answers
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import pydocs
from ance_jax.training import experiment

# Maximum number of queries, passages per query, and last rank of each band.
_QUERIES, _DEPTH, _BANDS = 500, 200, (10, 50, 100, 200)
_EXAMPLES = 20


def run(config: config_lib.Config) -> dict[str, list[float]]:
  """Audits a run at its `--checkpoint`, `--init_from`, or given negatives.

  Prints a table and examples, and writes both to audit-<step or given>.json.

  Returns:
    The share in each band of ranks by rule, NaN for a band without passages.
  """
  is_run = experiment.is_run(config.workdir)
  if config.negatives or not (is_run or config.init_from):
    return _of_given(config, scored=bool(config.init_from) and not is_run)
  this, step = experiment.open(config, None)
  watch, split = logs.Stopwatch(), this.dataset.splits[config.train_split]
  random = np.random.default_rng(config.seed)
  queries = _drawn(np.arange(len(split.ids)), _QUERIES, random)
  indexed = this.index_corpus(watch)
  embedded = this.encode_queries(config.train_split, watch, queries)
  depth = min(_DEPTH, len(this.dataset.passages))
  rows = indexed.search(embedded, depth, 'search').rows
  marks = marked(rows, queries, split, this.dataset.corpus)
  return _report(
    config,
    step,
    marks,
    by_band(marks, rows),
    rows,
    queries,
    this.dataset,
    random,
  )


def _of_given(config, scored):
  """Audits the negatives of `--negatives` or of pairs.jsonl.

  A model scores them if `scored`; otherwise the scores are the file's, if any.
  """
  workdirs.require(config)
  if scored:
    this, _ = experiment.open(config, None)
    dataset = this.dataset
  else:
    dataset = experiment.load_texts(config, None)
  split = dataset.splits[config.train_split]
  random = np.random.default_rng(config.seed)
  if split.given is None:
    raise errors.refusal(
      f'nothing to audit: no run in {config.workdir}, and no --init_from and '
      'no --negatives',
      'set one of the three',
    )
  queries = _drawn(np.unique(split.given.queries), _QUERIES, random)
  rows, scores = split.given.table(queries, _DEPTH)
  best = _best_scores(split)[queries]
  if scored:
    scores, best = _model_scores(this, queries, rows)
  marks = marked(rows, queries, split, dataset.corpus)
  known = ~np.isnan(scores) & ~np.isnan(best)[:, None]
  wrong = marks['judged'] | marks.get('own text', False)
  above = known & ~wrong & (scores >= best[:, None])
  marks['above the positive'] = above
  of_known = by_band({'above the positive': above}, np.where(known, rows, -1))
  shares = by_band(marks, rows) | of_known
  return _report(config, 'given', marks, shares, rows, queries, dataset, random)


def _best_scores(split):
  """Returns the file's (Q,) best score of each query's positives, or NaN."""
  of_query, _ = split.positives()
  best = np.full(len(split.ids), np.nan, np.float32)
  np.fmax.at(best, of_query, split.scores[split.grades > 0])
  return best


def _model_scores(run, queries, rows):
  """Returns a model's (q, K) scores, and the (q,) best score of positives."""
  watch, split = logs.Stopwatch(), run.dataset.splits[run.config.train_split]
  indexed = run.index_corpus(watch)
  embedded = run.encode_queries(run.config.train_split, watch, queries)
  scores = indexed.scores(embedded, np.maximum(rows, 0))
  of_query, positives = split.shared_positives()
  here = np.isin(of_query, queries)
  places = np.searchsorted(queries, of_query[here])
  found = indexed.scores(embedded[places], positives[here][:, None])[:, 0]
  best = np.full(len(queries), -np.inf, np.float32)
  np.maximum.at(best, places, found)
  return np.where(rows < 0, np.nan, scores), best


def _drawn(rows, most, random):
  """Draws up to `most` rows, and returns them in their order."""
  chosen = random.choice(len(rows), min(most, len(rows)), replace=False)
  return rows[np.sort(chosen)]


def _report(config, name, marks, shares, rows, queries, dataset, random):
  """Prints and writes the report; returns the shares."""
  split = dataset.splits[config.train_split]
  logs.log(_table(shares, len(queries), name))
  shown = list(_examples(marks, rows, queries, split, dataset.corpus, random))
  for example in shown:
    logs.log('\n'.join(f'  {k}: {v}' for k, v in example.items()) + '\n')
  path = pathlib.Path(config.workdir, f'audit-{name}.json')
  atomic.write_json(
    path,
    {
      'queries': len(queries),
      'training queries that are passages, too': len(
        np.unique(split.own_passages()[0])
      ),
      'training queries of the same text as another': int(split.twins().sum()),
      'training queries that other splits have, too': {
        other_name: corpus_lib.queries_shared(split, other)
        for other_name, other in dataset.splits.items()
        if other is not split
      },
      'ranks up to': list(_BANDS),
      'shares': {
        rule: [None if np.isnan(v) else v for v in values]
        for rule, values in shares.items()
      },
      'examples': shown,
    },
  )
  logs.log(f'audit: {path}')
  return shares


def marked(
  rows: np.ndarray,
  queries: np.ndarray,
  split: corpus_lib.Split,
  corpus: corpus_lib.Corpus,
) -> dict[str, np.ndarray]:
  """Returns a (q, K) bool mask of the ranked passages for each rule.

  Args:
    rows: (q, K) int32 passage rows, best first, -1 for none.
    queries: (q,) int query rows.
    split: Split of the queries.
    corpus: All passages.
  """
  marks = {
    name: np.zeros(rows.shape, bool)
    for name in (
      'judged', 'same text', 'near-duplicate', 'above the positive', 'own text'
    )
  }  # fmt: skip
  of_query, positives = split.shared_positives()
  own_of, own_passages = split.own_passages()
  for place, query in enumerate(
    logs.progress(
      queries.tolist(), 'compare texts', total=len(queries), unit='queries'
    )
  ):
    right = positives[of_query == query]
    ranking, there = rows[place], rows[place] >= 0
    judged = np.isin(ranking, right)
    groups = corpus.groups[ranking]
    same = there & np.isin(groups, corpus.groups[right])
    own = (there & ~same) & np.isin(
      groups, corpus.groups[own_passages[own_of == query]]
    )
    sets = [shingles(corpus.texts[int(row)]) for row in right]
    for rank in np.nonzero(there & ~same & ~own)[0]:
      found = shingles(corpus.texts[int(ranking[rank])])
      marks['near-duplicate'][place, rank] = any(
        len(found & other) / len(found | other) >= pydocs.NEAR_DUPLICATE
        for other in sets
      )
    marks['judged'][place] = judged
    marks['same text'][place] = same & ~judged
    marks['own text'][place] = own
    marks['above the positive'][place] = (
      there & ~own & ~np.logical_or.accumulate(judged)
    )
  if split.answers:
    held = answers.held(
      rows,
      [split.answers[query] for query in queries.tolist()],
      corpus.texts,
      split.answers_are_patterns,
    )
    marks['with an answer'] = held & ~marks['judged'] & ~marks['own text']
  if not own_of.size:
    del marks['own text']
  return marks


def by_band(
  marks: dict[str, np.ndarray], rows: np.ndarray
) -> dict[str, list[float]]:
  """Returns the share of marked passages in each band of ranks, by rule."""
  bands = [slice(*ends) for ends in itertools.pairwise((0, *_BANDS))]
  sizes = [(rows[:, band] >= 0).sum() for band in bands]
  return {
    name: [
      float(mark[:, band].sum() / size) if size else float('nan')
      for band, size in zip(bands, sizes, strict=True)
    ]
    for name, mark in marks.items()
  }


def shingles(text: str) -> set[tuple[str, ...]]:
  """Returns the distinct n-grams of `pydocs.SHINGLE_WORDS` words of a text."""
  words = text.lower().split()
  last = max(1, len(words) - pydocs.SHINGLE_WORDS + 1)
  return {tuple(words[i : i + pydocs.SHINGLE_WORDS]) for i in range(last)}


def _table(shares, size, name):
  what = 'given negatives' if name == 'given' else f'ranks at step {name}'
  rows = {'': [f'{s + 1}-{e}' for s, e in itertools.pairwise((0, *_BANDS))]}
  for rule, values in shares.items():
    rows[rule] = ['-' if np.isnan(v) else f'{v:.2%}' for v in values]
  return '\n'.join(
    [
      f'{what} of {size:,} training queries: share that is',
      *(
        f'  {rule:20}' + ''.join(f'{cell:>10}' for cell in cells)
        for rule, cells in rows.items()
      ),
    ]
  )


def _examples(marks, rows, queries, split, corpus, random):
  """Yields some likely false negatives with their queries."""
  of_query, positives = split.shared_positives()
  odd = [name for name in marks if name not in ('judged', 'own text')]
  places = np.argwhere(np.any([marks[name] for name in odd], 0))
  for place, rank in _drawn(places, _EXAMPLES, random).tolist():
    query = int(queries[place])
    yield {
      'query': split.texts[query],
      'positive': _shown(corpus, positives[of_query == query][0]),
      f'rank {rank + 1}': _shown(corpus, rows[place, rank]),
      'is': ', '.join(name for name in odd if marks[name][place, rank]),
    }


def _shown(corpus, row):
  title = corpus_lib.whole_title(corpus, row)[:60]
  text = corpus.texts[row][:160]
  return f'{corpus.ids[row]} | {title and f"{title} | "}{text}'
