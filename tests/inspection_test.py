"""The report of a dataset, against counts by hand."""

import dataclasses

import conftest
import numpy as np
import pytest

from ance_jax import data
from ance_jax import handoff
from ance_jax import inspection
from ance_jax import logs
from ance_jax import strings


def test_the_report_counts_what_is_in_the_set(tiny, capsys):
  settings = dataclasses.replace(tiny, job='inspect', num_devices=1)
  found = inspection.run(settings)
  assert handoff.read_json(f'{tiny.workdir}/inspection.json') == found
  assert found['corpus'] == {
    'passages': conftest.NUM_PASSAGES,
    'without a title': 50,
    'of the same text as another': 20,
    'most of one text': 2,
  }
  assert list(found['splits']) == ['train', 'dev', 'test']
  train = found['splits']['train']
  assert train['queries'] == conftest.NUM_TRAIN
  # Each fourth query has a second passage, of grade 2.
  assert train['judgements of grade 2'] == conftest.NUM_TRAIN // 4
  assert train['positives of a query, most'] == 2
  assert train['positives of a query, mean'] == pytest.approx(1.25)
  out = capsys.readouterr().out
  assert 'examples of train' in out
  assert 'negatives being mined' in out
  assert 'checkpoints ' in out
  # Nothing of a run was begun: it can still be trained there.
  assert not logs.read(tiny.workdir)


def test_queries_that_train_has_too_are_counted():
  def split(*texts):
    empty = np.zeros(0, np.int32)
    offsets = np.zeros(len(texts) + 1, np.int64)
    ids = strings.make(map(str, range(len(texts))))
    return data.Split(ids, strings.make(texts), offsets, empty, empty, '')

  first = split('What is it', 'who', 'when')
  assert inspection.shared_texts(split('what  is IT', 'where'), first) == 1
  assert inspection.split_facts(first)['queries without a positive'] == 3


def test_what_a_limit_cuts_is_a_share_of_texts_and_of_tokens():
  lengths = np.array([2, 4, 6, 8])
  facts = inspection.length_facts(lengths, 5)
  assert facts['share of texts cut there'] == 0.5
  assert facts['share of tokens cut there'] == pytest.approx(4 / 20)
  assert facts['100 % have at most'] == 8
  lines = inspection.histogram(lengths, 5).splitlines()
  assert sum(int(line.split()[1]) for line in lines) == 4
  assert sum('<- limit' in line for line in lines) == 1
