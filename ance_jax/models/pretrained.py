"""What a run starts from: retriever, tokenizer and parameters.

Random, a body or a sentence-transformers folder of Hugging Face, or a run of
ours; and how a model lies in a checkpoint's record.
"""

import dataclasses
import json
import pathlib
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ance_jax import errors
from ance_jax.core import checkpoint
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.models import bi_encoder
from ance_jax.models import pooling
from ance_jax.models import snapshots
from ance_jax.models import sources

_MODEL_FOLDER = 'model'


class Model(NamedTuple):
  """A retriever, its tokenizer, and its parameters by tower (float32)."""

  retriever: bi_encoder.Retriever
  tokenizer: tokenizer_lib.Tokenizer
  params: dict


def pinned(config):
  """Returns the `Config` with the commit of each name of the hub in it.

  All processes get that of the first. What is fetched is not fetched again.
  """
  if not config.init_from or is_run(config.init_from):
    return config
  names = distributed.told(lambda: snapshots.pinned(config.init_from))
  return dataclasses.replace(config, init_from=names)


def load(config, texts):
  """Returns the `Model` that a run starts from.

  Args:
    config: The run's; flags on the encoder that are given go before what the
      checkpoint brings with it.
    texts: The corpus's texts, as for `vocabulary.train`, if none is given.

  Raises:
    BadInput: The checkpoint cannot be used; the text says why.
  """
  if not config.init_from:
    source = sources.random(config, texts)
  elif is_run(config.init_from):
    source = _run_source(config)
  else:
    source = sources.read(config.init_from, config.lower_case)
  tokenizer_lib.set_flavour(
    source.tokenizer,
    lower_case=config.lower_case,
    prefix_space=config.prefix_space,
  )
  retriever = _retriever(config, source)
  return Model(retriever, source.tokenizer, _fitted(source, retriever, config))


def planned(config):
  """Returns the `Retriever` that a run without `--init_from` would train."""
  body = sources.planned_body(config)
  # A separator token is the vocabulary's, which is not made here.
  config = dataclasses.replace(config, title_separator=None)
  return _retriever(config, sources.Source(body, None, {}, {}))


def model_files(retriever, tokenizer):
  """Returns {name: bytes} of all of a model but its weights, for a record."""
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save_pretrained(folder)
    files = {
      f'{_MODEL_FOLDER}/{path.name}': path.read_bytes()
      for path in sorted(pathlib.Path(folder).iterdir())
    }
  retriever = json.dumps(retriever.to_dict(), indent=1)
  return {**files, f'{_MODEL_FOLDER}/{bi_encoder.FILE}': retriever.encode()}


def load_model(workdir, step):
  """Returns the retriever and tokenizer of a run's checkpoint."""
  checkpoint.read_record(workdir, step)  # Which checks it.
  folder = checkpoint.record_folder(workdir, step) / _MODEL_FOLDER
  retriever = bi_encoder.read(folder / bi_encoder.FILE)
  return retriever, tokenizer_lib.load(str(folder))


def load_whole(workdir, step, devices):
  """Returns the `Model` of a run's checkpoint, on all devices."""
  retriever, tokenizer = load_model(workdir, step)
  shapes = bi_encoder.shapes(retriever)
  params = checkpoint.read_params(workdir, step, shapes, devices)
  return Model(retriever, tokenizer, params)


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
  brought = {'include_prompt': True, 'layers': (), 'truncate_dim': 0}
  chosen = {**defaults, **brought, **source.settings, **given}
  if config.head_size and chosen['layers']:
    raise errors.BadInput(
      f'{config.init_from} has layers of its own behind the pooling '
      f'({pooling.described(chosen["layers"])}), so --head_size adds none; '
      'leave it out.'
    )
  for name in ('query_length', 'passage_length'):
    if chosen[name] > longest:
      raise errors.BadInput(
        f'--{name} must be at most the {longest} tokens that the model can '
        f'take; found {chosen[name]}; lower it.'
      )
  if config.head_norm is not None and not chosen['head_size']:
    raise errors.BadInput(
      '--head_norm must be with a projection; found it '
      f'{str(config.head_norm).lower()} without one; set --head_size too, or '
      'leave it out.'
    )
  tied = chosen.pop('tie_encoders')
  unpooled = _prompt_tokens(config, source.tokenizer, chosen)
  return bi_encoder.Retriever(source.body, tied=tied, **chosen, **unpooled)


def _prompt_tokens(config, tokenizer, settings):
  """Returns how many tokens of each side's prompt are not pooled, by name."""
  if settings['include_prompt']:
    return {}
  if config.chunks > 1 and settings['passage_prompt']:
    raise errors.BadInput(
      f'{config.init_from} leaves its prompt out of the pooling, and with '
      '--chunks only the first piece of a passage has one; use --chunks=1.'
    )
  return {
    f'{side}_prompt_tokens': tokenizer_lib.prompt_tokens(
      tokenizer, settings[f'{side}_prompt'], settings[f'{side}_length']
    )
    for side in (bi_encoder.QUERY, bi_encoder.PASSAGE)
  }


def _fitted(source, retriever, config):
  """Returns the parameters of the source in the towers of the retriever."""
  given = source.params
  if retriever.tied and len(given) > 1:
    raise errors.BadInput(
      '--tie_encoders must be false for a checkpoint of two encoders; found it '
      f'true with {config.init_from}; leave it out.'
    )
  params = bi_encoder.init(retriever, config.seed)
  for name in retriever.towers:
    tower = given.get(name) or next(iter(given.values()), {})
    expected = {part: params[name].get(part) for part in tower}
    if jax.tree.map(jnp.shape, tower) != jax.tree.map(jnp.shape, expected):
      raise errors.BadInput(
        '--head_size, --head_norm and --pooling must be those of the '
        f'checkpoint, where it has a head; found {retriever.head_size}, '
        f'{retriever.head_norm} and {retriever.pooling} with '
        f'{config.init_from}; leave them out.'
      )
    # Copies: a donated state may not hold one array twice.
    params[name] = {**params[name], **jax.tree.map(jnp.array, tower)}
  return params


def _run_source(config):
  """Returns a run of ours, at its `--checkpoint`."""
  step, (retriever, tokenizer, params) = checkpoint.read_chosen(
    config.init_from,
    config.checkpoint,
    lambda step: load_whole(config.init_from, step, devices_lib.local(1)),
  )
  logs.say(f'weights of {config.init_from}, step {step}')
  settings = {
    field.name: getattr(retriever, field.name)
    for field in dataclasses.fields(retriever)
    if field.name != 'body' and not field.name.endswith('_prompt_tokens')
  }
  settings['tie_encoders'] = settings.pop('tied')
  return sources.Source(retriever.body, tokenizer, params, settings)
