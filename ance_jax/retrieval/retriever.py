"""A retriever ready to encode: settings, tokenizer, parameters on devices."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ance_jax import errors
from ance_jax.core import checkpoint
from ance_jax.core import devices as devices_lib
from ance_jax.data import tokenized
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.models import bi_encoder
from ance_jax.models import pretrained
from ance_jax.retrieval import encoding


class Retriever(NamedTuple):
  """A bi-encoder, ready to encode texts or token rows.

  Attributes:
    config: Settings of the model.
    tokenizer: Tokenizer of queries and passages.
    settings: Settings of the encoding pass.
    devices: Accelerators to use, of all processes.
    query_encoder: Encodes queries.
    passage_encoder: Encodes passages.
    params: Parameters by tower, on all devices; None if a training state holds
      them, see `with_params`.
  """

  config: bi_encoder.RetrieverConfig
  tokenizer: tokenizer_lib.Tokenizer
  settings: encoding.Settings
  devices: tuple
  query_encoder: encoding.Encoder
  passage_encoder: encoding.Encoder
  params: dict | None = None

  @property
  def form(self) -> tokenized.Form:
    """How texts become token rows."""
    settings, config = self.settings, self.config
    return tokenized.Form(
      tokens.Cut(config.query_length),
      tokens.Cut(config.passage_length, settings.chunks, settings.whole_chunks),
      config.title_separator,
      config.query_prompt,
      config.passage_prompt,
    )

  def passage_hash(self) -> str:
    """Returns the hash of the parameters that encode passages."""
    tower = self.config.tower(bi_encoder.PASSAGE)
    return checkpoint.weights_hash({tower: self.params[tower]})

  def with_params(self, params: dict) -> 'Retriever':
    """Returns a copy with parameters by tower, which are on its devices."""
    return self._replace(params=params)

  def on_devices(self, devices: tuple) -> 'Retriever':
    """Returns a copy for other devices, without parameters."""
    return make(
      pretrained.Model(self.config, self.tokenizer, None),
      devices,
      self.settings,
    )

  def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
    """Returns the (q, E) float32 embeddings of queries."""
    _refuse_string(queries)
    form = self.form
    rows = tokens.memory_rows(
      self.tokenizer,
      [form.query_prompt + query for query in queries],
      *form.query_cut,
    )
    return encoding.encode_rows(
      self.query_encoder, self.params, rows, 'encode queries'
    )[0]

  def encode_passages(
    self, passages: Sequence[str], titles: Sequence[str] | None = None
  ) -> np.ndarray:
    """Returns the (n, E) float32 embeddings of passages.

    If the settings cut passages into pieces, there is one row per piece.

    Args:
      passages: Texts.
      titles: Title of each text, '' for none; None for no titles.
    """
    return encoding.encode_rows(
      self.passage_encoder,
      self.params,
      self.passage_rows(passages, titles).pieces(),
      'encode passages',
    )[0]

  def passage_rows(
    self, passages: Sequence[str], titles: Sequence[str] | None = None
  ) -> tokens.TokenRows:
    """Returns the token rows of passages; see `encode_passages`."""
    _refuse_string(passages)
    form = self.form
    texts = [
      tokens.passage_text(*row, form.title_separator, form.passage_prompt)
      for row in zip(titles or [''] * len(passages), passages, strict=True)
    ]
    return tokens.memory_rows(self.tokenizer, texts, *form.passage_cut)


def make(
  model: pretrained.Model,
  devices: tuple,
  settings: encoding.Settings | None = None,
) -> Retriever:
  """Returns a model's retriever, which compiles on first use.

  Args:
    model: The model; its parameters, unless None, are copied to the devices.
    devices: Accelerators to use.
    settings: Settings of the encoding pass; None for the defaults.

  Raises:
    BadInput: As `check_chunks` does.
  """
  settings, config = settings or encoding.Settings(), model.config
  check_chunks(config, settings.chunks)
  encoders = encoding.make_encoders(
    config,
    dtype=settings.dtype,
    tokens_per_batch=settings.tokens_per_batch,
    devices=devices,
    kernel=settings.kernel,
  )
  return Retriever(
    config,
    model.tokenizer,
    settings,
    devices,
    *encoders,
    # Without parameters it is None, which jax takes for an empty tree.
    devices_lib.replicate(model.params, devices),
  )


def check_chunks(config: bi_encoder.RetrieverConfig, chunks: int) -> None:
  """Raises `BadInput` if only some pieces start with the unpooled prompt."""
  if chunks > 1 and config.passage_prompt and not config.include_prompt:
    raise errors.refusal(
      'the retriever leaves its prompt out of the pooling, and with '
      f'--chunks={chunks} only the first piece of a passage has one',
      'use --chunks=1',
    )


def _refuse_string(texts):
  """Raises `TypeError` for a string, whose letters would be the texts."""
  if isinstance(texts, str):
    raise TypeError(f'{texts[:50]!r} is a text, not a list; use [text]')
