"""Computes a run's need of disk, memory and devices before it starts.

A run that cannot fit is refused at once instead of filling the disk in the
second week. The needs are lower bounds: texts and token rows already exist at
that point, and activations are not counted.
"""

import pathlib
import shutil
from typing import NamedTuple

import jax
import psutil

from ance_jax import errors
from ance_jax.core import devices as devices_lib
from ance_jax.core import logs
from ance_jax.mining import known_answers
from ance_jax.models import bi_encoder
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import index
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import negatives
from ance_jax.training import schedule

# AdamW keeps two moments of each parameter that it trains, all in float32.
_MOMENTS = 2
# Memory limit and use of a container, if there is one.
_CGROUP = pathlib.Path('/sys/fs/cgroup')
_CURES = {
  'disk': 'make room, lower --checkpoints_to_keep or --max_refreshes, or name '
  'another --workdir',
  'host memory': 'choose a smaller --index, such as SQ8 or IVF4096,PQ64, or '
  'another machine',
  'device memory': 'choose a smaller encoder, a lower --search_memory_mb with '
  '--index=device, or another accelerator',
}


class Need(NamedTuple):
  """Space that a run needs for one purpose.

  Attributes:
    place: Disk or a memory, a key of `_CURES`.
    what: Purpose, as printed.
    arithmetic: Computation of the size, as printed.
    size: Size in bytes.
  """

  place: str
  what: str
  arithmetic: str
  size: int


def check(run: experiment.Experiment) -> None:
  """Raises `BadInput` if a run cannot fit; prints all needs for `--dry_run`."""
  if run.config.dry_run:
    logs.log(table(run))
  for place, free, here, total in _by_place(run):
    if free is not None and total > free:
      largest = max(here, key=lambda need: need.size)
      raise errors.refusal(
        f'{_text(free)} of {place} is too little for a run that keeps at least '
        f'{_text(total)}, {_text(largest.size)} of them {largest.what} '
        f'({largest.arithmetic})',
        _CURES[place],
      )


def table(run: experiment.Experiment) -> str:
  """Returns a table of a run's needs and of the free space."""
  lines = []
  for place, free, here, total in _by_place(run):
    there = 'not known' if free is None else _text(free)
    lines += [
      f'{place:42}{_text(total):>12}  of {there}',
      *(
        f'  {need.what:40}{_text(need.size):>12}  {need.arithmetic}'
        for need in here
      ),
    ]
  return '\n'.join(lines)


def _by_place(run):
  """Yields each place, its free bytes, its needs and the bytes of these."""
  needs = _needs(run)
  for place, free in _room(run).items():
    here = [need for need in needs if need.place == place]
    yield place, free, here, sum(need.size for need in here)


