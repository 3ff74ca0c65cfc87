"""Runs whose folder is copied elsewhere: whole or not at all, on any machine.

The bucket is one in memory, of fsspec: no rename, and an object is seen once it
is closed. What differs between machines here is the --workdir.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import threading
from types import SimpleNamespace

import background_test
import crash_test
from etils import epath
import fsspec
from fsspec.implementations import memory
import jax
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import locks
from ance_jax.core import logs
from ance_jax.core import remote
from ance_jax.core import workdirs
from ance_jax.jobs import report
from ance_jax.jobs import train
from ance_jax.training import background
from ance_jax.training import experiment
from ance_jax.training import refreshes

pytestmark = pytest.mark.usefixtures('compiled_once', 'bucket')
ADDRESS = 'gs://bucket/run'


class Bucket(memory.MemoryFileSystem):
  """A bucket of objects, which has no folders and no rename."""

  protocol = ('gcs', 'gs')
  store = {}
  pseudo_dirs = ['']

  @classmethod
  def _strip_protocol(cls, path):
    path = str(path).removeprefix('gs://').removeprefix('gcs://')
    return '/' + path.strip('/') if path.strip('/') else ''

  def mv(self, *_, **__):
    raise AssertionError('a bucket renames nothing')


@pytest.fixture
def bucket(monkeypatch):
  """An empty bucket behind gs://, and locks that do not take seconds."""
  fsspec.register_implementation('gcs', Bucket, clobber=True)
  Bucket.store.clear()
  Bucket.pseudo_dirs[:] = ['']
  monkeypatch.setattr(locks, '_SETTLE_SECS', 0.01)
  monkeypatch.setattr(locks, '_DEAD_SECS', 0.5)
  monkeypatch.setattr(locks, '_BEAT_SECS', 0.05)
  monkeypatch.setattr(background, 'LOOK_SECS', 0.001)
  monkeypatch.setattr(remote, '_places', {})
  return Bucket


@pytest.fixture
def config(eventful):
  return dataclasses.replace(eventful, remote_dir=ADDRESS)


def on_another_machine(config, name='other'):
  return dataclasses.replace(config, workdir=f'{config.workdir}-{name}')


def stop_at(monkeypatch, step):
  """Has training stop after so many steps."""
  background_test.set_at(monkeypatch, step, threading.Event(), logs._stop.set)


def train_until(config, monkeypatch, step):
  """Trains up to a stop signal after so many steps."""
  with monkeypatch.context() as patch:
    stop_at(patch, step)
    with pytest.raises(errors.Stopped):
      train.run(config)
  logs._stop.clear()


def publish(folder, content=b'abc'):
  with atomic.publish(folder, {'a': 1}) as unfinished:
    (unfinished / 'part').mkdir()
    (unfinished / 'part' / 'one').write_bytes(content)
    (unfinished / 'two').write_bytes(content)


def test_a_run_goes_on_on_a_fresh_machine_bit_equal(
  config, monkeypatch, capsys
):
  whole = dataclasses.replace(
    on_another_machine(config, 'whole'), remote_dir=''
  )
  train.run(whole)
  # Each time on another machine, and not only behind what it has.
  for number, step in enumerate((2, 9, 11, 14)):
    train_until(on_another_machine(config, str(number % 3)), monkeypatch, step)
  fresh = on_another_machine(config, 'fresh')
  train.run(fresh)
  assert 'is brought up to gs://bucket/run' in capsys.readouterr().out
  last, state, negatives, *others = crash_test.outcome(fresh)
  their_last, theirs, their_negatives, *their_others = crash_test.outcome(whole)
  assert last == their_last
  jax.tree.map(np.testing.assert_array_equal, state, theirs)
  assert others == their_others
  # Refreshes that are past stay where they were made.
  assert negatives.keys() < their_negatives.keys()
  for step, table in negatives.items():
    np.testing.assert_array_equal(table, their_negatives[step])


