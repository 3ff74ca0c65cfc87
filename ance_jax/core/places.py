"""Checks, before a job reads anything, that it can write its outputs.

Another user's run can be read but not written. A job writes its results for
such a run into a folder of the user's own, and nothing into the run.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import pathlib
import signal
import stat
import sys
import tempfile

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import checkpoint
from ance_jax.core import faults
from ance_jax.core import logs
from ance_jax.core import strict_io

# Jobs that need a folder only for token rows and embeddings; their results, if
# any, go to `--output`.
_NEED_NO_WORKDIR = ('search', 'mine', 'export')
# The shell's exit code for SIGTERM.
_STOPPED = 143


@contextlib.contextmanager
def own(config: config_lib.Config) -> Iterator[config_lib.Config]:
  """Yields the config of a job with only writable places.

  A job that writes nothing but `--output` reads a run that is not writable from
  a temporary folder.

  Raises:
    BadInput: A place is not writable.
  """
  if (
    (config.job == 'search' or config.output)
    and config.job in _NEED_NO_WORKDIR
    and _is_run(config.workdir)
    and problem(config.workdir)
  ):
    check(dataclasses.replace(config, workdir=tempfile.gettempdir()))
    with temporary_folder() as folder:
      logs.log(
        f'{config.workdir} cannot be written: token rows and embeddings are in '
        f'{folder} until this ends ({way_round(config.workdir)} keeps them)'
      )
      yield dataclasses.replace(
        config, workdir=folder, init_from=config.workdir
      )
  else:
    check(config)
    with _naming_way_round(config):
      yield config


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
  """Yields the path of a folder that is removed at exit, also on SIGTERM."""
  # By default SIGTERM would leave the folder there.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(_STOPPED))
  with tempfile.TemporaryDirectory(prefix='ance_jax-') as folder:
    yield folder


@contextlib.contextmanager
def _naming_way_round(config):
  """Explains how to use a run that turned out not to be writable.

  A network file system may report that only when a write fails.
  """
  try:
    yield
  except OSError as error:
    inside = str(error.filename or '').startswith(
      os.path.abspath(config.workdir) + os.sep
    )
    if not (inside and faults.is_denied(error) and _is_run(config.workdir)):
      raise
    raise errors.refusal(
      faults.sentence(error).partition(';')[0], _read_only_cure(config.workdir)
    ) from error


def check(config: config_lib.Config) -> None:
  """Raises `BadInput` if the job could not write its outputs.

  Also if `--data_dir` is missing, before a model is read.
  """
  for flag, path in _written(config):
    if found := problem(path):
      cure = (
        _read_only_cure(path)
        if flag == 'workdir' and _is_run(path)
        else f'name another --{flag}'
      )
      raise errors.refusal(found, cure, f'--{flag}: ')
  reads = config.dataset != 'pydocs' and config.job not in ('report', 'export')
  if reads and config.data_dir and not config.download:
    if (found := strict_io.kind(config.data_dir)) != 'a folder':
      raise errors.refusal(
        f'--data_dir={config.data_dir} names {found}, and a folder is needed',
        'set it to the folder of the data',
      )


def problem(path: str | os.PathLike) -> str:
  """Returns why nothing can be written in a folder, or ''; writes nothing.

  Args:
    path: The folder, which need not exist yet.
  """
  there = pathlib.Path(path).absolute()
  while True:  # Ends at / at the latest, which exists.
    try:
      mode = os.stat(there).st_mode
      break
    except (FileNotFoundError, NotADirectoryError):
      there = there.parent
    except OSError as error:
      return faults.sentence(error).partition(';')[0] or str(error)
  if not stat.S_ISDIR(mode):
    return f'{there} is a file, and a folder is needed'
  if os.access(there, os.W_OK | os.X_OK):
    return ''
  if os.statvfs(there).f_flag & os.ST_RDONLY:
    return f'{there} is on a read-only file system'
  return f'{there} cannot be written (permission denied)'


def way_round(workdir: str | os.PathLike) -> str:
  """Returns the flags that read a run which is not writable."""
  return f'--init_from={workdir} --workdir=FOLDER_OF_YOUR_OWN'


def _read_only_cure(workdir):
  return f'use a run that is not yours with {way_round(workdir)}'


def _is_run(folder):
  try:
    return bool(folder) and checkpoint.are_in(folder)
  except OSError:
    return False


def _written(config):
  """Yields (flag, folder) for each place that a job writes into."""
  if config.job == 'report':
    run = config.runs.split(',')[0] or config.workdir
    if config.picture or os.path.isdir(run):
      yield 'picture', os.path.dirname(config.picture or f'{run}/curves.png')
  elif config.workdir:
    yield 'workdir', config.workdir
  if config.output and config.job in ('mine', 'export'):
    yield 'output', pathlib.Path(config.output).absolute().parent
  # Existing token rows are only read.
  tokens = config.tokens_dir
  if tokens and not (os.path.isdir(tokens) and os.listdir(tokens)):
    yield 'tokens_dir', tokens
  remote = config.remote_dir
  if remote and '://' not in remote and config.job in ('train', 'refresh'):
    yield 'remote_dir', remote
