"""Encoding against sentence-transformers: same model, texts, cores, precision.

    python experiments/benchmarks/encode.py

Text in, embeddings out, tokenizing included; 300 passages of pydocs, 256
tokens at most, float32.
"""

import numpy as np
import sentence_transformers
import side_by_side

from ance_jax import config
from ance_jax.core import devices
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.models import bi_encoder
from ance_jax.retrieval import encoding
from ance_jax.training import experiment

NUM_PASSAGES, PEER_BATCH = 300, 32


def peer_computes(texts, lengths):
  """Returns the tokens that the peer computes: sorted by characters, padded."""
  order = np.argsort([-len(text) for text in texts], kind='stable')
  batches = np.split(lengths[order], range(PEER_BATCH, len(texts), PEER_BATCH))
  return sum(batch.max() * len(batch) for batch in batches)


def main():
  corpus = side_by_side.pydocs().corpus
  rows = np.random.default_rng(0).choice(len(corpus.texts), NUM_PASSAGES, False)
  passages = list(tokens.passage_texts(corpus, tokenizer_lib.SPACE))
  texts = [passages[row] for row in rows]
  model = experiment.load_model(
    config.Config(init_from=side_by_side.minilm()), ()
  )
  encoder = encoding.make_encoder(
    model.config,
    bi_encoder.PASSAGE,
    dtype='float32',
    tokens_per_batch=4096,
    devices=devices.local(1),
  )
  peer = sentence_transformers.SentenceTransformer(
    side_by_side.minilm(), device='cpu'
  )
  length = model.config.passage_length

  def ours():
    token_rows = tokens.memory_rows(model.tokenizer, texts, length)
    return encoding.encode_rows(encoder, model.params, token_rows, 'encode')

  def theirs():
    return peer.encode(texts, batch_size=PEER_BATCH, show_progress_bar=False)

  embeddings, computed = ours()
  difference = np.abs(embeddings - theirs()).max()
  lengths = tokens.memory_rows(model.tokenizer, texts, length).lengths()
  print(f'largest difference of an entry: {difference:.1e}')
  for name, number in (
    ('ance_jax', computed),
    ('sentence-transformers', peer_computes(texts, lengths)),
  ):
    print(f'padding in what {name} computes: {1 - lengths.sum() / number:.1%}')
  assert difference < 1e-5
  side_by_side.compare(
    f'encode {NUM_PASSAGES} passages, {lengths.sum():,} tokens',
    ours,
    theirs,
    units=NUM_PASSAGES,
    unit='passages',
  )


if __name__ == '__main__':
  main()
