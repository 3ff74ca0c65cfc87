"""Models, tokens, texts and folders that are made by a seed.

Nothing is read or downloaded. Lengths are log-normal, with a median of 0.6 of
the most tokens that a run allows, and cut there, as a run cuts: 13 % of the
texts are. They are those of no dataset, and neither are the words.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
import types

import numpy as np

from ance_jax import config
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.models import pretrained
from ance_jax.training import experiment

QUERY_LENGTH = 32
_SPREAD, _MEDIAN = 0.45, 0.6
_NUM_WORDS, _NUM_TOPICS = 20_000, 50


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How large everything is.

  Attributes:
    is_small: Whether these only show that the parts run.
    body: Layers, width, heads, inner width and vocabulary of the encoder.
    dtype: Type of the activations.
    lengths: Most tokens of a text, for encoding and for steps.
    tokens_per_batch: Of the encoding pass.
    passage_tokens: Of a step, over the length of a passage the number of pairs.
    rounds: Calls whose median is taken.
    pairs_to_fit: Pairs of 32 and 256 tokens, all of them as long as that.
    corpora: Passages to search, two numbers.
    queries: Queries to search with.
    texts: Texts to tokenize and encode.
    passages: Passages of a run.
    steps: Of a run with refreshes; a fifth of them is the time between two.
    batch: Queries of a step of such a run.
    matrix: Rows and columns of the product that is the peak.
  """

  is_small: bool = False
  body: tuple[int, ...] = (12, 768, 12, 3072, 30_522)
  dtype: str = 'bfloat16'
  lengths: tuple[int, ...] = (64, 128, 256, 512)
  tokens_per_batch: int = 131_072
  passage_tokens: int = 32_768
  rounds: int = 5
  pairs_to_fit: int = 512
  corpora: tuple[int, int] = (500_000, 1_000_000)
  queries: int = 100_000
  texts: int = 20_000
  passages: int = 16_000
  steps: int = 250
  batch: int = 128
  matrix: int = 8192


SMALL = Sizes(
  is_small=True,
  body=(2, 32, 2, 64, 1000),
  dtype='float32',
  lengths=(32, 64),
  tokens_per_batch=1024,
  passage_tokens=256,
  rounds=1,
  pairs_to_fit=4,
  corpora=(1000, 2000),
  queries=50,
  texts=64,
  passages=200,
  steps=25,
  batch=8,
  matrix=512,
)


def settings(sizes: Sizes, **changes: object) -> config.Config:
  """Returns the settings of steps of in-batch negatives."""
  base = config.Config(
    method='in_batch',
    pooling='mean',
    query_length=QUERY_LENGTH,
    passage_length=max(sizes.lengths),
    temperature=0.05,
    similarity='cosine',
    dtype=sizes.dtype,
    optimizer='adamw',
    learning_rate=2e-5,
    weight_decay=0.01,
    lr_warmup_steps=0,
    max_steps=1000,
  )
  return dataclasses.replace(base, **changes)


def run_settings(
  sizes: Sizes, folder: pathlib.Path, **changes: object
) -> config.Config:
  """Returns the settings of a run on the data of `write_beir`."""
  layers, width, heads, inner, _ = sizes.body
  of_a_run = settings(
    sizes,
    dataset='beir',
    data_dir=str(folder),
    num_devices=1,
    num_layers=layers,
    hidden_size=width,
    num_heads=heads,
    intermediate_size=inner,
    vocab_size=1000 if sizes.is_small else 8192,
    # Where attention weights are dropped, cuDNN's kernel is not used.
    attention_dropout_rate=0.0,
    passage_length=32 if sizes.is_small else 128,
    batch_size=sizes.batch,
    tokens_per_batch=sizes.tokens_per_batch,
    warmup_method='in_batch',
    num_hard_negatives=1,
    top_k=50,
  )
  return dataclasses.replace(of_a_run, **changes)


def retriever(sizes: Sizes, tied: bool = True) -> bi_encoder.RetrieverConfig:
  """Returns the settings of a retriever with mean pooling and cosines."""
  layers, width, heads, inner, vocabulary = sizes.body
  body = bert.BodyConfig(
    'bert', vocabulary, width, layers, heads, inner, 512, 2, 1e-12, 'gelu'
  )
  return bi_encoder.RetrieverConfig(
    body,
    tied=tied,
    pooling='mean',
    head_size=0,
    head_norm=True,
    similarity='cosine',
    query_length=QUERY_LENGTH,
    passage_length=max(sizes.lengths),
    title_separator=' ',
  )


@functools.cache
def peer() -> types.ModuleType | None:
  """Returns the module of torch's side, None where torch is missing."""
  try:
    return importlib.import_module('torch_peer')
  except ImportError as error:
    print(f'without the columns of torch: {error}')
    return None


