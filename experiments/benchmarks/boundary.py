"""How long training stands still for a refresh, in step and beside it.

    python experiments/benchmarks/boundary.py [--large] [--steps=400] [--runs .]

A run on the passages of pydocs (an encoder of two layers from random weights;
--large: of BERT-base's sizes, in bfloat16), with a refresh every 50 steps, in
step and beside. A step's time is that from one look at the checkpoints to the
next; a boundary's pause is what the step after it took longer than the median.
Then the handoff of a state of BERT-base's size with LAMB's moments: how long
`save` holds up training, when it is committed, and what a refresher takes to
read the parameters.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from unittest import mock

import jax
import side_by_side

from ance_jax import config as config_lib
from ance_jax.core import checkpoint
from ance_jax.core import devices
from ance_jax.jobs import train
from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.training import optimizers
from ance_jax.training import steps
from ance_jax.training import trainer

SETTINGS = config_lib.Config(
  dataset='pydocs',
  method='ance_in_batch',
  warmup_method='in_batch',
  warmup_steps=50,
  steps_per_refresh=50,
  num_devices=1,
  num_layers=2,
  hidden_size=128,
  num_heads=4,
  intermediate_size=512,
  vocab_size=4000,
  pooling='mean',
  similarity='cosine',
  temperature=0.05,
  query_length=24,
  passage_length=64,
  batch_size=32,
  num_hard_negatives=1,
  top_k=50,
  learning_rate=1e-3,
  lr_warmup_steps=10,
)
LARGE = {
  'num_layers': 12,
  'hidden_size': 768,
  'num_heads': 12,
  'intermediate_size': 3072,
  'dtype': 'bfloat16',
  'query_length': 32,
  'passage_length': 128,
  'batch_size': 128,
  'tokens_per_batch': 131_072,
  'learning_rate': 2e-5,
}
BERT_BASE = bi_encoder.RetrieverConfig(
  bert.BodyConfig('bert', 30522, 768, 12, 12, 3072, 512, 2, 1e-12, 'gelu'),
  True, 'cls', 768, True, 'dot', 64, 512, ' ',
)  # fmt: skip
RUNS = {
  'sync': {},
  'async': {'refresh_mode': 'async'},
  'frozen': {'max_refreshes': 1},
}
# What training stands still for: methods of the loop, by what they do.
PARTS = {
  'save': 'save',
  'refresh_if_due': 'refresh',
  'pick_up_if_due': 'pick-up',
}


class Watch:
  """Seconds of each step, and of the parts of boundaries."""

  def __init__(self):
    self.moments, self.secs = [], collections.defaultdict(list)

  @contextlib.contextmanager
  def looking(self):
    """Watches the loop for a block."""
    with contextlib.ExitStack() as stack:
      real = checkpoint.Checkpoints.check

      def check(checkpoints):
        self.moments.append(time.perf_counter())
        return real(checkpoints)

      stack.enter_context(
        mock.patch.object(checkpoint.Checkpoints, 'check', check)
      )
      for name, what in PARTS.items():
        stack.enter_context(
          mock.patch.object(
            trainer.Trainer,
            name,
            self._timed(getattr(trainer.Trainer, name), what),
          )
        )
      yield

  def _timed(self, function, what):
    def timed(*args):
      start = time.perf_counter()
      try:
        return function(*args)
      finally:
        self.secs[what].append(time.perf_counter() - start)

    return timed


def train_once(folder, num_steps, **changes):
  """Returns {what: milliseconds or steps a second} of a run."""
  watch = Watch()
  config = dataclasses.replace(
    SETTINGS, workdir=folder, max_steps=num_steps, **changes
  )
  with watch.looking():
    train.run(config)
  # The first refresh compiles what the others run.
  since = 2 * config.steps_per_refresh
  gaps = [
    after - before
    for before, after in zip(watch.moments, watch.moments[1:], strict=False)
  ][since:]
  usual = statistics.median(gaps)
  longest = sorted((gap - usual for gap in gaps), reverse=True)
  boundaries = (num_steps - since) // config.steps_per_refresh
  return {
    'pause ms': 1e3 * statistics.median(longest[:boundaries]),
    **{
      f'{what} ms': 1e3 * statistics.median(sorted(secs)[-boundaries:])
      for what, secs in watch.secs.items()
    },
    'step ms': 1e3 * usual,
    'steps/s': len(gaps) / (watch.moments[-1] - watch.moments[since]),
  }


def handoff_cost():
  """Returns the seconds of a handoff of BERT-base's state, and its bytes."""
  here = devices.local(1)
  optimizer = optimizers.make(dataclasses.replace(SETTINGS, max_steps=100))
  state = steps.init_state(
    bi_encoder.init(BERT_BASE, 0), BERT_BASE.towers, optimizer, here
  )
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  secs = {'GB': size / 1e9}
  with tempfile.TemporaryDirectory() as folder:
    with checkpoint.Checkpoints(folder) as checkpoints:
      for step in (1, 2):  # The first one also opens what the next one uses.
        start = time.perf_counter()
        checkpoints.save(state, step)
        secs['save holds up s'] = time.perf_counter() - start
        checkpoints.wait()
        secs['committed after s'] = time.perf_counter() - start
    start = time.perf_counter()
    shapes = bi_encoder.shapes(BERT_BASE)
    params = checkpoint.read_params(folder, 2, shapes, here)
    jax.block_until_ready(params)
    secs['read by the refresher s'] = time.perf_counter() - start
    start = time.perf_counter()
    checkpoint.weights_hash(params)
    secs['hash of the weights s'] = time.perf_counter() - start
  return secs


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--steps', type=int, default=400)
  parser.add_argument('--large', action='store_true')
  names = [*RUNS, 'handoff']
  parser.add_argument('--runs', nargs='+', choices=names, default=names)
  given = parser.parse_args()
  sizes = LARGE if given.large else {}
  side_by_side.pydocs()
  found = {}
  for name in given.runs:
    if name == 'handoff':
      found[name] = handoff_cost()
    else:
      with tempfile.TemporaryDirectory() as folder:
        found[name] = train_once(folder, given.steps, **sizes, **RUNS[name])
    cells = (f'{what} {value:.2f}' for what, value in found[name].items())
    print(f'{name}: {", ".join(cells)}')
  print(json.dumps(found))


if __name__ == '__main__':
  main()
