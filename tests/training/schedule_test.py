"""The schedule: what is due when, and that no step of it is passed over."""

import dataclasses

import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.training import methods
from ance_jax.training import schedule


def due(function, config):
  return [s for s in range(config.max_steps + 1) if function(config, s)]


@pytest.fixture
def settings():
  return config_lib.Config(
    method='ance',
    warmup_steps=100,
    max_steps=400,
    steps_per_refresh=90,
    steps_per_eval=50,
    steps_per_checkpoint=70,
  )


def test_refreshes_begin_after_the_warm_up_and_not_at_the_end(settings):
  assert due(schedule.refresh_due, settings) == [100, 190, 280, 370]
  at_end = dataclasses.replace(settings, max_steps=370)
  assert due(schedule.refresh_due, at_end) == [100, 190, 280]


def test_refreshes_end_at_their_number(settings):
  frozen = dataclasses.replace(settings, max_refreshes=1)
  assert due(schedule.refresh_due, frozen) == [100]
  never = dataclasses.replace(settings, method='dpr')
  assert due(schedule.refresh_due, never) == []


def test_the_warm_up_row_is_used_up_to_the_first_refresh(settings):
  active = schedule.ActiveRefresh(5, 4)
  rows = [schedule.method(settings, active, step).sources for step in (4, 5)]
  assert schedule.method(settings, None, 5).sources == rows[0]
  assert rows == [('bm25',), ('index',)]
  plain = dataclasses.replace(settings, method='random')
  assert schedule.method(plain, None, 0).sources == ('corpus',)
  at_once = dataclasses.replace(settings, warmup_steps=0)
  assert schedule.method(at_once, None, 0).sources == ('index',)


def test_a_query_has_the_negatives_of_its_row_and_one_where_triplets_are_made():
  def numbers(method, num_hard_negatives):
    config = config_lib.Config(
      method=method, num_hard_negatives=num_hard_negatives
    )
    return [
      schedule.num_negatives(config, methods.METHODS[name])
      for name in (method, 'bm25', 'in_batch')
    ]

  assert numbers('ance', 3) == [3, 3, 0]
  assert numbers('ance_code', 20) == [1, 1, 0]


@pytest.mark.parametrize(
  'text',
  [
    '0-5', '5-:3', '0-5:0,5-:1', '0-5:1', '0-5:1,6-:1', '0-:1,5-:1', 'a-:1',
    '0-0:1,0-:1', ':', '0-5:2,5-5:1,5-:1',
  ],
)  # fmt: skip
def test_intervals_that_leave_out_steps_are_refused(settings, text):
  with pytest.raises(errors.BadInput, match='without a gap'):
    dataclasses.replace(settings, refresh_schedule=text)


@pytest.mark.parametrize(
  ('every', 'saves'), [(None, [0, 3, 6, 8]), (5, [0, 5, 8]), (9, [0, 8])]
)
def test_checkpoints_are_as_far_apart_as_refreshes_would_be(every, saves):
  config = config_lib.Config(
    method='dpr', max_steps=8, steps_per_refresh=3, steps_per_checkpoint=every
  )
  assert due(schedule.save_due, config) == saves
  assert schedule.num_saves(config) == len(saves)
  nexts = [schedule.next_boundary(config, step) for step in range(8)]
  assert nexts == [min(n for n in saves if n > step) for step in range(8)]
