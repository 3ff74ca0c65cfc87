"""The devices' top k against numpy and FAISS flat: rows, order, memory."""

import itertools

import index_test
import jax
import numpy as np
import pytest

from ance_jax import errors
from ance_jax.core import compiled
from ance_jax.core import devices
from ance_jax.retrieval import device_index
from ance_jax.retrieval import index


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of 16 rows, and of 8 queries."""
  monkeypatch.setattr(device_index, '_MOST_ROWS', 16)
  monkeypatch.setattr(device_index, '_MOST_QUERIES', 8)


@pytest.fixture(params=['resident', 'streamed'])
def placed(request, monkeypatch):
  """Returns place(passages, number of devices), one way or the other."""
  real = device_index.plan

  def plan(*args):
    return real(*args)._replace(resident=request.param == 'resident')

  monkeypatch.setattr(device_index, 'plan', plan)

  def place(passages, num_devices, **kwargs):
    blocks = np.array_split(passages, 3)
    return index.place(blocks, devices.local(num_devices), 64, **kwargs)

  return place


@pytest.mark.usefixtures('small_blocks')
@pytest.mark.parametrize('num_devices', [1, 3, 8])
@pytest.mark.parametrize(('num_rows', 'k'), [(5, 5), (300, 7), (300, 300)])
def test_rows_and_scores_are_those_of_numpy_ties_in_row_order(
  num_devices, num_rows, k, placed
):
  passages, queries = (
    index_test.integers(num_rows),
    index_test.integers(21, seed=1),
  )
  built = placed(passages, num_devices)
  if num_rows == 300:
    # Ranges, blocks and batches of queries that do not divide.
    share = -(-300 // num_devices)
    assert built.plan.blocks == -(-share // 16)
    assert bool(built.placed) == built.plan.resident
  ranking = index.search(built, queries, k)
  rows, scores = index_test.slow_top_k(queries, passages, k)
  np.testing.assert_array_equal(ranking.rows, rows)
  np.testing.assert_array_equal(ranking.scores, scores)
  assert ranking.rows.dtype == np.int32
  assert ranking.scores.dtype == np.float32


@pytest.mark.usefixtures('small_blocks')
def test_more_equal_scores_than_any_block_or_device_has_come_in_row_order(
  placed,
):
  passages = np.ones((500, 2), np.float32)
  passages[450:] = 2
  ranking = index.search(placed(passages, 4), np.ones((3, 2), np.float32), 400)
  expected = [*range(450, 500), *range(350)]
  np.testing.assert_array_equal(ranking.rows, [expected] * 3)


@pytest.mark.usefixtures('small_blocks')
@pytest.mark.parametrize('center', [False, True])
def test_what_is_found_is_what_faiss_flat_finds(center, placed):
  random = np.random.default_rng(0)
  passages = random.normal(size=(1000, 24)).astype(np.float32) + 1
  passages[500:520] = passages[:20]
  queries = random.normal(size=(50, 24)).astype(np.float32)
  ours = index.search(placed(passages, 3, center=center), queries, 60, 'search')
  flat = index.build('Flat', '', [passages], center=center)
  theirs = index.search(flat, queries, 60)
  np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-5)
  # Where rows differ, two scores are as good as equal.
  scores = queries @ passages.T
  for query, place in np.argwhere(ours.rows != theirs.rows):
    pair = ours.rows[query, place], theirs.rows[query, place]
    assert abs(np.diff(scores[query, pair])) < 1e-5
  assert (ours.rows == theirs.rows).mean() > 0.99


def test_zero_of_either_sign_is_one_score():
  passages = np.array([[0], [-1], [0], [-0.0], [0], [1]], np.float32)
  built = index.place([passages], devices.local(1), 1)
  ranking = index.search(built, np.array([[-1], [1]], np.float32), 6)
  assert ranking.rows.tolist() == [[1, 0, 2, 3, 4, 5], [5, 0, 2, 3, 4, 1]]


def test_a_score_that_is_no_number_finds_nothing():
  passages = np.array([[1, np.nan], [2, 1], [3, 1], [1, 1]], np.float32)
  built = index.place([passages], devices.local(1), 1)
  ranking = index.search(built, np.ones((1, 2), np.float32), 4)
  assert ranking.rows.tolist() == [[2, 1, 3, -1]]
  assert ranking.scores.tolist() == [[4, 3, 2, -np.inf]]


@pytest.mark.usefixtures('small_blocks')
def test_another_refresh_and_a_last_batch_compile_nothing(placed):
  queries = index_test.integers(40, seed=1)
  index.search(placed(index_test.integers(300), 4), queries, 9)
  with compiled.count_compilations() as counts:
    again = placed(index_test.integers(300, seed=2), 4)
    for number, k in ((40, 9), (37, 9), (5, 16)):
      index.search(again, queries[:number], k)
  assert not counts['compiles']


SIZES = [
  *itertools.product(
    [1, 1000, 27_413, 8_841_823, 21_015_324],
    [16, 768, 4096],
    [1, 8],
    [8, 4096],
  )
]


@pytest.mark.parametrize(('num_rows', 'width', 'num_devices', 'memory'), SIZES)
def test_a_plan_has_all_rows_and_keeps_to_its_memory(
  num_rows, width, num_devices, memory
):
  plan = device_index.plan(num_rows, width, num_devices, memory)
  # All rows are there, and no block for nothing.
  assert plan.rows * plan.blocks * num_devices >= num_rows
  assert plan.rows * (plan.blocks - 1) < -(-num_rows // num_devices)
  held = plan.blocks if plan.resident else 2
  assert held * plan.rows * width * 4 <= memory * 2**20 / 2
  if not plan.resident:
    assert num_rows / num_devices * width * 4 > memory * 2**20 / 2.1
  assert (
    device_index.queries_at_once(plan, width, num_devices, memory, 16) >= 32
  )
  number = device_index.queries_at_once(plan, width, num_devices, memory, 1024)
  assert number & (number - 1) == 0
  scores = number * (plan.rows * 4 + 1024 * 8 + width * 4)
  assert scores <= memory * 2**20 / 2


@pytest.mark.parametrize('memory', [8, 16, 64])
def test_what_xla_takes_keeps_to_the_memory_too(memory):
  """On a CPU; each step counts its arguments, results and temporaries."""
  width, k = 64, 256
  # Nearly as many rows as stay on two devices.
  num_rows = 2 * memory * 2**19 // (4 * width) - 1000
  plan = device_index.plan(num_rows, width, 2, memory)
  assert plan.resident
  number = device_index.queries_at_once(plan, width, 2, memory, k)
  sharding = devices.split(devices.local(2))
  shapes = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=where)
    for shape, dtype, where in (
      ((2, number, k), np.float32, sharding),
      ((2, number, k), np.int32, sharding),
      ((number, width), np.float32, device_index._whole(sharding)),
      ((2 * plan.rows, width), np.float32, sharding),
      ((3,), np.int32, device_index._whole(sharding)),
    )
  ]
  step = device_index._best_with.lower(tuple(shapes[:2]), *shapes[2:], sharding)
  merge = device_index._merged.lower(tuple(shapes[:2]), sharding)
  used = [one.compile().memory_analysis() for one in (step, merge)]
  step, merge = (
    a.argument_size_in_bytes + a.output_size_in_bytes + a.temp_size_in_bytes
    for a in used
  )
  block = plan.rows * width * 4
  others = (plan.blocks - 1) * block
  print(f'{used[0].temp_size_in_bytes / number / plan.rows:.1f} bytes a score')
  assert used[0].argument_size_in_bytes > block
  assert used[0].temp_size_in_bytes > number * plan.rows * 4
  assert step + merge + others <= memory * 2**20


def test_no_more_blocks_are_on_the_devices_than_two(monkeypatch):
  monkeypatch.setattr(device_index, '_MOST_ROWS', 128)
  monkeypatch.setattr(device_index, '_LEAST_ROWS', 64)
  alive, searched = [], []
  real_block, real_wait = device_index._block, jax.block_until_ready

  def block(*args):
    made = real_block(*args)
    shapes = [array.shape for array in jax.live_arrays()]
    alive.append(shapes.count(made.shape))
    # All but the last one are searched.
    assert len(searched) >= len(alive) - 2
    return made

  def wait(best):
    searched.extend([best] if best else [])
    return real_wait(best)

  monkeypatch.setattr(device_index, '_block', block)
  monkeypatch.setattr(jax, 'block_until_ready', wait)
  passages = index_test.integers(4000, width=512)
  built = index.place([passages], devices.local(1), 1)
  assert not built.plan.resident
  index.search(built, index_test.integers(100, width=512, seed=1), 10)
  assert len(alive) >= 2 * built.plan.blocks > 10
  assert max(alive) == 2


def test_too_little_memory_is_refused_in_a_sentence():
  with pytest.raises(
    errors.BadInput,
    match='^--search_memory_mb=1 does not hold two blocks of 128 passages of '
    'width 768; raise it to 2 at least.$',
  ):
    device_index.plan(100_000, 768, 8, 1)
  assert not device_index.plan(100_000, 768, 8, 2).resident
  plan = device_index.plan(100_000, 16, 1, 1)
  with pytest.raises(
    errors.BadInput, match='the 65,536 candidates of a query; raise it to 11 at'
  ):
    device_index.queries_at_once(plan, 16, 1, 1, 65_536)
