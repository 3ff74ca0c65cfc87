"""Converts checkpoints of ANCE, DPR and cross-encoders: bodies and heads.

A checkpoint must hold exactly the tensors of its layout, as in `bert_weights`.
"""

import re
from typing import NamedTuple

import numpy as np

from ance_jax.core import strict_io
from ance_jax.models import bert
from ance_jax.models import bert_weights


class _Tower(NamedTuple):
  """How a retriever's checkpoint names the parts of a tower.

  Attributes:
    name: Our name of the tower.
    prefix: Prefix of the body's tensors.
    head: Module of the projection, or None.
    head_norm: Module of the LayerNorm after the projection, or None.
  """

  name: str
  prefix: str
  head: str | None
  head_norm: str | None


class _Form(NamedTuple):
  """A layout of a retriever's checkpoint.

  Attributes:
    mark: Prefix of tensors that no other form has.
    towers: The `_Tower`s of the layout.
    settings: Retriever settings that such checkpoints are trained with.
    dropped: Pattern of tensors to ignore besides the ignored ones of a body.
  """

  mark: str
  towers: tuple
  settings: dict
  dropped: str = '(?!)'


_DPR_SETTINGS = {
  'pooling': 'cls',
  'similarity': 'dot',
  'query_length': 256,
  'passage_length': 256,
  'title_separator': 'token',
}
_FORMS = (
  # RobertaDot_NLL_LN of ANCE (model/models.py), STAR and ADORE.
  _Form(
    'embeddingHead.',
    (_Tower('tied', 'roberta.', 'embeddingHead', 'norm'),),
    {
      'pooling': 'cls',
      'similarity': 'dot',
      'query_length': 64,
      'passage_length': 512,
      # The tokenizer of transformers 2 obeyed do_lower_case; 5 ignores it.
      'lower_case': True,
    },
    # ANCE's class inherits it from RobertaForSequenceClassification, unused.
    r'classifier\..*',
  ),
  # DPR on the hub: one encoder per repository.
  _Form(
    'question_encoder.',
    (
      _Tower(
        'query', 'question_encoder.bert_model.', 'question_encoder.encode_proj',
        None
      ),
    ),
    _DPR_SETTINGS,
  ),
  _Form(
    'ctx_encoder.',
    (
      _Tower(
        'passage', 'ctx_encoder.bert_model.', 'ctx_encoder.encode_proj', None
      ),
    ),
    _DPR_SETTINGS,
  ),
  # BiEncoder: checkpoints of DPR's code, and ANCE's for OpenQA.
  _Form(
    'question_model.',
    (
      _Tower('query', 'question_model.', 'question_model.encode_proj', None),
      _Tower('passage', 'ctx_model.', 'ctx_model.encode_proj', None),
    ),
    _DPR_SETTINGS,
  ),
)  # fmt: skip
# The layer before the output, and the output layer, of transformers' classes
# for sequence classification.
_CLASSIFIERS = {
  'bert': {'pooler': 'bert.pooler.dense', 'classifier': 'classifier'},
  'roberta': {
    'pooler': 'classifier.dense',
    'classifier': 'classifier.out_proj',
  },
  'distilbert': {'pooler': 'pre_classifier', 'classifier': 'classifier'},
  'mpnet': {'pooler': 'classifier.dense', 'classifier': 'classifier.out_proj'},
}


def is_dropped(name: str) -> bool:
  """Returns whether retrievers ignore a tensor of this name."""
  for prefix in [tower.prefix for form in _FORMS for tower in form.towers]:
    name = name.removeprefix(prefix)
  return bert_weights.is_dropped(name)


