"""Token rows for the runs to come: `--job=prepare`."""

from ance_jax import logs
from ance_jax import pipelines
from ance_jax import runs
from ance_jax import workdirs


def run(config):
  """Reads the data and keeps its token rows, for the runs to come."""
  workdirs.require(config)
  spread = None
  if config.beam_runner:
    spread = pipelines.on_beam(config.beam_runner, config.beam_options)
  runs.begin(config, None, spread)
  logs.say(f'prepared: {runs.tokens_folder(config)}')
