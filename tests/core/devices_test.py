"""Devices are shared out by flags, and described by all that bits hang on."""

import pytest

from ance_jax import errors
from ance_jax.core import devices


@pytest.mark.parametrize(
  ('asked', 'expected'),
  [
    ((0, 0), (8, 0)),
    ((3, 0), (3, 0)),
    ((0, 2), (6, 2)),
    ((0, 7), (1, 7)),
    ((3, 2), (3, 2)),
    ((6, 2), (6, 2)),
    ((9, 0), '--num_devices=9 is more than .* devices here .8'),
    ((7, 2), '--refresh_devices=2 leaves fewer than 7 of the 8'),
    ((0, 8), '--refresh_devices=8 leaves fewer than 1 of the 8'),
  ],
)
def test_refresh_devices_follow_training_devices(asked, expected):
  if isinstance(expected, str):
    with pytest.raises(errors.BadInput, match=expected):
      devices.local_parts(*asked)
  else:
    parts = devices.local_parts(*asked)
    assert tuple(map(len, parts)) == expected
    numbers = [device.id for part in parts for device in part]
    assert numbers == list(range(sum(expected)))


def test_the_description_has_all_that_affects_bits(tmp_path, monkeypatch):
  before = devices.describe(devices.local(2))
  (tmp_path / 'cpuinfo').write_text('flags: a\nmodel name\t: Another\n')
  monkeypatch.setattr(devices, '_CPU_FILE', tmp_path / 'cpuinfo')
  monkeypatch.setattr(devices.os, 'sched_getaffinity', lambda _: range(77))
  monkeypatch.setattr(devices.platform, 'python_version', lambda: '2.7')
  monkeypatch.setattr(devices.metadata, 'version', lambda name: f'of {name}')
  for name in ('XLA_FLAGS', 'OPENBLAS_CORETYPE'):
    monkeypatch.setenv(name, f'of {name}')
  packages = 'ance_jax faiss-cpu flax jax jaxlib numpy optax'.split()
  found = devices.describe(devices.local(1))
  assert found == {
    'devices': '1 cpu', 'processor': 'Another', 'processor cores': '77',
    'python': '2.7',
    **{n: f'of {n}' for n in ('XLA_FLAGS', 'OPENBLAS_CORETYPE', *packages)},
  }  # fmt: skip
  assert all(found[name] != before[name] for name in before)
  # Where jax was imported first, or the processor is of another kind.
  for name in ('XLA_FLAGS', 'OPENBLAS_CORETYPE'):
    monkeypatch.delenv(name)
    assert devices.describe(devices.local(1))[name] == ''
