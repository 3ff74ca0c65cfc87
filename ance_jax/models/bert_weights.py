"""Converts Hugging Face tensors to our parameters and back, strictly.

A checkpoint must hold exactly the tensors of our table in the right shapes,
besides those that `_DROPPED` ignores; the error names the offending tensor.
"""

import os
import re
from typing import NamedTuple

from flax import traverse_util
import numpy as np

from ance_jax.core import strict_io
from ance_jax.models import bert

# Pattern of tensors to ignore -> what they are.
_DROPPED = {
  r'pooler\..*': 'a tanh layer that no dense retriever uses',
  r'embeddings\.position_ids': 'the numbers 0, 1, 2, ...',
  r'cls\..*|lm_head\..*|vocab_(transform|layer_norm|projector)\..*': (
    "the pretraining's output layers"
  ),
}


class _Layout(NamedTuple):
  """Hugging Face's names for the tensors of one model type.

  Attributes:
    tables: Our path -> their tensor, for tensors outside the layers.
    layer: Format of the prefix of a layer's tensors, given the layer number.
    modules: Our module -> their module, within a layer.
  """

  tables: dict
  layer: str
  modules: dict


_TABLES = {
  ('word_embedding',): 'embeddings.word_embeddings.weight',
  ('position_embedding',): 'embeddings.position_embeddings.weight',
}

_BERT = _Layout(
  {**_TABLES, ('type_embedding',): 'embeddings.token_type_embeddings.weight'},
  'encoder.layer.{}.',
  {
    'query': 'attention.self.query',
    'key': 'attention.self.key',
    'value': 'attention.self.value',
    'output': 'attention.output.dense',
    'attention_norm': 'attention.output.LayerNorm',
    'up': 'intermediate.dense',
    'down': 'output.dense',
    'norm': 'output.LayerNorm',
  },
)

_LAYOUTS = {
  'bert': _BERT,
  'roberta': _BERT,
  'distilbert': _Layout(
    _TABLES,
    'transformer.layer.{}.',
    {
      'query': 'attention.q_lin',
      'key': 'attention.k_lin',
      'value': 'attention.v_lin',
      'output': 'attention.out_lin',
      'attention_norm': 'sa_layer_norm',
      'up': 'ffn.lin1',
      'down': 'ffn.lin2',
      'norm': 'output_layer_norm',
    },
  ),
  'mpnet': _Layout(
    {**_TABLES, ('relative', 'bias'): 'encoder.relative_attention_bias.weight'},
    'encoder.layer.{}.',
    {
      'query': 'attention.attn.q',
      'key': 'attention.attn.k',
      'value': 'attention.attn.v',
      'output': 'attention.attn.o',
      'attention_norm': 'attention.LayerNorm',
      'up': 'intermediate.dense',
      'down': 'output.dense',
      'norm': 'output.LayerNorm',
    },
  ),
}


def body_from_tensors(
  tensors: dict[str, np.ndarray], body: bert.BodyConfig, where: str
) -> dict:
  """Returns the parameters of a body, converted from Hugging Face's tensors.

  Args:
    tensors: Their names and layout; names may start with `bert.` or similar.
    body: Sizes of the body.
    where: Source of the tensors, for error messages.

  Raises:
    BadInput: A tensor is missing, unexpected, not finite or of the wrong shape.
  """
  found = {
    _our_name(name): array
    for name, array in tensors.items()
    if not is_dropped(name)
  }
  table = _table(body)
  for problem, names in (
    ('is missing from', sorted(set(table) - set(found))),
    ('does not belong to', sorted(set(found) - set(table))),
  ):
    if names:
      raise strict_io.refusal(
        where,
        f'tensor {names[0][:80]} {problem} a checkpoint of {body.model_type} '
        f'({len(names)} such)',
        'use a complete checkpoint of that architecture',
      )
  params = {}
  for name, (path, shape) in table.items():
    array = np.asarray(
      found[name].T if path[-1] == 'kernel' else found[name], np.float32
    )
    if array.shape != shape:
      raise strict_io.refusal(
        where,
        f'tensor {name} has the shape {array.shape} in our layout, but '
        f'config.json implies {shape}',
        'use a checkpoint that belongs to its config.json',
      )
    check_finite(name, array, where)
    params[path] = np.ascontiguousarray(array)
  return traverse_util.unflatten_dict(params)


def body_to_tensors(
  params: dict, body: bert.BodyConfig
) -> dict[str, np.ndarray]:
  """Returns the float32 tensors in Hugging Face's names and layout."""
  params = traverse_util.flatten_dict(params)
  return {
    name: np.ascontiguousarray(
      np.asarray(params[path]).T if path[-1] == 'kernel' else params[path]
    )
    for name, (path, _) in _table(body).items()
  }


def check_finite(
  name: str, array: np.ndarray, where: str | os.PathLike
) -> None:
  """Raises `BadInput` if values of a tensor are infinite or NaN.

  Args:
    name: Name of the tensor.
    array: Its values.
    where: Path to name in the message.
  """
  if number := np.sum(~np.isfinite(array)):
    raise strict_io.refusal(
      where,
      f'{number:,} of {array.size:,} values of tensor {name} are not finite',
      'use a checkpoint from before the run diverged',
    )


def is_dropped(name: str) -> bool:
  """Returns whether retrievers ignore a tensor of this name."""
  return any(re.fullmatch(pattern, _our_name(name)) for pattern in _DROPPED)


def _our_name(name):
  """Returns a tensor's name as `_table` spells it."""
  name = re.sub(r'^(bert|roberta|distilbert|mpnet)\.', '', name)
  return re.sub(r'\.gamma$', '.weight', re.sub(r'\.beta$', '.bias', name))


def _table(body):
  """Returns {their tensor: (our path, our shape)} for a whole body."""
  wide, inner = body.hidden_size, body.intermediate_size
  layout = _LAYOUTS[body.model_type]
  shapes = {
    'word_embedding': (body.vocab_size, wide),
    'position_embedding': (body.max_positions, wide),
    'type_embedding': (body.num_types, wide),
    'relative': (bert.NUM_BUCKETS, body.num_heads),
    'embedding_norm': (wide,),
    'attention_norm': (wide,),
    'norm': (wide,),
    'up': (wide, inner),
    'down': (inner, wide),
  }
  table = {
    theirs: (path, shapes[path[0]]) for path, theirs in layout.tables.items()
  }
  modules = {
    ('embedding_norm',): 'embeddings.LayerNorm',
    **{
      (f'layer_{number}', ours): layout.layer.format(number) + theirs
      for number in range(body.num_layers)
      for ours, theirs in layout.modules.items()
    },
  }
  for path, theirs in modules.items():
    shape = shapes.get(path[-1], (wide, wide))
    first = 'scale' if len(shape) == 1 else 'kernel'
    table[f'{theirs}.weight'] = ((*path, first), shape)
    table[f'{theirs}.bias'] = ((*path, 'bias'), shape[-1:])
  return table
