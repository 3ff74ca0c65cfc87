"""Where weights come from: strict conversion, in both directions.

A Hugging Face checkpoint either has each tensor of our table, in its shape, and
nothing else but what the table drops, or it is refused with the names.
"""

import json
import pathlib
import re
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import transformers

from ance_jax import bert
from ance_jax import checkpoint
from ance_jax import config as config_lib
from ance_jax import devices as devices_lib
from ance_jax import encoders
from ance_jax import logs
from ance_jax import tokens

# model_type of Hugging Face -> of our body.
_BODIES = {'bert': 'bert', 'roberta': 'roberta', 'xlm-roberta': 'roberta'}
# Tensors that are left out, and why.
_DROPPED = {
  r'pooler\..*': 'a tanh layer that no dense retriever uses',
  r'embeddings\.position_ids': 'the numbers 0, 1, 2, ...',
  r'cls\..*|lm_head\..*': "the pretraining's output layers",
}
# Our module -> theirs, in a layer and around the layers.
_LAYER_MODULES = {
  'query': 'attention.self.query',
  'key': 'attention.self.key',
  'value': 'attention.self.value',
  'output': 'attention.output.dense',
  'attention_norm': 'attention.output.LayerNorm',
  'up': 'intermediate.dense',
  'down': 'output.dense',
  'norm': 'output.LayerNorm',
}
_TABLES = {
  'word_embedding': 'embeddings.word_embeddings.weight',
  'position_embedding': 'embeddings.position_embeddings.weight',
  'type_embedding': 'embeddings.token_type_embeddings.weight',
}
_MODEL_FOLDER = 'model'
_RETRIEVER_FILE = 'retriever.json'


class Model(NamedTuple):
  """A retriever, its tokenizer, and its parameters by tower (float32)."""

  retriever: encoders.Retriever
  tokenizer: tokens.Tokenizer
  params: dict


class _Source(NamedTuple):
  """What `--init_from` brings: parameters by tower, and settings by name."""

  body: bert.BodyConfig
  tokenizer: tokens.Tokenizer
  params: dict
  settings: dict


def load(config, texts):
  """Returns the `Model` that a run starts from.

  Args:
    config: The run's; flags on the encoder that are given go before what the
      checkpoint brings with it.
    texts: Iterable of the corpus's texts, for a vocabulary if none is given.

  Raises:
    BadInput: The checkpoint cannot be used; the text says why.
  """
  if not config.init_from:
    source = _random_source(config, texts)
  elif is_run(config.init_from):
    source = _run_source(config)
  elif (pathlib.Path(config.init_from) / 'modules.json').is_file():
    source = _sentence_transformers_source(pathlib.Path(config.init_from))
  else:
    source = _hugging_face_source(config.init_from)
  retriever = _retriever(config, source)
  return Model(retriever, source.tokenizer, _fitted(source, retriever, config))


def model_files(retriever, tokenizer):
  """Returns {name: bytes} of all of a model but its weights, for a record."""
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save_pretrained(folder)
    files = {
      f'{_MODEL_FOLDER}/{path.name}': path.read_bytes()
      for path in sorted(pathlib.Path(folder).iterdir())
    }
  retriever = json.dumps(retriever.to_dict(), indent=1)
  return {**files, f'{_MODEL_FOLDER}/{_RETRIEVER_FILE}': retriever.encode()}


def load_model(workdir, step):
  """Returns the retriever and tokenizer of a run's checkpoint."""
  checkpoint.read_record(workdir, step)  # Which checks it.
  folder = checkpoint.record_folder(workdir, step) / _MODEL_FOLDER
  retriever = json.loads((folder / _RETRIEVER_FILE).read_text())
  return (
    encoders.Retriever.from_dict(retriever), tokens.load_tokenizer(str(folder))
  )  # fmt: skip


