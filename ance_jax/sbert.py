"""Folders of sentence-transformers: what their modules say, read strictly.

A module or setting that we do not have is refused by name.
"""

import os
import pathlib
from typing import NamedTuple

import numpy as np

from ance_jax import config as config_lib
from ance_jax import encoders
from ance_jax import hub
from ance_jax import logs
from ance_jax import reading

# What a route of a Router is called there, and our tower.
ROUTES = {'query': encoders.QUERY, 'document': encoders.PASSAGE}
# What comes after the Transformer, each of them once or, but Pooling, never.
_CHAIN = ('Pooling', 'Dense', 'LayerNorm', 'Normalize')
_PASSAGE_PROMPTS = ('document', 'passage', 'corpus')
IDENTITY = 'torch.nn.modules.linear.Identity'
SIGMOID = 'torch.nn.modules.activation.Sigmoid'
SETTINGS_FILE = 'config_sentence_transformers.json'


class SentenceTransformer(NamedTuple):
  """What a sentence-transformers folder says about a tower.

  Attributes:
    body_folder: Folder of the transformer.
    length: Tokens of a text at most, or None.
    pooling: 'cls' or 'mean'.
    similarity: 'dot' or 'cosine'.
    lower_case: Whether texts are lower-cased, whatever the tokenizer does.
    head: Parameters 'head' and 'head_norm' of our tower, as far as it has them.
    prompts: What is put before a text, by `encoders.QUERY` and `PASSAGE`.
  """

  body_folder: str
  length: int | None
  pooling: str
  similarity: str
  lower_case: bool
  head: dict
  prompts: dict


class CrossEncoder(NamedTuple):
  """What the folder of a cross-encoder says.

  Attributes:
    length: Tokens of a pair at most, or None.
    sigmoid: Whether the score is the sigmoid of the output.
    lower_case: As in `SentenceTransformer`.
  """

  length: int | None
  sigmoid: bool
  lower_case: bool


def is_folder(folder):
  """Returns whether a folder is that of a sentence-transformers model."""
  return os.path.lexists(pathlib.Path(folder) / 'modules.json')


def read(folder):
  """Returns the `SentenceTransformer` of each tower of a folder, by its name.

  Raises:
    BadInput: It does something that we do not.
  """
  folder = pathlib.Path(folder)
  path = folder / 'modules.json'
  modules = []
  for module in reading.json_file(path, list):
    kind = _module_kind(module, path)
    modules.append((kind, reading.inside(folder, module.get('path', ''), path)))
  if modules and modules[0][0] == 'Router':
    routes = _routes(modules[0][1])
    return {
      name: _tower(folder, [*route, *modules[1:]])
      for name, route in routes.items()
    }
  return {encoders.TIED: _tower(folder, modules)}


def read_cross_encoder(folder):
  """Returns the `CrossEncoder` of a folder, whichever version saved it.

  Raises:
    BadInput: It does something that we do not.
  """
  if not os.path.isdir(folder):
    raise config_lib.BadInput(
      '--judge must be the folder of a cross-encoder; found a file at '
      f'{folder}; name its folder.'
    )
  folder = pathlib.Path(folder)
  path = folder / 'modules.json'
  modules = reading.json_file(path, list) if os.path.lexists(path) else []
  settings = _optional_json(folder / SETTINGS_FILE)
  older = _optional_json(folder / 'config.json')
  of_4 = older.get('sentence_transformers')
  activation = (
    settings.get('activation_fn')
    or (of_4.get('activation_fn') if isinstance(of_4, dict) else None)
    or older.get('sbert_ce_default_activation_function')
    or SIGMOID
  )
  sizes = _optional_json(folder / 'sentence_bert_config.json')
  lower_case = sizes.get('do_lower_case', False)
  prompt = settings.get('default_prompt_name')
  for found, what in (
    (
      [_module_kind(module, path) for module in modules]
      not in ([], ['Transformer'])
      or any(module.get('path') for module in modules),
      f'{len(modules)} modules',
    ),
    (activation not in (SIGMOID, IDENTITY), f'activation {activation}'),
    (prompt, f'a prompt for all texts, {prompt}'),
    (type(lower_case) is not bool, f'do_lower_case {lower_case}'),
  ):
    if found:
      raise config_lib.BadInput(
        'a cross-encoder must be a Transformer alone, with Sigmoid or Identity '
        f'and no prompt; found {what[:120]} in {folder}; use another model.'
      )
  return CrossEncoder(_length(sizes, folder), activation == SIGMOID, lower_case)


