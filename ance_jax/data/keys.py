"""Which texts are equal: in lower case, with one space between words.

A text has a key; of equal keys, texts are equal. No text is held.
"""

import hashlib

import numpy as np

# Of a key, and of its start, which tells queries and passages apart.
BYTES, _START = 12, 8
_ROWS_AT_ONCE = 2**20


def of_passage(title, text):
  """Returns the key of a text, and the starts of its own and of title and text.

  Returns:
    Two bytes objects; `as_starts` reads the second.
  """
  text = _normal(text)
  key = whole = _key(text)
  if title:  # Its separators are white space, too.
    whole = _key(f'{_normal(title)} {text}'.strip())
  return key, key[:_START] + whole[:_START]


def as_starts(written):
  """Returns the (N, 2) int64 starts that `of_passage` gave, as an array."""
  return np.frombuffer(written, np.int64).reshape(-1, 2)


def of_texts(texts):
  """Returns the start of the key of each text, (n,) int64."""
  return np.frombuffer(
    b''.join(_key(_normal(text))[:_START] for text in texts), np.int64
  )


def groups(texts):
  """Returns the (n,) int32 numbers of texts, equal for equal texts."""
  return np.unique(of_texts(texts), return_inverse=True)[1].astype(np.int32)


def found(texts, starts):
  """Returns which passages have the text of a query, or it as title and text.

  Args:
    texts: Those of Q queries.
    starts: (N, 2) int64, as `as_starts` returns them.

  Returns:
    (2, S) int32, query rows and passage rows, rising.
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


def share(queries, passages, numbers):
  """Returns pairs, each once for every query of the same text, by query.

  Args:
    queries: (P,) int32 query rows, sorted.
    passages: (P,) int32 passage rows.
    numbers: (Q,) int32, equal for queries of the same text.

  Returns:
    (R,) int32 query rows, sorted, and passage rows; a query's own come first,
    in their order.
  """
  places, others = _members(numbers, numbers[queries])
  queries = np.append(queries, others.astype(np.int32))
  passages = np.append(passages, passages[places])
  both = queries.astype(np.int64) << 32 | passages
  first = np.sort(np.unique(both, return_index=True)[1])
  first = first[np.argsort(queries[first], kind='stable')]
  return queries[first], passages[first]


def unique_pairs(queries, passages):
  """Returns each pair of query and passage rows once, (2, S) int32, rising."""
  both = np.unique(queries.astype(np.int64) << 32 | passages)
  return np.stack([both >> 32, both & 0xFFFFFFFF]).astype(np.int32)


def _members(numbers, wanted):
  """Returns all that have some numbers, and which of these each one has.

  Args:
    numbers: (n,) int, number of each.
    wanted: (m,) int numbers, perhaps some of them more than once.

  Returns:
    (r,) int places in `wanted`, rising, and what has the number there.
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
  # Half of a surrogate pair is valid JSON but not UTF-8.
  normal = normal.encode('utf-8', 'replace')
  return hashlib.blake2b(normal, digest_size=BYTES).digest()
