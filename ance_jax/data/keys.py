"""Finds equal texts, up to case and white space, by hashing them.

Equal texts have equal keys. No text is kept in memory.
"""

from collections.abc import Iterable
import hashlib

import numpy as np

# Bytes of a key and of its start; starts are compared between queries and
# passages.
BYTES, _START = 12, 8
_ROWS_AT_ONCE = 2**20


def of_passage(title: str, text: str) -> tuple[bytes, bytes]:
  """Returns the key of a text, and the starts of two keys, joined.

  Returns:
    The key of the text; the start of that key followed by the start of the key
    of title and text. `as_starts` decodes the second.
  """
  text = _normal(text)
  key = whole = _key(text)
  if title:  # `TITLE_PART` counts as white space, too.
    whole = _key(f'{_normal(title)} {text}'.strip())
  return key, key[:_START] + whole[:_START]


def as_starts(written: bytes | bytearray) -> np.ndarray:
  """Decodes joined starts from `of_passage` into an (N, 2) int64 array."""
  return np.frombuffer(written, np.int64).reshape(-1, 2)


def of_texts(texts: Iterable[str]) -> np.ndarray:
  """Returns the start of each text's key, (n,) int64."""
  return np.frombuffer(
    b''.join(_key(_normal(text))[:_START] for text in texts), np.int64
  )


def hash64(text: str) -> int:
  """Returns a hash below 2**64 of an id or name, the same on every machine."""
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest)


def groups(texts: Iterable[str]) -> np.ndarray:
  """Returns a group number per text, (n,) int32, equal for equal texts."""
  return np.unique(of_texts(texts), return_inverse=True)[1].astype(np.int32)


def found(texts: Iterable[str], starts: np.ndarray) -> np.ndarray:
  """Finds passages whose text, or title and text, equals a query.

  Args:
    texts: Texts of Q queries.
    starts: (N, 2) int64, from `as_starts`.

  Returns:
    (2, S) int32 query rows and passage rows, ascending.
  """
  keys, numbers = np.unique(of_texts(texts), return_inverse=True)
  pairs = [np.zeros((2, 0), np.int64)]
  for start in range(0, len(starts), _ROWS_AT_ONCE):
    block = starts[start : start + _ROWS_AT_ONCE]
    places = np.minimum(np.searchsorted(keys, block), len(keys) - 1)
    rows, columns = np.nonzero(keys[places] == block)
    pairs.append(np.stack([places[rows, columns], start + rows]))
  number, passages = np.concatenate(pairs, 1)
  places, queries = _members(numbers, number)
  return unique_pairs(queries, passages[places])


def share(
  queries: np.ndarray, passages: np.ndarray, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Copies the passages of each query to all queries with the same text.

  Args:
    queries: (P,) int32 query rows, sorted.
    passages: (P,) int32 passage rows.
    numbers: (Q,) int32, equal for queries with the same text.

  Returns:
    (R,) int32 query rows, sorted, and (R,) int32 passage rows, each pair once;
    a query's own passages come first, in their order.
  """
  places, others = _members(numbers, numbers[queries])
  queries = np.append(queries, others.astype(np.int32))
  passages = np.append(passages, passages[places])
  first = first_of_pairs(queries, passages)
  return queries[first], passages[first]


def first_of_pairs(queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
  """Returns the indices of distinct pairs, each the first of its equals.

  Args:
    queries: (R,) int query rows, from 0.
    passages: (R,) int passage rows, from 0.

  Returns:
    (S,) int indices, grouped by query and ascending within a query.
  """
  both = queries.astype(np.int64) << 32 | passages
  first = np.sort(np.unique(both, return_index=True)[1])
  return first[np.argsort(queries[first], kind='stable')]


def unique_pairs(queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
  """Returns the distinct (query, passage) row pairs, (2, S) int32, sorted."""
  both = np.unique(queries.astype(np.int64) << 32 | passages)
  return np.stack([both >> 32, both & 0xFFFFFFFF]).astype(np.int32)


def _members(numbers, wanted):
  """Looks up the items that have each wanted number.

  Args:
    numbers: (n,) int, number of each item.
    wanted: (m,) int numbers, possibly repeated.

  Returns:
    (r,) int indices into `wanted`, ascending, and (r,) int indices into
    `numbers` of items with that number.
  """
  sizes = np.bincount(numbers)
  counts = sizes[wanted]
  places = np.repeat(np.arange(len(wanted)), counts)
  within = np.arange(len(places)) - (np.cumsum(counts) - counts)[places]
  first = (np.cumsum(sizes) - sizes)[wanted]
  return places, np.argsort(numbers, kind='stable')[first[places] + within]


def _normal(text):
  return ' '.join(text.lower().split())


def _key(normal):
  # Half a surrogate pair is valid JSON but not UTF-8.
  return hashlib.blake2b(
    normal.encode('utf-8', 'replace'), digest_size=BYTES
  ).digest()