def is_run(folder):
  """Returns whether a folder is that of a run of ours."""
  return bool(checkpoint.committed_steps(folder))


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
    name = re.sub(r'^(bert|roberta)\.', '', name)
    name = re.sub(r'\.gamma$', '.weight', re.sub(r'\.beta$', '.bias', name))
    if not any(re.fullmatch(pattern, name) for pattern in _DROPPED):
      found[name] = array
  table = _table(body)
  for problem, names in (
    ('is missing', sorted(set(table) - set(found))),
    ('is not expected', sorted(set(found) - set(table))),
  ):
    if names:
      raise config_lib.BadInput(
        f'a {body.model_type} checkpoint must have exactly the tensors of its '
        f'architecture; found that {names[0]} {problem} ({len(names)} such) in '
        f'{where}; use a complete checkpoint of that architecture.'
      )
  params = {}
  for name, (path, shape) in table.items():
    array = np.asarray(found[name], np.float32)
    array = array.T if path[-1] == 'kernel' else array
    if array.shape != shape:
      raise config_lib.BadInput(
        f'tensor {name} must have the shape that config.json implies, {shape} '
        f'in our layout; found {array.shape} in {where}; use a checkpoint that '
        'belongs to its config.json.'
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


def _table(body):
  """Returns {their name: (our path, our shape)} for each tensor of a body."""
  wide, inner = body.hidden_size, body.intermediate_size
  rows = {
    'word_embedding': body.vocab_size,
    'position_embedding': body.max_positions,
    'type_embedding': body.num_types,
  }
  table = {
    theirs: ((ours,), (rows[ours], wide)) for ours, theirs in _TABLES.items()
  }

  def add(path, theirs, shape):
    first = 'scale' if len(shape) == 1 else 'kernel'
    table[f'{theirs}.weight'] = ((*path, first), shape)
    table[f'{theirs}.bias'] = ((*path, 'bias'), shape[-1:])

  add(('embedding_norm',), 'embeddings.LayerNorm', (wide,))
  for number in range(body.num_layers):
    for ours, theirs in _LAYER_MODULES.items():
      shape = {'up': (wide, inner), 'down': (inner, wide)}.get(
        ours, (wide, wide)
      )
      shape = (wide,) if ours.endswith('norm') else shape
      name = f'layer_{number}'
      add((name, ours), f'encoder.layer.{number}.{theirs}', shape)
  return table


def _retriever(config, source):
  """Returns the `Retriever`: flags, else the checkpoint's, else defaults."""
  longest = source.body.max_length
  defaults = {
    'tie_encoders': True,
    'pooling': 'cls',
    'head_size': 0,
    'similarity': 'dot',
    'query_length': min(64, longest),
    'passage_length': min(512, longest),
  }
  given = {name: getattr(config, name) for name in defaults}
  given = {name: value for name, value in given.items() if value is not None}
  chosen = {**defaults, **source.settings, **given}
  for name in ('query_length', 'passage_length'):
    if chosen[name] > longest:
      raise config_lib.BadInput(
        f'--{name} must be at most the {longest} tokens that the model can '
        f'take; found {chosen[name]}; lower it.'
      )
  return encoders.Retriever(
    source.body, tied=chosen.pop('tie_encoders'), **chosen
  )


def _fitted(source, retriever, config):
  """Returns the parameters of the source in the towers of the retriever."""
  given = source.params
  if retriever.tied and len(given) > 1:
    raise config_lib.BadInput(
      '--tie_encoders must be false for a checkpoint of two encoders; found it '
      f'true with {config.init_from}; leave it out.'
    )
  params = encoders.init(retriever, config.seed)
  for name in retriever.towers:
    tower = given.get(name) or next(iter(given.values()), {})
    expected = {part: params[name].get(part) for part in tower}
    if jax.tree.map(jnp.shape, tower) != jax.tree.map(jnp.shape, expected):
      raise config_lib.BadInput(
        '--head_size must be that of the checkpoint, where it has a head; '
        f'found {config.head_size} with {config.init_from}; leave it out.'
      )
    # Copies: a donated state may not hold one array twice.
    params[name] = {**params[name], **jax.tree.map(jnp.array, tower)}
  return params


def _random_source(config, texts):
  if config.hidden_size % config.num_heads:
    raise config_lib.BadInput(
      f'--num_heads must divide --hidden_size; found {config.num_heads} and '
      f'{config.hidden_size}; change one of them.'
    )
  logs.say(f'training a vocabulary of {config.vocab_size:,} on the corpus')
  tokenizer = tokens.train_vocabulary(texts, config.vocab_size)
  body = bert.BodyConfig(
    model_type='bert',
    vocab_size=len(tokenizer),
    hidden_size=config.hidden_size,
    num_layers=config.num_layers,
    num_heads=config.num_heads,
    intermediate_size=config.intermediate_size,
    max_positions=max(config.query_length or 64, config.passage_length or 512),
    num_types=1,
    layer_norm_epsilon=1e-12,
    activation='gelu',
  )
  return _Source(body, tokenizer, {}, {})


def _run_source(config):
  """Returns a run of ours, at its `--checkpoint`."""
  step = checkpoint.choose(config.init_from, config.checkpoint)
  retriever, tokenizer = load_model(config.init_from, step)
  params = checkpoint.read_params(
    config.init_from, step, encoders.shapes(retriever), devices_lib.local(1)
  )
  logs.say(f'weights of {config.init_from}, step {step}')
  settings = retriever.to_dict()
  del settings['body']
  settings['tie_encoders'] = settings.pop('tied')
  return _Source(retriever.body, tokenizer, params, settings)


def _hugging_face_source(name):
  body = _read_config(name)
  params = body_from_tensors(_read_tensors(name), body, name)
  tokenizer = tokens.load_tokenizer(name)
  last = max(tokenizer.get_vocab().values())
  if last >= body.vocab_size:
    raise config_lib.BadInput(
      f'a tokenizer must fit the {body.vocab_size:,} rows of the word '
      f"embedding; found the id {last:,} at {name}; use the checkpoint's own."
    )
  return _Source(body, tokenizer, {'tied': {'body': params}}, {})


def _sentence_transformers_source(folder):
  """Returns a sentence-transformers folder: its length, pooling, similarity."""
  modules = json.loads((folder / 'modules.json').read_text())
  kinds = [module['type'].rpartition('.')[2] for module in modules]
  settings = _read_json(folder / 'config_sentence_transformers.json')
  prompts = [p for p in (settings.get('prompts') or {}).values() if p]
  body_folder = folder / modules[0].get('path', '')
  sizes = _read_json(body_folder / 'sentence_bert_config.json')
  named = settings.get('similarity_fn_name') or 'cosine'
  for found, what in (
    (kinds[:2] != ['Transformer', 'Pooling'], f'modules {", ".join(kinds)}'),
    (kinds[2:] not in ([], ['Normalize']), f'modules {", ".join(kinds)}'),
    (prompts, f'prompts {prompts}'),
    (sizes.get('do_lower_case'), 'do_lower_case'),
    (named not in ('cosine', 'dot'), f'similarity {named}'),
  ):
    if found:
      raise config_lib.BadInput(
        'a sentence-transformers folder must be Transformer, Pooling and '
        'perhaps Normalize, for cosine or dot, without prompts; found '
        f'{what} in {folder}; use another model.'
      )
  source = _hugging_face_source(str(body_folder))
  length = sizes.get('max_seq_length')
  length = length or source.tokenizer.model_max_length
  length = min(length, source.body.max_length)
  cosine = 'Normalize' in kinds or named == 'cosine'
  chosen = {
    'pooling': _pooling(folder / modules[1]['path'] / 'config.json'),
    'similarity': 'cosine' if cosine else 'dot',
    'query_length': length,
    'passage_length': length,
  }
  logs.say(f'{folder}: ' + ', '.join(f'{k} {v}' for k, v in chosen.items()))
  return source._replace(settings=chosen)


def _pooling(path):
  """Returns 'cls' or 'mean' of a Pooling module's config.json, old or new."""
  settings = _read_json(path)
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


def _read_config(name):
  """Returns the `bert.BodyConfig` of a Hugging Face config.json."""
  try:
    theirs = transformers.AutoConfig.from_pretrained(
      name, trust_remote_code=False
    )
  except (OSError, ValueError) as error:
    raise config_lib.BadInput(
      'a model must be a folder with a config.json or a name on the hub; found '
      f'none that loads at {name} ({str(error).splitlines()[0]}); check '
      '--init_from.'
    ) from error
  problems = [
    (theirs.model_type not in _BODIES, f'model_type {theirs.model_type}'),
    (
      getattr(theirs, 'hidden_act', '') not in bert.ACTIVATIONS,
      f'hidden_act {getattr(theirs, "hidden_act", None)}',
    ),
    (
      getattr(theirs, 'position_embedding_type', 'absolute') != 'absolute',
      'relative positions',
    ),
    (
      # Their positions are counted from behind it.
      _BODIES.get(theirs.model_type) == 'roberta' and theirs.pad_token_id != 1,
      f'a RoBERTa of pad_token_id {theirs.pad_token_id} instead of 1',
    ),
  ]
  for found, what in problems:
    if found:
      raise config_lib.BadInput(
        f'an encoder must be a BERT or RoBERTa with absolute positions and one '
        f'of {", ".join(bert.ACTIVATIONS)}; found {what} at {name}; use '
        'another.'
      )
  return bert.BodyConfig(
    model_type=_BODIES[theirs.model_type],
    vocab_size=theirs.vocab_size,
    hidden_size=theirs.hidden_size,
    num_layers=theirs.num_hidden_layers,
    num_heads=theirs.num_attention_heads,
    intermediate_size=theirs.intermediate_size,
    max_positions=theirs.max_position_embeddings,
    num_types=theirs.type_vocab_size,
    layer_norm_epsilon=theirs.layer_norm_eps,
    activation=theirs.hidden_act,
  )


def _read_tensors(name):
  """Returns {name: float32 array} of a model's safetensors files."""
  try:
    index = transformers.utils.cached_file(
      name,
      'model.safetensors.index.json',
      _raise_exceptions_for_missing_entries=False,
    )
    files = ['model.safetensors']
    if index:
      files = sorted(set(_read_json(index)['weight_map'].values()))
    tensors = {}
    for file in files:
      path = transformers.utils.cached_file(name, file)
      with safetensors.safe_open(path, 'flax') as opened:
        for key in opened.keys():
          tensors[key] = np.asarray(opened.get_tensor(key), np.float32)
  except (OSError, safetensors.SafetensorError) as error:
    raise config_lib.BadInput(
      'a checkpoint must have its weights in a whole model.safetensors; found '
      f'none at {name} ({str(error).splitlines()[0]}); convert or fetch it.'
    ) from error
  return tensors


def _read_json(path):
  path = pathlib.Path(path)
  return json.loads(path.read_text()) if path.is_file() else {}
