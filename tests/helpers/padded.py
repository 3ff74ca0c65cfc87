"""Batches with one text a row, to compare packed ones with."""

from typing import NamedTuple

import numpy as np

from ance_jax.data import tokens
from ance_jax.training import batches
from ance_jax.training import packing


class Padded(NamedTuple):
  """As `batches.Batch`, with (B, L) and (B, C, L) token ids and lengths."""

  rows: np.ndarray
  query_ids: np.ndarray
  query_lengths: np.ndarray
  passage_ids: np.ndarray
  passage_lengths: np.ndarray
  passage_groups: np.ndarray
  positive_groups: np.ndarray
  taught: np.ndarray | None = None
  positive_rows: np.ndarray | None = None
  guide_queries: np.ndarray | None = None
  guide_passages: np.ndarray | None = None


def token_rows(ids, lengths, pieces=1):
  """Returns the `TokenRows` of padded rows, those of no tokens left out."""
  there = lengths > 0
  real = np.arange(ids.shape[-1]) < lengths[:, None]
  offsets = np.append(0, np.cumsum(lengths[there]))
  first = None
  if pieces > 1:
    first = np.append(0, np.cumsum(there.reshape(-1, pieces).sum(1)))
  return tokens.TokenRows(ids[real], offsets, 0, '', first)


def pack(
  padded, *, retriever, num_devices=1, micro=0, row_length=16, shapes=None
):
  """Returns the `batches.Batch` of a `Padded` one."""
  number, columns = padded.passage_lengths.shape
  hard = padded.passage_groups.shape[1]
  pieces = columns // hard if hard else 1
  towers = retriever.towers if hard else [retriever.tower('query')]
  data = batches.TrainingData(
    token_rows(padded.query_ids, padded.query_lengths),
    token_rows(
      padded.passage_ids.reshape(-1, padded.passage_ids.shape[-1]),
      padded.passage_lengths.ravel(),
      pieces,
    ),
    np.arange(number + 1),
    np.arange(number) * hard,
    padded.positive_groups,
    padded.passage_groups.ravel(),
    dict.fromkeys(towers, row_length),
    pieces,
    padded.positive_rows,
  )
  drawn = batches.Drawn(
    np.arange(number), np.arange(number * hard).reshape(number, hard)
  )
  if shapes is None:
    each = number // num_devices
    form = packing.Form(
      data.row_lengths,
      batches.num_texts(data, number, hard - 1),
      num_devices,
      each // (micro or each),
    )
    shapes = packing.choose([batches.assigned(data, drawn)], form)
  made = batches.make_batch(data, drawn, shapes=shapes)
  return made._replace(
    rows=padded.rows,
    taught=padded.taught,
    guide_queries=padded.guide_queries,
    guide_passages=padded.guide_passages,
  )


def texts(batch):
  """Returns the token ids of a `Batch` of one device's texts, as lists.

  One list per query, of the tokens of the query and of each of its passages or
  pieces; none for pieces that are absent.
  """
  by_slot = {}
  for tower, pack in batch.packs.items():
    ids = pack.ids.reshape(-1, pack.ids.shape[-1])
    wide = pack.lengths.shape[-1]
    lengths = pack.lengths.reshape(-1, wide)
    ends = lengths.cumsum(1)
    for (row, slot), length in np.ndenumerate(lengths):
      if length:
        end = ends[row, slot]
        found = ids[row, end - length : end].tolist()
        by_slot[tower, row * wide + slot] = tuple(found)
  first, *_ = batch.packs
  last = [*batch.packs][-1]
  found = []
  for slots, lengths in zip(
    batch.slots.tolist(), batch.passage_lengths.tolist(), strict=True
  ):
    passages = [
      by_slot[last, slot] if length else ()
      for slot, length in zip(slots[1:], lengths, strict=True)
    ]
    found.append([by_slot[first, slots[0]], *passages])
  return found
