"""Reads and writes the sentence-transformers modules after the Transformer.

These are Pooling, Dense, LayerNorm and Normalize. Unsupported modules and
settings are rejected by name.
"""

from collections.abc import Sequence
import os
import pathlib

import numpy as np

from ance_jax import errors
from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.models import bert_weights
from ance_jax.models import bi_encoder
from ance_jax.models import choices
from ance_jax.models import huggingface
from ance_jax.models import pooling

# Pooling's config.json before release 6 -> mode. text-embeddings-inference
# refuses a folder without the first four (router/src/lib.rs, PoolConfig); vLLM
# takes the one that is true (vllm/transformers_utils/config.py,
# get_pooling_config).
_OLD_MODES = {
  'pooling_mode_cls_token': 'cls',
  'pooling_mode_max_tokens': 'max',
  'pooling_mode_mean_tokens': 'mean',
  'pooling_mode_mean_sqrt_len_tokens': 'mean_sqrt_len_tokens',
  'pooling_mode_weightedmean_tokens': 'weightedmean',
  'pooling_mode_lasttoken': 'lasttoken',
}
# Prefixes of the class names of activations.
_TORCH = 'torch.nn.'
_ACTIVATION = 'torch.nn.modules.activation.'
# The only supported input and output of a module.
_EMBEDDING = 'sentence_embedding'


def not_ours(what: str, folder: pathlib.Path) -> errors.BadInput:
  """Returns the error for a folder with an unsupported feature, `what`."""
  return errors.refusal(
    f'{folder} has {str(what)[:120]}',
    'use a sentence-transformers model of Transformer, Pooling and any of '
    'Dense, LayerNorm and Normalize, or a Router of a query and a document, '
    'for cosine or dot',
  )


def read_pooling(folder: pathlib.Path) -> tuple[str, bool]:
  """Returns (`RetrieverConfig.pooling`, `RetrieverConfig.include_prompt`)."""
  path = folder / 'config.json'
  settings = strict_io.json_file(path)
  modes = settings.get('pooling_mode')
  if modes is None:
    modes = [mode for key, mode in _OLD_MODES.items() if settings.get(key)]
  modes = [modes] if isinstance(modes, str) else modes
  if (
    not isinstance(modes, list)
    or not modes
    or not all(mode in choices.POOLINGS for mode in modes)
  ):
    raise strict_io.refusal(
      path,
      f'the pooling is {modes}',
      f'use a model with one of {", ".join(choices.POOLINGS)}',
    )
  include_prompt = settings.get('include_prompt', True)
  if type(include_prompt) is not bool:
    raise not_ours(f'include_prompt {include_prompt}', folder)
  return '+'.join(modes), include_prompt


def read_layers(
  modules: Sequence[tuple[str, pathlib.Path]], width: int
) -> tuple[tuple[pooling.Layer, ...], dict[str, dict[str, np.ndarray]]]:
  """Returns the layers after the pooling, and their parameters by layer name.

  Args:
    modules: (class name, folder) of each module after Pooling, in order.
    width: Output width of Pooling.

  Raises:
    BadInput: A module is unsupported or damaged.
  """
  layers, arrays = [], []
  for kind, folder in modules:
    if kind == 'Dense':
      layer, found = _dense(folder, width)
      width = layer.size
    elif kind == 'LayerNorm':
      shapes = {'norm.weight': (width,), 'norm.bias': (width,)}
      layer, found = pooling.Layer(pooling.NORM), _tensors(folder, shapes)
      found = {'': {'scale': found['norm.weight'], 'bias': found['norm.bias']}}
    elif kind == 'Normalize':
      _check_names(optional_json(folder / 'config.json'), kind, folder)
      layer, found = pooling.Layer(pooling.UNIT), {}
    elif kind == 'Dropout':
      logs.log(f"{folder}: Dropout is left out; --dropout_rate is the body's")
      continue
    else:
      raise not_ours(f'a {kind} after Pooling', folder)
    layers.append(layer)
    arrays.append(found)
  return tuple(layers), {
    name + part: leaves
    for name, found in zip(pooling.names(layers), arrays, strict=True)
    for part, leaves in found.items()
  }


