"""metrics.jsonl has each (step, name) once, whatever was killed when."""

import io
import itertools
import os
import select
import signal
import subprocess
import sys
import types

import pytest
from tensorboardX import event_file_writer

from ance_jax import errors
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.core import pace


def write(workdir, step, lines, history=b''):
  metrics = logs.Metrics(workdir, history=history, step=step)
  for at, values in lines:
    metrics.write(at, values)
  metrics.close()


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


def test_a_line_is_on_file_at_once_and_a_torn_last_one_is_left_out(tmp_path):
  metrics = logs.Metrics(tmp_path)
  metrics.write(1, {'train/loss': 1})
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 2, "trai')
  assert logs.read(tmp_path) == [{'step': 1, 'train/loss': 1.0}]
  metrics.close()


@pytest.mark.parametrize(
  'line', ['[1]', '{"step": 2, "trai', '{"a": 1}', '{"step": 1, "a": "b"}']
)
def test_a_line_that_is_no_metrics_is_refused_with_its_number(line, tmp_path):
  write(tmp_path, 0, [(1, {'train/loss': 1})])
  (events,) = (tmp_path / 'tensorboard').iterdir()
  assert b'train/loss' in events.read_bytes()
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write(f'{line}\n')
  with pytest.raises(errors.BadInput, match='metrics.jsonl, line 2: '):
    logs.read(tmp_path)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_the_phase_after_its_present_item(number):
  done, before = [], signal.getsignal(number)
  with logs.stop_signals():

    def work():
      for item in logs.progress(range(5), 'work', total=5):
        done.append(item)
        if item == 2:
          os.kill(os.getpid(), number)

    with pytest.raises(errors.Stopped, match='work'):
      work()
    assert logs.stop_requested()
  assert done == [0, 1, 2]
  assert signal.getsignal(number) is before
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


def test_tensorboard_hides_what_was_written_behind_the_checkpoint(
  tmp_path, monkeypatch
):
  written = []
  monkeypatch.setattr(
    event_file_writer.EventsWriter,
    'write_event',
    lambda _, event: written.append(event),
  )
  write(tmp_path, 4, [(5, {'train/loss': 2})])
  # START hides earlier points of its step and all after it.
  _, first, second = written
  assert (first.step, first.session_log.status) == (5, 1)
  (value,) = second.summary.value
  assert (second.step, value.simple_value) == (5, 2)
  assert 'train/loss' in value.tag


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


def test_the_stopwatch_adds_up_the_phases(monkeypatch):
  watch, clock = logs.Stopwatch(), itertools.count()
  # Of the module alone: threads of other tests read the time, too.
  ticks = types.SimpleNamespace(perf_counter=lambda: next(clock))
  monkeypatch.setattr(logs, 'time', ticks)
  for name in ('encode', 'index', 'encode'):
    with watch.phase(name):
      pass
  assert watch.secs == {'encode': 2, 'index': 1}


