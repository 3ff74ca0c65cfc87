"""Several processes train as one; one that dies ends all, and loses nothing."""

from concurrent import futures
import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from ance_jax import errors as errors_lib
from ance_jax.core import devices
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.jobs import train
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import index
from ance_jax.training import experiment
from ance_jax.training import negatives

REPOSITORY = pathlib.Path(__file__).parents[2]
# What one process runs: our main, that says how many rows it indexes; the one
# that `dies` ends in the middle of step 10.
CHILD = """
import os, sys
from ance_jax.retrieval import index
from ance_jax import main
from ance_jax.training import run_log
build, log_step = index.build, run_log.RunLog.log_step
def counted(factory, params, blocks, **kwargs):
  print('rows indexed:', sum(map(len, blocks)), flush=True)
  return build(factory, params, blocks, **kwargs)
def killed(self, step, *rest):
  if step == 9 and {dies}:
    os._exit(9)
  log_step(self, step, *rest)
index.build, run_log.RunLog.log_step = counted, killed
sys.argv = ['main', *{flags!r}]
main.run()
"""


def start(config, number, count, *, dies=False):
  """Starts one process of several, with 4 / count devices."""
  launch = [
    f'--num_processes={count}',
    f'--process_id={number}',
    f'--coordinator=localhost:{start.port}',
  ]
  devices = f'--xla_force_host_platform_device_count={4 // count}'
  flags = os.environ['XLA_FLAGS'].split()[1:]
  code = CHILD.format(
    dies=dies, flags=[*config.to_flagfile().split('\n')[:-1], *launch]
  )
  return subprocess.Popen(
    [sys.executable, '-c', code],
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, 'XLA_FLAGS': ' '.join([devices, *flags])},
  )


