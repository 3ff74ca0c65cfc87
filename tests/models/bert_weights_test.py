"""Weights in and out, equal to torch's; bad ones are in bad_input_test.py."""

import dataclasses
import json

import jax
import needs
import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save_file
import tokenizers
import transformers

from ance_jax import errors
from ance_jax.core import devices
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.jobs import train
from ance_jax.models import bert
from ance_jax.models import bert_weights
from ance_jax.models import bi_encoder
from ance_jax.models import huggingface
from ance_jax.models import pretrained
from ance_jax.retrieval import retriever as retriever_lib
from ance_jax.training import experiment

TEXTS = [
  'How is a list sorted in place?',
  'The quick brown fox, jumping over 13 lazy dogs: again and again, until it '
  'is tired and goes home to its wife.',
  'a',
  'Café naïve ÜBER straße — «quoted» … 東京',
  'def f(x): return x ** 2  # squares',
  'word ' * 400,
]


KINDS = ['bert', 'roberta', 'distilbert', 'mpnet']


def make_torch(kind, folder, positions=160, seed=0):
  """Saves a small random torch model of a kind, and returns it."""
  import torch

  torch.manual_seed(seed)
  classes = {
    'bert': (transformers.BertConfig, transformers.BertModel),
    'roberta': (transformers.RobertaConfig, transformers.RobertaModel),
    'distilbert': (transformers.DistilBertConfig, transformers.DistilBertModel),
    'mpnet': (transformers.MPNetConfig, transformers.MPNetModel),
  }
  make_config, make_model = classes[kind]
  first = 2 if kind in ('roberta', 'mpnet') else 0
  sizes = {'dim': 32, 'n_layers': 3, 'n_heads': 4, 'hidden_dim': 48}
  sizes['activation'] = 'relu'
  if kind != 'distilbert':
    sizes = {
      'hidden_size': 32,
      'num_hidden_layers': 3,
      'num_attention_heads': 4,
      'intermediate_size': 48,
      'hidden_act': 'gelu_new' if kind == 'mpnet' else 'gelu',
      'layer_norm_eps': 1e-12 if kind == 'bert' else 1e-5,
    }
  if kind in ('bert', 'roberta'):
    sizes['type_vocab_size'] = 2 if kind == 'bert' else 1
  model = make_model(
    make_config(
      vocab_size=300,
      max_position_embeddings=positions + first,
      pad_token_id=first // 2,
      **sizes,
    )
  )
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
  model.eval().save_pretrained(folder)
  tokenizer = (
    byte_level() if first else tokenizer_lib.train_vocabulary(TEXTS, 80)
  )
  tokenizer.save_pretrained(folder)
  return model


def byte_level():
  """A tokenizer of RoBERTa's kind: bytes, and <pad> in row 1."""
  special = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
  trained = tokenizers.ByteLevelBPETokenizer()
  trained.train_from_iterator(
    TEXTS, vocab_size=290, special_tokens=special, show_progress=False
  )
  model = json.loads(trained.to_str())['model']
  return transformers.RobertaTokenizer(
    vocab=model['vocab'], merges=[tuple(pair) for pair in model['merges']]
  )


def ragged(kind, lengths, width):
  """Token ids padded to a width, (B, L) int32, and which are real."""
  random = np.random.default_rng(0)
  real = np.arange(width) < lengths[:, None]
  pad = kind in ('roberta', 'mpnet')
  ids = np.where(real, random.integers(5, 300, real.shape), pad)
  return ids.astype(np.int32), real


def torch_inputs(ids, real):
  import torch

  return {
    'input_ids': torch.tensor(ids.astype(np.int64)),
    'attention_mask': torch.tensor(real.astype(np.int64)),
  }


