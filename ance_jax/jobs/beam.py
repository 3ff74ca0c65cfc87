"""Work dealt out by Apache Beam, where it outgrows one machine."""

import shlex

from ance_jax import errors

try:
  import apache_beam as beam
  from apache_beam.options import pipeline_options
except ImportError:  # It is an extra.
  beam = None


def on_beam(runner, options):
  """Returns spread(function, tasks), which calls function(task) of each task.

  It returns when all are done, and raises what a worker raised. Function and
  tasks go to the workers as Beam sends them.

  Args:
    runner: Name of a Beam runner.
    options: Its options, as on a command line.

  Raises:
    BadInput: Beam is not installed, or takes no such runner or options.
  """
  if beam is None:
    raise errors.BadInput(
      '--beam_runner must be with Apache Beam installed; found that it is not; '
      "run python -m pip install 'ance_jax[beam]', in an environment of its "
      'own.'
    )
  given = pipeline_options.PipelineOptions(
    [f'--runner={runner}', *shlex.split(options)]
  )
  try:
    pipeline = beam.Pipeline(options=given)
  except ValueError as error:
    raise errors.BadInput(
      f'--beam_runner must be a runner that Beam knows; found {runner!r} '
      f'({" ".join(str(error).split())[:120]}); see its documentation.'
    ) from error

  def spread(function, tasks):
    # Each task may go to a worker of its own.
    done = pipeline | beam.Create(tasks, reshuffle=True)
    _ = done | beam.Map(function)
    pipeline.run().wait_until_finish()

  return spread
