"""Reads the settings of sentence-transformers folders, strictly.

Unsupported modules and settings are rejected by name.
"""

import dataclasses
import os
import pathlib
from typing import NamedTuple

from ance_jax import errors
from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.models import bi_encoder
from ance_jax.models import choices
from ance_jax.models import huggingface
from ance_jax.models import pooling
from ance_jax.models import sbert_modules

# Route of a Router -> our tower.
ROUTES = {'query': bi_encoder.QUERY, 'document': bi_encoder.PASSAGE}
_PASSAGE_PROMPTS = ('document', 'passage', 'corpus')
IDENTITY = 'torch.nn.modules.linear.Identity'
SIGMOID = 'torch.nn.modules.activation.Sigmoid'
SETTINGS_FILE = 'config_sentence_transformers.json'
# Files with lengths and similar settings, in order of preference.
_SIZES_FILES = tuple(
  f'sentence_{kind}_config.json'
  for kind in (
    'bert', 'roberta', 'distilbert', 'camembert', 'albert', 'xlm-roberta',
    'xlnet'
  )
)  # fmt: skip
# Keywords of their classes that affect results only by rounding.
_HARMLESS = {
  'trust_remote_code', 'cache_dir', 'use_fast', 'torch_dtype', 'dtype',
  'attn_implementation', 'add_pooling_layer', 'device_map', 'revision',
}  # fmt: skip


class SentenceTransformer(NamedTuple):
  """One tower in a sentence-transformers folder.

  Attributes:
    body_folder: Folder of the transformer.
    lower_case: Whether to lower-case texts before the tokenizer.
    settings: Settings by name of the `Config` field or retriever setting; a
      length that the folder does not say is None.
    head: Parameters of the layers after the pooling.
  """

  body_folder: str
  lower_case: bool
  settings: dict
  head: dict


class CrossEncoder(NamedTuple):
  """Settings in the folder of a cross-encoder.

  Attributes:
    length: Maximum number of tokens of a pair, or None.
    sigmoid: Whether the score is the sigmoid of the output.
    lower_case: As in `SentenceTransformer`.
  """

  length: int | None
  sigmoid: bool
  lower_case: bool


def is_folder(folder: str | pathlib.Path) -> bool:
  """Returns whether a folder holds a sentence-transformers model."""
  return os.path.lexists(pathlib.Path(folder) / 'modules.json')


def read(folder: str | pathlib.Path) -> dict[str, SentenceTransformer]:
  """Returns the settings of each tower of a folder, by tower name.

  Raises:
    BadInput: The model is damaged or uses an unsupported feature.
  """
  folder = pathlib.Path(folder)
  path = folder / 'modules.json'
  modules = [
    (_module_kind(m, path), strict_io.inside(folder, m.get('path', ''), path))
    for m in strict_io.json_file(path, list)
  ]
  if modules and modules[0][0] == 'Router':
    return {
      name: _tower(folder, [*route, *modules[1:]])
      for name, route in _routes(modules[0][1]).items()
    }
  return {bi_encoder.TIED: _tower(folder, modules)}


def read_cross_encoder(folder: str | pathlib.Path) -> CrossEncoder:
  """Returns the settings of a cross-encoder, in the format of any release.

  Raises:
    BadInput: The model is damaged or uses an unsupported feature.
  """
  if not os.path.isdir(folder):
    raise errors.refusal(
      f'--cross_encoder={folder} is a file', 'name its folder'
    )
  folder = pathlib.Path(folder)
  path = folder / 'modules.json'
  modules = sbert_modules.optional_json(path, list)
  settings = sbert_modules.optional_json(folder / SETTINGS_FILE)
  older = sbert_modules.optional_json(folder / 'config.json')
  of_4 = older.get('sentence_transformers')
  activation = (
    settings.get('activation_fn')
    or (of_4.get('activation_fn') if isinstance(of_4, dict) else None)
    or older.get('sbert_ce_default_activation_function')
    or SIGMOID
  )
  sizes = _sizes(folder)
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
      raise errors.refusal(
        f'{folder} has {what[:120]}',
        'use a cross-encoder that is a Transformer alone, with Sigmoid or '
        'Identity and no prompt',
      )
  return CrossEncoder(
    _number(sizes, 'max_seq_length', 3, folder / _SIZES_FILES[0]),
    activation == SIGMOID,
    lower_case,
  )


