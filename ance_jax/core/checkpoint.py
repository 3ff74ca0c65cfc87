"""Orbax: one Composite checkpoint a save.

Items: `params`, read alone for the handoff to a refresh, `opt_state`, and
`meta`. Beside them lies `record/`, small files: with them a checkpoint holds
all that a run goes on from. Orbax makes a step visible whole or not at all; it
neither syncs nor hashes it, so a manifest does, and a step without one is not
there.
"""

from concurrent import futures
import contextlib
import hashlib
import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import faults
from ance_jax.core import logs
from ance_jax.core import remote

DAMAGED = 'damaged-checkpoint'
_RECORD = 'record'


class Checkpoints:
  """Writes the checkpoints of a run, in the background.

  Only one object writes a folder: what an earlier one left uncommitted there
  is removed.
  """

  def __init__(self, workdir):
    if distributed.is_first():
      atomic.make_folder(_folder(workdir))
      remove_uncommitted(workdir)
    distributed.wait('checkpoints')
    self._workdir = workdir
    self._background = futures.ThreadPoolExecutor(1)
    self._saving, self._removing = None, []
    self._manager = ocp.CheckpointManager(
      _folder(workdir),
      options=ocp.CheckpointManagerOptions(cleanup_tmp_directories=True),
    )

  def save(self, state, step, record=None, about=None):
    """Begins to save a `steps.State`; `wait` makes sure that it is there.

    Args:
      state: The state, on all devices of all processes; it may be donated as
        soon as this returns.
      step: int, its step.
      record: {name: bytes} of the files for `read_record`; '/' parts folders.
      about: dict for the manifest.

    Raises:
      SaveFailed: Orbax did not take it, or an earlier one failed.
    """
    self.wait()
    try:
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(state.params),
          opt_state=ocp.args.StandardSave(state.opt_state),
          meta=ocp.args.JsonSave({'step': step}),
        ),
      )
    except Exception as error:
      raise _failed(step, error) from error
    if not saved:
      raise _failed(step, RuntimeError('Orbax refused it'))
    about = {**(about or {}), 'step': step}
    commit = self._background.submit(self._commit, step, record or {}, about)
    self._saving = step, commit

  def _commit(self, step, record, about):
    self._manager.wait_until_finished()
    if not distributed.is_first():
      return
    folder = _folder(self._workdir) / str(step)
    for name, content in record.items():
      path = folder / _RECORD / name
      atomic.make_folder(path.parent)
      path.write_bytes(content)
    atomic.seal(folder, about)
    remote.push(folder)

  def check(self):
    """Raises `SaveFailed` if what was begun is known to have failed."""
    saving = self._saving[1] if self._saving else None
    if saving and saving.done() and saving.exception():
      self.wait()

  def wait(self):
    """Returns once all that was saved is committed.

    Raises:
      SaveFailed: It could not be.
    """
    if self._saving:
      (step, saving), self._saving = self._saving, None
      try:
        saving.result()
        while self._removing:
          self._removing.pop().result()
      except Exception as error:
        # Orbax tells each thread once; here that would hide this sentence.
        with contextlib.suppress(Exception):
          self._manager.wait_until_finished()
        raise _failed(step, error) from error
      # Only now has process 0 written the last of it.
      distributed.wait('committed')

  def restore(self, step, like):
    """Returns the `steps.State` of a step, laid out as `like` is."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(like.params),
        opt_state=ocp.args.StandardRestore(like.opt_state),
        meta=ocp.args.JsonRestore(),
      ),
    )
    count = jax.device_put(np.int32(restored.meta['step']), like.step.sharding)
    return like._replace(
      step=count, params=restored.params, opt_state=restored.opt_state
    )

  def keep(self, wanted):
    """Deletes all checkpoints but those of the steps `wanted`."""
    folder = _folder(self._workdir)
    for step in set(_orbax_steps(folder)) - set(wanted):
      if remote.is_connected(self._workdir):
        # Training does not wait for a network.
        gone = self._background.submit(remote.remove, folder / str(step))
        self._removing.append(gone)
      _delete(folder / str(step))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    """Waits, and lets go of the folder."""
    try:
      self.wait()
    finally:
      self._background.shutdown()
      self._manager.close()


def read_params(workdir, step, shapes, devices):
  """Returns the params item of a committed checkpoint, on all devices.

  Args:
    workdir: Folder of the run.
    step: int, the checkpoint's.
    shapes: The tree of parameters, with a shape and dtype for each.
    devices: Where they go; they are this process's then.
  """
  sharding = devices_lib.globally_replicated(devices)
  like = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
  )
  if step not in committed_steps(workdir):
    raise _not_committed(workdir, step)
  atomic.read_manifest(_folder(workdir) / str(step), only='params/')
  with ocp.StandardCheckpointer() as checkpointer:
    path = _folder(workdir) / str(step) / 'params'
    return distributed.locally(checkpointer.restore(path, like), sharding)


def read_record(workdir, step):
  """Returns the {name: bytes} that a committed checkpoint was saved with.

  Raises:
    Damaged: One of them is missing or is not what was saved.
    BadInput: There is no such checkpoint.
  """
  folder = _folder(workdir) / str(step)
  manifest = atomic.read_manifest(folder, only=f'{_RECORD}/')
  if manifest is None:
    raise _not_committed(workdir, step)
  names = [n for n in manifest['files'] if n.startswith(f'{_RECORD}/')]
  return {
    name.removeprefix(f'{_RECORD}/'): (folder / name).read_bytes()
    for name in names
  }


def fetch(workdir, *, every=False, wanted=lambda step: True):
  """Copies checkpoints in from the run's `--remote_dir`, if it has one.

  Args:
    workdir: Folder of the run.
    every: For the process that writes them: all of them, and what it committed
      without coming so far as to copy it is copied out. Else the newest.
    wanted: (step) -> whether it may be that one.

  Returns:
    Whether there is a newer one now than there was here.

  Raises:
    BadInput: Those there are of another run.
  """
  if not remote.is_connected(workdir):
    return False
  folder, before = _folder(workdir), committed_steps(workdir)
  there, taken = remote.numbers(folder), []
  if before and there:
    _check_same(folder / str(before[-1]), folder / str(there[-1]))
  for step in reversed(there):
    if wanted(step) and remote.pull(folder / str(step)):
      taken.append(step)
      if not every:
        break
  newest = max(taken, default=-1)
  for step in before:
    if step < newest and step not in there:
      _delete(folder / str(step))
  if every:
    _copy_out(folder, committed_steps(workdir), there, taken)
  return newest > max(before, default=-1)


def _copy_out(folder, here, there, same):
  """Makes the copies what is here, but for the steps that are the same."""
  for step in set(here) - set(same):
    remote.push(folder / str(step))
  for step in set(there) - set(here):
    if remote.read(folder / str(step) / atomic.MANIFEST) is None:
      # Half copied, or half removed.
      remote.remove(folder / str(step))


def _delete(folder):
  # First the manifest: what is half deleted is not there, not damaged.
  atomic.unseal(folder)
  # Not by Orbax, which goes on where it could not remove a file.
  atomic.remove_folder(folder)


def _check_same(here, there):
  """Raises `BadInput` if a checkpoint, and the copy of one, are of two runs."""
  ours = atomic.read_json(here / atomic.MANIFEST).get('run')
  theirs = json.loads(remote.read(there / atomic.MANIFEST) or '{}')
  if theirs.get('run', ours) != ours:
    raise errors.BadInput(
      '--remote_dir must be of the run in --workdir; found checkpoints of run '
      f'{theirs["run"]} there and of run {ours} here; name another of the two.'
    )


def identity(workdir, step):
  """Returns what tells a committed checkpoint from all others; None: gone."""
  path = _folder(workdir) / str(step) / atomic.MANIFEST
  return atomic.file_hash(path) if path.is_file() else None


def record_folder(workdir, step):
  """Returns the folder that holds the files of `read_record`."""
  return _folder(workdir) / str(step) / _RECORD


def are_in(workdir):
  """Returns whether a run began to save in a folder."""
  return _folder(workdir).is_dir()


def committed_steps(workdir):
  """Returns the steps that have a whole checkpoint, in order."""
  folder = _folder(workdir)
  return [n for n in _orbax_steps(folder) if atomic.is_sealed(folder / str(n))]


def newest_whole(workdir):
  """Returns (step, manifest) of the newest checkpoint that is not damaged.

  Those that are damaged are set aside, and a line says what was lost.

  Returns:
    (None, None) if no checkpoint was ever committed.

  Raises:
    Damaged: Checkpoints were committed, and none of them is whole.
  """
  committed = committed_steps(workdir)
  for step in reversed(committed):
    path = _folder(workdir) / str(step)
    try:
      return step, atomic.read_manifest(path)
    except errors.Damaged as damaged:
      # Orbax takes each name in its own folder for a step.
      aside = atomic.set_aside(path, f'{workdir}/{DAMAGED}-{step}')
      logs.say(f'{damaged} The checkpoint of step {step} is now {aside}.')
      damaged_ones = damaged
  if committed:
    raise errors.Damaged(
      f'a run must have a whole checkpoint to go on from; all {len(committed)} '
      f'of {workdir} are damaged ({damaged_ones}); give back a copy, or name '
      'another --workdir to begin anew.'
    )
  return None, None


def remove_uncommitted(workdir):
  """Deletes what a killed process began to save."""
  folder = _folder(workdir)
  for step in set(_orbax_steps(folder)) - set(committed_steps(workdir)):
    logs.say(f'removed what was left of an uncommitted save of step {step}')
    atomic.remove_folder(folder / str(step))


def _orbax_steps(folder):
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def _not_committed(workdir, step):
  return errors.BadInput(
    'a checkpoint that is read must be committed; found steps '
    f'{committed_steps(workdir)} in {workdir}, not {step}; choose one of them.'
  )


def _failed(step, why):
  return errors.SaveFailed(
    f'the checkpoint of step {step} could not be written ({why}); those before '
    f'it are whole: {faults.cure(why)}, and give the same command.'
  )


def choose(workdir, which):
  """Returns the step that `--checkpoint` names: 'last', 'best' or a number."""
  committed = committed_steps(workdir)
  if not committed:
    raise errors.BadInput(
      f'a run must have a checkpoint for this; found none in {workdir}; train '
      'first, or check --workdir.'
    )
  if which == 'last':
    return committed[-1]
  if which == 'best':
    if not logs.dev_measures(workdir):
      logs.say('the run has no dev metrics: its best checkpoint is the last')
    return best(workdir, committed)
  if which in map(str, committed):
    return int(which)
  raise errors.BadInput(
    '--checkpoint must be last, best or the step of a checkpoint; found '
    f'{which[:20]!r} where there are {committed}; set it to one of them.'
  )


def read_chosen(workdir, which, read):
  """Returns (step, `read(step)`) for the step that `--checkpoint` names.

  A run that trains meanwhile may delete it before it is read; then `which` is
  looked up again.
  """
  while True:
    step = choose(workdir, which)
    try:
      return step, read(step)
    except (OSError, ValueError) as error:
      if step in committed_steps(workdir):
        if isinstance(error, errors.Damaged):
          raise errors.Damaged(
            f'{error} Give back a copy, or choose another --checkpoint of '
            f'{committed_steps(workdir)}.'
          ) from error
        raise
      logs.say(f'the checkpoint of step {step} is gone: another one is taken')


def best(workdir, committed):
  """Returns the step of `committed` that is best on dev, else the last.

  By the first measure of dev's protocol.
  """
  scores = logs.series(workdir, next(iter(logs.dev_measures(workdir)), ''))
  return max(committed, key=lambda step: (scores.get(step, -1.0), step))


def weights_hash(params):
  """Returns the SHA-256 of parameters and their names, in hexadecimal."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf))
  return digest.hexdigest()


def _folder(workdir):
  return pathlib.Path(workdir).absolute() / 'checkpoints'
