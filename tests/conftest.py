"""Eight fake devices for all tests, and a small retrieval set.

The set is made of words that belong to a topic, so that a few dozen steps teach
an encoder something; each text and id is a function of its number.
"""

import os

# Before jax is imported: the number of CPU devices is fixed at that moment.
# XLA compiles with little optimization, as in jax's own tests, and without its
# newer way to fuse, which takes twice as long: compiling is most of their time.
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 '
  '--xla_backend_optimization_level=0 '
  '--xla_llvm_disable_expensive_passes=true '
  '--xla_cpu_use_fusion_emitters=false'
)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['HF_HUB_OFFLINE'] = '1'

import dataclasses
import gc
import json
import signal
import sys

import jax
import numpy as np
import pytest

from ance_jax import config
from ance_jax.jobs import report
from ance_jax.retrieval import encoding
from ance_jax.training import steps

# Files that take longest are begun first, so that none is left to one worker.
LONG = (
  'train_test background_test steps_test crash_test distributed_test '
  'remote_test export_test flagfiles_test bert_weights_test main_test '
  'experiments_test due_test refreshes_test old_run_test mine_test '
  'bi_encoder_test storage_faults_test rerank_test'
).split()
NUM_PASSAGES, NUM_TRAIN, NUM_DEV, NUM_TEST = 150, 48, 16, 12
# Settings of an encoder that learns something of that set in a few steps. It
# takes the mean: vectors of the first token hardly differ by then, and fp16
# would lose their order.
SMALL = {
  'num_layers': 1, 'hidden_size': 16, 'num_heads': 2, 'intermediate_size': 32,
  'vocab_size': 200, 'pooling': 'mean', 'similarity': 'cosine',
  'temperature': 0.1, 'query_length': 8, 'passage_length': 16,
  'batch_size': 8, 'top_k': 10, 'optimizer': 'adamw', 'learning_rate': 1e-2,
  'lr_warmup_steps': 2, 'tokens_per_batch': 1024, 'rows_per_block': 64,
}  # fmt: skip
PYTHONS_THRESHOLD = gc.get_threshold()
# Tracing makes so many objects that Python looks for garbage all the time.
gc.set_threshold(50_000, 20, 50)


def pytest_addoption(parser):
  parser.addoption(
    '--sample',
    type=int,
    default=0,
    help='Cases that each soak test tries, drawn by a seed; 0: its own number.',
  )
  parser.addoption('--write_unchanged', action='store_true')


def pytest_configure(config):
  # A shell starts background jobs with SIGINT ignored, and children inherit it.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  # Else xdist begins with the files that have the most tests.
  config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
  places = {name: place for place, name in enumerate(LONG)}
  items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture
def sample(request):
  """Draws a soak test's cases: as many as --sample says, or else `most`."""

  def sample(cases, most):
    cases, wanted = list(cases), request.config.getoption('--sample') or most
    if wanted >= len(cases):
      return cases
    chosen = np.random.default_rng(0).choice(len(cases), wanted, replace=False)
    return [cases[number] for number in sorted(chosen)]

  return sample


def pytest_terminal_summary(terminalreporter):
  """Fails a run that skipped a test where all that tests need is installed."""
  skipped = terminalreporter.stats.get('skipped', [])
  if skipped and sys.version_info < (3, 12):
    terminalreporter.write_line(
      f'{len(skipped)} tests were skipped, and below Python 3.12 none may be'
    )
    terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def pythons_gc():
  """Has Python look for garbage as often as it does in a run."""
  before = gc.get_threshold()
  gc.set_threshold(*PYTHONS_THRESHOLD)
  yield
  gc.set_threshold(*before)


@pytest.fixture(scope='session', autouse=True)
def _compile_once(tmp_path_factory):
  """Lets the tests share what they compile, also with their subprocesses."""
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  folder = str(folder / 'compiled')
  for name, value in (
    ('jax_compilation_cache_dir', folder),
    ('jax_persistent_cache_min_compile_time_secs', 0),
  ):
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


@pytest.fixture(scope='module', autouse=True)
def _forget_what_was_compiled():
  """Gives back what a module compiled: all of it in one process is too much.

  It came to 5.7 GB, and XLA ended with a segmentation fault.
  """
  yield
  jax.clear_caches()