def _tower(folder, modules):
  """Returns the `SentenceTransformer` of a list of (class name, path)."""
  kinds = [kind for kind, _ in modules]
  if kinds[:2] != ['Transformer', 'Pooling']:
    found = f'modules {", ".join(kinds)}' if kinds else 'no modules'
    raise sbert_modules.not_ours(found, folder)
  body_folder = modules[0][1]
  given = sbert_modules.optional_json(folder / SETTINGS_FILE)
  sizes, path = _sizes(body_folder), body_folder / _SIZES_FILES[0]
  _check_body(sizes, body_folder)
  pooled, include_prompt = sbert_modules.read_pooling(modules[1][1])
  width = huggingface.read_config(str(body_folder)).hidden_size
  width *= len(pooled.split('+'))
  layers, head = sbert_modules.read_layers(modules[2:], width)
  width = [width, *(layer.size for layer in layers if layer.size)][-1]
  kept = _number(given, 'truncate_dim', 1, folder / SETTINGS_FILE) or width
  similarity = given.get('similarity_fn_name') or 'cosine'
  if similarity not in choices.SIMILARITIES:
    raise sbert_modules.not_ours(f'similarity {similarity}', folder)
  # The dot product of normalized embeddings is their cosine, unless they are
  # truncated after the normalization.
  if (
    layers
    and layers[-1].kind == pooling.UNIT
    and (similarity == 'cosine' or kept >= width)
  ):
    layers, similarity = layers[:-1], 'cosine'
  settings = {
    'pooling': pooled,
    'similarity': similarity,
    **{
      f'{side}_length': _number(sizes, f'{route}_length', 3, path)
      or _number(sizes, 'max_seq_length', 3, path)
      for route, side in ROUTES.items()
    },
    **_prompts(given, folder),
  }
  if not include_prompt:
    settings['include_prompt'] = False
  if kept < width:
    settings['truncate_dim'] = kept
  return SentenceTransformer(
    str(body_folder),
    sizes.get('do_lower_case', False),
    {**settings, **_head_settings(layers)},
    head,
  )


def _head_settings(layers):
  """Returns the settings of the layers after the pooling."""
  if not layers:
    return {}
  size = layers[0].size
  head, norm = pooling.Layer(pooling.DENSE, size), pooling.Layer(pooling.NORM)
  # A projection without a bias is one whose bias is 0.
  chain = (dataclasses.replace(layers[0], bias=True), *layers[1:])
  if chain in ((head,), (head, norm)):
    return {'head_size': size, 'head_norm': len(layers) == 2}
  return {'layers': layers}


def _sizes(folder):
  """Returns the Transformer's settings file as a dict."""
  found = (sbert_modules.optional_json(folder / n) for n in _SIZES_FILES)
  return next(filter(None, found), {})


