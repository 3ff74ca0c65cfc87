"""Packed rows: each text whole and alone in them, and the same training."""

import dataclasses
import itertools
import json
import pathlib
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import padded
import pytest
from steps_test import BATCH
from steps_test import RETRIEVER
from steps_test import assert_the_same
from steps_test import loss_and_grads

from ance_jax.core import atomic
from ance_jax.core import devices as devices_lib
from ance_jax.core import logs
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import tokens
from ance_jax.jobs import train
from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.training import batches
from ance_jax.training import methods
from ance_jax.training import packing
from ance_jax.training import steps

BODY = bert.BodyConfig('bert', 60, 16, 2, 2, 32, 24, 2, 1e-12, 'gelu')
# (R, S) lengths of texts that share rows of 12 tokens; one row has none.
LENGTHS = np.array([[5, 1, 6], [7, 3, 0], [0, 0, 0], [12, 0, 0]], np.int32)
PLACES = [tuple(place) for place in np.argwhere(LENGTHS)]


def slow_assign(lengths, row_length):
  """Best-fit decreasing, as its definition says it."""
  rows, found = [], {}
  for text in sorted(range(len(lengths)), key=lambda t: (-lengths[t], t)):
    if not lengths[text]:
      continue
    fits = [
      (row_length - sum(lengths[t] for t in row), number)
      for number, row in enumerate(rows)
      if row_length - sum(lengths[t] for t in row) >= lengths[text]
      and len(row) < packing._MOST_SLOTS
    ]
    number = min(fits)[1] if fits else len(rows)
    if not fits:
      rows.append([])
    found[text] = (
      number,
      len(rows[number]),
      sum(lengths[t] for t in rows[number]),
    )
    rows[number].append(text)
  return found, len(rows)


def lengths_of_texts(random):
  return [
    random.integers(0, 13, 40),
    random.integers(2, 65, 90),
    np.full(70, 64),
    np.full(140, 2),
    np.array([64, 1, 63, 0, 2, 62]),
    np.array([7]),
    np.array([0]),
  ]


@pytest.mark.parametrize('case', range(7))
def test_texts_are_packed_by_best_fit_decreasing(case):
  lengths = lengths_of_texts(np.random.default_rng(case))[case]
  made = packing.assign(lengths, 64)
  expected, count = slow_assign(lengths.tolist(), 64)
  assert made.count == count
  for text, length in enumerate(lengths):
    found = made.rows[text], made.slots[text], made.starts[text]
    assert found == expected.get(text, (-1, 0, 0)), length


@pytest.mark.parametrize('case', range(7))
def test_each_text_is_in_one_row_whole_and_beside_others(case):
  lengths = lengths_of_texts(np.random.default_rng(case))[case]
  rows, slots, starts, count = packing.assign(lengths, 64)
  taken = np.zeros((count, 64), int)
  for row, start, length in zip(rows, starts, lengths, strict=True):
    if length:
      assert start + length <= 64
      taken[row, start : start + length] += 1
  assert taken.sum() == lengths.sum()
  assert taken.max(initial=0) <= 1
  places = set(zip(rows[lengths > 0], slots[lengths > 0], strict=True))
  assert len(places) == (lengths > 0).sum()
  assert slots.max(initial=0) < packing._MOST_SLOTS


@pytest.fixture
def two_pairs():
  """Passage 0 lacks its second piece."""
  return padded.Padded(
    rows=np.arange(2, dtype=np.uint32),
    query_ids=np.array([[11, 12, 0], [21, 0, 0]]),
    query_lengths=np.array([2, 1]),
    passage_ids=np.array(
      [
        [[31, 32, 33, 34, 0, 0, 0], [0] * 7],
        [[41, 42, 43, 44, 45, 46, 47], [51, 52, 53, 0, 0, 0, 0]],
      ]
    ),
    passage_lengths=np.array([[4, 0], [7, 3]]),
    passage_groups=np.array([[0], [1]]),
    positive_groups=np.array([[0], [1]]),
  )


