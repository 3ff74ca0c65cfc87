"""Reads Hugging Face folders (config.json and tensors) strictly.

It reads JSON, safetensors and the tensors of torch files. It runs no code from
a model and reads no file outside the folder, but follows symbolic links, which
the hub's cache consists of.
"""

from collections.abc import Callable
import os
import pathlib

import numpy as np
import safetensors
import transformers

from ance_jax import errors
from ance_jax.core import strict_io
from ance_jax.models import bert
from ance_jax.models import torch_files

# Hugging Face's model_type -> ours.
_BODIES = {
  'bert': 'bert',
  'dpr': 'bert',
  'roberta': 'roberta',
  'xlm-roberta': 'roberta',
  'distilbert': 'distilbert',
  'mpnet': 'mpnet',
}

# Field of `bert.BodyConfig` -> key of config.json; DistilBERT's differ.
_BERT_KEYS = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'hidden_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'intermediate_size': 'intermediate_size',
  'max_positions': 'max_position_embeddings',
  'num_types': 'type_vocab_size',
}

_DISTILBERT_KEYS = {
  'hidden_size': 'dim',
  'num_layers': 'n_layers',
  'num_heads': 'n_heads',
  'intermediate_size': 'hidden_dim',
}

# Files of weights in order of preference; each may be sharded with an index.
_WEIGHTS = ('model.safetensors', 'pytorch_model.bin')
# Limits on sizes in config.json, from which a table of tensors is built.
_MAX_LAYERS, _MAX_SIZE = 1000, 2**31

# Accepted dtypes of weights, as safetensors names them.
_FLOATS = ('F64', 'F32', 'F16', 'BF16')


def read_config(name: str) -> bert.BodyConfig:
  """Returns the sizes in a Hugging Face config.json.

  Args:
    name: Folder.

  Raises:
    BadInput: config.json is missing or invalid, or we lack its architecture.
  """
  if _file(name, 'adapter_config.json'):
    raise errors.BadInput(
      f'{name} is an adapter (LoRA and the like), which is nothing without its '
      'base model; merge the two with merge_and_unload() of peft, and name the '
      'folder that is saved then.'
    )
  path = _file(name, 'config.json')
  if path is None:
    raise errors.BadInput(
      'a model must be a folder with a config.json or a name on the hub; found '
      f'no config.json in {name}; check the path.'
    )
  given = strict_io.json_file(path)
  kind = _kind(given, name)
  keys = dict(_BERT_KEYS)
  if kind == 'distilbert':
    keys |= _DISTILBERT_KEYS
  if kind in ('distilbert', 'mpnet'):
    del keys['num_types']
  _check_sizes(given, keys, path)
  try:
    theirs = transformers.AutoConfig.from_pretrained(
      name, trust_remote_code=False
    )
  except Exception as error:  # transformers raises many types.
    raise strict_io.bad(
      path,
      'a config.json must be one that transformers takes',
      f'one that it does not ({" ".join(str(error).split())[:200]})',
      'save the model again',
    ) from error
  # Again, because transformers fills in defaults and resolves aliases.
  _check_sizes(theirs.to_dict(), keys, path)
  sizes = {ours: getattr(theirs, key) for ours, key in keys.items()}
  body = bert.BodyConfig(
    **{'num_types': 0, **sizes},
    model_type=kind,
    # DistilBERT's code hard-codes it.
    layer_norm_epsilon=1e-12 if kind == 'distilbert' else theirs.layer_norm_eps,
    activation=getattr(theirs, _activation_key(kind)),
  )
  _check_body(body, keys, path)
  return body


def write_config(
  folder: pathlib.Path, body: bert.BodyConfig, pad_token_id: int
) -> None:
  """Writes a config.json that transformers can read."""
  keys = dict(_BERT_KEYS)
  if body.model_type == 'distilbert':
    keys |= _DISTILBERT_KEYS
  sizes = {key: getattr(body, ours) for ours, key in keys.items()}
  if not body.num_types:
    del sizes['type_vocab_size']
  made = transformers.AutoConfig.for_model(
    body.model_type,
    **sizes,
    **{_activation_key(body.model_type): body.activation},
    layer_norm_eps=body.layer_norm_epsilon,
    pad_token_id=pad_token_id,
  )
  made.save_pretrained(folder)


def read_tensors(
  name: str, without: Callable[[str], bool]
) -> dict[str, np.ndarray]:
  """Returns the float32 tensors of a model.

  It reads torch files only if there are no safetensors.

  Args:
    name: Folder or file.
    without: Returns whether to skip the tensor of a name.

  Raises:
    BadInput: A file is missing, damaged or outside the folder, or a tensor is
      not of floats.
  """
  if os.path.isfile(name):
    return _read_file(pathlib.Path(name), without)
  files = _WEIGHTS[:1]
  for whole in _WEIGHTS:
    index = _file(name, f'{whole}.index.json')
    if index or _file(name, whole):
      files = _shards(index, whole) if index else [whole]
      break
  tensors = {}
  for file in files:
    path = _file(name, file)
    if path is None:
      raise errors.BadInput(
        'a checkpoint must have its weights in a whole model.safetensors; '
        f'found no {file[:80]} at {name}; convert it with transformers, or '
        'fetch it.'
      )
    for key, array in _read_file(path, without).items():
      if key in tensors:
        raise strict_io.bad(
          path, 'a tensor must be in one file', f'{key[:80]} in two',
          'save the model again'
        )  # fmt: skip
      tensors[key] = array
  return tensors


