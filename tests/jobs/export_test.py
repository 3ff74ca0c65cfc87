"""What is exported gives the same embeddings elsewhere, and comes back."""

import dataclasses
import json
import pathlib
import shutil

import bert_weights_test
import conftest
import faiss
import jax
import needs
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import devices
from ance_jax.core import logs
from ance_jax.data import tokens
from ance_jax.jobs import export
from ance_jax.jobs import train
from ance_jax.models import bi_encoder
from ance_jax.retrieval import encoding
from ance_jax.training import experiment

LENGTH = 16


@pytest.fixture(scope='module')
def texts():
  """500 texts that people wrote: the documentation of numpy."""
  named = [getattr(np, name) for name in dir(np)] + [
    getattr(np.ndarray, name) for name in dir(np.ndarray)
  ]
  docs = sorted({str(thing.__doc__) for thing in named})
  return docs[:500]


def make(kind, folder, **settings):
  """A model of a kind with random weights, norms and biases included."""
  bert_weights_test.make_torch(kind, folder)
  # Of one tower, sentence-transformers has one length.
  query_length = LENGTH if settings.get('tie_encoders', True) else LENGTH - 5
  config = config_lib.Config(
    init_from=folder,
    query_length=query_length,
    passage_length=LENGTH,
    **settings,
  )
  model = experiment.load_model(config, ())
  random = np.random.default_rng(1)
  params = jax.tree.map(
    lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32),
    model.params,
  )
  return model._replace(params=params)


def embed(model, texts, side):
  encoder = encoding.make_encoder(
    model.config,
    side,
    dtype='float32',
    tokens_per_batch=4096,
    devices=devices.local(1),
  )
  length = getattr(model.config, f'{side}_length')
  prompt = getattr(model.config, f'{side}_prompt')
  rows = tokens.memory_rows(
    model.tokenizer, [prompt + text for text in texts], length
  )
  return encoding.encode_rows(encoder, model.params, rows, 'encode')[0]


FORMS = {
  'ance': ('roberta', {'head_size': 20, 'lower_case': True}),
  'dpr': ('bert', {'tie_encoders': False}),
  'dpr, projected': (
    'bert', {'tie_encoders': False, 'head_size': 12, 'head_norm': False}
  ),
  'minilm': ('bert', {'pooling': 'mean', 'similarity': 'cosine'}),
  'tas-b': ('distilbert', {}),
  'e5': (
    'mpnet', {
      'pooling': 'mean', 'similarity': 'cosine', 'query_prompt': 'query: ',
      'passage_prompt': 'passage: ', 'tie_encoders': False,
    }
  ),
}  # fmt: skip


@pytest.fixture(scope='module', params=FORMS.values(), ids=FORMS)
def exported(request, tmp_path_factory):
  """Kind of body, model, and folder of its export."""
  kind, settings = request.param
  folder = tmp_path_factory.mktemp('exported')
  model = make(kind, folder / 'body', title_separator='token', **settings)
  (folder / 'out').mkdir()
  export.write(folder / 'out', model.config, model.params, model.tokenizer)
  return kind, model, folder / 'out'


@needs.torch
def test_sentence_transformers_gives_the_same_embeddings(exported, texts):
  import sentence_transformers

  _, model, out = exported
  theirs = sentence_transformers.SentenceTransformer(str(out), device='cpu')
  assert theirs.similarity_fn_name == model.config.similarity
  for side, encode_them in (
    (bi_encoder.QUERY, theirs.encode_query),
    (bi_encoder.PASSAGE, theirs.encode_document),
  ):
    ours = embed(model, texts, side)
    assert ours.std(0).max() > 1e-3
    scale = np.abs(ours).max()
    found = encode_them(texts, show_progress_bar=False)
    np.testing.assert_allclose(ours / scale, found / scale, atol=1e-5)
    if not model.config.tied:
      alone = sentence_transformers.SentenceTransformer(
        str(out / side), device='cpu'
      )
      prompt = getattr(model.config, f'{side}_prompt')
      found = alone.encode([prompt + text for text in texts[:9]])
      np.testing.assert_allclose(ours[:9] / scale, found / scale, atol=1e-5)


