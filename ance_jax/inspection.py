"""What a dataset is like, before a run is spent on it: `--job=inspect`.

Its size, what is odd in it, how long its texts are and what the limits cut,
some of its examples, and what a run on it will need.
"""

import time

import numpy as np

from ance_jax import encode
from ance_jax import footprint
from ance_jax import handoff
from ance_jax import logs
from ance_jax import runs
from ance_jax import tokenizer as tokenizer_lib
from ance_jax import tokens

# Texts whose lengths are looked at, examples shown, bars of a histogram.
_SAMPLE, _EXAMPLES, _BARS = 10_000, 5, 10
_PERCENTS = (50, 90, 99, 100)


def run(config):
  """Prints the report of a dataset, and writes it as inspection.json.

  Returns:
    A dict of what was found: 'corpus', 'splits' by name, 'tokens' by side.
  """
  runs.require_workdir(config)
  this, params = runs.begin(config, None)
  random = np.random.default_rng(config.seed)
  found = {
    'corpus': corpus_facts(this.corpus),
    'splits': {name: split_facts(split) for name, split in this.splits.items()},
    'tokens': {},
  }
  train = this.splits[config.train_split]
  for name, split in this.splits.items():
    if split is not train:
      shared = shared_texts(split, train)
      found['splits'][name]['queries that train has, too'] = shared
  for title, facts in (('corpus', found['corpus']), *found['splits'].items()):
    logs.say(f'\n{title}')
    for what, value in facts.items():
      logs.say(f'  {what:40}{_text(value):>14}')
  retriever = this.retriever
  passages = tokens.passage_texts(
    this.corpus, retriever.title_separator, retriever.passage_prompt
  )
  passages = list(_sample(passages, this.corpus, random))
  queries = list(train.texts)[:_SAMPLE]
  queries = [retriever.query_prompt + query for query in queries]
  for side, texts, limit in (
    ('passages', passages, retriever.passage_length),
    ('queries', queries, retriever.query_length),
  ):
    lengths = token_lengths(this.tokenizer, texts)
    found['tokens'][side] = length_facts(lengths, limit)
    logs.say(f'\ntokens of {len(texts):,} {side}')
    logs.say(histogram(lengths, limit))
    for what, value in found['tokens'][side].items():
      logs.say(f'  {what:40}{_text(value):>14}')
  logs.say('\nexamples of train')
  for line in _examples(this, train, random):
    logs.say(line)
  logs.say('\na run on it needs, at least')
  logs.say(footprint.needs(this))
  secs = _encode_secs(this, params, random)
  found['seconds to encode the corpus'] = secs
  logs.say(f'encoding the corpus, here, takes about {secs:,.0f} s a refresh')
  path = this.workdir / 'inspection.json'
  handoff.write_json(path, found)
  logs.say(f'report: {path}')
  return found


def corpus_facts(corpus):
  """Returns {what: number} of a `data.Corpus`."""
  sizes = np.bincount(corpus.groups)
  return {
    'passages': len(corpus.ids),
    'without a title': sum(not title for title in corpus.titles),
    'of the same text as another': int(sizes[sizes > 1].sum()),
    'most of one text': int(sizes.max()),
  }


def split_facts(split):
  """Returns {what: number} of a `data.Split`."""
  size = len(split.ids)
  queries, _ = split.positives()
  positives = np.bincount(queries, minlength=size)
  facts = {
    'queries': size,
    'judged passages': len(split.passages),
    'positives of a query, mean': float(positives.mean()),
    'positives of a query, most': int(positives.max()),
    'queries without a positive': int((positives == 0).sum()),
    'queries of the same text as another': size - len(set(split.texts)),
  }
  grades, counts = np.unique(split.grades, return_counts=True)
  for grade, count in zip(grades.tolist(), counts.tolist(), strict=True):
    facts[f'judgements of grade {grade}'] = count
  if split.answers:
    numbers = [len(texts) for texts in split.answers]
    facts['answers of a query, mean'] = float(np.mean(numbers))
  if split.negatives:
    given = [len(rows) for rows in split.negatives]
    facts['negatives of a query that are given, mean'] = float(np.mean(given))
  return facts


def shared_texts(split, other):
  """Returns how many queries of a split have the text of one of another."""
  known = {' '.join(text.lower().split()) for text in other.texts}
  return sum(' '.join(text.lower().split()) in known for text in split.texts)


def token_lengths(tokenizer, texts):
  """Returns the (n,) numbers of tokens of some texts, none of them cut."""
  backend = tokenizer_lib.backend(tokenizer)
  return np.array([len(e.ids) for e in backend.encode_batch_fast(texts)])


def length_facts(lengths, limit):
  """Returns {what: number} of some lengths in tokens, and what a limit cuts."""
  facts = {
    f'{percent} % have at most': int(np.percentile(lengths, percent))
    for percent in _PERCENTS
  }
  kept = np.minimum(lengths, limit).sum() / lengths.sum()
  return {
    **facts,
    'limit': limit,
    'share of texts cut there': float(np.mean(lengths > limit)),
    'share of tokens cut there': float(1 - kept),
  }


def histogram(lengths, limit):
  """Returns bars of lengths as lines of text, the limit marked."""
  top = max(int(np.percentile(lengths, 99)), limit) + 1
  edges = np.unique(np.linspace(0, top, _BARS + 1).astype(int))
  counts = np.histogram(np.minimum(lengths, top - 1), edges)[0]
  lines = []
  for start, end, count in zip(edges, edges[1:], counts, strict=False):
    bar = '#' * int(np.ceil(40 * count / counts.max()))
    mark = '  <- limit' if start < limit <= end else ''
    lines.append(f'  {start:6}-{end - 1:<6}{count:>8} {bar}{mark}')
  return '\n'.join(lines)


def _sample(texts, corpus, random):
  """Yields the texts of some passages, in order, without holding all."""
  size = len(corpus.ids)
  chosen = random.choice(size, min(_SAMPLE, size), replace=False)
  wanted = np.zeros(size, bool)
  wanted[chosen] = True
  yield from (text for text, want in zip(texts, wanted, strict=True) if want)


def _examples(run, split, random):
  queries, passages = split.positives()
  picked = random.choice(len(queries), min(_EXAMPLES, len(queries)), False)
  for place in np.sort(picked):
    row = int(passages[place])
    yield f'  {split.texts[int(queries[place])]}'
    yield f'    -> {run.corpus.titles[row]} | {run.corpus.texts[row][:100]}'


def _encode_secs(run, params, random):
  """Returns the seconds that encoding all passages takes, by some of them."""
  pieces = run.passages.pieces()
  size = len(pieces)
  rows = random.choice(size, min(1024, size), replace=False)
  for _ in range(2):  # The first one compiles.
    start = time.perf_counter()
    encode.encode_rows(
      run.passage_encoder, params, pieces, 'time the encoder', rows
    )
    secs = time.perf_counter() - start
  return secs * size / len(rows)


def _text(value):
  return f'{value:,.3f}' if isinstance(value, float) else f'{value:,}'
