"""A retriever that encodes: settings, tokenizer, parameters on devices."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ance_jax import errors
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
    config: All of it but weights and tokenizer.
    tokenizer: Its tokenizer.
    settings: How texts are encoded.
    devices: The accelerators used, those of all processes.
    query_encoder: Encodes queries.
    passage_encoder: Encodes passages.
    params: Parameters by tower, on all devices; None where they are those of a
      training state, see `with_params`.
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
    """What is read of a text."""
    settings, config = self.settings, self.config
    return tokenized.Form(
      tokens.Cut(config.query_length),
      tokens.Cut(config.passage_length, settings.chunks, settings.whole_chunks),
      config.title_separator,
      config.query_prompt,
      config.passage_prompt,
    )

  def with_params(self, params: dict) -> 'Retriever':
    """Returns this with parameters by tower that lie on its devices."""
    return self._replace(params=params)

  def on_devices(self, devices: tuple) -> 'Retriever':
    """Returns this compiled for other devices, without parameters."""
    return make(
      pretrained.Model(self.config, self.tokenizer, None),
      devices,
      self.settings,
    )

  def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
    """Returns the (q, E) float32 embeddings of queries."""
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

    Where the settings cut passages into pieces there is a row for each piece.

    Args:
      passages: Texts.
      titles: A title for each of them, '' for none; None: there are none.
    """
    rows = self.passage_rows(passages, titles).pieces()
    return encoding.encode_rows(
      self.passage_encoder, self.params, rows, 'encode passages'
    )[0]

  def passage_rows(
    self, passages: Sequence[str], titles: Sequence[str] | None = None
  ) -> tokens.TokenRows:
    """Returns the token rows of passages; see `encode_passages`."""
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
  """Returns the `Retriever` of a model, compiled when it is first used.

  Args:
    model: Its parameters are placed on the devices; None: there are none yet.
    devices: The accelerators used.
    settings: How texts are encoded; None: as the defaults are.

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
  params = model.params
  if params is not None:
    params = devices_lib.replicate(params, devices)
  return Retriever(
    config, model.tokenizer, settings, devices, *encoders, params
  )


def check_chunks(config: bi_encoder.RetrieverConfig, chunks: int):
  """Raises `BadInput` if not all pieces have the prompt that is not pooled."""
  if chunks > 1 and config.passage_prompt and not config.include_prompt:
    raise errors.BadInput(
      'the retriever leaves its prompt out of the pooling, and with --chunks '
      'only the first piece of a passage has one; use --chunks=1.'
    )
