"""Storage code stopped, refused, or cut off the power at every file operation.

One process drives all that writes: single files, folders published and
published again, token stores, embedding blocks, metrics, the lock. At each of
its operations in turn it is stopped, or gets an error, or the power is cut, and
is started again.
"""

import contextlib
import errno
import os
import pathlib
import shutil
from types import SimpleNamespace
from unittest import mock

import faulty_disk
import numpy as np
import pytest

from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import locks
from ance_jax.core import logs
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.retrieval import encoding

TEXTS = [f'word{i % 7} word{i % 5} word{i % 3}' for i in range(10)]


@pytest.fixture(scope='module', autouse=True)
def _quick():
  """Real syncs take most of the time, then TensorBoard's files and bars."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, 'fsync', lambda descriptor: None)
    patch.setattr(logs, '_Board', mock.MagicMock())
    patch.setattr(logs, 'progress', lambda items, *_, **__: items)
    # The same names in each run, so that their operations can be compared.
    patch.setattr(atomic.secrets, 'token_hex', lambda _: 'token')
    yield


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.train_vocabulary(TEXTS, 60)


def encoder():
  """An encoder without a model: what is tried here is how it is stored."""

  def encode_batch(params, ids, lengths):
    return (ids[:, :4] * params).astype(np.float32)

  return encoding.Encoder(encode_batch, 1, 64, 16, 4)


def drive(folder, tokenizer):
  """Writes everything that is stored; yields (path, state) as it is promised.

  A state is what `state_of` returns from then on, until it is replaced.
  """
  atomic.remove_unfinished(folder)
  with contextlib.closing(locks.Lock(folder)):
    yield from store(folder, tokenizer)


def store(folder, tokenizer):
  for text in ('first', 'second, and longer'):
    atomic.write_text(folder / 'file', text)
    yield 'file', text.encode()
  for text in ('one', 'two'):
    with atomic.publish(folder / 'inner' / 'made', {'text': text}) as made:
      atomic.make_folder(made / 'deeper')
      (made / 'deeper' / text).write_text(text * 9)
      np.save(made / 'array.npy', np.arange(5))
    yield 'inner/made', text
  rows = tokens.token_rows(
    tokenizer,
    TEXTS,
    what='passages',
    num_texts=len(TEXTS),
    cut=tokens.Cut(16),
    content_hash='texts',
    folder=folder / 'tokens',
  )
  for params in (2.0, 3.0):
    blocks = folder / 'embeddings' / str(params)
    encoding.encode_corpus(encoder(), params, rows, blocks, rows_per_block=6)
    yield f'embeddings/{params}/00001', None
  metrics = logs.Metrics(folder, history=b'{"step": 1}\n', step=1)
  with contextlib.closing(metrics):
    metrics.write(2, {'train/loss': 0.5})
  yield 'metrics.jsonl', b'{"step": 1}\n{"step": 2, "train/loss": 0.5}\n'


def copies(folder):
  """As `drive`: a folder copied in, and a checkpoint committed and deleted."""
  atomic.remove_unfinished(folder)
  with atomic.publish(folder / 'made', {'text': 'one'}) as made:
    (made / 'file').write_text('1' * 9)
  with atomic.receive(folder / 'copied') as copy:
    for name in ('file', atomic.MANIFEST):
      (copy / name).write_bytes((folder / 'made' / name).read_bytes())
  yield 'copied', 'one'
  atomic.make_folder(folder / 'checkpoints')
  saves = SimpleNamespace(_manager=mock.MagicMock(), _workdir=folder)
  record = {'record': b'1', 'deeper/record': b'2'}
  for step in (3, 4):
    # As Orbax does.
    (folder / 'checkpoints' / str(step)).mkdir(exist_ok=True)
    checkpoint.Checkpoints._commit(saves, step, record, {'text': 'saved'})
    yield f'checkpoints/{step}', 'saved'
  checkpoint._delete(folder / 'checkpoints' / '3')
  yield 'checkpoints/3', 'missing'


def state_of(path):
  """Returns what a reader finds: bytes, the manifest's text, or 'missing'.

  Raises:
    Damaged: It finds something that was never written.
  """
  if path.is_file():
    return path.read_bytes()
  manifest = atomic.read_manifest(path)
  return 'missing' if manifest is None else manifest.get('text')


def tree_of(folder):
  """Returns {path: bytes} of all files that count."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file() and 'tensorboard' not in path.parts
  }


@pytest.fixture(scope='module')
def reference(tokenizer, tmp_path_factory):
  """Operations, promises with the number of operations before, and files."""
  folder = tmp_path_factory.mktemp('reference')
  with faulty_disk.FaultyDisk(folder) as disk:
    promises = [(len(disk.operations), *p) for p in drive(folder, tokenizer)]
  assert len(disk.operations) > 80
  return disk.operations, promises, tree_of(folder)


