"""What is on disk before what, and what a restart will not begin over."""

import contextlib
from types import SimpleNamespace

from bad_input_tools import refused
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import devices
from ance_jax.training import background
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import refreshes
from ance_jax.training import resume
from ance_jax.training import schedule
from ance_jax.training import trainer

# What a refresh or an evaluation gives.
MADE = {'mined': True}


def make_trainer(**given):
  """Returns a `Trainer` of what a test gives, and else of what does nothing."""
  nothing = SimpleNamespace(check=lambda: None, wait=lambda: None)
  return trainer.Trainer(
    **{
      'state': SimpleNamespace(params=None), 'step': 2, 'active_refresh': None,
      'optimizer': None, 'lock': nothing, 'checkpoints': nothing,
      'poller': None, 'log': None, 'record': {}, **given,
    }
  )  # fmt: skip


@pytest.mark.parametrize('committed', [[], [0]])
def test_nothing_is_logged_before_the_first_checkpoint_is_on_disk(
  committed, tmp_path, monkeypatch
):
  done = []
  checkpoints = SimpleNamespace(
    wait=lambda: done.append('wait'), save=lambda *_: done.append('save')
  )
  monkeypatch.setattr(checkpoint, 'committed_steps', lambda _: committed)
  for name in ('describe', 'globally_replicated'):
    monkeypatch.setattr(devices, name, lambda _: None)
  monkeypatch.setattr(trainer.Trainer, '_prune', lambda _: None)
  atomic.write_json(tmp_path / resume.PICK_UPS_FILE, {'pickups': []})
  make_trainer(
    run=SimpleNamespace(workdir=tmp_path, devices=(), id='x'),
    checkpoints=checkpoints,
    log=SimpleNamespace(
      metrics=SimpleNamespace(history=lambda: b''), work={2: [2.0, 1.0]}
    ),
  ).save()
  assert done == ['wait', 'save', *(['wait'] if not committed else [])]


@pytest.mark.parametrize(
  ('metrics', 'damaged', 'expected'),
  [
    ('', [], None),
    ('', [4], 'no whole checkpoint .damaged: 1., but metrics up to step 0'),
    (
      '{"step": 7}\n',
      [],
      'no whole checkpoint .damaged: 0., but metrics up to step 7',
    ),
    (
      '{"step": 0}\n',
      [0, 3],
      'no whole checkpoint .damaged: 2., but metrics up to step 0',
    ),
  ],
)
def test_a_run_is_begun_only_where_none_was(
  metrics, damaged, expected, tmp_path
):
  if metrics:
    (tmp_path / 'metrics.jsonl').write_text(metrics)
  for step in damaged:
    (tmp_path / f'{checkpoint.DAMAGED}-{step}').mkdir()
  with refused(expected):
    resume._check_never_trained(tmp_path)


@pytest.mark.parametrize(
  ('settings', 'begins', 'kept'),
  [
    # The run's old end was evaluated: that is not done again.
    ({}, '', ['{"step": 1, "dev/x": 2}\n']),
    ({'steps_per_eval': 1}, '', []),
    ({'max_steps': 1}, '', []),
    ({'method': 'ance', 'warmup_steps': 1}, '', []),
    ({}, 'changed', []),
  ],
)
def test_lines_behind_a_checkpoint_stay_only_if_they_are_not_made_again(
  settings, begins, kept, tmp_path, monkeypatch
):
  lines = '{"step": 1, "train/loss": 1}\n'
  later = [
    '{"step": 1, "dev/x": 2}\n',
    '{"step": 12, "train/loss": 1}\n',
    '{"step": 1, "dev/y": 3}',  # A kill cut it.
  ]
  (tmp_path / 'metrics.jsonl').write_text(begins + lines + ''.join(later))
  atomic.write_json(tmp_path / resume.PICK_UPS_FILE, {'pickups': []})
  monkeypatch.setattr(
    checkpoint, 'read_record', lambda *_: {'metrics.jsonl': lines.encode()}
  )
  config = config_lib.Config(
    **{
      'workdir': str(tmp_path),
      'method': 'in_batch',
      'max_steps': 9,
      **settings,
    }
  )
  found = resume._restore_history(config, 1).decode()
  assert found == lines + ''.join(kept)


