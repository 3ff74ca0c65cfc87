"""Many strings in little memory, and the rows of many ids."""

import array
import tempfile

import numpy as np

# Bytes of a blob in memory.
_MAX_BLOB = 2**27
_BLOB_FILE, _OFFSETS_FILE = 'texts.bin', 'offsets.npy'


def make(items):
  """Returns the `Strings` of an iterable."""
  writer = Writer()
  for item in items:
    writer.add(item)
  return writer.done()


def load(folder):
  """Returns the `Strings` that `Strings.save` wrote, the blob as a map."""
  offsets = np.load(folder / _OFFSETS_FILE)
  blob = np.memmap(folder / _BLOB_FILE, np.uint8, 'r') if offsets[-1] else b''
  return Strings(blob, offsets)


def hashed(text):
  """Returns 64 bits of a string; other ones in each process."""
  return hash(text)


class Strings:
  """An immutable list of strings in two arrays: one blob of UTF-8, offsets.

  21M Python strings take several times the memory of their text. A large blob
  lies in a temporary file ($TMPDIR), mapped.

  Args:
    blob: Bytes, or a map of them.
    offsets: (N + 1,) int64.
  """

  def __init__(self, blob, offsets):
    self._blob, self._offsets = blob, offsets

  def __len__(self):
    return len(self._offsets) - 1

  def __getitem__(self, row):
    if not 0 <= row < len(self):
      raise IndexError(row)
    start, end = self._offsets[row : row + 2]
    return bytes(self._blob[start:end]).decode()

  def save(self, folder):
    """Writes the two arrays into a folder; `load` reads them."""
    np.asarray(memoryview(self._blob)).tofile(folder / _BLOB_FILE)
    np.save(folder / _OFFSETS_FILE, self._offsets)

  def update_hash(self, digest):
    """Feeds the text, and where it is cut, to a hashlib object."""
    digest.update(self._offsets)
    digest.update(self._blob)


class Rows:
  """{id: row} of many ids, in two arrays; looked up as in a dict.

  Args:
    ids: `Strings`.
    hashes: (N,) int64, `hashed` of each.
  """

  def __init__(self, ids, hashes):
    self._ids = ids
    self._order = np.argsort(hashes, kind='stable')
    self._hashes = hashes[self._order]

  def get(self, an_id, default=None):
    """Returns the first row of an id, or `default`."""
    place = np.searchsorted(self._hashes, np.int64(hashed(an_id)))
    for row in self._order[place:]:
      if self._hashes[place] != hashed(an_id):
        break
      if self._ids[int(row)] == an_id:
        return int(row)
      place += 1
    return default

  def many(self, ids):
    """Returns the (n,) int64 first rows of n ids; -1 for what is none.

    Four times as fast as one by one.
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

  def __getitem__(self, an_id):
    row = self.get(an_id)
    if row is None:
      raise KeyError(an_id)
    return row

  def repeated(self):
    """Returns the two rows of an id that stands twice, or None."""
    (equal,) = np.nonzero(self._hashes[1:] == self._hashes[:-1])
    for place in equal:
      first = self._order[place]
      for other in self._order[place + 1 :]:
        if self._ids[int(first)] == self._ids[int(other)]:
          return int(first), int(other)
        if hashed(self._ids[int(other)]) != self._hashes[place]:
          break
    return None


class Writer:
  """Collects strings in a blob that goes to a file when it is large."""

  def __init__(self):
    self._blob, self._ends = bytearray(), array.array('q', [0])
    self._file, self._written = None, 0

  def add(self, text):
    """Adds the next string."""
    # Half of a surrogate pair is valid JSON but not UTF-8.
    self._blob += text.encode('utf-8', 'replace')
    self._ends.append(self._written + len(self._blob))
    if len(self._blob) > _MAX_BLOB:
      self._flush()

  def done(self):
    """Returns the `Strings`."""
    offsets = np.array(self._ends, np.int64)
    if self._file is None:
      return Strings(bytes(self._blob), offsets)
    self._flush()
    with self._file:  # It is gone with the map.
      return Strings(np.memmap(self._file, np.uint8, 'r'), offsets)

  def _flush(self):
    self._file = self._file or tempfile.TemporaryFile()
    self._file.write(self._blob)
    self._file.flush()
    self._written += len(self._blob)
    self._blob = bytearray()