def _check_body(sizes, folder):
  """Raises `BadInput` for a Transformer that does more than run the body."""
  for key, usual in (
    ('do_lower_case', (False, True)),
    ('transformer_task', (None, 'feature-extraction')),
    ('module_output_name', (None, 'token_embeddings')),
    ('query_expansion', (None,)),
    ('processing_kwargs', (None, {})),
  ):
    if sizes.get(key, usual[0]) not in usual:
      raise sbert_modules.not_ours(f'{key} {sizes[key]}', folder)
  modality = sizes.get('modality_config') or {}
  text = modality.get('text', {}) if isinstance(modality, dict) else None
  usual = 'last_hidden_state'
  if (
    not isinstance(text, dict) or text.get('method_output_name', usual) != usual
  ):
    raise sbert_modules.not_ours(f'modality_config {modality}', folder)
  for name in (
    'model_args', 'model_kwargs', 'tokenizer_args', 'tokenizer_kwargs',
    'config_args', 'config_kwargs', 'processor_args', 'processor_kwargs',
  ):  # fmt: skip
    given = sizes.get(name) or {}
    others = set(given) - _HARMLESS if isinstance(given, dict) else {str(given)}
    if others:
      raise sbert_modules.not_ours(f'{name} {", ".join(others)}', folder)


def _routes(folder):
  """Returns [(class name, path)] of the modules of each tower's route."""
  path = folder / 'router_config.json'
  given = strict_io.json_file(path)
  types, structure = given.get('types'), given.get('structure')
  if not isinstance(types, dict) or not isinstance(structure, dict):
    raise sbert_modules.not_ours('a Router without types and structure', folder)
  if not all(isinstance(parts, list) for parts in structure.values()):
    raise sbert_modules.not_ours(f'a Router of {structure}', folder)
  if (given.get('parameters') or {}).get('route_mappings'):
    raise sbert_modules.not_ours('a Router with route_mappings', folder)
  if set(structure) != set(ROUTES):
    raise sbert_modules.not_ours(
      f'a Router of {", ".join(map(str, structure))}', folder
    )
  return {
    name: [
      (
        _module_kind({'type': types.get(str(part))}, path),
        strict_io.inside(folder, part, path),
      )
      for part in structure[route]
    ]
    for route, name in ROUTES.items()
  }


def _module_kind(module, path):
  """Returns the class name, without package, of an entry of modules.json."""
  kind = module.get('type') if isinstance(module, dict) else None
  if not str(kind).startswith('sentence_transformers.'):
    raise strict_io.refusal(
      path,
      f"the module {strict_io.quoted(module)} has no 'type' of "
      'sentence_transformers',
      'save the model again, or use one without code of its own',
    )
  return kind.rpartition('.')[2]


def _prompts(settings, folder):
  """Returns the settings of the prefixes of queries and passages.

  Passages get the first non-empty prompt of those that encode_document tries.
  encode_document itself accepts an empty 'document', which every file saved by
  sentence-transformers has, and then ignores the others.
  """
  prompts = settings.get('prompts') or {}
  if not isinstance(prompts, dict) or not all(
    isinstance(prompt, str | None) for prompt in prompts.values()
  ):
    raise sbert_modules.not_ours(f'prompts {prompts}', folder)
  given = {name: prompt for name, prompt in prompts.items() if prompt}
  default = settings.get('default_prompt_name')
  if default in given and default not in ('query', *_PASSAGE_PROMPTS):
    raise sbert_modules.not_ours(f'a prompt for all texts, {default}', folder)
  passage = [name for name in _PASSAGE_PROMPTS if name in given]
  if passage and passage[0] != 'document':
    logs.log(
      f'{folder}: passages have the prompt {given[passage[0]]!r}, named '
      f'{passage[0]}; encode_document takes that of document alone'
    )
  others = set(given) - {'query', *_PASSAGE_PROMPTS}
  if others:
    logs.log(
      f'{folder}: prompts for other tasks are left out: '
      f'{", ".join(sorted(others))}'
    )
  return {
    'query_prompt': given.get('query', ''),
    'passage_prompt': given[passage[0]] if passage else '',
  }


def _number(settings, key, least, path):
  """Returns a whole number from settings, None if they do not have it."""
  number = settings.get(key)
  if number is not None and (type(number) is not int or number < least):
    raise strict_io.refusal(
      path,
      f'{key} is {strict_io.quoted(number)}',
      f'set it to a whole number of at least {least}',
    )
  return number
