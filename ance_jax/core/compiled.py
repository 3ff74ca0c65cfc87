"""What XLA compiles: kept on disk for later processes, and counted."""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import stat

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from ance_jax.core import devices as devices_lib
from ance_jax.core import logs

# Seconds; jax's own 1.0 leaves out most of the small programs of a start.
_WORTH_KEEPING = 0.1
# Also of what is read back from the disk.
_COMPILED = '/jax/core/compile/backend_compile_duration'


def keep(folder, devices):
  """Has jax keep what it compiles in a folder, for the processes to come.

  jax's own key of an entry has the program, XLA's flags, the versions and the
  processor's features, but not the number of cores, for which XLA compiles
  differently: so there is a subfolder for each `devices.describe`. An entry
  that a killed process half wrote is told from a whole one by its checksum:
  jax warns, and compiles anew.

  Args:
    folder: Path. None: what jax was told by its own flag or variable, or else
      the user's cache folder. Empty: nothing is kept.
    devices: The accelerators used.
  """
  present = jax.config.jax_compilation_cache_dir
  if folder is None and present:
    return
  path = None if folder == '' else _subfolder(folder or _default(), devices)
  if path != present:
    compilation_cache.reset_cache()  # It looks at its folder only once.
    jax.config.update('jax_compilation_cache_dir', path)
    jax.config.update(
      'jax_persistent_cache_min_compile_time_secs', _WORTH_KEEPING
    )


@contextlib.contextmanager
def counted():
  """Counts what is compiled, or read back, while the block runs.

  Yields:
    Counter with 'compiles', programs, and 'compile_secs', which the caller may
    clear.
  """
  counts = collections.Counter()

  def heard(event, secs, **_):
    if event == _COMPILED:
      counts.update(compiles=1, compile_secs=secs)

  monitoring.register_event_duration_secs_listener(heard)
  try:
    yield counts
  finally:
    monitoring.unregister_event_duration_listener(heard)


def _default():
  cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(cache, 'ance_jax', 'compiled')


def _subfolder(folder, devices):
  """Returns the path, a str, of a folder of these devices; None without one."""
  about = json.dumps(devices_lib.describe(devices), sort_keys=True)
  path = pathlib.Path(folder, hashlib.sha256(about.encode()).hexdigest()[:12])
  try:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # What lies there is run: it has to be this user's own.
    others = stat.S_IWGRP | stat.S_IWOTH
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & others:
      raise PermissionError(f'others can write to {path}')
    if not os.access(path, os.W_OK | os.X_OK):
      raise PermissionError(f'{path} cannot be written')
  except (OSError, RuntimeError) as error:  # No home is a RuntimeError.
    logs.say(f'what is compiled is not kept for the next start: {error}')
    return None
  return str(path.absolute())
