"""Tensors of Hugging Face <-> our parameters, strict in both directions.

A checkpoint either has each tensor of our table, in its shape, and nothing else
but what the table drops, or it is refused with the names.
"""

import re
from typing import NamedTuple

import numpy as np

from ance_jax import errors
from ance_jax.models import bert

# Tensors that are left out, and why.
_DROPPED = {
  r'pooler\..*': 'a tanh layer that no dense retriever uses',
  r'embeddings\.position_ids': 'the numbers 0, 1, 2, ...',
  r'cls\..*|lm_head\..*|vocab_(transform|layer_norm|projector)\..*': (
    "the pretraining's output layers"
  ),
}


class _Layout(NamedTuple):
  """How Hugging Face names the tensors of a kind of body.

  Attributes:
    tables: Our path -> their name of a tensor, around the layers.
    layer: What their names in a layer begin with, for its number.
    modules: Our module -> theirs, in a layer.
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


def body_from_tensors(tensors, body, where):
  """Returns the parameters of a body from Hugging Face's tensors.

  Args:
    tensors: {name: array} in their names and layout; `bert.` or the like may
      stand in front.
    body: `bert.BodyConfig`.
    where: Where they are from, for people.

  Raises:
    BadInput: A tensor is missing, not expected, or of another shape.
  """
  found = {}
  for name, array in tensors.items():
    if not is_dropped(name):
      found[_our_name(name)] = array
  table = _table(body)
  for problem, names in (
    ('is missing', sorted(set(table) - set(found))),
    ('is not expected', sorted(set(found) - set(table))),
  ):
    if names:
      raise errors.BadInput(
        f'a checkpoint of {body.model_type} must have exactly the tensors of '
        f'its architecture; found that {names[0][:80]} {problem} ({len(names)} '
        f'such) in {where}; use a complete checkpoint of that architecture.'
      )
  params = {}
  for name, (path, shape) in table.items():
    array = np.asarray(found[name], np.float32)
    array = array.T if path[-1] == 'kernel' else array
    if array.shape != shape:
      raise errors.BadInput(
        f'tensor {name} must have the shape that config.json implies, {shape} '
        f'in our layout; found {array.shape} in {where}; use a checkpoint that '
        'belongs to its config.json.'
      )
    if not np.isfinite(array).all():
      raise errors.BadInput(
        f'tensor {name} must be finite; found '
        f'{np.sum(~np.isfinite(array)):,} of {array.size:,} values that are '
        f'not in {where}; use a checkpoint from before the run diverged.'
      )
    inner = params
    for key in path[:-1]:
      inner = inner.setdefault(key, {})
    inner[path[-1]] = np.ascontiguousarray(array)
  return params


def body_to_tensors(params, body):
  """Returns {name: float32 array} in Hugging Face's names and layout."""
  tensors = {}
  for name, (path, _) in _table(body).items():
    array = params
    for key in path:
      array = array[key]
    array = np.asarray(array)
    tensors[name] = np.ascontiguousarray(
      array.T if path[-1] == 'kernel' else array
    )
  return tensors


def is_dropped(name):
  """Returns whether a tensor is one that no retriever uses."""
  return any(re.fullmatch(pattern, _our_name(name)) for pattern in _DROPPED)


def _our_name(name):
  """Returns the name of a tensor as the table has it."""
  name = re.sub(r'^(bert|roberta|distilbert|mpnet)\.', '', name)
  return re.sub(r'\.gamma$', '.weight', re.sub(r'\.beta$', '.bias', name))


def _table(body):
  """Returns {their name: (our path, our shape)} for each tensor of a body."""
  wide, inner = body.hidden_size, body.intermediate_size
  layout = _LAYOUTS[body.model_type]
  shapes = {
    'word_embedding': (body.vocab_size, wide),
    'position_embedding': (body.max_positions, wide),
    'type_embedding': (body.num_types, wide),
    'relative': (bert.NUM_BUCKETS, body.num_heads),
  }
  table = {
    theirs: (path, shapes[path[0]]) for path, theirs in layout.tables.items()
  }

  def add(path, theirs, shape):
    first = 'scale' if len(shape) == 1 else 'kernel'
    table[f'{theirs}.weight'] = ((*path, first), shape)
    table[f'{theirs}.bias'] = ((*path, 'bias'), shape[-1:])

  add(('embedding_norm',), 'embeddings.LayerNorm', (wide,))
  for number in range(body.num_layers):
    for ours, theirs in layout.modules.items():
      shape = {'up': (wide, inner), 'down': (inner, wide)}.get(
        ours, (wide, wide)
      )
      shape = (wide,) if ours.endswith('norm') else shape
      name = f'layer_{number}'
      add((name, ours), layout.layer.format(number) + theirs, shape)
  return table
