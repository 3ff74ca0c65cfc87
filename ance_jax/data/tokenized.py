"""A dataset as token rows, for training, encoding, search and evaluation."""

from collections.abc import Callable
import pathlib
from typing import NamedTuple

from ance_jax.data import corpus as corpus_lib
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens


class Dataset(NamedTuple):
  """A corpus and its splits, as texts and as token rows.

  Attributes:
    corpus: N passages.
    splits: Judged queries by split.
    passages: Token rows of the corpus.
    queries: Token rows of the queries by split.
  """

  corpus: corpus_lib.Corpus
  splits: dict[str, corpus_lib.Split]
  passages: tokens.TokenRows
  queries: dict[str, tokens.TokenRows]


class Form(NamedTuple):
  """What an encoder reads of a text.

  Attributes:
    query_cut: How queries are cut.
    passage_cut: How passages are cut.
    title_separator: Stands between title and text of a passage.
    query_prompt: Put before each query.
    passage_prompt: Put before each passage, and its title.
  """

  query_cut: tokens.Cut
  passage_cut: tokens.Cut
  title_separator: str = tokenizer_lib.SPACE
  query_prompt: str = ''
  passage_prompt: str = ''


def make(
  texts: corpus_lib.TextDataset,
  tokenizer: tokenizer_lib.Tokenizer,
  form: Form,
  folder: str | pathlib.Path,
  spread: Callable | None = None,
) -> Dataset:
  """Returns the `Dataset` of a corpus and its splits.

  Args:
    texts: What `load.load` returns.
    tokenizer: Of the encoder.
    form: What the encoder reads of a text.
    folder: Token rows are kept there, made once; see `tokens.token_rows`.
    spread: As for `tokens.token_rows`, of the passages.
  """
  corpus = texts.corpus
  passages = tokens.token_rows(
    tokenizer,
    tokens.passage_texts(corpus, form.title_separator, form.passage_prompt),
    what='passages',
    num_texts=len(corpus.texts),
    cut=form.passage_cut,
    content_hash=_hash_of(
      corpus, repr(form.title_separator), form.passage_prompt
    ),
    folder=folder,
    spread=spread,
  )
  queries = {
    name: tokens.token_rows(
      tokenizer,
      (form.query_prompt + text for text in split.texts),
      what=f'{name}-queries',
      num_texts=len(split.texts),
      cut=form.query_cut,
      content_hash=_hash_of(split, form.query_prompt),
      folder=folder,
    )
    for name, split in texts.splits.items()
  }
  return Dataset(corpus, texts.splits, passages, queries)


def _hash_of(texts, *additions):
  """Returns the hash of a corpus or split and of the additions to its texts."""
  return ' '.join([texts.hash, *filter(None, additions)])
