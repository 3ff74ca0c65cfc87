"""The bi-encoder: one or two towers, pooling, projection, similarity."""

from collections.abc import Callable
import dataclasses
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp

from ance_jax.core import devices
from ance_jax.core import strict_io
from ance_jax.models import bert
from ance_jax.models import pooling

QUERY, PASSAGE = 'query', 'passage'
# Name of a shared tower that encodes both.
TIED = 'tied'
# File with the output of `RetrieverConfig.to_dict`.
FILE = 'retriever.json'


@dataclasses.dataclass(frozen=True)
class RetrieverConfig:
  """Everything about a retriever except its weights and tokenizer.

  Attributes:
    body: Sizes of a tower's transformer.
    tied: Whether queries and passages share one tower.
    pooling: A mode of `choices.POOLINGS`, or several joined by +, whose vectors
      are concatenated.
    head_size: Width of the projection after pooling (ANCE's `embeddingHead`,
      DPR's `encode_proj`); 0 for none.
    head_norm: Whether a LayerNorm follows the projection (ANCE's `norm`).
    similarity: 'dot' or 'cosine' of the embeddings.
    query_length: Maximum number of tokens of a query.
    passage_length: Maximum number of tokens of a passage.
    title_separator: String, possibly a special token, between a passage's title
      and text. (The tokenizer holds lower-casing and similar settings.)
    query_prompt: Prefix of each query.
    passage_prompt: Prefix of each passage, before its title.
    include_prompt: Whether to pool the tokens of prompts.
    query_prompt_tokens: Tokens at the start of a query to leave out of pooling.
    passage_prompt_tokens: The same for a passage.
    layers: `pooling.Layer`s that replace the projection and its norm, if a
      checkpoint has others.
    truncate_dim: Leading numbers of an embedding to keep; 0 keeps all.
  """

  body: bert.BodyConfig
  tied: bool
  pooling: str
  head_size: int
  head_norm: bool
  similarity: str
  query_length: int
  passage_length: int
  title_separator: str
  query_prompt: str = ''
  passage_prompt: str = ''
  include_prompt: bool = True
  query_prompt_tokens: int = 0
  passage_prompt_tokens: int = 0
  layers: tuple[pooling.Layer, ...] = ()
  truncate_dim: int = 0

  @property
  def modes(self) -> tuple[str, ...]:
    """Pooling modes, in order."""
    return tuple(self.pooling.split('+'))

  @property
  def chain(self) -> tuple[pooling.Layer, ...]:
    """All `pooling.Layer`s between pooling and embedding."""
    if self.layers or not self.head_size:
      return self.layers
    head = pooling.Layer(pooling.DENSE, self.head_size)
    return (head, pooling.Layer(pooling.NORM)) if self.head_norm else (head,)

  @property
  def embedding_size(self) -> int:
    """E, width of an embedding."""
    pooled = self.body.hidden_size * len(self.modes)
    width = [pooled, *(layer.size for layer in self.chain if layer.size)][-1]
    return min(width, self.truncate_dim or width)

  @property
  def towers(self) -> tuple[str, ...]:
    """Names of the towers, the keys of the parameters."""
    return (TIED,) if self.tied else (QUERY, PASSAGE)

  def tower(self, side: str) -> str:
    """Returns the name of the tower that encodes `QUERY` or `PASSAGE`."""
    return TIED if self.tied else side

  def to_dict(self) -> dict:
    """Returns the settings as a dict for JSON."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: dict) -> 'RetrieverConfig':
    """Inverts `to_dict`."""
    parsed = {
      'body': bert.BodyConfig(**values['body']),
      'layers': tuple(pooling.Layer(**o) for o in values.get('layers', ())),
    }
    return cls(**{**values, **parsed})


class Pooled(nn.Module):
  """Token ids -> pooled vectors: the part of a tower that sees tokens.

  Attributes:
    retriever: Settings.
    dtype: Type of the body's activations.
    remat: As in `bert.Body`.
    kernel: As in `bert.Body`.
  """

  retriever: RetrieverConfig
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  kernel: bool = True

  @nn.compact
  def __call__(
    self,
    ids: jax.Array,
    lengths: jax.Array,
    dropout: bert.Dropout | None = None,
    skipped: int | jax.Array = 0,
  ) -> jax.Array:
    """Returns one (..., P) float32 vector per text.

    Args:
      ids: (R, L) int32 token ids, padded on the right.
      lengths: (R,) or (R, S) int32, as for `bert.Body`.
      dropout: None for no dropout.
      skipped: As for `pooling.pool`.
    """
    r = self.retriever
    body = bert.Body(r.body, self.dtype, self.remat, self.kernel, name='body')
    x = body(ids, lengths, dropout).astype(jnp.float32)
    return pooling.pool(x, lengths, r.modes, skipped)


class Embedded(nn.Module):
  """Pooled vectors -> embeddings: the other part of a tower."""

  retriever: RetrieverConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns (B, E) float32, of length 1 for cosine, of (B, P) vectors."""
    r = self.retriever
    x = pooling.apply(r.chain, x)
    if r.truncate_dim:
      x = x[:, : r.truncate_dim]
    return pooling.unit(x) if r.similarity == 'cosine' else x


def read(path: pathlib.Path) -> RetrieverConfig:
  """Reads the settings from a file."""
  try:
    return RetrieverConfig.from_dict(strict_io.json_file(path))
  except (TypeError, KeyError) as error:
    raise strict_io.refusal(
      path,
      f'this version does not know its settings ({error})',
      'use the version that wrote it',
    ) from error


def init(retriever: RetrieverConfig, seed: int) -> dict[str, dict]:
  """Returns random float32 parameters by tower.

  Untied towers start equal, like two copies of one checkpoint.
  """
  # Compiling for the host takes one second; for a GPU it took over 30 seconds
  # (BERT-base) and gave different bits.
  with jax.default_device(devices.host()):
    params = jax.device_get(jax.jit(_init, static_argnums=0)(retriever, seed))
  return {name: jax.tree.map(jnp.array, params) for name in retriever.towers}


def shapes(retriever: RetrieverConfig) -> dict[str, dict]:
  """Returns the parameters by tower as `jax.ShapeDtypeStruct`s."""
  params = jax.eval_shape(lambda: _init(retriever, 0))
  return dict.fromkeys(retriever.towers, params)


def _init(retriever, seed):
  """Returns random parameters for one tower."""
  key = jax.random.key(seed)
  ids, lengths = jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32)
  pooled, params = Pooled(retriever).init_with_output(key, ids, lengths)
  rest = Embedded(retriever).init(key, pooled)
  return {**params['params'], **rest.get('params', {})}


def make_encode(
  retriever: RetrieverConfig, dtype: str, side: str, kernel: bool = True
) -> Callable[..., jax.Array]:
  """Returns encode(params, ids, lengths, dropout=None) -> (B, E) float32.

  Args:
    retriever: Settings.
    dtype: Type of the body's activations, by name.
    side: `QUERY` or `PASSAGE`.
    kernel: As in `bert.Body`.
  """
  pool = Pooled(retriever, jnp.dtype(dtype), kernel=kernel)
  skipped = getattr(retriever, f'{side}_prompt_tokens')

  def encode(params, ids, lengths, dropout=None):
    tower = {'params': params[retriever.tower(side)]}
    pooled = pool.apply(tower, ids, lengths, dropout, skipped)
    return Embedded(retriever).apply(tower, pooled)

  return encode
