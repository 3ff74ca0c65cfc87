"""Dense retrievers in JAX, trained on negatives mined from their own index."""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys

__version__ = '0.1.0'

# An empty list of what XLA hands to YNN, a library of CPU kernels: on a Xeon
# that made encoding 1.2 times as fast, see README.md.
_WITHOUT_YNN = '--xla_cpu_experimental_ynn_fusion_type='
# A name that XLA does not know aborts the process; these know this one.
_JAXLIB_VERSIONS = (
  '0.10.0',
  '0.10.1',
  '0.10.2',
  '0.11.0',
  '0.11.1',
  '0.11.2',
  '0.12.0',
  '0.12.0.1',
)


def _set_xla_flags():
  """Sets XLA's flags where nobody did, and only CPUs are there.

  They are read from the environment once, when jax is first used, so this has
  to come before any import of it; who imports jax first, or sets `XLA_FLAGS` to
  anything, has his own. They change bits: checkpoints record them.
  """
  if 'jax' in sys.modules or 'XLA_FLAGS' in os.environ:
    return
  # An accelerator's plugin reads the same variable, with an XLA of its own.
  plugins = map(importlib.util.find_spec, ('jax_plugins', 'libtpu'))
  platforms = os.environ.get('JAX_PLATFORMS')
  if platforms != 'cpu' and (platforms or any(plugins)):
    return
  try:
    version = importlib.metadata.version('jaxlib')
  except importlib.metadata.PackageNotFoundError:
    return
  if version in _JAXLIB_VERSIONS:
    os.environ['XLA_FLAGS'] = _WITHOUT_YNN


def _set_openblas_kernels():
  """Names the kernels of OpenBLAS where nobody did, on Intel's processors.

  The wheel of FAISS brings OpenBLAS 0.3.15, of 2021: a processor that came
  later is a Pentium 4 to it, and search took five times as long on one. It
  reads the variable when it is loaded. Checkpoints record it.
  """
  if 'faiss' in sys.modules or 'OPENBLAS_CORETYPE' in os.environ:
    return
  file = pathlib.Path('/proc/cpuinfo')
  text = file.read_text() if file.exists() else ''
  found = re.search(r'^flags\s*:(.*)', text, re.MULTILINE)
  features = set(found[1].split()) if found else set()
  if not re.search(r'^vendor_id\s*: GenuineIntel', text, re.MULTILINE):
    return
  # All that its kernels for Skylake-X need.
  if features >= {'avx512f', 'avx512cd', 'avx512bw', 'avx512dq', 'avx512vl'}:
    os.environ['OPENBLAS_CORETYPE'] = 'SkylakeX'
  elif features >= {'avx2', 'fma'}:
    os.environ['OPENBLAS_CORETYPE'] = 'Haswell'


_set_xla_flags()
_set_openblas_kernels()
