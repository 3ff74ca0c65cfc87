"""Tokenizing that is dealt out gives the bytes of tokenizing here."""

import dataclasses

import pytest

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.jobs import beam as beam_lib
from ance_jax.jobs import prepare
from ance_jax.training import experiment

TEXTS = [f'a text of number {n} {"and more " * (n % 7)}' for n in range(50)]


class Killed(Exception):
  pass


@pytest.fixture
def small_parts(monkeypatch):
  monkeypatch.setattr(tokens, '_ROWS_AT_ONCE', 4)
  monkeypatch.setattr(tokens, '_BATCHES_A_PART', 3)


def rows(folder, spread=None, pieces=1):
  return tokens.token_rows(
    tokenizer_lib.train_vocabulary(TEXTS, 100),
    TEXTS,
    what='passages',
    num_texts=len(TEXTS),
    cut=tokens.Cut(8, pieces),
    content_hash='some',
    folder=folder,
    spread=spread,
  )


def files(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def backwards(function, tasks):
  for task in reversed(tasks):
    function(task)


@pytest.mark.parametrize('pieces', [1, 3])
def test_parts_made_elsewhere_give_the_same_bytes(
  pieces, tmp_path, small_parts, monkeypatch
):
  rows(tmp_path / 'spread', backwards, pieces)
  rows(tmp_path / 'parts', None, pieces)
  monkeypatch.undo()
  rows(tmp_path / 'whole', None, pieces)
  found = files(tmp_path / 'spread')
  assert len(found) == (5 if pieces > 1 else 4)  # One is the lock.
  assert found == files(tmp_path / 'parts') == files(tmp_path / 'whole')


def test_after_a_kill_only_missing_parts_are_made(tmp_path, small_parts):
  made = []

  def dies(function, tasks):
    for task in tasks[:2]:
      function(task)
    raise Killed

  def counts(function, tasks):
    for task in tasks:
      made.extend([task] * (not task.is_dir()))
      function(task)

  with pytest.raises(Killed):
    rows(tmp_path / 'killed', dies)
  rows(tmp_path / 'killed', counts)
  assert len(made) == 3
  rows(tmp_path / 'whole')
  assert files(tmp_path / 'killed') == files(tmp_path / 'whole')


def test_what_a_killed_process_left_of_a_shared_folder_is_removed(tmp_path):
  left = tmp_path / f'passages-0.new-1-2{atomic._UNFINISHED}'
  left.mkdir()
  (left / 'ids.bin').write_text('half')
  rows(tmp_path)
  assert not left.exists()


def test_without_beam_a_sentence_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(beam_lib, 'beam', None)
  with pytest.raises(errors.BadInput, match=r"install 'ance_jax\[beam\]'"):
    beam_lib.on_beam('DirectRunner', '')


def test_runs_share_the_token_rows_of_one_folder(tiny, tmp_path, monkeypatch):
  made, real = [], tokens._tokenize

  def tokenize(backend, batches, folder, cut):
    made.append(folder.parent)
    real(backend, batches, folder, cut)

  monkeypatch.setattr(tokens, '_tokenize', tokenize)
  shared = str(tmp_path / 'shared')
  first = dataclasses.replace(tiny, job='prepare', tokens_dir=shared)
  prepare.run(first)
  assert set(made) == {tmp_path / 'shared'}
  number, kept = len(made), files(tmp_path / 'shared')
  experiment.create(
    dataclasses.replace(first, workdir=str(tmp_path / 'other')), None
  )
  assert len(made) == number
  assert files(tmp_path / 'shared') == kept
  assert not (tmp_path / 'other' / 'tokens').exists()


@pytest.mark.beam
def test_beam_gives_the_same_bytes(tiny, tmp_path, small_parts):
  local = dataclasses.replace(
    tiny, job='prepare', tokens_dir=str(tmp_path / 'local')
  )
  beam = dataclasses.replace(
    local,
    workdir=str(tmp_path / 'beam_run'),
    tokens_dir=str(tmp_path / 'beam'),
    beam_runner='DirectRunner',
    beam_options='--direct_running_mode=multi_processing'
    ' --direct_num_workers=2',
  )
  prepare.run(local)
  prepare.run(beam)
  found = files(tmp_path / 'beam')
  assert found == files(tmp_path / 'local')
  assert any(name.startswith('passages-') for name in found)


@pytest.mark.beam
def test_a_runner_that_beam_does_not_know_is_refused():
  with pytest.raises(errors.BadInput, match='--beam_runner=NoRunner is no'):
    beam_lib.on_beam('NoRunner', '')
