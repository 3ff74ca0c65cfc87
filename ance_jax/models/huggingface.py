"""Folders of Hugging Face: config.json and tensors, strict.

Safetensors and JSON are read, and of files of torch the tensors alone: no code
that a model brings, no file outside of its folder (links are followed, as the
hub's cache has them).
"""

import os
import pathlib

import numpy as np
import safetensors
import transformers

from ance_jax import errors
from ance_jax.core import strict_io
from ance_jax.models import bert
from ance_jax.models import torch_files

# model_type of Hugging Face -> of our body.
_BODIES = {
  'bert': 'bert',
  'dpr': 'bert',
  'roberta': 'roberta',
  'xlm-roberta': 'roberta',
  'distilbert': 'distilbert',
  'mpnet': 'mpnet',
}

# Size in `bert.BodyConfig` -> key of config.json, and what DistilBERT has.
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

# Of these the first that is there, or its index, has a folder's weights.
_WEIGHTS = ('model.safetensors', 'pytorch_model.bin')
# Of any such number in a config.json: a table of tensors is made from it.
_MAX_LAYERS, _MAX_SIZE = 1000, 2**31

# Safetensors' names of types that weights may be stored in.
_FLOATS = ('F64', 'F32', 'F16', 'BF16')


def read_config(name):
  """Returns the `bert.BodyConfig` of a Hugging Face config.json.

  Args:
    name: Folder.

  Raises:
    BadInput: There is none, or it is not of a body that we have.
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
  except Exception as error:  # Its checks of other fields raise any kind.
    raise strict_io.bad(
      path,
      'a config.json must be one that transformers takes',
      f'one that it does not ({" ".join(str(error).split())[:200]})',
      'save the model again',
    ) from error
  # Again: a size that is not given has a default, or came by a second name.
  _check_sizes(theirs.to_dict(), keys, path)
  sizes = {ours: getattr(theirs, key) for ours, key in keys.items()}
  body = bert.BodyConfig(
    **{'num_types': 0, **sizes},
    model_type=kind,
    # DistilBERT's code has the number, not its config.json.
    layer_norm_epsilon=1e-12 if kind == 'distilbert' else theirs.layer_norm_eps,
    activation=getattr(theirs, _activation_key(kind)),
  )
  _check_body(body, keys, path)
  return body


def write_config(folder, body, pad_token_id):
  """Writes a body's config.json, as transformers reads it.

  Args:
    folder: `pathlib.Path` of the folder.
    body: `bert.BodyConfig`.
    pad_token_id: int, the tokenizer's.
  """
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


def read_tensors(name, without):
  """Returns {name: float32 array} of a model's files.

  Those of torch are read only where there are no safetensors.

  Args:
    name: Folder, or one file.
    without: without(name of a tensor) -> whether it is not read.

  Raises:
    BadInput: A file is missing or damaged, or leads out of the folder, or a
      tensor is not of floats.
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
  """Returns {name: float32 array} of one file, by its name's ending."""
  if path.suffix == '.safetensors':
    return _read_shard(path, without)
  return torch_files.read(strict_io.regular(path), without)


def _kind(given, name):
  """Returns the `model_type` of our body for what a config.json gives.

  Raises:
    BadInput: It is of a body that we do not have.
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
      # Their positions are counted from behind it.
      kind in ('roberta', 'mpnet') and padding != 1,
      f'{kind} with pad_token_id {padding} instead of 1',
    ),
    (
      # Its code has this number, too, whatever config.json says.
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
  """Raises `BadInput` for numbers of a config.json that no model can have."""
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
  """Raises `BadInput` for sizes that do not go together."""
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
  # What is too large becomes infinite, and is refused with its name.
  with np.errstate(over='ignore'):
    return np.asarray(opened.get_tensor(key), np.float32)


def _shards(index, whole):
  """Returns the names of the files of an index.

  Args:
    index: Path of the file.
    whole: What the file would be called that is in parts.
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
  """Returns the path of a file of a folder, or None.

  Links are followed: the hub's own cache is made of them.
  """
  path = pathlib.Path(folder) / file
  return strict_io.regular(path) if os.path.lexists(path) else None
