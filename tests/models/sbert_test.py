"""Folders of sentence-transformers give the numbers that it gives."""

import dataclasses
import json
import shutil

import bert_weights_test
import jax
import needs
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import devices
from ance_jax.jobs import export
from ance_jax.models import bi_encoder
from ance_jax.models import choices
from ance_jax.models import pooling
from ance_jax.models import sbert
from ance_jax.retrieval import retriever
from ance_jax.training import experiment

pytestmark = needs.torch
SIDES = {'query': bi_encoder.QUERY, 'document': bi_encoder.PASSAGE}
TEXTS = [
  'How is a list sorted in place?',
  '  Spaces, and CAPITALS  ',
  'a',
  'b c',
]
PROMPTS = {'query': 'the query: ', 'document': 'a passage: '}
TYPE = 'sentence_transformers.models.'


def torch_modules():
  """sentence-transformers' modules, which it warns of where it moved them."""
  from sentence_transformers.base import modules as base
  from sentence_transformers.sentence_transformer import modules

  return base, modules


def vectors(length=9):
  """(B, L, D) token vectors, and the lengths of texts, 1 to all tokens."""
  x = np.random.default_rng(0).normal(size=(5, length, 4)).astype(np.float32)
  # Where padding is the largest, a maximum over it shows.
  lengths = np.array([length, 1, 4, 2, 7], np.int32)
  x[np.arange(length) >= lengths[:, None]] += 9
  return x, lengths


@pytest.mark.parametrize('skipped', [0, 1, 3])
@pytest.mark.parametrize(
  'modes',
  [*zip(choices.POOLINGS), ('lasttoken', 'cls', 'max', 'mean')],
  ids='+'.join,
)
def test_pooling_is_that_of_sentence_transformers(modes, skipped):
  import torch

  _, modules = torch_modules()
  x, lengths = vectors()
  theirs = modules.Pooling(4, modes, include_prompt=False)
  found = theirs(
    {
      'token_embeddings': torch.tensor(x),
      'attention_mask': torch.tensor(
        (np.arange(x.shape[1]) < lengths[:, None]).astype(np.int64)
      ),
      'prompt_length': skipped,
    }
  )['sentence_embedding'].numpy()
  ours = jax.jit(pooling.pool, static_argnums=(2, 3))(
    x, lengths, modes, skipped
  )
  # Of no tokens its maximum is minus infinity.
  found = np.where(np.isinf(found), 0, found)
  np.testing.assert_allclose(ours, found, atol=1e-6)


@pytest.mark.parametrize('mode', choices.POOLINGS)
def test_gradients_of_texts_that_are_all_prompt_are_finite(mode):
  x, lengths = vectors()
  grad = jax.grad(lambda x: pooling.pool(x, lengths, (mode,), 3).sum())(x)
  assert np.isfinite(grad).all()
  real = np.arange(x.shape[1]) < lengths[:, None]
  assert not np.asarray(grad)[~real].any()


@pytest.mark.parametrize('name', pooling.ACTIVATIONS)
@pytest.mark.filterwarnings('ignore:Implicit dimension')
def test_activations_are_those_of_torch(name):
  import torch

  x = np.random.default_rng(0).normal(0, 3, (40, 7)).astype(np.float32)
  x[0] = [-30, -3, -0.5, 0, 0.5, 3, 30]
  theirs = getattr(torch.nn, name)().eval()(torch.tensor(x)).numpy()
  ours = np.asarray(pooling.ACTIVATIONS[name](x))
  np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=1e-5)


def test_all_activations_of_torch_are_known_or_have_parameters():
  import torch

  others = {
    name
    for name, kind in vars(torch.nn.modules.activation).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.nn.Module)
    and kind.__module__ == torch.nn.modules.activation.__name__
    and name not in pooling.ACTIVATIONS
  }
  assert others == {
    'GLU', 'MultiheadAttention', 'PReLU', 'Softmax2d', 'Threshold'
  }  # fmt: skip


