"""The processes of a run, one per host, with the same program and flags.

All processes do the same work in the same order. Process 0 makes decisions that
could differ between processes, such as when to stop or which refresh to pick
up, and broadcasts them. It alone writes the files that a run has only once.
With one process, every function here is free. jax is imported only where it is
used, so that a reader of metrics does not wait for it.
"""

from collections.abc import Callable
import json
from typing import Any

import numpy as np

from ance_jax import config as config_lib

# Seconds without a heartbeat after which a process counts as dead.
_HEARTBEAT_SECS = 30
# Messages are padded to a multiple of this many bytes, so that few shapes are
# compiled.
_MESSAGE = 4096


class _State:
  """Set by `start`; the defaults are for a single process."""

  index, count = 0, 1


def start(config: config_lib.Config) -> None:
  """Joins the processes of `--num_processes`, before jax touches a device.

  Raises:
    RuntimeError: Not all processes joined within five minutes.
  """
  if config.num_processes == 1 or _State.count > 1:
    return
  import jax

  known = config.num_processes > 1
  jax.distributed.initialize(
    config.coordinator or None,
    config.num_processes if known else None,
    config.process_id if known else None,
    heartbeat_timeout_seconds=_HEARTBEAT_SECS,
  )
  _State.index, _State.count = jax.process_index(), jax.process_count()


def index() -> int:
  """Returns the index of this process."""
  return _State.index


def count() -> int:
  """Returns the number of processes."""
  return _State.count


def is_first() -> bool:
  """Returns whether this is process 0, which decides and writes."""
  return _State.index == 0


def broadcast(decide: Callable[[], Any]) -> Any:
  """Calls `decide` in process 0 only, and returns its result in every process.

  Args:
    decide: Returns a value that JSON can represent.
  """
  if count() == 1:
    return decide()
  text = json.dumps(decide()).encode() if is_first() else b''
  size = int(_utils().broadcast_one_to_all(np.int32(len(text))))
  message = np.zeros(-(-size // _MESSAGE) * _MESSAGE, np.uint8)
  message[: len(text)] = np.frombuffer(text, np.uint8)
  message = _utils().broadcast_one_to_all(message)
  return json.loads(np.asarray(message)[:size].tobytes())


def all_gather(array: np.ndarray) -> np.ndarray:
  """Returns the arrays of all P processes, (P, ...), bit for bit.

  Args:
    array: Of the same shape and dtype in each process.
  """
  if count() == 1:
    return array[None]
  array = np.ascontiguousarray(array)
  # As bytes, because jax would truncate 64 bits to 32.
  words = np.asarray(
    _utils().process_allgather(np.frombuffer(array.tobytes(), np.uint8))
  )
  return words.reshape(-1).view(array.dtype).reshape(count(), *array.shape)


def barrier(what: str) -> None:
  """Waits for all processes at the barrier `what`."""
  if count() > 1:
    _utils().sync_global_devices(what)


def to_global(tree: Any, sharding: Any) -> Any:
  """Returns arrays that each process holds whole as global arrays.

  Args:
    tree: Tree of arrays, the same in each process.
    sharding: A global `NamedSharding` that replicates over all devices.
  """
  if count() == 1:
    return tree
  return _utils().host_local_array_to_global_array(
    tree, sharding.mesh, sharding.spec
  )


def to_local(tree: Any, sharding: Any) -> Any:
  """Returns global arrays as arrays local to this process.

  Args:
    tree: Tree of arrays.
    sharding: `NamedSharding` of the arrays, as for `to_global`.
  """
  if count() == 1:
    return tree
  return _utils().global_array_to_host_local_array(
    tree, sharding.mesh, sharding.spec
  )


def _utils():
  from jax.experimental import multihost_utils

  return multihost_utils
