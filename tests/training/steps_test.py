"""The step: one loss and gradient on any number of devices; the optimizer."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import padded
import pytest

from ance_jax import config as config_lib
from ance_jax.core import devices as devices_lib
from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.training import columns as columns_lib
from ance_jax.training import losses
from ance_jax.training import methods
from ance_jax.training import optimizers
from ance_jax.training import steps

BATCH, NEGATIVES, LENGTH, VOCABULARY = 8, 2, 6, 50
RETRIEVER = bi_encoder.RetrieverConfig(
  bert.BodyConfig('bert', VOCABULARY, 16, 1, 2, 32, 16, 1, 1e-12, 'gelu'),
  tied=True,
  pooling='mean',
  head_size=0,
  head_norm=True,
  similarity='dot',
  query_length=LENGTH,
  passage_length=LENGTH,
  title_separator=' ',
)


DEEP = dataclasses.replace(
  RETRIEVER, body=dataclasses.replace(RETRIEVER.body, num_layers=3)
)
# At this temperature all columns weigh in: scores differ by some 10.
DROPOUT = {'dropout_rate': 0.3, 'temperature': 10.0}


# One row of each kind that the step tells apart.
KINDS = {
  (row.in_batch, row.loss): name
  for name, row in methods.METHODS.items()
  if not row.searches
}.values()


@pytest.fixture
def batch():
  """Passages of few text groups, so that many columns are no negatives."""
  random = np.random.default_rng(0)
  columns = 1 + NEGATIVES
  groups = random.integers(12, size=(BATCH, columns)).astype(np.int32)
  other = np.where(np.arange(BATCH) % 2, random.integers(12, size=BATCH), -1)
  return padded.Padded(
    rows=np.arange(BATCH, dtype=np.uint32),
    query_ids=random.integers(1, VOCABULARY, (BATCH, LENGTH)).astype(np.int32),
    query_lengths=random.integers(1, LENGTH + 1, BATCH).astype(np.int32),
    passage_ids=random.integers(1, VOCABULARY, (BATCH, columns, LENGTH)).astype(
      np.int32
    ),
    passage_lengths=random.integers(1, LENGTH + 1, (BATCH, columns)).astype(
      np.int32
    ),
    passage_groups=groups,
    positive_groups=np.stack([groups[:, 0], other], 1).astype(np.int32),
    taught=random.normal(size=(BATCH, columns)).astype(np.float32),
  )


def with_guide(batch, method):
  """Adds a guide's embeddings for a row that learns from one."""
  if method.teacher != 'guide':
    return batch
  random = np.random.default_rng(1)
  shape = batch.passage_groups.shape
  return batch._replace(
    taught=None,
    guide_queries=random.normal(size=(BATCH, 3)).astype(np.float32),
    guide_passages=random.normal(size=(*shape, 3)).astype(np.float32),
  )


@pytest.fixture
def params():
  return make_params(RETRIEVER)


def make_params(retriever):
  """Parameters with a standard deviation that makes scores differ."""
  return jax.tree.map(lambda p: 3 * p, bi_encoder.init(retriever, 0))


def loss_and_grads(
  config, method, params, batch, num_devices, step=3, retriever=RETRIEVER
):
  devices = devices_lib.local(num_devices)
  pmapped = jax.pmap(
    steps.make_gradient(config, method, retriever),
    axis_name=devices_lib.AXIS,
    in_axes=(None, 0, None),
    out_axes=None,
    devices=devices,
  )
  packed = place(batch, devices, config, retriever)
  (value, accuracy), grads = jax.device_get(
    pmapped(params, packed, jnp.int32(step))
  )
  return value, accuracy, grads


def place(batch, devices, config, retriever=RETRIEVER, **kwargs):
  """Packs a batch, and puts it on devices."""
  packed = padded.pack(
    batch,
    retriever=retriever,
    num_devices=len(devices),
    micro=config.micro_batch_size,
    **kwargs,
  )
  return devices_lib.shard(packed, devices)


