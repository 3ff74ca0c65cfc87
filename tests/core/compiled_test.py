"""What is compiled is kept for the next start, changes no bit, is counted."""

import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import numpy as np
import pytest

from ance_jax.core import compiled
from ance_jax.core import devices as devices_lib

DIR = 'jax_compilation_cache_dir'
SECS = 'jax_persistent_cache_min_compile_time_secs'


@pytest.fixture
def nothing_kept():
  """Lets a test begin without a folder, and the next one have its own again."""
  before = {name: getattr(jax.config, name) for name in (DIR, SECS)}
  jax.config.update(DIR, None)
  yield devices_lib.local(1)
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def program(scale):
  """A program that is compiled anew each time it is asked for."""

  def loss(weights, x):
    for _ in range(20):
      x = jax.nn.gelu(x @ weights, approximate=False)
      x /= jnp.sqrt((x * x).mean(-1, keepdims=True) + 1)
    return (jax.nn.softmax(x) * scale).sum(0).std()

  return jax.jit(jax.value_and_grad(loss))


def run_program(scale):
  random = np.random.default_rng(0)
  weights = random.normal(size=(64, 64)).astype(np.float32)
  inputs = random.normal(size=(96, 64)).astype(np.float32)
  return jax.device_get(program(scale)(weights, inputs))


def entries(folder):
  return sorted(pathlib.Path(folder).glob('*/jit_*-cache'))


@pytest.mark.usefixtures('nothing_kept')
def test_what_was_kept_is_read_back_and_gives_the_same_bits(tmp_path):
  compiled.enable_cache(str(tmp_path), devices_lib.local(1))
  jax.config.update(SECS, 0.0)
  hits = []

  def heard(event, **_):
    hits.append(event == '/jax/compilation_cache/cache_hits')

  jax.monitoring.register_event_listener(heard)
  try:
    first = run_program(3.0)
    kept = entries(tmp_path)
    assert len(kept) == 1
    assert not sum(hits)
    again = run_program(3.0)
    assert sum(hits) == 1
  finally:
    jax.monitoring.unregister_event_listener(heard)
  assert entries(tmp_path) == kept
  jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.usefixtures('nothing_kept')
def test_an_entry_that_was_half_written_is_noticed(tmp_path):
  compiled.enable_cache(str(tmp_path), devices_lib.local(1))
  jax.config.update(SECS, 0.0)
  first = run_program(5.0)
  (path,) = entries(tmp_path)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.warns(UserWarning, match='Error reading persistent compilation'):
    again = run_program(5.0)
  jax.tree.map(np.testing.assert_array_equal, first, again)


def test_the_folder_is_the_one_that_was_named(
  nothing_kept, tmp_path, monkeypatch
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  compiled.enable_cache(None, nothing_kept)
  own = pathlib.Path(jax.config.jax_compilation_cache_dir)
  assert own.parent == tmp_path / 'cache' / 'ance_jax' / 'compiled'
  assert own.stat().st_mode & 0o777 == 0o700
  compiled.enable_cache('', nothing_kept)
  assert jax.config.jax_compilation_cache_dir is None
  compiled.enable_cache(str(tmp_path / 'named'), nothing_kept)
  named = pathlib.Path(jax.config.jax_compilation_cache_dir)
  assert named == tmp_path / 'named' / own.name
  compiled.enable_cache(None, nothing_kept)
  assert jax.config.jax_compilation_cache_dir == str(named)
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  jax.config.update(DIR, None)
  compiled.enable_cache(None, nothing_kept)
  expected = tmp_path / 'home' / '.cache' / 'ance_jax' / 'compiled' / own.name
  assert jax.config.jax_compilation_cache_dir == str(expected)


def test_a_folder_that_jax_was_told_of_is_left_to_it(nothing_kept, tmp_path):
  jax.config.update(DIR, str(tmp_path / 'of the user'))
  compiled.enable_cache(None, nothing_kept)
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'of the user')


@pytest.mark.parametrize('name', ['processor', 'processor cores', 'XLA_FLAGS'])
def test_what_bits_hang_on_has_a_folder_of_its_own(
  name, nothing_kept, tmp_path, monkeypatch
):
  compiled.enable_cache(str(tmp_path), nothing_kept)
  here = jax.config.jax_compilation_cache_dir
  about = {**devices_lib.describe(nothing_kept), name: 'another'}
  monkeypatch.setattr(devices_lib, 'describe', lambda devices: about)
  compiled.enable_cache(str(tmp_path), nothing_kept)
  assert jax.config.jax_compilation_cache_dir != here


def test_a_folder_that_cannot_be_used_is_one_line_and_no_error(
  nothing_kept, tmp_path, capsys
):
  def refused(folder, expected):
    compiled.enable_cache(str(folder), nothing_kept)
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith('what is compiled is not kept for the next start: ')
    assert expected in line

  (tmp_path / 'file').write_text('')
  refused(tmp_path / 'file', 'Not a directory')
  compiled.enable_cache(str(tmp_path), nothing_kept)
  own = pathlib.Path(jax.config.jax_compilation_cache_dir)
  for mode in (0o720, 0o702):
    own.chmod(mode)
    refused(tmp_path, 'others can write to')


def test_each_program_is_counted_once_and_only_inside():
  with compiled.count_compilations() as counts:
    function = program(7.0)
    ones = np.ones((64, 64), np.float32)
    function(ones, ones)
    assert counts['compiles'] == 1
    assert counts['compile_secs'] > 0
    function(ones, ones)
    assert counts['compiles'] == 1
    function(ones, ones[:32])
    assert counts['compiles'] == 2
  program(8.0)(ones, ones)
  assert counts['compiles'] == 2
