"""Makes the run folder, and names the files in it."""

import pathlib

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import remote

FLAGS_FILE = config_lib.FLAGS_FILE
PAGE_FILE = 'report.html'
EXAMPLES_FOLDER = 'examples'


def require(config: config_lib.Config) -> None:
  """Makes the folder of `--workdir`, and connects it to `--remote_dir`.

  Raises:
    BadInput: One of the two cannot be used.
  """
  if not config.workdir:
    raise errors.refusal(
      f'--job={config.job} is given without --workdir, where to write',
      'set it to a folder, new or that of the run',
    )
  path = pathlib.Path(config.workdir)
  try:
    atomic.make_folder(path)
  except (NotADirectoryError, FileExistsError) as error:
    raise errors.refusal(
      f'--workdir={path} cannot be a folder: {error.strerror}', 'name another'
    ) from error
  remote.connect(path, config.remote_dir)
