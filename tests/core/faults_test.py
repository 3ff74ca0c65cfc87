"""What a failed file or connection says: the fact first, by its kind."""

import errno
import os

import pytest

from ance_jax import launch
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import faults
from ance_jax.core import locks

DISK = 'what was committed is whole'


@pytest.mark.parametrize(
  ('number', 'fact', 'code'),
  [
    (errno.EACCES, 'permission denied: /a/b; check its rights', 2),
    (errno.EPERM, 'permission denied: /a/b;', 2),
    (errno.EROFS, '/a/b is on a read-only file system;', 2),
    (errno.ENOTDIR, 'a part of the path /a/b is a file, not a folder;', 2),
    (errno.EISDIR, '/a/b is a folder, and a file is needed;', 2),
    (errno.ENOENT, '/a/b does not exist;', 2),
    (errno.EEXIST, '/a/b is there already;', 2),
    (errno.ENAMETOOLONG, '/a/b is longer than a name may be;', 2),
    (errno.ELOOP, 'the links at /a/b lead in a circle;', 2),
    (errno.ENOSPC, f'No space left on device: /a/b; {DISK}', 1),
    (errno.EDQUOT, f'the disk quota is used up at /a/b; {DISK}', 1),
    (errno.EIO, f'Input/output error: the disk of /a/b failed; {DISK}', 1),
    (errno.EMFILE, f'Too many open files, at /a/b; {DISK}: raise the', 1),
  ],
  ids=lambda value: errno.errorcode.get(value),
)
def test_each_error_of_a_file_says_its_kind_and_the_cure_that_fits(
  number, fact, code
):
  found, exit_code = launch.explain(OSError(number, 'text', '/a/b'))
  assert found.startswith(fact)
  assert exit_code == code
  assert (DISK in found) == (DISK in fact)
  # What the whole-run tests of faulty disks look for.
  if number in (errno.ENOSPC, errno.EIO, errno.EMFILE):
    assert os.strerror(number) in found
  assert found.endswith('.')
  assert '\n' not in found


@pytest.mark.parametrize(
  ('error', 'fact'),
  [
    (
      ValueError(
        'PERMISSION_DENIED: Error opening local file "/r/params/d/0" [OS error '
        '13: EACCES Permission denied]'
      ),
      'permission denied: /r/params/d/0;',
    ),
    (
      RuntimeError(
        'Error in write at io.cpp:9: write error in /i.faiss: 0 != 1 (No space '
        'left on device)'
      ),
      'No space left on device: a file;',
    ),
    (
      ValueError(
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, '
        'message: "No space left on device" })'
      ),
      'No space left',
    ),
    (OSError('4096 requested and 512 written'), 'No space left'),
    (ConnectionResetError(104, 'reset'), 'the network failed'),
    (BrokenPipeError(32, 'Broken pipe'), 'nobody reads the output'),
  ],
  ids=lambda value: type(value).__name__,
)
def test_what_libraries_make_of_an_error_is_told_the_same(error, fact):
  assert launch.explain(error)[0].startswith(fact)


def test_a_cause_is_told_but_not_what_was_being_handled():
  wrapped = RuntimeError('it failed')
  wrapped.__cause__ = PermissionError(13, 'denied', '/a')
  assert launch.explain(wrapped)[0].startswith('permission denied: /a;')
  other = RuntimeError('it failed')
  other.__context__ = PermissionError(13, 'denied', '/a')
  assert launch.explain(other)[0].startswith('RuntimeError: it failed')
  assert faults.sentence(KeyError('a')) == ''


def test_a_save_that_may_not_write_is_not_told_to_make_room():
  denied = checkpoint._failed(4, PermissionError(13, 'Permission denied', '/a'))
  assert 'check its rights' in str(denied)
  assert 'make room' not in str(denied)
  full = checkpoint._failed(4, OSError(28, 'No space left on device'))
  assert 'are whole: make room, and give the same command' in str(full)


def _full(*_):
  raise OSError(28, 'No space left on device')


def _cut(*_):  # As numpy tells it, without a number.
  raise OSError('4096 requested and 512 written')


def _write(path, what):
  with atomic.writing(path):
    what()


def _publish(path, what):
  with atomic.publish(path, {}):
    what()


def _lock(path, what):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, 'pwrite', what)
    locks.Lock(path.parent, path.name)


@pytest.mark.parametrize('what', [_full, _cut])
@pytest.mark.parametrize('how', [_write, _publish, _lock])
def test_a_full_disk_is_told_with_the_path_that_was_written(
  how, what, tmp_path
):
  with pytest.raises(OSError, match=r'.') as raised:
    how(tmp_path / 'made', what)
  found, code = launch.explain(raised.value)
  assert found.startswith(f'No space left on device: {tmp_path}/made; {DISK}')
  assert code == 1


def test_an_error_keeps_the_path_that_it_brings(tmp_path):
  with pytest.raises(FileNotFoundError) as raised:
    _write(tmp_path / 'made', lambda: open(tmp_path / 'none'))
  assert raised.value.filename == str(tmp_path / 'none')


def test_a_damaged_file_ends_with_the_code_of_a_disk():
  found, code = launch.explain(atomic._damaged('/a/b'))
  assert '/a/b is missing or was changed' in found
  assert code == 1