def loss_of_scores(method, scores, batch):
  """The loss of (B, B (1 + H)) scores of all passages, columns by loops."""
  total = 0
  for i in range(BATCH):
    banned = set(batch.positive_groups[i].tolist())
    columns = [
      other * (1 + NEGATIVES) + place
      for other in range(BATCH)
      for place in range(1 + NEGATIVES)
      if (method.in_batch or (other == i and place))
      and int(batch.passage_groups[other, place]) not in banned
    ]
    positive = scores[i, i * (1 + NEGATIVES)]
    negatives = scores[i, np.array(columns, int)]
    everyone = batch.taught
    if batch.guide_queries is not None:
      everyone = batch.guide_passages @ batch.guide_queries[i]
    taught = np.append(everyone[i, 0], everyone.ravel()[np.array(columns, int)])
    if method.loss == 'distillation':
      own = jax.nn.log_softmax(jnp.concatenate([positive[None], negatives]))
      taught = np.exp(taught) / np.exp(taught).sum()
      total += (taught * (np.log(taught) - own)).sum()
    elif method.loss == 'margin_mse':
      if columns:
        margins = (positive - negatives) - (taught[0] - taught[1:])
        total += (margins**2).mean()
    elif method.loss == 'softmax_nll':
      row = jnp.concatenate([positive[None], negatives])
      total += jax.nn.logsumexp(row) - positive
    elif columns:
      total += jnp.logaddexp(0, negatives - positive).mean()
  return total / BATCH


def slow_loss(config, method, params, batch, number=1):
  """The loss on one device, no collective, its columns picked by loops.

  Each passage has `number` pieces, scored separately; its score is the best.
  """
  encode = bi_encoder.make_encode(RETRIEVER, 'float32', bi_encoder.QUERY)
  queries = encode(params, batch.query_ids, batch.query_lengths)
  pieces = encode(
    params,
    batch.passage_ids.reshape(-1, LENGTH),
    np.maximum(batch.passage_lengths.ravel(), 1),
  )
  scores = queries @ pieces.T / config.temperature
  best = []
  for passage, there in enumerate(batch.passage_lengths.reshape(-1, number)):
    own = passage * number + np.flatnonzero(there)
    best.append(scores[:, own].max(1))
  return loss_of_scores(method, jnp.stack(best, 1), batch)


@pytest.mark.parametrize('name', KINDS)
def test_loss_and_gradient_are_those_of_one_device_without_collectives(
  name, tiny, params, batch
):
  # Scores differ by some 10: at this temperature all columns weigh in.
  config = dataclasses.replace(tiny, dropout_rate=0.0, temperature=10.0)
  method = methods.METHODS[name]
  batch = with_guide(batch, method)
  expected, gradient = jax.jit(
    jax.value_and_grad(lambda p: slow_loss(config, method, p, batch))
  )(params)
  largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
  assert largest > 1e-3
  value, _, grads = loss_and_grads(config, method, params, batch, 8)
  assert value == pytest.approx(float(expected), rel=1e-6, abs=1e-6)
  assert_near(grads, gradient, atol=1e-5 * largest)


@pytest.mark.parametrize('name', KINDS)
def test_small_pieces_give_loss_accuracy_and_gradient_of_the_whole_batch(
  name, tiny, params, batch
):
  """Dropout included: a text loses the same entries in any piece."""
  config = dataclasses.replace(tiny, **DROPOUT)
  method = methods.METHODS[name]
  batch = with_guide(batch, method)
  expected = loss_and_grads(config, method, params, batch, 1)
  pieces = dataclasses.replace(config, micro_batch_size=2)
  found = loss_and_grads(pieces, method, params, batch, 2)
  assert_the_same(found, expected)


def test_remat_gives_loss_accuracy_and_gradient_of_doing_without(tiny, batch):
  config = dataclasses.replace(tiny, **DROPOUT)
  remat = dataclasses.replace(config, remat=True, micro_batch_size=2)
  arguments = methods.METHODS['dpr'], make_params(DEEP), batch, 2
  found, expected = (
    loss_and_grads(settings, *arguments, retriever=DEEP)
    for settings in (remat, config)
  )
  assert_the_same(found, expected)


def assert_the_same(found, expected):
  """Two results of `loss_and_grads` differ by less than 1e-5 of the largest."""
  assert found[0] == pytest.approx(float(expected[0]), rel=1e-5)
  assert found[1] == expected[1]
  largest = max(np.abs(g).max() for g in jax.tree.leaves(expected[2]))
  assert largest > 1e-3
  assert_near(found[2], expected[2], atol=1e-5 * largest)


