"""Runs tasks on Apache Beam, for data too large for one machine."""

from collections.abc import Callable
from collections.abc import Iterable
import shlex
from typing import Any

from ance_jax import errors

try:
  import apache_beam as beam
  from apache_beam.options import pipeline_options
except ImportError:  # An optional dependency.
  beam = None


def on_beam(
  runner: str, options: str
) -> Callable[[Callable[[Any], Any], Iterable], None]:
  """Returns spread(function, tasks), which calls function(task) for each task.

  `spread` returns when all tasks are done, and raises the errors of workers.
  Beam must be able to pickle the function and the tasks.

  Args:
    runner: Name of a Beam runner.
    options: Options of the runner, as on a command line.

  Raises:
    BadInput: Beam is not installed or rejects the runner or its options.
  """
  if beam is None:
    raise errors.refusal(
      '--beam_runner needs Apache Beam, which is not installed',
      "run python -m pip install 'ance_jax[beam]', in an environment of its "
      'own',
    )
  given = pipeline_options.PipelineOptions(
    [f'--runner={runner}', *shlex.split(options)]
  )
  try:
    pipeline = beam.Pipeline(options=given)
  except ValueError as error:
    raise errors.refusal(
      f'--beam_runner={runner} is not a runner that Beam knows '
      f'({" ".join(str(error).split())[:120]})',
      'see its documentation',
    ) from error

  def spread(function, tasks):
    # Reshuffling lets each task run on another worker.
    _ = pipeline | beam.Create(tasks, reshuffle=True) | beam.Map(function)
    pipeline.run().wait_until_finish()

  return spread
