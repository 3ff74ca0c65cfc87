"""Refreshes that are due by what the weights show, not by a step's number."""

import dataclasses
import pathlib
import time

import background_test
import crash_test
import pytest

from ance_jax import errors
from ance_jax.core import logs
from ance_jax.jobs import train
from ance_jax.training import diagnostics
from ance_jax.training import schedule
from ance_jax.training import trainer

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture
def config(tiny):
  return dataclasses.replace(
    tiny, num_devices=1, max_steps=24, checkpoints_to_keep=1
  )


@pytest.fixture(autouse=True)
def _fewer_passages(monkeypatch):
  # Of 150 passages the first 100 are nearly all.
  monkeypatch.setattr(diagnostics, '_DEPTH', 10)


def stopped_now_and_then(config, monkeypatch, steps):
  """Trains, with a stop signal after some steps, and again to the end."""
  for step in steps:
    with monkeypatch.context() as patch:
      background_test.set_at(
        patch, step, background_test.threading.Event(), logs._stop.set
      )
      with pytest.raises(errors.Stopped):
        train.run(config)
    logs._stop.clear()
  train.run(config)


def made(config):
  folder = pathlib.Path(config.workdir) / 'refresh'
  return [int(path.name) for path in sorted(folder.glob('[0-9]*'))]


def test_a_refresh_is_left_out_while_the_negatives_are_hard(
  config, monkeypatch, capsys
):
  always = dataclasses.replace(
    config, workdir=f'{config.workdir}-always', max_refreshes=1,
    steps_per_eval=4,
  )  # fmt: skip
  train.run(always)
  overlaps = logs.series(always.workdir, 'probe/overlap')
  seen = [overlaps[step] for step in (8, 12, 16, 20)]
  # The last of these that is lower than all before: there one is made.
  first = next(n for n in range(1, 4) if seen[n] < min(seen[:n]))
  trigger = (seen[first] + min(seen[:first])) / 2

  config = dataclasses.replace(config, refresh_trigger=trigger)
  stopped_now_and_then(config, monkeypatch, (3, 13))

  assert made(config)[:2] == [4, 8 + 4 * first]
  assert 'refresh at step 8: dev' in capsys.readouterr().out
  again = dataclasses.replace(config, workdir=f'{config.workdir}-again')
  train.run(again)
  assert 'left out, as' in capsys.readouterr().out
  crash_test.check_same(crash_test.outcome(config), crash_test.outcome(again))
  # What is left out is looked at, and dev with it.
  for name in ('probe/overlap', 'dev/mrr@10'):
    found = logs.series(again.workdir, name)
    assert found[8] == logs.series(always.workdir, name)[8]


def test_beside_training_what_is_left_out_is_looked_at_once(
  config, monkeypatch, capsys
):
  monkeypatch.setattr(background_test.background, 'LOOK_SECS', 0.001)
  take_step = trainer.Trainer.take_step

  def slowly(self, batch):
    time.sleep(0.2)  # Else it may be over before the refresher has looked.
    take_step(self, batch)

  monkeypatch.setattr(trainer.Trainer, 'take_step', slowly)
  config = dataclasses.replace(
    config, refresh_mode='async', refresh_trigger=0.01, max_staleness=20,
    checkpoints_to_keep=9,
  )  # fmt: skip
  train.run(config)
  assert made(config) == [4]
  said = capsys.readouterr().out.splitlines()
  looked_at = [line for line in said if 'left out, as' in line]
  assert len(looked_at) == len(set(looked_at)) > 0


def test_the_warm_up_ends_when_dev_has_levelled_off(config, monkeypatch):
  config = dataclasses.replace(config, warmup_steps=16, steps_per_eval=2)
  whole = dataclasses.replace(config, workdir=f'{config.workdir}-whole')
  train.run(whole)
  scores = logs.series(whole.workdir, 'dev/mrr@10')
  best = [max(scores[n] for n in range(0, step, 2)) for step in range(2, 16, 2)]
  worse = [scores[step] <= best[step // 2 - 1] for step in range(2, 16, 2)]
  assert any(worse[:-2])
  end = 2 * worse.index(True) + 4

  config = dataclasses.replace(config, warmup_until_plateau=1)
  stopped_now_and_then(config, monkeypatch, (end - 2, end + 1))

  assert made(config) == list(range(end, 24, 4))
  assert set(logs.series(config.workdir, 'refresh/judged')) == set(made(config))
  found = logs.series(config.workdir, 'dev/mrr@10')
  assert {n: v for n, v in found.items() if n <= end} == {
    n: v for n, v in scores.items() if n <= end
  }
  again = dataclasses.replace(config, workdir=f'{config.workdir}-again')
  train.run(again)
  crash_test.check_same(crash_test.outcome(config), crash_test.outcome(again))


@pytest.mark.parametrize(
  ('scores', 'evaluations', 'end'),
  [
    ({0: 0.1, 10: 0.2, 20: 0.3, 30: 0.4}, 1, 45),
    ({0: 0.1, 10: 0.3, 20: 0.2, 30: 0.4}, 1, 30),
    ({0: 0.1, 10: 0.3, 20: 0.2, 30: 0.4}, 2, 45),
    ({0: 0.1, 10: 0.3, 20: 0.2, 30: 0.3}, 2, 40),
    # The end of the warm-up comes before the next evaluation.
    ({0: 0.1, 10: 0.3, 20: 0.4, 30: 0.4, 40: 0.4}, 2, 45),
    # What was seen after it is of other negatives.
    ({0: 0.1, 40: 0.3, 50: 0.2, 60: 0.2}, 2, 45),
  ],
)
def test_level_is_no_better_than_the_best_so_often(scores, evaluations, end):
  config = schedule.config_lib.Config(
    method='ance', warmup_steps=45, steps_per_eval=10, max_steps=100,
    warmup_until_plateau=evaluations,
  )  # fmt: skip
  assert schedule.end_of_warmup(config, scores) == end


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (
      {'refresh_mode': 'delayed', 'refresh_delay': 2},
      '=0.5 cannot be used with --refresh_mode=delayed',
    ),
    ({'query_slices': 2}, '=0.5 needs all queries .* --query_slices is 2'),
  ],
)
def test_a_trigger_that_cannot_be_looked_at_is_refused(
  config, settings, message
):
  with pytest.raises(errors.BadInput, match=f'--refresh_trigger{message}'):
    dataclasses.replace(config, refresh_trigger=0.5, **settings)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'steps_per_eval': None}, 'needs evaluations.*set --steps_per_eval'),
    ({'warmup_steps': 0}, '=2 needs .*set --steps_per_eval and --warmup_steps'),
    ({'refresh_mode': 'async'}, '=2 cannot be used with --refresh_mode=async'),
  ],
)
def test_a_plateau_that_nobody_would_see_is_refused(config, settings, message):
  config = dataclasses.replace(config, steps_per_eval=2)
  with pytest.raises(errors.BadInput, match=message):
    dataclasses.replace(config, **{'warmup_until_plateau': 2, **settings})
