"""Extracts the settings of lower packages from a `Config`."""

import pathlib

from ance_jax import config as config_lib
from ance_jax import config_checks
from ance_jax.core import atomic
from ance_jax.data import records
from ance_jax.models import pretrained
from ance_jax.models import sources
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import encoding as encoding_lib


def data(config: config_lib.Config) -> records.Settings:
  """Returns the data settings; jobs that only read a run reuse its pydocs."""
  folder = pathlib.Path(config.workdir, 'datasets')
  theirs = pathlib.Path(config.init_from, 'datasets')
  if config.job not in ('train', 'prepare') and not atomic.is_committed(folder):
    folder = theirs if atomic.is_committed(theirs) else folder
  is_read = config.job == 'compare' and atomic.is_committed(folder)
  return _part(
    records.Settings,
    config,
    test_splits=config_checks.TEST_SPLITS,
    pydocs_dir=str(folder),
    builds_pydocs=folder != theirs and not is_read,
  )


def model(
  config: config_lib.Config,
) -> tuple[pretrained.Settings, sources.Sizes]:
  """Returns the settings of the retriever, and the sizes of a random one."""
  return _part(pretrained.Settings, config), _part(sources.Sizes, config)


def encoding(config: config_lib.Config) -> encoding_lib.Settings:
  """Returns the settings of encoding."""
  # cuDNN may fail to load a kernel while another thread uses the GPU.
  return _part(
    encoding_lib.Settings, config, kernel=config.refresh_mode != 'async'
  )


def index(config: config_lib.Config) -> corpus_index.Settings:
  """Returns the settings of the index."""
  return corpus_index.Settings(
    config.index,
    config.index_params,
    config.center_passages,
    config.rows_per_block,
    config.search_memory_mb,
  )


def _part(kind, config, **others):
  """Returns a NamedTuple `kind`, filled from the `Config` and `others`."""
  names = [name for name in kind._fields if name not in others]
  return kind(**{name: getattr(config, name) for name in names}, **others)