@pytest.fixture(scope='session', autouse=True)
def _draw_once():
  """Draws one picture of each set of panels: a run draws at each boundary."""
  real, kept = report._png, {}

  def png(drawn, panels, columns):
    key = len(drawn), tuple(panels), columns
    if key not in kept:
      kept[key] = real(drawn, panels, columns)
    return kept[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report, '_png', png)
    yield


@pytest.fixture(scope='module')
def compiled_once():
  """Keeps what is compiled for the next run of equal settings in a module."""
  kept = {}
  real_step, real_encoders = steps.make_train_step, encoding.make_encoders

  def make_train_step(config, method, retriever, optimizer, devices):
    # Where negatives come from is nothing to the step.
    alike = dataclasses.replace(
      config, workdir='', remote_dir='', refresh_mode='sync', refresh_delay=0,
      refresh_devices=0,
      max_staleness=0, refresh_replay='', checkpoints_to_keep=1,
      refresh_trigger=0.0, warmup_until_plateau=0,
      steps_per_eval=None, steps_per_checkpoint=None, steps_per_refresh=1,
      max_refreshes=0, top_k=1,
    )  # fmt: skip
    key = alike, method, retriever, devices
    if key not in kept:
      kept[key] = real_step(config, method, retriever, optimizer, devices)
    return kept[key]

  def make_encoders(retriever, **kwargs):
    key = retriever, tuple(kwargs.items())
    if key not in kept:
      kept[key] = real_encoders(retriever, **kwargs)
    return kept[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(steps, 'make_train_step', make_train_step)
    patch.setattr(encoding, 'make_encoders', make_encoders)
    yield


@pytest.fixture(scope='session')
def beir_folder(tmp_path_factory):
  """A BEIR folder; passages 2i and 2i + 1 of the first 20 have one text."""
  folder = tmp_path_factory.mktemp('beir')
  write_beir(folder)
  return folder


@pytest.fixture
def tiny(beir_folder, tmp_path):
  """Settings of a run of seconds: warm-up, two refreshes, eight devices."""
  return make_tiny(beir_folder, tmp_path / 'run')


def make_tiny(data_dir, workdir):
  return config.Config(
    workdir=str(workdir),
    dataset='beir',
    data_dir=str(data_dir),
    method='ance_in_batch',
    warmup_method='in_batch',
    warmup_steps=4,
    max_steps=12,
    steps_per_refresh=4,
    num_hard_negatives=2,
    steps_per_log=1,
    **SMALL,
  )


@pytest.fixture
def eventful(tiny):
  """Three refreshes, saves and evaluations between; dropout, one device."""
  return dataclasses.replace(
    tiny,
    max_steps=16,
    dropout_rate=0.2,
    num_devices=1,
    steps_per_checkpoint=3,
    steps_per_eval=5,
  )


def write_beir(folder):
  """Writes corpus, queries and qrels of the small set."""
  random = np.random.default_rng(0)
  topics = random.integers(12, size=NUM_PASSAGES)
  passages = []
  for number in range(NUM_PASSAGES):
    source = number - number % 2 if number < 20 else number
    words = np.random.default_rng(source).integers(40, size=9)
    text = ' '.join(f't{topics[source]}w{word}' for word in words)
    title = f'topic {topics[source]}' if number % 3 else ''
    passages.append({'_id': f'p{number}', 'title': title, 'text': text})
  queries, qrels = [], {'train': [], 'dev': [], 'test': []}
  sizes = {'train': NUM_TRAIN, 'dev': NUM_DEV, 'test': NUM_TEST}
  for split, size in sizes.items():
    for _ in range(size):
      number = len(queries)
      passage = int(random.integers(NUM_PASSAGES))
      words = passages[passage]['text'].split()
      text = ' '.join(random.choice(words, 4, replace=False))
      queries.append({'_id': f'q{number}', 'text': text})
      qrels[split].append((f'q{number}', f'p{passage}', 1))
      if number % 4 == 0:
        other = (passage + 7) % NUM_PASSAGES
        qrels[split].append((f'q{number}', f'p{other}', 2))
  _write_jsonl(folder / 'corpus.jsonl', passages)
  _write_jsonl(folder / 'queries.jsonl', queries)
  (folder / 'qrels').mkdir()
  for split, rows in qrels.items():
    lines = ['query-id\tcorpus-id\tscore'] + [
      '\t'.join(map(str, r)) for r in rows
    ]
    (folder / 'qrels' / f'{split}.tsv').write_text('\n'.join(lines) + '\n')


def _write_jsonl(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