@functools.cache
def tokenizer(sizes: Sizes) -> tokenizer_lib.Tokenizer:
  """Returns a tokenizer trained on made texts."""
  found = tokenizer_lib.train_vocabulary(
    texts(min(sizes.texts, 5000), seed=1), sizes.body[-1]
  )
  found.model_max_length = 512
  return found


@functools.cache
def model(sizes: Sizes, work: pathlib.Path) -> pretrained.Model:
  """Returns an encoder of random weights, torch's own where torch is there.

  Torch then finds it in the folder `model_folder(work)`.
  """
  if (torch_peer := peer()) is None:
    one = retriever(sizes)
    return pretrained.Model(one, tokenizer(sizes), bi_encoder.init(one, 0))
  folder = model_folder(work)
  tokenizer(sizes).save_pretrained(folder)
  torch_peer.write_model(folder, *sizes.body)
  return experiment.load_model(settings(sizes, init_from=folder), ())


def model_folder(work: pathlib.Path) -> str:
  """Returns the folder of the model, in a folder to work in."""
  return str(work / 'model')


def token_rows(
  sizes: Sizes, number: int, most: int, seed: int, shortest: int = 0
) -> tokens.TokenRows:
  """Returns texts of random tokens, of lengths as above.

  Args:
    sizes: For the vocabulary.
    number: Texts.
    most: Most tokens of a text.
    seed: Of tokens and lengths.
    shortest: Draw lengths evenly from here to `most`; 0 for lengths as above.
  """
  random = np.random.default_rng(seed)
  if shortest:
    lengths = random.integers(shortest, most + 1, number)
  else:
    lengths = _lengths(random, number, most)
  offsets = np.append(0, np.cumsum(lengths))
  ids = random.integers(5, sizes.body[-1], offsets[-1]).astype(np.uint16)
  return tokens.TokenRows(ids, offsets, 0, '')


def texts(number: int, seed: int = 0, most: int = 100) -> list[str]:
  """Returns texts of made words, common ones first in falling frequency."""
  random = np.random.default_rng(seed)
  letters = np.array([*'aeioubcdfghklmnprst'])
  words = [
    ''.join(letters[np.random.default_rng(n).integers(19, size=2 + n % 8)])
    for n in range(_NUM_WORDS)
  ]
  lengths = _lengths(random, number, most)
  ranks = (_NUM_WORDS ** random.random(lengths.sum())).astype(int) - 1
  found, start = [], 0
  for length in lengths.tolist():
    found.append(' '.join(words[r] for r in ranks[start : start + length]))
    start += length
  return found


@functools.lru_cache(maxsize=1)
def embeddings(number: int, width: int) -> np.ndarray:
  """Returns (number, width) float32 vectors of about length 1."""
  random = np.random.default_rng(0)
  found = random.random((number, width), np.float32)
  found -= np.float32(0.5)
  found *= np.float32((12 / width) ** 0.5)
  return found


def write_beir(folder: pathlib.Path, num_passages: int) -> pathlib.Path:
  """Writes a BEIR folder whose texts are words of topics; returns it.

  One passage of four has a training query, one of forty a query of dev.
  """
  random = np.random.default_rng(0)
  topics = random.integers(_NUM_TOPICS, size=num_passages)
  passages = [
    ' '.join(f't{topic}w{w}' for w in random.integers(200, size=length))
    for topic, length in zip(
      topics.tolist(), _lengths(random, num_passages, 60), strict=True
    )
  ]
  rows = np.arange(0, num_passages, 4)
  queries = [
    ' '.join(random.choice(passages[row].split(), 4)) for row in rows.tolist()
  ]
  (folder / 'qrels').mkdir(parents=True)
  for name, prefix, lines in (
    ('corpus', 'p', passages),
    ('queries', 'q', queries),
  ):
    records = (
      json.dumps({'_id': f'{prefix}{n}', 'text': text}) + '\n'
      for n, text in enumerate(lines)
    )
    (folder / f'{name}.jsonl').write_text(''.join(records))
  for split, there in (
    ('train', rows % 40 > 0),
    ('dev', rows % 40 == 0),
  ):
    lines = [f'q{n}\tp{rows[n]}\t1\n' for n in np.flatnonzero(there)]
    head = 'query-id\tcorpus-id\tscore\n'
    (folder / 'qrels' / f'{split}.tsv').write_text(head + ''.join(lines))
  return folder


def _lengths(random, number, most):
  found = np.exp(random.normal(np.log(_MEDIAN * most), _SPREAD, number))
  return np.clip(found, 3, most).astype(int)
