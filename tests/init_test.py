"""XLA's flags, set by whoever imports the package, and before jax is."""

import importlib
from importlib import metadata
import os
import pathlib
import subprocess
import sys

import pytest

import ance_jax

REPOSITORY = pathlib.Path(__file__).parents[1]
OURS = '--xla_cpu_experimental_ynn_fusion_type='
# Of a jaxlib that is not known yet, nothing is known.
KNOWN = metadata.version('jaxlib') in ance_jax._JAXLIB_VERSIONS


def test_a_step_is_compiled_with_our_flag_and_the_checkpoint_says_so():
  code = """
from ance_jax.core import devices
import jax
assert jax.jit(lambda x: 2 * x)(1) == 2
print([devices.describe(jax.local_devices())['XLA_FLAGS']])
"""
  kept = {n: v for n, v in os.environ.items() if n != 'XLA_FLAGS'}
  ended = subprocess.run(
    [sys.executable, '-c', code],
    cwd=REPOSITORY,
    env=kept | {'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert ended.stdout.strip() == str([OURS if KNOWN else '']), ended.stderr


@pytest.fixture
def begin(monkeypatch):
  """begin(variables) -> the environment once the package is imported anew."""
  for name in ('XLA_FLAGS', 'JAX_PLATFORMS', 'OPENBLAS_CORETYPE'):
    monkeypatch.setenv(name, '')
    monkeypatch.delenv(name)
  for name in ('jax', 'faiss'):
    monkeypatch.delitem(sys.modules, name, raising=False)
  monkeypatch.setattr(metadata, 'version', lambda _: '0.10.2')

  def begin(**variables):
    for name, value in variables.items():
      monkeypatch.setenv(name, value)
    importlib.reload(ance_jax)
    return os.environ

  return begin


@pytest.mark.parametrize(
  ('version', 'variables', 'expected'),
  [
    ('0.10.2', {}, OURS),
    ('0.10.20', {}, None),
    ('9.9', {}, None),
    (None, {}, None),
    ('0.10.2', {'XLA_FLAGS': '--xla_dump_to=/x'}, '--xla_dump_to=/x'),
    ('0.10.2', {'XLA_FLAGS': ''}, ''),
    ('0.10.2', {'JAX_PLATFORMS': 'cuda'}, None),
    ('0.10.2', {'JAX_PLATFORMS': 'cuda,cpu'}, None),
  ],
)
def test_the_flag_is_set_for_a_known_jaxlib_on_cpus_where_nobody_set_any(
  version, variables, expected, begin, monkeypatch
):
  def installed(name):
    if version is None:
      raise metadata.PackageNotFoundError(name)
    return version

  monkeypatch.setattr(metadata, 'version', installed)
  variables = {'JAX_PLATFORMS': 'cpu', **variables}
  assert begin(**variables).get('XLA_FLAGS') == expected


def test_the_flag_is_not_set_where_jax_was_first(begin, monkeypatch):
  monkeypatch.setitem(sys.modules, 'jax', None)
  assert 'XLA_FLAGS' not in begin(JAX_PLATFORMS='cpu')


@pytest.mark.parametrize('plugin', ['jax_plugins', 'libtpu'])
def test_the_flag_is_not_set_where_an_accelerator_may_be(
  plugin, begin, tmp_path, monkeypatch
):
  (tmp_path / plugin).mkdir()
  monkeypatch.syspath_prepend(tmp_path)
  assert 'XLA_FLAGS' not in begin()
  assert begin(JAX_PLATFORMS='cpu')['XLA_FLAGS'] == OURS


CPU = 'vendor_id\t: {}\nmodel name\t: X\nflags\t\t: fpu {}\n'
WIDE = 'fma avx2 avx512f avx512cd avx512bw avx512dq avx512vl'


@pytest.mark.parametrize('own', [None, 'Zen'])
@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    (CPU.format('GenuineIntel', WIDE), 'SkylakeX'),
    (CPU.format('GenuineIntel', WIDE.replace('avx512dq', '')), 'Haswell'),
    (CPU.format('GenuineIntel', 'fma avx'), None),
    (CPU.format('AuthenticAMD', WIDE), None),
    (None, None),
  ],
)
def test_kernels_of_openblas_are_those_of_the_processor(
  text, expected, own, begin, tmp_path, monkeypatch
):
  file = tmp_path / 'cpuinfo'
  if text is not None:
    file.write_text(text)
  monkeypatch.setattr(pathlib, 'Path', lambda _: file)
  variables = {'OPENBLAS_CORETYPE': own} if own else {}
  assert begin(**variables).get('OPENBLAS_CORETYPE') == (own or expected)
