"""One GPU against torch: BERT-base in bfloat16, share of the matrix peak.

    python experiments/benchmarks/accelerator.py

An encoder of BERT-base's sizes from random weights and a vocabulary trained on
pydocs, mean pooling. First float32 must agree with torch on the CPU, in
embeddings and in the gradient of a training step. The peak is what a product of
two matrices of 8,192 rows and columns reaches. Encoding is of batches of random
tokens, and of texts as they are (tokenizing included); a training step is one
of in-batch negatives with dropout, AdamW and clipping. The peer is
sentence-transformers with sdpa attention, and its body alone for the batches.
"""

import dataclasses
import json
import os
import statistics
import tempfile
import time

# Torch wants some of the memory, too.
os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp
import numpy as np
import sentence_transformers
from sentence_transformers import losses
import side_by_side
import torch
import transformers

from ance_jax import config
from ance_jax.core import devices
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.models import bi_encoder
from ance_jax.retrieval import encoding
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import optimizers
from ance_jax.training import steps

LENGTHS, TOKENS_PER_BATCH, ROUNDS = (64, 128, 256, 512), 131_072, 5
NUM_TEXTS, PASSAGE_LENGTH, PEER_BATCH = 40_000, 256, 512
PAIRS, QUERY_LENGTH = 128, 32
SETTINGS = config.Config(
  method='in_batch',
  pooling='mean',
  query_length=QUERY_LENGTH,
  passage_length=PASSAGE_LENGTH,
  temperature=0.05,
  similarity='cosine',
  batch_size=PAIRS,
  optimizer='adamw',
  learning_rate=2e-5,
  weight_decay=0.01,
  lr_warmup_steps=0,
  max_steps=1000,
)
GPU = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def make_model(texts, folder):
  """Writes a BERT-base of random weights and its tokenizer."""
  tokenizer = tokenizer_lib.train_vocabulary(texts, 30_522)
  tokenizer.model_max_length = 512
  tokenizer.save_pretrained(folder)
  torch.manual_seed(0)
  sizes = transformers.BertConfig(vocab_size=len(tokenizer))
  transformers.BertModel(sizes).save_pretrained(folder)


def read_texts():
  """Returns `NUM_TEXTS` passages of pydocs, some of them more than once."""
  corpus = side_by_side.pydocs().corpus
  rows = np.random.default_rng(0).permutation(len(corpus.texts))
  passages = list(tokens.passage_texts(corpus, tokenizer_lib.SPACE))
  return [passages[row] for row in np.resize(rows, NUM_TEXTS)]


def load_peer(folder, device):
  """Returns the sentence-transformers model, in float32."""
  return sentence_transformers.SentenceTransformer(
    folder,
    device=str(device),
    model_kwargs={'attn_implementation': 'sdpa', 'dtype': torch.float32},
  )


def wait_for_torch():
  """Returns when torch's work is done."""
  if GPU.type == 'cuda':
    torch.cuda.synchronize()


def random_ids(random, rows, length, vocab_size):
  """Returns ids and lengths of texts of `length` tokens or up to 7 less."""
  ids = random.integers(5, vocab_size, (rows, length)).astype(np.int32)
  lengths = random.integers(length - 7, length + 1, rows).astype(np.int32)
  ids[np.arange(length) >= lengths[:, None]] = 0
  return ids, lengths


def flop(body, tokens, length):
  """Returns operations of encoding so many tokens, in texts of one length."""
  width, inner = body.hidden_size, body.intermediate_size
  a_token = 2 * (4 * width**2 + 2 * width * inner) + 4 * length * width
  return body.num_layers * a_token * tokens


def secs_each(functions, rounds=ROUNDS):
  """Returns the median seconds of a call of each, called in turn."""
  secs = [[] for _ in functions]
  for number in range(rounds + 2):
    for function, found in zip(functions, secs, strict=True):
      start = time.perf_counter()
      function()
      if number > 1:
        found.append(time.perf_counter() - start)
  return [statistics.median(found) for found in secs]


