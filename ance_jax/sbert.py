"""Folders of sentence-transformers: what their modules say, read strictly."""

import os
import pathlib
from typing import NamedTuple

from ance_jax import config as config_lib
from ance_jax import reading


class SentenceTransformer(NamedTuple):
  """What a sentence-transformers folder says about its model.

  Attributes:
    body_folder: Folder of the transformer.
    length: Tokens of a text at most, or None.
    pooling: 'cls' or 'mean'.
    similarity: 'dot' or 'cosine'.
    lower_case: Whether texts are lower-cased, whatever the tokenizer does.
  """

  body_folder: str
  length: int | None
  pooling: str
  similarity: str
  lower_case: bool


def is_folder(folder):
  """Returns whether a folder is that of a sentence-transformers model."""
  return os.path.lexists(pathlib.Path(folder) / 'modules.json')


def read(folder):
  """Returns the `SentenceTransformer` of a folder.

  Raises:
    BadInput: It does something that we do not.
  """
  folder = pathlib.Path(folder)
  path = folder / 'modules.json'
  modules = reading.json_file(path, list)
  kinds = [_module_kind(module, path) for module in modules]
  settings = _optional_json(folder / 'config_sentence_transformers.json')
  named = settings.get('similarity_fn_name') or 'cosine'
  for found, what in (
    (kinds[:2] != ['Transformer', 'Pooling'], f'modules {", ".join(kinds)}'),
    (kinds[2:] not in ([], ['Normalize']), f'modules {", ".join(kinds)}'),
    (_prompts(settings), f'prompts {_prompts(settings)}'),
    (named not in ('cosine', 'dot'), f'similarity {named}'),
  ):
    if found:
      raise _not_ours(what, folder)
  body_folder = reading.inside(folder, modules[0].get('path', ''), path)
  sizes = _optional_json(body_folder / 'sentence_bert_config.json')
  lower_case = sizes.get('do_lower_case', False)
  if type(lower_case) is not bool:
    raise _not_ours(f'do_lower_case {lower_case}', folder)
  pooling = reading.inside(folder, modules[1].get('path', ''), path)
  return SentenceTransformer(
    str(body_folder),
    _length(sizes, body_folder),
    _pooling(pooling / 'config.json'),
    'cosine' if 'Normalize' in kinds or named == 'cosine' else 'dot',
    lower_case,
  )


def _optional_json(path):
  """Returns the dict of a JSON file, empty if there is no such file."""
  return reading.json_file(path) if os.path.lexists(path) else {}


def _not_ours(what, folder):
  return config_lib.BadInput(
    'a sentence-transformers folder must be Transformer, Pooling and '
    f'perhaps Normalize, for cosine or dot, without prompts; found {what} in '
    f'{folder}; use another model.'
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


def _prompts(settings):
  """Returns the prompts that are not empty, or what is no dict of them."""
  prompts = settings.get('prompts') or {}
  if not isinstance(prompts, dict):
    return prompts
  return [prompt for prompt in prompts.values() if prompt]


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
