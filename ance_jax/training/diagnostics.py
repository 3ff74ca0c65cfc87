"""Measures negatives and embeddings with the current weights.

This is cheap: it encodes and searches a few thousand training queries, the same
ones during a whole run, in an index that a refresh or an evaluation has already
built.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from ance_jax.core import logs
from ance_jax.data import trec
from ance_jax.mining import selection
from ance_jax.retrieval import corpus_index
from ance_jax.training import experiment
from ance_jax.training import losses
from ance_jax.training import methods

# Maximum number of queries; number of passages for norms and cosines.
PROBE_QUERIES = 2048
_PROBE_PASSAGES = 4096
# Number of top passages in which to look for a query's active negatives.
_DEPTH = 100
# Streams of random numbers.
_PAIRS, _RANDOM, _DRAWN = range(3)


class Probe(NamedTuple):
  """Some training queries and the passages that the current weights find.

  Attributes:
    rows: (p,) int query rows, evenly spaced.
    queries: (p, E) float32 embeddings.
    found: (p, k) int32 passage rows, best first, positives included; k is the
      larger of 100 and `--top_k`.
  """

  rows: np.ndarray
  queries: np.ndarray
  found: np.ndarray


class Table(NamedTuple):
  """Negatives of consecutive training queries.

  Attributes:
    start: The first query's row.
    passages: (q, K) int32 passage rows, padded with -1.
  """

  start: int
  passages: np.ndarray


class Seen(NamedTuple):
  """Measurements that the next refresh or evaluation compares with.

  Attributes:
    ranks: (p,) int32 rank of the best positive of each query of the probe,
      from 1; k + 1 if none was found.
    right: (d,) bool, dev queries whose first passage is relevant; d is 0
      without a dev split.
  """

  ranks: np.ndarray
  right: np.ndarray


def probe(
  run: experiment.Experiment,
  indexed: corpus_index.IndexedCorpus,
  watch: logs.Stopwatch,
) -> Probe:
  """Encodes and searches the probe's queries.

  Args:
    run: The run, with parameters.
    indexed: The corpus, indexed with the same parameters.
    watch: Times the phases.
  """
  split = run.config.train_split
  number = len(run.dataset.queries[split])
  rows = np.arange(0, number, -(-number // PROBE_QUERIES))
  queries = run.encode_queries(split, watch, rows)
  with watch.phase('probe'):
    depth = min(max(_DEPTH, run.config.top_k), len(run.dataset.passages))
    return Probe(rows, queries, indexed.search(queries, depth).rows)


def stale_overlap(seen: Probe, table: Table) -> float:
  """Returns the share of negatives that the weights rank in the first 100.

  Only the first 100 negatives of each query count; NaN if the table has no
  query of the probe. The share is near 1 for the weights that mined the
  negatives (below 1 because positives are among the 100) and falls during
  training (cf. ANCE, figure 3).

  Args:
    seen: The probe.
    table: The active negatives.
  """
  inside, negatives = _of_probe(seen, table)
  negatives = negatives[:, :_DEPTH]
  there = negatives >= 0
  keys = np.arange(len(negatives))[:, None] << 32
  ranked = np.sort((keys + seen.found[inside, :_DEPTH]).ravel())
  if not there.any():
    return float('nan')
  return float(selection.is_in((keys + negatives)[there], ranked).mean())


def look(
  run: experiment.Experiment,
  seen: Probe,
  indexed: corpus_index.IndexedCorpus,
  ranking: trec.Ranking | None,
  tables: dict[str, Table],
  last: Seen | None,
) -> tuple[dict[str, float], Seen]:
  """Returns the values that a refresh or an evaluation logs, and `Seen`.

  Args:
    run: The run.
    seen: The probe.
    indexed: The corpus in which the probe was searched.
    ranking: Ranking of dev, if there is a dev split.
    tables: Negatives by source; 'in_use' and 'mined' have extra values.
    last: `Seen` of the last refresh, if any.

  Returns:
    The values, without names that do not apply, and `Seen`:
      'overlap': `stale_overlap` of the active negatives.
      'positive_rank': Median of `Seen.ranks`.
      'rank_drift': Mean over the probe of |log2(rank / rank at the last
        refresh)|, in doublings.
      'dev_lost', 'dev_won': Shares of dev queries whose first passage was
        relevant at the last refresh but is not now, and vice versa.
      'grad_norm_...': Mean over queries of `gradient_norms` for negatives of
        each source and for random passages; not for rows with a teacher or
        that search in the step.
      'above_positive': Share of 'mined' (or else 'in_use') negatives, drawn as
        for a step, that score at least as high as the positive, which are
        likely false negatives.
      'norm', 'cosine': Mean norm of random passages and mean cosine of two;
        a cosine near 1 means that all embeddings are in a narrow cone.
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


