"""Checkpoints: one Orbax Composite per save, with a manifest.

The items are `params`, which a refresh reads alone, `opt_state` and `meta`. The
folder `record/` holds the small files that a run also needs to resume. Orbax
makes a step visible atomically but neither syncs nor hashes it, so a manifest
does. A step without a manifest counts as missing.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from concurrent import futures
import contextlib
import hashlib
import json
import pathlib
from typing import Any

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
# Of the items of a checkpoint; in its manifest, which had none at first. In 1
# the optimizer's state was one for all parameters; since 2 it is by tree. Since
# 3 the record has the operations of all steps.
FORMAT = 3
_RECORD = 'record'


class Checkpoints:
  """Writes the checkpoints of a run in the background.

  Only one object may write to a folder; the constructor removes uncommitted
  saves of an earlier one.
  """

  def __init__(self, workdir: str | pathlib.Path):
    folder = _folder(workdir)
    if distributed.is_first():
      atomic.make_folder(folder)
      for step in set(_orbax_steps(folder)) - set(committed_steps(workdir)):
        logs.log(f'removed what was left of an uncommitted save of step {step}')
        atomic.remove_folder(folder / str(step))
    distributed.barrier('checkpoints')
    self._workdir = workdir
    self._background = futures.ThreadPoolExecutor(1)
    self._saving, self._removing = None, []
    self._manager = ocp.CheckpointManager(
      folder,
      options=ocp.CheckpointManagerOptions(cleanup_tmp_directories=True),
    )

  def save(
    self,
    state: Any,
    step: int,
    record: dict[str, bytes] | None = None,
    about: dict[str, Any] | None = None,
  ) -> None:
    """Starts to save a `steps.State`; call `wait` to be sure it is committed.

    Args:
      state: The state, on all devices of all processes; it may be donated once
        this returns.
      step: The step of the state.
      record: {relative path: content} of the files for `read_record`.
      about: Items for the manifest.

    Raises:
      SaveFailed: This or an earlier save failed.
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
    about = {**(about or {}), 'step': step, 'format': FORMAT}
    self._saving = (
      step,
      self._background.submit(self._commit, step, record or {}, about),
    )

  def _commit(self, step, record, about):
    self._manager.wait_until_finished()
    if not distributed.is_first():
      return
    folder = _folder(self._workdir) / str(step)
    for name, content in record.items():
      path = folder / _RECORD / name
      atomic.make_folder(path.parent)
      path.write_bytes(content)
    atomic.commit(folder, about)
    remote.push(folder)

  def check(self) -> None:
    """Raises `SaveFailed` if the save in progress has already failed."""
    saving = self._saving[1] if self._saving else None
    if saving and saving.done() and saving.exception():
      self.wait()

  def wait(self) -> None:
    """Waits until everything saved is committed.

    Raises:
      SaveFailed: A save failed.
    """
    if self._saving:
      (step, saving), self._saving = self._saving, None
      try:
        saving.result()
        while self._removing:
          self._removing.pop().result()
      except Exception as error:
        # Orbax raises its error once per thread; here it would mask ours.
        with contextlib.suppress(Exception):
          self._manager.wait_until_finished()
        raise _failed(step, error) from error
      # Process 0 commits after the other processes have finished.
      distributed.barrier('committed')

  def restore(self, step: int, like: Any) -> Any:
    """Returns the `steps.State` of a step, with the shardings of `like`."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(like.params),
        opt_state=ocp.args.StandardRestore(like.opt_state),
        meta=ocp.args.JsonRestore(),
      ),
    )
    return like._replace(
      step=jax.device_put(np.int32(restored.meta['step']), like.step.sharding),
      params=restored.params,
      opt_state=restored.opt_state,
    )

  def keep(self, wanted: Iterable[int]) -> None:
    """Deletes all checkpoints except those of the steps `wanted`."""
    folder = _folder(self._workdir)
    for step in set(_orbax_steps(folder)) - set(wanted):
      if remote.is_connected(self._workdir):
        # In the background, so that training does not wait for the network.
        self._removing.append(
          self._background.submit(remote.remove, folder / str(step))
        )
      _delete(folder / str(step))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self) -> None:
    """Waits for the last save and releases the folder."""
    try:
      self.wait()
    finally:
      self._background.shutdown()
      self._manager.close()


def read_params(
  workdir: str | pathlib.Path,
  step: int,
  shapes: Any,
  devices: Sequence[jax.Device],
) -> Any:
  """Returns the parameters of a committed checkpoint, on each local device.

  Args:
    workdir: Run folder.
    step: Step of the checkpoint.
    shapes: Tree of parameters, each with a shape and a dtype.
    devices: Devices of all processes; the returned arrays are on this
      process's.
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
    return distributed.to_local(checkpointer.restore(path, like), sharding)