@pytest.mark.parametrize(
  ('settings', 'plan', 'newest', 'active', 'step', 'expected'),
  [
    # What an earlier process picked up is repeated, whatever is there by now.
    ({}, [(8, 6)], 7, None, 8, 6),
    ({}, [(8, 6)], 7, None, 7, None),
    ({}, [(8, 6)], 7, (8, 6), 9, 7),
    ({'refresh_replay': '/other'}, [(8, 6)], 7, (8, 6), 9, None),
    ({'refresh_replay': '/other'}, [(8, 6)], None, None, 8, 6),
    ({}, [], 7, (8, 6), 20, None),  # The end.
    ({}, [], None, (8, 6), 9, None),
    # Training waits for a refresh that is less than so many steps behind.
    ({'max_staleness': 4}, [], None, (8, 6), 9, None),
    ({'max_staleness': 4}, [], None, (8, 6), 10, ('wait', 7)),
    ({'max_staleness': 4}, [], 7, (8, 6), 10, 7),
    ({'max_staleness': 4}, [], 7, (8, 6), 11, ('wait', 8)),
    # And before the first one, from the end of the warm-up on.
    ({'max_staleness': 4}, [], None, None, 7, None),
    ({'max_staleness': 4}, [], None, None, 8, ('wait', 5)),
    ({'warmup_steps': 0}, [], None, None, 0, ('wait', 0)),
    ({'warmup_steps': 0}, [], 0, None, 0, 0),
  ],
)
def test_what_comes_into_use_is_what_was_or_the_newest_or_is_waited_for(
  settings, plan, newest, active, step, expected, monkeypatch
):
  config = config_lib.Config(
    **{
      'refresh_mode': 'external', 'max_steps': 20, 'warmup_steps': 4,
      'steps_per_refresh': 4, **settings,
    }
  )  # fmt: skip
  plan = [schedule.ActiveRefresh(*one) for one in plan]
  monkeypatch.setattr(resume, 'to_replay', lambda _: plan)
  poller = SimpleNamespace(
    newest=lambda *_: newest, wait=lambda *given: ('wait', given[2])
  )
  active = schedule.ActiveRefresh(*active) if active else None
  training = make_trainer(
    run=SimpleNamespace(config=config),
    step=step,
    active_refresh=active,
    poller=poller,
  )
  assert training._newer_refresh() == expected


@pytest.mark.parametrize(
  ('settings', 'poller', 'done'),
  [
    ({}, None, ['refresh']),
    ({'refresh_replay': '/other'}, None, []),
    ({'refresh_replay': '/other', 'steps_per_eval': 2}, None, ['assess']),
    ({'steps_per_eval': 2}, None, ['refresh']),  # Which evaluates.
    ({'refresh_mode': 'async', 'steps_per_eval': 2}, 'poller', ['assess']),
    ({'refresh_mode': 'async'}, 'poller', []),
  ],
)
def test_a_refresh_is_made_in_step_where_nobody_else_makes_or_made_it(
  settings, poller, done, monkeypatch
):
  config = config_lib.Config(
    method='ance', max_steps=20, steps_per_refresh=4, **settings
  )
  found = []
  for name, made in (('refresh', MADE), ('assess', (MADE, None))):
    monkeypatch.setattr(
      refreshes,
      name,
      lambda *_, name=name, made=made, **__: found.append(name) or made,
    )
  for module, name in (
    (trainer.diagnostics, 'probe'),
    (trainer.Trainer, '_prune_embeddings'),
  ):
    monkeypatch.setattr(module, name, lambda *_: None)
  with_params = SimpleNamespace(index_corpus=lambda _: None)
  training = make_trainer(
    run=SimpleNamespace(config=config, with_params=lambda _: with_params),
    step=8,
    poller=poller,
    log=SimpleNamespace(
      log_refresh=lambda *_: None, log_evaluation=lambda *_: None
    ),
  )
  if training.refresh_if_due() is None:
    training.evaluate_if_due()
  assert found == done


