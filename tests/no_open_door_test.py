"""No door is open: nothing that was given is ever run."""

import ast
import gzip
import json
import pathlib
import pickle
import re
import subprocess
import sys
import tracemalloc

import cases_beir
import cases_checkpoints
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import errors as errors_lib
from ance_jax.core import atomic
from ance_jax.core import strict_io
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.data.readers import beir
from ance_jax.retrieval import encoding
from ance_jax.training import experiment

REPOSITORY = pathlib.Path(__file__).parents[1]
SOURCES = sorted((REPOSITORY / 'ance_jax').rglob('*.py'))
# Modules that run what they read, or unpack it wherever it says.
MODULES = (
  'pickle cPickle dill cloudpickle joblib marshal shelve torch yaml tarfile '
  'zipfile subprocess imp code runpy ctypes'
).split()
CALLS = (
  'eval exec compile __import__ system popen unpack_archive extractall '
  'import_module exec_module read_pickle'
).split()


def door_in(node):
  """Returns what a node of a syntax tree opens, or None."""
  if isinstance(node, ast.Import | ast.ImportFrom):
    names = [alias.name for alias in node.names]
    names += [getattr(node, 'module', None) or '']
    return next((n for n in names if n.split('.')[0] in MODULES), None)
  if not isinstance(node, ast.Call):
    return None
  name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
  module = getattr(getattr(node.func, 'value', None), 'id', '')
  if (name == 'compile' and module in ('re', 'regex')) or name not in CALLS:
    return _argument_door(name, {k.arg: k.value for k in node.keywords})
  return name


def _argument_door(name, arguments):
  if name == 'from_pretrained' and 'trust_remote_code' not in arguments:
    return 'from_pretrained without trust_remote_code=False'
  for key in ('trust_remote_code', 'allow_pickle', 'shell'):
    value = arguments.get(key)
    if value is not None and getattr(value, 'value', None) is not False:
      return key
  return None


# Of an archive that was fetched, files are read whose names are known: no path
# in it is written to.
KNOWN = {
  # The modules of jobs and of readers, by tables of ours.
  ('launch', 'import_module'),
  ('load', 'import_module'),
  ('downloads', 'tarfile'),
  ('downloads', 'zipfile'),
  # Python alone, on python_files.py, which parses what it is given.
  ('pydocs', 'subprocess'),
  # By weights_only=True alone; a test below gives it a pickle that runs.
  ('torch_files', 'torch'),
}


def test_no_module_can_run_what_it_reads():
  found = {
    (path.stem, door): node.lineno
    for path in SOURCES
    for node in ast.walk(ast.parse(path.read_text()))
    if (door := door_in(node)) is not None
  }
  assert found.keys() == KNOWN, found


@pytest.mark.parametrize(
  'text',
  [
    'import pickle',
    'from torch import load',
    'import zipfile as z',
    'eval(text)',
    'np.load(path, allow_pickle=True)',
    'np.load(path, allow_pickle=given)',
    'AutoModel.from_pretrained(name)',
    'AutoModel.from_pretrained(name, trust_remote_code=True)',
    'shutil.unpack_archive(path)',
    'os.system(text)',
  ],
)
def test_the_search_finds_a_door(text):
  assert any(door_in(node) for node in ast.walk(ast.parse(text)))


class Bomb:
  """A pickle of this writes a file when it is loaded."""

  def __init__(self, path):
    self._path = path

  def __reduce__(self):
    return pathlib.Path.write_text, (self._path, 'was run')


@pytest.fixture
def proof(tmp_path):
  """The file that shows that something was run."""
  path = tmp_path / 'proof'
  yield path
  assert not path.exists()


@pytest.fixture
def model(tmp_path):
  """A sound BERT folder."""
  sound, folder = tmp_path / 'sound', tmp_path / 'model'
  sound.mkdir()
  cases_checkpoints.make_sound(folder, sound)
  return folder


def test_the_bomb_works(tmp_path):
  pickle.loads(pickle.dumps(Bomb(tmp_path / 'proof')))
  assert (tmp_path / 'proof').read_text() == 'was run'


@pytest.mark.parametrize(
  ('name', 'says'),
  [
    ('model.safetensors', 'safetensors cannot read it'),
    ('pytorch_model.bin', 'PyTorch file'),
  ],
)
def test_pickled_weights_are_not_run(name, says, model, proof):
  (model / 'model.safetensors').unlink()
  (model / name).write_bytes(pickle.dumps(Bomb(proof)))
  with pytest.raises(errors_lib.BadInput, match=says):
    cases_checkpoints.use(model, None)