def read_record(workdir: str | pathlib.Path, step: int) -> dict[str, bytes]:
  """Returns the `record` files that a committed checkpoint was saved with.

  Raises:
    Damaged: A file is missing or differs from the saved one.
    BadInput: There is no such checkpoint.
  """
  folder = _folder(workdir) / str(step)
  manifest = atomic.read_manifest(folder, only=f'{_RECORD}/')
  if manifest is None:
    raise _not_committed(workdir, step)
  return {
    name.removeprefix(f'{_RECORD}/'): (folder / name).read_bytes()
    for name in manifest['files']
    if name.startswith(f'{_RECORD}/')
  }


def fetch(
  workdir: str | pathlib.Path,
  *,
  every: bool = False,
  wanted: Callable[[int], bool] = lambda step: True,
) -> bool:
  """Copies checkpoints in from the run's `--remote_dir`, if it has one.

  Args:
    workdir: Run folder.
    every: Copy all checkpoints, and copy out those that were committed here but
      not copied; for the process that writes them. False copies the newest
      only.
    wanted: Whether a step may be copied.

  Returns:
    Whether this brought a newer checkpoint.

  Raises:
    BadInput: The remote checkpoints belong to another run.
  """
  if not remote.is_connected(workdir):
    return False
  folder, before = _folder(workdir), committed_steps(workdir)
  there, taken = remote.numbers(folder), []
  if before and there:
    path = folder / str(before[-1]) / atomic.MANIFEST
    ours = atomic.read_json(path).get('run')
    content = remote.read(folder / str(there[-1]) / atomic.MANIFEST)
    theirs = json.loads(content or '{}').get('run', ours)
    if theirs != ours:
      raise errors.refusal(
        f'--remote_dir has checkpoints of run {theirs}, and --workdir of run '
        f'{ours}',
        'name another --remote_dir, or another --workdir',
      )
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
  """Makes the copies match the local steps; skips the steps in `same`."""
  for step in set(here) - set(same):
    remote.push(folder / str(step))
  for step in set(there) - set(here):
    if remote.read(folder / str(step) / atomic.MANIFEST) is None:
      # Half-copied or half-removed.
      remote.remove(folder / str(step))


def _delete(folder):
  # Manifest first, so that a half-deleted step counts as missing, not damaged.
  atomic.uncommit(folder)
  # Not with Orbax, which ignores files that it could not remove.
  atomic.remove_folder(folder)


def identity(workdir: str | pathlib.Path, step: int) -> str | None:
  """Returns a unique id of a committed checkpoint; None if it is gone."""
  path = _folder(workdir) / str(step) / atomic.MANIFEST
  return atomic.file_hash(path) if path.is_file() else None


def record_folder(workdir: str | pathlib.Path, step: int) -> pathlib.Path:
  """Returns the folder with the files of `read_record`."""
  return _folder(workdir) / str(step) / _RECORD


def are_in(workdir: str | pathlib.Path) -> bool:
  """Returns whether a run has started to save in a folder."""
  return _folder(workdir).is_dir()


