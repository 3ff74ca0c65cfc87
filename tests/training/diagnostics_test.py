"""What a run is told about its negatives, against slow plain versions."""

import dataclasses
import pathlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ance_jax.core import devices as devices_lib
from ance_jax.core import logs
from ance_jax.data import corpus
from ance_jax.data import trec
from ance_jax.jobs import train
from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import index
from ance_jax.training import diagnostics
from ance_jax.training import experiment
from ance_jax.training import losses

pytestmark = pytest.mark.usefixtures('compiled_once')


def largest_nll(columns):
  """A loss that no row has: that of the best negative."""
  return jax.nn.softplus(columns.others.max(1) - columns.positive)


@pytest.mark.parametrize(
  'loss', [losses.pairwise_nll, losses.softmax_nll, largest_nll]
)
@pytest.mark.parametrize('far', [0.0, 40.0])
def test_gradient_norms_are_those_of_the_loss(loss, far):
  random = np.random.default_rng(0)
  queries, positives = random.standard_normal((2, 5, 4)).astype(np.float32)
  negatives = random.standard_normal((5, 3, 4)).astype(np.float32)
  # As of a model that is done, whose negatives are far below or above.
  positives += far * queries * np.array([[1], [-1], [1], [-1], [0]])

  def of_one(embeddings):
    query, positive, others = embeddings
    columns = losses.Columns(
      2.0 * (positive @ query)[None],
      2.0 * (others @ query)[None],
      jnp.ones((1, 3), bool),
    )
    return loss(columns)[0]

  for number, found in enumerate(
    diagnostics.gradient_norms(loss, queries, positives, negatives, 2.0)
  ):
    each = queries[number], positives[number], negatives[number]
    slow = np.sqrt(sum((g**2).sum() for g in jax.grad(of_one)(each)))
    np.testing.assert_allclose(found, slow, rtol=1e-4, atol=1e-6)


def test_stale_overlap_is_the_share_of_negatives_still_among_the_first():
  random = np.random.default_rng(0)
  found = np.stack([random.permutation(400)[:200] for _ in range(4)])
  rows = np.array([0, 3, 6, 9])
  # The table has the queries 2 to 7, the second and third of the probe.
  passages = random.integers(400, size=(6, 120)).astype(np.int32)
  passages[4, 50:] = -1
  seen = diagnostics.Probe(rows, None, found)
  slow = [
    passage in found[place, :100]
    for place, row in ((1, 3), (2, 6))
    for passage in passages[row - 2, :100]
    if passage >= 0
  ]
  assert len(slow) == 150
  table = diagnostics.Table(2, passages)
  assert diagnostics.stale_overlap(seen, table) == np.mean(slow)
  elsewhere = diagnostics.Table(10, passages)
  assert np.isnan(diagnostics.stale_overlap(seen, elsewhere))


@pytest.mark.parametrize(
  ('top_k', 'num_passages', 'depth'),
  [(10, 500, 100), (150, 500, 150), (150, 120, 120), (10, 60, 60)],
)
@pytest.mark.parametrize(
  ('num_queries', 'every'), [(2048, 1), (2049, 2), (4097, 3)]
)
def test_a_probe_looks_as_deep_as_what_is_mined(
  top_k, num_passages, depth, num_queries, every
):
  run = SimpleNamespace(
    config=SimpleNamespace(top_k=top_k, train_split='learn'),
    dataset=SimpleNamespace(
      queries={'learn': range(num_queries)}, passages=range(num_passages)
    ),
    encode_queries=lambda split, watch, rows: rows,
  )
  indexed = SimpleNamespace(
    search=lambda queries, k: SimpleNamespace(rows=(queries, k))
  )
  seen = diagnostics.probe(run, indexed, logs.Stopwatch())
  assert seen.rows.tolist() == list(range(0, num_queries, every))
  assert seen.found == (seen.queries, depth)


