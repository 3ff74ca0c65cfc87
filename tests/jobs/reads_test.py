"""Which flags a job reads, recorded by running each on the small set."""

import collections
import dataclasses
import importlib
import json
import operator
import os
import pathlib
import sys

import conftest
import pytest

from ance_jax import config as config_lib
from ance_jax.data import records
from ance_jax.models import pretrained
from ance_jax.models import sources
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import encoding

PACKAGE = pathlib.Path(config_lib.__file__).parent
NAMES = {field.name for field in dataclasses.fields(config_lib.Config)}
# Where settings are copied, whether they are read or not.
COPIES = (
  'experiment.<dictcomp>', 'experiment._read_saved', 'settings.data',
  'settings.index', 'settings._part', 'settings.<dictcomp>',
)  # fmt: skip
# Where to, with the fields that have another name there.
COPIED = {
  records.Settings: {},
  pretrained.Settings: {},
  sources.Sizes: {},
  encoding.Settings: {},
  corpus_index.Settings: {
    'factory': 'index',
    'params': 'index_params',
    'center': 'center_passages',
    'memory_mb': 'search_memory_mb',
  },
}
# What is read before a job begins; by unpacking; with other data, models or
# indexes than those below; or with another flag.
SOMETIMES = (
  'job workdir remote_dir debug progress_bars '
  'questions protocol dev_split bm25_language bm25_k1 bm25_b bm25_run '
  'init_from tie_encoders pooling similarity head_size head_norm query_length '
  'passage_length title_separator query_prompt passage_prompt lower_case '
  'prefix_space index_params search_memory_mb rows_per_block '
  'process_id coordinator beam_options overwrite port checkpoint '
  'vocab_size num_layers hidden_size num_heads intermediate_size '
  'negatives_per_source restart_from also_weight teacher_temperature '
  'simans_a simans_b hardness_columns score_run cross_encoder'
).split()
BM25 = {'retriever': 'bm25', 'split': 'test', 'workdir': 'bm25'}
MODEL = {'init_from': 'run', 'workdir': 'of_model'}
RUNS = (
  ('train', {}),
  ('train', {'workdir': 'b', 'refresh_mode': 'delayed', 'refresh_delay': 1}),
  ('train', {**MODEL, 'workdir': 'further', 'max_steps': 1}),
  ('prepare', {'workdir': 'prepared'}),
  ('inspect', {}),
  ('inspect', {'workdir': ''}),
  ('inspect', {'workdir': '', 'method': 'given', 'negatives': 'given.jsonl'}),
  ('refresh', {}),
  ('encode', MODEL),
  ('audit', MODEL),
  ('evaluate', {**MODEL, 'split': 'test', 'index': 'device'}),
  ('evaluate', BM25),
  ('mine', MODEL),
  ('mine', BM25),
  ('export', {'export_corpus': True}),
  ('search', {**MODEL, 'query': 't1w1'}),
  ('search', {**BM25, 'query': 't1w1'}),
  ('report', {'runs': 'run'}),
  ('compare', {'runs': 'of_model,bm25', 'split': 'test', 'workdir': 'c'}),
)


@pytest.fixture(scope='module')
def reads(beir_folder, tmp_path_factory):
  """{job: names of the fields that it read}."""
  found, before = collections.defaultdict(set), os.getcwd()

  def note(name):
    caller = sys._getframe(2).f_code
    path = pathlib.Path(caller.co_filename)
    # What lies beside the packages handles all settings.
    is_job = PACKAGE in path.parents and path.parent != PACKAGE
    if is_job and f'{path.stem}.{caller.co_name}' not in COPIES:
      found[job].add(name)

  def read(config, name):
    if name in NAMES:
      note(name)
    return object.__getattribute__(config, name)

  def noting(name, get):
    return property(lambda copied: note(name) or get(copied))

  tiny = config_lib.Config(
    workdir='run', dataset='beir', data_dir=str(beir_folder),
    method='ance_in_batch', warmup_method='bm25', warmup_steps=2, max_steps=3,
    steps_per_refresh=2, num_hard_negatives=2, steps_per_log=1, num_devices=1,
    **conftest.SMALL,
  )  # fmt: skip
  os.chdir(tmp_path_factory.mktemp('reads'))
  given = {'query_id': 'q0', 'negative_ids': ['p40', 'p41', 'p42']}
  pathlib.Path('given.jsonl').write_text(json.dumps(given) + '\n')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(config_lib.Config, '__getattribute__', read, raising=False)
    for kind, others in COPIED.items():
      for place, field in enumerate(kind._fields):
        if (name := others.get(field, field)) in NAMES:
          get = operator.itemgetter(place)
          patch.setattr(kind, field, noting(name, get))
    for job, changes in RUNS:
      config = dataclasses.replace(tiny, job=job, **changes)
      importlib.import_module(f'ance_jax.jobs.{job}').run(config)
  os.chdir(before)
  return found


@pytest.mark.parametrize('job', config_lib.JOBS)
def test_the_table_has_all_that_a_job_reads_and_little_else(job, reads):
  said = {name for name in NAMES if job in config_lib.readers(name)}
  assert reads[job] - said == set()
  assert said - reads[job] - {*SOMETIMES} == set()
