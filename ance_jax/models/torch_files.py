"""Reads the tensors, and nothing else, of torch files."""

from collections.abc import Callable
import pathlib

import numpy as np

from ance_jax import errors
from ance_jax.core import strict_io

# Keys of the weights in files that hold more, DPR's and ANCE's first.
_STATES = ('model_dict', 'state_dict', 'model_state_dict')


def read(
  path: pathlib.Path, without: Callable[[str], bool]
) -> dict[str, np.ndarray]:
  """Returns the float32 tensors of a file, by weights-only loading.

  Args:
    path: File.
    without: Returns whether to skip the tensor of a name.

  Raises:
    BadInput: torch is not installed, or the file holds anything but tensors.
  """
  try:
    # Imported here because it takes seconds and is an optional dependency.
    import torch
  except ImportError as error:
    raise errors.refusal(
      f'{path} is a file of torch, but torch is not installed',
      'install torch, or convert the file to safetensors with transformers',
    ) from error
  try:
    found = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
  except Exception as error:  # torch raises many types.
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
  return strict_io.refusal(
    path,
    f'it is not a PyTorch file that holds only float tensors ({found})',
    'convert it with transformers where you trust it',
  )
