"""XLA's flags, set by whoever imports the package, and before jax is."""

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
SHOW = "import ance_jax, os; print([os.environ.get('XLA_FLAGS')])"


def run_python(code, **variables):
  """Returns what Python prints, with these variables instead of ours."""
  own = ('XLA_FLAGS', 'JAX_PLATFORMS')
  kept = {name: text for name, text in os.environ.items() if name not in own}
  ended = subprocess.run(
    [sys.executable, '-c', code],
    cwd=REPOSITORY,
    env=kept | variables,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended.stderr
  return ended.stdout.strip()


def version_of_jaxlib(text):
  """Code that gives jaxlib a version, and then imports the package."""
  return f'from importlib import metadata; metadata.version = {text}; {SHOW}'


def test_a_step_is_compiled_with_our_flag_and_the_checkpoint_says_so():
  code = """
from ance_jax.core import devices
import jax
assert jax.jit(lambda x: 2 * x)(1) == 2
print([devices.describe(jax.local_devices())['XLA_FLAGS']])
"""
  shown = run_python(code, JAX_PLATFORMS='cpu')
  assert shown == str([OURS if KNOWN else ''])


@pytest.mark.parametrize(
  ('code', 'variables', 'expected'),
  [
    (version_of_jaxlib("lambda _: '0.10.2'"), {}, OURS),
    (version_of_jaxlib("lambda _: '0.10.20'"), {}, None),
    (version_of_jaxlib("lambda _: '9.9'"), {}, None),
    (
      'from importlib import metadata\n'
      'def version(name):\n'
      '  raise metadata.PackageNotFoundError(name)\n'
      f'metadata.version = version; {SHOW}',
      {},
      None,
    ),
    (SHOW, {'XLA_FLAGS': '--xla_dump_to=/x'}, '--xla_dump_to=/x'),
    (SHOW, {'XLA_FLAGS': ''}, ''),
    (SHOW, {'JAX_PLATFORMS': 'cuda'}, None),
    (SHOW, {'JAX_PLATFORMS': 'cuda,cpu'}, None),
    (f'import jax; {SHOW}', {}, None),
  ],
  ids=[
    'known', 'unknown', 'of tomorrow', 'without a version', 'of the user',
    'none by the user', 'GPU', 'GPU and CPU', 'jax first',
  ],
)  # fmt: skip
def test_the_flag_is_set_for_a_known_jaxlib_on_cpus_where_nobody_set_any(
  code, variables, expected
):
  variables = {'JAX_PLATFORMS': 'cpu', **variables}
  assert run_python(code, **variables) == str([expected])


@pytest.mark.parametrize('plugin', ['jax_plugins', 'libtpu'])
def test_the_flag_is_not_set_where_an_accelerator_may_be(plugin, tmp_path):
  (tmp_path / plugin).mkdir()
  known = version_of_jaxlib("lambda _: '0.10.2'")
  paths = f'{tmp_path}:{REPOSITORY}'
  assert run_python(known, PYTHONPATH=paths) == '[None]'
  assert run_python(known, PYTHONPATH=paths, JAX_PLATFORMS='cpu') != '[None]'


def test_jax_that_was_there_first_has_its_flags_recorded():
  code = """
import jax
from ance_jax.core import devices
print([devices.describe(jax.local_devices())['XLA_FLAGS']])
"""
  assert run_python(code, JAX_PLATFORMS='cpu') == "['']"


CPU = 'vendor_id\t: {}\nmodel name\t: X\nflags\t\t: fpu {}\n'
WIDE = 'fma avx2 avx512f avx512cd avx512bw avx512dq avx512vl'


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    (CPU.format('GenuineIntel', WIDE), 'SkylakeX'),
    (CPU.format('GenuineIntel', WIDE.replace('avx512dq', '')), 'Haswell'),
    (CPU.format('GenuineIntel', 'fma avx'), None),
    (CPU.format('AuthenticAMD', WIDE), None),
    ('', None),
  ],
)
def test_kernels_of_openblas_are_those_of_the_processor(
  text, expected, tmp_path, monkeypatch
):
  (tmp_path / 'cpuinfo').write_text(text)
  monkeypatch.delitem(sys.modules, 'faiss', raising=False)
  for own in (None, 'Zen'):
    monkeypatch.setenv('OPENBLAS_CORETYPE', own or '')
    if own is None:
      monkeypatch.delenv('OPENBLAS_CORETYPE')
    ance_jax._set_openblas_kernels(tmp_path / 'cpuinfo')
    assert os.environ.get('OPENBLAS_CORETYPE') == (own or expected)
