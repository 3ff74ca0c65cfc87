"""What a run starts from: retriever, tokenizer and parameters.

Random, a body or a sentence-transformers folder of Hugging Face, or a run of
ours; and how a model lies in a checkpoint's record.
"""

import json
import os
import pathlib
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ance_jax import bert
from ance_jax import checkpoint
from ance_jax import config as config_lib
from ance_jax import devices as devices_lib
from ance_jax import encoders
from ance_jax import hub
from ance_jax import logs
from ance_jax import reading
from ance_jax import sbert
from ance_jax import tokenizer as tokenizer_lib
from ance_jax import weights

_MODEL_FOLDER = 'model'

RETRIEVER_FILE = 'retriever.json'


class Model(NamedTuple):
  """A retriever, its tokenizer, and its parameters by tower (float32)."""

  retriever: encoders.Retriever
  tokenizer: tokenizer_lib.Tokenizer
  params: dict


class _Source(NamedTuple):
  """What `--init_from` brings: parameters by tower, and settings by name."""

  body: bert.BodyConfig
  tokenizer: tokenizer_lib.Tokenizer
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
  elif os.path.isfile(config.init_from):
    raise config_lib.BadInput(
      '--init_from must be a folder or a name on the hub; found the file '
      f'{config.init_from}; give the folder that it lies in.'
    )
  elif sbert.is_folder(config.init_from):
    source = _sentence_transformers_source(config)
  else:
    source = _hugging_face_source(config.init_from, config.lower_case)
  tokenizer_lib.set_flavour(
    source.tokenizer,
    lower_case=config.lower_case,
    prefix_space=config.prefix_space,
  )
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
  return {**files, f'{_MODEL_FOLDER}/{RETRIEVER_FILE}': retriever.encode()}


def load_model(workdir, step):
  """Returns the retriever and tokenizer of a run's checkpoint."""
  checkpoint.read_record(workdir, step)  # Which checks it.
  folder = checkpoint.record_folder(workdir, step) / _MODEL_FOLDER
  retriever = _read_retriever(folder / RETRIEVER_FILE)
  return retriever, tokenizer_lib.load(str(folder))


def _read_retriever(path):
  """Returns the `encoders.Retriever` of a file."""
  values = reading.json_file(path)
  try:
    return encoders.Retriever.from_dict(values)
  except (TypeError, KeyError) as error:
    raise reading.bad(
      path,
      'a retriever must have the settings that this version knows',
      f'others ({error})',
      'use the version that wrote it',
    ) from error


def is_run(folder):
  """Returns whether a folder is that of a run of ours."""
  return checkpoint.are_in(folder)


