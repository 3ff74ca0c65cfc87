"""Exports a retriever for sentence-transformers: `--job=export`.

The folder needs no custom code and has a model card. On request it also holds
the corpus: embeddings, ids, and an index for FAISS.
"""

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from safetensors import numpy as safetensors_numpy

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import devices as devices_lib
from ance_jax.core import logs
from ance_jax.core import workdirs
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.jobs import report
from ance_jax.models import bert_weights
from ance_jax.models import bi_encoder
from ance_jax.models import huggingface
from ance_jax.models import pretrained
from ance_jax.models import sbert
from ance_jax.models import sbert_modules
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import index
from ance_jax.training import experiment

# Package of the modules' types that all releases since 5 accept.
_TYPES = 'sentence_transformers.models.'


def run(config: config_lib.Config) -> pathlib.Path:
  """Exports a run's `--checkpoint` or `--init_from`, and returns the folder."""
  workdirs.require(config)
  if config.output:
    _check_free(pathlib.Path(config.output), config)
  model, step, settings = _model(config)
  folder = pathlib.Path(config.output or f'{config.workdir}/export-{step}')
  _check_free(folder, config)
  logs.log(f'exporting step {step} to {folder}')
  with atomic.publish(folder, {'step': step}) as unfinished:
    write(unfinished, model.config, model.params, model.tokenizer)
    (unfinished / bi_encoder.FILE).write_text(
      json.dumps(model.config.to_dict(), indent=1)
    )
    facts = _facts(settings, model, step)
    _write_json(unfinished / 'run.json', facts)
    (unfinished / 'README.md').write_text(card(settings, model, facts))
    curves = pathlib.Path(settings.workdir) / 'curves.png'
    if curves.exists():
      (unfinished / 'curves.png').write_bytes(curves.read_bytes())
    if config.export_corpus:
      _write_corpus(unfinished / 'corpus', config)
  logs.log(f'exported: {folder}')
  return folder


def card(
  config: config_lib.Config, model: pretrained.Model, facts: dict[str, Any]
) -> str:
  """Returns the model card in Markdown.

  Args:
    config: Settings that the model was trained with.
    model: The exported model.
    facts: Contents of `run.json`.
  """
  r = model.config
  trained = experiment.is_run(config.workdir)
  base = config.init_from or 'random weights'
  lines = [
    '---',
    'library_name: sentence-transformers',
    'pipeline_tag: sentence-similarity',
    'tags: [sentence-transformers, dense-retrieval, ance_jax]',
    '---',
    f'# {pathlib.Path(config.workdir).name}, step {facts["step"]}',
    '',
    f'A dense retriever ({r.body.model_type}, {r.body.num_layers} layers, '
    f'width {r.body.hidden_size}; {"one tower" if r.tied else "two towers"}, '
    f'{r.pooling} pooling, embeddings of {r.embedding_size} compared by '
    f'{r.similarity}), '
    + (
      f'trained by ance_jax with `--method={config.method}` on '
      f'`{config.dataset}`, starting from {base}.'
      if trained
      else f'as it was in {base}.'
    ),
    '',
    '```python',
    'from sentence_transformers import SentenceTransformer',
    'model = SentenceTransformer(FOLDER)',
    'scores = model.similarity(',
    '  model.encode_query(QUERIES), model.encode_document(PASSAGES)',
    ')',
    '```',
    '',
    f'A passage is its title, {r.title_separator!r} and its text. Passages are '
    f'cut at {r.passage_length} tokens, queries at {r.query_length}'
    + (
      f'; the folder has one length, {r.passage_length}, for both.'
      if r.tied and r.query_length != r.passage_length
      else '.'
    ),
    '',
    f'Licence: that of {base}, and of the data.'
    if config.init_from
    else 'Licence: that of the data.',
  ]
  if trained:
    lines += [
      '', '## Dev', '', '```', report.table(config.workdir), '```', '',
      '![curves](curves.png)'
    ]  # fmt: skip
  flags = [f'--{name}={value}' for name, value in facts['flags'].items()]
  return '\n'.join([*lines, '', '## Flags', '', '```', *flags, '```', ''])


def write(
  folder: pathlib.Path,
  retriever: bi_encoder.RetrieverConfig,
  params: dict,
  tokenizer: tokenizer_lib.Tokenizer,
) -> None:
  """Writes a retriever for sentence-transformers, without custom code.

  A tied retriever is one model; two towers are two models, in query/ and
  passage/, which a Router in the folder combines.

  Args:
    folder: Empty folder to write to.
    retriever: Settings of the retriever.
    params: Parameters by tower.
    tokenizer: Tokenizer of queries and passages.
  """
  if retriever.tied:
    _write_tower(
      folder, retriever, params[bi_encoder.TIED], tokenizer,
      retriever.passage_length
    )  # fmt: skip
  else:
    types, structure = {}, {}
    for route, name in sbert.ROUTES.items():
      (folder / name).mkdir()
      length = getattr(retriever, f'{name}_length')
      kinds = _write_tower(
        folder / name, retriever, params[name], tokenizer, length
      )
      parts = {str(pathlib.PurePath(name, part)): kinds[part] for part in kinds}
      types |= parts
      structure[route] = list(parts)
    _write_json(
      folder / 'router_config.json',
      {
        'types': types,
        'structure': structure,
        'parameters': {'default_route': 'document', 'allow_empty_key': True},
      },
    )
    _write_settings(folder, retriever, {'': f'{_TYPES}Router'})