@pytest.mark.parametrize(
  ('active', 'step', 'ours', 'expected'),
  [
    (None, 20, [4, 8, 12], 12),
    (None, 11, [4, 8, 12], 8),  # Not that of weights which come later.
    (None, 12, [4, 8, 12], 12),
    (None, 3, [4, 8, 12], None),
    (8, 20, [4, 8, 12], 12),
    (12, 20, [4, 8, 12], None),
    (None, 20, [4, 8], 8),  # Another run's is passed over.
    (8, 20, [4, 8], None),
    (4, 20, [4], None),
  ],
)
def test_a_reader_finds_the_newest_refresh_that_may_be_picked_up(
  active, step, ours, expected, monkeypatch
):
  monkeypatch.setattr(background.refreshes, 'published', lambda _: [4, 8, 12])
  monkeypatch.setattr(background.remote, 'is_connected', lambda _: False)
  poller = background.RefreshPoller(SimpleNamespace(workdir='/nowhere'))
  monkeypatch.setattr(poller, '_is_ours', lambda number: number in ours)
  active = schedule.ActiveRefresh(9, active) if active else None
  assert poller.newest(active, step) == expected
  # What it saw just now is no news once it is in use.
  if expected:
    assert poller.newest(None, step) == expected
    assert poller.newest(schedule.ActiveRefresh(9, expected), step) is None
  poller.close()


@pytest.mark.parametrize('stops', [True, False])
def test_what_one_process_sees_all_do_after_the_same_step(stops, monkeypatch):
  here, other = [[True, False], [False, True]][:: 1 if stops else -1]
  monkeypatch.setattr(trainer.distributed, 'count', lambda: 2)
  monkeypatch.setattr(trainer.distributed, 'is_first', lambda: True)
  monkeypatch.setattr(
    trainer.distributed, 'all_gather', lambda one: np.stack([one, other])
  )
  monkeypatch.setattr(trainer.logs, 'stop_requested', lambda: here[0])
  monkeypatch.setattr(resume, 'to_replay', lambda _: [])
  newest = 4 if here[1] else None
  training = make_trainer(
    run=SimpleNamespace(config=config_lib.Config(steps_per_log=5)),
    step=10,
    poller=SimpleNamespace(newest=lambda *_: newest),
  )
  assert training.poll() == [True, True]
  training.step = 11
  assert training.poll() == (False, False)


def test_a_refresh_newer_than_all_checkpoints_is_not_the_last_one(
  monkeypatch, tmp_path
):
  looks = iter([[0, 10, 14], [0, 10, 14, 40]])
  monkeypatch.setattr(checkpoint, 'committed_steps', lambda _: next(looks))
  monkeypatch.setattr(background.refreshes, 'published', lambda _: [10, 20, 30])
  made = []
  monkeypatch.setattr(background, '_refresh', lambda _, *who: made.append(who))
  config = config_lib.Config(
    workdir=str(tmp_path), method='ance', warmup_steps=0, steps_per_refresh=7,
    max_steps=40,
  )  # fmt: skip
  background.watch(SimpleNamespace(config=config, workdir=tmp_path))
  assert made == [(14, 10)]


@pytest.mark.parametrize(
  ('committed', 'last', 'looked_at', 'claimed', 'expected', 'left_out'),
  [
    ([0, 4, 8, 12], None, -1, None, 12, '4, 8'),
    ([0, 4, 8, 12], 4, -1, None, 12, '8'),
    ([0, 4, 8, 12], 4, -1, 8, 8, ''),  # One that was begun comes first.
    ([0, 4, 8, 12], 4, -1, 4, 12, '8'),
    ([0, 4, 8, 10], 4, -1, 10, 8, ''),  # Nothing is due at 10.
    ([0, 4, 8, 12], 4, 8, None, 12, ''),
    ([0, 4, 8, 12], 4, 12, None, None, ''),
    ([0, 4, 8, 12], 12, -1, 8, None, ''),
    ([0, 2], None, -1, None, None, ''),
  ],
)
def test_a_refresher_takes_what_was_begun_or_the_newest_that_is_due(
  committed, last, looked_at, claimed, expected, left_out, monkeypatch, capsys
):
  config = config_lib.Config(
    method='ance', warmup_steps=4, steps_per_refresh=4, max_steps=20
  )
  monkeypatch.setattr(background, 'claimed', lambda _: claimed)
  run = SimpleNamespace(config=config)
  assert background._next(run, committed, last, looked_at) == expected
  said = capsys.readouterr().out
  line = f'refreshes of step {left_out} are left out: the checkpoint of step '
  assert said == (f'{line}{expected} is newer\n' if left_out else '')


