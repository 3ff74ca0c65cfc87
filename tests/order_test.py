"""Seven packages: imports point down, and no two modules have one name."""

import ast
import collections
import graphlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'ance_jax'
PACKAGES = 'jobs training mining retrieval models data core'.split()
# What flags may name: config.py and config_checks.py read these, wherever they
# are, and they import nothing.
TABLES = {
  ('data', 'datasets'),
  ('data', 'registry'),
  ('jobs', 'forms'),
  ('models', 'choices'),
  ('retrieval', 'protocols'),
  ('retrieval', 'words'),
  ('training', 'methods'),
}
ABOVE, BELOW = (
  ['main', 'launch', 'flags', 'api'],
  [
    'config',
    'config_checks',
    'errors',
  ],
)
ORDER = [*ABOVE, *PACKAGES, *BELOW]
# An outside library has one room, so that a change of it is made in one place.
ROOMS = {
  'absl': {'flags', 'launch', 'main'},
  'faiss': {'factories', 'index'},
  'orbax': {'checkpoint'},
  'transformers': {'huggingface', 'tokenizer'},
  'huggingface_hub': {'snapshots'},
  'tensorflow_datasets': {'docstrings', 'downloads', 'pydocs', 'tfds'},
  'bm25s': {'bm25'},
  'etils': {'remote'},
  'fsspec': {'remote'},
  'ir_measures': {'metrics'},
  'matplotlib': {'report'},
  'regex': {'answers', 'words'},
  'Stemmer': {'bm25', 'words'},
  'ijson': {'records'},
  'apache_beam': {'beam'},
  'torch': {'torch_files'},
}
SOURCES = sorted(PACKAGE.rglob('*.py'))
MODULES = {
  path.relative_to(PACKAGE).with_suffix('').parts: path
  for path in SOURCES
  if path.stem != '__init__'
}


def imports(path):
  """Yields (module, name or None) of all that a file imports, anywhere."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      yield from ((node.module, alias.name) for alias in node.names)
    elif isinstance(node, ast.Import):
      yield from ((alias.name, None) for alias in node.names)


def imported(path):
  """Returns the parts of the names of our modules that a file imports."""
  dotted = ['.'.join(filter(None, names)).split('.') for names in imports(path)]
  return {tuple(parts[1:]) for parts in dotted if parts[0] == 'ance_jax'}


def name_of(path):
  return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)


@pytest.mark.parametrize('path', SOURCES, ids=name_of)
def test_imports_point_down_between_packages(path):
  if path.stem == '__init__':
    assert not imported(path)
    return
  here = path.relative_to(PACKAGE).with_suffix('').parts[0]
  below = ORDER[ORDER.index(here) + (here in ABOVE + BELOW) :]
  others = imported(path) - (TABLES if 'config' in here else set())
  assert {parts[0] for parts in others} <= set(below)


@pytest.mark.parametrize('table', sorted(TABLES), ids='.'.join)
def test_tables_import_nothing(table):
  assert not imported(MODULES[table])


@pytest.mark.parametrize('package', PACKAGES)
def test_no_import_comes_back_inside_a_package(package):
  graph = {
    parts: {other for other in imported(path) if other[0] == package}
    for parts, path in MODULES.items()
    if parts[0] == package
  }
  graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize('path', SOURCES, ids=name_of)
def test_modules_are_imported_and_not_what_they_hold(path):
  assert imported(path) <= set(MODULES)


@pytest.mark.parametrize('path', SOURCES, ids=name_of)
def test_outside_libraries_stay_in_their_rooms(path):
  for module, _ in imports(path):
    rooms = ROOMS.get(module.split('.')[0])
    assert rooms is None or path.stem in rooms, module


@pytest.mark.parametrize('path', SOURCES, ids=name_of)
def test_below_training_a_function_takes_a_few_settings_by_name(path):
  """Not all of them, in a `Config` or an `Experiment`."""
  here = path.relative_to(PACKAGE).with_suffix('').parts[0]
  if here not in ('mining', 'retrieval', 'models', 'data'):
    return
  assert ('config',) not in imported(path)
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.arg) and node.arg in ('config', 'experiment'):
      kind = ast.unparse(node.annotation) if node.annotation else ''
      assert kind.endswith(('BodyConfig', 'RetrieverConfig')), node.arg


def test_the_order_names_the_packages_and_modules_that_exist():
  tops = {parts[0] for parts in MODULES}
  assert tops == set(ORDER)
  assert {parts[0] for parts in MODULES if len(parts) == 1} == {*ABOVE, *BELOW}


def test_no_two_modules_have_one_name():
  names = collections.Counter(parts[-1] for parts in MODULES)
  names.update(set(PACKAGES))
  assert max(names.values()) == 1
