"""pydocs: queries do not stand in their passages, nor cross the splits."""

import itertools
import re

import numpy as np
import pytest

from ance_jax import config
from ance_jax.data import pydocs
from ance_jax.data import python_files
from ance_jax.data.readers import docstrings
from ance_jax.training import experiment


def slow_near_duplicates(texts):
  """Compares all pairs, and joins what is alike."""
  sets = []
  for text in texts:
    words = re.findall(r'\w+', text.lower())
    last = max(1, len(words) - 4)
    sets.append({tuple(words[i : i + 5]) for i in range(last)})
  groups = list(range(len(texts)))
  for i in range(len(texts)):
    for j in range(i):
      alike = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
      if alike >= 0.8:
        old, new = groups[i], groups[j]
        groups = [new if g == old else g for g in groups]
  return groups


def same_partition(first, second):
  pairs = set(zip(first, second, strict=True))
  return len(pairs) == len(set(first)) == len(set(second))


def test_near_duplicates_are_those_of_comparing_all_pairs():
  random = np.random.default_rng(0)
  texts = []
  for _ in range(60):
    words = [f'w{n}' for n in random.integers(30, size=random.integers(3, 60))]
    texts.append(' '.join(words))
    for _ in range(random.integers(3)):
      changed = list(words)
      for place in random.integers(len(words), size=random.integers(1, 4)):
        changed[place] = 'other'
      texts.append(' '.join(changed).upper())
  found = pydocs.near_duplicates(texts)
  assert same_partition(found.tolist(), slow_near_duplicates(texts))
  assert len(set(found.tolist())) < len(texts)


def test_a_name_is_in_the_same_split_on_every_machine():
  rows = [
    ('numpy.sum', 'Sum of it.', 'a'),
    ('jax.numpy.sum', 'Another sum.', 'b'),
    ('scipy.stats.mean', 'The mean.', 'c'),
  ]
  splits = pydocs.query_splits(rows, np.arange(3))
  assert splits[0] == splits[1]
  # Golden: these never change, or a test query of before is trained on.
  for split, names in GOLDEN.items():
    for name in names:
      assert pydocs.SPLITS[pydocs._place(f'any.{name}')] == split


# The last ones are next to an edge: at 0.79999, 0.80017, 0.89976, 0.90029.
GOLDEN = {
  'train': ['mean', 'open', 'read', 'write', 'close', 'fit', 'norm', 'f1766'],
  'dev': ['sum', 'clip', 'f3134', 'f978'],
  'test': ['dot', 'angle', 'f6639'],
}


def names_of(split, count=2):
  """Names that the hash puts into a split."""
  names = (f'm.f{number}' for number in itertools.count())
  found = (n for n in names if pydocs.SPLITS[pydocs._place(n)] == split)
  return list(itertools.islice(found, count))


@pytest.mark.parametrize('shared', ['group', 'query'])
def test_what_is_related_across_splits_stays_only_in_the_last(shared):
  train, dev, test = (names_of(split)[0] for split in pydocs.SPLITS)
  other = names_of('train')[1]
  one_query = shared == 'query'
  names = (train, dev, test, other)
  queries = ['One  Query.', 'one query.', 'One query.', 'Another.']
  if not one_query:
    queries = [f'Query {name}.' for name in names]
  rows = [(name, query, '') for name, query in zip(names, queries, strict=True)]
  groups = np.array([0, 1, 2, 3] if one_query else [7, 7, 7, 3])
  assert pydocs.query_splits(rows, groups) == ['', '', 'test', 'train']
  assert pydocs.query_splits(rows[:2], groups[:2]) == ['', 'dev']


