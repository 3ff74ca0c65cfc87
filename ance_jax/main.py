"""The command line: parses the flags and runs one job.

    python -m ance_jax.main --flagfile=experiments/quickstart.flags

Slow imports wait until the flags are checked, so that --help and errors in
flags appear at once.
"""

import signal
import sys
import traceback

from absl import app
from absl import flags

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax import flags as flags_lib


def run() -> None:
  """Entry point of `python -m ance_jax.main`."""
  flags_lib.define_flags()
  app.run(_main, flags_parser=_parse)


def _main(_):
  from ance_jax import launch  # Imports jax, which is slow.

  return launch.run()


def _parse(argv):
  """Sets the flags; prints one sentence and exits if one is invalid."""
  if flags_lib.asks_for_help(argv):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # For --help | head.
    print(flags_lib.help_text(argv))
    sys.exit()
  try:
    program, *left_over = flags_lib.parse(argv)
    config_lib.refuse_left_over(left_over)
    flags_lib.from_flags()
    return [program]
  except errors.BadInput as error:
    if flags.FLAGS['debug'].value:
      traceback.print_exception(error)
    print(f'ance_jax: {error}', file=sys.stderr)
    sys.exit(errors.BAD_INPUT)


if __name__ == '__main__':
  run()
