"""The audit of what a model ranks high, on planted false negatives."""

import numpy as np

from ance_jax.data import corpus as corpus_lib
from ance_jax.data import strings
from ance_jax.jobs import audit

TEXTS = [
  'the one right passage of this very query here',  # 0: judged
  'the one right passage of this very query here',  # 1: same text
  'the one right passage of this very query here today',  # 2: nearly
  'another one with the Answer in it',  # 3
  'nothing of the kind',  # 4
  'nor this one',  # 5
]


def corpus_and_split():
  none = strings.make([''] * len(TEXTS))
  ids = strings.make(f'p{i}' for i in range(len(TEXTS)))
  groups = np.array([0, 0, 1, 2, 3, 4], np.int32)
  corpus = corpus_lib.Corpus(ids, none, strings.make(TEXTS), groups, '')
  split = corpus_lib.Split(
    strings.make(['q0', 'q1']),
    strings.make(['what', 'who']),
    np.array([0, 1, 2]),
    np.array([0, 5], np.int32),
    np.array([1, 1], np.int32),
    '',
    answers=[['the answer'], ['nobody']],
  )
  return corpus, split


def test_each_mark_is_on_what_was_planted():
  corpus, split = corpus_and_split()
  rows = np.array([[4, 3, 0, 1, 2, -1], [0, 5, 1, 2, 3, 4]], np.int32)
  marks = audit.marked(rows, np.array([0, 1]), split, corpus)
  found = {name: np.argwhere(mark).tolist() for name, mark in marks.items()}
  assert found == {
    'judged': [[0, 2], [1, 1]],
    'same text': [[0, 3]],
    'near-duplicate': [[0, 4]],
    'above the positive': [[0, 0], [0, 1], [1, 0]],
    'with an answer': [[0, 1]],
  }
  shares = audit.by_band(marks, rows)
  assert shares['above the positive'][0] == 3 / 11
  assert np.isnan(shares['judged'][1])
  # Where no positive was ranked, all is above it.
  none = audit.marked(np.array([[4, 3, 2]]), np.array([0]), split, corpus)
  assert none['above the positive'].all()


def test_a_query_that_is_a_passage_is_no_false_negative():
  corpus, split = corpus_and_split()
  # Of its own texts, 1 has that of a positive, and 2 nearly.
  own = split._replace(same_text=np.array([[0, 0, 0, 1], [1, 2, 4, 2]]))
  rows = np.array([[4, 3, 0, 2, 1], [2, 0, 4, 3, 1]], np.int32)
  marks = audit.marked(rows, np.array([0, 1]), own, corpus)
  assert np.argwhere(marks['own text']).tolist() == [[0, 0], [0, 3], [1, 0]]
  assert np.argwhere(marks['same text']).tolist() == [[0, 4]]
  above = np.argwhere(marks['above the positive']).tolist()
  assert above == [[0, 1], *([1, place] for place in (1, 2, 3, 4))]
  assert not marks['near-duplicate'].any()
  # Of some queries alone, each has its own.
  alone = audit.marked(rows[1:], np.array([1]), own, corpus)
  assert np.argwhere(alone['own text']).tolist() == [[0, 0]]
  # What is not there has no text, be it that of the last passage.
  last = split._replace(same_text=np.array([[0], [5]]))
  marks = audit.marked(np.array([[3, 5, -1]]), np.array([0]), last, corpus)
  assert marks['own text'].tolist() == [[False, True, False]]
  # The two queries have one text: the second's positive, 5, is the first's.
  twins = split._replace(groups=np.zeros(2, int))
  rows = np.array([[5, 4, 0, 1, 2]], np.int32)
  marks = audit.marked(rows, np.array([0]), twins, corpus)
  assert np.argwhere(marks['judged']).tolist() == [[0, 0], [0, 2]]
  assert not marks['above the positive'].any()
