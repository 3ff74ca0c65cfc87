"""Answers in texts: DPR's rule."""

import numpy as np
import pytest

from ance_jax import errors
from ance_jax.data import answers


def holds(text, answer):
  table = np.array([[0]], np.int32)
  return bool(answers.held(table, [[answer]], [text], False)[0, 0])


# Each as dpr/data/qa_validation.py decides it: tokens in a row, NFD, no case.
@pytest.mark.parametrize(
  ('text', 'answer', 'expected'),
  [
    ('Paris is the capital of France.', 'paris', True),
    ('Parisian streets', 'Paris', False),
    ('in the year 1,970', '970', True),
    ('in 1970', '970', False),
    ('The U.S. Senate', 'U.S. Senate', True),
    ('The US Senate', 'U.S. Senate', False),
    ('caf\u00e9 au lait', 'cafe\u0301', True),
    ('cafe au lait', 'caf\u00e9', False),
    ('New York City', 'new   york', True),
    ('York, New', 'New York', False),
    ('New-York', 'New York', False),
    ('the end', 'end', True),
    ('begin', 'begin', True),
    ('one\ntwo', 'one two', True),
  ],
)
def test_answer_is_a_row_of_tokens(text, answer, expected):
  assert holds(text, answer) == expected


def test_a_passage_may_hold_one_of_several_answers_of_its_query():
  texts = ['a red fox', 'a blue fox', 'a dog', 'red', 'a cat']
  rows = np.array([[3, 2, 0, 4], [0, 1, 2, 3], [0, -1, 3, -1]] * 2, np.int32)
  wanted = [['red'], ['green', 'fox'], ['red']]
  # Whichever of the answers matches.
  wanted += [own[::-1] for own in wanted]
  found = answers.held(rows, wanted, texts, False)
  assert found.astype(int).tolist() == [
    [1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0]
  ] * 2  # fmt: skip


@pytest.mark.parametrize(
  ('pattern', 'text', 'expected'),
  [
    ('caf\u00e9', 'the cafe\u0301', True),
    ('cafe\u0301', 'the caf\u00e9', True),
    ('CAF\u00c9$', 'the caf\u00e9', True),
    ('^b', 'a\nb', True),
    ('caf\u00e9', 'the cafe', False),
  ],
)
def test_patterns_and_texts_meet_in_one_unicode_form(pattern, text, expected):
  rows = np.array([[-1, 0]], np.int32)
  found = answers.held(rows, [[pattern]], [text], True)
  assert found.tolist() == [[False, expected]]


def test_a_pattern_that_takes_too_long_is_refused(monkeypatch):
  monkeypatch.setattr(answers, '_MAX_SECS', 0.1)
  with pytest.raises(errors.BadInput, match='answer .* 0.1 s in .* simpler'):
    answers.is_in('(a|aa)+$', 'a' * 60 + 'b')
