"""A training step against sentence-transformers: same model, texts and cores.

    python experiments/benchmarks/train_step.py data/insuranceqa

In-batch negatives, texts as they are in a dataset of BEIR's layout, float32,
dropout 0.1, AdamW and clipping, all-MiniLM-L6-v2. The peer is
MultipleNegativesRankingLoss with torch's AdamW, and pads as its collator does:
each column to its longest text. Both get token ids; ours are packed in the time
that is measured. With dropout off both begin at the same loss. Tokens a second
are real ones.
"""

import argparse
import dataclasses

import numpy as np
import sentence_transformers
from sentence_transformers import losses
import side_by_side
import torch

from ance_jax import config
from ance_jax.core import devices
from ance_jax.data import tokens
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import optimizers
from ance_jax.training import steps

# Batches that the runs go through, again and again; a run takes some of them.
BATCHES, STEPS = 40, 4


def read_pairs(path, split, number):
  """Returns (queries, passages), texts of pairs drawn from a split."""
  settings = config.Config(dataset='beir', data_dir=path)
  corpus, splits = experiment.load_texts(settings, (split,))
  rows, passages = splits[split].positives()
  chosen = np.random.default_rng(0).permutation(len(rows))
  chosen = np.resize(chosen, number)
  queries = [splits[split].texts[int(rows[i])] for i in chosen]
  texts = list(tokens.passage_texts(corpus, ' '))
  return queries, [texts[int(passages[i])] for i in chosen]


def make_ours(settings, pairs):
  """Returns (function of a number of batches, loss without dropout, share).

  The share is of real tokens among those that are computed.
  """
  model = experiment.load_model(settings, ())
  here, method = devices.local(1), methods.METHODS['in_batch']
  optimizer = optimizers.make(settings)
  pairs = side_by_side.Pairs(
    *(
      tokens.memory_rows(model.tokenizer, texts, length)
      for texts, length in zip(
        pairs, (settings.query_length, settings.passage_length), strict=True
      )
    ),
    settings.batch_size,
  )
  print(f'rows a step: {pairs.shapes.allowed}')

  def batch_of(number):
    return devices.shard(pairs.batch(number), here)

  def make(settings):
    return steps.make_train_step(
      settings, method, model.config, optimizer, here
    )

  def new_state():
    # Each state has parameters of its own: a step gives their memory away.
    params = experiment.load_model(settings, ()).params
    return steps.init_state(params, params, optimizer, here)

  without = make(dataclasses.replace(settings, dropout_rate=0.0))
  _, first = without(new_state(), batch_of(0), None)
  train_step, state, seen = make(settings), [new_state()], []

  def ours(numbers):
    for number in numbers:
      state[0], metrics = train_step(state[0], batch_of(number), None)
      seen.append(metrics['real_tokens'])
    state[0].step.block_until_ready()

  ours(range(BATCHES))  # Compiles all shapes.
  share = float(np.mean([float(one) for one in seen]))
  return ours, float(first['loss']), share


def make_theirs(settings, pairs):
  """Returns the same of the peer, and the real tokens of each batch."""
  peer = sentence_transformers.SentenceTransformer(
    settings.init_from, device='cpu'
  )
  loss = losses.MultipleNegativesRankingLoss(peer)
  size, made, real, computed = settings.batch_size, [], [], 0
  for number in range(BATCHES):
    columns, tokens_here = [], 0
    for texts, length in zip(
      pairs, (settings.query_length, settings.passage_length), strict=True
    ):
      peer.max_seq_length = length
      found = peer.preprocess(texts[number * size : (number + 1) * size])
      columns.append(found)
      tokens_here += int(found['attention_mask'].sum())
      computed += found['attention_mask'].numel()
    made.append(columns)
    real.append(tokens_here)
  optimizer = torch.optim.AdamW(
    peer.parameters(), lr=settings.learning_rate, weight_decay=0.01
  )
  peer.eval()
  with torch.no_grad():
    value = float(loss([dict(f) for f in made[0]], None))
  peer.train()

  def theirs(numbers):
    for number in numbers:
      optimizer.zero_grad()
      loss([dict(f) for f in made[number]], None).backward()
      torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
      optimizer.step()

  theirs(range(2))
  return theirs, value, sum(real) / computed, real


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('data_dir')
  parser.add_argument('--split', default='train')
  parser.add_argument('--lengths', type=int, nargs=2, default=(64, 256))
  parser.add_argument('--pairs', type=int, default=32)
  parser.add_argument('--rounds', type=int, default=8)
  given = parser.parse_args()
  settings = config.Config(
    init_from=side_by_side.minilm(),
    method='in_batch',
    query_length=given.lengths[0],
    passage_length=given.lengths[1],
    temperature=0.05,
    batch_size=given.pairs,
    optimizer='adamw',
    learning_rate=2e-5,
    weight_decay=0.01,
    lr_warmup_steps=0,
    max_steps=1000,
  )
  pairs = read_pairs(given.data_dir, given.split, BATCHES * given.pairs)
  ours, our_loss, our_share = make_ours(settings, pairs)
  theirs, their_loss, their_share, real = make_theirs(settings, pairs)
  print(f'loss without dropout: {our_loss:.6f} and {their_loss:.6f}')
  assert abs(our_loss - their_loss) < 1e-4
  print(f'real tokens: {our_share:.1%} and {their_share:.1%} of the computed')
  turns = {'ours': 0, 'theirs': 0}

  def run(which, function):
    start = turns[which] % BATCHES
    turns[which] += STEPS
    function(range(start, start + STEPS))

  side_by_side.compare(
    f'training step, {given.pairs} pairs of at most {given.lengths[0]} + '
    f'{given.lengths[1]} tokens of {given.data_dir}',
    lambda: run('ours', ours),
    lambda: run('theirs', theirs),
    units=STEPS * sum(real) / BATCHES,
    unit='real tokens',
    rounds=given.rounds,
  )


if __name__ == '__main__':
  main()