def test_pick_ups_are_kept_once_each_and_copied_as_they_are_now(
  tmp_path, monkeypatch
):
  run, pushed = SimpleNamespace(workdir=tmp_path), []
  monkeypatch.setattr(
    resume.remote, 'push', lambda path: pushed.append(path.read_bytes())
  )
  resume.begin_pick_ups(run)
  for step, refresh in ((4, 4), (9, 8), (4, 4), (13, 12)):
    assert resume.pick_up(run, step, refresh)[:2] == (step, refresh)
  found = [resume.active_at(run, n) for n in (3, 4, 8, 9, 12, 13, 99)]
  found = [one and one[:2] for one in found]
  assert found == [None, (4, 4), (4, 4), (9, 8), (9, 8), (13, 12), (13, 12)]
  assert len(pushed) == 4  # Once more where none was there.
  assert pushed[-1] == (tmp_path / resume.PICK_UPS_FILE).read_bytes()


def test_the_shapes_of_a_pick_up_are_kept_with_it(tmp_path):
  run = SimpleNamespace(workdir=tmp_path)
  resume.begin_pick_ups(run)
  first, _ = (resume.pick_up(run, *one) for one in ((4, 4), (9, 8)))
  chosen = first._replace(shapes={'form': [1]})
  resume.record_shapes(run, chosen)
  assert resume._pick_ups(tmp_path) == [chosen, (9, 8, None)]
  # A run that was killed between the two has chosen none.
  assert resume.pick_up(run, 4, 4) == chosen


@pytest.mark.parametrize(
  ('active', 'keep', 'expected'),
  [
    # That of the refresh in use, though not those of its step and before.
    ((11, 8), 1, [16, 4, 8, 12, 2]),
    ((11, 8), 2, [12, 16, 4, 8, 12, 2]),
    (None, 1, [16, 4, 0, 4, 8, 12, 2]),
  ],
)
def test_a_checkpoint_is_kept_while_a_refresh_may_need_it(
  active, keep, expected, tmp_path, monkeypatch
):
  kept, asked = [], []
  for module, name, value in (
    (checkpoint, 'committed_steps', [0, 2, 4, 8, 11, 12, 16]),
    (checkpoint, 'best', 4),
    (refreshes, 'published', [0, 4, 8, 12]),
    (background, 'claimed', 2),
  ):
    monkeypatch.setattr(module, name, lambda *_, value=value: value)
  active = schedule.ActiveRefresh(*active) if active else None
  monkeypatch.setattr(
    resume, 'active_at', lambda _, step: asked.append(step) or active
  )
  config = config_lib.Config(workdir=str(tmp_path), checkpoints_to_keep=keep)
  make_trainer(
    run=SimpleNamespace(config=config),
    checkpoints=SimpleNamespace(keep=kept.extend),
  )._prune()
  assert kept == expected
  assert asked == [16]  # What a restart would have in use.
  # From whichever checkpoint it begins, where weights of then are the guide.
  guided = config_lib.Config(
    workdir=config.workdir, checkpoints_to_keep=keep, method='ance_guided',
    guide='refresh',
  )  # fmt: skip
  make_trainer(
    run=SimpleNamespace(config=guided),
    checkpoints=SimpleNamespace(keep=kept.extend),
  )._prune()
  assert asked[1] == {1: 16, 2: 12}[keep]


@pytest.mark.parametrize(
  ('settings', 'others', 'seen'),
  [
    ({'refresh_mode': 'async'}, (), 'both'),
    ({'refresh_mode': 'async'}, ('b',), 'both'),
    ({'refresh_mode': 'external'}, ('b',), 'poller'),
    ({'refresh_mode': 'async', 'refresh_replay': '/other'}, (), 'none'),
    ({'refresh_mode': 'async', 'method': 'dpr'}, (), 'none'),
    ({'refresh_mode': 'async', 'warmup_steps': 20}, (), 'none'),
    ({'refresh_mode': 'async', 'warmup_steps': 19}, (), 'both'),
    ({}, (), 'none'),
  ],
)
def test_a_refresher_beside_training_has_the_devices_that_it_was_given(
  settings, others, seen, monkeypatch
):
  config = config_lib.Config(**{'max_steps': 20, **settings})
  run = SimpleNamespace(config=config, on_devices=lambda devices: devices)
  found, made = [], SimpleNamespace(close=lambda: None)

  def opened(name):
    return lambda *given: found.append((name, *given)) or made

  monkeypatch.setattr(devices, 'training_devices', lambda _: (('a',), others))
  monkeypatch.setattr(background, 'RefreshThread', opened('thread'))
  monkeypatch.setattr(background, 'RefreshPoller', opened('poller'))
  with contextlib.ExitStack() as stack:
    background.open_poller(stack, run)
  there = others or run
  assert (
    found
    == {
      'both': [('thread', there), ('poller', run, made)],
      'poller': [('poller', run, None)],
      'none': [],
    }[seen]
  )


