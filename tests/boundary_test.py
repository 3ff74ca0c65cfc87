"""What is on disk before what, and what a restart will not begin over."""

from types import SimpleNamespace

import pytest

from ance_jax import boundary
from ance_jax import checkpoint
from ance_jax import config as config_lib
from ance_jax import devices
from ance_jax import handoff
from ance_jax import resume


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
  monkeypatch.setattr(boundary, '_prune', lambda _: None)
  handoff.write_json(tmp_path / resume.PICK_UPS_FILE, {'pickups': []})
  parts = SimpleNamespace(
    run=SimpleNamespace(workdir=tmp_path, devices=(), id='x'),
    lock=SimpleNamespace(check=lambda: None),
    metrics=SimpleNamespace(history=lambda: b''),
    checkpoints=checkpoints,
    record={},
  )
  boundary.save(parts, None, 2)
  assert done == ['wait', 'save', *(['wait'] if not committed else [])]


@pytest.mark.parametrize(
  ('metrics', 'damaged', 'expected'),
  [
    ('', [], None),
    ('', [4], 'whole, 1 damaged ones, and metrics up to step 0'),
    ('{"step": 7}\n', [], 'whole, 0 damaged ones, and metrics up to step 7'),
    (
      '{"step": 0}\n',
      [0, 3],
      'whole, 2 damaged ones, and metrics up to step 0',
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
  if expected is None:
    resume._check_never_trained(tmp_path)
    return
  with pytest.raises(config_lib.BadInput, match=expected):
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
  handoff.write_json(tmp_path / resume.PICK_UPS_FILE, {'pickups': []})
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