def make(folder, *parts, max_length=40, kind='bert', include=True, **settings):
  """Saves a small model of theirs, and returns it.

  Args:
    folder: Where its body and itself are saved.
    parts: Functions of torch, base modules and modules that make a module.
    settings: Of SentenceTransformer.
  """
  import sentence_transformers
  import torch

  base, modules = torch_modules()
  bert_weights_test.make_torch(kind, folder / 'body')
  body = base.Transformer(str(folder / 'body'), max_seq_length=max_length)
  made = [body, *(part(torch.nn, base, modules) for part in parts)]
  if isinstance(made[1], modules.Pooling):
    made[1].include_prompt = include
  theirs = sentence_transformers.SentenceTransformer(
    modules=made, device='cpu', **settings
  )
  torch.manual_seed(1)
  for parameter in list(theirs.parameters())[len(list(body.parameters())) :]:
    torch.nn.init.normal_(parameter, std=0.3)
  theirs.save(str(folder / 'saved'))
  return theirs


def pooled(*modes):
  return lambda nn, base, modules: modules.Pooling(32, modes)


def dense(takes, gives, activation='Tanh', **settings):
  return lambda nn, base, modules: base.Dense(
    takes, gives, activation_function=getattr(nn, activation)(), **settings
  )


def normalize(nn, base, modules):
  return base.Normalize()


def norm(width):
  return lambda nn, base, modules: modules.LayerNorm(width)


def load(folder, **settings):
  return experiment.load_model(
    config_lib.Config(init_from=str(folder), **settings), ()
  )


def check(model, theirs, sides=SIDES):
  """Holds embeddings and scores against theirs."""
  pairs, made = [], retriever.make(model, devices.local(1))
  encode = {
    bi_encoder.QUERY: made.encode_queries,
    bi_encoder.PASSAGE: made.encode_passages,
  }
  for task, side in sides.items():
    ours = encode[side](TEXTS)
    found = getattr(theirs, f'encode_{task}')(TEXTS, show_progress_bar=False)
    pairs.append((ours, found))
    if model.config.similarity == 'cosine':
      found = found / np.linalg.norm(found, axis=1, keepdims=True)
    scale = np.abs(found).max()
    assert np.ptp(found, axis=0).max() > 1e-3 * scale
    np.testing.assert_allclose(ours / scale, found / scale, atol=1e-5)
  (queries, their_queries), (passages, their_passages) = pairs[0], pairs[-1]
  scores = theirs.similarity(their_queries, their_passages).numpy()
  scale = np.abs(scores).max()
  np.testing.assert_allclose(
    queries @ passages.T / scale, scores / scale, atol=1e-5
  )


