"""Reads `--init_from`: weights, tokenizer and the settings they come with.

It names a Hugging Face body, a retriever in the layout of ANCE or DPR, a
sentence-transformers folder, two of these (one per side), or nothing.
"""

from collections.abc import Collection
import dataclasses
import os
import pathlib
from typing import NamedTuple

import numpy as np

from ance_jax import errors
from ance_jax.core import logs
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.models import huggingface
from ance_jax.models import pooling
from ance_jax.models import retriever_layouts
from ance_jax.models import sbert
from ance_jax.models import snapshots


class Sizes(NamedTuple):
  """Sizes of a randomly initialized body; see `bert.BodyConfig`."""

  vocab_size: int
  num_layers: int
  hidden_size: int
  num_heads: int
  intermediate_size: int


class Pretrained(NamedTuple):
  """A pretrained model.

  Attributes:
    body: Sizes of the body.
    tokenizer: Tokenizer of the body.
    params: Parameters by tower; empty for random weights.
    settings: Settings by name of the `Config` field or retriever setting.
  """

  body: bert.BodyConfig
  tokenizer: tokenizer_lib.Tokenizer
  params: dict
  settings: dict


def random(
  sizes: Sizes, max_positions: int, texts: Collection[str]
) -> Pretrained:
  """Returns a model without parameters, with a vocabulary of the texts.

  Args:
    sizes: Sizes of the body.
    max_positions: Maximum number of tokens of a text.
    texts: As for `vocabulary.train`.
  """
  body = planned_body(sizes, max_positions)  # Its checks come first.
  logs.log(f'training a vocabulary of {sizes.vocab_size:,} on the corpus')
  tokenizer = tokenizer_lib.train_vocabulary(texts, sizes.vocab_size)
  return Pretrained(
    dataclasses.replace(body, vocab_size=len(tokenizer)), tokenizer, {}, {}
  )


def planned_body(sizes: Sizes, max_positions: int) -> bert.BodyConfig:
  """Returns the body that `random` makes if the vocabulary fills up."""
  if sizes.hidden_size % sizes.num_heads:
    raise errors.refusal(
      f'--hidden_size={sizes.hidden_size} is not divisible by '
      f'--num_heads={sizes.num_heads}',
      'change one of them',
    )
  return bert.BodyConfig(
    model_type='bert',
    **sizes._asdict(),
    max_positions=max_positions,
    num_types=1,
    layer_norm_epsilon=1e-12,
    activation='gelu',
  )


def read(name: str, lower_case: bool | None) -> Pretrained:
  """Returns a pretrained model.

  Args:
    name: Folder, hub name or file; or two of them, comma-separated: the query
      encoder and the passage encoder.
    lower_case: Whether to lower-case texts; None keeps the model's choice.

  Raises:
    BadInput: The model cannot be used; the text says why.
  """
  names = name.split(',')
  if len(names) > 2 or not all(names):
    raise errors.refusal(
      f'--init_from={name!r} names neither one checkpoint nor two',
      'name one, or QUERY_ENCODER,PASSAGE_ENCODER',
    )
  name = snapshots.pinned(name)
  source, *others = (
    _read_one(snapshots.folder(one), lower_case) for one in name.split(',')
  )
  if others:
    source = _both(source, *others, name)
  elif len(source.params) == 1:
    (params,) = source.params.values()
    source = source._replace(params={bi_encoder.TIED: params})
  settings = {'tie_encoders': len(source.params) == 1, **source.settings}
  shown = ', '.join(
    f'{key} {pooling.described(value) if key == "layers" else repr(value)}'
    for key, value in settings.items()
  )
  logs.log(f'{name}: {shown}')
  return source._replace(settings=settings)


def _read_one(name, lower_case):
  if os.path.isfile(name):
    return _hugging_face(os.path.dirname(name) or '.', lower_case, name)
  if sbert.is_folder(name):
    return _sentence_transformers(name, lower_case)
  return _hugging_face(name, lower_case)


def _both(query, passage, name):
  """Joins a query encoder and a passage encoder."""
  params = {}
  for side, source in (
    (bi_encoder.QUERY, query),
    (bi_encoder.PASSAGE, passage),
  ):
    if list(source.params) not in ([side], [bi_encoder.TIED]):
      raise errors.refusal(
        f'--init_from={name} has a checkpoint of '
        f'{" and ".join(source.params)} where the {side} encoder belongs',
        'name the encoder of queries, then that of passages',
      )
    (params[side],) = source.params.values()
  of_passages = {
    key: value
    for key, value in passage.settings.items()
    if key in ('passage_length', 'passage_prompt')
  }
  _check_alike(query, passage, name)
  return query._replace(
    params=params, settings={**query.settings, **of_passages}
  )


