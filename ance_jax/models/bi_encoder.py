"""The bi-encoder: one tower or two, pooling, projection, similarity."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from ance_jax.core import devices
from ance_jax.core import strict_io
from ance_jax.models import bert
from ance_jax.models import pooling

QUERY, PASSAGE = 'query', 'passage'
# Name of the one tower that encodes both.
TIED = 'tied'
# Of what `RetrieverConfig.to_dict` gives.
FILE = 'retriever.json'


@dataclasses.dataclass(frozen=True)
class RetrieverConfig:
  """All of a retriever but its weights and its tokenizer.

  Attributes:
    body: Sizes of the transformer of a tower.
    tied: Whether queries and passages share one tower.
    pooling: A mode of `choices.POOLINGS`, or several with a + between, whose
      vectors are joined.
    head_size: Width of a projection after pooling (ANCE's `embeddingHead`,
      DPR's `encode_proj`); 0: none.
    head_norm: Whether a LayerNorm follows the projection (ANCE's `norm`).
    similarity: 'dot' or 'cosine' of the embeddings.
    query_length: Tokens of a query at most.
    passage_length: Tokens of a passage at most.
    title_separator: What stands between title and text of a passage, a special
      token perhaps. Lower-casing and the like are in the tokenizer.
    query_prompt: What is put before each query.
    passage_prompt: What is put before each passage, and its title.
    include_prompt: Whether the tokens of a prompt are pooled as others are.
    query_prompt_tokens: Tokens at the start of a query that are not pooled.
    passage_prompt_tokens: The same of a passage.
    layers: `pooling.Layer`s in place of the projection, where a checkpoint has
      others than that and its norm.
    truncate_dim: Numbers of an embedding that are kept, the first ones; 0: all.
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
  def modes(self):
    """The modes of the pooling, in order."""
    return tuple(self.pooling.split('+'))

  @property
  def chain(self):
    """All `pooling.Layer`s between pooling and embedding."""
    if self.layers or not self.head_size:
      return self.layers
    head = pooling.Layer(pooling.DENSE, self.head_size)
    return (head, pooling.Layer(pooling.NORM)) if self.head_norm else (head,)

  @property
  def embedding_size(self):
    """Width of an embedding."""
    sizes = [layer.size for layer in self.chain if layer.size]
    width = [self.body.hidden_size * len(self.modes), *sizes][-1]
    return min(width, self.truncate_dim or width)

  @property
  def towers(self):
    """Names of the towers: the keys of the parameters."""
    return (TIED,) if self.tied else (QUERY, PASSAGE)

  def to_dict(self):
    """Returns this as a dict for JSON."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values):
    """Returns what `to_dict` was made of."""
    body = bert.BodyConfig(**values['body'])
    layers = tuple(pooling.Layer(**one) for one in values.get('layers', ()))
    return cls(**{**values, 'body': body, 'layers': layers})


class Tower(nn.Module):
  """Token ids -> embeddings.

  Attributes:
    retriever: A `RetrieverConfig`.
    dtype: Type that the body computes in.
    remat: As in `bert.Body`.
    kernel: As in `bert.Body`.
    skipped: Tokens at the start of each text that are not pooled.
  """

  retriever: RetrieverConfig
  dtype: jnp.dtype = jnp.float32
  remat: bool = False
  kernel: bool = True
  skipped: int = 0

  @nn.compact
  def __call__(self, ids, lengths, dropout=None):
    """Returns (B, E) float32 embeddings, of length 1 for cosine similarity.

    Args:
      ids: (B, L) int32 token ids, padded on the right.
      lengths: (B,) int32, tokens of each text that are not padding.
      dropout: A `bert.Dropout`, or None.
    """
    r = self.retriever
    body = bert.Body(r.body, self.dtype, self.remat, self.kernel, name='body')
    x = body(ids, lengths, dropout)
    x = x.astype(jnp.float32)
    x = pooling.pool(x, lengths, r.modes, self.skipped)
    x = pooling.apply(r.chain, x)
    if r.truncate_dim:
      x = x[:, : r.truncate_dim]
    if r.similarity == 'cosine':
      x = pooling.unit(x)
    return x


def read(path):
  """Returns the `RetrieverConfig` of a file."""
  values = strict_io.json_file(path)
  try:
    return RetrieverConfig.from_dict(values)
  except (TypeError, KeyError) as error:
    raise strict_io.bad(
      path,
      'a retriever must have the settings that this version knows',
      f'others ({error})',
      'use the version that wrote it',
    ) from error


def init(retriever, seed):
  """Returns random parameters: {tower name: dict}, float32.

  Untied towers start equal, as two copies of one checkpoint would.
  """
  # The host's compiler needs a second for it; that of a GPU took more than 30
  # for BERT-base, and for other bits.
  with jax.default_device(devices.host()):
    params = jax.jit(_init, static_argnums=0)(retriever, seed)
  params = jax.device_get(params)
  return {name: jax.tree.map(jnp.array, params) for name in retriever.towers}


def shapes(retriever):
  """Returns the parameters' tree, of shapes and dtypes in place of arrays."""
  params = jax.eval_shape(lambda: _init(retriever, 0))
  return dict.fromkeys(retriever.towers, params)


def _init(retriever, seed):
  """Returns random parameters of one tower."""
  ids, lengths = jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32)
  return Tower(retriever).init(jax.random.key(seed), ids, lengths)['params']


def make_encode(retriever, dtype, side, remat=False, kernel=True):
  """Returns encode(params, ids, lengths, dropout=None) -> (B, E) float32.

  Args:
    retriever: A `RetrieverConfig`.
    dtype: Type that the body computes in, by name.
    side: `QUERY` or `PASSAGE`.
    remat: As in `bert.Body`, for those who differentiate it.
    kernel: As in `bert.Body`.
  """
  skipped = getattr(retriever, f'{side}_prompt_tokens')
  tower = Tower(retriever, jnp.dtype(dtype), remat, kernel, skipped)
  name = TIED if retriever.tied else side

  def encode(params, ids, lengths, dropout=None):
    return tower.apply({'params': params[name]}, ids, lengths, dropout)

  return encode
