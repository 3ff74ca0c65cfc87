"""Shows a run as curves, tables, examples and a page: `--job=report`."""

from collections.abc import Sequence
import io
import itertools
import os
import pathlib

import numpy as np

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.core import workdirs as workdirs_lib
from ance_jax.jobs import pages
from ance_jax.jobs import sections

_LOSS = 'train/loss'
_OVERLAP, _AGE = 'probe/overlap', 'train/negatives_age'
_POSITIVE_RANK = 'probe/positive_rank'
# A metric of every evaluation, with or without dev.
_EVALUATED = 'time/compiles'


def draw(
  workdirs: Sequence[str | os.PathLike], path: str | pathlib.Path
) -> None:
  """Plots the metrics of some runs against their steps in one PNG.

  Args:
    workdirs: Folders of the runs, whose names become the labels.
    path: PNG file, written atomically.
  """
  drawn = [(pathlib.Path(path).name, logs.read(path)) for path in workdirs]
  panels = [_LOSS, *_curves([lines for _, lines in drawn])]
  atomic.write_bytes(path, _png(drawn, panels, 2))


def table(workdir: str | os.PathLike) -> str:
  """Returns a table of a run's dev metrics by evaluation."""
  lines = logs.read(workdir)
  names = _columns(lines, 4)
  if not names:
    return _why_no_dev(lines)
  widths = [8, 9, *(14 for _ in names)]
  rows = (map(str.rjust, row, widths) for row in _evaluations(lines, names))
  return '\n'.join([*map(''.join, rows), *_gain(lines)])


def compare_examples(
  first: tuple[int, list[dict]], last: tuple[int, list[dict]]
) -> str:
  """Formats the results of two evaluations for the same queries.

  Args:
    first: Step and its `corpus_index.examples`.
    last: The same for a later step.
  """
  lines = []
  for before, after in zip(first[1], last[1], strict=True):
    lines.append(f'query: {before["query"]}')
    for step, found in ((first[0], before), (last[0], after)):
      lines.append(
        f'  step {step:7d}, first relevant at '
        f'{found["place"] or "beyond the ranking"}: '
        + ' | '.join(found['results'])
      )
  return '\n'.join(lines)


def examples(workdir: pathlib.Path) -> list[tuple[int, list[dict]]]:
  """Returns step and examples of all undamaged evaluations, in order."""
  paths = (workdir / workdirs_lib.EXAMPLES_FOLDER).glob('*.json')
  return [
    (int(path.stem), found['examples'])
    for path, found in sections.undamaged(paths, 'These examples are')
  ]


def write_page(workdir: str | os.PathLike, path: str | pathlib.Path) -> None:
  """Writes the page of a run, a single HTML file.

  Args:
    workdir: Folder of the run.
    path: HTML file, written atomically.
  """
  workdir = pathlib.Path(workdir)
  lines, name = logs.read(workdir), workdir.absolute().name
  others = [n for n in (_AGE, _OVERLAP) if any(n in line for line in lines)]
  curves = list(dict.fromkeys([_LOSS, *_curves([lines]), *others]))
  names = _measures(lines)
  dev = (
    pages.table(_evaluations(lines, names), numbers=True)
    if names
    else pages.paragraph(_why_no_dev(lines))
  )
  parts = [
    pages.paragraph(f'Folder: {workdir}'),
    *map(pages.paragraph, _gain(lines)),
    pages.image(
      _png([(name, lines)], curves, 3), 'curves of: ' + ', '.join(curves)
    ),
    pages.heading('Dev by evaluation'),
    dev,
    *sections.refreshes(lines),
    *sections.probes(lines),
    *sections.costs(lines),
    *sections.seconds(lines),
    *sections.audits(workdir),
    *_example_parts(workdir, lines),
    *sections.flags(workdir),
  ]
  atomic.write_text(path, pages.page(f'Run {name}', parts))


def show_end(workdir: pathlib.Path) -> None:
  """Plots the curves of a finished run, and prints its results."""
  draw([workdir], workdir / 'curves.png')
  logs.log(table(workdir))
  if shown := examples(workdir):
    logs.log(compare_examples(shown[0], shown[-1]))
  logs.log(f'curves: {workdir / "curves.png"}')
  logs.log(f'page: {workdir / workdirs_lib.PAGE_FILE}')


def run(config: config_lib.Config) -> None:
  """Plots the runs of `--runs` in `--picture`.

  A single run also gets its page, in the same folder.
  """
  workdirs = list(filter(None, config.runs.split(','))) or [config.workdir]
  for workdir in workdirs:
    _check(workdir)
  path = config.picture or str(pathlib.Path(workdirs[0]) / 'curves.png')
  if pathlib.Path(path).is_dir():
    raise errors.refusal(f'--picture={path} is a folder', 'name a file')
  if not pathlib.Path(path).absolute().parent.is_dir():
    raise errors.refusal(
      f'--picture={path} is in a folder that does not exist',
      'make the folder, or name another',
    )
  draw(workdirs, path)
  for workdir in workdirs:
    logs.log(f'{workdir}\n{table(workdir)}')
  logs.log(f'curves: {path}')
  if len(workdirs) == 1:
    page = pathlib.Path(path).with_name(workdirs_lib.PAGE_FILE)
    write_page(workdirs[0], page)
    logs.log(f'page: {page}')


def _check(workdir):
  """Raises `BadInput` for a folder whose metrics cannot be shown."""
  lines = logs.read(workdir)
  if not lines:
    raise errors.refusal(
      f'no metrics.jsonl in {workdir or "an empty name"}, so it is not a run',
      'name folders of runs in --runs, separated by commas',
    )
  measures = set(_measures(lines))
  for number, line in enumerate(lines, 1):
    missing = measures - line.keys()
    if measures & line.keys() and missing:
      raise strict_io.refusal(
        pathlib.Path(workdir) / logs.METRICS_FILE,
        f'{min(missing)} is missing among the measures of dev',
        'remove the line',
        number,
      )


