"""The next step of a run that an earlier version wrote, to 1e-5."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import optax
import pytest

from ance_jax import config as config_lib
from ance_jax.core import devices as devices_lib
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import packing
from ance_jax.training import refreshes
from ance_jax.training import resume
from ance_jax.training import schedule
from ance_jax.training import steps

FOLDER = pathlib.Path(__file__).parents[1] / 'data' / 'run_of_0.1.0'


def test_the_next_step_is_the_one_that_it_would_have_made(tmp_path):
  """Its batch, loss and gradient, from its last checkpoint and refresh."""
  shutil.copytree(FOLDER / 'run', tmp_path / 'run')
  lines = (FOLDER / 'run' / 'run.flags').read_text().splitlines()
  config = dataclasses.replace(
    config_lib.Config.from_lines(lines, 'run.flags'),
    workdir=str(tmp_path / 'run'),
    data_dir=str(FOLDER / 'data'),
  )
  splits = config.train_split, config.dev_split
  run, step = experiment.open(config, splits)
  active = resume.active_at(run, step)
  method = schedule.method(config, active, step)
  data = experiment.training_data(run, method)
  number = schedule.num_negatives(config, method)
  drawn = batches.draw_rows(
    data,
    step,
    seed=config.seed,
    batch_size=config.batch_size,
    num_negatives=number,
    negatives=refreshes.negatives_for(run, method, active),
  )
  form = packing.Form(
    data.row_lengths,
    batches.num_texts(data, config.batch_size, number),
    len(run.devices),
    1,
  )
  shapes = packing.choose([batches.assigned(data, drawn)], form)
  batch = batches.make_batch(data, drawn, shapes=shapes)
  gradient = jax.pmap(
    steps.make_gradient(config, method, run.retriever.config),
    axis_name=devices_lib.AXIS,
    in_axes=(None, 0, None),
    out_axes=None,
    devices=run.devices,
  )
  batch = devices_lib.shard(batch, run.devices)
  (loss, _), grads = gradient(run.retriever.params, batch, jnp.int32(step))
  found = {
    'train/loss': loss,
    'train/grad_norm': optax.tree.norm(grads),
  }
  expected = json.loads((FOLDER / 'expected.json').read_text())['next step']
  del expected['train/real_tokens']  # Its texts were padded, one a row.
  assert expected.keys() == found.keys()
  for name, value in expected.items():
    assert float(found[name]) == pytest.approx(value, rel=1e-5), name