def _read_file(path, without):
  """Returns {name: float32 array} of a file; its suffix tells the format."""
  if path.suffix == '.safetensors':
    return _read_shard(path, without)
  return torch_files.read(strict_io.regular(path), without)


def _kind(given, name):
  """Returns our `model_type` for the contents of a config.json.

  Raises:
    BadInput: We lack the architecture.
  """
  kind = _BODIES.get(str(given.get('model_type')))
  activation = given.get(_activation_key(kind), 'gelu')
  padding = given.get('pad_token_id', 1)
  num_buckets = given.get('relative_attention_num_buckets', bert.NUM_BUCKETS)
  positions = given.get('position_embedding_type', 'absolute')
  for found, what in (
    ('auto_map' in given, 'code of its own (auto_map)'),
    (kind is None, f'model_type {given.get("model_type")}'),
    (given.get('is_decoder'), 'a decoder'),
    (positions != 'absolute', f'positions {positions}'),
    (
      activation not in list(bert.ACTIVATIONS),
      f'{_activation_key(kind)} {activation}',
    ),
    (
      # Their position embeddings start after this id.
      kind in ('roberta', 'mpnet') and padding != 1,
      f'{kind} with pad_token_id {padding} instead of 1',
    ),
    (
      # MPNet's code ignores the number in config.json.
      kind == 'mpnet' and num_buckets != bert.NUM_BUCKETS,
      f'{num_buckets} buckets of distances instead of {bert.NUM_BUCKETS}',
    ),
  ):
    if found:
      raise errors.BadInput(
        f'an encoder must be one of {", ".join(_BODIES)}, with absolute '
        f'positions and one of {", ".join(bert.ACTIVATIONS)}; found '
        f'{what[:120]} at {name}; use another.'
      )
  return kind


def _activation_key(kind):
  return 'activation' if kind == 'distilbert' else 'hidden_act'


def _check_sizes(given, keys, path):
  """Raises `BadInput` for sizes of a config.json that are out of range."""
  for ours, key in keys.items():
    size = given.get(key, 1)
    most = _MAX_LAYERS if ours == 'num_layers' else _MAX_SIZE
    if type(size) is not int or not 1 <= size <= most:
      raise strict_io.bad(
        path,
        f'{key} must be a whole number from 1 to {most:,}',
        strict_io.quoted(size),
        "give the checkpoint's own",
      )
  epsilon = given.get('layer_norm_eps', 1e-12)
  if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
    raise strict_io.bad(
      path,
      'layer_norm_eps must be a number above 0 and below 1',
      strict_io.quoted(epsilon),
      "give the checkpoint's own",
    )


def _check_body(body, keys, path):
  """Raises `BadInput` for inconsistent sizes."""
  if body.hidden_size % body.num_heads:
    raise strict_io.bad(
      path,
      f'{keys["num_heads"]} must divide {keys["hidden_size"]}',
      f'{body.num_heads} and {body.hidden_size}',
      "give the checkpoint's own",
    )
  if body.max_length < 3:
    raise strict_io.bad(
      path,
      'max_position_embeddings must leave room for 3 tokens',
      body.max_positions,
      "give the checkpoint's own",
    )


def _read_shard(path, without):
  """Returns {name: float32 array} of one safetensors file."""
  path, tensors = strict_io.regular(path), {}
  with open(path, 'rb') as file:
    if file.read(20).startswith(b'version https://git-'):
      raise strict_io.bad(
        path, 'a checkpoint must have its weights in a whole '
        'model.safetensors', 'a pointer of Git LFS', 'run git lfs pull'
      )  # fmt: skip
  try:
    with safetensors.safe_open(path, 'numpy') as opened:
      for key in opened.keys():
        if not without(key):
          tensors[key] = _float32(opened, key, path)
  except safetensors.SafetensorError as error:
    raise strict_io.bad(
      path, 'a checkpoint must have its weights in a whole model.safetensors',
      f'one that cannot be read ({str(error).splitlines()[0]})',
      'convert or fetch it'
    ) from error  # fmt: skip
  return tensors


def _float32(opened, key, path):
  """Returns one tensor of an open safetensors file."""
  dtype = opened.get_slice(key).get_dtype()
  if dtype not in _FLOATS:
    raise strict_io.bad(
      path, f'a tensor must be one of {", ".join(_FLOATS)}',
      f'{dtype} in {key[:80]}', 'use weights that are not quantized'
    )  # fmt: skip
  # Overflow gives infinity, which `bert_weights` rejects by the tensor's name.
  with np.errstate(over='ignore'):
    return np.asarray(opened.get_tensor(key), np.float32)


def _shards(index, whole):
  """Returns the names of the shards that an index lists.

  Args:
    index: Path of the index.
    whole: Name that an unsharded file would have.
  """
  ending = pathlib.PurePath(whole).suffix
  weight_map = strict_io.json_file(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise strict_io.bad(
      index, "an index must have a 'weight_map' of tensors to files",
      strict_io.quoted(weight_map), 'fetch it again'
    )  # fmt: skip
  for file in weight_map.values():
    strict_io.inside('', file, index)
    if not file.endswith(ending):
      raise strict_io.bad(
        index, f'a file of weights must have a name in {ending}',
        strict_io.quoted(file), 'convert it with transformers'
      )  # fmt: skip
  return sorted(set(weight_map.values()))


def _file(folder, file):
  """Returns the path of a file in a folder, or None if it does not exist.

  Symbolic links are followed, because the hub's cache consists of them.
  """
  path = pathlib.Path(folder) / file
  return strict_io.regular(path) if os.path.lexists(path) else None