def test_a_batch_has_its_tokens_numbers_and_slots_where_they_belong(two_pairs):
  """Rows of 8 tokens: 7 + 1, 4 + 3, 4 + 2."""
  batch = padded.pack(two_pairs, retriever=RETRIEVER, row_length=8)
  pack = batch.packs['tied']
  assert pack.ids[0].tolist() == [
    [41, 42, 43, 44, 45, 46, 47, 21],
    [31, 32, 33, 34, 51, 52, 53, 0],
    [11, 12, 0, 0, 0, 0, 0, 0],
  ]
  assert pack.lengths[0, :, :2].tolist() == [[7, 1], [4, 3], [2, 0]]
  assert not pack.lengths[0, :, 2:].any()
  # Query 0 and its two pieces are 0 to 2, query 1 and its pieces 3 to 5.
  assert pack.numbers[0, :, :2].tolist() == [[4, 3], [1, 5], [0, 0]]
  assert pack.are_passages[0, :, :2].tolist() == [
    [True, False],
    [True, True],
    [False, False],
  ]
  wide = 4  # A multiple of 4 that holds two.
  assert batch.slots.tolist() == [[2 * wide, wide, wide], [1, 0, wide + 1]]


def test_texts_of_two_towers_have_the_numbers_that_they_have_in_one(two_pairs):
  """No two of them have the same, and so the same dropout."""
  retriever = dataclasses.replace(RETRIEVER, tied=False)
  packs = padded.pack(two_pairs, retriever=retriever, row_length=8).packs
  numbers = {
    tower: sorted(pack.numbers[pack.lengths > 0].tolist())
    for tower, pack in packs.items()
  }
  assert numbers == {'query': [0, 3], 'passage': [1, 4, 5]}


def packed_and_alone(retriever, attention_rate, rate):
  """(embeddings in shared rows, of the same texts alone), with dropout."""
  params = jax.tree.map(lambda p: 3 * p, bi_encoder.init(retriever, 0))
  params = params[bi_encoder.TIED]
  random = np.random.default_rng(0)
  ids = random.integers(1, 60, (4, 12)).astype(np.int32)
  numbers = random.permutation(LENGTHS.size).reshape(LENGTHS.shape)
  most = np.where(numbers % 2, 12, 14).astype(np.int32)
  skipped = numbers % 3
  pool = bi_encoder.Pooled(retriever)

  def run(ids, lengths, numbers, most, skipped):
    dropout = rate and bert.Dropout(
      jnp.float32(rate),
      attention_rate and jnp.float32(attention_rate),
      jnp.uint32(5),
      jnp.asarray(numbers, jnp.uint32),
      jnp.asarray(most),
    )
    return pool.apply(
      {'params': params}, ids, lengths, dropout, jnp.asarray(skipped)
    )

  shared = run(ids, LENGTHS, numbers, most, skipped)
  ends = LENGTHS.cumsum(1)
  alone = np.zeros((len(PLACES), 16), np.int32)  # Other rows, other padding.
  for text, place in enumerate(PLACES):
    length, end = LENGTHS[place], ends[place]
    alone[text, :length] = ids[place[0], end - length : end]
  at = tuple(np.transpose(PLACES))
  return shared[at], run(alone, LENGTHS[at], numbers[at], most[at], skipped[at])


@pytest.mark.parametrize('rates', [(None, None), (0.3, 0.3), (None, 0.3)])
@pytest.mark.parametrize('model_type', ['bert', 'roberta', 'mpnet'])
def test_a_text_has_the_vector_and_the_dropout_that_it_has_alone(
  model_type, rates
):
  body = dataclasses.replace(BODY, model_type=model_type)
  modes = 'cls+mean+max+lasttoken+weightedmean+mean_sqrt_len_tokens'
  retriever = dataclasses.replace(RETRIEVER, body=body, pooling=modes)
  shared, alone = packed_and_alone(retriever, *rates)
  np.testing.assert_allclose(shared, alone, atol=1e-5)
  assert np.abs(alone).max() > 1


