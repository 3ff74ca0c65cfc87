"""A folder has one trainer, and a dead one is not in the way."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from ance_jax import errors
from ance_jax.core import locks

HOLD = """
import sys, time
from ance_jax.core import locks
lock = locks.Lock(sys.argv[1])
print('held', flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that holds the lock of `tmp_path`."""
  with subprocess.Popen(
    [sys.executable, '-c', HOLD, str(tmp_path)], stdout=subprocess.PIPE
  ) as process:
    assert process.stdout.readline() == b'held\n'
    yield process
    process.kill()


def write_holder(folder, **changes):
  path = pathlib.Path(folder) / locks.LOCK_FILE
  holder = {'host': 'far-away', 'process': 4711, 'kernel': 'other', **changes}
  path.write_text(json.dumps(holder))
  return path


def test_the_second_is_refused_at_once_with_host_and_process(tmp_path, holder):
  start = time.perf_counter()
  with pytest.raises(
    errors.BadInput,
    match=f'process {holder.pid} on {os.uname().nodename} is the trainer',
  ):
    locks.Lock(tmp_path)
  assert time.perf_counter() - start < 1


def test_a_killed_holder_is_not_in_the_way(tmp_path, holder):
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert (tmp_path / locks.LOCK_FILE).exists()
  locks.Lock(tmp_path).close()
  assert list(tmp_path.iterdir()) == []


def test_a_living_holder_on_another_host_is_refused(tmp_path):
  write_holder(tmp_path)
  with pytest.raises(
    errors.BadInput, match='process 4711 on far-away .* 0 s ago'
  ):
    locks.Lock(tmp_path)


def test_a_silent_holder_on_another_host_counts_as_dead(tmp_path):
  path = write_holder(tmp_path)
  # A try that is refused is no sign of life of the holder's.
  before = time.time() - locks._DEAD_SECS - 1
  os.utime(path, (before + 10, before + 10))
  with pytest.raises(errors.BadInput, match='5[01] s ago'):
    locks.Lock(tmp_path)
  os.utime(path, (before, before))
  locks.Lock(tmp_path).close()


@pytest.mark.parametrize('text', ['', '\0' * 40, '{"host": "a"', '[]'])
def test_a_torn_file_is_not_in_the_way(tmp_path, text):
  (tmp_path / locks.LOCK_FILE).write_text(text)
  locks.Lock(tmp_path).close()


def test_a_holder_gives_signs_of_life_and_may_fail_to_for_a_moment(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(locks, '_BEAT_SECS', 0.01)
  lock, real, failed = locks.Lock(tmp_path), os.utime, []

  def utime(*arguments):
    if len(failed) < 3:
      failed.append(arguments)
      raise OSError(5, 'Input/output error')
    real(*arguments)

  monkeypatch.setattr(locks.os, 'utime', utime)
  path = tmp_path / locks.LOCK_FILE
  real(path, (0, 0))
  for _ in range(500):
    time.sleep(0.01)
    lock.check()
    if path.stat().st_mtime > 0:
      break
  assert len(failed) == 3
  assert path.stat().st_mtime > time.time() - 60
  lock.close()


def test_who_was_taken_over_is_told_and_leaves_the_others_lock(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(locks, '_BEAT_SECS', 0.01)
  lock = locks.Lock(tmp_path)
  path = write_holder(tmp_path)

  def until_it_is_seen():
    for _ in range(500):
      lock.check()
      time.sleep(0.01)

  with pytest.raises(errors.BadInput, match="is another process's now"):
    until_it_is_seen()
  lock.close()
  assert json.loads(path.read_text())['host'] == 'far-away'