def _columns(lines, most):
  """Returns up to `most` dev metrics: the first two, then the last ones."""
  names = _measures(lines)
  return [*names[:2], *names[2:][2 - most :]]


def _curves(runs):
  """Returns up to three metrics to plot besides the loss, of dev if any.

  Args:
    runs: Lines of metrics of each run.
  """
  of_dev = next(filter(None, (_columns(lines, 3) for lines in runs)), [])
  return of_dev or [
    name
    for name in (_POSITIVE_RANK, _OVERLAP, _AGE)
    if any(name in line for lines in runs for line in lines)
  ]


def _why_no_dev(lines):
  """Returns the reason why there are no dev metrics."""
  evaluated = any(_EVALUATED in line for line in lines)
  return 'no dev split' if evaluated else 'not evaluated yet'


def _measures(lines):
  """Returns the names of the dev metrics, in the order of the protocol."""
  named = ([n for n in line if n.startswith('dev/')] for line in lines)
  return next(filter(None, named), [])


def _evaluations(lines, names):
  """Returns the rows of the table of dev metrics, the head first."""
  refreshes = sorted(_series(lines, sections.REFRESHED))
  numbers = {step: str(number) for number, step in enumerate(refreshes, 1)}
  columns = [_series(lines, name) for name in names]
  return [
    ['step', 'refresh', *(name[4:] for name in names)],
    *(
      [str(step), numbers.get(step, ''), *(f'{c[step]:.4f}' for c in columns)]
      for step in sorted(columns[0])
    ),
  ]


def _gain(lines):
  """Returns a line on the gain since the first refresh, in a list, or []."""
  refreshes = sorted(_series(lines, sections.REFRESHED))
  name = next(iter(_measures(lines)), '')
  scores = _series(lines, name)
  if not refreshes or not scores or max(scores) <= refreshes[0]:
    return []
  gain = scores[max(scores)] - scores[refreshes[0]]
  return [f'dev {name[4:]} since the first refresh: {gain:+.4f}']


def _example_parts(workdir, lines):
  """Returns the HTML of the first and last results of a few queries."""
  shown, title = examples(workdir), pages.heading('Examples of dev')
  if not shown and not _measures(lines):
    return [title, pages.paragraph(_why_no_dev(lines))]
  rows = [['query', 'step', 'first relevant at', 'results']]
  ends = shown[:1] + shown[1:][-1:]
  for both in zip(*(found for _, found in ends), strict=True):
    for (step, _), found in zip(ends, both, strict=True):
      place = str(found['place'] or 'beyond the ranking')
      rows.append(
        [found['query'], str(step), place, ' | '.join(found['results'])]
      )
  return [title, pages.table(rows)]


def _png(runs, panels, columns):
  """Returns a PNG of two rows of panels.

  Args:
    runs: (label, lines of metrics) of each run.
    panels: Names of metrics, at most two rows.
    columns: Panels per row.
  """
  import matplotlib.figure  # Half a second, which `table` does not need.

  # matplotlib's layout engines draw everything twice to measure it.
  figure = matplotlib.figure.Figure(figsize=(6 * columns, 7))
  figure.subplots_adjust(
    left=0.3 / columns**2, right=0.98, bottom=0.07, top=0.89, hspace=0.34,
    wspace=0.15
  )  # fmt: skip
  places = figure.subplots(2, columns).flat
  for axes, name in itertools.zip_longest(places, panels):
    if name:
      _draw_panel(axes, name, runs)
    else:
      axes.set_visible(False)
  figure.suptitle('Dotted lines: refreshes of the run of that colour')
  file = io.BytesIO()
  figure.savefig(file, format='png', dpi=90)
  return file.getvalue()


def _draw_panel(axes, name, runs):
  """Plots one metric of some runs, and their refreshes as dotted lines."""
  late = []
  for number, (label, lines) in enumerate(runs):
    series = _series(lines, name)
    refreshes = _series(lines, sections.REFRESHED)
    late += [v for s, v in series.items() if refreshes and s >= min(refreshes)]
    if name == _LOSS:
      series = _smoothed(series)
    axes.plot(
      series.keys(), series.values(), color=f'C{number}', label=label, ms=4,
      marker='' if name in (_LOSS, _AGE) else 'o'
    )  # fmt: skip
    axes.vlines(
      list(refreshes), 0, 1, transform=axes.get_xaxis_transform(),
      color=f'C{number}', alpha=0.3, lw=0.8, ls=':'
    )  # fmt: skip
  if late:
    # Scale to values after the first refresh; earlier ones are too steep.
    spread = max(late) - min(late)
    axes.set_ylim(
      max(min(late) - 0.5 * spread, 0), max(late) + 0.1 * spread + 1e-6
    )
  axes.set(
    title='training loss, nats' if name == _LOSS else name.replace('/', ' '),
    xlabel='step',
  )
  axes.grid(alpha=0.3)
  axes.legend()


def _series(lines, name):
  """Returns {step: value} of a metric in the lines of metrics.jsonl."""
  return {line['step']: line[name] for line in lines if name in line}


def _smoothed(series):
  """Returns {step: mean of the latest values}, a fiftieth of all values."""
  sums = np.cumsum([0.0, *series.values()])
  ends = np.arange(1, len(sums))
  starts = np.maximum(ends - max(len(series) // 50, 1), 0)
  means = (sums[ends] - sums[starts]) / (ends - starts)
  return dict(zip(series, means, strict=True))
