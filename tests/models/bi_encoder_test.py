"""The encoder: padding has no part in it, dropout is that of the global row."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.models import pooling

BODY = bert.BodyConfig('bert', 60, 16, 2, 2, 32, 24, 2, 1e-12, 'gelu')
RETRIEVER = bi_encoder.RetrieverConfig(
  BODY, True, 'mean', 0, True, 'dot', 8, 16, ' '
)


@pytest.fixture
def texts():
  random = np.random.default_rng(0)
  ids = random.integers(1, 60, (6, 10)).astype(np.int32)
  lengths = np.array([10, 1, 3, 7, 10, 5], np.int32)
  return ids, lengths


@functools.cache
def made(retriever):
  """Returns parameters, and encode as `make_encode` makes it, compiled."""
  params = jax.tree.map(lambda p: 3 * p, bi_encoder.init(retriever, 0))
  function = bi_encoder.make_encode(retriever, 'float32', bi_encoder.PASSAGE)
  return params, jax.jit(function)


def rates(rate):
  """Returns the rates of activations and of attention."""
  return jnp.float32(rate), jnp.float32(rate)


def encode(retriever, ids, lengths, dropout=None):
  params, function = made(retriever)
  return np.asarray(function(params, ids, lengths, dropout))


@pytest.mark.parametrize(
  ('model_type', 'pooling'),
  [
    ('bert', 'cls'),
    ('bert', 'mean'),
    ('roberta', 'cls'),
    ('distilbert', 'mean'),
    ('mpnet', 'cls'),
    ('mpnet', 'mean'),
  ],
)
def test_what_stands_in_the_padding_changes_nothing(texts, model_type, pooling):
  body = dataclasses.replace(BODY, model_type=model_type)
  retriever = dataclasses.replace(RETRIEVER, body=body, pooling=pooling)
  ids, lengths = texts
  padded = np.where(np.arange(10) < lengths[:, None], ids, 0)
  longer = np.pad(padded, ((0, 0), (0, 6)))
  first = encode(retriever, ids, lengths)
  np.testing.assert_allclose(
    first, encode(retriever, padded, lengths), atol=1e-6
  )
  np.testing.assert_allclose(
    first, encode(retriever, longer, lengths), atol=1e-5
  )
  assert np.abs(first[0] - first[4]).max() > 0.1


def test_a_token_that_is_real_does_change_the_embedding(texts):
  ids, lengths = texts
  changed = ids.copy()
  changed[:, 0] = changed[:, 0] % 59 + 1
  different = encode(RETRIEVER, ids, lengths) - encode(
    RETRIEVER, changed, lengths
  )
  assert (np.abs(different).max(1) > 1e-3).all()


def test_cosine_gives_embeddings_of_length_one(texts):
  cosine = dataclasses.replace(RETRIEVER, similarity='cosine')
  dot = encode(RETRIEVER, *texts)
  expected = dot / np.linalg.norm(dot, axis=1, keepdims=True)
  np.testing.assert_allclose(encode(cosine, *texts), expected, atol=1e-6)


@pytest.mark.parametrize('norm', [True, False])
def test_the_head_is_a_projection_and_perhaps_a_layer_norm(texts, norm):
  retriever = dataclasses.replace(RETRIEVER, head_size=5, head_norm=norm)
  plain = encode(RETRIEVER, *texts)
  params = made(retriever)[0]['tied']
  x = plain @ params['head']['kernel'] + params['head']['bias']
  if norm:
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    x = x * params['head_norm']['scale'] + params['head_norm']['bias']
  assert ('head_norm' in params) == norm
  np.testing.assert_allclose(encode(retriever, *texts), x, atol=2e-5)


def test_weights_begin_as_small_as_those_of_the_papers():
  body = dataclasses.replace(
    BODY, model_type='mpnet', hidden_size=64, num_heads=8
  )
  retriever = dataclasses.replace(RETRIEVER, body=body, head_size=64)
  leaves = jax.tree.leaves_with_path(bi_encoder.init(retriever, 0))
  # The optimizer knows by the last name that it is not to be decayed.
  assert {p[-1].key for p, _ in leaves if p[-2].key == 'relative'} == {'bias'}
  for path, leaf in leaves:
    if leaf.ndim > 1:
      # 256 draws at least: a standard error of 0.0009 at most, five of them.
      assert np.std(leaf) == pytest.approx(0.02, abs=0.0045), path


def test_untied_towers_are_two_sets_of_parameters(texts):
  retriever = dataclasses.replace(RETRIEVER, tied=False)
  params = bi_encoder.init(retriever, 0)
  assert set(params) == {bi_encoder.QUERY, bi_encoder.PASSAGE}
  params[bi_encoder.QUERY] = jax.tree.map(
    lambda p: 2 * p, params[bi_encoder.QUERY]
  )
  query, passage = (
    bi_encoder.make_encode(retriever, 'float32', side)(params, *texts)
    for side in (bi_encoder.QUERY, bi_encoder.PASSAGE)
  )
  np.testing.assert_allclose(
    passage,
    bi_encoder.make_encode(RETRIEVER, 'float32', bi_encoder.PASSAGE)(
      bi_encoder.init(RETRIEVER, 0), *texts
    ),
    atol=1e-6,
  )
  assert np.abs(np.asarray(query - passage)).max() > 1e-3


def test_bfloat16_is_near_and_the_embedding_float32(texts):
  params = bi_encoder.init(RETRIEVER, 0)
  exact, coarse = (
    bi_encoder.make_encode(RETRIEVER, dtype, bi_encoder.QUERY)(params, *texts)
    for dtype in ('float32', 'bfloat16')
  )
  assert coarse.dtype == jnp.float32
  difference = np.abs(np.asarray(exact - coarse)).max()
  # bfloat16 has 8 bits: 0.4 % an operation.
  assert 0 < difference < 0.05 * np.abs(np.asarray(exact)).max()


def test_the_kernel_of_a_gpu_is_asked_for_the_same_attention(
  texts, monkeypatch
):
  """What it is given is right; that it does that is seen on a GPU alone."""
  asked = []

  def by_xla(*args, implementation, **kwargs):
    asked.append(implementation)
    return attend(*args, implementation='xla', **kwargs)

  def run(*dropout, kernel=True):
    return bi_encoder.make_encode(
      RETRIEVER, 'float32', bi_encoder.PASSAGE, kernel=kernel
    )(made(RETRIEVER)[0], *texts, *dropout)

  attend = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, 'dot_product_attention', by_xla)
  written = run()
  assert not asked
  monkeypatch.setattr(bert, '_has_kernel', lambda query: True)
  np.testing.assert_allclose(run(), written, atol=1e-5)
  assert asked == ['cudnn'] * 2
  run(bert.Dropout(*rates(0.1), jnp.uint32(0), jnp.arange(6), 7))
  np.testing.assert_allclose(run(kernel=False), written, atol=1e-5)
  assert len(asked) == 2


def test_dropout_of_a_text_depends_on_its_row_alone(texts):
  ids, lengths = texts
  rows = np.arange(6, dtype=np.uint32)
  whole = encode(
    RETRIEVER,
    ids,
    lengths,
    bert.Dropout(*rates(0.3), jnp.uint32(5), rows, 7),
  )
  part = slice(2, 5)
  dropout = bert.Dropout(*rates(0.3), jnp.uint32(5), rows[part], 7)
  np.testing.assert_allclose(
    encode(RETRIEVER, ids[part], lengths[part], dropout), whole[part], atol=1e-5
  )
  moved = bert.Dropout(*rates(0.3), jnp.uint32(5), rows[part] + 1, 7)
  other = encode(RETRIEVER, ids[part], lengths[part], moved)
  assert np.abs(other - whole[part]).max() > 1e-2


@pytest.mark.parametrize('wider', [1, 5])
def test_dropout_does_not_depend_on_the_padding(texts, wider):
  ids, lengths = texts
  rows = np.arange(len(ids), dtype=np.uint32)
  dropout = bert.Dropout(*rates(0.3), jnp.uint32(5), rows, ids.shape[1] + 5)
  padded = np.pad(ids, ((0, 0), (0, wider)))
  np.testing.assert_allclose(
    encode(RETRIEVER, padded, lengths, dropout),
    encode(RETRIEVER, ids, lengths, dropout),
    atol=1e-5,
  )


def test_entries_of_attention_are_numbered_apart():
  rows = np.arange(2, dtype=np.uint32)
  dropout = bert.Dropout(*rates(0.5), jnp.uint32(1), rows, 6)
  where = bert.layout(np.array([4, 2]), 4)
  masks = bert._of_tokens(dropout, where)
  found = np.asarray(bert._weight_numbers(masks, where.places, 3))[0]
  expected = [
    [[(h * 6 + q) * 6 + k for k in range(4)] for q in range(4)]
    for h in range(3)
  ]
  np.testing.assert_array_equal(found, expected)


def test_what_a_kernel_leaves_at_padding_reaches_nothing(texts, monkeypatch):
  """cuDNN leaves there, and in its gradients, what was in memory."""
  attend = jax.nn.dot_product_attention

  @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
  def poisoned(query, key, value, lengths):
    return forward(query, key, value, lengths)[0]

  def attended(query, key, value, lengths):
    return attend(
      query, key, value,
      query_seq_lengths=lengths, key_value_seq_lengths=lengths,
    )  # fmt: skip

  def spoil(x, lengths):
    real = jnp.arange(x.shape[1]) < lengths[:, None]
    return jnp.where(real[..., None, None], x, jnp.nan)

  def forward(query, key, value, lengths):
    inputs = query, key, value
    return spoil(attended(*inputs, lengths), lengths), inputs

  def backward(lengths, inputs, by_output):
    _, pull = jax.vjp(lambda *x: attended(*x, lengths), *inputs)
    return tuple(spoil(x, lengths) for x in pull(by_output))

  poisoned.defvjp(forward, backward)

  def by_kernel(query, key, value, *, query_seq_lengths, **_):
    return poisoned(query, key, value, lengths_of_texts)

  ids, lengths_of_texts = texts
  lengths_of_texts = np.asarray(lengths_of_texts)
  assert lengths_of_texts.min() < ids.shape[1]

  def run(params):
    run = bi_encoder.make_encode(
      dataclasses.replace(RETRIEVER, pooling='mean'),
      'float32',
      bi_encoder.PASSAGE,
    )
    return (run(params, *texts) ** 3).sum()

  params = made(RETRIEVER)[0]
  expected = jax.value_and_grad(run)(params)
  monkeypatch.setattr(jax.nn, 'dot_product_attention', by_kernel)
  monkeypatch.setattr(bert, '_has_kernel', lambda query: True)
  found = jax.value_and_grad(run)(params)
  # Sums of a different order, of entries up to 1e4.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-2),
    found,
    expected,
  )


def masks(rate, seed, site, rows=64, width=512):
  dropout = bert.Dropout(
    *rates(rate), jnp.uint32(seed), np.arange(rows, dtype=np.uint32), 7
  )
  of_tokens = bert._of_tokens(dropout, bert.layout(np.ones(rows, int), 1))
  return np.asarray(bert.drop(jnp.ones((rows, width)), of_tokens, site))


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_dropout_takes_its_share_and_keeps_the_mean(rate):
  found = masks(rate, 1, 2)
  np.testing.assert_allclose(
    np.unique(found), [0, np.float32(1 / (1 - rate))], rtol=1e-6
  )
  # 32,768 draws: a standard deviation of 0.003 at most, five of them.
  assert (found == 0).mean() == pytest.approx(rate, abs=0.014)
  assert (found == 0).mean(0).max() < rate + 6 * np.sqrt(rate / 64)


def test_masks_of_other_steps_sites_rows_and_places_are_independent():
  base = masks(0.5, 1, 2) == 0
  others = [masks(0.5, 2, 2) == 0, masks(0.5, 1, 3) == 0]
  others += [np.roll(base, 1, 0), np.roll(base, 1, 1)]
  for other in others:
    agreement = (base == other).mean()
    # 32,768 fair coins: a standard deviation of 0.0028, five of them.
    assert agreement == pytest.approx(0.5, abs=0.014)


def test_each_place_of_a_body_that_drops_has_a_mask_of_its_own(
  texts, monkeypatch
):
  """One after the embedding, three in each layer."""
  sites, keys = [], bert._keys

  def seen(masks, site):
    sites.append(site)
    return keys(masks, site)

  monkeypatch.setattr(bert, '_keys', seen)
  rows = np.arange(6, dtype=np.uint32)
  dropout = bert.Dropout(*rates(0.3), jnp.uint32(5), rows, 7)
  run = bi_encoder.make_encode(RETRIEVER, 'float32', bi_encoder.PASSAGE)
  jax.eval_shape(run, bi_encoder.shapes(RETRIEVER), *texts, dropout)
  assert len(set(sites)) == len(sites) == 1 + 3 * BODY.num_layers


def test_float32_is_multiplied_as_float32_on_accelerators_too(texts):
  """They round float32 products by default; a CPU cannot show it."""
  layers = (pooling.Layer('dense', 6, residual=True), pooling.Layer('unit'))
  body = dataclasses.replace(BODY, model_type='mpnet')
  retriever = dataclasses.replace(
    RETRIEVER, body=body, pooling='mean+weightedmean', layers=layers
  )
  run = bi_encoder.make_encode(retriever, 'float32', bi_encoder.QUERY)
  text = str(jax.make_jaxpr(run)(bi_encoder.shapes(retriever), *texts))
  highest = 'precision=(Precision.HIGHEST, Precision.HIGHEST)'
  # Eight of each layer, two poolings, and the projection and its residual.
  assert text.count('dot_general[') == text.count(highest) == 8 * 2 + 2 + 2


@pytest.mark.parametrize('biased', [True, False])
def test_attention_is_softmax_attention(biased):
  random = np.random.default_rng(0)
  query, key, value = random.normal(size=(3, 2, 5, 3, 4)).astype(np.float32)
  real = np.arange(5) < np.array([5, 3])[:, None]
  where = bert.layout(np.array([5, 3]), 5)
  bias = random.normal(size=(3, 5, 5)).astype(np.float32) if biased else None
  found = bert.attention(query, key, value, where, bias, None, 0)
  for b in range(2):
    for h in range(3):
      scores = query[b, :, h] @ key[b, :, h].T / 2
      scores += bias[h] if biased else 0
      weights = np.exp(scores) * real[b]
      weights /= weights.sum(1, keepdims=True)
      np.testing.assert_allclose(
        found[b, :, h], weights @ value[b, :, h], atol=1e-5
      )


@pytest.mark.parametrize('rate', [None, 0.3])
@pytest.mark.parametrize('lengths', [[11, 7], [[3, 4, 4], [5, 1, 0]]])
@pytest.mark.parametrize('has_bias', [False, True])
def test_attention_in_parts_is_that_of_all_at_once(
  has_bias, lengths, rate, monkeypatch
):
  """Also backwards, where the last part is not full."""
  random = np.random.default_rng(0)
  arrays = random.normal(size=(3, 2, 11, 3, 4)).astype(np.float32)
  where = bert.layout(np.array(lengths), 11)
  numbers = np.arange(np.size(lengths), dtype=np.uint32).reshape(
    np.shape(lengths)
  )
  masks = rate and bert._of_tokens(
    bert.Dropout(*rates(rate), jnp.uint32(5), numbers, 11), where
  )

  bias = has_bias and random.normal(size=(3, 11, 11)).astype(np.float32)

  def run(arrays):
    with_bias = bias if has_bias else None
    mixed = bert.attention(*arrays, where, with_bias, masks, 7)
    return (jnp.where((where.texts >= 0)[..., None, None], mixed, 0) ** 3).sum()

  expected = jax.value_and_grad(run)(arrays)
  monkeypatch.setattr(bert, '_QUERIES_AT_ONCE', 4)
  found = jax.value_and_grad(run)(arrays)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    found,
    expected,
  )


def test_no_array_of_all_pairs_of_8192_tokens_is_stored():
  """Neither forwards nor backwards: as float32 it takes 512 MiB."""
  where = bert.layout(np.array([8192]), 8192)
  masks = bert._of_tokens(
    bert.Dropout(*rates(0.1), jnp.uint32(5), np.zeros(1, np.uint32), 8192),
    where,
  )

  def run(arrays):
    return bert.attention(*arrays, where, None, masks, 7).sum()

  shape = jax.ShapeDtypeStruct((1, 8192, 2, 4), jnp.float32)
  compiled = jax.jit(jax.grad(run)).lower([shape] * 3).compile()
  size = compiled.memory_analysis().temp_size_in_bytes
  assert size < 2 * 8192 * 8192 * 4 / 2


def test_attention_in_bfloat16_adds_up_in_float32():
  random = np.random.default_rng(0)
  arrays = [random.normal(size=(2, 64, 3, 16)) * scale for scale in (3, 3, 1)]
  arrays = [jnp.array(array, jnp.bfloat16) for array in arrays]
  where = bert.layout(np.array([64, 64]), 64)
  found = bert.attention(*arrays, where, None, None, 0)
  query, key, value = (np.asarray(array, np.float64) for array in arrays)
  scores = np.einsum('bqhd,bkhd->bhqk', query, key) / 4
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  expected = np.einsum('bhqk,bkhd->bqhd', weights, value)
  # Weights and results are rounded to 8 bits; scores, around 40, are not.
  difference = np.abs(np.asarray(found, np.float64) - expected).max()
  assert difference < 0.005 * np.abs(expected).max()


def test_settings_survive_json():
  layers = (
    pooling.Layer('dense', 6, False, 'Tanh', True),
    pooling.Layer('unit'),
  )
  retriever = bi_encoder.RetrieverConfig(
    BODY, False, 'max+cls', 6, False, 'cosine', 7, 9, '[SEP]', 'q: ', 'p: ',
    False, 3, 4, layers, 5,
  )  # fmt: skip
  values = json.loads(json.dumps(retriever.to_dict()))
  assert bi_encoder.RetrieverConfig.from_dict(values) == retriever


def test_a_kernel_is_given_what_packed_rows_see(monkeypatch):
  """Where activations alone are dropped, too; a CPU has no such kernel."""
  asked = []

  def by_xla(*args, implementation, **kwargs):
    asked.append(implementation)
    mixed = attend(*args, implementation='xla', **kwargs)
    # The kernel leaves anything at padding.
    return jnp.where((texts >= 0)[..., None, None], mixed, jnp.nan)

  lengths = np.array([[5, 1, 6], [7, 3, 0], [0, 0, 0]], np.int32)
  texts = bert.layout(lengths, 12).texts
  ids = np.random.default_rng(0).integers(1, 60, (3, 12)).astype(np.int32)
  numbers = jnp.arange(9, dtype=jnp.uint32).reshape(3, 3)
  params = made(RETRIEVER)[0][bi_encoder.TIED]

  def run(*attention_rate):
    dropout = None
    if attention_rate:
      dropout = bert.Dropout(
        jnp.float32(0.2), *attention_rate, jnp.uint32(5), numbers, 12
      )
    pool = bi_encoder.Pooled(RETRIEVER)
    found = pool.apply({'params': params}, ids, lengths, dropout)
    return found[lengths > 0]

  attend = jax.nn.dot_product_attention
  expected = run(), run(None)
  assert np.abs(expected[0] - expected[1]).max() > 0.1
  monkeypatch.setattr(jax.nn, 'dot_product_attention', by_xla)
  monkeypatch.setattr(bert, '_has_kernel', lambda query: True)
  for found, one in zip((run(), run(None)), expected, strict=True):
    np.testing.assert_allclose(found, one, atol=1e-5)
  assert asked == ['cudnn'] * 2 * BODY.num_layers
  run(jnp.float32(0.1))
  assert len(asked) == 2 * 2 * BODY.num_layers // 2


@pytest.mark.parametrize('modes', ['cls', 'mean', 'max+lasttoken'])
def test_what_is_pooled_of_bfloat16_activations_is_float32(modes, texts):
  retriever = dataclasses.replace(RETRIEVER, pooling=modes)
  params = made(retriever)[0][bi_encoder.TIED]
  pool = bi_encoder.Pooled(retriever, jnp.bfloat16)
  assert pool.apply({'params': params}, *texts).dtype == jnp.float32


@pytest.mark.parametrize('model_type', ['bert', 'mpnet'])
def test_remat_changes_no_vector(model_type, texts):
  body = dataclasses.replace(BODY, model_type=model_type)
  retriever = dataclasses.replace(RETRIEVER, body=body)
  params = {'params': made(retriever)[0][bi_encoder.TIED]}
  with_remat, without = (
    bi_encoder.Pooled(retriever, remat=remat).apply(params, *texts)
    for remat in (True, False)
  )
  np.testing.assert_allclose(with_remat, without, atol=1e-5)