MADE = {
  'two projections, a maximum, cut': (
    (
      pooled('cls', 'max'), dense(64, 64, 'ReLU', use_residual=True),
      dense(64, 12, 'GELU', bias=False),
    ),
    {'truncate_dim': 5},
  ),
  'length 1 in between, then cut, by dot product': (
    (
      pooled('lasttoken'), norm(32), normalize, dense(32, 16, 'Identity'),
      normalize,
    ),
    {'truncate_dim': 7, 'similarity_fn_name': 'dot'},
  ),
  'a prompt that is not pooled, in another order': (
    (pooled('weightedmean', 'mean'), normalize),
    {'prompts': PROMPTS, 'include': False, 'similarity_fn_name': 'dot'},
  ),
  'a first token that is not pooled, and a residual': (
    (pooled('cls'), dense(32, 6, 'Identity', use_residual=True)),
    {'prompts': PROMPTS, 'include': False, 'default_prompt_name': 'query',
     'kind': 'roberta', 'max_length': 24},
  ),
  'a projection without bias': (
    (pooled('mean_sqrt_len_tokens'), dense(32, 9, 'Identity', bias=False)),
    {'truncate_dim': 50},
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', MADE)
def test_models_give_their_numbers_here_and_again_as_exported(name, tmp_path):
  import sentence_transformers

  parts, settings = MADE[name]
  theirs = make(tmp_path, *parts, **settings)
  model = load(tmp_path / 'saved')
  check(model, theirs)
  out = tmp_path / 'out'
  out.mkdir()
  export.write(out, model.config, model.params, model.tokenizer)
  again = sentence_transformers.SentenceTransformer(str(out), device='cpu')
  again.max_seq_length = settings.get('max_length', 40)
  for task in SIDES:
    found, expected = (
      getattr(m, f'encode_{task}')(TEXTS, normalize_embeddings=True)
      for m in (again, theirs)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
  assert again.get_embedding_dimension() == model.config.embedding_size
  back = load(out)
  assert back.config == model.config
  jax.tree.map(np.testing.assert_array_equal, back.params, model.params)


def test_old_files_say_the_same(tmp_path):
  """As releases 2 to 4 wrote them, with their ways to name things."""
  theirs = make(
    tmp_path, pooled('max', 'mean'), dense(64, 8), similarity_fn_name='dot'
  )
  saved = tmp_path / 'saved'
  put(saved, '1_Pooling/config.json', {
    'word_embedding_dimension': 32, 'pooling_mode_cls_token': False,
    'pooling_mode_mean_tokens': True, 'pooling_mode_max_tokens': True,
    'pooling_mode_mean_sqrt_len_tokens': False,
  })  # fmt: skip
  put(saved, '2_Dense/config.json', {
    'in_features': 64, 'out_features': 8, 'bias': True,
    'activation_function': 'torch.nn.modules.activation.Tanh',
  })  # fmt: skip
  as_torch_file(saved / '2_Dense')
  as_torch_shards(saved)
  (saved / 'sentence_bert_config.json').unlink()
  put(saved, 'sentence_distilbert_config.json', {'max_seq_length': 40})
  kinds = {'': 'Transformer', '1_Pooling': 'Pooling', '2_Dense': 'Dense'}
  put(saved, 'modules.json', [
    {'idx': i, 'name': str(i), 'path': path, 'type': TYPE + kind}
    for i, (path, kind) in enumerate(kinds.items())
  ])  # fmt: skip
  model = load(saved)
  assert model.config.passage_length == 40
  check(model, theirs, {'document': bi_encoder.PASSAGE})
  # The names that older releases gave it, by the class of the model.
  for length, kind in enumerate(
    'roberta camembert albert xlm-roberta xlnet bert'.split(), 20
  ):
    (path,) = saved.glob('sentence_*_config.json')
    path.unlink()
    put(saved, f'sentence_{kind}_config.json', {'max_seq_length': length})
    assert sbert.read(saved)['tied'].settings['passage_length'] == length
  change(saved, '1_Pooling/config.json', pooling_mode_lasttoken=True)
  with pytest.raises(errors.BadInput, match='but 96 come before it'):
    load(saved)


def put(folder, name, value):
  (folder / name).write_text(json.dumps(value))


def change(folder, name, **values):
  put(folder, name, {**json.loads((folder / name).read_text()), **values})


def torch_tensors(folder):
  import torch

  path = folder / 'model.safetensors'
  arrays = bert_weights_test.load_file(path)
  path.unlink()
  return {name: torch.tensor(array) for name, array in arrays.items()}


def as_torch_file(folder):
  import torch

  torch.save(torch_tensors(folder), folder / 'pytorch_model.bin')


def as_torch_shards(folder):
  import torch

  tensors, named = torch_tensors(folder), {}
  for number in range(2):
    part = {n: t for i, (n, t) in enumerate(tensors.items()) if i % 2 == number}
    file = f'pytorch_model-0000{number + 1}-of-00002.bin'
    torch.save(part, folder / file)
    named |= dict.fromkeys(part, file)
  put(folder, 'pytorch_model.bin.index.json', {'weight_map': named})


def test_each_side_has_its_length_and_lower_case_leaves_spaces(tmp_path):
  import sentence_transformers

  theirs = make(tmp_path, pooled('mean'), kind='roberta')
  saved = tmp_path / 'saved'
  put(saved, 'sentence_bert_config.json', {
    'max_seq_length': 30, 'query_length': 5, 'document_length': 8,
    'do_lower_case': True,
  })  # fmt: skip
  theirs = sentence_transformers.SentenceTransformer(str(saved), device='cpu')
  model = load(saved)
  assert model.config.query_length == 5
  assert model.config.passage_length == 8
  check(model, theirs)
  change(saved, 'sentence_bert_config.json', query_length=None)
  assert load(saved).config.query_length == 30
  put(saved, 'sentence_bert_config.json', {'max_seq_length': None})
  assert load(saved).config.query_length == 40


def test_prompts_are_those_that_each_side_looks_for(
  plain_folder, tmp_path, capsys
):
  saved = shutil.copytree(plain_folder, tmp_path / 'saved')
  for prompts, default, expected in (
    ({'query': 'q', 'document': 'd', 'passage': 'p'}, 'query', ('q', 'd')),
    ({'passage': 'p', 'document': 'd'}, None, ('', 'd')),
    ({'query': 'q', 'document': '', 'corpus': 'c'}, None, ('q', 'c')),
    ({'query': None, 'passage': 'p', 'corpus': 'c'}, 'passage', ('', 'p')),
    ({'a': 'x'}, None, ('', '')),
    ({'a': ''}, 'a', ('', '')),
  ):
    change(
      saved, 'config_sentence_transformers.json', prompts=prompts,
      default_prompt_name=default,
    )  # fmt: skip
    found = sbert.read(saved)['tied'].settings
    assert (found['query_prompt'], found['passage_prompt']) == expected
    printed = capsys.readouterr().out
    assert ('left out: a' in printed) == ('x' in prompts.values())
    assert ('encode_document takes' in printed) == (expected[1] in ('c', 'p'))


@pytest.mark.parametrize(
  ('file', 'values', 'says'),
  [
    (
      '1_Pooling/config.json',
      {'pooling_mode': ['mean', 'x']},
      r"pooling is .'mean', 'x'",
    ),
    ('1_Pooling/config.json', {'include_prompt': 0}, 'include_prompt 0'),
    (
      '2_Dense/config.json',
      {'activation_function': 'torch.nn.modules.activation.PReLU'},
      'Dense with torch.nn.modules.activation.PReLU',
    ),
    (
      '2_Dense/config.json',
      {'activation_function': 'mine.Tanh'},
      'Dense with mine.Tanh',
    ),
    ('2_Dense/config.json', {'activation_function': None}, 'Dense with None'),
    (
      '2_Dense/config.json',
      {'module_input_name': 'token_embeddings'},
      'Dense with module_input_name token_embeddings',
    ),
    (
      '2_Dense/config.json',
      {'module_output_name': 'other'},
      'Dense with module_output_name other',
    ),
    ('2_Dense/config.json', {'use_residual': True}, 'residual.weight .8, 32.'),
    (
      'config_sentence_transformers.json',
      {'truncate_dim': 0},
      "truncate_dim is '0'; set it to a whole number of at least 1",
    ),
    (
      'config_sentence_transformers.json',
      {'similarity_fn_name': 'euclidean'},
      'similarity euclidean',
    ),
    (
      'config_sentence_transformers.json',
      {'prompts': {'a': 'x'}, 'default_prompt_name': 'a'},
      'a prompt for all texts, a',
    ),
    (
      'sentence_bert_config.json',
      {'transformer_task': 'fill-mask'},
      'transformer_task fill-mask',
    ),
    (
      'sentence_bert_config.json',
      {'processing_kwargs': {'text': {'max_length': 3}}},
      'processing_kwargs',
    ),
    (
      'sentence_bert_config.json',
      {'tokenizer_args': {'model_max_length': 3}},
      'tokenizer_args model_max_length',
    ),
    ('sentence_bert_config.json', {'max_seq_length': 2}, 'of at least 3'),
    ('adapter_config.json', {'peft_type': 'LORA'}, 'is an adapter'),
  ],
)
def test_what_is_not_computed_here_is_refused_by_name(
  file, values, says, plain_folder, tmp_path
):
  saved = shutil.copytree(plain_folder, tmp_path / 'saved')
  if not (saved / file).exists():
    put(saved, file, {})
  change(saved, file, **values)
  with pytest.raises(errors.BadInput, match=says):
    load(saved)


@pytest.fixture(scope='module')
def plain_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('plain')
  make(folder, pooled('mean'), dense(32, 8), prompts=PROMPTS)
  return folder / 'saved'


def test_flags_do_not_add_to_the_layers_of_a_checkpoint(plain_folder):
  with pytest.raises(errors.BadInput, match='has layers of its own'):
    load(plain_folder, head_size=4)
  with pytest.raises(
    errors.BadInput, match='--head_norm=true is given without'
  ):
    load(plain_folder, head_norm=True)
  assert load(plain_folder, pooling='max').config.pooling == 'max'


@pytest.mark.parametrize(
  ('file', 'values'),
  [
    ('config_sentence_transformers.json', {'truncate_dim': 4}),
    ('config_sentence_transformers.json', {'similarity_fn_name': 'dot'}),
    ('1_Pooling/config.json', {'pooling_mode': 'max'}),
    ('1_Pooling/config.json', {'include_prompt': False}),
    (
      '2_Dense/config.json',
      {'activation_function': 'torch.nn.modules.activation.ReLU'},
    ),
  ],
)
def test_two_encoders_are_pooled_and_cut_alike(
  file, values, plain_folder, tmp_path
):
  other = shutil.copytree(plain_folder, tmp_path / 'saved')
  prompts = {'query': 'its own ', 'document': 'its '}
  change(other, 'config_sentence_transformers.json', prompts=prompts)
  change(other, 'sentence_bert_config.json', max_seq_length=24)
  r = load(f'{plain_folder},{other}').config
  assert (r.query_prompt, r.passage_prompt) == (PROMPTS['query'], 'its ')
  assert (r.query_length, r.passage_length) == (40, 24)
  assert not r.tied
  change(other, file, **values)
  with pytest.raises(errors.BadInput, match='differ in their pooling'):
    load(f'{plain_folder},{other}')


def test_a_router_by_mappings_is_refused(plain_folder, tmp_path):
  saved = shutil.copytree(plain_folder, tmp_path / 'saved')
  kinds = {'': 'Transformer', '1_Pooling': 'Pooling'}
  put(saved, 'modules.json', [{'path': '', 'type': f'{TYPE}Router'}])
  router = {
    'types': {path: TYPE + kind for path, kind in kinds.items()},
    'structure': dict.fromkeys(('query', 'document'), list(kinds)),
  }
  put(saved, 'router_config.json', router)
  assert not load(saved).config.tied
  mappings = {'route_mappings': {"('query', None)": 'document'}}
  put(saved, 'router_config.json', {**router, 'parameters': mappings})
  with pytest.raises(errors.BadInput, match='a Router with route_mappings'):
    load(saved)


def test_a_prompt_is_left_out_however_it_came(plain_folder, tmp_path):
  """Of a flag, too; not with pieces, of which one alone has it."""
  saved = shutil.copytree(plain_folder, tmp_path / 'saved')
  change(saved, '1_Pooling/config.json', include_prompt=False)
  r = load(saved).config
  counts = (r.query_prompt_tokens, r.passage_prompt_tokens)
  tokenizer = load(saved).tokenizer
  assert tokenizer.backend_tokenizer.truncation is None
  # [CLS], and all of the prompt but not [SEP].
  expected = [len(tokenizer(PROMPTS[t])['input_ids']) - 1 for t in SIDES]
  assert list(counts) == expected
  assert expected[0] > 3
  other = load(saved, query_prompt='q ', passage_prompt='').config
  assert other.query_prompt_tokens < counts[0]
  assert other.passage_prompt_tokens == 0
  assert load(saved, query_length=5).config.query_prompt_tokens == 4
  with pytest.raises(errors.BadInput, match='use --chunks=1'):
    retriever.check_chunks(r, 2)
  retriever.check_chunks(other, 2)


def test_retrievers_of_earlier_runs_are_read():
  values = weights_test_retriever().to_dict()
  for new in (
    'include_prompt', 'query_prompt_tokens', 'passage_prompt_tokens', 'layers',
    'truncate_dim',
  ):  # fmt: skip
    del values[new]
  assert (
    bi_encoder.RetrieverConfig.from_dict(values) == weights_test_retriever()
  )


def weights_test_retriever():
  return bi_encoder.RetrieverConfig(
    bert_weights_test.BODY, True, 'mean', 6, True, 'cosine', 12, 12, ' '
  )


def test_widths_are_those_that_come_out():
  r = weights_test_retriever()
  for changes, width in (
    ({}, 6),
    ({'truncate_dim': 4}, 4),
    ({'truncate_dim': 8}, 6),
    ({'head_size': 0}, 16),
    ({'head_size': 0, 'pooling': 'cls+max'}, 32),
    ({'head_size': 0, 'pooling': 'cls+max', 'truncate_dim': 31}, 31),
  ):
    changed = dataclasses.replace(r, **changes)
    assert changed.embedding_size == width
    run = bi_encoder.make_encode(changed, 'float32', bi_encoder.QUERY)
    lengths = np.array([3, 2], np.int32)
    made = jax.eval_shape(
      run, bi_encoder.shapes(changed), np.ones((2, 3), np.int32), lengths
    )
    assert made.shape == (2, width)