def _tower(folder, modules):
  """Returns the `SentenceTransformer` of a list of (kind, path)."""
  kinds = [kind for kind, _ in modules]
  paths = dict(modules)
  expected = ['Transformer', *(kind for kind in _CHAIN if kind in kinds)]
  settings = _optional_json(folder / SETTINGS_FILE)
  named = settings.get('similarity_fn_name') or 'cosine'
  for found, what in (
    (kinds != expected, f'modules {", ".join(kinds)}'),
    ('Pooling' not in kinds, 'no Pooling'),
    ('LayerNorm' in kinds and 'Dense' not in kinds, 'LayerNorm without Dense'),
    (
      settings.get('default_prompt_name'),
      f'a prompt for all texts, {settings.get("default_prompt_name")}',
    ),
    (named not in ('cosine', 'dot'), f'similarity {named}'),
  ):
    if found:
      raise _not_ours(what, folder)
  body_folder = paths['Transformer']
  sizes = _optional_json(body_folder / 'sentence_bert_config.json')
  lower_case = sizes.get('do_lower_case', False)
  if type(lower_case) is not bool:
    raise _not_ours(f'do_lower_case {lower_case}', folder)
  prompts = _prompts(settings, folder)
  pooling = paths['Pooling'] / 'config.json'
  if any(prompts.values()) and not reading.json_file(pooling).get(
    'include_prompt', True
  ):
    raise _not_ours('a prompt that is not pooled', folder)
  return SentenceTransformer(
    str(body_folder),
    _length(sizes, body_folder),
    _pooling(pooling),
    'cosine' if 'Normalize' in kinds or named == 'cosine' else 'dot',
    lower_case,
    _head(paths, folder),
    prompts,
  )


def _routes(folder):
  """Returns the (kind, path) of the modules of each route, by our tower."""
  path = folder / 'router_config.json'
  given = reading.json_file(path)
  types, structure = given.get('types'), given.get('structure')
  if not isinstance(types, dict) or not isinstance(structure, dict):
    raise _not_ours('a Router without types and structure', folder)
  if set(structure) != set(ROUTES):
    raise _not_ours(f'a Router of {", ".join(map(str, structure))}', folder)
  routes = {}
  for route, name in ROUTES.items():
    routes[name] = []
    for part in structure[route] if isinstance(structure[route], list) else [0]:
      kind = _module_kind({'type': types.get(str(part))}, path)
      routes[name].append((kind, reading.inside(folder, part, path)))
  return routes


def _head(paths, folder):
  """Returns the parameters of Dense and LayerNorm, as far as they are there."""
  if 'Dense' not in paths:
    return {}
  settings = reading.json_file(paths['Dense'] / 'config.json')
  activation = settings.get('activation_function', 'Tanh')
  if activation != IDENTITY:
    raise _not_ours(f'Dense with {activation}', folder)
  shape = settings.get('out_features'), settings.get('in_features')
  width = hub.read_config(str(paths['Transformer'])).hidden_size
  if shape[1] != width:
    raise reading.bad(
      paths['Dense'] / 'config.json',
      f'a Dense must take the {width} numbers of its Transformer',
      reading.quoted(shape[1]),
      'save the model again',
    )
  names = {'linear.weight': shape}
  if settings.get('bias', True):
    names['linear.bias'] = shape[:1]
  found = _tensors(paths['Dense'], names)
  bias = found.get('linear.bias', np.zeros(len(found['linear.weight'])))
  head = {'kernel': found['linear.weight'].T, 'bias': np.float32(bias)}
  if 'LayerNorm' not in paths:
    return {'head': head}
  names = {'norm.weight': shape[:1], 'norm.bias': shape[:1]}
  found = _tensors(paths['LayerNorm'], names)
  norm = {'scale': found['norm.weight'], 'bias': found['norm.bias']}
  return {'head': head, 'head_norm': norm}


