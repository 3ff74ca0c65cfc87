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

_MPNET_KEYS = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'hidden_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
  'intermediate_size': 'intermediate_size',
  'max_positions': 'max_position_embeddings',
}
_BERT_KEYS = {**_MPNET_KEYS, 'num_types': 'type_vocab_size'}
# Our model_type -> {field of `bert.BodyConfig`: key of config.json}.
_KEYS = {
  'bert': _BERT_KEYS,
  'roberta': _BERT_KEYS,
  'distilbert': {
    **_MPNET_KEYS,
    'hidden_size': 'dim',
    'num_layers': 'n_layers',
    'num_heads': 'n_heads',
    'intermediate_size': 'hidden_dim',
  },
  'mpnet': _MPNET_KEYS,
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
    raise errors.refusal(
      f'{name} is an adapter (LoRA and the like), which is nothing without its '
      'base model',
      'merge the two with merge_and_unload() of peft, and name the folder that '
      'is saved then',
    )
  path = _file(name, 'config.json')
  if path is None:
    raise errors.refusal(
      f'there is no config.json in {name}',
      'give the folder of a model, or its name on the hub',
    )
  given = strict_io.json_file(path)
  kind = _kind(given, name)
  keys = _KEYS[kind]
  _check_sizes(given, keys, path)
  try:
    theirs = transformers.AutoConfig.from_pretrained(
      name, trust_remote_code=False
    )
  except Exception as error:  # transformers raises many types.
    raise strict_io.refusal(
      path,
      f'transformers cannot read it ({" ".join(str(error).split())[:200]})',
      'save the model again',
    ) from error
  # Again, because transformers fills in defaults and resolves aliases.
  _check_sizes(theirs.to_dict(), keys, path)
  body = bert.BodyConfig(
    **{
      'num_types': 0,
      **{ours: getattr(theirs, key) for ours, key in keys.items()},
    },
    model_type=kind,
    # DistilBERT's code hard-codes it.
    layer_norm_epsilon=1e-12 if kind == 'distilbert' else theirs.layer_norm_eps,
    activation=getattr(theirs, _activation_key(kind)),
    attention_dropout=getattr(theirs, _dropout_key(kind)),
  )
  _check_body(body, keys, path)
  return body


def write_config(
  folder: pathlib.Path, body: bert.BodyConfig, pad_token_id: int
) -> None:
  """Writes a config.json that transformers can read."""
  kind = body.model_type
  transformers.AutoConfig.for_model(
    kind,
    **{key: getattr(body, ours) for ours, key in _KEYS[kind].items()},
    **{
      _activation_key(kind): body.activation,
      _dropout_key(kind): body.attention_dropout,
    },
    layer_norm_eps=body.layer_norm_epsilon,
    pad_token_id=pad_token_id,
  ).save_pretrained(folder)


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
  tensors = {}
  for file in _files(name):
    path = _file(name, file)
    if path is None:
      raise errors.refusal(
        f'there is no {file[:80]} in {name}',
        'convert the weights with transformers, or fetch them',
      )
    for key, array in _read_file(path, without).items():
      if key in tensors:
        raise strict_io.refusal(
          path,
          f'tensor {key[:80]} is in another file too',
          'save the model again',
        )
      tensors[key] = array
  return tensors


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
      raise errors.refusal(
        f'{name} has {what[:120]}',
        f'use an encoder of {", ".join(_BODIES)}, with absolute positions and '
        f'one of {", ".join(bert.ACTIVATIONS)}',
      )
  return kind


def _dropout_key(kind):
  """Returns the key of the rate of attention dropout."""
  if kind == 'distilbert':
    return 'attention_dropout'
  return 'attention_probs_dropout_prob'


def _activation_key(kind):
  return 'activation' if kind == 'distilbert' else 'hidden_act'


def _check_sizes(given, keys, path):
  """Raises `BadInput` for sizes of a config.json that are out of range."""
  for ours, key in keys.items():
    size = given.get(key, 1)
    most = _MAX_LAYERS if ours == 'num_layers' else _MAX_SIZE
    if type(size) is not int or not 1 <= size <= most:
      raise _bad_size(
        path,
        f'{key} is {strict_io.quoted(size)}, not a whole number from 1 to '
        f'{most:,}',
      )
  epsilon = given.get('layer_norm_eps', 1e-12)
  if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
    raise _bad_size(
      path,
      f'layer_norm_eps is {strict_io.quoted(epsilon)}, not a number above 0 '
      'and below 1',
    )


def _check_body(body, keys, path):
  """Raises `BadInput` for inconsistent sizes."""
  for wrong, fact in (
    (
      body.hidden_size % body.num_heads,
      f'{keys["hidden_size"]}={body.hidden_size} is not divisible by '
      f'{keys["num_heads"]}={body.num_heads}',
    ),
    (
      body.max_length < 3,
      f'max_position_embeddings={body.max_positions} leaves no room for 3 '
      'tokens',
    ),
  ):
    if wrong:
      raise _bad_size(path, fact)


def _bad_size(path, fact):
  return strict_io.refusal(path, fact, "give the checkpoint's own")


def _files(folder):
  """Returns the names of a folder's files of weights, which may be missing."""
  for whole in _WEIGHTS:
    index = _file(folder, f'{whole}.index.json')
    if index:
      return _shards(index, whole)
    if _file(folder, whole):
      return [whole]
  return _WEIGHTS[:1]


def _read_file(path, without):
  """Returns {name: float32 array} of a file; its suffix tells the format."""
  path = strict_io.regular(path)
  if path.suffix != '.safetensors':
    return torch_files.read(path, without)
  with open(path, 'rb') as file:
    if file.read(20).startswith(b'version https://git-'):
      raise strict_io.refusal(
        path,
        'it is a pointer of Git LFS, without the weights',
        'run git lfs pull',
      )
  try:
    with safetensors.safe_open(path, 'numpy') as opened:
      return {
        key: _float32(opened, key, path)
        for key in opened.keys()
        if not without(key)
      }
  except safetensors.SafetensorError as error:
    raise strict_io.refusal(
      path,
      f'safetensors cannot read it ({str(error).splitlines()[0]})',
      'convert or fetch it',
    ) from error


def _float32(opened, key, path):
  """Returns one tensor of an open safetensors file."""
  dtype = opened.get_slice(key).get_dtype()
  if dtype not in _FLOATS:
    raise strict_io.refusal(
      path,
      f'tensor {key[:80]} is of {dtype}, which is none of {", ".join(_FLOATS)}',
      'use weights that are not quantized',
    )
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
    raise strict_io.refusal(
      index,
      f'its weight_map, {strict_io.quoted(weight_map)}, names no files',
      'fetch it again',
    )
  for file in weight_map.values():
    strict_io.inside('', file, index)
    if not file.endswith(ending):
      raise strict_io.refusal(
        index,
        f'it names {strict_io.quoted(file)}, which does not end in {ending}',
        'convert it with transformers',
      )
  return sorted(set(weight_map.values()))


def _file(folder, file):
  """Returns the path of a file in a folder, or None if it does not exist.

  Symbolic links are followed, because the hub's cache consists of them.
  """
  path = pathlib.Path(folder) / file
  return strict_io.regular(path) if os.path.lexists(path) else None
