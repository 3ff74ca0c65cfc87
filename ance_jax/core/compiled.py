"""Caches compiled XLA programs on disk, and counts compilations."""

import collections
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import hashlib
import json
import os
import pathlib

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from ance_jax.core import devices as devices_lib
from ance_jax.core import logs

# Seconds. jax's default of 1.0 skips most of the small startup programs.
_WORTH_KEEPING = 0.1
# jax also reports this event for programs read back from the disk.
_COMPILED = '/jax/core/compile/backend_compile_duration'


def enable_cache(
  folder: str | os.PathLike | None, devices: Sequence[jax.Device]
) -> None:
  """Sets the folder of jax's persistent compilation cache.

  jax keys an entry by the program, XLA's flags, versions and the processor's
  features, but not by the number of cores, although XLA compiles differently
  for each. So each `devices.describe` has its own subfolder. An entry that a
  killed process wrote only half fails its checksum: jax warns and recompiles.

  Args:
    folder: None keeps the folder set by jax's own flag or variable, or else
      takes the user's cache folder. Empty turns the cache off.
    devices: The accelerators used.
  """
  present = jax.config.jax_compilation_cache_dir
  if folder is None and present:
    return
  path = None if folder == '' else _subfolder(folder, devices)
  if path != present:
    compilation_cache.reset_cache()  # jax reads the setting only once.
    jax.config.update('jax_compilation_cache_dir', path)
    jax.config.update(
      'jax_persistent_cache_min_compile_time_secs', _WORTH_KEEPING
    )


@contextlib.contextmanager
def count_compilations() -> Iterator[collections.Counter]:
  """Counts programs compiled, or read back from the cache, in the block.

  Yields:
    Counter with 'compiles' (programs) and 'compile_secs', which the caller may
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


def _subfolder(folder, devices):
  """Returns the path, a str, of these devices' folder; None if unusable."""
  about = json.dumps(devices_lib.describe(devices), sort_keys=True)
  try:
    if folder is None:
      cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
      folder = pathlib.Path(cache, 'ance_jax', 'compiled')
    path = pathlib.Path(folder, hashlib.sha256(about.encode()).hexdigest()[:12])
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # jax executes the files in it, so only this user may write there.
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
      raise PermissionError(f'others can write to {path}')
    if not os.access(path, os.W_OK | os.X_OK):
      raise PermissionError(f'{path} cannot be written')
  except (OSError, RuntimeError) as error:  # RuntimeError: no home folder.
    logs.log(f'what is compiled is not kept for the next start: {error}')
    return None
  return str(path.absolute())
