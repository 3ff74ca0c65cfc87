"""Encodes hard negatives in the file formats of other trainers.

Each format is a generator of the JSON objects of one query, so that the file is
never in memory as a whole.
"""

from collections.abc import Iterable
from collections.abc import Iterator
import json
import math
from typing import Any
from typing import NamedTuple

from ance_jax.data import corpus as corpus_lib
from ance_jax.jobs import forms


class Example(NamedTuple):
  """One query with its positives and its negatives.

  Attributes:
    query_id: Id of the query.
    query: Text of the query.
    answers: Answers, possibly none.
    positives: (passage row, score) pairs that were judged for the query or,
      except in formats of pairs, for a query of the same text. Unknown scores
      are NaN or infinite.
    negatives: (passage row, score) pairs by rank, at least one; random draws
      come last.
  """

  query_id: str
  query: str
  answers: list[str]
  positives: list[tuple[int, float]]
  negatives: list[tuple[int, float]]


def triplets(
  example: Example, corpus: corpus_lib.Corpus
) -> Iterator[dict[str, Any]]:
  """Yields sentence-transformers' triplets, one per positive and negative."""
  for line in triplets_scored(example, corpus):
    yield {name: line[name] for name in ('anchor', 'positive', 'negative')}


def n_tuples(
  example: Example, corpus: corpus_lib.Corpus
) -> Iterator[dict[str, Any]]:
  """Yields sentence-transformers' n-tuples, one per positive."""
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


def triplets_scored(
  example: Example, corpus: corpus_lib.Corpus
) -> Iterator[dict[str, Any]]:
  """Yields `triplets` with their two scores, for MarginMSELoss."""
  for positive, its_score in example.positives:
    for negative, score in example.negatives:
      yield {
        'anchor': example.query,
        'positive': corpus_lib.whole_text(corpus, positive),
        'negative': corpus_lib.whole_text(corpus, negative),
        # `mine_hard_negatives` names it scores in release 6 and score in 5.1;
        # the trainers of both releases accept only score as a label.
        'score': [its_score, score],
      }


def n_tuples_scored(
  example: Example, corpus: corpus_lib.Corpus
) -> Iterator[dict[str, Any]]:
  """Yields `n_tuples` with a list of scores, the positive's first.

  For MarginMSELoss and DistillKLDivLoss; `triplets_scored` explains the name.
  """
  negatives = [score for _, score in example.negatives]
  lines = n_tuples(example, corpus)
  for line, (_, score) in zip(lines, example.positives, strict=True):
    yield {**line, 'score': [score, *negatives]}


def flag_embedding(
  example: Example, corpus: corpus_lib.Corpus
) -> Iterator[dict[str, Any]]:
  """Yields FlagEmbedding's line (examples/finetune/embedder/README.md).

  Omits all scores if one is unknown, because its distillation rejects null.
  """
  line = {
    'query': example.query,
    'pos': [corpus_lib.whole_text(corpus, row) for row, _ in example.positives],
    'neg': [corpus_lib.whole_text(corpus, row) for row, _ in example.negatives],
  }
  scores = {
    'pos_scores': [_known(score) for _, score in example.positives],
    'neg_scores': [_known(score) for _, score in example.negatives],
  }
  yield line if None in sum(scores.values(), []) else line | scores


def dpr(
  example: Example, corpus: corpus_lib.Corpus
) -> Iterator[dict[str, Any]]:
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


def tevatron(
  example: Example, corpus: corpus_lib.Corpus
) -> Iterator[dict[str, Any]]:
  """Yields Tevatron's line, as in Tevatron/msmarco-passage, without scores."""
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


def ids(
  example: Example, corpus: corpus_lib.Corpus
) -> Iterator[dict[str, Any]]:
  """Yields ids and scores, with null for unknown scores."""
  yield {
    'query_id': example.query_id,
    'positive_ids': [corpus.ids[row] for row, _ in example.positives],
    'positive_scores': [_known(score) for _, score in example.positives],
    'negative_ids': [corpus.ids[row] for row, _ in example.negatives],
    'negative_scores': [_known(score) for _, score in example.negatives],
  }


def encoded(
  name: str, examples: Iterable[Example], corpus: corpus_lib.Corpus
) -> Iterator[bytes]:
  """Yields the bytes of a file, one object at a time.

  Args:
    name: Name of a format, a key of `forms.FORMS`.
    examples: At least one example.
    corpus: Corpus of the passage rows.
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