def check_promises(folder, promises, number):
  """Checks what is found after `number` operations and a start."""
  atomic.remove_unfinished(folder)
  for path in {path for _, path, _ in promises}:
    states = [(n, state) for n, p, state in promises if p == path]
    kept = [state for n, state in states if n <= number]
    coming = [state for n, state in states if n > number]
    allowed = [*(kept[-1:] or ['missing']), *coming[:1]]
    if path == 'metrics.jsonl':
      continue  # Lines that no checkpoint holds are not promised.
    assert state_of(folder / path) in allowed, (path, number)


# One for all: what is written does not depend on the kind of the error.
ERROR = 'error'


# Stopping before an operation equals stopping after the previous one.
@pytest.mark.parametrize(
  'how', [faulty_disk.HALF_WAY, faulty_disk.AFTER, ERROR]
)
def test_stopped_or_refused_at_any_operation_it_ends_with_the_same_files(
  how, reference, tokenizer, tmp_path, capsys
):
  operations, promises, files = reference
  kwargs, expected = {'how': how}, faulty_disk.Killed
  if how == ERROR:
    kwargs, expected = {'error': errno.ENOSPC}, OSError
  for number, operation in enumerate(operations):
    if how == faulty_disk.HALF_WAY and operation.kind != 'write':
      continue
    folder = tmp_path / str(number)
    folder.mkdir()
    disk = faulty_disk.FaultyDisk(folder, at=number, **kwargs)
    with disk, pytest.raises(expected) as raised:
      list(drive(folder, tokenizer))
    done = number + (how == faulty_disk.AFTER)
    if how == ERROR:
      assert raised.value.errno == errno.ENOSPC
    else:
      assert disk.operations == operations[:done]
    check_promises(folder, promises, done)
    list(drive(folder, tokenizer))
    assert tree_of(folder) == files, (number, operation)
    shutil.rmtree(folder)


def losses(number, some=1):
  """Returns what decides what power cuts after an operation leave."""
  return {
    'names': faulty_disk.Extreme(names=True),
    'data': faulty_disk.Extreme(names=False),
    **{f'some-{n}': faulty_disk.seeded(number, n) for n in range(some)},
  }


def test_a_power_cut_after_any_operation_loses_nothing_that_was_promised(
  reference, tokenizer, tmp_path, capsys
):
  operations, promises, files = reference
  for number in range(len(operations) + 1):
    for kind, random in losses(number).items():
      folder = tmp_path / f'{number}-{kind}'
      faulty_disk.after_power_loss(operations[:number], folder, random)
      check_promises(folder, promises, number)
    if number % 4 == 0:
      list(drive(folder, tokenizer))
      assert tree_of(folder) == files, number


def test_a_power_cut_loses_nothing_that_was_copied_committed_or_deleted(
  tmp_path,
):
  (tmp_path / 'real').mkdir()
  with faulty_disk.FaultyDisk(tmp_path / 'real') as disk:
    promises = [(len(disk.operations), *p) for p in copies(tmp_path / 'real')]
  for number in range(len(disk.operations) + 1):
    for kind, random in losses(number, 8).items():
      folder = tmp_path / f'{number}-{kind}'
      faulty_disk.after_power_loss(
        disk.operations[:number], folder, random, before=['checkpoints']
      )
      check_promises(folder, promises, number)
    list(copies(folder))


def test_what_is_synced_is_found_after_a_power_cut_and_nothing_else_is_sure(
  tmp_path,
):
  """The simulation itself: without its fsyncs, the same code loses data."""
  folder = tmp_path / 'real'
  folder.mkdir()
  with faulty_disk.FaultyDisk(folder) as disk:
    atomic.write_text(folder / 'file', 'text')
  found = {True: set(), False: set()}
  for synced in found:
    operations = [o for o in disk.operations if synced or o.kind != 'fsync']
    for seed in range(40):
      copy = tmp_path / f'{synced}-{seed}'
      faulty_disk.after_power_loss(operations, copy, faulty_disk.seeded(seed))
      path = copy / 'file'
      found[synced].add(path.read_bytes() if path.exists() else None)
  assert found[True] == {b'text'}
  assert found[False] >= {b'text', None, b'', bytes(4)}


def test_the_folder_below_is_all_that_is_watched(tmp_path):
  (tmp_path / 'watched').mkdir()
  with faulty_disk.FaultyDisk(tmp_path / 'watched') as disk:
    (tmp_path / 'other').write_text('1')
    pathlib.Path(tmp_path / 'watched' / 'file').write_text('1')
  assert [(o.kind, o.path) for o in disk.operations] == [
    ('open', 'file'),
    ('write', 'file'),
  ]
