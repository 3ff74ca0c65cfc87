"""Likely false negatives among what a model ranks high: `--job=audit`.

For some training queries, by rank: the share of passages that were judged
relevant, are the query itself, or neither but have a positive's text, nearly
its text, an answer, or a place above the first positive; and some to read.
"""

import numpy as np

from ance_jax import answers
from ance_jax import data
from ance_jax import evaluate
from ance_jax import handoff
from ance_jax import logs
from ance_jax import runs
from ance_jax.datasets import pydocs

# Queries looked at, at most; passages of each; where bands of ranks end.
_QUERIES, _DEPTH, _BANDS = 500, 200, (10, 50, 100, 200)
_EXAMPLES = 20


def run(config):
  """Audits a run at its `--checkpoint`, or `--init_from`.

  Prints a table and examples, and writes both as audit.json.

  Returns:
    {rule: [share in each band of ranks]}; NaN where a band has no passage.
  """
  this, params, step = runs.read(config, None)
  watch, split = logs.Stopwatch(), this.splits[config.train_split]
  size = min(_QUERIES, len(split.ids))
  random = np.random.default_rng(config.seed)
  queries = np.sort(random.choice(len(split.ids), size, replace=False))
  indexed = evaluate.index_corpus(this, params, watch)
  embedded = evaluate.encode_queries(
    this, params, config.train_split, watch, queries
  )
  depth = min(_DEPTH, len(this.passages))
  rows = indexed.search(embedded, depth, 'search').rows
  marks = marked(rows, queries, split, this.corpus)
  shares = by_band(marks, rows)
  logs.say(_table(shares, size, step))
  shown = _examples(marks, rows, queries, this, random)
  for example in shown:
    logs.say('\n'.join(f'  {k}: {v}' for k, v in example.items()) + '\n')
  path = this.workdir / f'audit-{step}.json'
  handoff.write_json(
    path,
    {
      'queries': size,
      'training queries that are passages, too': len(
        np.unique(split.own_passages()[0])
      ),
      'training queries of the same text as another': int(split.twins().sum()),
      'training queries that other splits have, too': {
        name: data.queries_shared(split, other)
        for name, other in this.splits.items()
        if other is not split
      },
      'ranks up to': list(_BANDS),
      'shares': {
        name: [None if np.isnan(v) else v for v in values]
        for name, values in shares.items()
      },
      'examples': shown,
    },
  )
  logs.say(f'audit: {path}')
  return shares


def marked(rows, queries, split, corpus):
  """Returns {rule: (q, K) bool} of ranked passages.

  Args:
    rows: (q, K) int32 passage rows, best first, -1 where there is none.
    queries: (q,) int query rows.
    split: `data.Split`.
    corpus: `data.Corpus`.
  """
  marks = {
    name: np.zeros(rows.shape, bool)
    for name in ('judged', 'same text', 'near-duplicate', 'above the positive')
  }
  own_text = np.zeros(rows.shape, bool)
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
    same = np.isin(groups, corpus.groups[right]) & there
    own = np.isin(groups, corpus.groups[own_passages[own_of == query]])
    own = own & there & ~same
    first = np.argmax(judged) if judged.any() else len(ranking)
    sets = [shingles(corpus.texts[int(row)]) for row in right]
    for rank in np.nonzero(there & ~same & ~own)[0]:
      found = shingles(corpus.texts[int(ranking[rank])])
      marks['near-duplicate'][place, rank] = any(
        jaccard(found, other) >= pydocs.NEAR_DUPLICATE for other in sets
      )
    marks['judged'][place] = judged
    marks['same text'][place] = same & ~judged
    own_text[place] = own
    marks['above the positive'][place] = (
      there & ~judged & ~own & (np.arange(len(ranking)) < first)
    )
  if own_of.size:
    marks['own text'] = own_text
  if split.answers:
    held = answers.held(
      rows,
      [split.answers[query] for query in queries.tolist()],
      corpus.texts,
      split.answers_are_patterns,
    )
    marks['with an answer'] = held & ~marks['judged'] & ~own_text
  return marks


def by_band(marks, rows):
  """Returns {rule: [share of the passages of each band of ranks]}."""
  starts = (0, *_BANDS[:-1])
  shares = {}
  for name, mark in marks.items():
    shares[name] = []
    for start, end in zip(starts, _BANDS, strict=True):
      there = (rows[:, start:end] >= 0).sum()
      number = mark[:, start:end].sum()
      shares[name].append(float(number / there) if there else float('nan'))
  return shares


def shingles(text):
  """Returns the set of a text's runs of `pydocs.SHINGLE_WORDS` words."""
  words = text.lower().split()
  last = max(1, len(words) - pydocs.SHINGLE_WORDS + 1)
  return {tuple(words[i : i + pydocs.SHINGLE_WORDS]) for i in range(last)}


def jaccard(first, second):
  """Returns the share of what two sets hold together that both hold."""
  common = len(first & second)
  return common / (len(first) + len(second) - common)


def _table(shares, size, step):
  starts = (1, *(end + 1 for end in _BANDS[:-1]))
  head = [f'{s}-{e}' for s, e in zip(starts, _BANDS, strict=True)]
  lines = [
    f'ranks of {size:,} training queries at step {step}: share that is',
    f'  {"":20}' + ''.join(f'{cell:>10}' for cell in head),
  ]
  for name, values in shares.items():
    lines.append(f'  {name:20}' + ''.join(f'{v:10.2%}' for v in values))
  return '\n'.join(lines)


def _examples(marks, rows, queries, run, random):
  """Returns some passages that are marked, not as judged, with their query."""
  split, corpus = run.splits[run.config.train_split], run.corpus
  of_query, positives = split.shared_positives()
  odd = [name for name in marks if name not in ('judged', 'own text')]
  places = np.argwhere(np.any([marks[name] for name in odd], 0))
  number = min(_EXAMPLES, len(places))
  chosen = np.sort(random.choice(len(places), number, replace=False))
  shown = []
  for place, rank in places[chosen].tolist():
    query, row = int(queries[place]), int(rows[place, rank])
    positive = int(positives[of_query == query][0])
    shown.append(
      {
        'query': split.texts[query],
        'positive': _shown(corpus, positive),
        f'rank {rank + 1}': _shown(corpus, row),
        'is': ', '.join(name for name in odd if marks[name][place, rank]),
      }
    )
  return shown


def _shown(corpus, row):
  title = corpus.titles[row] and f'{evaluate.passage_name(corpus, row)[:60]} | '
  return f'{corpus.ids[row]} | {title}{corpus.texts[row][:160]}'