def assert_near(found, expected, rtol=0, **tolerance):
  jax.tree.map(
    lambda one, other: np.testing.assert_allclose(
      one, other, rtol=rtol, **tolerance
    ),
    found,
    expected,
  )


def test_pieces_and_remat_take_half_of_the_memory_away(tiny, batch):
  # So many texts that activations are most of it, as in a run.
  batch = jax.tree.map(lambda x: np.concatenate([x] * 16), batch)
  devices = devices_lib.local(1)

  def temporary_bytes(name, **changes):
    config = dataclasses.replace(tiny, **DROPOUT, **changes)
    gradient = jax.pmap(
      steps.make_gradient(config, methods.METHODS[name], DEEP),
      axis_name=devices_lib.AXIS,
      in_axes=(None, 0, None),
      out_axes=None,
      devices=devices,
    )
    shapes = bi_encoder.shapes(DEEP)
    packed = place(batch, devices, config)
    compiled = gradient.lower(shapes, packed, jnp.int32(0)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # The two rows encode the same texts, with the same activations.
  whole = temporary_bytes('dpr')
  found = {
    'pieces, in-batch columns': temporary_bytes('dpr', micro_batch_size=8),
    'pieces, own columns': temporary_bytes('ance', micro_batch_size=8),
    'remat': temporary_bytes('dpr', remat=True),
  }
  print(f'whole {whole:,} bytes', found)
  assert max(found.values()) < whole / 2


def test_a_step_in_pieces_is_compiled_once(tiny, params, batch, monkeypatch):
  config = dataclasses.replace(tiny, micro_batch_size=2, remat=True)
  devices = devices_lib.local(2)
  optimizer = optimizers.make(config)
  state = steps.init_state(params, RETRIEVER.towers, optimizer, devices)
  traced = []

  def loss(columns):
    traced.append(1)
    return losses.softmax_nll(columns)

  monkeypatch.setattr(losses, 'counted', loss, raising=False)
  method = methods.METHODS['dpr']._replace(loss='counted')
  train_step = steps.make_train_step(
    config, method, RETRIEVER, optimizer, devices
  )
  for number in range(3):
    state, _ = train_step(state, place(batch, devices, config), None)
    if not number:
      once = len(traced)
  assert int(state.step) == 3
  assert len(traced) == once > 0


def test_no_step_of_one_seed_has_the_dropout_of_another_step_or_seed(
  tiny, params, batch
):
  method = methods.METHODS['in_batch']
  values = []
  for seed in (0, 3):
    config = dataclasses.replace(tiny, dropout_rate=0.3, seed=seed)
    for step in (0, 3):
      found = loss_and_grads(config, method, params, batch, 1, step)
      values.append(float(found[0]))
  assert len(set(values)) == 4


def test_accuracy_is_the_share_of_positives_above_all_negatives(
  tiny, params, batch
):
  config = dataclasses.replace(tiny, dropout_rate=0.0)
  method = methods.METHODS['ance']
  _, accuracy, _ = loss_and_grads(config, method, params, batch, 4)
  encode = bi_encoder.make_encode(RETRIEVER, 'float32', bi_encoder.QUERY)
  right = []
  for i in range(BATCH):
    query = encode(params, batch.query_ids[[i]], batch.query_lengths[[i]])[0]
    passages = encode(params, batch.passage_ids[i], batch.passage_lengths[i])
    scores = np.asarray(passages @ query)
    counted = ~np.isin(batch.passage_groups[i], batch.positive_groups[i])
    right.append(all(s < scores[0] for s in scores[1:][counted[1:]]))
  assert accuracy == pytest.approx(np.mean(right))
  # Where all texts have one embedding, a positive is above no negative.
  zeros = jax.tree.map(jnp.zeros_like, params)
  _, accuracy, _ = loss_and_grads(config, method, zeros, batch, 4)
  others = batch.passage_groups[:, 1:, None]
  none = (others == batch.positive_groups[:, None]).any(-1).all(-1)
  assert accuracy == none.mean() < 1


def test_step_is_one_step_of_adamw_on_the_clipped_gradient(tiny, params, batch):
  config = dataclasses.replace(
    tiny,
    dropout_rate=0.0,
    optimizer='adamw',
    clip_norm=0.5,
    weight_decay=0.1,
    lr_warmup_steps=0,
  )
  method = methods.METHODS['dpr']
  devices = devices_lib.local(4)
  optimizer = optimizers.make(config)
  before = jax.device_get(params)
  state = steps.init_state(params, RETRIEVER.towers, optimizer, devices)
  train_step = steps.make_train_step(
    config, method, RETRIEVER, optimizer, devices
  )
  _, _, grads = loss_and_grads(config, method, before, batch, 1)
  packed = place(batch, devices, config)
  state, metrics = train_step(state, packed, None)
  norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
  assert float(metrics['grad_norm']) == pytest.approx(norm, rel=1e-5)
  assert norm > config.clip_norm
  # Devices have texts of unequal lengths.
  real = batch.query_lengths.sum() + batch.passage_lengths.sum()
  assert float(metrics['real_tokens']) == pytest.approx(
    real / packed.packs[bi_encoder.TIED].ids.size
  )
  for (path, old), new, grad in zip(
    jax.tree.leaves_with_path(before),
    jax.tree.leaves(state.params),
    jax.tree.leaves(grads),
    strict=True,
  ):
    grad = grad * config.clip_norm / norm
    # The first step of Adam: both moments are the gradient after correction.
    update = grad / (np.abs(grad) + config.adam_epsilon)
    if path[-1].key not in ('bias', 'scale'):
      update = update + config.weight_decay * old
    # An entry of about epsilon moves anywhere between 0 and 1.
    sure = np.abs(grad) > 1e-6
    np.testing.assert_allclose(
      np.asarray(new)[sure],
      (old - config.learning_rate * update)[sure],
      atol=1e-4 * config.learning_rate,
      rtol=1e-5,
    )
  assert int(state.step) == 1


@pytest.mark.parametrize('tower', [bi_encoder.QUERY, bi_encoder.PASSAGE])
def test_a_tree_that_a_row_does_not_train_keeps_parameters_and_moments(
  tower, tiny, batch
):
  config = dataclasses.replace(
    tiny, dropout_rate=0.0, clip_norm=0.01, lr_warmup_steps=0
  )
  retriever = dataclasses.replace(RETRIEVER, tied=False)
  both = methods.METHODS['dpr']
  devices, optimizer = devices_lib.local(2), optimizers.make(config)
  params = make_params(retriever)
  *_, grads = loss_and_grads(config, both, params, batch, 2, 0, retriever)
  state = steps.init_state(params, retriever.towers, optimizer, devices)
  before = jax.device_get(state)
  train_step = steps.make_train_step(
    config, both._replace(trains=(tower,)), retriever, optimizer, devices
  )
  packed = place(batch, devices, config, retriever)
  state, metrics = train_step(state, packed, None)
  after = jax.device_get(state)
  for name in retriever.towers:
    changed = [
      (new != old).any()
      for old, new in zip(
        jax.tree.leaves((before.params[name], before.opt_state[name])),
        jax.tree.leaves((after.params[name], after.opt_state[name])),
        strict=True,
      )
    ]
    # Some gradients, such as those of the keys' biases, are always 0.
    assert np.mean(changed) > 0.8 if name == tower else not any(changed)
  # What is not trained is not in the norm that is clipped.
  norm = float(optax.tree.norm(grads[tower]))
  assert norm > config.clip_norm
  assert float(metrics['grad_norm']) == pytest.approx(norm, rel=1e-5)
  clipped = optax.tree.norm(after.opt_state[tower][0].mu) / 0.1
  assert float(clipped) == pytest.approx(config.clip_norm, rel=1e-4)


def test_what_no_row_of_a_run_trains_has_no_moments(tiny):
  retriever = dataclasses.replace(RETRIEVER, tied=False)
  params, devices = make_params(retriever), devices_lib.local(2)
  state = steps.init_state(params, ('query',), optimizers.make(tiny), devices)
  assert state.opt_state.keys() == {'query'}
  assert state.params.keys() == {'query', 'passage'}


def test_state_is_donated_and_alike_on_all_devices(tiny, params, batch):
  devices = devices_lib.local(8)
  optimizer = optimizers.make(tiny)
  state = steps.init_state(params, RETRIEVER.towers, optimizer, devices)
  train_step = steps.make_train_step(
    tiny, methods.METHODS['in_batch'], RETRIEVER, optimizer, devices
  )
  old = jax.tree.leaves(state.params)[0]
  state, _ = train_step(state, place(batch, devices, tiny), None)
  assert old.is_deleted()
  for leaf in jax.tree.leaves(state):
    copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(copies) == 8
    for copy in copies[1:]:
      np.testing.assert_array_equal(copy, copies[0])


def test_restored_shapes_fit_the_state(tiny, params):
  devices = devices_lib.local(2)
  optimizer = optimizers.make(tiny)
  state = steps.init_state(params, RETRIEVER.towers, optimizer, devices)
  shapes = steps.state_shapes(
    bi_encoder.shapes(RETRIEVER), RETRIEVER.towers, optimizer, devices
  )
  assert jax.tree.structure(shapes) == jax.tree.structure(state)
  for shape, leaf in zip(
    jax.tree.leaves(shapes), jax.tree.leaves(state), strict=True
  ):
    assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
    assert shape.sharding == leaf.sharding


def in_pieces(batch, number, random):
  """The batch with `number` pieces a passage, some of them missing."""
  shape = BATCH, (1 + NEGATIVES) * number
  lengths = random.integers(1, LENGTH + 1, shape)
  there = random.integers(1, number + 1, (BATCH, 1 + NEGATIVES, 1))
  missing = (np.arange(number) >= there).reshape(shape)
  return batch._replace(
    passage_ids=random.integers(1, VOCABULARY, (*shape, LENGTH)).astype(
      np.int32
    ),
    passage_lengths=np.where(missing, 0, lengths).astype(np.int32),
  )


@pytest.mark.parametrize('name', ['ance', 'ance_in_batch'])
def test_a_passage_in_pieces_is_scored_by_its_best_one(
  name, tiny, params, batch
):
  config = dataclasses.replace(tiny, dropout_rate=0.0, temperature=10.0)
  method = methods.METHODS[name]
  batch = with_guide(batch, method)
  batch = in_pieces(batch, 3, np.random.default_rng(1))
  expected, gradient = jax.jit(
    jax.value_and_grad(lambda p: slow_loss(config, method, p, batch, 3))
  )(params)
  cached = dataclasses.replace(config, micro_batch_size=2)
  value, _, grads = loss_and_grads(cached, method, params, batch, 2)
  assert value == pytest.approx(float(expected), rel=1e-6, abs=1e-6)
  assert_near(grads, gradient, rtol=1e-4, atol=1e-5)


def test_a_piece_that_is_missing_is_never_the_best():
  scores = jnp.float32([[-5, -7, 3, -2, 9, 9]])
  best = columns_lib._best(scores, jnp.array([[3, 2, 0, 1, 0, 0]]), 3)
  assert best.tolist() == [[-5, -2]]


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('pieces', [1, 3])
def test_each_text_of_a_batch_has_dropout_of_its_own(pieces, tied, batch):
  batch = in_pieces(batch, pieces, np.random.default_rng(1))
  retriever = dataclasses.replace(RETRIEVER, tied=tied)
  packed = padded.pack(batch, retriever=retriever, num_devices=2)
  seen = [
    number
    for pack in packed.packs.values()
    for number in pack.numbers[pack.lengths > 0].tolist()
  ]
  there = BATCH + (batch.passage_lengths > 0).sum()
  assert len(set(seen)) == len(seen) == there


@pytest.mark.parametrize('tied', [True, False])
def test_operations_are_those_of_real_tokens_and_of_computed_ones(
  tied, tiny, batch
):
  retriever = dataclasses.replace(RETRIEVER, tied=tied)
  devices, optimizer = devices_lib.local(2), optimizers.make(tiny)
  state = steps.init_state(
    make_params(retriever), retriever.towers, optimizer, devices
  )
  packed = place(batch, devices, tiny, retriever)
  _, metrics = steps.make_train_step(
    tiny, methods.METHODS['dpr'], retriever, optimizer, devices
  )(state, packed, None)

  def of_token(length):
    # Four matrices of attention, two behind it, and the others.
    return 3 * 2 * (4 * 16 * 16 + 2 * 16 * 32 + 2 * 16 * length)

  lengths = [*batch.query_lengths, *batch.passage_lengths.ravel()]
  real = sum(int(n) * of_token(int(n)) for n in lengths)
  size = sum(pack.ids.size for pack in packed.packs.values())
  assert float(metrics['flops_real']) == pytest.approx(real, rel=1e-6)
  assert float(metrics['flops']) == pytest.approx(size * of_token(16), rel=1e-6)


def embedded(params, batch):
  """(B, E) queries and (B, 1 + H, E) passages, without dropout."""
  encode = bi_encoder.make_encode(RETRIEVER, 'float32', bi_encoder.QUERY)
  queries = encode(params, batch.query_ids, batch.query_lengths)
  passages = encode(
    params, batch.passage_ids.reshape(-1, LENGTH), batch.passage_lengths.ravel()
  )
  passages = np.asarray(passages).reshape(BATCH, 1 + NEGATIVES, -1)
  return np.asarray(queries), passages


def nll(positive, others):
  scores = np.array([positive, *others], np.float64)
  return np.log(np.exp(scores - scores.max()).sum()) + scores.max() - positive


def allowed(batch, query, group):
  return group not in batch.positive_groups[query].tolist()


def test_likely_false_negatives_are_masked_by_their_own_score(
  tiny, params, batch
):
  queries, passages = embedded(params, batch)
  scores = np.einsum('be,cde->bcd', queries, passages)
  own = scores[np.arange(BATCH), np.arange(BATCH)]
  margin = float(np.median(own[:, 1:] - own[:, :1]))
  total = 0
  for query in range(BATCH):
    positive = own[query, 0]
    total += nll(
      positive,
      [
        scores[query, other, place]
        for other in range(BATCH)
        for place in range(1 + NEGATIVES)
        if allowed(batch, query, batch.passage_groups[other, place])
        and scores[query, other, place] <= positive + margin
      ],
    )
  config = dataclasses.replace(
    tiny, dropout_rate=0.0, temperature=1.0, mask_above=margin
  )
  method = methods.METHODS['dpr']
  found, accuracy, _ = loss_and_grads(config, method, params, batch, 4)
  assert found == pytest.approx(total / BATCH, rel=1e-5)
  unmasked, _, _ = loss_and_grads(
    dataclasses.replace(config, mask_above=None), method, params, batch, 4
  )
  assert found < unmasked - 0.1


@pytest.mark.parametrize('name', ['dpr', 'bm25'])
@pytest.mark.parametrize('margin', [0.0, 0.5])
def test_the_guide_masks_what_it_ranks_near_the_positive(
  name, margin, tiny, params, batch
):
  batch = with_guide(batch, methods.METHODS['guided'])
  queries, passages = embedded(params, batch)
  method, total = methods.METHODS[name], 0
  for query in range(BATCH):
    by_guide = batch.guide_passages @ batch.guide_queries[query]
    scores = passages @ queries[query]
    total += nll(
      scores[query, 0],
      [
        scores[other, place]
        for other in range(BATCH)
        for place in range(1 + NEGATIVES)
        if (method.in_batch or (other == query and place))
        and allowed(batch, query, batch.passage_groups[other, place])
        and by_guide[other, place] <= by_guide[query, 0] - margin
      ],
    )
  config = dataclasses.replace(
    tiny, dropout_rate=0.0, temperature=1.0, guide='x', guide_margin=margin
  )
  found, _, _ = loss_and_grads(config, method, params, batch, 2)
  assert found == pytest.approx(total / BATCH, rel=1e-5)


def test_the_guide_masks_by_gistembeds_worked_values():
  """Guide .80 for the positive; .79 .81 .80 .70 for the others."""
  one = np.ones((1, 1), np.float32)
  batch = padded.Padded(
    rows=np.zeros(1, np.uint32),
    query_ids=one.astype(int),
    query_lengths=np.ones(1, int),
    passage_ids=np.ones((1, 5, 1), int),
    passage_lengths=np.ones((1, 5), int),
    passage_groups=np.arange(5)[None],
    positive_groups=np.zeros((1, 1), int),
    guide_queries=one,
    guide_passages=np.float32([0.80, 0.79, 0.81, 0.80, 0.70]).reshape(1, 5, 1),
  )
  passages = np.float32([4.5, 3, 5, 4, 1]).reshape(1, 5, 1)
  for margin, expected in ((0.0, 0.620500), (0.05, 0.029750), (None, 1.255211)):
    config = config_lib.Config(
      method='bm25',
      guide='' if margin is None else 'x',
      guide_margin=margin,
      workdir='x',
    )
    of_batch = columns_lib.make(config, methods.METHODS['bm25'])
    columns, _ = of_batch(one, passages, batch)
    found = losses.softmax_nll(columns)
    assert found == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize('which', ['hard', 'all'])
@pytest.mark.parametrize('name', ['dpr', 'bm25'])
def test_hard_negatives_weigh_more_by_their_own_score(
  which, name, tiny, params, batch
):
  queries, passages = embedded(params, batch)
  method, total, weight = methods.METHODS[name], 0, 0.4
  for query in range(BATCH):
    scores = passages @ queries[query]
    others = []
    for other in range(BATCH):
      for place in range(1 + NEGATIVES):
        if (method.in_batch or (other == query and place)) and allowed(
          batch, query, batch.passage_groups[other, place]
        ):
          harder = which == 'all' or other == query
          others.append(scores[other, place] * (1 + weight * harder))
    total += nll(scores[query, 0], others)
  config = dataclasses.replace(
    tiny, dropout_rate=0.0, temperature=1.0, hardness_weight=weight,
    hardness_columns=which,
  )  # fmt: skip
  found, _, _ = loss_and_grads(config, method, params, batch, 4)
  assert found == pytest.approx(total / BATCH, rel=1e-5)


def test_the_weight_of_hard_negatives_has_no_gradient():
  """d/ds log(1 + exp(s (1 + w))) with w s constant is the sigmoid of both."""
  batch = padded.Padded(
    *(np.zeros(1, np.uint32), np.ones((1, 1), int), np.ones(1, int)),
    np.ones((1, 2, 1), int), np.ones((1, 2), int), np.arange(2)[None],
    np.zeros((1, 1), int),
  )  # fmt: skip
  config = config_lib.Config(method='bm25', hardness_weight=3.0, workdir='x')
  of_batch = columns_lib.make(config, methods.METHODS['bm25'])

  def loss(passages):
    one = jnp.ones((1, 1))
    return losses.softmax_nll(of_batch(one, passages, batch)[0]).sum()

  grads = jax.grad(loss)(jnp.array([0.0, 0.5]).reshape(1, 2, 1)).ravel()
  sigmoid = 1 / (1 + np.exp(-0.5 * 4))
  np.testing.assert_allclose(grads, [-sigmoid, sigmoid], rtol=1e-5)


@pytest.mark.parametrize(
  ('num_devices', 'mask_above'), [(1, None), (4, None), (4, 0.0)]
)
def test_symmetric_columns_are_those_of_both_sides(
  num_devices, mask_above, tiny, params, batch
):
  # A positive of query 0 is that of query 3, which has no other.
  positive_groups = batch.positive_groups.copy()
  positive_groups[[0, 3], 1] = batch.passage_groups[3, 0], -1
  assert batch.passage_groups[0, 0] != batch.passage_groups[3, 0]
  batch = batch._replace(positive_groups=positive_groups)
  queries, passages = embedded(params, batch)
  first, total = passages[:, 0], 0
  for i in range(BATCH):
    apart = [
      j
      for j in range(BATCH)
      if j != i
      and allowed(batch, i, batch.passage_groups[j, 0])
      and allowed(batch, j, batch.passage_groups[i, 0])
    ]
    others = [
      queries[i] @ passages[j, place]
      for j in range(BATCH)
      for place in range(1 + NEGATIVES)
      if allowed(batch, i, batch.passage_groups[j, place])
    ]
    others += [queries[i] @ queries[j] for j in apart]
    others += [first[i] @ first[j] for j in apart]
    others += [first[i] @ queries[j] for j in apart]
    positive = queries[i] @ first[i]
    if mask_above is not None:
      others = [score for score in others if score <= positive + mask_above]
    # At this temperature all columns weigh in.
    total += nll(positive / 10, np.array(others) / 10)
  config = dataclasses.replace(
    tiny, dropout_rate=0.0, temperature=10.0, symmetric_columns=True,
    mask_above=mask_above,
  )  # fmt: skip
  method = methods.METHODS['dpr']
  found, _, _ = loss_and_grads(config, method, params, batch, num_devices)
  assert found == pytest.approx(total / BATCH, rel=1e-5)


@pytest.mark.parametrize('similarity', ['dot', 'cosine'])
def test_matryoshka_is_the_mean_over_widths(similarity, tiny, params, batch):
  retriever = dataclasses.replace(RETRIEVER, similarity=similarity)
  queries, passages = embedded(params, batch)
  total = 0
  for width in (16, 8, 4):
    cut = [x[..., :width] for x in (queries, passages)]
    if similarity == 'cosine':
      cut = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in cut]
    for i in range(BATCH):
      scores = cut[1] @ cut[0][i] / 0.5
      others = [
        scores[j, place]
        for j in range(BATCH)
        for place in range(1 + NEGATIVES)
        if allowed(batch, i, batch.passage_groups[j, place])
      ]
      total += nll(scores[i, 0], others) / BATCH / 3
  config = dataclasses.replace(
    tiny, dropout_rate=0.0, temperature=0.5, matryoshka_widths='8,4'
  )
  found, _, _ = loss_and_grads(
    config, methods.METHODS['dpr'], params, batch, 2, retriever=retriever
  )
  assert found == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize('name', methods.OPTIMIZERS)
