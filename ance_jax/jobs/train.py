"""Trains a retriever: `--job=train`, or called from a notebook."""

from collections.abc import Callable
from typing import Any

from ance_jax import config as config_lib
from ance_jax.core import logs
from ance_jax.jobs import footprint
from ance_jax.jobs import report
from ance_jax.training import run_log
from ance_jax.training import trainer


def run(
  config: config_lib.Config, *, leave: Callable[[], Any] = logs.interrupt
) -> dict[str, float] | None:
  """Trains a retriever, resuming from the newest checkpoint of its folder.

  Args:
    config: Settings of the run.
    leave: Called at a second Ctrl-C; the first one saves a checkpoint and ends
      the run.

  Returns:
    The value of each measure on dev at the end; None with `--dry_run`.

  Raises:
    BadInput: The settings or the data cannot be used, or the run cannot fit.
    FloatingPointError: A loss was not finite.
    errors.Stopped: SIGTERM or Ctrl-C arrived; the newest checkpoint is intact.
  """
  return trainer.run(
    config,
    leave=leave,
    check_room=footprint.check,
    show=run_log.Show(report.write_page, report.show_end),
  )