@needs.torch
def test_what_was_exported_comes_back_bit_for_bit(exported, tmp_path):
  _, model, _ = exported
  retriever = dataclasses.replace(model.config, query_length=9)
  (tmp_path / 'out').mkdir()
  export.write(tmp_path / 'out', retriever, model.params, model.tokenizer)
  without = experiment.load_model(
    config_lib.Config(init_from=tmp_path / 'out'), ()
  )
  lengths = retriever.query_length, retriever.passage_length
  lengths = lengths if not retriever.tied else lengths[1:] * 2
  found = without.config
  assert (found.query_length, found.passage_length) == lengths
  assert found.query_prompt == retriever.query_prompt
  assert found.passage_prompt == retriever.passage_prompt
  if not retriever.head_size:
    config = config_lib.Config(init_from=tmp_path / 'out', head_size=5)
    assert experiment.load_model(config, ()).config.head_norm
  about = json.dumps(retriever.to_dict())
  (tmp_path / 'out' / bi_encoder.FILE).write_text(about)
  back = experiment.load_model(
    config_lib.Config(init_from=tmp_path / 'out'), ()
  )
  assert back.config == retriever
  backends = (m.tokenizer.backend_tokenizer.to_str() for m in (model, back))
  assert len(set(backends)) == 1
  assert checkpoint.weights_hash(back.params) == checkpoint.weights_hash(
    model.params
  )


# Texts that releases of tokenizers could take in two ways.
ODD = [
  '', 'a', 'Café naïve ÜBER straße', '東京 にほんご ไทย', 'İI ﬁ Ǆ',
  'a\x00b\x01\x1f\u200b\ufeffc\r\n\td', '[SEP] <s> [MASK] </s> <mask>',
  'word ' * 3000, 'é' * 3000, '\U0001f469\u200d\U0001f467 \U0001f600',
]  # fmt: skip


@needs.torch
def test_a_tokenizer_is_written_for_old_and_new_transformers(exported):
  """Of tests/elsewhere.py, what can be seen without the old ones."""
  import sentence_transformers

  kind, model, out = exported
  towers = {'': LENGTH} if model.config.tied else {'query': 11, 'passage': 16}
  for tower, length in towers.items():
    said = json.loads((out / tower / 'tokenizer_config.json').read_text())
    # 4.57 has no class TokenizersBackend.
    assert said['tokenizer_class'] == 'PreTrainedTokenizerFast'
    assert said['model_max_length'] == length
    types = 'token_type_ids' in said['model_input_names']
    assert types == (kind in ('bert', 'roberta'))
    theirs = sentence_transformers.SentenceTransformer(
      str(out / tower), device='cpu'
    )
    assert theirs.max_seq_length == length
    found = theirs.tokenizer(ODD, truncation=True)['input_ids']
    expected = tokens.memory_rows(model.tokenizer, ODD, length)
    assert sum(found, []) == expected.ids.tolist()


def test_pooling_has_the_keys_that_servers_read(tmp_path):
  """text-embeddings-inference wants four, vLLM one that is true."""
  config = config_lib.Config(
    num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32,
    vocab_size=200, pooling='mean', passage_length=LENGTH,
  )  # fmt: skip
  model = experiment.load_model(config, ['some words for a vocabulary'])
  export.write(tmp_path, model.config, model.params, model.tokenizer)
  found = json.loads((tmp_path / '1_Pooling' / 'config.json').read_text())
  assert found.pop('word_embedding_dimension') == 16
  assert {
    'pooling_mode_cls_token', 'pooling_mode_mean_tokens',
    'pooling_mode_max_tokens', 'pooling_mode_mean_sqrt_len_tokens',
  } <= set(found)  # fmt: skip
  assert [k for k, v in found.items() if v] == ['pooling_mode_mean_tokens']
  modules = json.loads((tmp_path / 'modules.json').read_text())
  assert modules[1]['type'] == 'sentence_transformers.models.Pooling'
  said = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  assert said['model_max_length'] == LENGTH


@pytest.fixture(scope='module')
def trained(beir_folder, tmp_path_factory):
  """Settings of a run of 12 steps."""
  folder = tmp_path_factory.mktemp('trained')
  config = conftest.make_tiny(beir_folder, folder)
  config = dataclasses.replace(config, num_devices=1)
  train.run(config)
  return config


