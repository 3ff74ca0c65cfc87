"""What holds an answer is asked once, and found again as it was."""

import collections

import numpy as np
import pytest

from ance_jax.mining import known_answers

Corpus = collections.namedtuple('Corpus', 'hash')
Split = collections.namedtuple('Split', 'answers_are_patterns ids answers')
CORPUS = Corpus('words')
SPLIT = Split(False, ['a', 'b', 'c', 'd'], [['x'], ['y'], ['z'], ['x', 'y']])
ABOUT = {
  'corpus': (Corpus('other'), SPLIT),
  'answers': (
    Corpus('words'),
    SPLIT._replace(answers=[['x'], ['y'], ['w'], ['x', 'y']]),
  ),
  'queries': (Corpus('words'), SPLIT._replace(ids=['a', 'b', 'd', 'c'])),
  'kind': (Corpus('words'), SPLIT._replace(answers_are_patterns=True)),
}


def truth(queries, rows):
  return (rows >= 0) & ((7 * queries[:, None] + 3 * rows) % 5 < 2)


@pytest.fixture
def memory(tmp_path):
  def memory(corpus=CORPUS, split=SPLIT):
    def matcher(queries, rows):
      pairs = np.argwhere(rows >= 0)
      made.asked += [(queries[q], rows[q, k]) for q, k in pairs]
      return truth(queries, rows)

    made = known_answers.KnownAnswers(
      matcher, tmp_path / 'answers', corpus, split
    )
    made.asked = []
    return made

  return memory


def ask(made, seed, width=30, most=40):
  """Asks about random pairs; returns those, without -1."""
  random = np.random.default_rng(seed)
  queries = np.array([2, 0, 3])
  rows = random.integers(-1, most, (3, width)).astype(np.int32)
  np.testing.assert_array_equal(made(queries, rows), truth(queries, rows))
  return {
    (q, row)
    for q, own in zip(queries, rows, strict=True)
    for row in own[own >= 0]
  }


def test_only_what_is_new_is_asked(memory):
  first = memory()
  seen = ask(first, 0)
  assert set(first.asked) == seen
  first.save()
  second = memory()
  more = ask(second, 1)
  assert seen & more
  assert set(second.asked) == more - seen
  second.save()
  third = memory()
  assert ask(third, 2) - seen - more == set(third.asked)
  assert ask(third, 0) | ask(third, 1) == seen | more
  assert not set(third.asked) & (seen | more)


def test_what_is_asked_twice_before_it_is_saved_is_saved_once(memory):
  first = memory()
  seen = ask(first, 0)
  ask(first, 0)
  first.save()
  second = memory()
  assert ask(second, 0) == seen
  assert not second.asked
  assert len(second._keys) == len(seen)


def test_of_too_many_pairs_those_asked_last_are_left(memory, monkeypatch):
  # Three of four queries are asked each time, so that 1.5 stands for 2.
  monkeypatch.setattr(known_answers, 'MOST', 1.5)
  first = memory()
  seen = ask(first, 0)
  first.save()
  second = memory()
  few = ask(second, 5, width=2, most=200)
  assert few - seen
  assert len(few | seen) > 2 * len(few)
  second.save()
  third = memory()
  ask(third, 0)
  assert set(third.asked) == seen - few
  fourth = memory()
  assert ask(fourth, 5, width=2, most=200) == few
  assert not fourth.asked


def test_the_limit_is_that_of_all_queries_where_some_are_asked(
  memory, monkeypatch
):
  monkeypatch.setattr(known_answers, 'MOST', 1.5)  # 2 for three of four.
  first = memory()
  seen = ask(first, 0)
  first.save()
  second = memory()
  more = ask(second, 1)
  assert 1.5 * len(more) < len(more | seen) <= 2 * len(more)
  second.save()
  third = memory()
  assert ask(third, 0) | ask(third, 1) == seen | more
  assert not third.asked


@pytest.mark.parametrize('what', ABOUT)
def test_other_texts_or_answers_are_asked_anew(what, memory):
  first = memory()
  seen = ask(first, 0)
  first.save()
  other = memory(*ABOUT[what])
  ask(other, 0)
  assert set(other.asked) == seen


def test_nothing_is_written_where_nothing_is_new(memory, tmp_path):
  first = memory()
  first.save()
  assert not (tmp_path / 'answers').exists()
  ask(first, 0)
  first.save()
  before = (tmp_path / 'answers' / 'keys.npy').stat().st_ino
  second = memory()
  ask(second, 0)
  second.save()
  assert (tmp_path / 'answers' / 'keys.npy').stat().st_ino == before


def test_a_damaged_file_is_made_again(memory, tmp_path, capsys):
  first = memory()
  seen = ask(first, 0)
  first.save()
  path = tmp_path / 'answers' / 'held.npy'
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  second = memory()
  ask(second, 0)
  assert set(second.asked) == seen


@pytest.mark.parametrize('row', [2**16, 2**31 - 1])
def test_a_pair_is_known_by_all_of_its_rows(row, tmp_path):
  """(0, 65,536) is not (1, 0), and there are no more rows than int32 holds."""
  asked = []

  def matcher(queries, rows):
    asked.append((queries.tolist(), rows.tolist()))
    return np.broadcast_to(queries[:, None] == 0, rows.shape)

  def ask(query, row):
    memory = known_answers.KnownAnswers(matcher, tmp_path, CORPUS, SPLIT)
    held = memory(np.array([query]), np.array([[row]], np.int32))
    memory.save()
    return held.tolist()

  assert ask(0, row) == [[True]]
  assert ask(1, 0) == ask(1, row) == [[False]]
  assert ask(0, row) == [[True]]
  assert asked == [([0], [[row]]), ([1], [[0]]), ([1], [[row]])]


def test_that_a_passage_holds_none_is_known_too(memory):
  queries, rows = np.array([0]), np.array([[4]], np.int32)
  assert not truth(queries, rows).any()
  for asked in ([(0, 4)], []):
    one = memory()
    assert not one(queries, rows).any()
    one.save()
    assert one.asked == asked
