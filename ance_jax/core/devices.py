"""Devices of this process, their mesh, and the shardings of arrays on them."""

import collections
from collections.abc import Sequence
from importlib import metadata
import os
import pathlib
import platform
import re
from typing import Any

import jax
from jax import sharding
import numpy as np

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import distributed

AXIS = 'devices'
# Packages whose arithmetic affects parameters or negatives.
_PACKAGES = ('ance_jax', 'faiss-cpu', 'flax', 'jax', 'jaxlib', 'numpy', 'optax')
_CPU_FILE = pathlib.Path('/proc/cpuinfo')


def local(num_devices: int) -> tuple[jax.Device, ...]:
  """Returns the first `num_devices` local devices, or all of them for 0."""
  return local_parts(num_devices, 0)[0]


def local_parts(
  num_devices: int, num_others: int
) -> tuple[tuple[jax.Device, ...], tuple[jax.Device, ...]]:
  """Returns the first `num_devices` local devices and the `num_others` after.

  With `num_devices` 0, the first part is every device but the last
  `num_others`.
  """
  found = jax.local_devices()
  if num_devices > len(found):
    raise errors.refusal(
      f'--num_devices={num_devices} is more than the number of devices here '
      f'({len(found)})',
      'lower it',
    )
  first = num_devices or len(found) - num_others
  if first < 1 or first + num_others > len(found):
    raise errors.refusal(
      f'--refresh_devices={num_others} leaves fewer than '
      f'{num_devices or 1} of the {len(found)} devices here to train',
      'lower it',
    )
  return tuple(found[:first]), tuple(found[first : first + num_others])


def of_all_processes(devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
  """Returns the first `len(devices)` devices of each process."""
  if distributed.count() == 1:
    return devices
  number, found = len(devices), collections.defaultdict(list)
  for device in jax.devices():
    found[device.process_index].append(device)
  return tuple(d for _, here in sorted(found.items()) for d in here[:number])


def training_devices(
  config: config_lib.Config,
) -> tuple[Sequence[jax.Device], Sequence[jax.Device]]:
  """Returns (training devices, devices that refresh in the background).

  The training devices are those of all processes. Only the job `train` has
  refresh devices.
  """
  others = config.refresh_devices if config.job == 'train' else 0
  first, others = local_parts(config.num_devices, others)
  return of_all_processes(first), others


def own(devices: Sequence[jax.Device]) -> tuple[jax.Device, ...]:
  """Returns the devices in `devices` that belong to this process."""
  return tuple(d for d in devices if d.process_index == jax.process_index())


def host() -> jax.Device | None:
  """Returns the CPU device; None if `JAX_PLATFORMS` leaves it out."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    return None


def describe(devices: Sequence[jax.Device]) -> dict[str, str]:
  """Returns everything besides its flags that affects the bits of a run."""
  text = _CPU_FILE.read_text() if _CPU_FILE.exists() else ''
  cpu = re.search(r'model name\s*:\s*(.*)', text)
  return {
    'devices': f'{len(devices)} {devices[0].device_kind}',
    'processor': cpu[1] if cpu else platform.machine(),
    # Those that this process, and so XLA, may use.
    'processor cores': str(
      len(os.sched_getaffinity(0))
      if hasattr(os, 'sched_getaffinity')
      else os.cpu_count()
    ),
    'XLA_FLAGS': os.environ.get('XLA_FLAGS', ''),
    'OPENBLAS_CORETYPE': os.environ.get('OPENBLAS_CORETYPE', ''),
    'python': platform.python_version(),
    **{name: metadata.version(name) for name in _PACKAGES},
  }


def replicated(devices: Sequence[jax.Device]) -> sharding.NamedSharding:
  """Returns the sharding of an array that each device holds whole.

  Only over this process's devices, like everything here not named global.
  """
  return sharding.NamedSharding(_mesh(own(devices)), sharding.PartitionSpec())


def globally_replicated(
  devices: Sequence[jax.Device],
) -> sharding.NamedSharding:
  """Returns the sharding of an array that all processes' devices hold whole."""
  return sharding.NamedSharding(_mesh(devices), sharding.PartitionSpec())


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
  """Returns a tree of arrays, copied whole to each device of this process."""
  return jax.device_put(tree, replicated(devices))


def split(devices: Sequence[jax.Device]) -> sharding.NamedSharding:
  """Returns the sharding that splits rows, in order, over local devices."""
  return sharding.NamedSharding(
    _mesh(own(devices)), sharding.PartitionSpec(AXIS)
  )


def shard(batch: Any, devices: Sequence[jax.Device]) -> Any:
  """Puts this process's part of a batch on its devices, as `pmap` expects.

  Args:
    batch: Tree of arrays (B, ...), rows in the order of the devices.
    devices: The devices, n of them this process's; n divides each B.

  Returns:
    The same tree of arrays (n, B / n, ...), part i on device i.
  """
  here = split(devices)

  def place(array):
    each = len(array) // here.num_devices
    parts = array.reshape(here.num_devices, each, *array.shape[1:])
    return jax.device_put(parts, here)

  return jax.tree.map(place, batch)


def _mesh(devices):
  return sharding.Mesh(np.array(devices), (AXIS,))
