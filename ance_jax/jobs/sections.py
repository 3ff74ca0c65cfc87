"""Sections of a run's page: refreshes, probes, costs, audits and flags.

The functions named after a section return its HTML parts; `lines` are the dicts
of metrics.jsonl.
"""

import bisect
from collections.abc import Iterable
from collections.abc import Iterator
import pathlib
from typing import Any

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.core import workdirs
from ance_jax.jobs import pages

# A metric of every refresh, and of nothing else.
REFRESHED = 'refresh/judged'
_REFRESH_LEGEND = (
  'Taken from the rankings because they were judged, have the text of a '
  'judged one or of the query, or hold an answer; and drawn at random where '
  'too few were left. '
  'Overlap: share of the negatives that were those of the refresh before, too. '
  'Real tokens: share of what was encoded that is no padding. Negatives age: '
  'steps since the refresh before.'
)
_PROBE_LEGEND = (
  'On some training queries, with the weights of the step. Overlap: share of '
  'the negatives in use that the weights rank in the first 100. Positive rank: '
  'the median. Rank drift: mean of its change since the last refresh, in '
  'doublings. Dev lost, won: share of dev queries whose first passage was '
  'right at the last refresh and is not now, and the other way round. Grad '
  "norm: of a query's loss on its embeddings, by where its negatives are from. "
  'Above positive: share of the negatives that score no less than the '
  'positive. Norm and cosine: means over passages, and pairs of them, at '
  'random; a cosine near 1 is a narrow cone.'
)
_COST_LEGEND = (
  'Operations, two for each multiply-add, are those of the encoder, padding '
  'included, and of an exact search; the backward pass counts as two forward '
  'ones. Without padding: as if each text were computed alone. '
  'Seconds that a killed process spent after its last checkpoint are not '
  'in it.'
)
_SECS_LEGEND = (
  'Compile: of XLA, within the other stages. Compiles: how many, not seconds.'
)


def refreshes(lines: list[dict[str, Any]]) -> list[str]:
  """Returns a table of the metrics of each refresh."""
  made = [line for line in lines if REFRESHED in line]
  numbers = ['refresh', *map(str, range(1, len(made) + 1))]
  rows = zip(numbers, _by_step(made, 'refresh/'), strict=True)
  return [
    pages.heading('Refreshes'),
    pages.paragraph(_REFRESH_LEGEND),
    pages.table([[number, *row] for number, row in rows], numbers=True),
  ]


def seconds(lines: list[dict[str, Any]]) -> list[str]:
  """Returns a table of the seconds per stage, in total and by refresh.

  The row of a refresh includes the refresh and the time since the previous one.
  """
  steps = sorted(line['step'] for line in lines if REFRESHED in line)
  parts = [[] for _ in range(len(steps) + 1)]
  for line in lines:
    parts[bisect.bisect_left(steps, line['step'])].append(line)
  labels = [
    'all',
    *(f'to refresh {n} at step {s}' for n, s in enumerate(steps, 1)),
    'after the last',
  ]
  totals = _total(lines, 'time/')
  rows = [['', *(_words(name.removesuffix('_secs')) for name in totals)]]
  for label, part in zip(labels, [lines, *parts], strict=True):
    if sums := _total(part, 'time/'):
      rows.append([label, *(_amount(n, sums.get(n, 0.0)) for n in totals)])
  return [
    pages.heading('Seconds by stage'),
    pages.paragraph(_SECS_LEGEND),
    pages.table(rows, numbers=True),
  ]


def probes(lines: list[dict[str, Any]]) -> list[str]:
  """Returns a table of the results of `diagnostics.look`, by evaluation."""
  looked = [line for line in lines if _named(line, 'probe/')]
  return [
    pages.heading('Negatives and embeddings'),
    pages.paragraph(_PROBE_LEGEND),
    pages.table(_by_step(looked, 'probe/'), numbers=True),
  ]