@pytest.mark.parametrize('model_type', ['bert', 'mpnet'])
def test_no_text_sees_another_in_its_row(model_type):
  """Neither forwards, bit for bit, nor backwards."""
  body = dataclasses.replace(BODY, model_type=model_type)
  params = bi_encoder.init(dataclasses.replace(RETRIEVER, body=body), 0)
  pool = bi_encoder.Pooled(dataclasses.replace(RETRIEVER, body=body))
  dropout = bert.Dropout(
    jnp.float32(0.1),
    jnp.float32(0.1),
    jnp.uint32(5),
    jnp.arange(LENGTHS.size, dtype=jnp.uint32).reshape(LENGTHS.shape),
    12,
  )
  params = {'params': params[bi_encoder.TIED]}
  run = jax.jit(lambda ids: pool.apply(params, ids, LENGTHS, dropout))
  ids = np.random.default_rng(0).integers(1, 60, (4, 12)).astype(np.int32)
  before = np.asarray(run(ids))
  ends = LENGTHS.cumsum(1)
  for row, slot in PLACES:
    other = ids.copy()
    end = ends[row, slot]
    other[row, end - LENGTHS[row, slot] : end] += 1
    changed = (np.asarray(run(other)) != before).any(-1)
    assert [tuple(place) for place in np.argwhere(changed)] == [(row, slot)]

  def of_text(row, slot):
    def length(table):
      mine = {**params['params'], 'body': {**params['params']['body']}}
      mine['body']['word_embedding'] = table
      return pool.apply({'params': mine}, ids, LENGTHS)[row, slot].sum()

    table = params['params']['body']['word_embedding']
    return set(np.flatnonzero(np.asarray(jax.grad(length)(table)).any(1)))

  for row, slot in PLACES:
    end = ends[row, slot]
    own = ids[row, end - LENGTHS[row, slot] : end]
    assert of_text(row, slot) <= set(own.tolist())


@pytest.fixture
def batch():
  random = np.random.default_rng(0)
  groups = np.arange(BATCH * 3, dtype=np.int32).reshape(BATCH, 3)
  return padded.Padded(
    rows=np.arange(BATCH, dtype=np.uint32),
    query_ids=random.integers(1, 50, (BATCH, 6)).astype(np.int32),
    query_lengths=random.integers(1, 7, BATCH),
    passage_ids=random.integers(1, 50, (BATCH, 3, 6)).astype(np.int32),
    passage_lengths=random.integers(1, 7, (BATCH, 3)),
    passage_groups=groups,
    positive_groups=groups[:, :1],
  )


def shapes_of(rows, *, chunks=1, num_devices=2, towers=('tied',)):
  form = packing.Form(dict.fromkeys(towers, 16), {}, num_devices, chunks)
  shape = packing.Shape(chunks, rows)
  return packing.Shapes(form, 8, (dict.fromkeys(towers, shape),))


@pytest.mark.parametrize('similarity', ['dot', 'cosine'])
@pytest.mark.parametrize('tied', [True, False])
def test_any_shape_gives_the_same_loss_and_gradient(
  tied, similarity, batch, tiny, monkeypatch
):
  """Just enough rows, many rows and devices of padding alone, and chunks."""
  config = dataclasses.replace(tiny, dropout_rate=0.3, temperature=10.0)
  retriever = dataclasses.replace(
    RETRIEVER, tied=tied, similarity=similarity, head_size=5
  )
  params = jax.tree.map(lambda p: 3 * p, bi_encoder.init(retriever, 0))
  pack, found = padded.pack, []
  for shapes in (
    shapes_of(8, towers=retriever.towers),
    shapes_of(30, towers=retriever.towers),
    shapes_of(3, chunks=7, towers=retriever.towers),
    shapes_of(40, num_devices=1, towers=retriever.towers),
  ):
    monkeypatch.setattr(
      padded, 'pack', lambda *a, s=shapes, **k: pack(*a, **k, shapes=s)
    )
    found.append(
      loss_and_grads(
        config,
        methods.METHODS['dpr'],
        params,
        batch,
        shapes.form.num_devices,
        retriever=retriever,
      )
    )
  for other in found[1:]:
    assert_the_same(other, found[0])


def test_vectors_of_what_is_no_text_have_no_part_in_the_gradient(
  batch, tiny, monkeypatch
):
  """NaN in the vectors of empty slots, and so in their length, stays there."""
  retriever = dataclasses.replace(RETRIEVER, similarity='cosine')
  params = bi_encoder.init(retriever, 0)
  arguments = tiny, methods.METHODS['in_batch'], params, batch, 2
  expected = loss_and_grads(*arguments, retriever=retriever)
  apply = bi_encoder.Pooled.apply

  def poisoned(self, variables, ids, lengths, *rest):
    pooled = apply(self, variables, ids, lengths, *rest)
    return jnp.where((lengths > 0)[..., None], pooled, jnp.nan)

  monkeypatch.setattr(bi_encoder.Pooled, 'apply', poisoned)
  assert_the_same(loss_and_grads(*arguments, retriever=retriever), expected)


