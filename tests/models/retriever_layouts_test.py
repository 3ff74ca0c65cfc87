"""Retrievers as others save them give the embeddings that torch gives."""

import json
import shutil
import sys

import bert_weights_test
import needs
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file
import transformers

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax import flags
from ance_jax.data import tokens
from ance_jax.models import bi_encoder
from ance_jax.models import pretrained
from ance_jax.models import torch_files
from ance_jax.training import experiment

pytestmark = needs.torch
SIDES = (bi_encoder.QUERY, bi_encoder.PASSAGE)


def embed(model, ids, real, side):
  """Returns the embeddings of padded token ids."""
  encode_them = bi_encoder.make_encode(model.config, 'float32', side)
  return np.asarray(encode_them(model.params, ids, real.sum(1)))


def randomized(module, seed):
  import torch

  torch.manual_seed(seed)
  for parameter in module.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
  return module.eval()


def outputs(module, ids, real):
  import torch

  with torch.no_grad():
    return module(**bert_weights_test.torch_inputs(ids, real))


def arrays(module):
  return {
    name: tensor.detach().numpy().copy()
    for name, tensor in module.state_dict().items()
  }


def make_ance(folder):
  """A checkpoint of ANCE's class, and its embeddings of ids."""
  import torch

  body = bert_weights_test.make_torch('roberta', folder)
  head = randomized(torch.nn.Linear(32, 20), 1)
  norm = randomized(torch.nn.LayerNorm(20), 2)
  unused = randomized(torch.nn.Linear(32, 32), 3)
  tensors = {}
  for prefix, module in (
    ('roberta', body),
    ('embeddingHead', head),
    ('norm', norm),
    ('classifier.dense', unused),
  ):
    tensors |= {f'{prefix}.{n}': a for n, a in arrays(module).items()}
  save_file(tensors, folder / 'model.safetensors')

  def theirs(ids, real):
    with torch.no_grad():
      first = outputs(body, ids, real).last_hidden_state[:, 0]
      return norm(head(first)).numpy()

  return theirs


def make_dpr(folder, side, seed, projection=12):
  """An encoder of DPR's as the hub has it, and its embeddings of ids."""
  bert_weights_test.make_torch('bert', folder, positions=300)
  config = transformers.DPRConfig.from_json_file(folder / 'config.json')
  config.projection_dim = projection
  classes = {
    bi_encoder.QUERY: transformers.DPRQuestionEncoder,
    bi_encoder.PASSAGE: transformers.DPRContextEncoder,
  }
  model = randomized(classes[side](config), seed)
  model.save_pretrained(folder)
  return model, lambda ids, real: outputs(
    model, ids, real
  ).pooler_output.numpy()


def check(model, side, theirs, kind):
  ids, real = bert_weights_test.ragged(kind, np.array([7, 3, 12, 1, 9]), 12)
  ours, found = embed(model, ids, real, side), theirs(ids, real)
  scale = np.abs(found).max()
  # One text's embedding is none of another's.
  assert np.ptp(found, axis=0).max() > 1e-3 * scale
  np.testing.assert_allclose(ours / scale, found / scale, atol=1e-5)


def load(**settings):
  return experiment.load_model(config_lib.Config(**settings), ())


def test_ance_has_its_head_its_norm_and_its_tokenizer(tmp_path, capsys):
  theirs = make_ance(tmp_path)
  model = load(init_from=tmp_path)
  r = model.config
  assert (r.head_size, r.head_norm, r.pooling, r.tied) == (
    20,
    True,
    'cls',
    True,
  )
  assert (r.similarity, r.query_length, r.passage_length) == ('dot', 64, 160)
  check(model, bi_encoder.QUERY, theirs, 'roberta')
  lower, upper = (
    tokens.memory_rows(model.tokenizer, [text], 9).ids for text in ('ab', 'AB')
  )
  assert lower.tolist() == upper.tolist()
  assert 'texts are lower-cased' in capsys.readouterr().out


