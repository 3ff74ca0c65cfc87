"""Where a job writes: looked at before it reads anything.

A run of somebody else can be read and not written. What a job makes of it goes
into a folder of one's own, and nothing at all into theirs.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import stat
import sys
import tempfile

from ance_jax import errors
from ance_jax.core import checkpoint
from ance_jax.core import faults
from ance_jax.core import logs
from ance_jax.core import strict_io

# Jobs that need a folder for token rows and embeddings, and write nothing else,
# or where `--output` says.
_NEED_NO_WORKDIR = ('search', 'mine', 'export')
# A shell's exit code for SIGTERM.
_STOPPED = 143


@contextlib.contextmanager
def own(config):
  """Gives the settings of a job whose places can be written, for its time.

  A job that writes nothing but `--output` reads a run that cannot be written
  from a folder that is gone afterwards.

  Raises:
    BadInput: A place cannot be written.
  """
  made = config.job == 'search' or config.output
  if (
    made
    and config.job in _NEED_NO_WORKDIR
    and _is_run(config.workdir)
    and problem(config.workdir)
  ):
    check(dataclasses.replace(config, workdir=tempfile.gettempdir()))
    with temporary_folder() as folder:
      logs.say(
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
def temporary_folder():
  """Gives the path of a folder that is removed when a job ends, or is ended."""
  # By default SIGTERM would leave the folder there.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(_STOPPED))
  with tempfile.TemporaryDirectory(prefix='ance_jax-') as folder:
    yield folder


@contextlib.contextmanager
def _naming_way_round(config):
  """Says how to use a run that turned out not to be writable.

  Which a network's file system may tell no sooner.
  """
  try:
    yield
  except OSError as error:
    path = str(error.filename or '')
    inside = path.startswith(os.path.abspath(config.workdir) + os.sep)
    if not (inside and faults.is_denied(error) and _is_run(config.workdir)):
      raise
    fact = faults.sentence(error).partition(';')[0]
    raise errors.BadInput(
      f'{fact}; use a run that is not yours with {way_round(config.workdir)}.'
    ) from error


def check(config):
  """Raises `BadInput` for a place that a job could not write at its end.

  And for data that is not there, before a model is read.
  """
  for flag, path in _written(config):
    if found := problem(path):
      cure = f'name another --{flag}'
      if flag == 'workdir' and _is_run(path):
        cure = f'use a run that is not yours with {way_round(path)}'
      raise errors.BadInput(f'--{flag}: {found}; {cure}.')
  reads = config.dataset != 'pydocs' and config.job not in ('report', 'export')
  if reads and config.data_dir and not config.download:
    found = strict_io.kind(config.data_dir)
    if found != 'a folder':
      raise errors.BadInput(
        f'--data_dir must be a folder; found {found} at {config.data_dir}; set '
        'it to the folder of the data.'
      )


def problem(path):
  """Returns why nothing can be made in a folder, or ''; it writes nothing.

  Args:
    path: The folder; where it is not there, it is to be made.
  """
  there = pathlib.Path(path).absolute()
  while True:  # At most up to /, which is there.
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


def way_round(workdir):
  """Returns the flags that read a run which cannot be written."""
  return f'--init_from={workdir} --workdir=FOLDER_OF_YOUR_OWN'


def _is_run(folder):
  try:
    return bool(folder) and checkpoint.are_in(folder)
  except OSError:
    return False


def _written(config):
  """Yields the flag and the folder of each place that a job writes into."""
  if config.job == 'report':
    run = config.runs.split(',')[0] or config.workdir
    if config.picture or os.path.isdir(run):
      yield 'picture', os.path.dirname(config.picture or f'{run}/curves.png')
  elif config.workdir:
    yield 'workdir', config.workdir
  if config.output and config.job in ('mine', 'export'):
    yield 'output', pathlib.Path(config.output).absolute().parent
  # Token rows that are there need only be read.
  if config.tokens_dir and not _is_filled(config.tokens_dir):
    yield 'tokens_dir', config.tokens_dir
  remote = config.remote_dir
  if remote and '://' not in remote and config.job in ('train', 'refresh'):
    yield 'remote_dir', remote


def _is_filled(folder):
  return os.path.isdir(folder) and bool(os.listdir(folder))
