"""Runs one job: from parsed flags to an exit code."""

import dataclasses
import importlib
import os
import sys
import traceback

from absl import flags
from absl import logging
import jax

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax import flags as flags_lib
from ance_jax.core import checkpoint
from ance_jax.core import distributed
from ance_jax.core import faults
from ance_jax.core import logs
from ance_jax.core import places

# Jobs that can read another run, named by --init_from.
_READ_RUNS = (
  'evaluate',
  'search',
  'audit',
  'mine',
  'export',
  'encode',
  'compare',
)
# Flags that these jobs do not inherit from that run: where it writes, and,
# if --dataset is given, how to read the data.
OWN_PLACES = (
  'remote_dir',
  'tokens_dir',
  'compilation_cache_dir',
  'output',
  'picture',
)
_OF_DATA = (
  'data_dir',
  'beir_set',
  'questions',
  'protocol',
  'train_split',
  'dev_split',
  'dev_fraction',
  'bm25_run',
)


def run() -> int:
  """Runs the job that the flags name; returns the exit code."""
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax logs each file.
  try:
    config = flags_lib.from_flags()
    if config.job == 'inspect':
      logs.log(f'inspecting {config.data_dir or config.dataset}')
    config = with_flags_of_run(config)
    logs.use_bars(config.progress_bars)
    for line in flags_lib.unread(config, sys.argv[1:]):
      logs.log(line)
    with places.own(config) as config:
      run_job(config)
    return 0
  except (Exception, KeyboardInterrupt) as error:
    if flags.FLAGS.debug:
      traceback.print_exception(error)
    sentence, code = explain(error)
  # Printed only here, after the progress bars are closed.
  print(f'ance_jax: {sentence}', file=sys.stderr, flush=True)
  if distributed.count() > 1:
    # On a normal exit jax would wait five minutes for the other processes.
    sys.stdout.flush()
    os._exit(code)
  return code


def run_job(config: config_lib.Config) -> None:
  """Imports the module of a job and runs it.

  Importing the modules of all jobs would take seconds without any output.
  """
  serves = config.job == 'search' and config.port is not None
  name = 'serve' if serves else config.job
  run_it = importlib.import_module(f'ance_jax.jobs.{name}').run
  if config.job == 'train':
    run_it(config, leave=_leave)
  else:
    run_it(config)


def explain(error: BaseException) -> tuple[str, int]:
  """Returns a sentence and the exit code for the error that ended a job."""
  if isinstance(error, errors.SaveFailed | errors.Damaged):
    return str(error), errors.FAILED
  if isinstance(error, errors.BadInput | FloatingPointError):
    return str(error), errors.BAD_INPUT
  if sentence := faults.sentence(error):
    return sentence, errors.BAD_INPUT if faults.is_of_the_user(
      error
    ) else errors.FAILED
  if isinstance(error, errors.Stopped):
    return (
      f'stopped on request in {error}; the same command goes on from the '
      'newest checkpoint.'
    ), errors.STOPPED
  if isinstance(error, KeyboardInterrupt):
    return 'interrupted.', errors.INTERRUPTED
  text = ' '.join(str(error).split())[:300]
  if distributed.count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
    return (
      f'process {distributed.index()} cannot reach another one any more '
      f'({text[:100]}); what was committed is whole: start all of them again.'
    ), errors.FAILED
  return (
    f'{type(error).__name__}: {text}; what was committed is whole: give the '
    'same command with --debug to see where it came from.'
  ), errors.FAILED


def with_flags_of_run(config: config_lib.Config) -> config_lib.Config:
  """Returns the settings of a run, overridden by the given flags.

  Jobs other than training need only its folder; --job=compare takes the first
  folder of `--runs`.
  """
  folder = config.workdir
  if config.job == 'compare':
    from ance_jax.jobs import systems  # Imported only if needed, like a job.

    folder = systems.data_folder(config)
  if config.remote_dir and config.job != 'train':
    from ance_jax.training import experiment

    experiment.fetch(config, every=config.checkpoint != 'last')
  if config.job == 'train':
    return config
  if folder and checkpoint.committed_steps(folder):
    # --job=refresh mines for the run, by its rules; other jobs have their own.
    rules = () if config.job == 'refresh' else config_lib.MINING_RULES
    return _under_flags(config, folder, ('workdir', *rules))
  theirs = config.init_from if config.job in _READ_RUNS else ''
  if theirs and checkpoint.committed_steps(theirs):
    own = ('workdir', 'init_from', *OWN_PLACES, *config_lib.MINING_RULES)
    # The run's data flags do not apply to another dataset.
    if flags.FLAGS['dataset'].present:
      own += _OF_DATA
    return _under_flags(config, theirs, own)
  return config


def _under_flags(config, folder, own):
  """Returns the settings of a run, overridden by the given flags.

  Args:
    config: Settings from the flags.
    folder: Folder of the run.
    own: Names of flags that are never taken from the run.
  """
  from ance_jax.training import experiment

  given = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if flags.FLAGS[field.name].present
  }
  given |= {name: getattr(config, name) for name in own}
  if 'index' in given:
    # Search parameters of the run's index do not apply to another.
    given.setdefault('index_params', config.index_params)
  if 'beir_set' in given:
    given.setdefault('protocol', None)  # Defaults to the set's.
  _, settings = checkpoint.read_chosen(
    folder, 'last', lambda step: experiment.settings(folder, step)
  )
  return dataclasses.replace(settings, **given)


def _leave():
  """Ends the process without waiting for a save in progress."""
  print('\nance_jax: interrupted.', file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(errors.INTERRUPTED)