@pytest.fixture
def small():
  """A run of three training and three dev queries over ten passages."""
  random = np.random.default_rng(0)
  blocks = [random.standard_normal((size, 4)).astype(np.float32)
            for size in (6, 4)]  # fmt: skip

  def split(offsets, passages, grades):
    return SimpleNamespace(
      offsets=np.array(offsets), passages=np.array(passages),
      grades=np.array(grades),
    )  # fmt: skip

  train_split = split([0, 2, 3, 4], [4, 7, 0, 9], [1, 2, 1, 1])
  dev = split([0, 1, 3, 4], [3, 5, 6, 2], [1, 0, 2, 1])
  for one in (train_split, dev):
    for name in ('positives', 'shared_positives', 'twins'):
      setattr(one, name, getattr(corpus.Split, name).__get__(one))
    one.groups, one.ids = None, range(3)
  run = SimpleNamespace(
    config=SimpleNamespace(
      method='ance', temperature=0.5, seed=0, num_hard_negatives=1,
      train_split='learn', dev_split='held',
    ),
    dataset=SimpleNamespace(
      passages=range(10), splits={'learn': train_split, 'held': dev}
    ),
  )  # fmt: skip
  indexed = corpus_index.IndexedCorpus(
    index.build('Flat', '', blocks), '', None, None, blocks
  )
  queries = random.standard_normal((3, 4)).astype(np.float32)
  return run, indexed, queries


def test_ranks_and_what_was_lost_and_won(small):
  run, indexed, queries = small
  found = np.array([[1, 7, 4, 2], [5, 6, 8, 2], [9, 1, 2, 3]])
  seen = diagnostics.Probe(np.arange(3), queries, found)
  ranking = trec.Ranking(np.array([[3, 1], [5, 6], [2, 0]]), None)
  right = np.array([False, True, False])
  last = diagnostics.Seen(np.array([1, 5, 4]), right)

  values, now = diagnostics.look(run, seen, indexed, ranking, {}, last)

  assert now.ranks.tolist() == [2, 5, 1]
  # Passage 5 is judged not relevant to the second query.
  assert now.right.tolist() == [True, False, True]
  assert values['positive_rank'] == 2
  assert values['rank_drift'] == (1 + 0 + 2) / 3
  assert (values['dev_lost'], values['dev_won']) == (1 / 3, 2 / 3)
  embeddings = np.concatenate(indexed.blocks)
  norms = np.linalg.norm(embeddings, axis=1)
  assert norms.min() < values['norm'] < norms.max()
  # Over all pairs, of which some thousands are drawn.
  unit = embeddings / norms[:, None]
  assert abs(values['cosine'] - (unit @ unit.T).mean()) < 0.05
  assert 'overlap' not in values
  assert 'above_positive' not in values


def test_queries_of_one_text_share_positives_in_training_but_not_on_dev(small):
  run, indexed, queries = small
  run.dataset.splits['learn'].groups = np.array([0, 1, 0])
  run.dataset.splits['held'].groups = np.array([0, 1, 1])
  found = np.array([[1, 9, 4, 2], [5, 9, 8, 2], [9, 1, 2, 3]])
  seen = diagnostics.Probe(np.arange(3), queries, found)
  ranking = trec.Ranking(np.array([[3, 1], [2, 6], [2, 0]]), None)
  _, now = diagnostics.look(run, seen, indexed, ranking, {}, None)
  assert now.ranks.tolist() == [2, 5, 1]
  assert now.right.tolist() == [True, False, True]


def test_norms_by_source_and_negatives_above_the_positive(small):
  run, indexed, queries = small
  seen = diagnostics.Probe(np.arange(3), queries, np.zeros((3, 4), int))
  ranking = trec.Ranking(np.array([[3], [5], [2]]), None)
  tables = {
    'in_use': diagnostics.Table(0, np.array([[1], [2], [3]])),
    'mined': diagnostics.Table(1, np.array([[8], [5]])),
  }
  values, _ = diagnostics.look(run, seen, indexed, ranking, tables, None)

  embeddings = np.concatenate(indexed.blocks)
  positives = [4, 0, 9]
  for source, pairs in (
    ('in_use', [(0, 1), (1, 2), (2, 3)]), ('mined', [(1, 8), (2, 5)])
  ):  # fmt: skip
    norms, above = [], []
    for row, negative in pairs:
      query, positive = queries[row], embeddings[positives[row]]
      apart = embeddings[negative] - positive
      weight = 2 / (1 + np.exp(-2 * query @ apart))
      parts = weight * apart, weight * query, weight * query
      norms.append(np.linalg.norm(np.concatenate(parts)))
      above.append(query @ apart >= 0)
    expected = pytest.approx(np.mean(norms), rel=1e-5)
    assert values[f'grad_norm_{source}'] == expected
  assert values['above_positive'] == np.mean(above)
  assert 'grad_norm_random' in values
  # A query that was left none of is not among them; nor is one that equals its
  # positive below it.
  tables = {'mined': diagnostics.Table(0, np.array([[-1], [0], [-1]]))}
  values, _ = diagnostics.look(run, seen, indexed, ranking, tables, None)
  assert values['above_positive'] == 1


