"""A cross-encoder here scores as sentence-transformers' CrossEncoder does."""

import dataclasses
import json
import pathlib

import bert_weights_test
import needs
import numpy as np
import pytest
import transformers

from ance_jax import config as config_lib
from ance_jax.core import devices
from ance_jax.jobs import mine
from ance_jax.retrieval import rerank

pytestmark = needs.torch
PAIRS = [
  (a, b) for a in bert_weights_test.TEXTS for b in bert_weights_test.TEXTS
]


def word_pieces(folder):
  """Saves a tokenizer of BERT's class, which gives token types."""
  special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']
  letters = sorted(
    {c for text in bert_weights_test.TEXTS for c in text.lower()}
  )
  pieces = [*special, *letters, *(f'##{letter}' for letter in letters)]
  transformers.BertTokenizer(
    vocab={piece: row for row, piece in enumerate(pieces)}
  ).save_pretrained(folder)


def make(kind, folder, activation='Sigmoid'):
  """Saves a small random cross-encoder, and returns the torch one."""
  import sentence_transformers
  import torch

  bert_weights_test.make_torch(kind, folder)
  if kind == 'bert':
    word_pieces(folder)
  config = transformers.AutoConfig.from_pretrained(folder, num_labels=1)
  model = transformers.AutoModelForSequenceClassification.from_config(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.3 * torch.randn(parameter.shape)
  model.save_pretrained(folder)
  theirs = sentence_transformers.CrossEncoder(
    str(folder),
    device='cpu',
    max_length=60,
    activation_fn=getattr(torch.nn, activation)(),
  )
  theirs.save_pretrained(str(folder))
  return theirs


def load(folder, num_devices=1, dtype='float32'):
  return rerank.load(
    str(folder),
    devices=devices.local(num_devices),
    dtype=dtype,
    tokens_per_batch=512,
  )


@pytest.mark.parametrize(
  ('kind', 'activation'),
  [
    *((kind, 'Identity') for kind in bert_weights_test.KINDS),
    ('bert', 'Sigmoid'),
  ],
)
def test_scores_are_those_of_torch(kind, activation, tmp_path, monkeypatch):
  theirs = make(kind, tmp_path, activation)
  monkeypatch.setattr(rerank, '_PAIRS_AT_ONCE', 20)
  score = load(tmp_path, 0)
  assert score([]).shape == (0,)
  scores = score(iter(PAIRS))
  expected = theirs.predict(PAIRS)
  assert scores.shape == (36,)
  assert np.ptp(expected) > 0.1
  np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('of_4', [False, True])
def test_older_folders_name_their_activation_elsewhere(of_4, tmp_path):
  theirs = make('distilbert', tmp_path, 'Identity')
  for name in ('modules.json', 'config_sentence_transformers.json'):
    (tmp_path / name).unlink()
  name = 'torch.nn.modules.linear.Identity'
  config = json.loads((tmp_path / 'config.json').read_text())
  if of_4:
    config['sentence_transformers'] = {'activation_fn': name}
  else:
    config['sbert_ce_default_activation_function'] = name
  (tmp_path / 'config.json').write_text(json.dumps(config))
  scores = load(tmp_path)(PAIRS)
  np.testing.assert_allclose(scores, theirs.predict(PAIRS), rtol=0, atol=1e-5)
  coarse = load(tmp_path, dtype='bfloat16')(PAIRS)
  assert 1e-4 < np.abs(coarse - scores).max() < 0.1


def test_a_cross_encoder_scores_what_other_filters_left(
  beir_folder, tmp_path, monkeypatch
):
  folder = tmp_path / 'encoder'
  folder.mkdir()
  theirs = make('bert', folder, 'Identity')
  real, asked = rerank.load, []

  def load(*args, **kwargs):
    score = real(*args, **kwargs)

    def noting(pairs):
      pairs = list(pairs)
      asked.extend(pairs)
      return score(pairs)

    return noting

  monkeypatch.setattr(rerank, 'load', load)
  config = config_lib.Config(
    cross_encoder=str(folder),
    compilation_cache_dir='',
    tokens_per_batch=512,
    rerank_max_score=1e9,
    job='mine',
    workdir=str(tmp_path / 'mined'),
    dataset='beir',
    data_dir=str(beir_folder),
    retriever='bm25',
    skip_ranks=1,
    max_rank=9,
    absolute_margin=0.1,
    format='triplets',
    num_devices=1,
  )
  every = _mined(
    config,
    cross_encoder='',
    rerank_max_score=None,
    workdir=str(tmp_path / 'plain'),
    num_negatives=8,
  )
  scores = dict(zip(every, theirs.predict(every), strict=True))
  # In the widest gap, so that rounding puts no score on its other side.
  ordered = np.sort(list(scores.values()))[10:-10]
  place = np.diff(ordered).argmax()
  most = float(ordered[place : place + 2].mean())
  assert np.diff(ordered)[place] > 1e-4
  found = _mined(config, rerank_max_score=most, num_negatives=8)
  assert sorted(set(asked)) == sorted(set(every))
  assert found == [pair for pair in every if scores[pair] <= most]
  assert 0 < len(found) < len(every)


def _mined(config, **changes):
  """Returns the (query, negative) that mining writes, each once, in order."""
  config = dataclasses.replace(config, **changes)
  mine.run(config)
  path = pathlib.Path(config.workdir, 'hard_negatives.triplets.jsonl')
  lines = map(json.loads, path.read_text().splitlines())
  pairs = [(line['anchor'], line['negative']) for line in lines]
  return list(dict.fromkeys(pairs))
