"""Seven packages: imports point down, and no two modules have one name."""

import ast
import collections
import functools
import graphlib
import pathlib

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


@functools.cache
def nodes(path):
  """Returns the nodes of a file's syntax tree."""
  return list(ast.walk(ast.parse(path.read_text())))


def imports(path):
  """Yields (module, name or None) of all that a file imports, anywhere."""
  for node in nodes(path):
    if isinstance(node, ast.ImportFrom):
      yield from ((node.module, alias.name) for alias in node.names)
    elif isinstance(node, ast.Import):
      yield from ((alias.name, None) for alias in node.names)


@functools.cache
def imported(path):
  """Returns the parts of the names of our modules that a file imports."""
  dotted = ['.'.join(filter(None, names)).split('.') for names in imports(path)]
  return {tuple(parts[1:]) for parts in dotted if parts[0] == 'ance_jax'}


def offences(find, paths=SOURCES):
  """Returns {name of a file: what `find` has against it}, if anything."""
  found = {path.relative_to(PACKAGE): find(path) for path in paths}
  return {'/'.join(path.parts): what for path, what in found.items() if what}


def test_the_files_that_are_looked_at_import_something():
  assert len(SOURCES) == len(set(SOURCES)) > 100
  assert sum(bool(imported(path)) for path in SOURCES) > 80
  assert sum(any(imports(path)) for path in SOURCES) > 100


def test_imports_point_down_between_packages():
  def above(path):
    if path.stem == '__init__':
      return imported(path)
    here = path.relative_to(PACKAGE).with_suffix('').parts[0]
    below = ORDER[ORDER.index(here) + (here in ABOVE + BELOW) :]
    others = imported(path) - (TABLES if 'config' in here else set())
    return {parts[0] for parts in others} - set(below)

  assert not offences(above)


def test_tables_import_nothing():
  assert not offences(imported, [MODULES[table] for table in TABLES])


def test_no_import_comes_back_inside_a_package():
  for package in PACKAGES:
    graph = {
      parts: {other for other in imported(path) if other[0] == package}
      for parts, path in MODULES.items()
      if parts[0] == package
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_modules_are_imported_and_not_what_they_hold():
  assert not offences(lambda path: imported(path) - set(MODULES))


def test_outside_libraries_stay_in_their_rooms():
  def elsewhere(path):
    libraries = {module.split('.')[0] for module, _ in imports(path)}
    return [n for n in libraries if path.stem not in ROOMS.get(n, {path.stem})]

  assert not offences(elsewhere)


def test_below_training_a_function_takes_a_few_settings_by_name():
  """Not all of them, in a `Config` or an `Experiment`."""

  def takes_all(path):
    here = path.relative_to(PACKAGE).with_suffix('').parts[0]
    if here not in ('mining', 'retrieval', 'models', 'data'):
      return []
    found = [parts for parts in imported(path) if parts == ('config',)]
    for node in nodes(path):
      if isinstance(node, ast.arg) and node.arg in ('config', 'experiment'):
        kind = ast.unparse(node.annotation) if node.annotation else ''
        if not kind.endswith(('BodyConfig', 'RetrieverConfig')):
          found.append(node.arg)
    return found

  assert not offences(takes_all)


def test_the_order_names_the_packages_and_modules_that_exist():
  tops = {parts[0] for parts in MODULES}
  assert tops == set(ORDER)
  assert {parts[0] for parts in MODULES if len(parts) == 1} == {*ABOVE, *BELOW}


def test_no_two_modules_have_one_name():
  names = collections.Counter(parts[-1] for parts in MODULES)
  names.update(set(PACKAGES))
  assert max(names.values()) == 1