@needs.torch
@pytest.mark.parametrize('kind', KINDS)
def test_body_equals_torch_on_ragged_input(kind, tmp_path):
  import torch

  model = make_torch(kind, tmp_path)
  body = huggingface.read_config(str(tmp_path))
  tensors = load_file(tmp_path / 'model.safetensors')
  params = bert_weights.body_from_tensors(tensors, body, 'here')
  for name, array in bert_weights.body_to_tensors(params, body).items():
    np.testing.assert_array_equal(array, tensors[name])
  # MPNet's last bucket begins at a distance of 91, its last row at 160.
  for width, lengths in ((160, [160, 7, 1, 129]), (24, [23, 24, 1, 2])):
    lengths = np.array(lengths, np.int32)
    ids, real = ragged(kind, lengths, width)
    found = jax.jit(bert.Body(body).apply)({'params': params}, ids, lengths)
    with torch.no_grad():
      expected = model(**torch_inputs(ids, real)).last_hidden_state.numpy()
    np.testing.assert_allclose(
      np.asarray(found)[real], expected[real], atol=1e-5, rtol=0
    )


@needs.torch
@pytest.mark.parametrize(
  ('kind', 'head'),
  [
    ('bert', 'none'),
    ('bert', 'dpr'),
    ('roberta', 'ance'),
    ('distilbert', 'none'),
    ('mpnet', 'none'),
  ],
)
def test_embeddings_and_gradients_of_each_head_equal_torch(
  kind, head, tmp_path
):
  """DPR: the first token's vector, or a projection of it; ANCE: normed too."""
  import torch

  model = make_torch(kind, tmp_path)
  parts = {'none': [], 'dpr': [torch.nn.Linear(32, 20)]}
  parts['ance'] = [torch.nn.Linear(32, 20), torch.nn.LayerNorm(20)]
  top = torch.nn.Sequential(*parts[head])
  for parameter in top.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
  body = huggingface.read_config(str(tmp_path))
  retriever = bi_encoder.RetrieverConfig(
    body, True, 'cls', 20 * (head != 'none'), head == 'ance', 'dot', 99, 160,
    ' ',
  )  # fmt: skip

  def tower(arrays):
    """Ours, of {name: array} of the torch model."""
    ours = {'body': {k: v for k, v in arrays.items() if k[0] not in '01'}}
    ours['body'] = bert_weights.body_from_tensors(ours['body'], body, 'here')
    if '0.weight' in arrays:
      ours['head'] = {'kernel': arrays['0.weight'].T, 'bias': arrays['0.bias']}
    if '1.weight' in arrays:
      ours['head_norm'] = {
        'scale': arrays['1.weight'],
        'bias': arrays['1.bias'],
      }
    return ours

  named = {**dict(model.named_parameters()), **dict(top.named_parameters())}
  params = tower({k: v.detach().numpy() for k, v in named.items()})
  shapes = bi_encoder.shapes(retriever)['tied']
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
  lengths = np.array([150, 7, 1, 129], np.int32)
  ids, real = ragged(kind, lengths, 150)
  encode_passages = bi_encoder.make_encode(retriever, 'float32', 'passage')
  wanted = np.random.default_rng(1).normal(size=(4, retriever.embedding_size))
  wanted = wanted.astype(np.float32)

  def loss(params):
    embeddings = encode_passages({'tied': params}, ids, lengths)
    return (embeddings * wanted).sum(), embeddings

  grads, embeddings = jax.jit(jax.grad(loss, has_aux=True))(params)
  expected = top(model(**torch_inputs(ids, real)).last_hidden_state[:, 0])
  (expected * torch.tensor(wanted)).sum().backward()
  np.testing.assert_allclose(
    embeddings, expected.detach().numpy(), atol=1e-5, rtol=0
  )
  # What has no gradient there is the pooler, and row 1 of the token types.
  expected = tower(
    {
      k: (torch.zeros_like(v) if v.grad is None else v.grad).numpy()
      for k, v in named.items()
    }
  )
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
  jax.tree.map(
    lambda ours, theirs: np.testing.assert_allclose(
      ours, theirs, atol=1e-5 * largest, rtol=0
    ),
    grads,
    expected,
  )


@needs.torch
def test_buckets_are_those_of_mpnet_at_each_distance():
  import torch
  from transformers.models.mpnet import modeling_mpnet

  distance = np.arange(-600, 601)
  expected = modeling_mpnet.MPNetEncoder.relative_position_bucket(
    torch.tensor(distance)
  )
  np.testing.assert_array_equal(bert.buckets(distance), expected)