def test_all_that_counts_is_there_and_other_jobs_read_it(config, bucket):
  train.run(config)
  there = epath.Path(ADDRESS)
  steps = checkpoint.committed_steps(config.workdir)
  assert remote.numbers(f'{config.workdir}/checkpoints') == steps
  here = pathlib.Path(config.workdir)
  names = [
    path.relative_to(here)
    for path in here.rglob('*')
    if path.is_file()
    and path.relative_to(here).parts[0]
    not in ('tokens', 'embeddings', 'tensorboard')
  ]
  assert len(names) > 50
  for name in names:
    assert (there / name.as_posix()).read_bytes() == (here / name).read_bytes()
  ours = {str(path) for path in names}
  theirs = {path.removeprefix('/bucket/run/') for path in bucket.store}
  assert ours == theirs
  other = on_another_machine(config)
  _, step = experiment.open(
    dataclasses.replace(other, job='evaluate'), ('train', 'dev')
  )
  assert step == 16
  assert checkpoint.committed_steps(other.workdir) == [16]
  assert logs.read(other.workdir) == logs.read(config.workdir)
  assert report.examples(pathlib.Path(other.workdir)) == (
    report.examples(pathlib.Path(config.workdir))
  )
  _, step = experiment.open(
    dataclasses.replace(other, job='evaluate', checkpoint=str(steps[0])),
    ('train', 'dev'),
  )
  assert step == steps[0]


def test_a_trainer_and_a_refresher_share_a_bucket_and_nothing_else(
  config, monkeypatch
):
  config = dataclasses.replace(
    config,
    refresh_mode='external',
    max_staleness=8,
    max_steps=32,
    steps_per_eval=None,
  )
  with background_test.refresher(on_another_machine(config, 'refresher')):
    train_until(on_another_machine(config, 'first'), monkeypatch, 19)
  before = background_test.pick_ups(on_another_machine(config, 'first'))
  assert before[-1][0] > 10
  with background_test.refresher(on_another_machine(config, 'next')) as ended:
    train.run(config)
  assert not ended
  picked_up = background_test.pick_ups(config)
  assert picked_up[: len(before)] == before
  # A replay needs all refreshes in one folder.
  for folder in pathlib.Path(config.workdir).parent.glob('run-*/refresh/*'):
    shutil.copytree(
      folder, pathlib.Path(config.workdir, 'refresh', folder.name),
      dirs_exist_ok=True,
    )  # fmt: skip
  background_test.replayed(dataclasses.replace(config, remote_dir=''))


def test_another_refresher_goes_on_where_the_last_was(config, monkeypatch):
  config = dataclasses.replace(config, checkpoints_to_keep=9)
  train_until(config, monkeypatch, 10)
  for step in (4, 8):
    folder = pathlib.Path(config.workdir) / 'refresh' / f'{step:08d}'
    shutil.rmtree(folder)
    remote.remove(folder)
  made, real, ended = [], refreshes.refresh, threading.Event()

  def make(run, step, **kwargs):
    made.append((step, kwargs['before']))
    found = real(run, step, **kwargs)
    ended.set()
    return found

  monkeypatch.setattr(refreshes, 'refresh', make)
  with background_test.refresher(on_another_machine(config, 'a')):
    assert ended.wait(60)
  # It reads what is there, and finds nothing that is left to do.
  looks, real_next, looked = [], background._next, threading.Event()

  def following(run, committed, last, looked_at):
    looks.append(last)
    looked.set()
    return real_next(run, committed, last, looked_at)

  monkeypatch.setattr(background, '_next', following)
  with background_test.refresher(on_another_machine(config, 'b')):
    assert looked.wait(60)
  assert made == [(8, None)]
  assert set(looks) == {8}


def test_what_was_not_copied_is_at_the_next_start_and_what_went_there_goes_here(
  config,
):
  train.run(config)
  steps = checkpoint.committed_steps(config.workdir)
  remote.remove(f'{config.workdir}/checkpoints/{steps[-1]}')
  there = epath.Path(ADDRESS) / 'checkpoints'
  (there / '99').mkdir()
  (there / '99' / 'half').write_text('')
  (there / str(steps[0]) / atomic.MANIFEST).unlink()
  assert not checkpoint.fetch(config.workdir, every=True)
  assert remote.numbers(f'{config.workdir}/checkpoints') == steps
  other = on_another_machine(config)
  experiment.fetch(other, every=True)
  assert checkpoint.committed_steps(other.workdir) == steps
  remote.remove(f'{config.workdir}/checkpoints/{steps[0]}')
  checkpoint.fetch(other.workdir)
  assert checkpoint.committed_steps(other.workdir) == steps[1:]


@pytest.fixture
def two(tmp_path):
  """A folder with the folders a and b, of two machines with one bucket."""
  for name in ('a', 'b'):
    remote.connect(tmp_path / name, ADDRESS)
  return tmp_path