def committed_steps(workdir: str | pathlib.Path) -> list[int]:
  """Returns the steps of all committed checkpoints, in order."""
  folder = _folder(workdir)
  return [
    n for n in _orbax_steps(folder) if atomic.is_committed(folder / str(n))
  ]


def newest_whole(
  workdir: str | pathlib.Path,
) -> tuple[int | None, dict[str, Any] | None]:
  """Returns (step, manifest) of the newest undamaged checkpoint.

  Damaged ones are renamed, and a log line says which.

  Returns:
    (None, None) if no checkpoint was ever committed.

  Raises:
    Damaged: Every committed checkpoint is damaged.
  """
  committed = committed_steps(workdir)
  for step in reversed(committed):
    path = _folder(workdir) / str(step)
    try:
      return step, atomic.read_manifest(path)
    except errors.Damaged as damaged:
      # Outside Orbax's folder, where it takes every name for a step.
      aside = atomic.set_aside(path, f'{workdir}/{DAMAGED}-{step}')
      logs.log(f'{damaged} The checkpoint of step {step} is now {aside}.')
      damaged_ones = damaged
  if committed:
    raise errors.Damaged(
      f'all {len(committed)} checkpoints in {workdir} are damaged '
      f'({damaged_ones}); restore a copy of one, or start a new run in another '
      '--workdir.'
    )
  return None, None


def _orbax_steps(folder):
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def _not_committed(workdir, step):
  fact = f'step {step} has no committed checkpoint in {workdir}'
  if steps := committed_steps(workdir):
    return errors.refusal(f'{fact}, unlike steps {steps}', 'choose one of them')
  return errors.refusal(f'{fact}, nor has any other', 'name another folder')


def _failed(step, why):
  return errors.SaveFailed(
    f'the checkpoint of step {step} could not be written ({why}); those before '
    f'it are whole: {faults.cure(why)}, and give the same command.'
  )


def choose(workdir: str | pathlib.Path, which: str) -> int:
  """Returns the step that `--checkpoint` names: 'last', 'best' or a number."""
  committed = committed_steps(workdir)
  if not committed:
    raise errors.refusal(
      f'there is no checkpoint in {workdir}', 'train first, or check --workdir'
    )
  if which == 'last':
    return committed[-1]
  if which == 'best':
    if not logs.dev_measures(workdir):
      logs.log('the run has no dev metrics: its best checkpoint is the last')
    return best(workdir, committed)
  if which in map(str, committed):
    return int(which)
  raise errors.refusal(
    f'--checkpoint={which[:20]} is not last, best or one of {committed}',
    'set it to one of them',
  )


def read_chosen(
  workdir: str | pathlib.Path, which: str, read: Callable[[int], Any]
) -> tuple[int, Any]:
  """Returns (step, `read(step)`) for the step that `--checkpoint` names.

  If a running training job deletes the checkpoint before it is read, `which` is
  resolved again.
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
      logs.log(f'the checkpoint of step {step} is gone: another one is taken')


def best(workdir: str | pathlib.Path, committed: Sequence[int]) -> int:
  """Returns the step of `committed` that is best on dev, else the last one.

  Best by the first measure of dev's protocol.
  """
  scores = logs.series(workdir, next(iter(logs.dev_measures(workdir)), ''))
  return max(committed, key=lambda step: (scores.get(step, -1.0), step))


def check_format(
  workdir: str | pathlib.Path, step: int, manifest: dict[str, Any]
) -> None:
  """Raises `BadInput` if training cannot go on from a checkpoint's format."""
  found = manifest.get('format', 1)
  if found != FORMAT:
    raise errors.refusal(
      f'the checkpoint of step {step} in {workdir} has format {found}, and '
      f'training resumes from format {FORMAT} alone',
      'evaluate or export it, or train a new --workdir from its weights with '
      f'--init_from={workdir}',
    )


def weights_hash(params: Any) -> str:
  """Returns the SHA-256 of parameters and their names, in hexadecimal."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf))
  return digest.hexdigest()


def _folder(workdir):
  return pathlib.Path(workdir).absolute() / 'checkpoints'