def test_training_waits_for_a_refresh_that_is_just_new_enough(monkeypatch):
  monkeypatch.setattr(background, 'LOOK_SECS', 0)
  poller = background.RefreshPoller(None)
  newest = iter([None, 3, 4, 5, 9])
  monkeypatch.setattr(poller, 'newest', lambda *_: next(newest))
  assert poller.wait(None, 9, 5) == 5
  poller.close()


@pytest.mark.parametrize(
  ('staleness', 'plan', 'active', 'step', 'expected'),
  [
    (0, [], None, 0, 30),
    (0, [(8, 6), (12, 9)], None, 0, 8),
    (0, [(8, 6), (12, 9)], (8, 6), 8, 12),
    (0, [(8, 6), (12, 9)], (12, 9), 12, 30),
    # Up to where training may have to wait, and on from there step by step.
    (16, [], None, 0, 20),
    (16, [], (8, 6), 8, 22),
    (16, [], (8, 6), 21, 22),
    (16, [], (8, 6), 22, 23),
    (16, [], (8, 6), 23, 24),
    (16, [(9, 7)], (8, 6), 8, 9),
  ],
)
def test_a_stretch_ends_where_a_refresh_may_come_into_use(
  staleness, plan, active, step, expected, monkeypatch
):
  monkeypatch.setattr(
    resume, 'to_replay', lambda _: [schedule.ActiveRefresh(*n) for n in plan]
  )
  config = config_lib.Config(
    method='ance', refresh_mode='external', max_staleness=staleness,
    warmup_steps=4, max_steps=30, steps_per_refresh=16,
  )  # fmt: skip
  monkeypatch.setattr(schedule, 'next_boundary', lambda *_: 30)
  training = make_trainer(
    run=SimpleNamespace(config=config),
    step=step,
    active_refresh=schedule.ActiveRefresh(*active) if active else None,
    poller='poller',
  )
  assert training._end_of_stretch() == expected


def test_a_step_has_the_batch_of_its_seed_and_of_its_process(monkeypatch):
  asked = []
  monkeypatch.setattr(experiment, 'training_data', lambda *given: given)
  monkeypatch.setattr(trainer.steps, 'make_train_step', lambda *given: given)
  for name in ('draw_rows', 'make_batch'):

    def call(*given, name=name, **kw):
      asked.append((given, kw))
      return name

    monkeypatch.setattr(trainer.batches, name, call)
  monkeypatch.setattr(devices, 'shard', lambda *_: None)
  monkeypatch.setattr(trainer.distributed, 'index', lambda: 1)
  monkeypatch.setattr(trainer.distributed, 'count', lambda: 3)
  config = config_lib.Config(
    method='ance_code', num_hard_negatives=20, seed=5, batch_size=6
  )
  run = SimpleNamespace(
    config=config, retriever=SimpleNamespace(config='R'), devices='D'
  )
  training = make_trainer(run=run, optimizer='O')
  of_step = {
    'seed': 5, 'batch_size': 6, 'negatives': 'N', 'topics': 'T',
    'draw': batches.UNIFORM,
  }  # fmt: skip
  made = {'shapes': 'S', 'guide': 'G', 'part': (1, 3)}
  for name, number, triplets in (
    ('ance_code', 1, True),
    ('in_batch', 0, False),
  ):
    row = methods.METHODS[name]
    *_, make_batch = training._make_step(row)
    make_batch(7, 'N', 'T', 'G', 'S')
    expected = {**of_step, 'num_negatives': number, 'triplets': triplets}
    assert asked.pop() == (((run, row), 'draw_rows'), made)
    assert asked.pop() == (((run, row), 7), expected)