def _model(config):
  """Returns the model, with parameters on the host, its step and settings."""
  if experiment.is_run(config.workdir):
    step, (settings, model) = checkpoint.read_chosen(
      config.workdir,
      config.checkpoint,
      lambda step: (
        experiment.settings(config.workdir, step),
        pretrained.load_whole(config.workdir, step, devices_lib.local(1)),
      ),
    )
    # The folder may have moved since training.
    settings = dataclasses.replace(settings, workdir=config.workdir)
  elif config.init_from:
    settings, step = experiment.pinned(config)
    model = experiment.load_model(settings)
    if pretrained.is_run(config.init_from):
      settings = dataclasses.replace(
        experiment.settings(config.init_from, step), workdir=config.init_from
      )
  else:
    raise errors.refusal(
      f'nothing to export: no run in {config.workdir}, and no --init_from',
      'set one of the two',
    )
  return model._replace(params=jax.device_get(model.params)), step, settings


def _check_free(folder, config):
  """Raises `BadInput` if the folder cannot be made or must not be replaced."""
  there = os.path.lexists(folder)
  if there and not config.overwrite:
    raise errors.refusal(
      f'{folder} is there already', 'name another --output, or set --overwrite'
    )
  # Each checkpoint of a run also has a manifest.
  ours = atomic.is_committed(folder) and (folder / bi_encoder.FILE).is_file()
  if there and (not ours or folder.is_symlink()):
    raise errors.refusal(
      f'{folder} is not what an export wrote, and --overwrite replaces nothing '
      'else',
      'name another --output',
    )
  try:
    atomic.make_folder(folder.parent)
  except (NotADirectoryError, FileExistsError) as error:
    raise errors.refusal(
      f'the folder of {folder} cannot be made ({error})',
      'name another --output',
    ) from error


def _facts(config, model, step):
  """Returns run.json's step, hash, flags, command, versions and metrics."""
  flags = config.to_flagfile().split('\n')[:-1]
  return {
    'step': step,
    'weights': checkpoint.weights_hash(model.params),
    'flags': dict(line[2:].split('=', 1) for line in flags),
    'command': sys.argv,
    'made with': devices_lib.describe(devices_lib.local(1)),
    'dev': {
      name: dict(sorted(values.items()))
      for name in logs.dev_measures(config.workdir)
      if (values := logs.series(config.workdir, name))
    },
  }


def _write_corpus(folder, config):
  """Writes the embeddings of the corpus, its ids, and a FAISS index.

  Row i of the index and of the concatenated .npy files is the passage in line i
  of ids.txt, or a piece of it if documents are cut into pieces.
  """
  this, _ = experiment.open(config, ())
  if config.index == corpus_index.ON_DEVICES:
    # An index on devices cannot be saved; FAISS's Flat is also exact.
    this = this._replace(config=dataclasses.replace(this.config, index='Flat'))
  indexed = this.index_corpus(logs.Stopwatch())
  folder.mkdir()
  index.write(indexed.passage_index, folder / 'index.faiss')
  corpus_index.write_ids(folder / 'ids.txt', this.dataset)
  kept = this.embeddings_folder(indexed.passage_hash)
  for block in sorted(kept.glob('[0-9]*/embeddings.npy')):
    (folder / f'{block.parent.name}.npy').write_bytes(block.read_bytes())


def _write_tower(folder, retriever, params, tokenizer, length):
  """Writes a tower as one model; returns {path: type} of its modules."""
  body = retriever.body
  huggingface.write_config(folder, body, tokenizer.pad_token_id)
  safetensors_numpy.save_file(
    bert_weights.body_to_tensors(params['body'], body),
    folder / 'model.safetensors',
    metadata={'format': 'pt'},
  )
  tokenizer_lib.save(
    tokenizer, folder, max_length=length, token_types=bool(body.num_types)
  )
  _write_json(
    folder / 'sentence_bert_config.json',
    {'max_seq_length': length, 'do_lower_case': False},
  )
  parts = sbert_modules.written(retriever, params)
  types = {'': f'{_TYPES}Transformer'}
  for number, (kind, settings, tensors) in enumerate(parts, 1):
    path = f'{number}_{kind}'
    types[path] = _TYPES + kind
    (folder / path).mkdir()
    _write_json(folder / path / 'config.json', settings)
    if tensors:
      arrays = {n: np.ascontiguousarray(a) for n, a in tensors.items()}
      safetensors_numpy.save_file(arrays, folder / path / 'model.safetensors')
  _write_settings(folder, retriever, types)
  return types


def _write_settings(folder, retriever, types):
  """Writes the list of a model's modules, {path: type}, and its settings."""
  _write_json(
    folder / 'modules.json',
    [
      {'idx': number, 'name': str(number), 'path': path, 'type': kind}
      for number, (path, kind) in enumerate(types.items())
    ],
  )
  settings = {
    'model_type': 'SentenceTransformer',
    'prompts': {
      'query': retriever.query_prompt,
      'document': retriever.passage_prompt,
    },
    'default_prompt_name': None,
    'similarity_fn_name': retriever.similarity,
  }
  if retriever.truncate_dim:
    settings['truncate_dim'] = retriever.truncate_dim
  _write_json(folder / sbert.SETTINGS_FILE, settings)


def _write_json(path, value):
  path.write_text(json.dumps(value, indent=2) + '\n')