def needs(lengths, row_length):
  """Batches of (m, T) lengths, packed."""
  return [{'tied': packing.assign(one, row_length)} for one in lengths]


def counted(*counts):
  """Batches that need so many rows."""
  none = np.zeros(1, int)
  return [{'tied': packing.Assigned(none, none, none, n)} for n in counts]


def form_of(texts, row_length, num_devices=1, chunks=1):
  return packing.Form(
    {'tied': row_length}, {'tied': texts}, num_devices, chunks
  )


@pytest.mark.parametrize(
  ('query', 'passage', 'hard', 'limit', 'devices'),
  [
    (10, 114, 0, 256, 1),  # Questions and answers.
    (10, 173, 4, 256, 1),
    (14, 150, 0, 384, 1),
    (9, 79, 0, 128, 1),  # Web passages.
    (9, 79, 0, 512, 1),
    (9, 79, 1, 512, 8),
  ],
)
def test_of_64_queries_a_device_85_of_100_tokens_are_real(
  query, passage, hard, limit, devices
):
  """Lengths with means of real sets, and as wide as theirs."""
  random = np.random.default_rng(0)
  number = 64 * devices

  def draw():
    queries = np.clip(random.normal(query, query / 3, number), 3, 64)
    mean = np.log(passage) - 0.5**2 / 2
    passages = np.exp(random.normal(mean, 0.5, number * (1 + hard)))
    return np.append(queries, np.clip(passages, 8, limit)).astype(int)

  drawn = [draw() for _ in range(200)]
  longest = -(-int(max(one.max() for one in drawn[:100])) // 64) * 64
  drawn = [np.minimum(one, longest) for one in drawn]
  form = form_of(number * (2 + hard), longest, devices)
  shapes = packing.choose(needs(drawn[:100], longest), form)
  assert len(shapes.allowed) <= 3
  real = computed = 0
  for one, batch in zip(drawn[100:], needs(drawn[100:], longest), strict=True):
    count = batch['tied'].count
    shape = shapes.fitting({'tied': count})['tied']
    assert shapes.total(shape) >= count
    real += one.sum()
    computed += shapes.total(shape) * longest
  assert real / computed >= 0.85


def test_the_last_shape_holds_any_batch_in_the_memory_of_the_one_before():
  shapes = packing.choose(
    counted(20, 22, 25), form_of(301, 64, num_devices=2, chunks=2)
  )
  last, before = shapes.allowed[-1]['tied'], shapes.allowed[-2]['tied']
  assert shapes.total(last) >= 301
  assert last.rows == before.rows
  assert shapes.fitting({'tied': 301}) == shapes.allowed[-1]
  for shape in shapes.allowed:
    assert shape['tied'].chunks >= 2
  assert shapes.total(before) >= 25


def test_one_tower_that_does_not_fit_takes_the_larger_shape_for_both():
  form = packing.Form({'query': 64, 'passage': 64}, {}, 1, 1)
  small, large = (
    {'query': packing.Shape(1, n), 'passage': packing.Shape(1, 10 * n)}
    for n in (2, 3)
  )
  shapes = packing.Shapes(form, 4, (small, large))
  assert shapes.fitting({'query': 2, 'passage': 20}) == small
  assert shapes.fitting({'query': 3, 'passage': 20}) == large
  assert shapes.fitting({'query': 2, 'passage': 21}) == large


def test_shapes_stay_until_others_save_enough():
  form = form_of(400, 64)
  first = packing.choose(counted(*[104] * 9), form)
  again = packing.choose(counted(*[100] * 9), form, first)
  assert again is first
  assert packing.choose(counted(*[100] * 9), form) != first
  smaller = packing.choose(counted(*[60] * 9), form, first)
  assert smaller == packing.choose(counted(*[60] * 9), form)
  larger = packing.choose(counted(*[112] * 9), form, first)
  assert larger == packing.choose(counted(*[112] * 9), form)


def test_shapes_are_read_as_they_were_written_for_the_same_form_only():
  form = form_of(400, 64, 2, 3)
  shapes = packing.choose(counted(*range(50, 60)), form)
  written = json.loads(json.dumps(packing.to_json(shapes)))
  assert packing.from_json(written, form) == shapes
  assert packing.from_json(None, form) is None
  others = {
    'lengths': {'tied': 128},
    'texts': {'tied': 401},
    'num_devices': 1,
    'chunks': 1,
  }
  for name, value in others.items():
    other = form._replace(**{name: value})
    assert packing.from_json(written, other) is None


def test_shapes_are_chosen_on_steps_spread_over_the_stretch():
  assert packing.sampled(7, 10).tolist() == [7, 8, 9]
  found = packing.sampled(1000, 6000)
  assert found.tolist() == list(range(1000, 6000, 50))


def test_an_empty_text_counts_as_a_token_of_padding():
  """As tokenizers without special tokens make of an empty title and text."""
  rows = tokens.TokenRows(np.array([5, 6, 7]), np.array([0, 2, 2, 3]), 4, '')
  data = batches.TrainingData(
    rows, rows, np.arange(4), np.zeros(3, int), np.zeros((3, 1), int),
    np.arange(3), {'tied': 8},
  )  # fmt: skip
  drawn = batches.Drawn(np.array([1]), np.array([[0, 1, 2]]))
  shapes = shapes_of(1, num_devices=1)
  shapes = shapes._replace(form=shapes.form._replace(lengths={'tied': 8}))
  batch = batches.make_batch(data, drawn, shapes=shapes)
  assert padded.texts(batch) == [[(4,), (5, 6), (4,), (7,)]]
  assert batch.passage_lengths.tolist() == [[2, 1, 1]]


def shapes_by_step(config, monkeypatch):
  """Trains; returns the shape of each step's ids, of all devices, by step."""
  seen, shard = [], devices_lib.shard
  with monkeypatch.context() as patch:
    patch.setattr(
      devices_lib, 'shard', lambda *a: (seen.append(a[0]), shard(*a))[1]
    )
    train.run(config)
  return [batch.packs[bi_encoder.TIED].ids.shape for batch in seen]


@pytest.mark.parametrize('sampled', [1, 100])
def test_steps_have_the_recorded_shapes_again_after_a_kill(
  sampled, tiny, tmp_path, monkeypatch
):
  """Also where the lengths of one step say too little of the others'."""
  monkeypatch.setattr(packing, '_SAMPLED_STEPS', sampled)
  config = dataclasses.replace(
    tiny, dropout_rate=0.1, num_devices=2, passage_length=24, max_steps=12,
    checkpoints_to_keep=99, steps_per_checkpoint=1,
  )  # fmt: skip
  whole = shapes_by_step(config, monkeypatch)
  losses = logs.series(config.workdir, 'train/loss')
  found = atomic.read_json(pathlib.Path(config.workdir, 'pickups.json'))
  used = set()
  for one, after in itertools.zip_longest(
    found['pickups'], found['pickups'][1:]
  ):
    if one['step'] == config.max_steps:
      continue
    allowed = one['shapes']['allowed']
    assert len(allowed) <= 3
    expected = [
      (2 * chunks, rows, 32) for chunks, rows in (n['tied'] for n in allowed)
    ]
    of_steps = whole[one['step'] : after['step'] if after else None]
    assert set(of_steps) <= set(expected)
    used |= {shape == expected[-1] for shape in of_steps}
  # One step says too little: then the shape for any batch is needed.
  assert (True in used) == (sampled == 1)
  for step in (1, 4, 5, 9):
    here = tmp_path / str(step)
    shutil.copytree(config.workdir, here)
    for later in range(step + 1, 13):
      shutil.rmtree(here / 'checkpoints' / str(later))
    again = shapes_by_step(
      dataclasses.replace(config, workdir=str(here)), monkeypatch
    )
    assert again == whole[step:]
    assert logs.series(str(here), 'train/loss') == losses
    lines = [logs.read(folder)[-1] for folder in (here, config.workdir)]
    for name in ('flops/train', 'flops_real/train'):
      assert lines[0].get(name) == lines[1].get(name)


def test_rows_are_dealt_to_all_devices_chunk_by_chunk():
  shapes = shapes_of(2, chunks=3, num_devices=2)
  found = shapes.places(packing.Shape(3, 2), np.arange(12))
  # Device 0 has places 0 to 5, device 1 those from 6 on.
  assert found.tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_slots_are_as_many_as_the_sample_needs_and_no_batch_has_more():
  lengths = np.array([[10, 10, 10, 10, 10, 2, 2], [60, 4, 0, 0, 0, 0, 0]])
  shapes = packing.choose(needs(lengths, 64), form_of(7, 64))
  assert shapes.slots == 8
  # A row of 64 would hold all of these.
  found = packing.assign(np.full(20, 2), 64, shapes.slots)
  assert np.bincount(found.rows).tolist() == [8, 8, 4]
  many = needs(np.full((1, 90), 2), 64)
  assert packing.choose(many, form_of(90, 64)).slots == packing._MOST_SLOTS
  # Shapes with too few slots are not kept, even with as many rows.
  enough = packing.choose(many, form_of(90, 64))
  too_few = enough._replace(slots=4)
  assert packing.choose(many, form_of(90, 64), too_few) == enough


def test_a_batch_of_shorter_texts_than_the_sample_has_no_more_in_a_row(batch):
  batch = batch._replace(query_lengths=np.ones(BATCH, int))
  shapes = shapes_of(20)._replace(slots=4)
  found = padded.pack(batch, retriever=RETRIEVER, num_devices=2, shapes=shapes)
  lengths = found.packs['tied'].lengths
  assert lengths.shape[-1] == 4
  assert (lengths > 0).sum() == 4 * BATCH


@pytest.mark.parametrize(
  ('lengths', 'pieces', 'expected'),
  [
    ({'tied': 16}, 1, {'tied': 4 * 4}),
    ({'tied': 16}, 3, {'tied': 4 * (1 + 9)}),
    ({'query': 16, 'passage': 16}, 3, {'query': 4, 'passage': 4 * 9}),
    ({'query': 16}, 1, {'query': 4}),
  ],
)
def test_as_many_texts_are_expected_as_a_batch_may_have(
  lengths, pieces, expected
):
  data = batches.TrainingData(*[None] * 6, lengths, pieces)
  assert batches.num_texts(data, 4, 2) == expected


def test_shapes_of_a_refresh_are_held_against_those_of_the_one_before(
  tiny, monkeypatch
):
  before, made, choose = [], [], packing.choose

  def chosen(batches, form, last=None):
    before.append(last)
    made.append(choose(batches, form, last))
    return made[-1]

  monkeypatch.setattr(packing, 'choose', chosen)
  train.run(dataclasses.replace(tiny, max_steps=16, num_devices=1))
  # A warm-up, which has another row, and three refreshes.
  assert before == [None, None, *made[1:-1]]
  assert len(made) == 4


@pytest.mark.parametrize('prompts', [(0, 0), (3, 1), (0, 2)])
@pytest.mark.parametrize('tied', [True, False])
def test_a_step_embeds_each_text_as_its_side_does_alone(
  tied, prompts, batch, tiny
):
  """Tokens of prompts left out, and through the head of its own tower."""
  retriever = dataclasses.replace(
    RETRIEVER,
    tied=tied,
    head_size=5,
    pooling='mean',
    query_prompt_tokens=prompts[0],
    passage_prompt_tokens=prompts[1],
  )
  params = bi_encoder.init(retriever, 0)
  for number, tower in enumerate(params, 1):
    params[tower] = jax.tree.map(lambda p, n=number: 3 * n * p, params[tower])
  batch = batch._replace(
    query_lengths=np.maximum(batch.query_lengths, 4),
    passage_lengths=np.maximum(batch.passage_lengths, 4),
  )
  here = devices_lib.local(1)
  config = dataclasses.replace(tiny, dropout_rate=0.0)
  embed = jax.pmap(
    steps._make_embed(config, retriever),
    axis_name=devices_lib.AXIS,
    in_axes=(None, 0, None),
    devices=here,
  )
  packed = devices_lib.shard(padded.pack(batch, retriever=retriever), here)
  found = embed(params, packed, jnp.int32(0))
  texts = (
    (batch.query_ids, batch.query_lengths),
    (batch.passage_ids.reshape(-1, 6), batch.passage_lengths.ravel()),
  )
  sides = bi_encoder.QUERY, bi_encoder.PASSAGE
  for side, (ids, lengths), vectors in zip(sides, texts, found, strict=True):
    encode = bi_encoder.make_encode(retriever, 'float32', side)
    alone = encode(params, ids, lengths.astype(np.int32))
    np.testing.assert_allclose(
      vectors[0].reshape(alone.shape), alone, atol=1e-4
    )


@pytest.mark.parametrize(
  ('tied', 'lengths', 'expected'),
  [
    (True, (20, 9), {'tied': 32}),
    (True, (9, 20), {'tied': 32}),
    (False, (20, 9), {'query': 32, 'passage': 16}),
    (False, (16, 33), {'query': 16, 'passage': 48}),
  ],
)
def test_rows_hold_the_longest_text_of_their_tower(tied, lengths, expected):
  queries, passages = (
    tokens.TokenRows(np.ones(n + 2, int), np.array([0, 2, n + 2]), 0, '')
    for n in lengths
  )
  corpus = corpus_lib.make_corpus(['a', 'b'], [''] * 2, ['x', 'y'])
  split = corpus_lib.make_split(
    corpus_lib.RawSplit(['q', 'r'], ['v', 'w'], {(0, 0): 1, (1, 1): 1})
  )
  data = batches.training_data(
    split,
    corpus,
    queries,
    passages,
    dataclasses.replace(RETRIEVER, tied=tied),
    methods.METHODS['dpr'],
  )
  assert data.row_lengths == expected


@pytest.mark.parametrize('towers', [('tied',), ('query', 'passage')])
@pytest.mark.parametrize('num_devices', [1, 2])
def test_chunks_without_texts_are_no_work(num_devices, towers):
  """Of the last device two of three chunks have none, of others one."""
  lengths = np.zeros((num_devices, 3, 2, 4), np.int32)
  lengths[:, 0, 0, :2] = 5, 3
  lengths[:-1, 1, 1, 0] = 6
  pack = packing.Pack(
    np.zeros((num_devices, 3, 2, 8), np.int32), lengths, lengths, lengths > 0
  )
  run = jax.pmap(
    lambda pack: steps._work(
      SimpleNamespace(packs=dict.fromkeys(towers, pack)), RETRIEVER, 0.0
    ),
    axis_name=devices_lib.AXIS,
    devices=devices_lib.local(num_devices),
  )
  found = {name: float(value[0]) for name, value in run(pack).items()}
  tokens_made = len(towers) * (2 * num_devices - 1) * 2 * 8
  texts = np.tile(lengths[lengths > 0], len(towers))
  assert found['real_tokens'] * tokens_made == pytest.approx(texts.sum())
  real = sum(float(bert.flops(RETRIEVER.body, n, n)) for n in texts)
  assert found['flops_real'] == pytest.approx(3 * real)
  computed = float(bert.flops(RETRIEVER.body, tokens_made, 8))
  assert found['flops'] == pytest.approx(3 * computed)


def test_operations_of_a_large_body_are_counted_in_a_step():
  """Of 36 layers 2,560 wide; those of a token alone are more than 2^31."""
  body = dataclasses.replace(
    BODY, num_layers=36, hidden_size=2560, intermediate_size=10240
  )
  length = 512
  lengths = np.full((1, 1, 3, 1), length, np.int32)
  pack = packing.Pack(
    np.zeros((1, 1, 3, length), np.int32), lengths, lengths, lengths > 0
  )
  retriever = dataclasses.replace(RETRIEVER, body=body)
  run = jax.pmap(
    lambda pack: steps._work(
      SimpleNamespace(packs={'tied': pack}), retriever, 0.0
    ),
    axis_name=devices_lib.AXIS,
    devices=devices_lib.local(1),
  )
  found = run(pack)
  products = 4 * 2560**2 + 2 * 2560 * 10240 + 2 * length * 2560
  expected = 3 * 36 * 2 * products * 3 * length
  assert found['flops'][0] == pytest.approx(expected)
  assert found['flops_real'][0] == pytest.approx(expected)
