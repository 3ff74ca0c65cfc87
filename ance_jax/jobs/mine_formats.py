"""The forms that others train on: hard negatives -> bytes of a file.

Each form is a function of one query that yields JSON objects; they come one
after the other, so that no more than a batch is in memory.
"""

import json
import math
from typing import NamedTuple

from ance_jax.data import corpus as corpus_lib
from ance_jax.jobs import forms


class Example(NamedTuple):
  """One query with its positives and its negatives.

  Attributes:
    query_id: Its id.
    query: Its text.
    answers: List of strings, empty where there are none.
    positives: List of (passage row, score), as they were judged for it or, but
      in forms of pairs, for a query of the same text; a score that is not known
      is NaN or infinite.
    negatives: The same, by rank, at least one; what was drawn at random last.
  """

  query_id: str
  query: str
  answers: list[str]
  positives: list[tuple[int, float]]
  negatives: list[tuple[int, float]]


def triplets(example, corpus):
  """Yields sentence-transformers' triplets: a line for each pair of both."""
  for positive, _ in example.positives:
    for negative, _ in example.negatives:
      yield {
        'anchor': example.query,
        'positive': corpus_lib.whole_text(corpus, positive),
        'negative': corpus_lib.whole_text(corpus, negative),
      }


def n_tuples(example, corpus):
  """Yields sentence-transformers' n-tuples: a line for each positive."""
  negatives = {
    f'negative_{number}': corpus_lib.whole_text(corpus, row)
    for number, (row, _) in enumerate(example.negatives, 1)
  }
  for positive, _ in example.positives:
    yield {
      'anchor': example.query,
      'positive': corpus_lib.whole_text(corpus, positive),
      **negatives,
    }


def triplets_scored(example, corpus):
  """Yields `triplets` with the two scores, as MarginMSELoss takes them."""
  for positive in example.positives:
    for negative in example.negatives:
      pair = example._replace(positives=[positive], negatives=[negative])
      (line,) = triplets(pair, corpus)
      # `mine_hard_negatives` of 6 names it scores, that of 5.1 score; only the
      # latter is a label to the trainers of both.
      yield {**line, 'score': [positive[1], negative[1]]}


def n_tuples_scored(example, corpus):
  """Yields `n_tuples` with a list of scores, the positive's first.

  For MarginMSELoss and DistillKLDivLoss; the name is explained above.
  """
  negatives = [score for _, score in example.negatives]
  lines = n_tuples(example, corpus)
  for line, (_, score) in zip(lines, example.positives, strict=True):
    yield {**line, 'score': [score, *negatives]}


def flag_embedding(example, corpus):
  """Yields the line of FlagEmbedding (examples/finetune/embedder/README.md).

  Without its scores where one is not known: its distillation refuses null.
  """
  line = {'query': example.query}
  kinds = {'pos': example.positives, 'neg': example.negatives}
  for name, found in kinds.items():
    line[name] = [corpus_lib.whole_text(corpus, row) for row, _ in found]
  scores = {
    f'{name}_scores': [_known(score) for _, score in found]
    for name, found in kinds.items()
  }
  yield line if None in sum(scores.values(), []) else line | scores


def dpr(example, corpus):
  """Yields DPR's question (Karpukhin et al. 2020, README of their data)."""
  contexts = [
    [
      {
        'title': corpus_lib.whole_title(corpus, row),
        'text': corpus.texts[row],
        'score': _known(score),
        'passage_id': corpus.ids[row],
      }
      for row, score in found
    ]
    for found in (example.positives, example.negatives)
  ]
  yield {
    'question': example.query,
    'answers': example.answers,
    'positive_ctxs': contexts[0],
    'negative_ctxs': [],
    'hard_negative_ctxs': contexts[1],
  }


def tevatron(example, corpus):
  """Yields Tevatron's line, as in Tevatron/msmarco-passage; without scores."""
  passages = [
    [
      {
        'docid': corpus.ids[row],
        'title': corpus_lib.whole_title(corpus, row),
        'text': corpus.texts[row],
      }
      for row, _ in found
    ]
    for found in (example.positives, example.negatives)
  ]
  yield {
    'query_id': example.query_id,
    'query': example.query,
    'positive_passages': passages[0],
    'negative_passages': passages[1],
  }


def ids(example, corpus):
  """Yields ids and scores alone; null is a score that is not known."""
  yield {
    'query_id': example.query_id,
    'positive_ids': [corpus.ids[row] for row, _ in example.positives],
    'positive_scores': [_known(score) for _, score in example.positives],
    'negative_ids': [corpus.ids[row] for row, _ in example.negatives],
    'negative_scores': [_known(score) for _, score in example.negatives],
  }


def encoded(name, examples, corpus):
  """Yields the bytes of a file in a form, an object a piece.

  Args:
    name: Of a row of `forms.FORMS`.
    examples: Iterable of `Example`, one at least.
    corpus: `corpus.Corpus`.
  """
  is_array, make = forms.FORMS[name].array, globals()[name]
  before, after = (b'[\n', b'\n]\n') if is_array else (b'', b'\n')
  between = b',\n' if is_array else b'\n'
  for example in examples:
    for item in make(example, corpus):
      yield before + json.dumps(item, ensure_ascii=False).encode()
      before = between
  yield after


def _known(score):
  return float(score) if math.isfinite(score) else None
