"""A training step against sentence-transformers: same model, batch and cores.

    python experiments/benchmarks/train_step.py

In-batch negatives, 32 pairs of pydocs, 32 and 128 tokens, dropout 0.1, float32,
AdamW and clipping, tokens given; the peer is MultipleNegativesRankingLoss with
torch's AdamW. With dropout off both begin at the same loss.
"""

import dataclasses

import numpy as np
import sentence_transformers
from sentence_transformers import losses
import side_by_side
import torch

from ance_jax import config
from ance_jax.core import devices
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import optimizers
from ance_jax.training import steps

PAIRS, QUERY_LENGTH, PASSAGE_LENGTH, STEPS = 32, 32, 128, 3
SETTINGS = config.Config(
  init_from=side_by_side.minilm(),
  method='in_batch',
  query_length=QUERY_LENGTH,
  passage_length=PASSAGE_LENGTH,
  temperature=0.05,
  batch_size=PAIRS,
  optimizer='adamw',
  learning_rate=2e-5,
  weight_decay=0.01,
  lr_warmup_steps=0,
  max_steps=1000,
)


def read_pairs():
  """Returns queries and passages of pairs that have no text in common."""
  dataset = side_by_side.pydocs()
  split, corpus = dataset.splits['train'], dataset.corpus
  rows, passages = split.positives()
  _, first = np.unique(corpus.groups[passages], return_index=True)
  chosen = np.random.default_rng(0).permutation(first)
  long = [
    i for i in chosen if len(corpus.texts[int(passages[i])].split()) > 150
  ]
  queries = [split.texts[int(rows[i])] for i in long[:PAIRS]]
  return queries, [corpus.texts[int(passages[i])] for i in long[:PAIRS]]


def make_ours(queries, passages):
  """Returns (step function, loss without dropout)."""
  model = experiment.load_model(SETTINGS, ())
  here = devices.local(1)
  optimizer = optimizers.make(SETTINGS)
  batch = side_by_side.in_batch(
    model.tokenizer, queries, passages, (QUERY_LENGTH, PASSAGE_LENGTH)
  )
  real = batch.query_lengths.sum() + batch.passage_lengths.sum()
  size = batch.query_ids.size + batch.passage_ids.size
  print(f'padding: {1 - real / size:.1%}')
  batch = devices.shard(batch, here)

  def make(settings):
    return steps.make_train_step(
      settings, methods.METHODS['in_batch'], model.config, optimizer, here
    )

  def new_state():
    # Each state has parameters of its own: a step gives their memory away.
    params = experiment.load_model(SETTINGS, ()).params
    return steps.init_state(params, params, optimizer, here)

  without = make(dataclasses.replace(SETTINGS, dropout_rate=0.0))
  _, metrics = without(new_state(), batch, None)
  train_step, state = make(SETTINGS), [new_state()]

  def ours():
    for _ in range(STEPS):
      state[0], _ = train_step(state[0], batch, None)
    state[0].step.block_until_ready()

  return ours, float(metrics['loss'])


def make_theirs(queries, passages):
  """Returns (step function, loss without dropout)."""
  peer = sentence_transformers.SentenceTransformer(
    side_by_side.minilm(), device='cpu'
  )
  loss = losses.MultipleNegativesRankingLoss(peer)
  features = []
  for texts, length in ((queries, QUERY_LENGTH), (passages, PASSAGE_LENGTH)):
    peer.max_seq_length = length
    features.append(peer.preprocess(texts))
  optimizer = torch.optim.AdamW(
    peer.parameters(), lr=SETTINGS.learning_rate, weight_decay=0.01
  )
  peer.eval()
  with torch.no_grad():
    value = float(loss([dict(f) for f in features], None))
  peer.train()

  def theirs():
    for _ in range(STEPS):
      optimizer.zero_grad()
      loss([dict(f) for f in features], None).backward()
      torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
      optimizer.step()

  return theirs, value


def main():
  pairs = read_pairs()
  ours, our_loss = make_ours(*pairs)
  theirs, their_loss = make_theirs(*pairs)
  print(f'loss without dropout: {our_loss:.6f} and {their_loss:.6f}')
  assert abs(our_loss - their_loss) < 1e-4
  side_by_side.compare(
    f'training step, {PAIRS} pairs of {QUERY_LENGTH} + {PASSAGE_LENGTH} tokens',
    ours,
    theirs,
    units=STEPS,
    unit='steps',
  )


if __name__ == '__main__':
  main()
