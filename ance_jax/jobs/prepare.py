"""Tokenizes the data for later runs: `--job=prepare`."""

from ance_jax import config as config_lib
from ance_jax.core import logs
from ance_jax.core import workdirs
from ance_jax.jobs import beam
from ance_jax.training import experiment


def run(config: config_lib.Config) -> None:
  """Reads the data and saves its token rows for later runs."""
  workdirs.require(config)
  runner = config.beam_runner
  spread = beam.on_beam(runner, config.beam_options) if runner else None
  experiment.create(config, None, spread)
  logs.log(f'prepared: {experiment.tokens_folder(config)}')