@pytest.mark.parametrize('files', range(3))
def test_a_folder_is_there_once_all_of_it_is(two, monkeypatch, files):
  for content in (b'abc', b'abcd'):
    publish(two / 'a' / '1', content)
    written, real = [], remote._write

    def write(there, path, written=written, real=real):
      if len(written) == files:
        raise OSError('the network is gone')
      written.append(path)
      real(there, path)

    with monkeypatch.context() as patch:
      patch.setattr(remote, '_write', write)
      with pytest.raises(OSError, match='network'):
        remote.push(two / 'a' / '1')
    assert remote.pull_newest(two / 'b') is None
    remote.push(two / 'a' / '1')
    assert remote.pull_newest(two / 'b') == 1
    assert atomic.read_manifest(two / 'b' / '1') == (
      atomic.read_manifest(two / 'a' / '1')
    )


def test_a_folder_that_goes_while_it_is_copied_leaves_nothing(two, monkeypatch):
  publish(two / 'a' / '1')
  remote.push(two / 'a' / '1')
  real = shutil.copyfileobj

  def copy(source, target):
    remote.remove(two / 'a' / '1')
    real(source, target)

  monkeypatch.setattr(shutil, 'copyfileobj', copy)
  assert not remote.pull(two / 'b' / '1')
  assert not list((two / 'b').glob('*'))


def test_a_copy_that_was_changed_is_not_taken(two, capsys):
  for number in (9, 10, 11):
    publish(two / 'a' / str(number))
    remote.push(two / 'a' / str(number))
  (epath.Path(ADDRESS) / '11' / 'two').write_bytes(b'abd')
  assert remote.numbers(two / 'b') == [9, 10, 11]
  assert remote.pull_newest(two / 'b') == 10
  assert remote.pull_newest(two / 'b', after=10) is None
  said = capsys.readouterr().out
  assert said.count('gs://bucket/run/11 is not whole, and not taken') == 1
  assert [path.name for path in (two / 'b').iterdir()] == ['10']


@pytest.mark.parametrize(
  'name', ['../../out', '/tmp/ance_jax_out', 'a/../../x']
)
def test_a_copy_with_a_path_out_of_it_is_not_taken(two, monkeypatch, name):
  there = epath.Path(ADDRESS) / '1'
  there.mkdir(parents=True)
  manifest = {'files': {name: 'abc'}}
  (there / atomic.MANIFEST).write_text(json.dumps(manifest))
  opened, real = [], type(there).open

  def open_it(path, *mode):
    if path.name != atomic.MANIFEST:
      opened.append(path)
    return real(path, *mode)

  monkeypatch.setattr(type(there), 'open', open_it)
  assert not remote.pull(two / 'b' / '1')
  # Not even what is there is looked for.
  assert not opened


def test_a_second_trainer_on_another_machine_is_refused(
  config, monkeypatch, capsys
):
  workdirs.require(config)
  other = on_another_machine(config)
  workdirs.require(other)
  monkeypatch.setattr(locks.os, 'kill', lambda *_: None)
  monkeypatch.setattr(locks.os, 'getpid', lambda: 4_194_305)
  with contextlib.closing(locks.Lock(config.workdir)) as lock:
    monkeypatch.setattr(locks.os, 'getpid', lambda: 4_194_306)
    with pytest.raises(
      errors.BadInput, match='process 4194305 .* is the trainer of'
    ):
      locks.Lock(other.workdir)
    assert not list(pathlib.Path(other.workdir).glob('lock'))
    lock.check()
  assert 'waiting 0.5 s for a sign of life' in capsys.readouterr().out
  locks.Lock(other.workdir).close()
  assert remote.read(f'{config.workdir}/lock') is None


def test_the_lock_of_a_dead_trainer_is_taken_over(config, monkeypatch):
  workdirs.require(config)
  path = f'{config.workdir}/lock'
  left = {'host': 'a', 'process': 1, 'kernel': 'another machine', 'beats': 3}
  remote.write(path, json.dumps(left).encode())
  lock = locks.Lock(config.workdir)
  lock.check()
  # Who was believed to be dead comes back, and says so.
  remote.write(path, json.dumps(left).encode())
  lock._beating.join(10)
  with pytest.raises(errors.BadInput, match="another process's now"):
    lock.check()
  lock.close()
  assert remote.read(path)


NOBODY = 4_194_305  # Above all process ids.


