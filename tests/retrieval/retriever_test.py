"""A retriever and a dataset are made alone, without a run or its folder."""

import dataclasses

import numpy as np
import pytest

from ance_jax import errors
from ance_jax.core import devices
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import tokenized
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.models import pretrained
from ance_jax.retrieval import encoding
from ance_jax.retrieval import retriever as retriever_lib

TITLES = ['title', '', 'another']
TEXTS = ['some words', 'other words', 'many words ' * 9]
QUERIES = ['which words', 'what']


@pytest.fixture(scope='module')
def model():
  tokenizer = tokenizer_lib.train_vocabulary(
    [*TITLES, *TEXTS, *QUERIES, 'q: p: '], 60
  )
  body = bert.BodyConfig(
    'bert', len(tokenizer), 16, 1, 2, 32, 16, 1, 1e-12, 'gelu'
  )
  config = bi_encoder.RetrieverConfig(
    body, False, 'mean', 0, True, 'dot', 8, 12, ' ', 'q: ', 'p: '
  )
  return pretrained.Model(config, tokenizer, bi_encoder.init(config, 0))


@pytest.fixture
def data(model, tmp_path):
  corpus = corpus_lib.make_corpus(list('abc'), TITLES, TEXTS)
  split = corpus_lib.make_split(
    corpus_lib.RawSplit(list('xy'), QUERIES, {(0, 0): 1, (1, 2): 1})
  )

  def make(retriever):
    texts = corpus_lib.TextDataset(corpus, {'dev': split})
    return tokenized.make(texts, model.tokenizer, retriever.form, tmp_path)

  return make


@pytest.mark.parametrize('chunks', [1, 3])
def test_lists_of_texts_have_the_token_rows_of_a_dataset(chunks, model, data):
  retriever = retriever_lib.make(
    model, devices.local(1), encoding.Settings(chunks=chunks)
  )
  made = data(retriever)
  rows = retriever.passage_rows(TEXTS, TITLES)
  for name in ('ids', 'offsets', 'first'):
    ours, theirs = (getattr(one, name) for one in (rows, made.passages))
    np.testing.assert_array_equal(ours, theirs)
  assert (made.passages.first is None) == (chunks == 1)
  for side, encoder, token_rows, found in (
    ('query', retriever.query_encoder, made.queries['dev'],
     retriever.encode_queries(QUERIES)),
    ('passage', retriever.passage_encoder, made.passages.pieces(),
     retriever.encode_passages(TEXTS, TITLES)),
  ):  # fmt: skip
    expected, _ = encoding.encode_rows(
      encoder, retriever.params, token_rows, side
    )
    np.testing.assert_array_equal(found, expected)


def test_a_prompt_a_title_and_the_side_make_a_difference(model):
  retriever = retriever_lib.make(model, devices.local(1))
  plain = dataclasses.replace(model.config, query_prompt='', passage_prompt='')
  other = retriever_lib.make(model._replace(config=plain), devices.local(1))
  found = [
    retriever.encode_passages(TEXTS[:1], TITLES[:1]),
    retriever.encode_passages(TEXTS[:1]),
    retriever.encode_queries(TEXTS[:1]),
    other.encode_passages(TEXTS[:1]),
  ]
  # Untied towers start equal.
  assert len({array.round(5).tobytes() for array in found}) == 4
  np.testing.assert_array_equal(
    other.encode_queries(TEXTS[:1]), other.encode_passages(TEXTS[:1])
  )


def test_on_other_devices_it_encodes_the_same_with_their_parameters(
  model, monkeypatch
):
  settings = encoding.Settings('bfloat16', 64, chunks=2, kernel=False)
  made, real = [], encoding.bi_encoder.make_encode

  def make_encode(config, dtype, side, kernel):
    made.append((dtype, kernel))
    return real(config, dtype, side, kernel=kernel)

  monkeypatch.setattr(encoding.bi_encoder, 'make_encode', make_encode)
  retriever = retriever_lib.make(model, devices.local(1), settings)
  there = retriever.on_devices(devices.local(2))
  assert there.params is None
  assert there.settings == settings
  assert there.passage_encoder.tokens_per_batch == 64
  assert made == [('bfloat16', False)] * 4
  there = there.with_params(devices.replicate(model.params, there.devices))
  np.testing.assert_allclose(
    there.encode_queries(QUERIES), retriever.encode_queries(QUERIES), atol=1e-6
  )


def test_pieces_without_the_prompt_that_is_not_pooled_are_refused(model):
  config = dataclasses.replace(model.config, include_prompt=False)
  retriever_lib.check_chunks(config, 1)
  retriever_lib.check_chunks(model.config, 2)
  retriever_lib.check_chunks(dataclasses.replace(config, passage_prompt=''), 2)
  with pytest.raises(errors.BadInput, match='--chunks=2 only the first piece'):
    retriever_lib.make(
      model._replace(config=config),
      devices.local(1),
      encoding.Settings(chunks=2),
    )


def test_no_text_has_no_embedding(model):
  retriever = retriever_lib.make(model, devices.local(1))
  assert retriever.encode_queries([]).shape == (0, 16)