def _needs(run):
  """Returns the needs of a run, as a list."""
  config, width = run.config, run.retriever.config.embedding_size
  shapes = bi_encoder.shapes(run.retriever.config)
  num_params = _size(shapes)
  trained = experiment.trees_of_run(config, shapes)
  num_trained = _size([shapes[name] for name in trained])
  passages = len(run.dataset.passages.pieces())
  queries = len(run.dataset.queries[config.train_split])
  state = f'{num_params:,} parameters x 4 bytes x {1 + _MOMENTS}'
  if num_trained < num_params:
    state = (
      f'({num_params:,} parameters + {_MOMENTS} x {num_trained:,}) x 4 bytes'
    )
  of_state = 4 * (num_params + _MOMENTS * num_trained)
  # Three more: the best one, the active negatives' and one being written.
  kept = min(config.checkpoints_to_keep + 3, schedule.num_saves(config))
  is_guide = config.guide == methods.OWN_GUIDE
  if is_guide:
    kept = min(kept + config.checkpoints_to_keep, schedule.num_saves(config))
  encodings = min(schedule.num_encodings(config), 2 + is_guide)
  # CPU devices use the memory of the host.
  on_host = run.devices[0].platform == 'cpu'
  needs = [
    Need('disk', 'checkpoints', f'{kept} x {state}', kept * of_state),
    Need(
      'disk',
      'embeddings, old and new',
      f'{encodings} x {passages:,} passages x {width} x 4 bytes',
      encodings * passages * width * 4,
    ),
    _of_index(run, passages, width, on_host),
    Need('host memory', 'a checkpoint in writing', state, of_state),
  ]
  if tables := _num_tables(config):
    arithmetic = f'{queries:,} queries x {config.top_k} x 4 bytes'
    size = queries * config.top_k * 4
    needs += [
      Need('disk', 'negatives', f'{tables} x {arithmetic}', tables * size),
      Need(
        'host memory', 'negatives being mined', f'2 x {arithmetic}', 2 * size
      ),
    ]
  split = run.dataset.splits[config.train_split]
  needs += _of_answers(config, split)
  copies = len(devices_lib.own(run.devices)) if on_host else 1
  place = 'host memory' if on_host else 'device memory'
  if any(row.searches for row in schedule.rows(config).values()):
    over = 1 if on_host else len(run.devices)
    arithmetic = f'{passages:,} passages x {width} x 4 bytes over {over} places'
    needs.append(
      Need(
        place,
        'passages that each step searches',
        arithmetic,
        -(-passages // over) * width * 4,
      )
    )
  return [
    *needs,
    Need(
      place,
      'parameters, gradients, optimizer',
      f'{copies} x ({state} + gradients)',
      copies * (of_state + 4 * num_trained),
    ),
  ]


def _size(shapes):
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _of_index(run, passages, width, on_host):
  """Returns the `Need` of the index."""
  config, num_devices = run.config, len(run.devices)
  what = f'index {config.index}'
  if config.index != corpus_index.ON_DEVICES:
    code = index.bytes_per_vector(config.index, config.index_params, width)
    arithmetic = f'{passages:,} passages x {code} bytes'
    return Need('host memory', what, arithmetic, passages * code)
  # The part of the corpus that does not fit is streamed in blocks.
  most = config.search_memory_mb * 2**20
  size = min(-(-passages // num_devices) * width * 4, most)
  arithmetic = (
    f'{passages:,} passages x {width} x 4 bytes over {num_devices} device(s), '
    f'at most {config.search_memory_mb:,} MiB on each'
  )
  place, copies = ('host', num_devices) if on_host else ('device', 1)
  return Need(f'{place} memory', what, arithmetic, copies * size)


def _num_tables(config):
  """Returns the number of tables of negatives and scores that a run keeps."""
  rows = schedule.rows(config).values()
  once = {name for row in rows for name in row.sources} & {'bm25', 'given'}
  teachers = sum(row.teacher == 'mined' for row in rows)
  # What a teacher scored is there twice until it is published.
  return (
    (1 + teachers) * len(once)
    + (2 + teachers) * schedule.num_refreshes(config)
    + bool(teachers)
  )


def _of_answers(config, split):
  """Returns the `Need`s of cached answer matches, in a list."""
  row = methods.METHODS[config.method]
  matches = row.without_answers or negatives.drops_answers(config, split)
  if not (row.refreshes and matches):
    return []
  pairs, each = 2 * config.top_k * len(split.ids), known_answers.BYTES_PER_PAIR
  # On disk the old and the new file; in memory also the sort that joins them.
  return [
    Need(
      place,
      'which passages hold an answer',
      f'{copies} x {pairs:,} pairs x {each} bytes',
      copies * pairs * each,
    )
    for place, copies in (('disk', 2), ('host memory', 4))
  ]


def _room(run):
  """Returns the free bytes by place, None if unknown.

  Files that the run has written count as free, because its needs include them.
  """
  own = sum(
    path.stat().st_size
    for folder in (
      'checkpoints',
      'embeddings',
      'refresh',
      'bm25',
      'given',
      'answers',
      'taught',
    )
    for path in (run.workdir / folder).rglob('*')
    if path.is_file()
  )
  room = {
    'disk': shutil.disk_usage(run.workdir).free + own,
    'host memory': _free_memory(),
  }
  if run.devices[0].platform != 'cpu':
    stats = run.devices[0].memory_stats() or {}
    room['device memory'] = stats.get('bytes_limit')
  return room


def _free_memory():
  """Returns the memory that this process can still allocate, in bytes."""
  free = psutil.virtual_memory().available
  limit = _CGROUP / 'memory.max'
  if limit.exists() and (text := limit.read_text().strip()).isdecimal():
    used = int((_CGROUP / 'memory.current').read_text())
    lines = (_CGROUP / 'memory.stat').read_text().splitlines()
    stat = {name: int(size) for name, size in map(str.split, lines)}
    # The kernel frees cached files when a process needs memory.
    used -= stat['inactive_file'] + stat['active_file']
    free = min(free, int(text) - used)
  return free


def _text(size):
  """Formats a number of bytes."""
  for unit in ('bytes', 'kB', 'MB'):
    if size < 1000:
      return f'{size:,.1f} {unit}' if unit != 'bytes' else f'{size} bytes'
    size /= 1000
  return f'{size:,.1f} GB'
