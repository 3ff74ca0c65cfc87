"""The step that searches: ADORE's loss and gradient on several devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import padded
import pytest
import steps_test

from ance_jax.core import devices as devices_lib
from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.training import losses
from ance_jax.training import methods
from ance_jax.training import optimizers
from ance_jax.training import searched
from ance_jax.training import steps

QUERIES, PASSAGES, K = 8, 103, 20
LENGTH, VOCABULARY = steps_test.LENGTH, steps_test.VOCABULARY
RETRIEVER = dataclasses.replace(steps_test.RETRIEVER, tied=False)


def slow_lambda_rank(scores, relevant, cut):
  """The loss of one query as DRhard's adore/train.py computes it, in loops."""
  pairs = [
    abs((i < cut) / (i + 1) - (j < cut) / (j + 1))
    * np.logaddexp(0, scores[j] - scores[i])
    for i in np.flatnonzero(relevant)
    for j in np.flatnonzero(~relevant)
  ]
  return np.mean(pairs) if pairs else 0.0


@pytest.mark.parametrize(
  ('scores', 'relevant', 'expected'),
  [
    ([5, 4.5, 4, 3], [2], 0.354653),
    ([5, 4.5, 4, 3, 1], [4], 1.832738),
    ([5, 4.5, 4, 3], [0, 2], 0.130171),
  ],
  ids=['third', 'not found', 'first and third'],
)
def test_loss_has_the_values_of_the_released_code(scores, relevant, expected):
  """Values of DRhard's lines, run with a cut of 4."""
  is_relevant = np.isin(np.arange(len(scores)), relevant)
  found = losses.lambda_rank(
    losses.Searched(
      jnp.array([scores]), is_relevant[None], np.ones((1, len(scores)), bool), 4
    )
  )
  assert found == pytest.approx([expected], abs=1e-6)
  slow = slow_lambda_rank(np.array(scores), is_relevant, 4)
  assert slow == pytest.approx(expected, abs=1e-6)


def test_loss_of_a_gap_of_a_hundred_is_finite():
  """The released log(1 + exp) overflows there."""
  found = losses.lambda_rank(
    losses.Searched(
      jnp.array([[100.0, 0.0]]),
      np.array([[False, True]]),
      np.ones((1, 2), bool),
      2,
    )
  )
  assert found == pytest.approx([50.0])


@pytest.fixture(scope='module')
def data():
  """Queries, some of whose positives are found, one passage their own text."""
  random = np.random.default_rng(0)
  embeddings = random.normal(size=(PASSAGES, 16)).astype(np.float32)
  groups = np.arange(PASSAGES, dtype=np.int32)
  # A copy of each of the first ten.
  groups[50:60] = groups[:10]
  params = jax.tree.map(lambda p: 3 * p, bi_encoder.init(RETRIEVER, 0))
  ids = random.integers(1, VOCABULARY, (QUERIES, LENGTH)).astype(np.int32)
  lengths = random.integers(1, LENGTH + 1, QUERIES).astype(np.int32)
  encode = bi_encoder.make_encode(RETRIEVER, 'float32', bi_encoder.QUERY)
  order = np.argsort(-np.asarray(encode(params, ids, lengths) @ embeddings.T))
  positives = random.integers(PASSAGES, size=(QUERIES, 2)).astype(np.int32)
  positives[::2, 1] = -1
  for query, rank in ((0, 4), (3, 0), (6, 19)):
    positives[query, 0] = order[query, rank]
  # Of query 2, which has one positive, group 0 is near.
  near = groups[order[2, 1]]
  groups = np.select([groups == 0, groups == near], [near, 0], groups)
  groups = groups.astype(np.int32)
  never = np.where(positives >= 0, groups[positives], -1)
  # Of query 5 the best passage is itself.
  own = np.where(np.arange(QUERIES) == 5, groups[order[:, 0]], -1)
  batch = padded.Padded(
    rows=np.arange(QUERIES, dtype=np.uint32),
    query_ids=ids,
    query_lengths=lengths,
    passage_ids=np.zeros((QUERIES, 0, LENGTH), np.int32),
    passage_lengths=np.zeros((QUERIES, 0), np.int32),
    passage_groups=np.zeros((QUERIES, 0), np.int32),
    positive_groups=np.append(never, own[:, None], 1).astype(np.int32),
    positive_rows=positives,
  )
  return params, batch, embeddings, groups


def slow_loss(queries, batch, embeddings, groups):
  """The loss, its columns picked by loops."""
  total = 0.0
  for query, positives, never in zip(
    np.asarray(queries, np.float64),
    batch.positive_rows.tolist(),
    batch.positive_groups.tolist(),
    strict=True,
  ):
    scores = embeddings.astype(np.float64) @ query
    alike = {groups[row] for row in positives if row >= 0}
    columns = [
      row
      for row in np.argsort(-scores, kind='stable')[:K].tolist()
      if groups[row] in alike or groups[row] not in never
    ]
    relevant = [groups[row] in alike for row in columns]
    cut = len(columns)
    if not any(relevant):
      columns += [row for row in positives if row >= 0]
      relevant += [True] * (len(columns) - cut)
    total += slow_lambda_rank(scores[columns], np.array(relevant), cut)
  return total / len(queries)


