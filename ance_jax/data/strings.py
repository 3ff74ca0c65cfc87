"""Large lists of strings in little memory, and row lookup by id."""

import array
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import itertools
import pathlib
import tempfile
from typing import Any

import numpy as np

# Bytes of a blob kept in memory.
_MAX_BLOB = 2**27
_BLOB_FILE, _OFFSETS_FILE = 'texts.bin', 'offsets.npy'


def make(items: Iterable[str]) -> 'Strings':
  """Returns the items as `Strings`."""
  writer = Writer()
  for item in items:
    writer.add(item)
  return writer.done()


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
  """Yields lists of `size` items; the last may be shorter."""
  items = iter(items)
  while batch := list(itertools.islice(items, size)):
    yield batch


def load(folder: pathlib.Path) -> 'Strings':
  """Loads a `Strings` saved by `Strings.save`, with the blob memory-mapped."""
  offsets = np.load(folder / _OFFSETS_FILE)
  blob = np.memmap(folder / _BLOB_FILE, np.uint8, 'r') if offsets[-1] else b''
  return Strings(blob, offsets)


def hashed(text: str) -> int:
  """Returns a 64-bit hash of a string, different in each process."""
  return hash(text)


class Strings:
  """An immutable list of strings, stored as one UTF-8 blob and offsets.

  21M Python strings would take several times the memory of their text. A large
  blob is memory-mapped from a temporary file in $TMPDIR.

  Args:
    blob: Bytes, or a memory map of them.
    offsets: (N + 1,) int64.
  """

  def __init__(self, blob: bytes | np.ndarray, offsets: np.ndarray):
    self._blob, self._offsets = blob, offsets

  def __len__(self):
    return len(self._offsets) - 1

  def __getitem__(self, row):
    if not 0 <= row < len(self):
      raise IndexError(row)
    start, end = self._offsets[row : row + 2]
    return bytes(self._blob[start:end]).decode()

  def save(self, folder: pathlib.Path) -> None:
    """Writes both arrays into a folder; `load` reads them."""
    np.asarray(memoryview(self._blob)).tofile(folder / _BLOB_FILE)
    np.save(folder / _OFFSETS_FILE, self._offsets)

  def update_hash(self, digest: Any) -> None:
    """Feeds the strings and their boundaries to a hashlib object."""
    digest.update(self._offsets)
    digest.update(self._blob)


class Rows:
  """Maps many ids to rows, in two arrays; has `get` and `in` of a dict.

  Args:
    ids: All ids, in row order.
    hashes: (N,) int64, `hashed` of each id.
  """

  def __init__(self, ids: Strings, hashes: np.ndarray):
    self._ids = ids
    self._order = np.argsort(hashes, kind='stable')
    self._hashes = hashes[self._order]

  def get(self, an_id: str, default: Any = None) -> Any:
    """Returns the first row of an id, or `default`."""
    wanted = hashed(an_id)
    place = int(np.searchsorted(self._hashes, np.int64(wanted)))
    while place < len(self._hashes) and self._hashes[place] == wanted:
      row = int(self._order[place])
      if self._ids[row] == an_id:
        return row
      place += 1
    return default

  def many(self, ids: Sequence[str]) -> np.ndarray:
    """Returns the (n,) int64 first rows of n ids; -1 for unknown ids.

    Four times as fast as looking them up one by one.
    """
    hashes = np.fromiter(map(hashed, ids), np.int64, len(ids))
    places = np.searchsorted(self._hashes, hashes)
    rows = self._order[np.minimum(places, len(self._order) - 1)]
    for place, (an_id, row) in enumerate(zip(ids, rows.tolist(), strict=True)):
      if self._ids[row] != an_id:
        rows[place] = self.get(an_id, -1)
    return rows

  def __contains__(self, an_id):
    return self.get(an_id) is not None

  def repeated(self) -> tuple[int, int] | None:
    """Returns the first two rows with the same id, or None."""
    again = self._order[1:][self._hashes[1:] == self._hashes[:-1]]
    for row in np.sort(again).tolist():
      first = self.get(self._ids[row])
      if first != row:
        return first, row
    return None


class Writer:
  """Collects strings in a blob, which spills to a file when it gets large."""

  def __init__(self):
    self._blob, self._ends = bytearray(), array.array('q', [0])
    self._file, self._written = None, 0

  def add(self, text: str) -> None:
    """Adds the next string."""
    # Half a surrogate pair is valid JSON but not UTF-8.
    self._blob += text.encode('utf-8', 'replace')
    self._ends.append(self._written + len(self._blob))
    if len(self._blob) > _MAX_BLOB:
      self._flush()

  def done(self) -> Strings:
    """Returns all added strings."""
    offsets = np.array(self._ends, np.int64)
    if self._file is None:
      return Strings(bytes(self._blob), offsets)
    self._flush()
    with self._file:  # The map keeps the unnamed file alive.
      return Strings(np.memmap(self._file, np.uint8, 'r'), offsets)

  def _flush(self):
    self._file = self._file or tempfile.TemporaryFile()
    self._file.write(self._blob)
    self._file.flush()
    self._written += len(self._blob)
    self._blob = bytearray()