def together(config, count, *, dies=None):
  """Returns (exit code, output, errors) of each of `count` processes."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    start.port = free.getsockname()[1]
  children = [start(config, n, count, dies=n == dies) for n in range(count)]
  # All at once: one whose pipe is full would not go on.
  with futures.ThreadPoolExecutor(count) as pool:
    ended = list(pool.map(lambda c: c.communicate(timeout=300), children))
  return [
    (child.returncode, *texts)
    for child, texts in zip(children, ended, strict=True)
  ]


@pytest.fixture
def config(tiny):
  # Scores of several processes differ from those of one in their last bits.
  # With this seed no two neighbours in a ranking are as close as that.
  return dataclasses.replace(
    tiny, rows_per_block=16, dropout_rate=0.2, warmup_method='bm25', seed=1
  )


@pytest.mark.parametrize(
  ('first', 'then'), [(2, 1), pytest.param(4, 2, marks=pytest.mark.soak)]
)
def test_some_train_as_one_and_without_one_that_died_fewer_go_on(
  config, tmp_path, first, then
):
  alone = dataclasses.replace(
    config, workdir=str(tmp_path / 'alone'), num_devices=4
  )
  train.run(alone)

  ended = together(config, first, dies=first - 1)
  if then == 1:
    train.run(dataclasses.replace(config, num_devices=4))
  else:
    assert [code for code, *_ in together(config, then)] == [0] * then

  # Of 150 passages in blocks of 16, nobody has more than its own.
  rows = {2: (80, 70), 4: (48, 38, 32, 32)}[first]
  for number, (code, output, errors) in enumerate(ended):
    lines = {line for line in output.splitlines() if line.startswith('rows')}
    assert lines == {f'rows indexed: {rows[number]}'}
    if number == first - 1:
      assert code == 9
      continue
    assert code not in (0, 9)
    assert f'process {number} cannot reach another' in errors or (
      'distributed service detected fatal errors' in errors
    ), errors
  for step in (4, 8):
    for workdir in (config.workdir, alone.workdir):
      assert (pathlib.Path(workdir) / f'refresh/{step:08d}').is_dir()
    negatives = [
      np.load(f'{workdir}/refresh/{step:08d}/negatives.npy')
      for workdir in (config.workdir, alone.workdir)
    ]
    np.testing.assert_array_equal(*negatives)
  for name in ('train/loss', 'train/grad_norm', 'dev/mrr@10'):
    found, expected = (
      logs.series(workdir, name) for workdir in (config.workdir, alone.workdir)
    )
    assert found.keys() == expected.keys()
    # A norm of 40 has no digit of 1e-5 in float32; losses, near 1, have.
    close = {'rtol': 1e-5} if name == 'train/grad_norm' else {'rtol': 0}
    np.testing.assert_allclose(
      list(found.values()), list(expected.values()), atol=1e-5, **close
    )
  assert (
    '--num_processes=1\n'
    not in (pathlib.Path(config.workdir) / 'run.flags').read_text()
  )


class Threads:
  """Threads that take the place of processes."""

  def __init__(self, count):
    self._here, self._sent = threading.local(), {}
    self._count, self._barrier = count, threading.Barrier(count, timeout=60)

  def index(self):
    return self._here.index

  def count(self):
    return self._count

  def all_gather(self, array):
    self._sent[self.index()] = array
    self._barrier.wait()
    sent = np.stack([self._sent[n] for n in range(self._count)])
    self._barrier.wait()
    return sent

  def run(self, function):
    def of(number):
      self._here.index = number
      return function()

    with futures.ThreadPoolExecutor(self._count) as pool:
      return list(pool.map(of, range(self._count)))


@pytest.mark.parametrize('center', [False, True])
@pytest.mark.parametrize('on_devices', [False, True])
def test_the_parts_of_an_index_find_what_the_whole_one_does(
  monkeypatch, center, on_devices
):
  random = np.random.default_rng(0)
  # Whole numbers with a whole mean, so that many scores are equal; parts of
  # fewer rows than k.
  half = random.integers(-2, 3, size=(43, 8))
  rows = np.concatenate([half, -half, np.zeros((1, 8), int)]) + 3
  blocks = np.split(rows.astype(np.float32), [20, 40, 60, 80])
  queries = random.integers(-2, 3, size=(9, 8)).astype(np.float32)

  def build(blocks):
    if on_devices:
      # Threads that share several devices would wait for each other.
      return index.place(blocks, devices.local(1), 8, center=center)
    return index.build('Flat', '', blocks, center=center)

  expected = index.search(build(blocks), queries, 25)
  threads = Threads(3)

  def search():
    part = build(blocks[threads.index() :: 3])
    return index.search(index.shared(part, blocks), queries, 25)

  for name in ('index', 'count', 'all_gather'):
    monkeypatch.setattr(distributed, name, getattr(threads, name))
  for found in threads.run(search):
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize('count', [1, 3, 5])
def test_queries_of_a_slice_are_encoded_by_all_processes(count, monkeypatch):
  rows, threads = np.array([3, 9, 4, 7, 1, 0, 5]), Threads(count)
  for name in ('index', 'count', 'all_gather'):
    monkeypatch.setattr(distributed, name, getattr(threads, name))
  encoded = SimpleNamespace(
    encode_rows=lambda *args: (args[-1][:, None].astype(np.float32), 0),
    flops=lambda encoder, body, lengths: lengths.sum(),
  )
  monkeypatch.setattr(corpus_index, 'encoding', encoded)
  model = SimpleNamespace(
    query_encoder=None, params=None, config=SimpleNamespace(body=None)
  )
  queries = SimpleNamespace(lengths=lambda: np.arange(20))

  def encode():
    watch = logs.Stopwatch()
    found = corpus_index.encode_queries(model, queries, 'train', watch, rows)
    return found[:, 0].tolist(), watch.flops['encode']

  # With five processes the last has none.
  assert threads.run(encode) == [(rows.tolist(), rows.sum())] * count


def test_a_process_without_a_block_is_refused(config, monkeypatch):
  run = experiment.create(config, ('train', 'dev'))[0]
  monkeypatch.setattr(distributed, 'count', lambda: 11)
  with pytest.raises(errors_lib.BadInput, match='set it to at most 13'):
    negatives.check(run)


def test_a_block_that_another_process_did_not_write_is_named(
  config, monkeypatch
):
  run, params = experiment.create(config, ('train', 'dev'))
  monkeypatch.setattr(distributed, 'count', lambda: 2)
  monkeypatch.setattr(
    distributed, 'all_gather', lambda array: np.stack([array] * 2)
  )
  placed = devices.replicate(params, run.devices)
  with pytest.raises(FileNotFoundError, match='00001/embeddings.npy'):
    run.with_params(placed).index_corpus(logs.Stopwatch())
