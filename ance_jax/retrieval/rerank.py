"""Scores pairs of a query and a passage by a fixed cross-encoder.

Nogueira and Cho 2019; CrossEncoder of sentence-transformers.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import itertools
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ance_jax import errors
from ance_jax.core import devices as devices_lib
from ance_jax.core import logs
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.models import bert
from ance_jax.models import huggingface
from ance_jax.models import retriever_layouts
from ance_jax.models import sbert
from ance_jax.models import snapshots
from ance_jax.retrieval import encoding

# Pairs to tokenize at once; tokenizing takes some 10 KB of memory per pair.
_PAIRS_AT_ONCE = 8192


class Ranker(nn.Module):
  """Scores tokenized pairs like transformers' sequence classifiers.

  Attributes:
    config: Sizes of the body.
    sigmoid: Whether the score is the sigmoid of the output.
    dtype: Type of the body's activations.
  """

  config: bert.BodyConfig
  sigmoid: bool
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns (B, 1) float32 scores.

    Args:
      ids: (B, L, 2) int32, id and type of each token, padded on the right.
      lengths: (B,) int32, tokens of each pair without padding.
    """
    body = bert.Body(self.config, self.dtype, name='body')
    x = body(ids[..., 0], lengths, types=ids[..., 1])[:, 0]
    x = _dense(self.config.hidden_size, 'pooler')(x.astype(jnp.float32))
    x = nn.relu(x) if self.config.model_type == 'distilbert' else nn.tanh(x)
    x = _dense(1, 'classifier')(x)
    return nn.sigmoid(x) if self.sigmoid else x


class _Pairs(NamedTuple):
  """Tokens of pairs, with the interface that `encoding.encode_rows` needs.

  Attributes:
    ids: Token ids of each pair.
    types: Token types of each pair.
  """

  ids: tokens.TokenRows
  types: tokens.TokenRows

  def __len__(self):
    return len(self.ids)

  def lengths(self):
    return self.ids.lengths()

  def padded(self, rows, length):
    """Returns (n, length, 2) int32 ids and types, and (n,) int32 lengths."""
    ids, lengths = self.ids.padded(rows, length)
    return np.stack([ids, self.types.padded(rows, length)[0]], -1), lengths


def load(
  cross_encoder: str,
  *,
  devices: Sequence[jax.Device],
  dtype: str,
  tokens_per_batch: int,
  raw: bool = False,
) -> Callable[[Iterable[tuple[str, str]]], np.ndarray]:
  """Returns score(pairs) -> (P,) float32, which runs a cross-encoder.

  `score` reads the (query, passage) pairs lazily, a part at a time.

  Args:
    cross_encoder: Folder of the model, or its name on the hub.
    devices: Devices to compute on.
    dtype: Type of the body's activations.
    tokens_per_batch: Tokens per batch over all devices, padding included.
    raw: Whether the score is the output though predict would return its
      sigmoid.

  Raises:
    BadInput: The cross-encoder cannot be used; the message says why.
  """
  pinned = snapshots.pinned(cross_encoder)
  name = snapshots.folder(pinned)
  said, body = sbert.read_cross_encoder(name), huggingface.read_config(name)
  tensors = huggingface.read_tensors(name, without=lambda _: False)
  params = devices_lib.replicate(
    retriever_layouts.cross_encoder_from_tensors(tensors, body, name), devices
  )
  tokenizer = tokenizer_lib.load(name)
  if said.lower_case:
    tokenizer_lib.set_flavour(tokenizer, lower_case=True, prefix_space=None)
  length = min(said.length or tokenizer.model_max_length, body.max_length)
  _check_tokenizer(tokenizer, body, length, name)
  sigmoid = said.sigmoid and not raw
  ranker = Ranker(body, sigmoid, jnp.dtype(dtype))
  whole, split = devices_lib.replicated(devices), devices_lib.split(devices)
  encoder = encoding.Encoder(
    jax.jit(
      lambda params, ids, lengths: ranker.apply(
        {'params': params}, ids, lengths
      ),
      in_shardings=(whole, split, split),
      out_shardings=split,
    ),
    len(devices),
    tokens_per_batch,
    body.max_length,
    1,
  )
  logs.log(
    f'{pinned}: scores pairs of up to {length} tokens; its score is '
    f'{"the sigmoid of its output" if sigmoid else "its output"}'
  )

  def score(pairs):
    pairs, found = iter(pairs), [np.zeros(0, np.float32)]
    while some := list(itertools.islice(pairs, _PAIRS_AT_ONCE)):
      rows = _tokenized(tokenizer, some, length)
      found.append(
        encoding.encode_rows(encoder, params, rows, 'rerank')[0][:, 0]
      )
    return np.concatenate(found)

  return score


def _tokenized(tokenizer, pairs, length):
  """Tokenizes pairs to at most `length` tokens, cutting the longer text."""
  backend = tokenizer_lib.backend(tokenizer)
  backend.enable_truncation(length)
  found = backend.encode_batch_fast(pairs)
  offsets = np.concatenate([[0], np.cumsum([len(one.ids) for one in found])])
  ids = np.concatenate([one.ids for one in found]).astype(np.uint32)
  types = np.zeros(len(ids), np.uint8)
  if _gives_types(tokenizer):
    types = np.concatenate([one.type_ids for one in found]).astype(np.uint8)
  return _Pairs(
    tokens.TokenRows(ids, offsets, tokenizer.pad_token_id, ''),
    tokens.TokenRows(types, offsets, 0, ''),
  )


def _gives_types(tokenizer):
  """Returns whether transformers passes token types to the model."""
  return 'token_type_ids' in tokenizer.model_input_names


def _check_tokenizer(tokenizer, body, length, name):
  """Raises `BadInput` if the tokenizer does not fit the body."""
  backend = tokenizer_lib.backend(tokenizer)
  last = max(tokenizer.get_vocab().values(), default=0)
  types = (
    max(backend.encode('a', 'a').type_ids) + 1 if _gives_types(tokenizer) else 1
  )
  least = backend.num_special_tokens_to_add(True) + 2
  for wrong, fact in (
    (
      last >= body.vocab_size,
      f'has the id {last:,}, but the word embedding has only '
      f'{body.vocab_size:,} rows',
    ),
    (
      1 <= body.num_types < types,
      f'gives {types} token types, but the model has {body.num_types}',
    ),
    (
      length < least,
      f'takes {length} tokens, and the shortest pair has {least}',
    ),
  ):
    if wrong:
      raise errors.refusal(
        f'the tokenizer of {name} {fact}', "use the checkpoint's own"
      )


def _dense(width, name):
  return nn.Dense(width, precision=bert.precision(jnp.float32), name=name)
