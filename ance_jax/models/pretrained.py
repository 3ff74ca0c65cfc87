"""The initial retriever, tokenizer and parameters of a run.

They are random, or come from a Hugging Face body, a sentence-transformers
folder, or one of our runs. Also stores a model in a checkpoint's record.
"""

from collections.abc import Iterable
from collections.abc import Sequence
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


class Settings(NamedTuple):
  """Requested source and settings of a retriever.

  None takes the checkpoint's setting, or else the default. See
  `bi_encoder.RetrieverConfig` for attributes not listed here.

  Attributes:
    init_from: One of our runs, a folder, a name on the hub, or two of them
      separated by a comma; '' for random weights.
    checkpoint: Checkpoint of a run: a step, 'last' or 'best'.
    seed: Seed of random weights.
    title_separator: 'space', or 'token' for the tokenizer's separator.
    lower_case: Whether to lower-case texts before tokenizing.
    prefix_space: Whether to put a space before each text.
  """

  init_from: str
  checkpoint: str = 'last'
  seed: int = 0
  tie_encoders: bool | None = None
  pooling: str | None = None
  head_size: int | None = None
  head_norm: bool | None = None
  similarity: str | None = None
  query_length: int | None = None
  passage_length: int | None = None
  title_separator: str | None = None
  query_prompt: str | None = None
  passage_prompt: str | None = None
  lower_case: bool | None = None
  prefix_space: bool | None = None


class Model(NamedTuple):
  """A retriever, its tokenizer, and its parameters by tower (float32)."""

  config: bi_encoder.RetrieverConfig
  tokenizer: tokenizer_lib.Tokenizer
  params: dict


def pinned(init_from: str) -> str:
  """Returns `--init_from` with the commit of each name on the hub added.

  All processes get the first one's commits. Cached files are not fetched again.
  """
  if not init_from or is_run(init_from):
    return init_from
  return distributed.broadcast(lambda: snapshots.pinned(init_from))


def load(
  asked: Settings,
  sizes: sources.Sizes | None = None,
  texts: Iterable[str] = (),
) -> Model:
  """Loads a checkpoint's model, or makes a random one.

  Args:
    asked: Source and settings of the model.
    sizes: Sizes of a random model.
    texts: Texts for a random model's vocabulary, as for `vocabulary.train`.

  Raises:
    BadInput: The checkpoint cannot be used; the message says why.
  """
  if not asked.init_from:
    source = sources.random(sizes, _max_positions(asked), texts)
  elif is_run(asked.init_from):
    source = _run_source(asked)
  else:
    source = sources.read(asked.init_from, asked.lower_case)
  tokenizer_lib.set_flavour(
    source.tokenizer,
    lower_case=asked.lower_case,
    prefix_space=asked.prefix_space,
  )
  config = _retriever_config(asked, source)
  return Model(config, source.tokenizer, _fitted(source, config, asked))


def planned(
  asked: Settings, sizes: sources.Sizes
) -> bi_encoder.RetrieverConfig:
  """Returns the settings of a retriever with random weights."""
  body = sources.planned_body(sizes, _max_positions(asked))
  return _retriever_config(
    # A separator token needs the vocabulary, which does not exist yet.
    asked._replace(title_separator=None),
    sources.Pretrained(body, None, {}, {}),
  )


def _max_positions(asked):
  return max(asked.query_length or 64, asked.passage_length or 512)


def model_files(
  retriever: bi_encoder.RetrieverConfig, tokenizer: tokenizer_lib.Tokenizer
) -> dict[str, bytes]:
  """Returns a model's files by name, without weights, for a record."""
  with tempfile.TemporaryDirectory() as folder:
    tokenizer.save_pretrained(folder)
    files = {
      f'{_MODEL_FOLDER}/{path.name}': path.read_bytes()
      for path in sorted(pathlib.Path(folder).iterdir())
    }
  return {
    **files,
    f'{_MODEL_FOLDER}/{bi_encoder.FILE}': json.dumps(
      retriever.to_dict(), indent=1
    ).encode(),
  }


def load_model(
  workdir: str | pathlib.Path, step: int
) -> tuple[bi_encoder.RetrieverConfig, tokenizer_lib.Tokenizer]:
  """Returns the retriever and tokenizer of a run's checkpoint."""
  checkpoint.read_record(workdir, step)  # Verifies the record.
  folder = checkpoint.record_folder(workdir, step) / _MODEL_FOLDER
  return (
    bi_encoder.read(folder / bi_encoder.FILE),
    tokenizer_lib.load(str(folder)),
  )