def _tensors(folder, shapes):
  """Returns {name: float32 array} of a module that has just these tensors."""
  found = hub.read_tensors(str(folder), lambda name: False)
  if {name: array.shape for name, array in found.items()} != shapes:
    raise reading.bad(
      folder / 'model.safetensors',
      f'a module must have the tensors {", ".join(shapes)} in the shapes of '
      'its config.json',
      ', '.join(f'{n[:40]} {a.shape}' for n, a in list(found.items())[:4])
      or 'none',
      'save the model again',
    )
  return found


def _optional_json(path):
  """Returns the dict of a JSON file, empty if there is no such file."""
  return reading.json_file(path) if os.path.lexists(path) else {}


def _not_ours(what, folder):
  return config_lib.BadInput(
    'a sentence-transformers folder must be Transformer, Pooling and perhaps '
    'Dense (without an activation), LayerNorm and Normalize, or a Router of a '
    f'query and a document, for cosine or dot; found {what[:120]} in {folder}; '
    'use another model.'
  )


def _module_kind(module, path):
  """Returns the class of an entry of modules.json, without its package."""
  kind = module.get('type') if isinstance(module, dict) else None
  if not isinstance(kind, str):
    raise reading.bad(
      path,
      "a module must be an object with a string 'type'",
      reading.quoted(module),
      'save the model again',
    )
  if not kind.startswith('sentence_transformers.'):
    raise reading.bad(
      path,
      'a module must be one of sentence_transformers',
      reading.quoted(kind),
      'use a model without code of its own',
    )
  return kind.rpartition('.')[2]


def _prompts(settings, folder):
  """Returns what is put before queries and passages, by side."""
  prompts = settings.get('prompts') or {}
  if not isinstance(prompts, dict) or not all(
    isinstance(prompt, str) for prompt in prompts.values()
  ):
    raise _not_ours(f'prompts {prompts}', folder)
  given = {name: prompt for name, prompt in prompts.items() if prompt}
  passage = [given.pop(n) for n in _PASSAGE_PROMPTS if n in given]
  found = {
    encoders.QUERY: given.pop('query', ''),
    encoders.PASSAGE: passage[0] if passage else '',
  }
  if given:
    names = ', '.join(given)
    logs.say(f'{folder}: prompts for other tasks are left out: {names}')
  return found


def _length(sizes, folder):
  """Returns the tokens at most of a sentence-transformers folder, or None."""
  length = sizes.get('max_seq_length')
  if length is not None and (type(length) is not int or length < 3):
    raise reading.bad(
      folder / 'sentence_bert_config.json',
      'max_seq_length must be a whole number, at least 3',
      reading.quoted(length),
      'mend it',
    )
  return length


def _pooling(path):
  """Returns 'cls' or 'mean' of a Pooling module's config.json, old or new."""
  settings = reading.json_file(path)
  modes = settings.get('pooling_mode')
  if modes is None:
    modes = [
      name.removeprefix('pooling_mode_')
      .removesuffix('_token')
      .removesuffix('_tokens')
      for name, chosen in settings.items()
      if name.startswith('pooling_mode_') and chosen
    ]
  modes = [modes] if isinstance(modes, str) else modes
  if modes not in (['cls'], ['mean']):
    raise config_lib.BadInput(
      f'pooling must be cls or mean; found {modes} in {path}; use another '
      'model.'
    )
  return modes[0]