def matrix_peak(size=8192, times=20):
  """Returns operations a second of bfloat16 products, by jax and by torch."""
  matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  product = jax.jit(jnp.matmul)
  theirs = torch.randn(size, size, device=GPU, dtype=torch.bfloat16)

  def by_jax():
    for _ in range(times):
      out = product(matrix, matrix)
    out.block_until_ready()

  def by_torch():
    for _ in range(times):
      theirs @ theirs
    wait_for_torch()

  return [times * 2 * size**3 / s for s in secs_each([by_jax, by_torch])]


def training_batch(model, texts, pairs):
  """Returns a batch of so many pairs of texts."""
  queries, passages = (
    tokens.memory_rows(model.tokenizer, some, length)
    for some, length in (
      ([text[:150] for text in texts[:pairs]], QUERY_LENGTH),
      (texts[pairs : 2 * pairs], PASSAGE_LENGTH),
    )
  )
  return side_by_side.Pairs(queries, passages, pairs).batch(0)


def check(model, peer, texts):
  """Holds float32 against torch on the CPU: embeddings, and a gradient."""
  few = texts[:32]
  encoder = encoding.make_encoder(
    model.config,
    bi_encoder.PASSAGE,
    dtype='float32',
    tokens_per_batch=4096,
    devices=devices.local(1),
  )
  rows = tokens.memory_rows(model.tokenizer, few, PASSAGE_LENGTH)
  ours, _ = encoding.encode_rows(encoder, model.params, rows, 'encode')
  peer.max_seq_length = PASSAGE_LENGTH
  theirs = peer.encode(few, normalize_embeddings=True, show_progress_bar=False)
  difference = np.abs(ours - theirs).max()
  print(f'float32: largest difference of an entry: {difference:.1e}')
  assert difference < 1e-5
  gradients = []
  for here in (devices.local(1), tuple(jax.devices('cpu')[:1])):
    gradient = jax.pmap(
      steps.make_gradient(SETTINGS, methods.METHODS['in_batch'], model.config),
      axis_name=devices.AXIS,
      in_axes=(None, 0, None),
      out_axes=None,
      devices=here,
    )
    batch = devices.shard(training_batch(model, texts, 16), here)
    params = devices.replicate(jax.device_get(model.params), here)
    (loss, _), grads = gradient(params, batch, np.int32(0))
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(grads)]
    gradients.append(np.concatenate(leaves))
    print(f'float32: loss of a step on {here[0].device_kind}: {loss:.6f}')
  first, second = gradients
  error = np.linalg.norm(first - second) / np.linalg.norm(second)
  print(f'float32: relative difference of the gradients: {error:.1e}')
  assert error < 1e-4


def encode_batches(model, peer, peak):
  """Prints tokens a second and shares of the peak, by the length of texts."""
  random, body = np.random.default_rng(0), model.config.body
  encode_them = jax.jit(
    bi_encoder.make_encode(model.config, 'bfloat16', bi_encoder.PASSAGE)
  )
  theirs = peer[0].auto_model
  print(f'\n{"length":>6}{"ance_jax":>14}{"share":>7}{"torch":>14}{"share":>7}')
  shares = {}
  for length in LENGTHS:
    size = TOKENS_PER_BATCH // length
    ids, lengths = random_ids(random, size, length, body.vocab_size)
    ours_in = jax.device_put((ids, lengths))
    mask = torch.tensor(ids > 0, device=GPU)
    theirs_in = torch.tensor(ids, device=GPU).long()

    def by_jax(ours_in=ours_in):
      for _ in range(4):
        out = encode_them(model.params, *ours_in)
      out.block_until_ready()

    @torch.inference_mode()
    def by_torch(theirs_in=theirs_in, mask=mask):
      for _ in range(4):
        theirs(input_ids=theirs_in, attention_mask=mask)
      wait_for_torch()

    secs = secs_each([by_jax, by_torch])
    work = 4 * flop(body, lengths.sum(), length)
    shares[length] = [round(work / s / peak, 3) for s in secs]
    speed = [4 * lengths.sum() / s for s in secs]
    print(
      f'{length:6}{speed[0]:14,.0f}{shares[length][0]:7.1%}'
      f'{speed[1]:14,.0f}{shares[length][1]:7.1%}'
    )
  return shares


