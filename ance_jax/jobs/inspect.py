"""Reports on a dataset before training: `--job=inspect`.

Covers its size, oddities, text lengths, a training batch, and the needs of a
run; trains nothing. With `--init_from`, or a run in `--workdir`, lengths are in
tokens, and a few texts are encoded to estimate the time for the corpus.
"""

import dataclasses
import itertools
import pathlib
import time

import numpy as np

from ance_jax import config as config_lib
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import devices as devices_lib
from ance_jax.core import logs
from ance_jax.core import places
from ance_jax.core import workdirs
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import tokenized
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.jobs import batch_report
from ance_jax.jobs import footprint
from ance_jax.models import bi_encoder
from ance_jax.retrieval import encoding
from ance_jax.training import experiment
from ance_jax.training import negatives as negatives_lib

# Maximum number of texts to measure, examples, and bars of a histogram.
_SAMPLE, _EXAMPLES, _BARS = 10_000, 5, 10
_PERCENTS = (50, 90, 99, 100)
# Tokens to time on a CPU; accelerators are timed with a whole batch.
_TIMED_TOKENS = 2048


def run(config: config_lib.Config) -> dict:
  """Prints the report of a dataset and writes it to inspection.json.

  Without `--workdir` it writes nothing.

  Returns:
    The report: 'corpus', 'splits' by name, 'words' or 'tokens' by side,
    'batch', and, with weights, 'seconds to encode the corpus'.
  """
  if config.workdir:
    workdirs.require(config)
    found = _inspect(config)
    path = pathlib.Path(config.workdir) / 'inspection.json'
    atomic.write_json(path, found)
    logs.log(f'report: {path}')
  else:
    with places.temporary_folder() as folder:
      found = _inspect(dataclasses.replace(config, workdir=folder))
    logs.log('nothing of this was written: --workdir=FOLDER keeps it')
  return found


def _inspect(config):
  this = _open(config)
  random = np.random.default_rng(config.seed)
  train = this.dataset.splits[config.train_split]
  found = {
    'corpus': corpus_facts(this.dataset.corpus),
    'splits': {
      name: split_facts(split) for name, split in this.dataset.splits.items()
    },
  }
  pairs = itertools.permutations(this.dataset.splits.items(), 2)
  for (name, split), (other_name, other) in pairs:
    found['splits'][name][f'queries that {other_name} has, too'] = (
      corpus_lib.queries_shared(split, other)
    )
  for title, facts in (('corpus', found['corpus']), *found['splits'].items()):
    _say_facts(title, facts)
  size = len(this.dataset.corpus.ids)
  chosen = np.sort(random.choice(size, min(_SAMPLE, size), replace=False))
  passages = _passage_texts(this, chosen.tolist())
  unit = 'tokens' if this.retriever.tokenizer else 'words'
  found[unit], lengths = _length_report(this, passages, train, unit)
  logs.log('\n'.join(['\nexamples of train', *_examples(this, train, random)]))
  found['batch'] = batch_report.lines(this)
  logs.log('\n'.join(['\na batch', *found['batch']]))
  logs.log(f'\na run on it needs, at least\n{footprint.table(this)}')
  if this.retriever.params is None:
    logs.log(
      'what encoding takes is not timed without weights: name them with '
      '--init_from'
    )
  else:
    secs = _encode_secs(this, passages, lengths)
    found['seconds to encode the corpus'] = secs
    logs.log(f'encoding the corpus, here, takes about {secs:,.0f} s a refresh')
  return found


def corpus_facts(corpus: corpus_lib.Corpus) -> dict[str, int]:
  """Returns counts of a corpus by description."""
  sizes = np.bincount(corpus.groups)
  return {
    'passages': len(corpus.ids),
    'without a title': sum(not title for title in corpus.titles),
    'of the same text as another': int(sizes[sizes > 1].sum()),
    'most of one text': int(sizes.max()),
  }


