"""Accelerators of this process: their mesh, and arrays laid out over them."""

import collections
from importlib import metadata
import os
import pathlib
import platform
import re

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from ance_jax import errors
from ance_jax.core import distributed

AXIS = 'devices'
# Packages whose arithmetic ends up in parameters or negatives.
_PACKAGES = ('ance_jax', 'faiss-cpu', 'flax', 'jax', 'jaxlib', 'numpy', 'optax')
_CPU_FILE = pathlib.Path('/proc/cpuinfo')


def local(num_devices):
  """Returns the first `num_devices` local devices; all of them for 0."""
  return local_parts(num_devices, 0)[0]


def local_parts(num_devices, num_others):
  """Returns `num_devices` local devices, and so many others behind them.

  With `num_devices` 0 all that the others leave.
  """
  found = jax.local_devices()
  if num_devices > len(found):
    raise errors.BadInput(
      f'--num_devices must be at most the {len(found)} devices that are here; '
      f'found {num_devices}; lower it.'
    )
  first = num_devices or len(found) - num_others
  if first < 1 or first + num_others > len(found):
    raise errors.BadInput(
      '--refresh_devices and those that train must together be at most the '
      f'{len(found)} devices that are here; found {num_others} and '
      f'{num_devices or "one at least"}; lower it.'
    )
  return tuple(found[:first]), tuple(found[first : first + num_others])


def of_all_processes(devices):
  """Returns as many devices of each process as `devices` are of this one."""
  if distributed.count() == 1:
    return devices
  number, found = len(devices), collections.defaultdict(list)
  for device in jax.devices():
    found[device.process_index].append(device)
  return tuple(d for _, here in sorted(found.items()) for d in here[:number])


def training_devices(config):
  """Returns the accelerators that train, and those that refresh beside them.

  Other jobs than training have none of the latter. The first ones are those of
  all processes.
  """
  others = config.refresh_devices if config.job == 'train' else 0
  first, others = local_parts(config.num_devices, others)
  return of_all_processes(first), others


def own(devices):
  """Returns those of `devices` that are this process's."""
  return tuple(d for d in devices if d.process_index == jax.process_index())


def host():
  """Returns the CPU as a device; None where `JAX_PLATFORMS` leaves it out."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:
    return None


def describe(devices):
  """Returns what the bits of a run hang on besides its flags: {name: text}."""
  versions = {name: metadata.version(name) for name in _PACKAGES}
  text = _CPU_FILE.read_text() if _CPU_FILE.exists() else ''
  cpu = re.search(r'model name\s*:\s*(.*)', text)
  return {
    'devices': f'{len(devices)} {devices[0].device_kind}',
    'processor': cpu[1] if cpu else platform.machine(),
    'processor cores': str(_num_cores()),
    'XLA_FLAGS': os.environ.get('XLA_FLAGS', ''),
    'OPENBLAS_CORETYPE': os.environ.get('OPENBLAS_CORETYPE', ''),
    'python': platform.python_version(),
    **versions,
  }


def replicated(devices):
  """Returns the sharding of an array that each device holds whole.

  As all that is not said to be global, it is of this process's devices.
  """
  return NamedSharding(_mesh(own(devices)), PartitionSpec())


def globally_replicated(devices):
  """Returns the sharding of an array that all devices hold whole."""
  return NamedSharding(_mesh(devices), PartitionSpec())


def replicate(tree, devices):
  """Returns the tree of arrays with each device holding all of it."""
  return jax.device_put(tree, replicated(devices))


def split(devices):
  """Returns the sharding of an array whose rows are dealt out in order."""
  return NamedSharding(_mesh(own(devices)), PartitionSpec(AXIS))


def shard(batch, devices):
  """Places this process's part of a batch, in the form that `pmap` takes.

  Args:
    batch: Tree of arrays (B, ...), row i being about query i of the part.
    devices: The devices, n of them this process's; n divides B.

  Returns:
    The same tree of arrays (n, B / n, ...), part i on device i.
  """
  here = split(devices)

  def place(array):
    parts = array.reshape(here.num_devices, -1, *array.shape[1:])
    return jax.device_put(parts, here)

  return jax.tree.map(place, batch)


def _num_cores():
  """Returns how many cores this process may use; XLA splits work by that."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def _mesh(devices):
  return Mesh(np.array(devices), (AXIS,))
