"""Weights in torch's own files, of which nothing but tensors is read."""

import numpy as np

from ance_jax import errors
from ance_jax.core import strict_io

# What the weights are called in files that hold more: DPR's and ANCE's, others.
_STATES = ('model_dict', 'state_dict', 'model_state_dict')


def read(path, without):
  """Returns {name: float32 array} of a file, by torch's weights-only loading.

  Args:
    path: `pathlib.Path`.
    without: without(name of a tensor) -> whether it is left out.

  Raises:
    BadInput: torch is not installed, or the file holds other things.
  """
  try:
    # Here, and not above: it takes seconds, and is no part of the installation.
    import torch
  except ImportError as error:
    raise errors.BadInput(
      'weights must be safetensors where torch is not installed; found a file '
      f'of torch, {path}; install torch, or convert it with transformers.'
    ) from error
  try:
    found = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
  except Exception as error:  # Of its unpickler, its zip reader, the file.
    raise _not_weights(path, ' '.join(str(error).split())[:100]) from error
  if isinstance(found, dict):
    found = next((found[key] for key in _STATES if key in found), found)
  tensors = {}
  for name, tensor in found.items() if isinstance(found, dict) else [('', 0)]:
    if not isinstance(name, str) or not torch.is_tensor(tensor):
      raise _not_weights(path, f'{type(tensor).__name__} {name!r}'[:100])
    if not without(name):
      if not tensor.is_floating_point():
        raise _not_weights(path, f'{tensor.dtype} in {name[:80]}')
      tensors[name] = np.array(tensor.to(torch.float32).numpy())
  return tensors


def _not_weights(path, found):
  return strict_io.bad(
    path,
    'a file of torch must hold tensors by name, and nothing that has to be run '
    'to be read',
    found,
    'convert it with transformers where you trust it',
  )
