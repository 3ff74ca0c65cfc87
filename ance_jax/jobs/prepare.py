"""Token rows for the runs to come: `--job=prepare`."""

from ance_jax.core import logs
from ance_jax.core import workdirs
from ance_jax.jobs import beam
from ance_jax.training import experiment


def run(config):
  """Reads the data and keeps its token rows, for the runs to come."""
  workdirs.require(config)
  spread = None
  if config.beam_runner:
    spread = beam.on_beam(config.beam_runner, config.beam_options)
  experiment.create(config, None, spread)
  logs.say(f'prepared: {experiment.tokens_folder(config)}')
