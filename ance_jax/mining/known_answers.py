"""Caches which passages hold an answer of which query.

Answers never change, and successive refreshes have mostly the same candidates;
matching them takes longer than the search.
"""

from collections.abc import Callable
import hashlib
import json
import pathlib

import numpy as np

from ance_jax.core import atomic
from ance_jax.data import corpus as corpus_lib

# A key and a bool per pair.
BYTES_PER_PAIR = 9
# Maximum number of pairs to keep, as a multiple of the pairs of one refresh of
# all queries.
MOST = 8


class KnownAnswers:
  """Asks a matcher about pairs that are new, as `miner.Task.holds_answer`."""

  def __init__(
    self,
    matcher: Callable[[np.ndarray, np.ndarray], np.ndarray],
    folder: pathlib.Path,
    corpus: corpus_lib.Corpus,
    split: corpus_lib.Split,
  ):
    """Loads what was saved about the same texts and answers.

    Args:
      matcher: matcher((q,) query rows, (q, K) passage rows, -1 for none) ->
        (q, K) bool.
      folder: Folder to save to.
      corpus: The corpus.
      split: The queries.
    """
    self._matcher, self._folder = matcher, folder
    answers = list(map(list, split.answers))
    text = json.dumps([split.answers_are_patterns, list(split.ids), answers])
    answers = hashlib.sha256(text.encode()).hexdigest()
    self._about = {'format': 1, 'corpus': corpus.hash, 'answers': answers}
    self._num_queries = len(split.ids)
    self._keys, self._held = np.zeros(0, np.int64), np.zeros(0, bool)
    if atomic.find_valid(folder, self._about):
      # Not memory-mapped, as the file may be replaced.
      self._keys = np.array(atomic.load_array(folder / 'keys.npy'))
      self._held = np.array(atomic.load_array(folder / 'held.npy'))
    self._asked, self._is_new = [], False

  def __call__(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns whether each passage holds an answer of its query.

    Args:
      queries: (q,) query rows.
      rows: (q, K) passage rows, -1 for none.
    """
    keys = (queries.astype(np.int64)[:, None] << 32) + rows
    places = np.searchsorted(self._keys, keys)
    places = np.minimum(places, len(self._keys) - 1)
    known = np.zeros(rows.shape, bool)
    held = np.zeros(rows.shape, bool)
    if len(self._keys):
      known = (self._keys[places] == keys) & (rows >= 0)
      held[known] = self._held[places[known]]
    asked = (rows >= 0) & ~known
    if asked.any():
      found = self._matcher(queries, np.where(asked, rows, -1))
      held[asked] = found[asked]
      self._is_new = True
    there = rows >= 0
    self._asked.append((keys[there], held[there]))
    return held

  def save(self) -> None:
    """Publishes all known pairs if any of them is new."""
    if not self._is_new:
      return
    asked = _joined(self._asked)
    joined = _joined([(self._keys, self._held), asked])
    num_queries = len(np.unique(asked[0] >> 32))
    most = MOST * len(asked[0]) * self._num_queries // num_queries
    self._keys, self._held = joined if len(joined[0]) <= most else asked
    self._asked, self._is_new = [], False
    with atomic.publish(self._folder, self._about) as unfinished:
      np.save(unfinished / 'keys.npy', self._keys)
      np.save(unfinished / 'held.npy', self._held)


def _joined(tables):
  """Returns the sorted, unique keys of all tables, and their values."""
  keys, held = zip(*tables, strict=True)
  keys, first = np.unique(np.concatenate(keys), return_index=True)
  return keys, np.concatenate(held)[first]