def gradient_norms(
  loss: Callable[[losses.Columns], jax.Array],
  queries: np.ndarray,
  positives: np.ndarray,
  negatives: np.ndarray,
  scale: float,
) -> np.ndarray:
  """Returns the (q,) gradient norms of each query's loss by its embeddings.

  The embeddings are the query's, its positive's and its negatives' together,
  without in-batch columns. ANCE (section 3) bounds the gradient norm of all
  parameters by that of the last layer, which is 0 for uninformative negatives.

  Args:
    loss: A function of losses.py.
    queries: (q, E) float32.
    positives: (q, E) float32.
    negatives: (q, H, E) float32.
    scale: Factor of the scores, 1 / temperature.
  """
  apart = negatives - positives[:, None]
  above = scale * np.einsum('qe,qhe->qh', queries, apart)
  # Losses depend only on differences, so the positive's score can be 0.
  positive, counted = np.zeros_like(above[:, 0]), np.ones(above.shape, bool)

  def total(above):
    return loss(losses.Columns(positive, above, counted)).sum()

  # Derivative by each negative's score.
  by_score = scale * np.asarray(jax.grad(total)(above))
  of_query = np.einsum('qh,qhe->qe', by_score, apart)
  # The gradient by the positive is -sum(by_score) q, by a negative by_score q.
  times = by_score.sum(1) ** 2 + (by_score**2).sum(1)
  squares = (of_query**2).sum(1) + times * (queries**2).sum(1)
  return np.sqrt(squares)


def _gradients(run, seen, indexed, positives, tables):
  """Returns 'grad_norm_...' by source, and 'above_positive'."""
  config, row = run.config, methods.METHODS[run.config.method]
  if row.searches or row.teacher:
    return {}  # Their losses depend on more than these columns.
  loss = getattr(losses, row.loss)
  scale = 1 / config.temperature
  random = np.random.default_rng([config.seed, _RANDOM])
  shape = len(seen.rows), config.num_hard_negatives
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
    columns = selection.draw(random, negatives, config.num_hard_negatives)
    negatives = np.take_along_axis(negatives, columns, 1)
    queries = seen.queries[inside]
    of_positives = indexed.embeddings(positives[inside])
    of_negatives = indexed.embeddings(negatives)
    norms = gradient_norms(loss, queries, of_positives, of_negatives, scale)
    found[f'grad_norm_{source}'] = float(norms.mean())
    if source in ('in_use', 'mined'):
      above = np.einsum('qe,qhe->qh', queries, of_negatives)
      positive = np.einsum('qe,qe->q', queries, of_positives)
      found['above_positive'] = float((above >= positive[:, None]).mean())
  return found


def _cone(run, indexed):
  """Returns the mean norm of random passages, and the mean cosine of two."""
  random = np.random.default_rng([run.config.seed, _PAIRS])
  rows = random.integers(
    len(run.dataset.passages), size=(2, _PROBE_PASSAGES // 2)
  )
  first, second = indexed.embeddings(rows)
  norms = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
  products = np.maximum(norms[0] * norms[1], 1e-30)
  cosines = np.einsum('pe,pe->p', first, second) / products
  return {
    'norm': float(np.concatenate(norms).mean()),
    'cosine': float(cosines.mean()),
  }


def _positives(run, seen):
  """Returns one positive per query of the probe, and `Seen.ranks`."""
  method = methods.METHODS[run.config.method]
  split = run.dataset.splits[run.config.train_split]
  pairs = split.shared_positives(last=method.last_positive)
  first = np.searchsorted(pairs[0], seen.rows)
  there = _in(pairs, seen.found, seen.rows)
  ranks = np.where(there.any(1), there.argmax(1), there.shape[1]) + 1
  return pairs[1][first], ranks.astype(np.int32)


def _in(pairs, found, rows=None):
  """Returns a (q, k) bool mask of the passages that are in `pairs`.

  Args:
    pairs: (P,) query rows and (P,) passage rows.
    found: (q, k) passage rows, -1 for none.
    rows: (q,) query rows; None for 0 to q - 1.
  """
  rows = np.arange(len(found)) if rows is None else rows
  keys = np.sort((pairs[0].astype(np.int64) << 32) + pairs[1])
  asked = (rows[:, None].astype(np.int64) << 32) + found
  return (found >= 0) & selection.is_in(asked, keys)


def _of_probe(seen, table):
  """Returns a mask of the probe's queries in a table, and their negatives."""
  places = seen.rows - table.start
  inside = (places >= 0) & (places < len(table.passages))
  return inside, table.passages[places[inside]]