def load_whole(
  workdir: str | pathlib.Path, step: int, devices: Sequence[jax.Device]
) -> Model:
  """Returns the model of a run's checkpoint, with parameters on all devices."""
  retriever, tokenizer = load_model(workdir, step)
  params = checkpoint.read_params(
    workdir, step, bi_encoder.shapes(retriever), devices
  )
  return Model(retriever, tokenizer, params)


def is_run(folder: str | pathlib.Path) -> bool:
  """Returns whether a folder holds one of our runs."""
  return checkpoint.are_in(folder)


def _retriever_config(asked, source):
  """Returns the settings: requested, else the checkpoint's, else default."""
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
    # No flags set these.
    'include_prompt': True,
    'layers': (),
    'truncate_dim': 0,
  }
  given = {
    name: value
    for name, value in asked._asdict().items()
    if name in defaults and value is not None
  }
  if 'title_separator' in given:
    given['title_separator'] = tokenizer_lib.title_separator(
      source.tokenizer, asked.title_separator
    )
  chosen = {**defaults, **source.settings, **given}
  if asked.head_size and chosen['layers']:
    raise errors.refusal(
      f'{asked.init_from} has layers of its own after the pooling '
      f'({pooling.described(chosen["layers"])}), so --head_size adds none',
      'leave it out',
    )
  for name in ('query_length', 'passage_length'):
    if chosen[name] > longest:
      raise errors.refusal(
        f'--{name}={chosen[name]} is more than the {longest} tokens that the '
        'model can take',
        'lower it',
      )
  if asked.head_norm is not None and not chosen['head_size']:
    raise errors.refusal(
      f'--head_norm={str(asked.head_norm).lower()} is given without a '
      'projection',
      'set --head_size too, or leave it out',
    )
  tied = chosen.pop('tie_encoders')
  return bi_encoder.RetrieverConfig(
    source.body,
    tied=tied,
    **chosen,
    **_prompt_tokens(source.tokenizer, chosen),
  )


def _prompt_tokens(tokenizer, settings):
  """Returns the number of prompt tokens per side that pooling excludes."""
  if settings['include_prompt']:
    return {}
  return {
    f'{side}_prompt_tokens': tokenizer_lib.prompt_tokens(
      tokenizer, settings[f'{side}_prompt'], settings[f'{side}_length']
    )
    for side in (bi_encoder.QUERY, bi_encoder.PASSAGE)
  }


def _fitted(source, retriever, asked):
  """Returns the retriever's parameters by tower, filled from the source."""
  if retriever.tied and len(source.params) > 1:
    raise errors.refusal(
      f'--tie_encoders=true is given with {asked.init_from}, a checkpoint of '
      'two encoders',
      'leave it out',
    )
  params = bi_encoder.init(retriever, asked.seed)
  for name in retriever.towers:
    tower = source.params.get(name) or next(iter(source.params.values()), {})
    expected = {part: params[name].get(part) for part in tower}
    if jax.tree.map(jnp.shape, tower) != jax.tree.map(jnp.shape, expected):
      raise errors.refusal(
        f'the head of {asked.init_from} does not fit '
        f'--head_size={retriever.head_size}, --pooling={retriever.pooling} and '
        f'--head_norm={str(retriever.head_norm).lower()}',
        'leave them out',
      )
    # Copies: a donated state may not hold one array twice.
    params[name] = {**params[name], **jax.tree.map(jnp.array, tower)}
  return params


def _run_source(asked):
  """Returns one of our runs at its `--checkpoint`, as a source."""
  step, (retriever, tokenizer, params) = checkpoint.read_chosen(
    asked.init_from,
    asked.checkpoint,
    lambda step: load_whole(asked.init_from, step, devices_lib.local(1)),
  )
  logs.log(f'weights of {asked.init_from}, step {step}')
  settings = {
    name: value
    for name, value in vars(retriever).items()
    if name != 'body' and not name.endswith('_prompt_tokens')
  }
  settings['tie_encoders'] = settings.pop('tied')
  return sources.Pretrained(retriever.body, tokenizer, params, settings)