def test_the_last_positive_alone_has_a_rank_where_a_row_has_no_other(small):
  run, _, queries = small
  found = np.array([[1, 4, 7, 2], [5, 6, 8, 0], [9, 1, 2, 3]])
  seen = diagnostics.Probe(np.arange(3), queries, found)
  for name, rank in (('ance', 2), ('ance_code', 3)):
    run.config.method = name
    assert diagnostics._positives(run, seen)[1].tolist() == [rank, 4, 1]


def test_operations_are_those_that_xla_counts_for_products():
  body = bert.BodyConfig(
    model_type='bert', vocab_size=50, hidden_size=64, num_layers=2,
    num_heads=4, intermediate_size=256, max_positions=64, num_types=2,
    layer_norm_epsilon=1e-12, activation='gelu',
  )  # fmt: skip
  module = bert.Body(body)
  ids, lengths = jnp.zeros((4, 32), jnp.int32), jnp.full(4, 32)
  params = jax.eval_shape(module.init, jax.random.key(0), ids, lengths)
  counted = jax.jit(module.apply).lower(params, ids, lengths).cost_analysis()
  # It counts additions, exponentials and the like, too.
  ratio = counted['flops'] / bert.flops(body, ids.size, 32)
  assert 1 < ratio < 1.15


def test_a_run_logs_what_it_looked_at_and_what_it_cost(tiny, monkeypatch):
  seen, shard = [], devices_lib.shard
  monkeypatch.setattr(
    devices_lib, 'shard', lambda *a: (seen.append(a[0]), shard(*a))[1]
  )
  config = dataclasses.replace(
    tiny, num_devices=1, steps_per_eval=2, warmup_method='bm25'
  )
  train.run(config)

  workdir = pathlib.Path(config.workdir)
  lines = logs.read(workdir)
  looked = {x['step']: x for x in lines if 'probe/cosine' in x}
  assert list(looked) == [0, 2, 4, 6, 8, 10, 12]
  assert 'probe/grad_norm_bm25' in looked[2]
  assert 'probe/overlap' not in looked[4]
  assert {'probe/grad_norm_in_use', 'probe/dev_lost'} <= looked[6].keys()
  # With the weights that mined them, all of the first 100 are there.
  folder = workdir / 'refresh/00000004'
  assert {'ranks.npy', 'right.npy'} <= {p.name for p in folder.iterdir()}
  flops = logs.series(workdir, 'flops/train')
  body = experiment.open(config, ('train', 'dev'))[0].retriever.config.body
  packs = [batch.packs[bi_encoder.TIED] for batch in seen]
  computed = [bert.flops(body, p.ids.size, p.ids.shape[-1]) for p in packs]
  real = [
    sum(bert.flops(body, int(n), int(n)) for n in p.lengths.ravel())
    for p in packs
  ]
  of_real = logs.series(workdir, 'flops_real/train')
  for step in (4, 12):
    assert flops[step] == pytest.approx(3 * sum(computed[:step]))
    assert of_real[step] == pytest.approx(3 * sum(real[:step]))
  assert 0 < of_real[12] < flops[12]
  refreshed = logs.series(workdir, 'flops/search')
  assert refreshed.keys() == {4, 8}
  # Training queries by passages by width.
  assert refreshed[4] == 2 * 48 * 150 * 16
