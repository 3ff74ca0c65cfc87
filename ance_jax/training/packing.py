"""Packs whole texts into rows, so that a step computes few tokens of padding.

Krell et al. 2021 (2107.02027) packed sequences for BERT. Here all texts of a
tower in the whole batch share rows, the rows are dealt out to the devices, and
a step has one of three shapes, so that at most three programs are in use. The
packing does not depend on the number of devices.
"""

from collections.abc import Sequence
import heapq
from typing import NamedTuple

import numpy as np

# Most texts in a row.
_MOST_SLOTS = 32
# Steps on whose lengths shapes are chosen.
_SAMPLED_STEPS = 100
# Shares of these steps that the smaller and the larger shape may hold.
_SMALLER = (1, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_LARGER = _SMALLER[:4]
# Shapes change, which takes a compilation, to save at least this share of work.
_WORTH_A_CHANGE = 0.05


class Pack(NamedTuple):
  """The texts of one tower in the rows of n devices.

  Attributes:
    ids: (n K, R, L) int32 token ids, in K chunks of R rows per device.
    lengths: (n K, R, S) int32, tokens of the texts in each row, in order; 0 for
      none.
    numbers: (n K, R, S) uint32, number of each text in the whole batch.
    are_passages: (n K, R, S) bool; false for queries.
  """

  ids: np.ndarray
  lengths: np.ndarray
  numbers: np.ndarray
  are_passages: np.ndarray


class Assigned(NamedTuple):
  """Where T texts are in their rows.

  Attributes:
    rows: (T,) int, row of each text; -1 for texts of no tokens.
    slots: (T,) int, index of the text in its row, from 0.
    starts: (T,) int, place of its first token in the row.
    count: Number of rows.
  """

  rows: np.ndarray
  slots: np.ndarray
  starts: np.ndarray
  count: int


class Form(NamedTuple):
  """What a run's shapes depend on, apart from the lengths of its texts.

  Attributes:
    lengths: L, tokens per row, by tower.
    texts: Texts of a batch, by tower; no batch needs more rows than this.
    num_devices: Devices of all processes.
    chunks: Parts of a device's rows to compute one after another.
  """

  lengths: dict[str, int]
  texts: dict[str, int]
  num_devices: int
  chunks: int


class Shape(NamedTuple):
  """Rows of one tower on each device.

  Attributes:
    chunks: K, parts to compute one after another, to save memory.
    rows: R, rows per chunk.
  """

  chunks: int
  rows: int


class Shapes(NamedTuple):
  """The shapes that steps may have.

  Attributes:
    form: What they are for.
    slots: S, the most texts in a row.
    allowed: Shape by tower of each program, smallest first; the last one holds
      any batch.
  """

  form: Form
  slots: int
  allowed: tuple[dict[str, Shape], ...]

  def fitting(self, counts: dict[str, int]) -> dict[str, Shape]:
    """Returns the first shapes that hold so many rows, by tower."""
    for shapes in self.allowed[:-1]:
      if all(n <= self.total(shapes[tower]) for tower, n in counts.items()):
        return shapes
    return self.allowed[-1]

  def total(self, shape: Shape) -> int:
    """Returns the rows of a shape over all devices."""
    return self.form.num_devices * shape.chunks * shape.rows

  def places(self, shape: Shape, rows: np.ndarray) -> np.ndarray:
    """Returns where rows are among those of all devices, device by device.

    All devices have their first chunk filled before any has its second.
    """
    chunk, row = np.divmod(rows, self.form.num_devices * shape.rows)
    device, row = np.divmod(row, shape.rows)
    return (device * shape.chunks + chunk) * shape.rows + row


def assign(
  lengths: np.ndarray, row_length: int, slots: int = _MOST_SLOTS
) -> Assigned:
  """Packs texts into as few rows as best-fit decreasing finds.

  The longest text comes first, and goes to the row with the least room that
  holds it, the first of several; of texts of equal length the first comes
  first.

  Args:
    lengths: (T,) int, tokens of each text, 0 for texts to leave out.
    row_length: L, at least the longest text.
    slots: S, the most texts in a row.
  """
  rows = np.full(len(lengths), -1)
  places, starts = np.zeros((2, len(lengths)), int)
  texts_in: list[int] = []
  by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
  has_room = 0  # Bit r: some row has room for exactly r more tokens.
  order = np.argsort(-lengths, kind='stable')
  for text, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
    if not length:
      break
    if fits := has_room >> length:
      room = length + (fits & -fits).bit_length() - 1
      row = heapq.heappop(by_room[room])
      has_room ^= (not by_room[room]) << room
    else:
      row, room = len(texts_in), row_length
      texts_in.append(0)
    rows[text], places[text] = row, texts_in[row]
    starts[text] = row_length - room
    texts_in[row] += 1
    room -= length
    if room and texts_in[row] < slots:
      heapq.heappush(by_room[room], row)
      has_room |= 1 << room
  return Assigned(rows, places, starts, len(texts_in))


def sampled(first: int, end: int) -> np.ndarray:
  """Returns steps from `first` to `end`, evenly spaced, to choose shapes on."""
  number = min(_SAMPLED_STEPS, end - first)
  return first + np.arange(number) * (end - first) // number


def choose(
  batches: Sequence[dict[str, Assigned]],
  form: Form,
  before: Shapes | None = None,
) -> Shapes:
  """Returns the shapes that cost the fewest tokens on a sample of batches.

  Args:
    batches: The packed texts of each batch, by tower.
    form: What the shapes are for.
    before: Shapes so far, which stay unless others save enough.
  """
  counts = {
    tower: np.array([batch[tower].count for batch in batches])
    for tower in form.lengths
  }
  most = max(int(one.slots.max()) for n in batches for one in n.values()) + 1
  slots = min(-(-most // 4) * 4, _MOST_SLOTS)
  tried = [
    _shapes(counts, (smaller, larger), form, slots)
    for larger in _LARGER
    for smaller in _SMALLER
    if smaller <= larger
  ]
  costs = [_cost(counts, one) for one in tried]
  least = min(costs)
  if (
    before
    and before.slots >= most
    and _cost(counts, before) <= (1 + _WORTH_A_CHANGE) * least
  ):
    return before
  return tried[costs.index(least)]


def _shapes(counts, shares, form, slots):
  """Returns the `Shapes` that hold some shares of a sample's batches."""
  parts = form.num_devices * form.chunks
  allowed = [
    {
      tower: Shape(
        form.chunks, _rounded(np.quantile(n, share, method='higher'), parts)
      )
      for tower, n in counts.items()
    }
    for share in shares
  ]
  # Chunks of the larger size, so that a rare batch takes no more memory.
  any_batch = {
    tower: Shape(
      max(-(-form.texts[tower] // (form.num_devices * rows)), form.chunks), rows
    )
    for tower, (_, rows) in allowed[-1].items()
  }
  allowed.append(any_batch)
  different = [n for i, n in enumerate(allowed) if n not in allowed[:i]]
  return Shapes(form, slots, tuple(different))


def _rounded(count, parts):
  """Returns rows per part, rounded up to 5 binary digits."""
  rows = max(-(-int(count) // parts), 1)
  unit = 1 << max(rows.bit_length() - 5, 0)
  return -(-rows // unit) * unit


def _cost(counts, shapes):
  """Returns the tokens that a sample computes, second forwards included."""
  total = 0
  for needed in zip(*counts.values(), strict=True):
    by_tower = dict(zip(counts, map(int, needed), strict=True))
    for tower, shape in shapes.fitting(by_tower).items():
      rows = shapes.total(shape)
      if shape.chunks > 1:
        # Chunks without texts cost nothing, the others a third more.
        at_once = shapes.form.num_devices * shape.rows
        rows = min(-(-by_tower[tower] // at_once) * at_once, rows) * 4 / 3
      total += rows * shapes.form.lengths[tower]
  return total


def to_json(shapes: Shapes) -> dict:
  """Returns shapes as JSON holds them."""
  allowed = [
    {tower: list(shape) for tower, shape in one.items()}
    for one in shapes.allowed
  ]
  return {
    'form': shapes.form._asdict(),
    'slots': shapes.slots,
    'allowed': allowed,
  }


def from_json(found: dict | None, form: Form) -> Shapes | None:
  """Inverts `to_json`; returns None if the shapes are for another form."""
  if not found or Form(**found['form']) != form:
    return None
  allowed = tuple(
    {tower: Shape(*shape) for tower, shape in one.items()}
    for one in found['allowed']
  )
  return Shapes(form, found['slots'], allowed)
