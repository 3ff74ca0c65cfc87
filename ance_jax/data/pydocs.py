"""pydocs: the docstrings of Python and of this project's dependencies.

A retrieval dataset that every machine has, so that the default run downloads
nothing. A passage is a docstring without its summary sentence, titled with its
qualified name; the summary is the query. Sources are parsed, never imported, so
the dataset depends only on the installed versions, which are in the builder's
metadata.
"""

import collections
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent import futures
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import sysconfig

import numpy as np
from scipy import sparse
import tensorflow_datasets as tfds

from ance_jax.core import logs
from ance_jax.data import keys
from ance_jax.data import python_files
from ance_jax.data import strings

# {import name: distribution}, all installed with this project.
PACKAGES = {
  'absl': 'absl-py',
  'bm25s': 'bm25s',
  'etils': 'etils',
  'faiss': 'faiss-cpu',
  'flax': 'flax',
  'huggingface_hub': 'huggingface_hub',
  'ir_measures': 'ir_measures',
  'jax': 'jax',
  'matplotlib': 'matplotlib',
  'numpy': 'numpy',
  'optax': 'optax',
  'orbax': 'orbax-checkpoint',
  'safetensors': 'safetensors',
  'scipy': 'scipy',
  'tensorboardX': 'tensorboardX',
  'tensorflow_datasets': 'tensorflow-datasets',
  'tokenizers': 'tokenizers',
  'tqdm': 'tqdm',
  'transformers': 'transformers',
}
# Tests, and folders whose files are mostly copies of each other.
SKIPPED_FOLDERS = {
  'test', 'tests', 'testing', 'idlelib', 'lib2to3', 'site-packages'
}  # fmt: skip
SKIPPED_PATHS = {('transformers', 'models')}
_TEST_FILE = re.compile(r'(test_.*|.*_test|conftest)\.py')
# Limits in words; shorter or longer summaries are poor queries, and shorter
# passages have too little to search.
MIN_QUERY_WORDS, MAX_QUERY_WORDS, MIN_PASSAGE_WORDS = 3, 30, 10
# Texts are grouped from this Jaccard similarity of their 5-word shingles.
SHINGLE_WORDS, NEAR_DUPLICATE = 5, 0.8
# Short-lived processes parse the files in parallel, one per CPU.
FILES_PER_PROCESS = 200
# By the hash of a name's last part: 80% train, 10% dev, 10% test.
SPLITS = ('train', 'dev', 'test')
DEV_FROM, TEST_FROM = 0.8, 0.9
# The end of a sentence, but not of an abbreviation.
_SENTENCE = re.compile(
  r'(.+?(?<!\be\.g)(?<!\bi\.e)(?<!\betc)[.!?])(?:\s+(.*)|$)'
)


