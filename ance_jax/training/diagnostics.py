"""What negatives and embeddings are like, seen with the weights of a moment.

Cheap: a few thousand training queries, the same ones in a whole run, are
encoded and searched with what a refresh or an evaluation has encoded and
indexed anyway.
"""

import functools
import operator
from typing import NamedTuple

import jax
import numpy as np

from ance_jax.mining import selection
from ance_jax.retrieval import index
from ance_jax.training import batches
from ance_jax.training import losses
from ance_jax.training import methods

# Queries that are looked at, at most; passages for norms and cosines.
PROBE_QUERIES = 2048
_PROBE_PASSAGES = 4096
# Passages of a query that its negatives in use are looked for in.
_DEPTH = 100
# Streams of random numbers.
_PAIRS, _RANDOM, _DRAWN = range(3)


class Probe(NamedTuple):
  """Some training queries, and what the weights of a moment find for them.

  Attributes:
    rows: (p,) int query rows, evenly spaced.
    queries: (p, E) float32 embeddings.
    found: (p, k) int32 passage rows, best first, positives among them; k is
      100 or `--top_k`, whichever is more.
  """

  rows: np.ndarray
  queries: np.ndarray
  found: np.ndarray


class Table(NamedTuple):
  """Negatives of consecutive training queries.

  Attributes:
    start: The first query's row.
    passages: (q, K) int32 passage rows, -1 behind the last of a query.
  """

  start: int
  passages: np.ndarray


class Seen(NamedTuple):
  """What a later moment is compared with.

  Attributes:
    ranks: (p,) int32, place of the best positive of each query of the probe,
      from 1 on; one behind the last where it was not found.
    right: (d,) bool, dev queries whose first passage is relevant; d is 0
      without a dev split.
  """

  ranks: np.ndarray
  right: np.ndarray