def test_what_is_not_trainable_keeps_its_bits_and_has_no_moments(
  name, tiny, params, batch
):
  config = dataclasses.replace(
    tiny, trainable='layer_0/.*kernel', clip_norm=0.0, lr_warmup_steps=0,
    optimizer=name,
  )  # fmt: skip
  devices = devices_lib.local(2)
  optimizer, method = optimizers.make(config), methods.METHODS['dpr']
  state = steps.init_state(params, [bi_encoder.TIED], optimizer, devices)
  before = jax.device_get(state.params)
  train_step = steps.make_train_step(
    config, method, RETRIEVER, optimizer, devices
  )
  state, metrics = train_step(state, place(batch, devices, config), None)
  paths = dict(jax.tree.leaves_with_path(jax.device_get(state.params)))
  changed = {
    '/'.join(part.key for part in path[1:])
    for path, value in jax.tree.leaves_with_path(before)
    if (paths[path] != value).any()
  }
  names = {
    '/'.join(part.key for part in path[1:])
    for path, _ in jax.tree.leaves_with_path(before)
  }
  trained = {name for name in names if re.search('layer_0/.*kernel', name)}
  assert changed == trained
  assert 0 < len(trained) < len(names)
  sizes = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
  by_name = {
    '/'.join(part.key for part in path[1:]): value.size
    for path, value in jax.tree.leaves_with_path(before)
  }
  assert sizes == 2 * sum(by_name[name] for name in trained)
  _, _, grads = loss_and_grads(config, method, params, batch, 2, step=0)
  squares = [
    (np.asarray(g) ** 2).sum()
    for path, g in jax.tree.leaves_with_path(grads)
    if re.search('layer_0/.*kernel', '/'.join(p.key for p in path))
  ]
  assert metrics['grad_norm'] == pytest.approx(np.sqrt(sum(squares)), rel=1e-4)