def split_facts(split: corpus_lib.Split) -> dict[str, int | float]:
  """Returns counts and means of a split by description."""
  size = len(split.ids)
  queries, _ = split.positives()
  positives = np.bincount(queries, minlength=size)
  facts = {
    'queries': size,
    'judged passages': len(split.passages),
    'positives of a query, mean': float(positives.mean()),
    'positives of a query, most': int(positives.max()),
    'queries without a positive': int((positives == 0).sum()),
    'queries of the same text as another': int(split.twins().sum()),
    'queries that are passages, too': len(np.unique(split.own_passages()[0])),
  }
  grades, counts = np.unique(split.grades, return_counts=True)
  for grade, count in zip(grades.tolist(), counts.tolist(), strict=True):
    facts[f'judgements of grade {grade}'] = count
  if split.answers:
    facts['answers of a query, mean'] = float(
      np.mean(list(map(len, split.answers)))
    )
  if given := negatives_lib.given_to(split):
    numbers = np.array([len(given(row)) for row in range(size)])
    facts |= {
      'given negatives': int(numbers.sum()),
      'given negatives of a query, mean': float(numbers.mean()),
      'given negatives of a query, most': int(numbers.max()),
      'queries without a given negative': int((numbers == 0).sum()),
    }
  if split.given is not None:
    facts['given negatives with a score'] = int(
      (~np.isnan(split.given.scores)).sum()
    )
  return facts


def token_lengths(
  tokenizer: tokenizer_lib.Tokenizer | None, texts: list[str]
) -> np.ndarray:
  """Returns the (n,) int lengths of uncut texts in tokens.

  Args:
    tokenizer: Tokenizer; None counts words instead.
    texts: n texts.
  """
  if tokenizer is None:
    return np.array([len(text.split()) for text in texts])
  backend = tokenizer_lib.backend(tokenizer)
  return np.array([len(e.ids) for e in backend.encode_batch_fast(texts)])


def length_facts(
  lengths: np.ndarray, limit: int | None = None
) -> dict[str, int | float]:
  """Returns statistics of lengths, and the shares that a limit cuts."""
  facts = {
    f'{percent} % have at most': int(np.percentile(lengths, percent))
    for percent in _PERCENTS
  }
  if limit is not None:
    kept = np.minimum(lengths, limit).sum() / lengths.sum()
    facts |= {
      'limit': limit,
      'share of texts cut there': float(np.mean(lengths > limit)),
      'share of tokens cut there': float(1 - kept),
    }
  return facts


def histogram(lengths: np.ndarray, limit: int = 0) -> str:
  """Returns a histogram as lines of text, with the limit marked."""
  top = max(int(np.percentile(lengths, 99)), limit) + 1
  edges = np.unique(np.linspace(0, top, _BARS + 1).astype(int))
  counts = np.histogram(np.minimum(lengths, top - 1), edges)[0]
  lines = []
  for start, end, count in zip(edges, edges[1:], counts, strict=False):
    bar = '#' * int(np.ceil(40 * count / counts.max()))
    mark = '  <- limit' if start < limit <= end else ''
    lines.append(f'  {start:6}-{end - 1:<6}{count:>8} {bar}{mark}')
  return '\n'.join(lines)


def _open(config):
  """Returns the experiment, without parameters if no checkpoint is named.

  Without a run in the folder its token rows are empty, which is enough to read
  sizes and draw batches.
  """
  if checkpoint.committed_steps(config.workdir):
    return experiment.open(config, None)[0]
  texts = experiment.with_verdicts(config, experiment.load_texts(config, None))
  model = (
    experiment.load_model(config)
    if config.init_from
    else experiment.planned_model(config)
  )
  devices, _ = devices_lib.training_devices(config)
  data = tokenized.Dataset(
    *texts,
    _empty_rows(len(texts.corpus.ids)),
    {name: _empty_rows(len(split.ids)) for name, split in texts.splits.items()},
  )
  retriever = experiment.make_retriever(config, model, devices)
  return experiment.Experiment('', config, data, retriever)


