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


def test_checkpoints_are_saved_at_refreshes_between_them_and_at_both_ends(
  settings,
):
  expected = [0, 70, 100, 140, 190, 210, 280, 350, 370, 400]
  assert due(schedule.save_due, settings) == expected


def test_every_step_with_something_due_is_a_boundary(settings):
  for method in ('ance', 'in_batch'):
    for max_refreshes in (0, 2):
      config = dataclasses.replace(
        settings, method=method, max_refreshes=max_refreshes
      )
      things = (schedule.refresh_due, schedule.save_due, schedule.eval_due)
      expected = {s for thing in things for s in due(thing, config)}
      found, step = {0}, 0
      while step < config.max_steps:
        step = schedule.next_boundary(config, step)
        found.add(step)
      assert expected <= found


def test_the_warm_up_row_is_used_up_to_the_first_refresh(settings):
  active = schedule.ActiveRefresh(5, 4)
  rows = [schedule.method(settings, active, step).negatives for step in (4, 5)]
  assert schedule.method(settings, None, 5).negatives == rows[0]
  assert rows == ['bm25', 'index']
  plain = dataclasses.replace(settings, method='random')
  assert schedule.method(plain, None, 0).negatives == 'corpus'
  at_once = dataclasses.replace(settings, warmup_steps=0)
  assert schedule.method(at_once, None, 0).negatives == 'index'


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


def test_intervals_have_steps_of_their_own(settings):
  config = dataclasses.replace(
    settings, refresh_schedule='0-200:40,200-:100', warmup_steps=90
  )
  assert due(schedule.refresh_due, config) == [90, 130, 170, 210, 310]
  assert schedule.num_refreshes(config) == 5
  assert schedule.refreshes_between(config, 90, 310) == [130, 170, 210]
  sliced = dataclasses.replace(config, query_slices=3)
  slices = [
    schedule.query_slice(sliced, s) for s in (0, 90, 130, 169, 170, 310)
  ]
  assert slices == [0, 0, 1, 1, 2, 1]


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


def test_each_pick_up_is_a_boundary_and_has_its_refresh_before_it(settings):
  delayed = dataclasses.replace(
    settings, refresh_mode='delayed', refresh_delay=25
  )
  used = {
    s: schedule.comes_into_use(delayed, s)
    for s in range(401)
    if schedule.comes_into_use(delayed, s) is not None
  }
  assert used == {125: 100, 215: 190, 305: 280, 395: 370}
  found, step = {0}, 0
  while step < 400:
    step = schedule.next_boundary(delayed, step)
    found.add(step)
  assert used.keys() | used.values() <= found