@pytest.mark.parametrize(
  ('kernel', 'process', 'meanwhile', 'waits', 'is_free'),
  [
    # On another machine, where a process that ends removes its lock.
    ('other', NOBODY, 'nothing', [0.5, 0.01], True),
    ('other', NOBODY, 'ends', [0.5, 0.01], True),
    ('other', NOBODY, 'beats', [0.5], False),
    ('other', NOBODY, 'ends, and another begins', [0.5, 0.01], False),
    # On this one.
    (None, NOBODY, 'nothing', [0.01], True),
    (None, 1, 'nothing', [0.5, 0.01], True),
    (None, 1, 'beats', [0.5], False),
  ],
)
def test_a_lock_is_waited_for_until_its_holder_is_known_to_live_or_not(
  kernel, process, meanwhile, waits, is_free, tmp_path, monkeypatch
):
  remote.connect(tmp_path, ADDRESS)
  path, waited = tmp_path / 'lock', []
  kernel = kernel or locks._kernel()
  left = {'host': 'a', 'process': process, 'kernel': kernel, 'beats': 1}

  def sleep(secs):
    waited.append(secs)
    if 'ends' in meanwhile and secs == locks._DEAD_SECS:
      remote.unlink(path)
    elif meanwhile not in ('nothing', 'ends'):
      remote.write(path, json.dumps({**left, 'beats': 2}).encode())

  # Of the module alone: threads of other tests sleep, too.
  monkeypatch.setattr(locks, 'time', SimpleNamespace(sleep=sleep))
  remote.write(path, json.dumps(left).encode())
  says = f'process {process} on a is'
  refused = pytest.raises(errors.BadInput, match=says)
  with contextlib.nullcontext() if is_free else refused:
    locks.Lock(tmp_path).close()
  assert waited == waits
  # What is another's stays.
  assert (remote.read(path) is None) == is_free


def test_a_folder_stays_mirrored_while_it_is_connected_again(
  tmp_path, monkeypatch
):
  """Else the heartbeat of a lock would find its place empty, and give up."""
  remote.connect(tmp_path, ADDRESS)
  seen = []

  class Slow:
    def __init__(self, address):
      pass

    def exists(self):
      seen.append(remote.is_connected(tmp_path))
      return False

  with monkeypatch.context() as patch:
    patch.setattr(remote, 'epath', SimpleNamespace(Path=Slow))
    remote.connect(tmp_path, ADDRESS)
  assert seen == [True]
  remote.connect(tmp_path, '')
  assert not remote.is_connected(tmp_path)


def test_the_checkpoints_of_another_run_are_refused(config, monkeypatch):
  train_until(config, monkeypatch, 5)
  other = dataclasses.replace(on_another_machine(config), remote_dir='')
  train_until(other, monkeypatch, 3)
  with pytest.raises(
    errors.BadInput, match='has checkpoints of run .* --workdir of run'
  ):
    train.run(dataclasses.replace(other, remote_dir=ADDRESS))


@pytest.mark.parametrize(
  'address', ['http://a/b', 'gs:/a', 'runs/a', 'gs://a/../b', 'gs://a b', '~/a']
)
def test_addresses_that_are_none_are_refused(address):
  with pytest.raises(
    errors.BadInput, match='is not a folder that can .*; write gs://'
  ):
    config_lib.Config(remote_dir=address)


@pytest.mark.parametrize('address', ['run', '.', 'run/copy'])
def test_the_folder_itself_is_no_place_for_its_copy(tmp_path, address):
  with pytest.raises(
    errors.BadInput, match='--remote_dir=.* and --workdir=.* overlap'
  ):
    remote.connect(tmp_path / 'run', str(tmp_path / address))


@pytest.mark.parametrize('scheme', ['file', 'bucket'])
def test_a_file_is_no_place_for_a_copy(scheme, tmp_path):
  above = tmp_path if scheme == 'file' else 'gs://bucket'
  file, folder = (epath.Path(f'{above}/{name}') for name in ('a', 'b'))
  folder.mkdir()
  for place in (file, folder / 'c'):
    place.write_text('')
  with pytest.raises(
    errors.BadInput, match='--remote_dir=.*/a is a file; name'
  ):
    remote.connect(tmp_path / 'run', str(file))
  assert not remote.is_connected(tmp_path / 'run')
  for name in ('b', 'none'):
    remote.connect(tmp_path / 'run', f'{above}/{name}')
    assert remote.is_connected(tmp_path / 'run')
  remote.connect(tmp_path / 'run', '')
  assert not remote.is_connected(tmp_path / 'run')


def test_a_place_that_cannot_be_reached_is_refused(tmp_path, monkeypatch):
  def exists(*_, **__):
    raise ImportError('Please install gcsfs')

  monkeypatch.setattr(Bucket, 'exists', exists)
  with pytest.raises(errors.BadInput, match='pip install gcsfs'):
    remote.connect(tmp_path, 'gs://other/run')