def probe(run, indexed, watch):
  """Returns the `Probe` of parameters.

  Args:
    run: `experiment.Experiment` with the parameters.
    indexed: `corpus_index.IndexedCorpus` of them.
    watch: `logs.Stopwatch`.
  """
  split = run.config.train_split
  number = len(run.dataset.queries[split])
  rows = np.arange(0, number, -(-number // PROBE_QUERIES))
  queries = run.encode_queries(split, watch, rows)
  with watch.phase('probe'):
    depth = min(max(_DEPTH, run.config.top_k), len(run.dataset.passages))
    return Probe(rows, queries, indexed.search(queries, depth).rows)


def stale_overlap(seen, table):
  """Returns the share of negatives that the weights rank in the first 100.

  Of each query's first 100 negatives; NaN where the probe has no such query.
  Of the weights that mined them it is near 1 (their positives are in the 100,
  too), and falls while training goes on (cf. ANCE, figure 3).

  Args:
    seen: `Probe`.
    table: The `Table` in use.
  """
  inside, negatives = _of_probe(seen, table)
  negatives = negatives[:, :_DEPTH]
  there = negatives >= 0
  keys = np.arange(len(negatives))[:, None] << 32
  ranked = np.sort((keys + seen.found[inside, :_DEPTH]).ravel())
  if not there.any():
    return float('nan')
  return float(selection.is_in((keys + negatives)[there], ranked).mean())


def look(run, seen, indexed, ranking, tables, last):
  """Returns what a refresh or an evaluation logs, and what the next one needs.

  Args:
    run: `experiment.Experiment`.
    seen: `Probe`.
    indexed: The `corpus_index.IndexedCorpus` that it is of.
    ranking: `trec.Ranking` of dev, or None where there is none.
    tables: {source: `Table`}; of them 'in_use' and 'mined' have values of their
      own.
    last: `Seen` of the last refresh, or None.

  Returns:
    {name: float}:
      'overlap': `stale_overlap` of what is in use.
      'positive_rank': median of `Seen.ranks`.
      'rank_drift': mean over the probe of |log2(rank / rank at the last
        refresh)|, doublings.
      'dev_lost', 'dev_won': shares of dev queries whose first passage was
        relevant at the last refresh and is not now, and the other way round.
      'grad_norm_...': `gradient_norms` of negatives of each source, and of
        passages at random, mean over queries.
      'above_positive': share of 'mined' (without: 'in_use') drawn as for a
        step that score no less than the positive: likely false negatives.
      'norm', 'cosine': means over passages at random of an embedding's norm
        and of the cosine of two: near 1, all lie in a narrow cone.
    Names whose value does not exist are left out. And `Seen`.
  """
  positives, ranks = _positives(run, seen)
  right = np.zeros(0, bool)
  if ranking is not None:
    dev = run.dataset.splits[run.config.dev_split]
    right = _in(dev.positives(), ranking.rows[:, :1])[:, 0]
  now = Seen(ranks, right)
  values = {'positive_rank': float(np.median(ranks))}
  if 'in_use' in tables:
    values['overlap'] = stale_overlap(seen, tables['in_use'])
  if last is not None:
    values['rank_drift'] = float(np.abs(np.log2(ranks / last.ranks)).mean())
  if last is not None and len(right):
    values['dev_lost'] = float((last.right & ~now.right).mean())
    values['dev_won'] = float((~last.right & now.right).mean())
  values |= _gradients(run, seen, indexed, positives, tables)
  values |= _cone(run, indexed)
  return {n: v for n, v in values.items() if not np.isnan(v)}, now


def gradient_norms(loss, queries, positives, negatives, scale):
  """Returns the norm of the gradient of each query's loss on its embeddings.

  On all of them together, its own, its positive's and its negatives'; in-batch
  columns are not among them. ANCE (section 3) bounds that of all parameters by
  that of the last layer's: uninformative negatives have none.

  Args:
    loss: A function of losses.py.
    queries: (q, E) float32.
    positives: (q, E) float32.
    negatives: (q, H, E) float32.
    scale: What scores are multiplied with, 1 / temperature.
  """
  apart = negatives - positives[:, None]
  above = scale * np.einsum('qe,qhe->qh', queries, apart)
  # A loss depends on differences alone: the positive's score is taken as 0.
  positive, counted = np.zeros_like(above[:, 0]), np.ones(above.shape, bool)

  def total(above):
    return loss(losses.Columns(positive, above, counted)).sum()

  # The derivative by each negative's score.
  by_score = scale * np.asarray(jax.grad(total)(above))
  of_query = np.einsum('qh,qhe->qe', by_score, apart)
  # That of the positive is -(sum of by_score) q, of a negative by_score q.
  times = by_score.sum(1) ** 2 + (by_score**2).sum(1)
  squares = (of_query**2).sum(1) + times * (queries**2).sum(1)
  return np.sqrt(squares)


def _gradients(run, seen, indexed, positives, tables):
  """Returns 'grad_norm_...' by source, and 'above_positive'."""
  config = run.config
  loss = getattr(losses, methods.METHODS[config.method].loss)
  scale = 1 / config.temperature
  random = np.random.default_rng([config.seed, _RANDOM])
  shape = len(seen.rows), config.hard_negatives
  of_all = (
    np.ones(shape[0], bool),
    random.integers(len(run.dataset.passages), size=shape),
  )
  sources = {name: _of_probe(seen, table) for name, table in tables.items()}
  found = {}
  for source, (inside, negatives) in {'random': of_all, **sources}.items():
    whole = negatives[:, 0] >= 0
    inside, negatives = np.flatnonzero(inside)[whole], negatives[whole]
    if not len(inside):
      continue
    random = np.random.default_rng([config.seed, _DRAWN])
    negatives = batches.draw(random, negatives, config.hard_negatives)
    queries = seen.queries[inside]
    of_positives = _embeddings(indexed, positives[inside])
    of_negatives = _embeddings(indexed, negatives)
    norms = gradient_norms(loss, queries, of_positives, of_negatives, scale)
    found[f'grad_norm_{source}'] = float(norms.mean())
    if source in ('in_use', 'mined'):
      above = np.einsum('qe,qhe->qh', queries, of_negatives)
      positive = np.einsum('qe,qe->q', queries, of_positives)
      found['above_positive'] = float((above >= positive[:, None]).mean())
  return found


def _cone(run, indexed):
  """Returns the mean norm of passages, and the mean cosine of two."""
  random = np.random.default_rng([run.config.seed, _PAIRS])
  rows = random.integers(
    len(run.dataset.passages), size=(2, _PROBE_PASSAGES // 2)
  )
  first, second = _embeddings(indexed, rows)
  norms = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
  products = functools.reduce(operator.mul, norms)
  cosines = np.einsum('pe,pe->p', first, second) / np.maximum(products, 1e-30)
  return {
    'norm': float(np.concatenate(norms).mean()),
    'cosine': float(cosines.mean()),
  }


def _positives(run, seen):
  """Returns a positive of each query of the probe, and `Seen.ranks`."""
  method = methods.METHODS[run.config.method]
  split = run.dataset.splits[run.config.train_split]
  pairs = split.shared_positives(last=method.last_positive)
  first = np.searchsorted(pairs[0], seen.rows)
  there = _in(pairs, seen.found, seen.rows)
  ranks = np.where(there.any(1), there.argmax(1), there.shape[1]) + 1
  return pairs[1][first], ranks.astype(np.int32)


def _in(pairs, found, rows=None):
  """Returns whether each of (q, k) passages is among its query's.

  Args:
    pairs: (P,) query rows and (P,) passage rows.
    found: (q, k) passage rows, -1 for none.
    rows: (q,) query rows; None: they are numbered.
  """
  rows = np.arange(len(found)) if rows is None else rows
  keys = np.sort((pairs[0].astype(np.int64) << 32) + pairs[1])
  asked = (rows[:, None].astype(np.int64) << 32) + found
  return (found >= 0) & selection.is_in(asked, keys)


def _of_probe(seen, table):
  """Returns which queries of the probe a table has, and their negatives."""
  places = seen.rows - table.start
  inside = (places >= 0) & (places < len(table.passages))
  return inside, table.passages[places[inside]]


def _embeddings(indexed, passages):
  """Returns (..., E) float32 of passage rows; of one in pieces, the first."""
  rows = passages.ravel()
  if indexed.texts_of is not None:
    rows = np.searchsorted(indexed.texts_of, rows)
  found = index.rows_of(indexed.blocks, rows)
  return found.reshape(*passages.shape, -1)