@pytest.mark.parametrize(
  ('docstring', 'expected'),
  [
    (
      'Returns the sum.\n\nThe sum of all of the entries of the given array x.',
      [
        (
          'Returns the sum.',
          'The sum of all of the entries of the given array x.',
        )
      ],
    ),
    (
      'Returns e.g. a sum, i.e. a\nnumber. More of it stands\nhere.\n\n'
      'And ten words stand in what comes after it.',
      [
        (
          'Returns e.g. a sum, i.e. a number.',
          'More of it stands here. And ten words stand in what comes after it.',
        )
      ],
    ),
    # The summary does not stand in the passage.
    (
      'Returns the sum.\n\n' + 'word ' * 10 + 'Returns the sum.End.',
      [('Returns the sum.', 'word ' * 10 + 'End.')],
    ),
    ('Returns the sum.\n\nToo short.', []),
    # A query of 3 to 30 words, and a passage of 10 words or more.
    ('Too short.\n\n' + 'word ' * 20, []),
    (
      'no ' * 29 + 'more.\n\n' + 'word ' * 10,
      [('no ' * 29 + 'more.', ('word ' * 10).strip())],
    ),
    ('no ' * 30 + 'more.\n\n' + 'word ' * 20, []),
    ('Returns the sum.\n\n' + 'word ' * 9, []),
    ('Sum.\n\n' + 'word ' * 20, []),
    ('No sentence here\n\n' + 'word ' * 20, []),
    ('Parameters\n----------\nx : int. ' + 'word ' * 20, []),
  ],
)
def test_the_summary_is_the_query_and_the_rest_the_passage(docstring, expected):
  found = list(pydocs._query_and_passage('m.f', docstring))
  assert found == [('m.f', *pair) for pair in expected]


def test_names_are_qualified_and_nothing_is_imported(tmp_path):
  path = tmp_path / 'module.py'
  path.write_text(
    '"""Module."""\nraise RuntimeError\nclass A:\n  "Class."\n'
    '  def f(self):\n    "Method."\n    def inner(): "Inner."\n'
    'async def g():\n  "Async."\n'
  )
  assert list(python_files.docstrings(path, 'pack.module')) == [
    ('pack.module', 'Module.'),
    ('pack.module.A', 'Class.'),
    ('pack.module.A.f', 'Method.'),
    ('pack.module.A.f.inner', 'Inner.'),
    ('pack.module.g', 'Async.'),
  ]
  path.write_text('def broken(:\n')
  assert list(python_files.docstrings(path, 'm')) == []


def test_tests_are_left_out(tmp_path, monkeypatch):
  text = f'"Returns the sum.\\n\\n{"word " * 20}"\n'
  for name in (
    'kept.py', 'testing_kept.py', 'latest.py', 'test_a.py', 'a_test.py',
    'conftest.py', 'tests/a.py', 'test/a.py', 'site-packages/a.py',
    'pack/__init__.py', 'pack/b.py',
  ):  # fmt: skip
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  monkeypatch.setattr(pydocs, 'PACKAGES', {})
  monkeypatch.setattr(pydocs.sysconfig, 'get_path', lambda _: str(tmp_path))
  names = [name for name, _, _ in pydocs.docstrings()]
  assert names == ['kept', 'latest', 'pack', 'pack.b', 'testing_kept']


def test_one_summary_is_one_query_with_all_its_passages_as_positives():
  queries = ['Save it.', 'Other.', 'save  it.', 'Third one.', 'Fourth.']
  splits = ['train', 'train', 'train', '', 'dev']
  groups = np.array([0, 1, 2, 2, 1])
  judgements = docstrings._judgements(queries, splits, groups)
  assert judgements['train'] == {
    (0, 0): 1,
    (0, 2): 1,
    (0, 3): 1,
    (1, 1): 1,
    (1, 4): 1,
  }
  assert judgements['dev'] == {(4, 1): 1, (4, 4): 1}
  assert judgements['test'] == {}


def test_a_damaged_set_is_set_aside_and_built_again(
  tmp_path, monkeypatch, capsys
):
  def docstrings():
    for number in range(40):
      text = ' '.join(f'word{number}x{place}' for place in range(12))
      # A property and its setter share a name.
      yield f'module.name{number // 2}', f'Returns number {number}.', text

  monkeypatch.setattr(pydocs, 'docstrings', docstrings)
  settings = config.Config(workdir=str(tmp_path), protocol='beir')
  corpus, splits = experiment.load_texts(settings, ('train',))
  first, ids = corpus.hash, list(corpus.ids)
  # A query's id is of its own passage, which is no result to leave out.
  assert splits['train'].own is None
  assert ids[:3] == ['module.name0', 'module.name0#2', 'module.name1']
  capsys.readouterr()
  assert experiment.load_texts(settings, ('train',)).corpus.hash == first
  assert 'reading the docstrings' not in capsys.readouterr().out
  (path,) = (tmp_path / 'datasets').rglob('*.array_record*')
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  assert experiment.load_texts(settings, ('train',)).corpus.hash == first
  out = capsys.readouterr().out
  assert f'{path} is missing or was changed' in out
  assert 'reading the docstrings' in out