@pytest.fixture(scope='module')
def ance_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('ance')
  make_ance(folder)
  return folder


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    ({'norm.weight': None}, 'norm.weight;'),
    ({'embeddingHead.bias': None}, 'embeddingHead.bias;'),
    ({'norm.weight': None, 'norm.bias': None}, 'norm.weight;'),
    (
      {'roberta.embeddings.LayerNorm.bias': None},
      'embeddings.LayerNorm.bias is missing',
    ),
    ({'more': np.zeros(3)}, 'tensor more, which its layout'),
    ({'roberta.more': np.zeros(3)}, 'tensor more does not belong'),
    (
      {'norm.weight': np.zeros(3)},
      r'head_norm of shapes .* not .\(20,\), \(20,\)',
    ),
    (
      {'embeddingHead.weight': np.zeros((20, 9))},
      r'a head of shapes .*, not .\(32, 20\)',
    ),
    ({'norm.bias': np.full(20, np.nan)}, '20 of 20 values of tensor norm.bias'),
  ],
)
def test_ance_with_other_tensors_is_refused(
  change, says, ance_folder, tmp_path
):
  folder = shutil.copytree(ance_folder, tmp_path / 'ance')
  tensors = {**load_file(folder / 'model.safetensors'), **change}
  kept = {n: np.float32(a) for n, a in tensors.items() if a is not None}
  save_file(kept, folder / 'model.safetensors')
  with pytest.raises(errors.BadInput, match=says):
    load(init_from=folder)


def test_two_encoders_of_dpr_are_read_in_their_order(tmp_path):
  made = {
    side: make_dpr(tmp_path / side, side, seed)[1]
    for seed, side in enumerate(SIDES)
  }
  query, passage = (str(tmp_path / side) for side in SIDES)
  model = load(init_from=f'{query},{passage}')
  r = model.config
  assert (r.head_size, r.head_norm, r.tied) == (12, False, False)
  assert r.title_separator == model.tokenizer.sep_token
  for side in SIDES:
    check(model, side, made[side], 'bert')
  with pytest.raises(
    errors.BadInput, match='where the query encoder belongs; name the enc'
  ):
    load(init_from=f'{passage},{query}')
  # That of the papers has no projection.
  theirs = make_dpr(tmp_path / 'plain', bi_encoder.PASSAGE, 3, projection=0)[1]
  plain = load(init_from=tmp_path / 'plain')
  assert (plain.config.query_length, plain.config.passage_length) == (256, 256)
  check(plain, bi_encoder.QUERY, theirs, 'bert')
  alone = load(init_from=query)
  assert alone.config.tied
  check(alone, bi_encoder.PASSAGE, made[bi_encoder.QUERY], 'bert')


def test_a_checkpoint_of_dprs_own_code_is_a_file_beside_a_config(tmp_path):
  import torch

  states, made = {}, {}
  for seed, side in enumerate(SIDES):
    model, made[side] = make_dpr(tmp_path / side, side, seed)
    theirs = 'question' if side == bi_encoder.QUERY else 'ctx'
    for name, tensor in model.state_dict().items():
      name = name.removeprefix(f'{theirs}_encoder.').removeprefix('bert_model.')
      states[f'{theirs}_model.{name}'] = tensor
  folder = tmp_path / bi_encoder.QUERY
  (folder / 'model.safetensors').unlink()
  path = tmp_path / bi_encoder.QUERY / 'dpr.cp'
  torch.save(
    {
      'model_dict': states,
      'optimizer_dict': {'state': {}, 'param_groups': []},
      'scheduler_dict': {'last_epoch': 3},
      'offset': 0,
      'epoch': 1,
      'encoder_params': {'pretrained_model_cfg': 'bert-base-uncased'},
    },
    path,
  )
  model = load(init_from=path)
  assert not model.config.tied
  for side in SIDES:
    check(model, side, made[side], 'bert')
  del states['ctx_model.encode_proj.weight']
  torch.save({'model_dict': states}, path)
  with pytest.raises(errors.BadInput, match='ctx_model.encode_proj.weight'):
    load(init_from=path)
  del states['ctx_model.encode_proj.bias']
  torch.save({'model_dict': states}, path)
  with pytest.raises(
    errors.BadInput, match='projection in one of its two encoders'
  ):
    load(init_from=path)


def test_a_body_in_a_file_of_torch_is_read(tmp_path):
  import torch

  body = bert_weights_test.make_torch('distilbert', tmp_path)
  (tmp_path / 'model.safetensors').unlink()
  # As older releases wrote them, and trainers do.
  states = {**body.state_dict(), 'embeddings.position_ids': torch.arange(160)}
  torch.save({'state_dict': states, 'step': 3}, tmp_path / 'pytorch_model.bin')
  model = load(init_from=tmp_path)
  check(
    model,
    bi_encoder.QUERY,
    lambda *args: outputs(body, *args).last_hidden_state[:, 0].numpy(),
    'distilbert',
  )
  torch.save({'a': 3}, tmp_path / 'pytorch_model.bin')
  with pytest.raises(errors.BadInput, match=r"only float tensors \(int 'a'\)"):
    load(init_from=tmp_path)


