"""Training: `--job=train`, and in a notebook."""

from ance_jax.core import logs
from ance_jax.jobs import footprint
from ance_jax.jobs import report
from ance_jax.training import run_log
from ance_jax.training import trainer


def run(config, *, leave=logs.interrupt):
  """Trains a retriever, or goes on from the newest checkpoint of its folder.

  Args:
    config: `Config`.
    leave: What is called at a second Ctrl-C; the first one ends the run with
      a checkpoint.

  Returns:
    {measure: value} on dev at the end; None with `--dry_run`.

  Raises:
    BadInput: The settings or the data cannot be used, or the run cannot fit.
    FloatingPointError: A loss was not finite.
    errors.Stopped: SIGTERM or Ctrl-C came; the newest checkpoint is whole.
  """
  return trainer.run(
    config,
    leave=leave,
    check_room=footprint.check,
    show=run_log.Show(report.write_page, report.show_end),
  )
