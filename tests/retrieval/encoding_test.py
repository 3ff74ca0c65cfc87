"""The pass: each row lands in its place, on one device and on eight."""

import jax
import numpy as np
import pytest

from ance_jax.core import compiled
from ance_jax.core import devices as devices_lib
from ance_jax.data import tokens
from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.retrieval import encoding

BODY = bert.BodyConfig('bert', 400, 8, 1, 2, 16, 48, 1, 1e-12, 'gelu')
RETRIEVER = bi_encoder.RetrieverConfig(
  BODY, True, 'mean', 0, True, 'dot', 48, 48, ' '
)


@pytest.fixture(scope='module')
def rows():
  """300 rows of 1 to 48 tokens, each of tokens of its own."""
  random = np.random.default_rng(0)
  lengths = random.integers(1, 49, 300)
  ids = np.concatenate([np.full(n, 1 + i) for i, n in enumerate(lengths)])
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  return tokens.TokenRows(ids.astype(np.uint16), offsets, 0, '')


@pytest.fixture(scope='module')
def params():
  return bi_encoder.init(RETRIEVER, 0)


@pytest.fixture(scope='module')
def expected(rows, params):
  """Every row encoded by itself, without the pass."""
  function = bi_encoder.make_encode(RETRIEVER, 'float32', bi_encoder.PASSAGE)
  ids, lengths = rows.padded(np.arange(300), 48)
  return np.asarray(jax.jit(function)(params, ids, lengths))


def make(num_devices, tokens_per_batch=512):
  devices = devices_lib.local(num_devices)
  return encoding.make_encoder(
    RETRIEVER,
    bi_encoder.PASSAGE,
    dtype='float32',
    tokens_per_batch=tokens_per_batch,
    devices=devices,
  ), devices


@pytest.mark.parametrize('num_devices', [1, 8])
def test_every_row_lands_in_its_place_over_blocks_and_partial_batches(
  num_devices, rows, params, expected, tmp_path
):
  encoder, devices = make(num_devices)
  blocks, share = encoding.encode_corpus(
    encoder,
    devices_lib.replicate(params, devices),
    rows,
    tmp_path,
    rows_per_block=70,
  )
  assert [len(block) for block in blocks] == [70, 70, 70, 70, 20]
  np.testing.assert_allclose(np.concatenate(blocks), expected, atol=1e-5)
  assert 0.5 < share < 1
  # Rows differ by far more than the tolerance.
  assert np.abs(np.diff(expected, axis=0)).max(1).min() > 1e-3


def test_each_device_holds_a_part_of_the_output(rows, params):
  encoder, devices = make(8)
  output = encoder.encode(
    devices_lib.replicate(params, devices), *rows.padded(np.arange(16), 48)
  )
  shapes = [shard.data.shape for shard in output.addressable_shards]
  assert shapes == [(2, 8)] * 8
  assert {shard.device for shard in output.addressable_shards} == set(devices)


def test_the_pass_goes_on_at_the_block_where_it_was_stopped(
  rows, params, expected, tmp_path
):
  encoder, devices = make(1)
  placed = devices_lib.replicate(params, devices)
  made = []

  def stop_at_third(*arguments):
    made.append(1)
    if len(made) > 12:
      raise RuntimeError('stopped')
    return encoder.encode(*arguments)

  stopping = encoder._replace(encode=stop_at_third)
  with pytest.raises(RuntimeError, match='stopped'):
    encoding.encode_corpus(stopping, placed, rows, tmp_path, rows_per_block=50)
  there = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  assert 0 < len(there) < 6
  blocks, _ = encoding.encode_corpus(
    encoder, placed, rows, tmp_path, rows_per_block=50
  )
  np.testing.assert_allclose(np.concatenate(blocks), expected, atol=1e-5)
  assert {path: path.stat().st_mtime_ns for path in there} == there
  _, share = encoding.encode_corpus(
    stopping, placed, rows, tmp_path, rows_per_block=50
  )
  assert share is None
  damaged = tmp_path / '00002' / 'embeddings.npy'
  whole = damaged.read_bytes()
  damaged.write_bytes(whole[:-4] + b'1234')
  encoding.encode_corpus(encoder, placed, rows, tmp_path, rows_per_block=50)
  assert damaged.read_bytes() == whole


@pytest.mark.parametrize('num_devices', [1, 8])
def test_the_plan_has_each_row_once_in_few_shapes(num_devices, rows):
  encoder, _ = make(num_devices)
  lengths = rows.lengths()
  plan = encoding.batch_plan(lengths, encoder)
  places = np.concatenate([places for places, _, _ in plan])
  assert sorted(places.tolist()) == list(range(300))
  for places, size, length in plan:
    assert len(places) <= size
    assert size % num_devices == 0
    assert length % 16 == 0
    assert lengths[places].max() <= length
    assert size * length <= 512
  assert len({(size, length) for _, size, length in plan}) == 3
  partial = [places for places, size, _ in plan if len(places) < size]
  assert len(partial) <= 1


def test_a_few_rows_are_not_padded_to_a_whole_batch(rows):
  encoder, _ = make(1, tokens_per_batch=1 << 20)
  ((_, size, length),) = encoding.batch_plan(np.array([5, 9, 16]), encoder)
  assert (size, length) == (4, 16)


def test_nothing_is_compiled_for_another_corpus_of_the_same_lengths(
  rows, params, tmp_path
):
  encoder, devices = make(1)
  placed = devices_lib.replicate(params, devices)
  with compiled.count_compilations() as counts:
    for name in 'ab':
      encoding.encode_corpus(
        encoder, placed, rows, tmp_path / name, rows_per_block=100
      )
      if name == 'a':
        assert counts.pop('compiles') > 0
  assert not counts['compiles']


def test_lengths_are_rounded_up_to_no_more_than_the_model_takes():
  encoder, _ = make(1)
  encoder = encoder._replace(max_length=40)
  ((_, _, length),) = encoding.batch_plan(np.array([39]), encoder)
  assert length == 40