def load(config, **changes):
  changed = dataclasses.replace(
    config,
    pooling=None,
    similarity=None,
    query_length=None,
    passage_length=None,
    **changes,
  )
  return experiment.load_model(changed, TEXTS)


def embeddings_of(model, texts):
  return retriever_lib.make(model, devices.local(1)).encode_passages(texts)


# From here on without torch: a folder as Hugging Face writes it.


BODY = bert.BodyConfig('bert', 60, 16, 2, 2, 32, 24, 2, 1e-12, 'gelu')


def write_body(folder, body, tokenizer):
  """Saves random weights as Hugging Face does, and returns their tensors."""
  random = np.random.default_rng(0)
  retriever = bi_encoder.RetrieverConfig(
    body, True, 'cls', 0, True, 'dot', 8, 8, ' '
  )
  params = jax.tree.map(
    lambda leaf: random.normal(size=leaf.shape).astype(np.float32),
    bi_encoder.shapes(retriever)['tied']['body'],
  )
  folder.mkdir()
  tensors = bert_weights.body_to_tensors(params, body)
  save_file(tensors, folder / 'model.safetensors')
  huggingface.write_config(folder, body, tokenizer.pad_token_id)
  tokenizer.save_pretrained(folder)
  return tensors


@pytest.fixture
def saved(tmp_path):
  """(folder, tensors) of a small BERT."""
  folder, tokenizer = (
    tmp_path / 'bert',
    tokenizer_lib.train_vocabulary(TEXTS, 60),
  )
  return folder, write_body(folder, BODY, tokenizer)


def test_tensors_come_back_as_they_went_in(saved):
  _, tensors = saved
  params = bert_weights.body_from_tensors(tensors, BODY, 'here')
  back = bert_weights.body_to_tensors(params, BODY)
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
  old['vocab_transform.weight'] = np.zeros((16, 16), np.float32)
  found = bert_weights.body_from_tensors(old, BODY, 'here')
  expected = bert_weights.body_from_tensors(tensors, BODY, 'here')
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
  plain = load(tiny, init_from=str(folder)).config
  assert (plain.pooling, plain.similarity, plain.head_size) == ('cls', 'dot', 0)
  assert (plain.query_length, plain.passage_length) == (24, 24)
  config = dataclasses.replace(
    tiny, init_from=str(folder), head_size=8, tie_encoders=False
  )
  model = experiment.load_model(config, TEXTS)
  given = model.config
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
  first, again = (experiment.load_model(tiny, TEXTS) for _ in range(2))
  other = experiment.load_model(dataclasses.replace(tiny, seed=1), TEXTS)
  table = 'word_embedding'
  a, b, c = (m.params['tied']['body'][table] for m in (first, again, other))
  np.testing.assert_array_equal(a, b)
  assert np.abs(np.asarray(a - c)).max() > 0.01


@pytest.fixture
def roberta(tmp_path):
  """Folder of a small RoBERTa, and its byte-level tokenizer."""
  body = bert.BodyConfig('roberta', 300, 16, 1, 2, 32, 26, 1, 1e-5, 'gelu')
  folder, tokenizer = tmp_path / 'roberta', byte_level()
  write_body(folder, body, tokenizer)
  return folder, tokenizer


