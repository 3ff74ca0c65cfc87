"""metrics.jsonl has each (step, name) once, whatever was killed when."""

import json
import os
import signal

import pytest

from ance_jax import config
from ance_jax import logs


def write(workdir, step, lines, history=b''):
  metrics = logs.Metrics(workdir, history=history, step=step)
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


def test_a_restart_begins_with_the_lines_of_its_checkpoint(tmp_path):
  metrics = logs.Metrics(tmp_path)
  metrics.write(3, {'dev/mrr@10': 0.3})
  metrics.write(4, {'train/loss': 4})
  history = metrics.history()
  metrics.write(4, {'dev/mrr@10': 0.4})
  metrics.write(5, {'train/loss': 5})
  metrics.close()
  write(tmp_path, 4, [(4, {'dev/mrr@10': 0.44})], history)
  assert logs.read(tmp_path) == [
    {'step': 3, 'dev/mrr@10': 0.3},
    {'step': 4, 'train/loss': 4.0},
    {'step': 4, 'dev/mrr@10': 0.44},
  ]


def test_a_line_is_on_file_as_soon_as_it_is_written(tmp_path):
  metrics = logs.Metrics(tmp_path)
  metrics.write(1, {'train/loss': 1})
  assert logs.read(tmp_path) == [{'step': 1, 'train/loss': 1.0}]
  metrics.close()


def test_a_torn_last_line_is_left_out(tmp_path):
  write(tmp_path, 0, [(1, {'train/loss': 1})])
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 2, "trai')
  assert logs.read(tmp_path) == [{'step': 1, 'train/loss': 1.0}]


@pytest.mark.parametrize(
  'line', ['[1]', '{"step": 2, "trai', '{"a": 1}', '{"step": 1, "a": "b"}']
)
def test_a_line_that_is_no_metrics_is_refused_with_its_number(line, tmp_path):
  write(tmp_path, 0, [(1, {'train/loss': 1})])
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write(f'{line}\n')
  with pytest.raises(config.BadInput, match='metrics.jsonl, line 2: '):
    logs.read(tmp_path)


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
  # The next job of this process is not stopped.
  assert list(logs.progress(range(2), 'work', total=2)) == [0, 1]


def test_a_second_interrupt_leaves_at_once():
  def interrupt(*leave):
    with logs.stop_signals(*leave):
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)

  pytest.raises(KeyboardInterrupt, interrupt)
  left = []
  interrupt(lambda: left.append('left'))
  assert left == ['left']


def test_tensorboard_meeting_a_full_disk_is_an_error_and_no_hang(
  tmp_path, monkeypatch
):
  metrics = logs.Metrics(tmp_path)

  def full():
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(metrics._board._writer, 'flush', full)
  with pytest.raises(OSError, match='No space left'):
    metrics.write(1, {'train/loss': 1})
  monkeypatch.undo()
  metrics.close()


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
