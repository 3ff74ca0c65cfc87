"""The package is one list: a module imports only modules below it."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'ance_jax'
ORDER = (
  'main flags inspection batch_report export train report sections footprint '
  'trainer audit refresh boundary watch resume prepare mining tally candidates '
  'judges compare systems evaluate search encode prompt serving pipelines '
  'checks refreshes diagnostics negatives runs chance pages corpus_index '
  'encoding steps optimizers models sources sbert sbert_modules layouts '
  'weights hub torch_files snapshots encoders pooling schedule methods batches '
  'places checkpoint corpora datasets pairs given given_forms beir msmarco dpr '
  'downloads metrics answers tokens tokenizer vocabulary forms data keys '
  'strings lexical words index factories topk filters mine losses bert '
  'compiled rankings records registry logs pace locks workdirs remote handoff '
  'devices processes reading faults config errors'
).split()
# An outside library has one room, so that a change of it is made in one place.
ROOMS = {
  'absl': {'main', 'flags'},
  'faiss': {'index', 'factories'},
  'orbax': {'checkpoint'},
  'transformers': {'tokenizer', 'hub'},
  'huggingface_hub': {'snapshots'},
  'tensorflow_datasets': {'corpora', 'datasets', 'downloads'},
  'bm25s': {'lexical'},
  'etils': {'remote'},
  'fsspec': {'remote'},
  'ir_measures': {'metrics'},
  'matplotlib': {'report'},
  'regex': {'answers', 'words'},
  'Stemmer': {'lexical', 'config'},
  'ijson': {'records'},
  'apache_beam': {'pipelines'},
  'torch': {'torch_files'},
}
SOURCES = sorted(PACKAGE.rglob('*.py'))


def imported_names(path):
  """Yields the dotted names that a file imports, anywhere in it."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)


def module_of(path):
  return path.relative_to(PACKAGE).with_suffix('').parts[0]


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: p.stem)
def test_imports_point_down_the_list(path):
  names = [n.split('.') for n in imported_names(path)]
  imported = {parts[1] for parts in names if parts[0] == 'ance_jax'}
  if module_of(path) == '__init__':
    assert not imported
    return
  below = ORDER[ORDER.index(module_of(path)) + 1 :]
  assert imported <= {module_of(path), *below}


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: p.stem)
def test_outside_libraries_stay_in_their_rooms(path):
  for name in imported_names(path):
    rooms = ROOMS.get(name.split('.')[0])
    assert rooms is None or module_of(path) in rooms, name


def test_the_list_names_the_modules_that_exist():
  assert set(ORDER) | {'__init__'} == {module_of(path) for path in SOURCES}
