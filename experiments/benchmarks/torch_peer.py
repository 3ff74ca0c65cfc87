"""The side of torch and sentence-transformers in accelerator.py."""

from collections.abc import Callable
from collections.abc import Sequence
import gc

import numpy as np
import sentence_transformers
from sentence_transformers import losses
import torch
import transformers

from ance_jax.data import tokens

GPU = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
_BATCH = 512


def write_model(
  folder: str, layers: int, width: int, heads: int, inner: int, vocabulary: int
) -> None:
  """Writes a BERT of random weights, beside its tokenizer."""
  torch.manual_seed(0)
  sizes = transformers.BertConfig(
    vocab_size=vocabulary,
    hidden_size=width,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    intermediate_size=inner,
  )
  transformers.BertModel(sizes).save_pretrained(folder)


def load(
  folder: str, device: torch.device | str = GPU, dtype: str = 'float32'
) -> sentence_transformers.SentenceTransformer:
  """Returns the sentence-transformers model, with sdpa attention.

  In training it drops activations and, as ours here, no attention weights.
  """
  return sentence_transformers.SentenceTransformer(
    folder,
    device=str(device),
    model_kwargs={'attn_implementation': 'sdpa', 'dtype': torch.float32},
    config_kwargs={'attention_probs_dropout_prob': 0.0},
  ).to(getattr(torch, dtype))


def wait() -> None:
  """Returns when torch's work is done."""
  if GPU.type == 'cuda':
    torch.cuda.synchronize()


def give_back() -> None:
  """Gives memory that torch keeps, and no longer uses, back to the device."""
  gc.collect()
  torch.cuda.empty_cache()


def make_product(size: int, times: int, dtype: str) -> Callable[[], None]:
  """Returns a function that multiplies two matrices so many times."""
  matrix = torch.randn(size, size, device=GPU, dtype=getattr(torch, dtype))

  def multiply():
    for _ in range(times):
      matrix @ matrix
    wait()

  return multiply


def make_embed(
  folder: str, device: torch.device | str, dtype: str, most: int
) -> Callable[[Sequence[str]], np.ndarray]:
  """Returns embed(texts) -> (n, E) float32, of length 1."""
  peer = load(folder, device, dtype)
  peer.max_seq_length = most

  def embed(texts):
    return peer.encode(
      texts,
      batch_size=_BATCH,
      normalize_embeddings=True,
      show_progress_bar=False,
    )

  return embed


def make_encode(
  peer: sentence_transformers.SentenceTransformer, ids: np.ndarray, times: int
) -> Callable[[], None]:
  """Returns a function that encodes a batch so many times, without pooling."""
  body, mask = peer[0].auto_model, torch.tensor(ids > 0, device=GPU)
  ids = torch.tensor(ids, device=GPU).long()

  @torch.inference_mode()
  def encode():
    for _ in range(times):
      body(input_ids=ids, attention_mask=mask)
    wait()

  return encode


def make_step(
  folder: str, sides: Sequence[tokens.TokenRows], dtype: str, times: int
) -> Callable[[], None]:
  """Returns a function that makes so many steps of in-batch negatives.

  The body is in `dtype` by autocast, weights are float32; a side is padded to
  its longest text, as the collator there does.
  """
  peer = load(folder)
  peer.train()
  loss, features = losses.MultipleNegativesRankingLoss(peer), []
  for rows in sides:
    ids, lengths = rows.padded(np.arange(len(rows)), rows.lengths().max())
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    features.append(
      {
        'input_ids': torch.tensor(ids, device=GPU).long(),
        'attention_mask': torch.tensor(mask, device=GPU).long(),
      }
    )
  optimizer = torch.optim.AdamW(
    peer.parameters(), lr=2e-5, weight_decay=0.01, fused=GPU.type == 'cuda'
  )

  def steps():
    for _ in range(times):
      optimizer.zero_grad()
      with torch.autocast(
        GPU.type, getattr(torch, dtype), enabled=dtype != 'float32'
      ):
        value = loss([dict(side) for side in features], None)
      value.backward()
      torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
      optimizer.step()
    wait()

  return steps
