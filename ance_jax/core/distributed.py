"""The processes of a run: one a host, with the same program and the same flags.

All of them do the same in the same order: where one decides by itself, when to
stop, which refresh to take, it is process 0, and the others are told. Process 0
alone writes what a run has once. With one process nothing of this takes time.
"""

import json

import jax
from jax.experimental import multihost_utils
import numpy as np

# Seconds without a sign of life after which a process counts as dead.
_HEARTBEAT_SECS = 30
# Bytes that a message is filled up to a multiple of: few shapes are compiled.
_MESSAGE = 4096


class _State:
  """What `start` found; one process without it."""

  index, count = 0, 1


def start(config):
  """Joins the processes of `--num_processes`, before jax touches a device.

  Args:
    config: `Config`.

  Raises:
    RuntimeError: Not all of them came within five minutes.
  """
  if config.num_processes == 1 or _State.count > 1:
    return
  known = config.num_processes > 1
  jax.distributed.initialize(
    config.coordinator or None,
    config.num_processes if known else None,
    config.process_id if known else None,
    heartbeat_timeout_seconds=_HEARTBEAT_SECS,
  )
  _State.index, _State.count = jax.process_index(), jax.process_count()


def index():
  """Returns the number of this process."""
  return _State.index


def count():
  """Returns the number of processes."""
  return _State.count


def is_first():
  """Returns whether this is process 0, which decides and writes."""
  return _State.index == 0


def told(decide):
  """Returns what `decide()` returns in process 0, where alone it is called.

  Args:
    decide: () -> what JSON can hold.
  """
  if count() == 1:
    return decide()
  text = json.dumps(decide()).encode() if is_first() else b''
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  message = np.zeros(-(-size // _MESSAGE) * _MESSAGE, np.uint8)
  message[: len(text)] = np.frombuffer(text, np.uint8)
  message = multihost_utils.broadcast_one_to_all(message)
  return json.loads(np.asarray(message)[:size].tobytes())


def gather(array):
  """Returns the (P, ...) arrays of all P processes, bit by bit.

  Args:
    array: numpy array, of the same shape and dtype in each.
  """
  if count() == 1:
    return array[None]
  array = np.ascontiguousarray(array)
  # jax would make 32 bits of 64.
  words = np.frombuffer(array.tobytes(), np.uint8)
  words = np.asarray(multihost_utils.process_allgather(words))
  return words.reshape(-1).view(array.dtype).reshape(count(), *array.shape)


def wait(what):
  """Returns once all processes are here; `what` names the place."""
  if count() > 1:
    multihost_utils.sync_global_devices(what)


def globally(tree, sharding):
  """Returns arrays that each process holds whole as arrays of all of them.

  Args:
    tree: Tree of arrays, the same in each process.
    sharding: That of an array which all devices of all processes hold whole.
  """
  if count() == 1:
    return tree
  return multihost_utils.host_local_array_to_global_array(
    tree, sharding.mesh, sharding.spec
  )


def locally(tree, sharding):
  """Returns arrays of all processes as those that each holds whole.

  Args:
    tree: Tree of arrays.
    sharding: Theirs, as for `globally`.
  """
  if count() == 1:
    return tree
  return multihost_utils.global_array_to_host_local_array(
    tree, sharding.mesh, sharding.spec
  )