def _retriever(config, source):
  """Returns the `Retriever`: flags, else the checkpoint's, else defaults."""
  longest = source.body.max_length
  defaults = {
    'tie_encoders': True,
    'pooling': 'cls',
    'head_size': 0,
    'head_norm': True,
    'similarity': 'dot',
    'query_length': min(64, longest),
    'passage_length': min(512, longest),
    'title_separator': tokenizer_lib.SPACE,
    'query_prompt': '',
    'passage_prompt': '',
  }
  given = {name: getattr(config, name) for name in defaults}
  given = {name: value for name, value in given.items() if value is not None}
  if 'title_separator' in given:
    given['title_separator'] = tokenizer_lib.title_separator(
      source.tokenizer, config.title_separator
    )
  chosen = {**defaults, **source.settings, **given}
  for name in ('query_length', 'passage_length'):
    if chosen[name] > longest:
      raise config_lib.BadInput(
        f'--{name} must be at most the {longest} tokens that the model can '
        f'take; found {chosen[name]}; lower it.'
      )
  if config.head_norm is not None and not chosen['head_size']:
    raise config_lib.BadInput(
      '--head_norm must be with a projection; found it '
      f'{str(config.head_norm).lower()} without one; set --head_size too, or '
      'leave it out.'
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
        '--head_size and --head_norm must be those of the checkpoint, where '
        f'it has a head; found {retriever.head_size} and '
        f'{retriever.head_norm} with {config.init_from}; leave them out.'
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
  tokenizer = tokenizer_lib.train_vocabulary(texts, config.vocab_size)
  if len(tokenizer) > config.vocab_size:
    raise config_lib.BadInput(
      '--vocab_size must be at least the special tokens and letters of the '
      f'corpus, {len(tokenizer)}; found {config.vocab_size}; raise it.'
    )
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


def _hugging_face_source(name, lower_case):
  """Returns a folder or hub name of a body.

  Args:
    name: Folder or hub name.
    lower_case: What is asked of its tokenizer; None: that it is consistent.
  """
  body = hub.read_config(name)
  tensors = hub.read_tensors(name, without=weights.is_dropped)
  params = weights.body_from_tensors(tensors, body, name)
  tokenizer = tokenizer_lib.load(name)
  if lower_case is None:
    tokenizer_lib.check_case(tokenizer, name)
  tokenizer_lib.set_flavour(tokenizer, lower_case=lower_case, prefix_space=None)
  last = max(tokenizer.get_vocab().values(), default=0)
  if last >= body.vocab_size:
    raise config_lib.BadInput(
      f'a tokenizer must fit the {body.vocab_size:,} rows of the word '
      f"embedding; found the id {last:,} at {name}; use the checkpoint's own."
    )
  return _Source(body, tokenizer, {'tied': {'body': params}}, {})


def _sentence_transformers_source(config):
  """Returns a sentence-transformers folder, with the settings that it has."""
  folder = config.init_from
  towers = sbert.read(folder)
  sources = {
    name: _tower_source(config, found) for name, found in towers.items()
  }
  (first, *others), (source, *_) = towers.values(), sources.values()
  for name, other in zip(list(towers)[1:], others, strict=True):
    backends = source.tokenizer, sources[name].tokenizer
    same = (
      other._replace(head={}, length=None)
      == first._replace(head={}, length=None, body_folder=other.body_folder),
      source.body == sources[name].body,
      len({backend.backend_tokenizer.to_str() for backend in backends}) == 1,
    )
    if not all(same):
      raise config_lib.BadInput(
        'two encoders must be of one size, pooling, similarity and tokenizer; '
        f'found others in {folder}; use another model.'
      )
  params = {
    name: {**sources[name].params['tied'], **found.head}
    for name, found in towers.items()
  }
  settings = {
    'tie_encoders': len(towers) == 1,
    'pooling': first.pooling,
    'similarity': first.similarity,
    'head_size': len(first.head['head']['bias']) if first.head else 0,
    'head_norm': 'head_norm' in first.head,
    'query_prompt': first.prompts[encoders.QUERY],
    'passage_prompt': first.prompts[encoders.PASSAGE],
    **_lengths(towers, sources),
    **_exported(folder),
  }
  shown = ', '.join(f'{name} {value!r}' for name, value in settings.items())
  logs.say(f'{folder}: {shown}{", lower-cased" * first.lower_case}')
  return source._replace(params=params, settings=settings)


def _tower_source(config, found):
  """Returns the `_Source` of the body of a `sbert.SentenceTransformer`."""
  lower_case = config.lower_case
  if lower_case is None and found.lower_case:
    lower_case = True
  return _hugging_face_source(found.body_folder, lower_case)


def _lengths(towers, sources):
  """Returns the settings of lengths that the towers' folders have."""
  lengths = {}
  for side in (encoders.QUERY, encoders.PASSAGE):
    name = side if side in towers else encoders.TIED
    source = sources[name]
    length = towers[name].length or source.tokenizer.model_max_length
    lengths[f'{side}_length'] = min(length, source.body.max_length)
  return lengths


def _exported(folder):
  """Returns the settings of an export of ours that its form cannot hold."""
  path = pathlib.Path(folder) / RETRIEVER_FILE
  if not path.exists():
    return {}
  given = _read_retriever(path)
  names = ('query_length', 'passage_length', 'title_separator', 'head_norm')
  return {name: getattr(given, name) for name in names}
