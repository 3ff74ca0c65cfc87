"""Mines negatives once, or during training: `--job=refresh`."""

import contextlib
import time

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import locks
from ance_jax.core import logs
from ance_jax.training import background
from ance_jax.training import experiment
from ance_jax.training import negatives
from ance_jax.training import refreshes


def run(config: config_lib.Config) -> None:
  """Refreshes once, or with `--watch` until training ends."""
  if config.watch:
    _await_run(config)
  this, step = experiment.open(
    config, (config.train_split, config.dev_split), for_training=True
  )
  if not experiment.is_run(config.workdir):
    raise errors.refusal(
      f'no run in {config.workdir} to refresh',
      'train one there first, or --watch',
    )
  negatives.check(this)
  if not config.watch:
    logs.log(refreshes.summary(refreshes.refresh(this, step)))
    return
  with (
    contextlib.closing(locks.Lock(config.workdir, locks.REFRESH_LOCK_FILE)),
    logs.stop_signals(),
  ):
    atomic.remove_unfinished(this.workdir / 'refresh')
    background.watch(this)
  logs.log('training is over, and with it refreshing')


def _await_run(config):
  """Waits for the first checkpoint."""
  said = False
  with logs.stop_signals():
    while not (
      experiment.fetch(config) or checkpoint.committed_steps(config.workdir)
    ):
      if not said:
        logs.log(f'waiting for a run in {config.workdir}')
        said = True
      if logs.stop_requested():
        raise errors.Stopped('waiting for a run')
      time.sleep(background.LOOK_SECS)