def towers_from_tensors(
  tensors: dict[str, np.ndarray], body: bert.BodyConfig, where: str
) -> tuple[dict[str, dict], dict]:
  """Returns the parameters by tower, and the settings of the layout.

  Args:
    tensors: Tensors of the checkpoint, in its names and layout.
    body: Sizes of the body.
    where: Source of the tensors, for error messages.

  Raises:
    BadInput: A tensor is missing, unexpected, not finite or of the wrong shape.
  """
  form = next(
    (f for f in _FORMS if any(name.startswith(f.mark) for name in tensors)),
    None,
  )
  if form is None:
    return {
      'tied': {'body': bert_weights.body_from_tensors(tensors, body, where)}
    }, {}
  left = {
    name: array
    for name, array in tensors.items()
    if not re.fullmatch(form.dropped, name)
  }
  towers = {t.name: _take_tower(left, t, body, where) for t in form.towers}
  if left:
    raise _incomplete(
      f'a tensor {sorted(left)[0][:80]}, which its layout lacks ({len(left)} '
      'such)',
      where,
    )
  settings, (first, *others) = dict(form.settings), towers.values()
  if any(set(other) != set(first) for other in others):
    raise _incomplete('a projection in one of its two encoders alone', where)
  if 'head' in first:
    settings['head_size'] = len(first['head']['bias'])
    settings['head_norm'] = 'head_norm' in first
  return towers, settings


def cross_encoder_from_tensors(
  tensors: dict[str, np.ndarray], body: bert.BodyConfig, where: str
) -> dict:
  """Returns the parameters of a cross-encoder: body, pooler, classifier.

  Args:
    tensors: As for `towers_from_tensors`.
    body: Sizes of the body.
    where: As for `towers_from_tensors`.

  Raises:
    BadInput: A tensor is missing, unexpected, not finite or of the wrong shape.
  """
  left = dict(tensors)
  params = {
    part: _part(
      left, {'kernel': f'{module}.weight', 'bias': f'{module}.bias'}, where
    )
    for part, module in _CLASSIFIERS[body.model_type].items()
  }
  wide, outputs = body.hidden_size, params['classifier']['bias'].size
  if outputs != 1:
    raise strict_io.refusal(
      where,
      f'the cross-encoder has {outputs} outputs instead of one, the score',
      'use a cross-encoder that was trained to rank',
    )
  for part, size in (('pooler', wide), ('classifier', 1)):
    _check_shapes({part: params[part]}, (wide, size), where)
  return {'body': bert_weights.body_from_tensors(left, body, where), **params}


def _take_tower(left, tower, body, where):
  """Removes a tower's tensors from `left`; returns its parameters."""
  params = {}
  for part, module, leaves in (
    ('head', tower.head, {'kernel': 'weight', 'bias': 'bias'}),
    ('head_norm', tower.head_norm, {'scale': 'weight', 'bias': 'bias'}),
  ):
    theirs = {ours: f'{module}.{name}' for ours, name in leaves.items()}
    # ANCE's class always has the norm; DPR's projection is optional.
    if part == 'head_norm' and module or set(theirs.values()) & set(left):
      params[part] = _part(left, theirs, where)
  if 'head' in params:
    _check_shapes(
      params, (body.hidden_size, params['head']['bias'].size), where
    )
  elif params:
    raise _incomplete('a norm without a projection', where)
  of_body = {
    name.removeprefix(tower.prefix): left.pop(name)
    for name in list(left)
    if name.startswith(tower.prefix)
  }
  params['body'] = bert_weights.body_from_tensors(of_body, body, where)
  return params


def _part(tensors, theirs, where):
  """Removes a module's tensors from `tensors`; returns its parameters."""
  found = {}
  for ours, name in theirs.items():
    if name not in tensors:
      raise _incomplete(f'no tensor {name}', where)
    array = np.asarray(tensors.pop(name), np.float32)
    bert_weights.check_finite(name, array, where)
    found[ours] = np.ascontiguousarray(array.T if ours == 'kernel' else array)
  return found


def _check_shapes(parts, sizes, where):
  """Raises `BadInput` unless parts project vectors of one size to another."""
  shapes = {'kernel': sizes, 'bias': sizes[1:], 'scale': sizes[1:]}
  for part, leaves in parts.items():
    found = [leaf.shape for leaf in leaves.values()]
    expected = [shapes[name] for name in leaves]
    if found != expected:
      raise _incomplete(f'a {part} of shapes {found}, not {expected}', where)


def _incomplete(found, where):
  return strict_io.refusal(
    where, f'the checkpoint has {found}', 'use a complete one'
  )
