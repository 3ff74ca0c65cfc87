"""Checkpoints: whole states back, parameters alone, only what is committed."""

import functools
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import devices as devices_lib
from ance_jax.core import logs
from ance_jax.training import steps

OPTIMIZER = optax.adamw(1e-3)


def make_state(value, num_devices=2):
  params = {'tied': {'kernel': jnp.full((8, 4), value), 'bias': jnp.ones(4)}}
  devices = devices_lib.local(num_devices)
  state = steps.init_state(params, params, OPTIMIZER, devices)
  return state._replace(step=state.step + int(value))


def damage(folder):
  """Changes the last byte of a file in a folder."""
  *_, path = (path for path in folder.rglob('*') if path.is_file())
  path.write_bytes(path.read_bytes()[:-1] + b'?')


def shapes_of(state):
  return jax.eval_shape(lambda: state.params)


@pytest.fixture(scope='module')
def saved_once(tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved')
  with checkpoint.Checkpoints(folder) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(make_state(float(step)), step)
  return folder


@pytest.fixture
def saved(saved_once, tmp_path):
  """A folder with checkpoints of the steps 1, 2 and 3."""
  return shutil.copytree(saved_once, tmp_path / 'run')


@pytest.mark.parametrize('num_devices', [1, 2, 8])
def test_a_state_comes_back_on_any_number_of_devices(saved, num_devices):
  expected = make_state(3.0, num_devices)
  like = steps.state_shapes(
    shapes_of(expected), ('tied',), OPTIMIZER, devices_lib.local(num_devices)
  )
  with checkpoint.Checkpoints(saved) as checkpoints:
    found = checkpoints.restore(3, like)
  jax.tree.map(
    functools.partial(np.testing.assert_array_equal, strict=True),
    found,
    expected,
  )
  for leaf in jax.tree.leaves(found):
    assert len(leaf.devices()) == num_devices


def test_parameters_are_read_alone(saved):
  shapes = shapes_of(make_state(0.0))
  # Damage elsewhere does not matter.
  damage(saved / 'checkpoints' / '2' / 'opt_state')
  found = checkpoint.read_params(saved, 2, shapes, devices_lib.local(1))
  np.testing.assert_array_equal(found['tied']['kernel'], np.full((8, 4), 2.0))
  damage(saved / 'checkpoints' / '2' / 'params')
  with pytest.raises(errors.Damaged, match='params/.* is missing or was'):
    checkpoint.read_params(saved, 2, shapes, devices_lib.local(1))


def test_parameters_of_another_shape_are_not_read(saved):
  shapes = {'tied': {'kernel': jax.ShapeDtypeStruct((9, 4), jnp.float32)}}
  with pytest.raises(ValueError, match='(?i)mismatch|structure|shape'):
    checkpoint.read_params(saved, 2, shapes, devices_lib.local(1))


def test_a_step_that_was_not_committed_is_never_chosen(saved):
  (saved / 'checkpoints' / '3').rename(
    saved / 'checkpoints' / '3.orbax-checkpoint-tmp'
  )
  assert checkpoint.committed_steps(saved) == [1, 2]
  assert checkpoint.choose(saved, 'last') == 2
  with pytest.raises(errors.BadInput, match=r'step 3 has no .* \[1, 2\]'):
    checkpoint.read_params(
      saved, 3, shapes_of(make_state(0.0)), devices_lib.local(1)
    )
  with pytest.raises(errors.BadInput, match=r'step 3 has no .* \[1, 2\]'):
    checkpoint.read_record(saved, 3)


def test_a_bit_flipped_in_any_file_of_a_checkpoint_is_found(saved):
  folder = saved / 'checkpoints' / '2'
  files = [path for path in folder.rglob('*') if path.stat().st_size]
  files = [path for path in files if path.is_file()]
  assert len(files) > 8
  random = np.random.default_rng(0)
  for path in files:
    whole = path.read_bytes()
    for _ in range(8):
      content = bytearray(whole)
      content[random.integers(len(whole))] ^= 1 << random.integers(8)
      for damaged in (bytes(content), whole[: random.integers(len(whole))]):
        path.write_bytes(damaged)
        with pytest.raises(errors.Damaged, match='missing or was changed'):
          atomic.read_manifest(folder)
    path.write_bytes(whole)
  assert atomic.read_manifest(folder)['step'] == 2


def test_a_save_that_was_killed_before_its_manifest_is_not_there(saved):
  (saved / 'checkpoints' / '3' / atomic.MANIFEST).unlink()
  assert checkpoint.committed_steps(saved) == [1, 2]
  with checkpoint.Checkpoints(saved) as checkpoints:
    assert not (saved / 'checkpoints' / '3').exists()
    checkpoints.save(make_state(3.0), 3)
  assert checkpoint.committed_steps(saved) == [1, 2, 3]


def test_a_save_that_fails_in_the_background_is_seen(saved, monkeypatch):
  def full(*_):
    raise OSError(28, 'No space left on device')

  checkpoints = checkpoint.Checkpoints(saved)
  monkeypatch.setattr(atomic, 'commit', full)
  checkpoints.save(make_state(4.0), 4)

  def until_it_is_seen():
    for _ in range(3000):
      checkpoints.check()
      time.sleep(0.01)

  with pytest.raises(
    errors.SaveFailed, match='step 4 could not .* No space left'
  ):
    until_it_is_seen()
  checkpoints.close()
  assert checkpoint.committed_steps(saved) == [1, 2, 3]


def test_the_best_is_that_of_the_highest_dev_metric(saved):
  metrics = logs.Metrics(saved)
  for step, value in ((0, 0.5), (1, 0.3), (2, 0.5), (3, 0.4)):
    metrics.write(step, {'dev/mrr@10': value})
  metrics.close()
  assert checkpoint.choose(saved, 'best') == 2
  assert checkpoint.choose(saved, 'last') == 3
  assert checkpoint.choose(saved, '1') == 1
  assert checkpoint.best(saved, [1, 3]) == 3
  # The later of equals; what was not evaluated is worse than any.
  assert checkpoint.best(saved, [0, 2]) == 2
  assert checkpoint.best(saved, [1, 9]) == 1
  with pytest.raises(errors.BadInput, match=r'--checkpoint=7 is not .* \[1, 2'):
    checkpoint.choose(saved, '7')


def test_a_folder_without_checkpoints_is_refused(tmp_path):
  with pytest.raises(errors.BadInput, match='there is no checkpoint in'):
    checkpoint.choose(tmp_path, 'last')


def test_a_save_that_orbax_does_not_take_is_an_error(saved):
  with checkpoint.Checkpoints(saved) as checkpoints:
    with pytest.raises(errors.SaveFailed, match='step 2 could not be'):
      checkpoints.save(make_state(2.0), 2)


def test_a_checkpoint_holds_the_record_that_it_was_saved_with(saved):
  record = {'run.flags': b'--seed=1\n', 'model/part': b'\0\1'}
  with checkpoint.Checkpoints(saved) as checkpoints:
    checkpoints.save(make_state(4.0), 4, record, {'made_with': 'this'})
  assert checkpoint.read_record(saved, 4) == record
  step, manifest = checkpoint.newest_whole(saved)
  assert (step, manifest['made_with']) == (4, 'this')
  path = checkpoint.record_folder(saved, 4) / 'run.flags'
  path.write_bytes(b'--seed=3\n')
  with pytest.raises(errors.Damaged, match='record/run.flags is missing or'):
    checkpoint.read_record(saved, 4)


def test_a_save_that_orbax_cannot_finish_is_told_in_our_words(
  saved, monkeypatch
):
  def full(*_):
    raise OSError(28, 'No space left on device')

  def save():
    with checkpoint.Checkpoints(saved) as checkpoints:
      monkeypatch.setattr(checkpoints._manager, '_finalize', full)
      checkpoints.save(make_state(4.0), 4)

  with pytest.raises(errors.SaveFailed, match='step 4 .* No space left'):
    save()
  assert checkpoint.committed_steps(saved) == [1, 2, 3]


def test_a_step_that_is_damaged_twice_is_set_aside_twice(saved, capsys):
  for number in (1, 2):
    (saved / 'checkpoints' / '3' / atomic.MANIFEST).write_text('{}')
    assert checkpoint.newest_whole(saved)[0] == 2
    with checkpoint.Checkpoints(saved) as checkpoints:
      checkpoints.save(make_state(3.0), 3)
    assert len(list(saved.glob('damaged-checkpoint-3*'))) == number


def test_keep_deletes_the_others(saved):
  with checkpoint.Checkpoints(saved) as checkpoints:
    checkpoints.keep([1, 3])
  assert checkpoint.committed_steps(saved) == [1, 3]


def test_a_checkpoint_that_is_half_deleted_is_not_there(saved, monkeypatch):
  checkpoints = checkpoint.Checkpoints(saved)

  def half(folder):
    (folder / 'params' / '_METADATA').unlink()
    raise OSError(5, 'Input/output error')

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.atomic, 'remove_folder', half)
    with pytest.raises(OSError, match='Input/output'):
      checkpoints.keep([1, 3])
  checkpoints.close()
  assert checkpoint.committed_steps(saved) == [1, 3]
  with checkpoint.Checkpoints(saved):
    assert not (saved / 'checkpoints' / '2').exists()


def test_the_hash_tells_values_and_names():
  params = {'a': jnp.ones(3), 'b': jnp.zeros(3)}
  same = {'b': jnp.zeros(3), 'a': jnp.ones(3)}
  swapped = {'a': jnp.zeros(3), 'b': jnp.ones(3)}
  assert checkpoint.weights_hash(params) == checkpoint.weights_hash(same)
  renamed = {'a': jnp.ones(3), 'c': jnp.zeros(3)}
  for other in (swapped, renamed):
    assert checkpoint.weights_hash(params) != checkpoint.weights_hash(other)
