"""The command line: parses the flags, runs one job.

    python -m ance_jax.main --flagfile=experiments/quickstart.flags

Kept short, so that all else can be imported in a notebook and be tested.
"""

import dataclasses
import os
import pathlib
import sys

from absl import app
from absl import flags
from absl import logging
import jax

from ance_jax import checkpoint
from ance_jax import config as config_lib
from ance_jax import evaluate
from ance_jax import logs
from ance_jax import refresh
from ance_jax import report
from ance_jax import runs
from ance_jax import train

_JOBS = {
  'train': train.run,
  'refresh': refresh.run,
  'encode': evaluate.write_embeddings,
  'evaluate': evaluate.run,
  'search': evaluate.search,
  'report': report.run,
}
# Exit codes: a disk failed; what the user gave cannot be used; a shell's for
# SIGTERM, Ctrl-C.
_FAILED = 1
_BAD_INPUT, _STOPPED, _INTERRUPTED = 2, 143, 130


def main(argv):
  """Runs the job that the flags name; returns the exit code."""
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells of each file.
  try:
    config_lib.refuse_left_over(argv[1:])
    config = _with_flags_of_run(config_lib.Config.from_flags())
    _JOBS[config.job](config)
  except (config_lib.BadInput, FloatingPointError) as error:
    print(f'ance_jax: {error}', file=sys.stderr)
    return _BAD_INPUT
  except checkpoint.SaveFailed as error:
    print(f'ance_jax: {error}', file=sys.stderr)
    return _FAILED
  except OSError as error:
    print(
      f'ance_jax: a file could not be read or written ({error}); what was '
      'committed is whole: make room or mend the disk, and give the same '
      'command.',
      file=sys.stderr,
    )
    return _FAILED
  except logs.Stopped as stopped:
    print(
      f'ance_jax: stopped on request in {stopped}; the same command goes on '
      'from the newest checkpoint.',
      file=sys.stderr,
    )
    return _STOPPED
  except KeyboardInterrupt:
    print('ance_jax: interrupted.', file=sys.stderr)
    return _INTERRUPTED
  return 0


def _with_flags_of_run(config):
  """Returns the settings of a run's folder under the flags that were given.

  A job other than training needs only to be told the folder.
  """
  path = pathlib.Path(config.workdir or os.devnull) / runs.FLAGS_FILE
  if config.job == 'train' or not path.is_file():
    return config
  names = [field.name for field in dataclasses.fields(config)]
  given = {n: getattr(config, n) for n in names if flags.FLAGS[n].present}
  return config_lib.Config.from_flagfile(path, **given)


def run():
  """Entry point of `python -m ance_jax.main`."""
  config_lib.define_flags()
  flags.adopt_module_key_flags(config_lib)
  jax.config.config_with_absl()
  app.run(main)


if __name__ == '__main__':
  run()