def _empty_rows(number):
  """Returns token rows without any tokens."""
  offsets = np.zeros(number + 1, np.int64)
  return tokens.TokenRows(np.zeros(0, np.uint32), offsets, 0, '')


def _say_facts(title, facts):
  logs.log(f'\n{title}')
  for what, value in facts.items():
    logs.log(f'  {what:40}{_text(value):>14}')


def _passage_texts(run, rows):
  """Returns the texts of some passages in the form that is tokenized."""
  some = run.dataset.corpus._replace(
    titles=[run.dataset.corpus.titles[row] for row in rows],
    texts=[run.dataset.corpus.texts[row] for row in rows],
  )
  r = run.retriever.config
  return list(tokens.passage_texts(some, r.title_separator, r.passage_prompt))


def _length_report(run, passages, train, unit):
  """Prints text lengths; returns {side: facts}, and lengths of passages."""
  r, found, lengths = run.retriever.config, {}, {}
  queries = [
    r.query_prompt + text for text in itertools.islice(train.texts, _SAMPLE)
  ]
  for side, texts, limit in (
    ('passages', passages, r.passage_length),
    ('queries', queries, r.query_length),
  ):
    lengths[side] = token_lengths(run.retriever.tokenizer, texts)
    limits = [limit] if unit == 'tokens' else []
    found[side] = length_facts(lengths[side], *limits)
    _say_facts(
      f'{unit} of {len(texts):,} {side}\n{histogram(lengths[side], *limits)}',
      found[side],
    )
  if unit == 'words':
    logs.log('  in tokens, and what is cut: name a checkpoint, --init_from')
  return found, lengths['passages']


def _examples(run, split, random):
  queries, passages = split.positives()
  picked = random.choice(len(queries), min(_EXAMPLES, len(queries)), False)
  for place in np.sort(picked):
    yield f'  {split.texts[queries[place]]}'
    yield f'    -> {batch_report.shown(run.dataset.corpus, passages[place])}'


def _encode_secs(run, passages, lengths):
  """Estimates the seconds for encoding all passages from a few.

  It times one batch of median length and scales by operations, which compiles
  one program and does not keep a CPU busy for minutes.

  Args:
    run: Experiment with parameters.
    passages: n texts of the corpus.
    lengths: (n,) int, tokens of each text.
  """
  config, retriever = run.config, run.retriever
  at_once = config.tokens_per_batch
  if run.devices[0].platform == 'cpu':
    at_once = min(at_once, _TIMED_TOKENS)
  encoder = encoding.make_encoder(
    retriever.config,
    bi_encoder.PASSAGE,
    dtype=config.dtype,
    tokens_per_batch=at_once,
    devices=run.devices,
  )
  limit = retriever.config.passage_length
  cut = np.minimum(lengths, limit)
  number = max(at_once // int(np.median(cut)), 1)
  near = np.argsort(np.abs(cut - np.median(cut)), kind='stable')[:number]
  rows = tokens.memory_rows(
    retriever.tokenizer, [passages[i] for i in near], limit
  )
  for _ in range(2):  # The first one compiles.
    start = time.perf_counter()
    encoding.encode_rows(encoder, retriever.params, rows, 'time the encoder')
    secs = time.perf_counter() - start
  timed = encoding.flops(encoder, retriever.config.body, rows.lengths())
  # Longer texts are encoded in pieces, at most `--chunks` each.
  pieces = np.clip(-(-lengths // limit), 1, config.chunks)
  all_of_sample = encoding.flops(
    encoder, retriever.config.body, np.repeat(cut, pieces)
  )
  return (
    secs * all_of_sample / timed * len(run.dataset.corpus.ids) / len(passages)
  )


def _text(value):
  return f'{value:,.3f}' if isinstance(value, float) else f'{value:,}'