def _check_alike(first, second, name):
  """Raises `BadInput` if two towers cannot form one retriever."""
  tokenizers = (s.tokenizer.backend_tokenizer.to_str() for s in (first, second))
  ours = (
    'pooling', 'similarity', 'head_size', 'head_norm', 'title_separator',
    'include_prompt', 'layers', 'truncate_dim',
  )  # fmt: skip
  chosen = ([s.settings.get(key) for key in ours] for s in (first, second))
  for what, differs in (
    ('sizes', first.body != second.body),
    ('tokenizers', len(set(tokenizers)) > 1),
    ('pooling, similarity or heads', len(set(map(tuple, chosen))) > 1),
  ):
    if differs:
      raise errors.refusal(
        f'the two encoders of {name} differ in their {what}',
        'use encoders that were trained together',
      )


def _hugging_face(name, lower_case, file=None, check_case=True):
  """Returns the model in a folder of a layout that `retriever_layouts` knows.

  Args:
    name: Folder.
    lower_case: Whether to lower-case texts; None for the layout's setting, or
      else the tokenizer's own.
    file: File of the weights; None to search the folder.
    check_case: Whether to reject a tokenizer whose files contradict each other
      about lower-casing, if neither `lower_case` nor the layout decides.
  """
  body = huggingface.read_config(name)
  tensors = huggingface.read_tensors(
    file or name, without=retriever_layouts.is_dropped
  )
  params, settings = retriever_layouts.towers_from_tensors(
    tensors, body, file or name
  )
  trained_with = settings.pop('lower_case', None)
  lower_case = trained_with if lower_case is None else lower_case
  tokenizer = tokenizer_lib.load(name)
  if check_case and lower_case is None:
    tokenizer_lib.check_case(tokenizer, name)
  tokenizer_lib.set_flavour(tokenizer, lower_case=lower_case, prefix_space=None)
  if lower_case:
    logs.log(f'{name}: texts are lower-cased')
  if 'title_separator' in settings:
    settings['title_separator'] = tokenizer_lib.title_separator(
      tokenizer, settings['title_separator']
    )
  settings |= {
    key: min(settings[key], body.max_length)
    for key in ('query_length', 'passage_length')
    if key in settings
  }
  last = max(tokenizer.get_vocab().values(), default=0)
  if last >= body.vocab_size:
    raise errors.refusal(
      f'the tokenizer of {name} has the id {last:,}, but the word embedding '
      f'has {body.vocab_size:,} rows',
      "use the checkpoint's own",
    )
  return Pretrained(body, tokenizer, params, settings)


def _sentence_transformers(folder, lower_case):
  """Returns the model in a sentence-transformers folder."""
  sources = {}
  for name, found in sbert.read(folder).items():
    lowers = lower_case is None and found.lower_case
    source = _hugging_face(found.body_folder, lower_case, check_case=not lowers)
    if list(source.params) != [bi_encoder.TIED]:
      raise errors.refusal(
        f'the Transformer {found.body_folder} is not a body but an encoder of '
        f'{" and ".join(source.params)}',
        'use another model',
      )
    if lowers:
      tokenizer_lib.lower_case(source.tokenizer)
      logs.log(f'{found.body_folder}: texts are lower-cased')
    settings, head = dict(found.settings), dict(found.head)
    settings |= {
      key: min(
        settings[key] or source.tokenizer.model_max_length,
        source.body.max_length,
      )
      for key in ('query_length', 'passage_length')
    }
    if size := settings.get('head_size'):
      head['head'] = {'bias': np.zeros(size, np.float32), **head['head']}
    params = {**source.params[bi_encoder.TIED], **head}
    sources[name] = source._replace(params={name: params}, settings=settings)
  source, *others = sources.values()
  if others:
    source = _both(source, *others, folder)
  return source._replace(settings={**source.settings, **_exported(folder)})


def _exported(folder):
  """Returns settings of our own export that the folder's format cannot hold."""
  path = pathlib.Path(folder) / bi_encoder.FILE
  if not path.exists():
    return {}
  given = bi_encoder.read(path)
  names = ('query_length', 'passage_length', 'title_separator', 'head_norm')
  return {name: getattr(given, name) for name in names}