@pytest.mark.parametrize(
  ('name', 'kind', 'pooling', 'lengths'),
  [
    ('eval_contriever', 'bert', 'mean', (512, 512)),
    ('eval_tas_b', 'distilbert', 'cls', (64, 256)),
  ],
)
def test_a_plain_body_is_pooled_and_cut_as_its_flagfile_says(
  name, kind, pooling, lengths, tmp_path
):
  body = bert_weights_test.make_torch(kind, tmp_path, positions=512)
  settings = flags.from_flagfile(
    f'experiments/{name}.flags', init_from=tmp_path
  )
  model = experiment.load_model(settings, ())
  assert (model.config.similarity, model.config.head_size) == ('dot', 0)
  for side, length in zip(SIDES, lengths, strict=True):
    check_texts(model, side, body, tmp_path, pooling, length)


def test_two_plain_bodies_are_two_encoders_as_rocketqa_has_them(tmp_path):
  """First tokens of 32 and 128, a title and its text being a pair.

  Not shown: released weights of it, which are Paddle's, of ERNIE.
  """
  bodies = [
    bert_weights_test.make_torch('bert', tmp_path / side, seed=seed)
    for seed, side in enumerate(SIDES)
  ]
  model = load(
    init_from=','.join(str(tmp_path / side) for side in SIDES),
    query_length=32,
    passage_length=128,
    title_separator='token',
  )
  assert not model.config.tied
  assert model.config.title_separator == model.tokenizer.sep_token
  for side, body, length in zip(SIDES, bodies, (32, 128), strict=True):
    check_texts(model, side, body, tmp_path / side, 'cls', length)


def check_texts(model, side, body, folder, pooling, length):
  """Holds the embeddings of texts against torch's, pooled and cut there."""
  import torch

  texts = [*bert_weights_test.TEXTS, 'A Title [SEP] The Text', 'one', 'ONE']
  theirs = transformers.AutoTokenizer.from_pretrained(folder)(
    texts, truncation=True, max_length=length, padding=True, return_tensors='pt'
  )
  assert theirs['input_ids'].shape[1] == min(length, 402)
  mask = theirs['attention_mask']
  with torch.no_grad():
    hidden = body(
      input_ids=theirs['input_ids'], attention_mask=mask
    ).last_hidden_state
  found = hidden[:, 0]
  if pooling == 'mean':
    found = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
  rows = tokens.memory_rows(
    model.tokenizer, texts, getattr(model.config, f'{side}_length')
  )
  ids, lengths = rows.padded(np.arange(len(texts)), rows.lengths().max())
  real = np.arange(ids.shape[1]) < lengths[:, None]
  ours, found = embed(model, ids, real, side), found.numpy()
  scale = np.abs(found).max()
  assert np.ptp(found, axis=0).max() > 1e-3 * scale
  np.testing.assert_allclose(ours / scale, found / scale, atol=1e-5)


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'hidden_act': 'relu'}, 'differ in their sizes'),
    ({'tokenizer': 'another'}, 'differ in their tokenizers'),
  ],
)
def test_two_encoders_must_go_together(changes, says, tmp_path):
  for side in SIDES:
    bert_weights_test.make_torch('bert', tmp_path / side)
  other = tmp_path / bi_encoder.PASSAGE
  if 'tokenizer' in changes:
    tokenizer = pretrained.tokenizer_lib.train_vocabulary(['other words'], 60)
    tokenizer.save_pretrained(other)
  else:
    values = json.loads((other / 'config.json').read_text())
    (other / 'config.json').write_text(json.dumps({**values, **changes}))
  names = ','.join(str(tmp_path / side) for side in SIDES)
  with pytest.raises(errors.BadInput, match=says):
    load(init_from=names)


@pytest.mark.parametrize('name', ['a,b,c', 'a,', ','])
def test_more_than_two_names_are_refused(name):
  with pytest.raises(errors.BadInput, match='neither one checkpoint nor two'):
    load(init_from=name)


def test_without_torch_a_sentence_says_what_to_do(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(errors.BadInput, match='torch is not installed'):
    torch_files.read(tmp_path / 'pytorch_model.bin', None)