def test_symmetric_columns_are_not_for_a_warm_up_without_in_batch_negatives(
  tiny, params, batch
):
  plain = dataclasses.replace(tiny, dropout_rate=0.0)
  both = dataclasses.replace(plain, symmetric_columns=True)
  method = methods.METHODS['bm25']
  found, expected = (
    loss_and_grads(config, method, params, batch, 2)[0]
    for config in (both, plain)
  )
  assert found == expected


def test_attention_has_a_dropout_rate_of_its_own(tiny, params, batch):
  """Not given, that of activations, or none where the checkpoint has none."""
  method = methods.METHODS['in_batch']

  def loss(attention, rate=0.3, trained_with=0.1):
    config = dataclasses.replace(
      tiny, dropout_rate=rate, attention_dropout_rate=attention
    )
    body = dataclasses.replace(RETRIEVER.body, attention_dropout=trained_with)
    retriever = dataclasses.replace(RETRIEVER, body=body)
    return float(
      loss_and_grads(config, method, params, batch, 1, retriever=retriever)[0]
    )

  both, without = loss(0.3), loss(0.0)
  assert loss(None) == both
  assert loss(None, trained_with=0.0) == without
  nothing, attention_alone = loss(None, rate=0.0), loss(0.3, rate=0.0)
  assert loss(0.0, rate=0.0) == nothing
  assert len({both, without, nothing, attention_alone}) == 4