def test_a_run_is_exported_with_its_card_and_corpus(trained, tmp_path):
  # What the card says is looked for where the run is now.
  moved = shutil.copytree(trained.workdir, tmp_path / 'moved')
  tiny = dataclasses.replace(trained, workdir=str(moved))
  config = dataclasses.replace(
    tiny, job='export', export_corpus=True, checkpoint='8'
  )
  folder = export.run(config)
  assert folder == pathlib.Path(tiny.workdir) / 'export-8'
  card = (folder / 'README.md').read_text()
  assert '--method=ance_in_batch' in card
  dev = logs.series(tiny.workdir, 'dev/mrr@10')
  assert f'{dev[8]:.4f}' in card
  assert '# moved, step 8\n' in card
  assert 'trained by ance_jax' in card
  assert (folder / 'curves.png').exists()
  facts = json.loads((folder / 'run.json').read_text())
  this, _ = experiment.open(
    dataclasses.replace(tiny, job='evaluate', checkpoint='8'), ()
  )
  assert facts['weights'] == checkpoint.weights_hash(this.retriever.params)
  assert facts['dev']['dev/mrr@10']['8'] == dev[8]
  ids = (folder / 'corpus' / 'ids.txt').read_text().splitlines()
  assert ids == list(this.dataset.corpus.ids)
  parts = sorted((folder / 'corpus').glob('*.npy'))
  assert len(parts) > 1
  embeddings = np.concatenate([np.load(path) for path in parts])
  alone = faiss.read_index(str(folder / 'corpus' / 'index.faiss'))
  assert alone.ntotal == len(ids) == len(embeddings)
  scores, rows = alone.search(embeddings[:5], 3)
  best = np.sort(embeddings[:5] @ embeddings.T, 1)[:, ::-1][:, :3]
  np.testing.assert_allclose(scores, best, rtol=1e-5)
  assert atomic.read_manifest(folder)['step'] == 8
  # So it is where the run is only read.
  others = dataclasses.replace(
    config, init_from=tiny.workdir, workdir=str(tmp_path / 'mine'),
    export_corpus=False
  )  # fmt: skip
  again = export.run(others)
  assert again.parent == tmp_path / 'mine'
  for name in ('README.md', 'run.json', 'curves.png'):
    assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_an_index_on_devices_is_exported_as_flat(trained):
  config = dataclasses.replace(
    trained, job='export', export_corpus=True, index='device'
  )
  corpus = export.run(config) / 'corpus'
  alone = faiss.read_index(str(corpus / 'index.faiss'))
  assert isinstance(alone, faiss.IndexFlatIP)
  embeddings = np.concatenate(
    [np.load(p) for p in sorted(corpus.glob('*.npy'))]
  )
  np.testing.assert_array_equal(
    alone.reconstruct_n(0, alone.ntotal), embeddings
  )


@needs.torch
def test_what_is_there_is_replaced_only_if_that_is_asked_for(tmp_path):
  bert_weights_test.make_torch('bert', tmp_path / 'body')
  config = config_lib.Config(
    job='export', init_from=tmp_path / 'body', workdir=tmp_path / 'run'
  )
  folder = export.run(config)
  assert 'as it was in' in (folder / 'README.md').read_text()
  (folder / 'README.md').write_text('mine')
  again = dataclasses.replace(config, overwrite=True)
  assert 'mine' != (export.run(again) / 'README.md').read_text()
  (tmp_path / 'home').mkdir()
  (tmp_path / 'home' / 'thesis.tex').write_text('')
  with pytest.raises(errors.BadInput, match='what an export wrote'):
    export.run(dataclasses.replace(again, output=tmp_path / 'home'))
  assert (tmp_path / 'home' / 'thesis.tex').exists()


def test_prompts_stand_before_what_a_run_tokenizes(tiny):
  run, _ = experiment.create(
    dataclasses.replace(tiny, query_prompt='t1w1 ', passage_prompt='t2w2 '),
    ('train', 'dev'),
  )
  passages = tokens.passage_texts(
    run.dataset.corpus, run.retriever.config.title_separator
  )
  for prompt, texts, length, rows in (
    ('t1w1 ', run.dataset.splits['dev'].texts, 8, run.dataset.queries['dev']),
    ('t2w2 ', passages, 16, run.dataset.passages),
  ):
    texts = [prompt + text for text in texts]
    expected = tokens.memory_rows(run.retriever.tokenizer, texts, length)
    assert rows.ids.tolist() == expected.ids.tolist()
