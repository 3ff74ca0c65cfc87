"""Which flags a job reads, recorded by running each on the small set."""

import collections
import dataclasses
import importlib
import os
import pathlib
import sys

import conftest
import pytest

from ance_jax import config as config_lib

PACKAGE = pathlib.Path(config_lib.__file__).parent
NAMES = {field.name for field in dataclasses.fields(config_lib.Config)}
# Where all settings are handled, whatever they are; the first copies those that
# a job may read otherwise than its run has them.
OF_ALL = 'experiment.<dictcomp> experiment._read_saved'.split()
# What is read before a job begins; with other data, models or indexes than
# those below; or with another flag.
SOMETIMES = (
  'job workdir remote_dir debug progress_bars '
  'questions protocol dev_split bm25_language bm25_k1 bm25_b bm25_run '
  'init_from tie_encoders pooling similarity head_size head_norm query_length '
  'passage_length title_separator query_prompt passage_prompt lower_case '
  'prefix_space index_params search_memory_mb '
  'process_id coordinator beam_options overwrite port'
).split()
BM25 = {'retriever': 'bm25', 'split': 'test', 'workdir': 'bm25'}
MODEL = {'init_from': 'run', 'workdir': 'of_model'}
RUNS = (
  ('train', {}),
  ('train', {'workdir': 'b', 'refresh': 'delayed', 'refresh_delay': 1}),
  ('prepare', {'workdir': 'prepared'}),
  ('inspect', {}),
  ('inspect', {'workdir': ''}),
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

  def read(config, name):
    caller = sys._getframe(1).f_code
    path = pathlib.Path(caller.co_filename)
    if (
      name in NAMES
      and PACKAGE in path.parents
      and path.parent != PACKAGE
      and f'{path.stem}.{caller.co_name}' not in OF_ALL
    ):
      found[job].add(name)
    return object.__getattribute__(config, name)

  tiny = config_lib.Config(
    workdir='run', dataset='beir', data_dir=str(beir_folder),
    method='ance_in_batch', warmup_method='bm25', warmup_steps=2, max_steps=3,
    steps_per_refresh=2, hard_negatives=2, steps_per_log=1, num_devices=1,
    **conftest.SMALL,
  )  # fmt: skip
  os.chdir(tmp_path_factory.mktemp('reads'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(config_lib.Config, '__getattribute__', read, raising=False)
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
