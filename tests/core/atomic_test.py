"""A published folder is whole, or it is not there."""

import errno
import json
import os
import shutil
import threading

import pytest

from ance_jax import errors
from ance_jax.core import atomic


def test_a_folder_is_seen_only_when_it_is_whole(tmp_path):
  target = tmp_path / 'made'
  with atomic.publish(target, {'step': 3}) as folder:
    (folder / 'part').write_text('one')
    assert atomic.read_manifest(target) is None
    assert not target.exists()
  assert atomic.read_manifest(target)['step'] == 3
  assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize('damaged', [b'12345679', b'1234567', None])
def test_a_damaged_file_is_found_and_named(tmp_path, damaged):
  with atomic.publish(tmp_path / 'made', {}) as folder:
    (folder / 'inner').mkdir()
    (folder / 'inner' / 'part').write_bytes(b'12345678')
  part = tmp_path / 'made' / 'inner' / 'part'
  part.unlink()
  if damaged:
    part.write_bytes(damaged)
  with pytest.raises(
    errors.BadInput, match='inner/part is missing or was changed'
  ):
    atomic.read_manifest(tmp_path / 'made')


def test_publishing_again_replaces_the_folder(tmp_path):
  for text in ('old', 'new'):
    with atomic.publish(tmp_path / 'made', {'text': text}) as folder:
      (folder / text).write_text(text)
  assert atomic.read_manifest(tmp_path / 'made')['text'] == 'new'
  manifest = json.loads((tmp_path / 'made' / atomic.MANIFEST).read_text())
  path = tmp_path / 'made' / 'new'
  assert manifest['files'] == {'new': atomic.file_hash(path)}
  names = {path.name for path in (tmp_path / 'made').iterdir()}
  assert names == {'new', atomic.MANIFEST}


def test_every_single_bit_of_a_manifest_is_checked(tmp_path):
  with atomic.publish(tmp_path / 'made', {'step': 3, 'k': 0.5}) as folder:
    (folder / 'part').write_text('one')
  path = tmp_path / 'made' / atomic.MANIFEST
  whole = path.read_bytes()
  for bit in range(8 * len(whole)):
    content = bytearray(whole)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(errors.Damaged):
      atomic.read_manifest(tmp_path / 'made')


def test_what_is_damaged_is_set_aside_to_be_made_again(tmp_path, capsys):
  for number in (1, 2):
    with atomic.publish(tmp_path / 'made', {'step': 3}) as folder:
      (folder / 'part').write_text('one')
    assert atomic.find_valid(tmp_path / 'made', {'step': 3})['step'] == 3
    assert atomic.find_valid(tmp_path / 'made', {'step': 4}) is None
    (tmp_path / 'made' / 'part').write_text('two')
    assert atomic.find_valid(tmp_path / 'made', {'step': 3}) is None
    assert (tmp_path / f'made.damaged-{number}' / 'part').exists()
    assert f'It is now {tmp_path}/made.damaged-{number}' in (
      capsys.readouterr().out
    )


@pytest.mark.parametrize('number', [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_what_is_damaged_where_nothing_may_be_written_is_told(
  number, tmp_path, monkeypatch
):
  with atomic.publish(tmp_path / 'made', {}) as folder:
    (folder / 'part').write_text('one')
  (tmp_path / 'made' / 'part').write_text('two')

  def rename(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(os, 'rename', rename)
  if number == errno.ENOSPC:
    with pytest.raises(OSError, match='No space'):
      atomic.find_valid(tmp_path / 'made', {})
    return
  says = f'{tmp_path}/made/part is missing or was.* name a folder of your own'
  with pytest.raises(errors.Damaged, match=says):
    atomic.find_valid(tmp_path / 'made', {})


def test_what_another_living_process_writes_is_not_removed(tmp_path):
  paths = [
    tmp_path / f'file.new-{number}.unfinished'
    for number in (os.getpid(), os.getppid(), 2**22 + 1)
  ]
  for path in paths:
    path.write_text('half')
  # A writer has its file locked; the number may be another process's by now.
  with open(paths[1], 'r+') as living:
    assert atomic.lock(living.fileno())
    atomic.remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [paths[1]]
  atomic.remove_unfinished(tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_what_is_being_written_is_not_removed(tmp_path):
  with atomic.publish(tmp_path / 'made', {}) as folder:
    with atomic.writing(folder / 'part') as file:
      file.write(b'one')
      atomic.remove_unfinished(tmp_path)
  assert atomic.read_manifest(tmp_path / 'made')['files'].keys() == {'part'}


def test_a_folder_in_use_is_not_removed_as_unused(tmp_path):
  folder = tmp_path / 'made'
  with atomic.in_use(folder), atomic.in_use(folder):
    atomic.remove_unused(folder)
    assert folder.is_dir()
  atomic.remove_unused(folder)
  assert not folder.exists()


def test_one_at_a_time_makes_what_is_in_a_folder(tmp_path):
  """The second says that it waits, and goes on when the first is done."""
  said, went_in = [], threading.Event()

  def second():
    with atomic.exclusive(tmp_path / 'new', lambda: said.append('waiting')):
      went_in.set()

  with atomic.exclusive(tmp_path / 'new', lambda: said.append('wrong')):
    thread = threading.Thread(target=second)
    thread.start()
    assert not went_in.wait(0.6)
  assert went_in.wait(10)
  thread.join()
  assert said == ['waiting']


def test_a_folder_that_goes_while_its_lock_is_taken_is_made_again(
  tmp_path, monkeypatch
):
  folder, real, removed = tmp_path / 'blocks', atomic.lock, []

  def lock(descriptor, how):
    if not removed:
      shutil.rmtree(folder)
      removed.append(True)
    return real(descriptor, how)

  monkeypatch.setattr(atomic, 'lock', lock)
  with atomic.in_use(folder):
    assert removed
    assert folder.is_dir()
    monkeypatch.undo()
    atomic.remove_unused(folder)
    assert folder.is_dir()
  atomic.remove_unused(folder)
  assert not folder.exists()