def test_a_run_keeps_head_and_tokenizer_wherever_it_is_used(roberta, tiny):
  """Two towers, DPR's head, texts and joined titles as in STAR's tokenizer."""
  folder, theirs = roberta
  config = dataclasses.replace(
    tiny,
    init_from=str(folder),
    tie_encoders=False,
    head_size=8,
    head_norm=False,
    lower_case=True,
    prefix_space=True,
    title_separator='token',
    passage_prompt='of ',
    method='in_batch',
    max_steps=1,
    num_devices=1,
  )
  train.run(config)
  run, _ = experiment.open(
    dataclasses.replace(config, job='evaluate'), ('train', 'dev')
  )
  params = run.retriever.params
  assert {name: set(params[name]) for name in params} == {
    'query': {'body', 'head'},
    'passage': {'body', 'head'},
  }
  assert params['query']['head']['kernel'].shape == (16, 8)

  def words(text):
    return theirs(f' {text.lower()}')['input_ids'][1:-1]

  for row in range(4):
    title, text = run.dataset.corpus.titles[row], run.dataset.corpus.texts[row]
    before, *behind = [title, text] if title else [text]
    expected = words(f'of {before}')
    for part in behind:
      expected += [2, *words(part)]
    start, end = run.dataset.passages.offsets[row : row + 2]
    assert run.dataset.passages.ids[start:end].tolist() == [
      0,
      *expected[:14],
      2,
    ]
  query = run.dataset.splits['dev'].texts[0]
  for rows in (
    run.dataset.queries['dev'],
    tokens.memory_rows(run.retriever.tokenizer, [query.upper()], 8),
  ):
    found = rows.ids[: rows.offsets[1]].tolist()
    assert found == [0, *words(query)[:6], 2]
  # As the start of another run, without any flag.
  again = load(tiny, init_from=config.workdir)
  assert again.config == run.retriever.config
  np.testing.assert_array_equal(
    embeddings_of(again, TEXTS),
    embeddings_of(
      pretrained.Model(run.retriever.config, run.retriever.tokenizer, params),
      TEXTS,
    ),
  )


def test_the_rows_of_passages_depend_on_all_that_tokenizes_them(roberta, tiny):
  folder, _ = roberta
  config = dataclasses.replace(tiny, init_from=str(folder))
  hashes = [
    experiment.create(dataclasses.replace(config, **changes), ('dev',))[
      0
    ].dataset.passages.hash
    for changes in (
      {},
      {'lower_case': True},
      {'prefix_space': True},
      {'title_separator': 'token'},
      {'passage_length': 17},
    )
  ]
  assert len(set(hashes)) == 5


def test_a_tokenizer_whose_files_say_another_case_needs_a_flag(roberta, tiny):
  """RobertaTokenizer keeps capitals, whatever its files say."""
  folder, _ = roberta
  path = folder / 'tokenizer_config.json'
  plain, backend = path.read_text(), folder / 'tokenizer.json'
  load(tiny, init_from=str(folder))
  path.write_text(json.dumps({**json.loads(plain), 'do_lower_case': True}))
  with pytest.raises(errors.BadInput, match='set --lower_case or --nolow'):
    load(tiny, init_from=str(folder))
  for lower_case, expected in ((True, 'a b'), (False, 'A B')):
    model = load(tiny, init_from=str(folder), lower_case=lower_case)
    ids = model.tokenizer('A B')['input_ids']
    assert model.tokenizer.decode(ids, skip_special_tokens=True) == expected
  path.write_text(plain)
  changed = json.loads(backend.read_text())
  changed['normalizer'] = {'type': 'Lowercase'}
  backend.write_text(json.dumps(changed))
  with pytest.raises(errors.BadInput, match='files say that it lower-cases'):
    load(tiny, init_from=str(folder))


def test_safetensors_go_before_a_file_of_torch_beside_them(tmp_path):
  expected = np.ones(3, np.float32)
  save_file({'w': expected}, tmp_path / 'model.safetensors')
  # Not even opened: this is none.
  (tmp_path / 'pytorch_model.bin').write_bytes(b'no weights')
  found = huggingface.read_tensors(str(tmp_path), lambda name: False)
  np.testing.assert_array_equal(found['w'], expected)


@pytest.mark.parametrize('kind', KINDS)
def test_a_body_is_read_as_it_was_written(kind, tmp_path):
  num_types = {'bert': 2, 'roberta': 1}.get(kind, 0)
  # DistilBERT's epsilon is not in its config.
  body = bert.BodyConfig(
    kind, 99, 16, 3, 2, 24, 40, num_types, 1e-12, 'relu', 0.25
  )
  huggingface.write_config(tmp_path, body, pad_token_id=1)
  found = huggingface.read_config(str(tmp_path))
  assert dataclasses.asdict(found) == dataclasses.asdict(body)