class Pydocs(tfds.core.GeneratorBasedBuilder):
  """One table of docstrings, in the order of their sources."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}

  def _info(self):
    versions = {'python': platform.python_version()} | {
      name: importlib.metadata.version(name) for name in PACKAGES.values()
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description=__doc__,
      features=tfds.features.FeaturesDict(
        {
          'id': tfds.features.Text(),
          'title': tfds.features.Text(),
          'text': tfds.features.Text(),
          'query': tfds.features.Text(),
          'split': tfds.features.Text(),
          'group': np.int32,
        }
      ),
      license='The licences of Python and of the packages read.',
      metadata=tfds.core.MetadataDict(versions=versions),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    # Nothing is downloaded.
    return {'docstrings': self._generate_examples()}

  def _generate_examples(self):
    rows = list(docstrings())
    groups = near_duplicates([text for _, _, text in rows])
    splits = query_splits(rows, groups)
    seen = collections.Counter()
    for number, (name, query, text) in enumerate(rows):
      seen[name] += 1  # A property and its setter share a name.
      yield (
        number,
        {
          'id': name if seen[name] == 1 else f'{name}#{seen[name]}',
          'title': name,
          'text': text,
          'query': query,
          'split': splits[number],
          'group': groups[number],
        },
      )


def docstrings() -> Iterator[tuple[str, str, str]]:
  """Yields (qualified name, summary, rest) of every usable docstring."""
  roots = [((), pathlib.Path(sysconfig.get_path('stdlib')))]
  for package in PACKAGES:
    folders = importlib.util.find_spec(package).submodule_search_locations
    roots += [((package,), pathlib.Path(folder)) for folder in folders]
  sources = [
    (path, before + path.relative_to(root).parts)
    for before, root in roots
    for path in sorted(root.rglob('*.py'))
  ]
  files = [
    (str(path), '.'.join(parts).removesuffix('.py').removesuffix('.__init__'))
    for path, parts in sources
    if _is_wanted(path, parts)
  ]
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for found in logs.progress(
      pool.map(_parse, strings.batches(files, FILES_PER_PROCESS)),
      'read docstrings',
      total=len(files),
      unit='files',
      count=len,
    ):
      for name, docstring in itertools.chain.from_iterable(found):
        yield from _query_and_passage(name, docstring)


def _is_wanted(path, parts):
  return (
    SKIPPED_FOLDERS.isdisjoint(parts)
    and parts[:2] not in SKIPPED_PATHS
    and not _TEST_FILE.fullmatch(path.name)
  )


def near_duplicates(texts: Sequence[str]) -> np.ndarray:
  """Returns group numbers, (N,) int32, equal for nearly equal texts.

  Two texts are joined if the Jaccard similarity of their shingle sets is at
  least `NEAR_DUPLICATE`; groups are the connected components. Only pairs that
  share one of their rarest shingles are compared: sets of size s with
  similarity t must share one of the s - ceil(t s) + 1 rarest of both (Chaudhuri
  et al. 2006, prefix filter), so no pair is missed.
  """
  number, sets = {}, []
  for text in texts:
    words = re.findall(r'\w+', text.lower())
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    shingles = {' '.join(words[i : i + SHINGLE_WORDS]) for i in starts}
    sets.append([number.setdefault(s, len(number)) for s in sorted(shingles)])
  sizes = np.array([len(s) for s in sets])
  frequency = np.bincount(np.concatenate(sets), minlength=len(number))
  prefixes = []
  for shingles in sets:
    rarest_first = sorted(shingles, key=lambda s: (frequency[s], s))
    shared = int(np.ceil(NEAR_DUPLICATE * len(shingles)))
    prefixes.append(rarest_first[: len(shingles) - shared + 1])
  rare = _incidence(prefixes, len(number))
  first, second = sparse.triu(rare @ rare.T, 1).nonzero()
  whole = _incidence(sets, len(number))
  common = np.asarray(whole[first].multiply(whole[second]).sum(1)).ravel()
  similarity = common / (sizes[first] + sizes[second] - common)
  same = similarity >= NEAR_DUPLICATE
  return _components(len(texts), first[same], second[same])


def query_splits(
  rows: Sequence[tuple[str, str, str]], groups: np.ndarray
) -> list[str]:
  """Returns the split of each row's query, '' if it is in none.

  The split is a hash of the last part of the name, so it is the same on every
  machine. If rows of one group, or with one summary, fall into several splits,
  only those in the last of train, dev, test are kept.

  Args:
    rows: N tuples (name, query, text).
    groups: (N,) int32 from `near_duplicates`.
  """
  by_query = {}
  same_query = [
    by_query.setdefault(normal(q), i) for i, (_, q, _) in enumerate(rows)
  ]
  by_group = {}
  same_group = [by_group.setdefault(int(g), i) for i, g in enumerate(groups)]
  related = _components(
    len(rows),
    np.tile(np.arange(len(rows)), 2),
    np.array(same_query + same_group),
  )
  place = np.array([_place(name) for name, _, _ in rows])
  strictest = np.zeros(len(rows), int)
  np.maximum.at(strictest, related, place)
  return [
    SPLITS[mine] if mine == last else ''
    for mine, last in zip(place, strictest[related], strict=True)
  ]


def normal(query: str) -> str:
  """Returns the lower-cased words of a query, which identify it."""
  return ' '.join(query.lower().split())


def _parse(files):
  """Returns the docstrings of each file, parsed in a subprocess."""
  return json.loads(
    subprocess.check_output(
      [sys.executable, '-I', python_files.__file__],
      input=json.dumps(files).encode(),
    )
  )


def _query_and_passage(name, docstring):
  paragraph, _, rest = docstring.partition('\n\n')
  match = _SENTENCE.match(' '.join(paragraph.split()))
  if not match or '---' in match[1]:
    return
  query = match[1]
  text = ' '.join(f'{match[2] or ""} {rest}'.split()).replace(query, '').strip()
  if (
    len(text.split()) >= MIN_PASSAGE_WORDS
    and MIN_QUERY_WORDS <= len(query.split()) <= MAX_QUERY_WORDS
  ):
    yield name, query, text


def _place(name):
  """Returns the index in `SPLITS` of a qualified name."""
  share = keys.hash64(name.rpartition('.')[2]) / 2**64
  return int(share >= DEV_FROM) + int(share >= TEST_FROM)


def _incidence(sets, width):
  """Returns the sparse (len(sets), width) float32 membership matrix."""
  offsets = np.cumsum([0] + [len(s) for s in sets])
  return sparse.csr_matrix(
    (np.ones(offsets[-1], np.float32), np.concatenate(sets), offsets),
    shape=(len(sets), width),
  )


def _components(size, first, second):
  edges = sparse.coo_matrix(
    (np.ones(len(first)), (first, second)), (size, size)
  )
  return sparse.csgraph.connected_components(edges, directed=False)[1]