def _dense(folder, width):
  """Returns the layer of a Dense, and {suffix of the name: parameters}."""
  settings = strict_io.json_file(folder / 'config.json')
  _check_names(settings, 'Dense', folder)
  size, takes = settings.get('out_features'), settings.get('in_features')
  if takes != width:
    raise strict_io.refusal(
      folder / 'config.json',
      f'the Dense takes {strict_io.quoted(takes)} numbers, but {width} come '
      'before it',
      'save the model again',
    )
  residual = bool(settings.get('use_residual', False))
  has_bias = bool(settings.get('bias', True))
  names = {'linear.weight': (size, width)}
  if has_bias:
    names['linear.bias'] = (size,)
  if residual and size != width:
    names['residual.weight'] = (size, width)
  found = _tensors(folder, names)
  parts = {'': {'kernel': found['linear.weight'].T}}
  if has_bias:
    parts['']['bias'] = found['linear.bias']
  if 'residual.weight' in found:
    parts['_residual'] = {'kernel': found['residual.weight'].T}
  layer = pooling.Layer(
    pooling.DENSE, size, has_bias, _activation(settings, folder), residual
  )
  return layer, parts


def _activation(settings, folder):
  """Returns the key of `pooling.ACTIVATIONS` for a Dense."""
  given = settings.get('activation_function', f'{_ACTIVATION}Tanh')
  name = str(given).rpartition('.')[2]
  if not str(given).startswith(_TORCH) or name not in pooling.ACTIVATIONS:
    raise not_ours(f'Dense with {given}', folder)
  return name


def _check_names(settings, kind, folder):
  """Raises `BadInput` if a module does not map embeddings to embeddings."""
  for key in ('module_input_name', 'module_output_name'):
    if (settings.get(key) or _EMBEDDING) != _EMBEDDING:
      raise not_ours(f'{kind} with {key} {settings[key]}', folder)


def optional_json(path: pathlib.Path, kind: type = dict) -> dict | list:
  """Returns the content of a JSON file, empty if there is no such file.

  Raises:
    BadInput: It is not JSON of this kind.
  """
  return strict_io.json_file(path, kind) if os.path.lexists(path) else kind()


def _tensors(folder, shapes):
  """Returns {name: float32 array} of a module with exactly these tensors."""
  found = huggingface.read_tensors(str(folder), lambda name: False)
  path = folder / 'model.safetensors'
  if {name: array.shape for name, array in found.items()} != shapes:
    given = [f'{n[:40]} {a.shape}' for n, a in list(found.items())[:4]]
    raise strict_io.refusal(
      path,
      f'the module has {", ".join(given) or "no tensors"}, but its config.json '
      f'implies {", ".join(f"{n} {shape}" for n, shape in shapes.items())}',
      'save the model again',
    )
  for name, array in found.items():
    bert_weights.check_finite(name, array, path)
  return found


def written(
  retriever: bi_encoder.RetrieverConfig, params: dict
) -> list[tuple[str, dict, dict[str, np.ndarray]]]:
  """Returns the modules after the Transformer: (class name, settings, tensors).

  Args:
    retriever: Settings of the retriever.
    params: Parameters of one tower.
  """
  width = retriever.body.hidden_size
  settings = {
    'word_embedding_dimension': width,
    **{key: mode in retriever.modes for key, mode in _OLD_MODES.items()},
  }
  if not retriever.include_prompt:
    settings['include_prompt'] = False
  in_order = [mode for key, mode in _OLD_MODES.items() if settings[key]]
  if list(retriever.modes) != in_order:
    # Release 5 cannot express other orders.
    settings['pooling_mode'] = list(retriever.modes)
  parts, width = [('Pooling', settings, {})], width * len(retriever.modes)
  names = pooling.names(retriever.chain)
  for layer, name in zip(retriever.chain, names, strict=True):
    if layer.kind == pooling.DENSE:
      parts.append(_written_dense(layer, name, params, width))
      width = layer.size
    elif layer.kind == pooling.NORM:
      norm = params[name]
      tensors = {'norm.weight': norm['scale'], 'norm.bias': norm['bias']}
      parts.append(('LayerNorm', {'dimension': width}, tensors))
    else:
      parts.append(('Normalize', {}, {}))
  if retriever.similarity == 'cosine':
    parts.append(('Normalize', {}, {}))
  return parts


def _written_dense(layer, name, params, width):
  """Returns (kind, settings, tensors) of a projection."""
  group = 'linear' if layer.activation == pooling.IDENTITY else 'activation'
  settings = {
    'in_features': width,
    'out_features': layer.size,
    'bias': layer.bias,
    'activation_function': f'torch.nn.modules.{group}.{layer.activation}',
  }
  tensors = {'linear.weight': params[name]['kernel'].T}
  if layer.bias:
    tensors['linear.bias'] = params[name]['bias']
  if layer.residual:
    settings['use_residual'] = True
    if width != layer.size:
      tensors['residual.weight'] = params[f'{name}_residual']['kernel'].T
  return 'Dense', settings, tensors
