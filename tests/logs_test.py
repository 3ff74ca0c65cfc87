"""metrics.jsonl has each (step, name) once, whatever was killed when."""

import fcntl
import json
import os
import signal
import threading

import pytest

from ance_jax import logs


def write(workdir, step, lines):
  metrics = logs.Metrics(workdir, step=step)
  for at, values in lines:
    metrics.write(at, values)
  metrics.close()


def test_lines_hold_the_step_and_plain_numbers(tmp_path):
  write(tmp_path, 0, [(1, {'train/loss': 2}), (2, {'dev/mrr@10': 0.5})])
  text = (tmp_path / 'metrics.jsonl').read_text()
  assert [json.loads(line) for line in text.splitlines()] == [
    {'step': 1, 'train/loss': 2.0},
    {'step': 2, 'dev/mrr@10': 0.5},
  ]


def test_a_restart_cuts_what_comes_after_its_checkpoint(tmp_path):
  at_four = {'train/loss': 4, 'dev/mrr@10': 0.4, 'time/train_secs': 1}
  write(
    tmp_path,
    0,
    [(3, {'dev/mrr@10': 0.3}), (4, at_four), (4, {'refresh/judged': 1}),
     (5, {'train/loss': 5})],
  )  # fmt: skip
  write(tmp_path, 4, [(4, {'dev/mrr@10': 0.44}), (5, {'train/loss': 55})])
  assert logs.read(tmp_path) == [
    {'step': 3, 'dev/mrr@10': 0.3},
    {'step': 4, 'train/loss': 4.0, 'time/train_secs': 1.0},
    {'step': 4, 'dev/mrr@10': 0.44},
    {'step': 5, 'train/loss': 55.0},
  ]


def test_a_torn_last_line_is_left_out(tmp_path):
  write(tmp_path, 0, [(1, {'train/loss': 1})])
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 2, "trai')
  assert logs.read(tmp_path) == [{'step': 1, 'train/loss': 1.0}]
  write(tmp_path, 2, [(3, {'train/loss': 3})])
  assert [line['step'] for line in logs.read(tmp_path)] == [1, 3]


def test_replace_leaves_each_step_and_name_once(tmp_path):
  write(tmp_path, 0, [(4, {'dev/mrr@10': 0.4})])
  logs.replace(tmp_path, 4, {'test/mrr@10': 0.1})
  logs.replace(tmp_path, 4, {'test/mrr@10': 0.2})
  assert logs.series(tmp_path, 'test/mrr@10') == {4: 0.2}
  assert logs.series(tmp_path, 'dev/mrr@10') == {4: 0.4}
  assert sum('test/mrr@10' in line for line in logs.read(tmp_path)) == 1


def test_a_job_beside_the_trainer_loses_none_of_its_lines(tmp_path):
  metrics = logs.Metrics(tmp_path, step=0)
  metrics.write(1, {'train/loss': 1})
  logs.replace(tmp_path, 1, {'test/mrr@10': 0.1})
  metrics.write(2, {'train/loss': 2})
  metrics.close()
  assert logs.series(tmp_path, 'train/loss') == {1: 1.0, 2: 2.0}
  assert logs.series(tmp_path, 'test/mrr@10') == {1: 0.1}


def test_a_writer_waits_for_the_one_before_it(tmp_path):
  """Each reads the lines and writes them anew: both at once would lose one."""
  other = os.open(tmp_path, os.O_RDONLY)
  fcntl.flock(other, fcntl.LOCK_EX)
  writer = threading.Thread(
    target=logs.replace, args=(tmp_path, 1, {'test/mrr@10': 0.1})
  )
  writer.start()
  writer.join(timeout=0.5)
  assert writer.is_alive()
  assert not (tmp_path / 'metrics.jsonl').exists()
  os.close(other)
  writer.join()
  assert logs.series(tmp_path, 'test/mrr@10') == {1: 0.1}


def test_tensorboard_files_are_written(tmp_path):
  write(tmp_path, 0, [(1, {'train/loss': 1})])
  (events,) = (tmp_path / 'tensorboard').iterdir()
  assert b'train/loss' in events.read_bytes()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_the_phase_after_its_present_item(number):
  done = []
  with logs.stop_signals():

    def work():
      for item in logs.progress(range(5), 'work', total=5):
        done.append(item)
        if item == 2:
          os.kill(os.getpid(), number)

    with pytest.raises(logs.Stopped, match='work'):
      work()
    assert logs.stop_requested()
  assert done == [0, 1, 2]


def test_a_second_interrupt_leaves_at_once():
  def interrupt():
    with logs.stop_signals():
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)

  pytest.raises(KeyboardInterrupt, interrupt)


def test_signals_are_as_before_afterwards():
  before = signal.getsignal(signal.SIGTERM)
  with logs.stop_signals():
    assert signal.getsignal(signal.SIGTERM) is not before
  assert signal.getsignal(signal.SIGTERM) is before


def test_the_stopwatch_adds_up_the_phases():
  watch = logs.Stopwatch()
  for _ in range(2):
    with watch.phase('encode'):
      pass
  assert list(watch.secs) == ['encode']
  assert watch.secs['encode'] > 0
