"""Orbax: one Composite checkpoint a save.

Items: `params`, read alone for the handoff to a refresh, `opt_state`, and
`meta`. Orbax makes a step visible whole or not at all.
"""

import hashlib
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from ance_jax import config as config_lib
from ance_jax import devices as devices_lib
from ance_jax import logs


class Checkpoints:
  """Writes the checkpoints of a run, in the background."""

  def __init__(self, workdir):
    self._manager = ocp.CheckpointManager(
      _folder(workdir),
      options=ocp.CheckpointManagerOptions(cleanup_tmp_directories=True),
    )

  def save(self, state, step):
    """Begins to save a `steps.State`; `wait` makes sure that it is there.

    Raises:
      RuntimeError: Orbax did not take it, or an earlier one failed.
    """
    self._manager.wait_until_finished()
    saved = self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        opt_state=ocp.args.StandardSave(state.opt_state),
        meta=ocp.args.JsonSave({'step': step}),
      ),
    )
    if not saved:
      raise RuntimeError(
        f'Orbax refused to save the checkpoint of step {step}.'
      )

  def wait(self):
    """Returns once all that was saved is committed."""
    self._manager.wait_until_finished()

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
    for step in set(self._manager.all_steps()) - set(wanted):
      self._manager.delete(step)

  def close(self):
    """Waits, and lets go of the folder."""
    self._manager.close()


def read_params(workdir, step, shapes, devices):
  """Returns the params item of a committed checkpoint, on all devices.

  Args:
    workdir: Folder of the run.
    step: int, the checkpoint's.
    shapes: The tree of parameters, with a shape and dtype for each.
    devices: Where they go.
  """
  sharding = devices_lib.replicated(devices)
  like = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
  )
  committed = committed_steps(workdir)
  if step not in committed:
    raise config_lib.BadInput(
      f'a checkpoint that is read must be committed; found steps {committed} '
      f'in {workdir}, not {step}; choose one of them.'
    )
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(_folder(workdir) / str(step) / 'params', like)


def committed_steps(workdir):
  """Returns the steps that have a whole checkpoint, in order."""
  folder = _folder(workdir)
  return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def choose(workdir, which):
  """Returns the step that `--checkpoint` names: 'last', 'best' or a number."""
  committed = committed_steps(workdir)
  if not committed:
    raise config_lib.BadInput(
      f'a run must have a checkpoint for this; found none in {workdir}; train '
      'first, or check --workdir.'
    )
  if which == 'last':
    return committed[-1]
  if which == 'best':
    return best(workdir, committed)
  if which.isdecimal() and int(which) in committed:
    return int(which)
  raise config_lib.BadInput(
    '--checkpoint must be last, best or the step of a checkpoint; found '
    f'{which!r} where there are {committed}; set it to one of them.'
  )


def best(workdir, committed):
  """Returns the step of `committed` with the best dev MRR@10, else the last."""
  scores = logs.series(workdir, 'dev/mrr@10')
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