def costs(lines: list[dict[str, Any]]) -> list[str]:
  """Returns a table of the seconds and operations of each stage."""
  secs, flops = _total(lines, 'time/'), _total(lines, 'flops/')
  # flops/train is cumulative.
  flops['train'] = max((n.get('flops/train', 0) for n in lines), default=0)
  real = max((n.get('flops_real/train', 0) for n in lines), default=0)
  secs = {
    name.removesuffix('_secs'): value
    for name, value in secs.items()
    if name not in ('compiles', 'compile_secs')
  }
  whole = sum(secs.values())
  for sums in (secs, flops):
    sums['all but train'] = sum(v for n, v in sums.items() if n != 'train')
  rows = [
    ['stage', 'seconds', 'of all', 'TFLOP', 'TFLOP/s', 'TFLOP without padding']
  ]
  for name, value in secs.items():
    work = flops.get(name, 0) / 1e12
    rows.append(
      [
        name,
        f'{value:,.1f}',
        f'{value / whole:.1%}' if whole else '',
        f'{work:,.3f}' if work else '',
        f'{work / value:,.2f}' if work and value else '',
        f'{real / 1e12:,.3f}' if real and name == 'train' else '',
      ]
    )
  return [
    pages.heading('Costs'),
    pages.paragraph(_COST_LEGEND),
    pages.table(rows, numbers=True),
  ]


def audits(workdir: pathlib.Path) -> list[str]:
  """Returns a section for each undamaged audit in the folder of a run."""
  parts = []
  for path, found in undamaged(workdir.glob('audit-*.json'), 'This audit is'):
    ends = found['ranks up to']
    bands = zip([1, *(end + 1 for end in ends)], ends, strict=False)
    head = ['share that is', *(f'ranks {s}-{end}' for s, end in bands)]
    shares = [
      [name, *('' if v is None else f'{v:.2%}' for v in values)]
      for name, values in found['shares'].items()
    ]
    examples = [
      [
        f'{n}: {text}' if n.startswith('rank') else text
        for n, text in e.items()
      ]
      for e in found['examples']
    ]
    parts += [
      pages.heading(f'False negatives: {path.stem}'),
      pages.paragraph(f'{found["queries"]:,} training queries'),
      pages.table([head, *shares], numbers=True),
      pages.folded(
        f'{len(examples)} examples',
        [pages.table([['query', 'positive', 'ranked', 'why'], *examples])],
      ),
    ]
  return parts


def flags(workdir: pathlib.Path) -> list[str]:
  """Returns the flags of a run, those that differ from the defaults first."""
  path = workdir / workdirs.FLAGS_FILE
  parts = [pages.heading('Flags that are not the default')]
  if not path.is_file():
    return [*parts, pages.paragraph(f'no {path.name} in the folder')]
  text = path.read_text(errors='replace')
  defaults = set(config_lib.Config().to_flagfile().splitlines())
  changed = [
    line
    for line in map(config_lib.renamed, text.splitlines())
    if line not in defaults
  ]
  return [
    *parts,
    pages.preformatted('\n'.join(changed)),
    pages.folded('all flags', [pages.preformatted(text)]),
  ]


def undamaged(
  paths: Iterable[pathlib.Path], what: str
) -> Iterator[tuple[pathlib.Path, dict[str, Any]]]:
  """Yields (path, content) of each undamaged JSON file, sorted by path.

  Args:
    paths: Files of `atomic.write_json`.
    what: Beginning of the sentence that one of them is left out.
  """
  for path in sorted(paths):
    try:
      yield path, atomic.read_json(path)
    except errors.Damaged as damaged:
      logs.log(f'{damaged} {what} left out.')


def _by_step(lines, start):
  """Returns a table of the metrics that begin with `start`, a row per line."""
  found = [_named(line, start) for line in lines]
  names = list(dict.fromkeys(name for values in found for name in values))
  return [
    ['step', *map(_words, names)],
    *(
      [
        str(line['step']),
        *(_number(values[n]) if n in values else '' for n in names),
      ]
      for line, values in zip(lines, found, strict=True)
    ),
  ]


def _named(line, start):
  """Returns {name without `start`: value} of metrics that begin with it."""
  return {
    name.removeprefix(start): value
    for name, value in line.items()
    if name.startswith(start)
  }


def _words(name):
  return name.replace('_', ' ')


def _amount(name, value):
  """Formats a time/* metric, which is in seconds or a count."""
  return f'{value:,.1f}' if name.endswith('_secs') else f'{value:,.0f}'


def _number(value):
  """Formats a number, with four decimals unless it is whole."""
  return f'{value:,.0f}' if value == int(value) else f'{value:.4f}'


def _total(lines, start):
  """Returns {name without `start`: sum} of metrics that begin with `start`."""
  found = {}
  for line in lines:
    for name, value in _named(line, start).items():
      found[name] = found.get(name, 0.0) + value
  return found