EVIL = [{'path': '', 'type': 'evil.Transformer'}, {'type': 'evil.Pooling'}]


@pytest.mark.parametrize(
  ('name', 'values', 'says'),
  [
    ('config.json', {'auto_map': {'AutoConfig': 'evil.Evil'}}, 'code of its'),
    (
      'tokenizer_config.json',
      {'auto_map': {'AutoTokenizer': 'evil.Evil'}, 'trust_remote_code': True},
      'code of its own',
    ),
    ('modules.json', EVIL, "no 'type' of sentence_transformers"),
  ],
)
def test_code_beside_a_model_is_not_run(name, values, says, model, proof):
  (model / 'evil.py').write_text(
    f'open({str(proof)!r}, "w")\nclass Evil:\n  pass\nTransformer = Evil\n'
  )
  path = model / name
  if path.exists():
    values = {**json.loads(path.read_text()), **values}
  path.write_text(json.dumps(values))
  with pytest.raises(errors_lib.BadInput, match=says):
    cases_checkpoints.use(model, None)


def pickled_array(path, proof):
  """Writes an .npy file that is a pickle inside."""
  array = np.array([Bomb(proof)], object)
  with open(path, 'wb') as file:
    np.save(file, array, allow_pickle=True)


def test_pickled_token_rows_are_not_run(tmp_path, proof):
  tokenizer = tokenizer_lib.train_vocabulary(cases_checkpoints.TEXTS, 60)
  kwargs = {
    'what': 'texts', 'num_texts': 2, 'cut': tokens.Cut(8), 'content_hash': 'h',
    'folder': tmp_path / 'tokens',
  }  # fmt: skip
  tokens.token_rows(tokenizer, cases_checkpoints.TEXTS, **kwargs)
  (folder,) = (tmp_path / 'tokens').glob('texts-*')
  about = atomic.read_manifest(folder)
  (folder / 'manifest.json').unlink()
  pickled_array(folder / 'offsets.npy', proof)
  atomic.commit(folder, {k: v for k, v in about.items() if k != 'files'})
  with pytest.raises(errors_lib.BadInput, match='not those that were written'):
    tokens.token_rows(tokenizer, cases_checkpoints.TEXTS, **kwargs)


def test_pickled_embeddings_are_not_run(tmp_path, proof):
  rows = tokens.TokenRows(
    np.zeros(6, np.uint16), np.array([0, 3, 6]), 0, 'a hash'
  )
  block = tmp_path / '00000'
  block.mkdir()
  pickled_array(block / 'embeddings.npy', proof)
  atomic.commit(block, {'start': 0, 'rows': 2})
  with pytest.raises(errors_lib.Damaged, match='embeddings.npy is missing or'):
    encoding.encode_corpus(None, None, rows, tmp_path, rows_per_block=2)


def test_a_path_out_of_the_folder_is_not_read(model, tmp_path):
  outside = tmp_path / 'b.safetensors'
  (model / 'model.safetensors').rename(outside)
  index = {'weight_map': {'x': '../b.safetensors'}}
  (model / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(
    errors_lib.BadInput, match='not a path within the same folder'
  ):
    experiment.load_model(config_lib.Config(init_from=str(model)), [])


def test_a_gzip_bomb_is_refused_before_it_fills_memory(tmp_path):
  with gzip.open(tmp_path / 'corpus.jsonl.gz', 'wb', 1) as file:
    for _ in range(128):
      file.write(bytes(2**20).replace(b'\0', b'a'))
  tracemalloc.start()
  try:
    with pytest.raises(errors_lib.BadInput, match='more than 16,777,216 bytes'):
      beir.read_corpus(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 4 * strict_io.MAX_LINE
  finally:
    tracemalloc.stop()


def test_a_person_sees_one_sentence_and_exit_code_2(tmp_path):
  cases_beir.make_sound(tmp_path, None)
  cases_beir.put('corpus.jsonl', '{"_id": "p0"\n')(tmp_path)
  flags = '--job=evaluate --retriever=bm25 --dataset=beir'.split()
  paths = [f'--data_dir={tmp_path}', f'--workdir={tmp_path}/work']
  ended = subprocess.run(
    [sys.executable, '-m', 'ance_jax.main', *flags, *paths],
    cwd=REPOSITORY,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 2, ended.stderr
  # A progress bar writes there too, and takes itself away.
  last = re.split(r'[\r\n]', ended.stderr.strip())[-1].strip()
  says = f'ance_jax: {tmp_path}/corpus.jsonl, line 1: not one JSON value ('
  assert last.startswith(says)
  assert ended.stderr.count('ance_jax: ') == 1
  assert 'Traceback' not in ended.stderr + ended.stdout