def test_a_line_goes_through_a_pipe_at_once():
  program = (
    'import sys\nfrom ance_jax.core import logs\nlogs.log("one line")\n'
    'sys.stdin.read()'
  )
  with subprocess.Popen(
    [sys.executable, '-c', program],
    env={n: v for n, v in os.environ.items() if n != 'PYTHONUNBUFFERED'},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as process:
    ready, _, _ = select.select([process.stdout], [], [], 30)
    process.stdin.close()
    assert ready
    assert process.stdout.read() == b'one line\n'


@pytest.fixture
def bars(monkeypatch):
  """Sets what decides about bars: the terminal, the environment, the flag."""

  def set_them(terminal, environment, wanted):
    stderr = types.SimpleNamespace(isatty=lambda: terminal)
    monkeypatch.setattr(logs.sys, 'stderr', stderr)
    monkeypatch.setenv('TQDM_DISABLE', environment)
    logs.use_bars(wanted)

  yield set_them
  logs.use_bars(True)


@pytest.mark.parametrize(
  ('terminal', 'environment', 'wanted', 'has'),
  [
    (True, '', True, True),
    (True, '0', True, True),
    (True, 'False', True, True),
    (False, '', True, False),
    (True, '1', True, False),
    (True, 'true', True, False),
    (True, '', False, False),
  ],
)
def test_bars_are_for_a_terminal_and_can_be_switched_off(
  terminal, environment, wanted, has, bars
):
  bars(terminal, environment, wanted)
  assert logs.has_bars() == has


def test_a_long_phase_without_a_bar_prints_a_line_now_and_then(
  bars, monkeypatch, capsys
):
  bars(False, '', True)
  monkeypatch.setattr(pace, '_FIRST_SECS', 0.1)
  monkeypatch.setattr(pace, '_EVERY_SECS', 0.2)

  def phase(secs, **kwargs):
    for _ in logs.progress(range(3), 'work', total=3, unit='parts', **kwargs):
      logs.time.sleep(secs)
    return capsys.readouterr().out.splitlines()

  assert phase(0) == []
  assert phase(0.15, lines=False) == []
  # At 0.1, before the first item is done; at 0.3, and not at 0.5.
  first, *others = phase(0.16)
  assert first == 'work: 0 of 3 parts, 00:00 so far'
  assert 1 <= len(others) <= 2
  assert all(line.startswith('work: 1 of 3 parts, ') for line in others[:1])
  for _ in logs.progress(range(1), 'work', total=8, unit='parts', done=5):
    logs.time.sleep(0.15)
  out = capsys.readouterr().out
  assert out == 'work: 5 of 8 parts, 00:00 so far\n'
  with logs.working('think'):
    logs.time.sleep(0.15)
  assert capsys.readouterr().out == 'think: 00:00 so far\n'
  bars(True, '', True)
  with logs.working('think'):
    logs.time.sleep(0.15)
  assert capsys.readouterr().out == ''


def test_lines_come_after_3_seconds_and_every_20_of_what_items_count(
  bars, monkeypatch
):
  bars(False, '', True)
  counted, waited = [], []
  monkeypatch.setattr(pace.Lines, 'update', lambda _, n: counted.append(n))
  list(logs.progress([[1, 2], [3]], 'work', total=3, unit='rows', count=len))
  assert counted == [2, 1]

  def wait(secs):
    waited.append(secs)
    return len(waited) == 3

  event = types.SimpleNamespace(wait=wait, set=lambda: None)
  threads = types.SimpleNamespace(
    Event=lambda: event, Thread=pace.threading.Thread
  )
  monkeypatch.setattr(pace, 'threading', threads)
  with pace.Lines(lambda _: None, 'work'):
    pass
  assert waited == [3, 20, 20]


@pytest.mark.parametrize('is_first', [True, False])
def test_a_bar_counts_what_was_done_before_and_is_wiped(
  is_first, monkeypatch, capsys
):
  screen = io.StringIO()
  screen.isatty = lambda: True
  monkeypatch.setattr(logs.sys, 'stderr', screen)
  monkeypatch.delenv('TQDM_DISABLE', raising=False)
  monkeypatch.setattr(distributed, 'is_first', lambda: is_first)
  for _ in logs.progress(range(3), 'work', total=8, unit='parts', done=5):
    assert ('work:  62%' in screen.getvalue()) == is_first
  shown = screen.getvalue()
  assert ('5/8' in shown and ' parts/s' in shown) == is_first
  *_, wiped, end = f'\r{shown}'.split('\r')
  assert wiped.strip() == end == ''
  assert capsys.readouterr().out == ''


@pytest.fixture
def clock(monkeypatch):
  """A clock that a test sets: clock.now, seconds."""
  clock = types.SimpleNamespace(now=1000.0)
  time = types.SimpleNamespace(perf_counter=lambda: clock.now)
  monkeypatch.setattr(pace, 'time', time)
  return clock


def test_rate_and_time_left_do_not_count_what_was_done_before(clock):
  lines = pace.Lines(None, 'train', total=10_100, unit='steps', done=100)
  clock.now += 8
  assert lines._text(8) == '100 of 10,100 steps, 00:08 so far'
  lines.update(2000)
  assert lines._text(8) == '2,100 of 10,100 steps, 250 steps/s, 00:32 left'
  lines.update(9000)  # More than was said before.
  assert lines._text(8).endswith(' steps/s, 00:00 left')


def test_the_pace_of_steps_is_that_since_the_last_line_without_pauses(clock):
  found = pace.Pace(100)
  found.begin()
  clock.now += 50  # To compile.
  found.seen(21)
  assert found.text(21) == ''
  clock.now += 2
  found.seen(22)
  clock.now += 2
  assert found.text(23) == '0.5 steps/s, 02:34 left'
  clock.now += 1
  assert found.text(25) == '2 steps/s, 00:37 left'
  clock.now += 300  # To refresh.
  found.begin()
  clock.now += 1
  found.seen(26)
  # Where a line is due at the first step, the rate is that of before.
  assert found.text(26) == '2 steps/s, 00:37 left'
  clock.now += 0.25
  assert found.text(27) == '4 steps/s, 00:18 left'