def encode_texts(model, peer, texts):
  """Compares texts to embeddings, tokenizing included."""
  encoder = encoding.make_encoder(
    model.config,
    bi_encoder.PASSAGE,
    dtype='bfloat16',
    tokens_per_batch=TOKENS_PER_BATCH,
    devices=devices.local(1),
  )

  peer.max_seq_length = PASSAGE_LENGTH

  def ours():
    rows = tokens.memory_rows(model.tokenizer, texts, PASSAGE_LENGTH)
    return encoding.encode_rows(encoder, model.params, rows, 'encode')

  def theirs():
    return peer.encode(
      texts,
      batch_size=PEER_BATCH,
      normalize_embeddings=True,
      show_progress_bar=False,
    )

  return side_by_side.compare(
    f'texts to embeddings, {len(texts):,} of {PASSAGE_LENGTH} tokens at most',
    ours,
    theirs,
    units=len(texts),
    unit='texts',
    rounds=3,
  )


def make_our_step(model, batch, here):
  """Returns a function that makes four steps and waits for them."""
  optimizer = optimizers.make(SETTINGS)
  settings = dataclasses.replace(SETTINGS, dtype='bfloat16')
  train_step = steps.make_train_step(
    settings, methods.METHODS['in_batch'], model.config, optimizer, here
  )
  params = jax.tree.map(jnp.copy, model.params)
  state = [steps.init_state(params, params, optimizer, here)]

  def ours():
    for _ in range(4):
      state[0], metrics = train_step(state[0], batch, None)
    jax.block_until_ready((state[0], metrics))

  return ours


def make_their_step(folder, texts):
  """Returns the peer's: the body in bfloat16 by autocast, weights float32."""
  peer = load_peer(folder, GPU)
  peer.train()
  loss = losses.MultipleNegativesRankingLoss(peer)
  features = []
  for some, length in (
    ([text[:150] for text in texts[:PAIRS]], QUERY_LENGTH),
    (texts[PAIRS : 2 * PAIRS], PASSAGE_LENGTH),
  ):
    peer.max_seq_length = length
    found = peer.preprocess(some)
    features.append(
      {k: v.to(GPU) for k, v in found.items() if hasattr(v, 'to')}
    )
  optimizer = torch.optim.AdamW(
    peer.parameters(), lr=2e-5, weight_decay=0.01, fused=True
  )

  def theirs():
    for _ in range(4):
      optimizer.zero_grad()
      with torch.autocast(GPU.type, torch.bfloat16):
        value = loss([dict(f) for f in features], None)
      value.backward()
      torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
      optimizer.step()
    wait_for_torch()

  return theirs


def train(model, folder, texts, peak):
  """Compares a training step; returns the ratio and our share of the peak."""
  here = devices.local(1)
  batch = training_batch(model, texts, PAIRS)
  ours = make_our_step(model, devices.shard(batch, here), here)
  what = f'training step, {PAIRS} pairs of {QUERY_LENGTH} + {PASSAGE_LENGTH}'
  ratio = side_by_side.compare(
    what, ours, make_their_step(folder, texts), units=4, unit='steps', rounds=3
  )
  [secs] = secs_each([ours])
  body = model.config.body
  lengths = batch.packs[bi_encoder.TIED].lengths.ravel().astype(int)
  # Backward is twice the work of forward; padding is not counted.
  work = 3 * flop(body, lengths, lengths).sum()
  return ratio, round(4 * work / secs / peak, 3)


def main():
  texts = read_texts()
  with tempfile.TemporaryDirectory() as folder:
    make_model(texts, folder)
    settings = dataclasses.replace(SETTINGS, init_from=folder)
    model = experiment.load_model(settings, ())
    check(model, load_peer(folder, 'cpu'), texts)
    peak, theirs = matrix_peak()
    print(
      f'{jax.devices()[0].device_kind}, bfloat16: product of matrices '
      f'{peak / 1e12:.0f} TFLOP/s by jax, {theirs / 1e12:.0f} by torch'
    )
    peer = load_peer(folder, GPU).to(torch.bfloat16)
    found = {'encode shares': encode_batches(model, peer, peak)}
    found['encode ratio'] = encode_texts(model, peer, texts)
    del peer
    found['step ratio'], found['step share'] = train(model, folder, texts, peak)
  print(json.dumps(found))


if __name__ == '__main__':
  main()