def loss_and_grads(config, data, num_devices):
  params, batch, embeddings, groups = data
  devices = devices_lib.local(num_devices)
  pmapped = jax.pmap(
    steps.make_gradient(config, methods.METHODS['adore'], RETRIEVER),
    axis_name=devices_lib.AXIS,
    in_axes=(None, 0, None, 0),
    out_axes=None,
    devices=devices,
  )
  blocks = [embeddings[:40], embeddings[40:]]
  packed = padded.pack(batch, retriever=RETRIEVER, num_devices=num_devices)
  return jax.device_get(
    pmapped(
      params,
      devices_lib.shard(packed, devices),
      jnp.int32(3),
      searched.place(blocks, groups, devices),
    )
  )


@pytest.mark.parametrize('num_devices', [1, 2, 4, 8])
@pytest.mark.parametrize('rows_at_once', [7, 1000])
def test_loss_is_that_of_loops_on_any_number_of_devices(
  num_devices, rows_at_once, tiny, data, monkeypatch
):
  monkeypatch.setattr(searched, '_ROWS_AT_ONCE', rows_at_once)
  config = dataclasses.replace(tiny, top_k=K, dropout_rate=0.0, temperature=1.0)
  params, batch, *passages = data
  encode = bi_encoder.make_encode(RETRIEVER, 'float32', bi_encoder.QUERY)
  queries = encode(params, batch.query_ids, batch.query_lengths)
  (loss, accuracy), grads = loss_and_grads(config, data, num_devices)
  assert loss == pytest.approx(slow_loss(queries, batch, *passages), rel=1e-5)
  assert accuracy == 1 / 8  # Of query 3 alone the positive is first.
  assert list(grads) == [bi_encoder.QUERY]


def test_gradient_on_eight_devices_is_that_of_one_and_of_finite_differences(
  tiny, data
):
  config = dataclasses.replace(tiny, top_k=K, dropout_rate=0.0, temperature=1.0)
  one, eight = (loss_and_grads(config, data, n)[1] for n in (1, 8))
  largest = max(np.abs(g).max() for g in jax.tree.leaves(one))
  assert largest > 1e-2
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest),
    one,
    eight,
  )
  params, *others = data
  direction = jax.tree.map(jnp.sign, one)
  slope = sum(
    float((g * d).sum())
    for g, d in zip(*map(jax.tree.leaves, (one, direction)), strict=True)
  )
  ends = []
  for way in (1e-4, -1e-4):
    moved = jax.tree.map(
      lambda p, d, way=way: p + way * d,
      params[bi_encoder.QUERY],
      direction[bi_encoder.QUERY],
    )
    moved = {**params, bi_encoder.QUERY: moved}
    ends.append(loss_and_grads(config, (moved, *others), 1)[0][0])
  assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(slope, rel=2e-2)


def test_micro_batches_give_the_loss_and_gradient_of_the_whole_batch(
  tiny, data
):
  """Dropout included: a query loses the same entries in any piece."""
  config = dataclasses.replace(tiny, top_k=K, dropout_rate=0.3)
  pieces = dataclasses.replace(config, micro_batch_size=2)
  expected, found = (loss_and_grads(c, data, 2) for c in (config, pieces))
  largest = max(np.abs(g).max() for g in jax.tree.leaves(expected[1]))
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest),
    found[1],
    expected[1],
  )


def test_operations_of_a_step_count_its_search_over_all_passages(tiny, data):
  config = dataclasses.replace(tiny, top_k=K)
  params, batch, embeddings, groups = data
  devices, optimizer = devices_lib.local(2), optimizers.make(tiny)
  packed = padded.pack(batch, retriever=RETRIEVER, num_devices=2)
  _, metrics = steps.make_train_step(
    config, methods.METHODS['adore'], RETRIEVER, optimizer, devices
  )(
    steps.init_state(params, [bi_encoder.QUERY], optimizer, devices),
    devices_lib.shard(packed, devices),
    searched.place([embeddings], groups, devices),
  )
  # Each query's product with each passage, forward alone.
  search = 2 * QUERIES * PASSAGES * RETRIEVER.embedding_size
  pack = packed.packs[bi_encoder.QUERY]
  of_texts = 3 * bert.flops(RETRIEVER.body, pack.ids.size, 16)
  assert float(metrics['flops']) == pytest.approx(search + of_texts, rel=1e-6)
  real = sum(
    3 * bert.flops(RETRIEVER.body, int(n), int(n)) for n in batch.query_lengths
  )
  assert float(metrics['flops_real']) == pytest.approx(search + real, rel=1e-6)
