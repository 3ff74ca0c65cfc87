"""Tokenizes the data for later runs: `--job=prepare`."""

from ance_jax import config as config_lib
from ance_jax.core import logs
from ance_jax.core import workdirs
from ance_jax.jobs import beam
from ance_jax.training import experiment


def run(config: config_lib.Config) -> None:
  """Reads the data and saves its token rows for later runs."""
  workdirs.require(config)
  spread = (
    beam.on_beam(config.beam_runner, config.beam_options)
    if config.beam_runner
    else None
  )
  experiment.create(config, None, spread)
  logs.log(f'prepared: {experiment.tokens_folder(config)}')
