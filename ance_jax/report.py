"""What a person looks at after a run: curves, a table, examples."""

import pathlib

import matplotlib.figure

from ance_jax import config as config_lib
from ance_jax import handoff
from ance_jax import logs
from ance_jax import reading

_LOSS = 'train/loss'


def draw(workdirs, path):
  """Draws the metrics of some runs against their steps into one PNG.

  Args:
    workdirs: Folders of the runs; the last part of each is its label.
    path: The PNG, written whole or not at all.
  """
  figure = matplotlib.figure.Figure(figsize=(12, 7), layout='constrained')
  panels = [_LOSS, *_columns(workdirs[0], 3)]
  for axes, name in zip(figure.subplots(2, 2).flat, panels, strict=False):
    _draw_panel(axes, name, workdirs)
  figure.suptitle('Dotted lines: refreshes of the run of that colour')
  with handoff.writing(path) as file:
    figure.savefig(file, format='png', dpi=110)


def table(workdir):
  """Returns the dev metrics of a run by evaluation, as lines of text."""
  refreshes = sorted(logs.series(workdir, 'refresh/judged'))
  columns = {n: logs.series(workdir, n) for n in _columns(workdir, 4)}
  head = '    step  refresh' + ''.join(f'{name[4:]:>14}' for name in columns)
  if not columns:
    return head
  lines = [head]
  first, scores = next(iter(columns.items()))
  for step in sorted(scores):
    number = refreshes.index(step) + 1 if step in refreshes else ''
    cells = ''.join(f'{values[step]:14.4f}' for values in columns.values())
    lines.append(f'{step:8d}  {number:>7}{cells}')
  if refreshes and max(scores) > refreshes[0]:
    gain = scores[max(scores)] - scores[refreshes[0]]
    lines.append(f'dev {first[4:]} since the first refresh: {gain:+.4f}')
  return '\n'.join(lines)


def compare_examples(first, last):
  """Returns what two evaluations found for the same queries, as text.

  Args:
    first: (step, examples) of `evaluate.examples`.
    last: The same of a later step.
  """
  lines = []
  for before, after in zip(first[1], last[1], strict=True):
    lines.append(f'query: {before["query"]}')
    for step, found in ((first[0], before), (last[0], after)):
      place = found['place'] or 'beyond the ranking'
      lines.append(
        f'  step {step:7d}, first relevant at {place}: '
        + ' | '.join(found['results'])
      )
  return '\n'.join(lines)


def examples(workdir):
  """Returns (step, examples) of all evaluations that are whole, in order."""
  shown = []
  for path in sorted((workdir / 'examples').glob('*.json')):
    try:
      examples = handoff.read_json(path)['examples']
      shown.append((int(path.stem), examples))
    except handoff.Damaged as damaged:
      logs.say(f'{damaged} These examples are left out.')
  return shown


def run(config):
  """Draws the runs `--runs` into `--picture`: `--job=report`."""
  workdirs = [path for path in config.runs.split(',') if path]
  workdirs = workdirs or [config.workdir]
  for workdir in workdirs:
    _check(workdir)
  path = config.picture or str(pathlib.Path(workdirs[0]) / 'curves.png')
  if not pathlib.Path(path).absolute().parent.is_dir():
    raise config_lib.BadInput(
      f'--picture must lie in a folder that exists; found {path}; make the '
      'folder, or name another.'
    )
  if pathlib.Path(path).is_dir():
    raise config_lib.BadInput(
      f'--picture must be a file; found the folder {path}; name a file in it.'
    )
  draw(workdirs, path)
  for workdir in workdirs:
    logs.say(f'{workdir}\n{table(workdir)}')
  logs.say(f'curves: {path}')


def _check(workdir):
  """Raises `BadInput` for a folder whose metrics cannot be shown."""
  lines = logs.read(workdir)
  if not lines:
    raise config_lib.BadInput(
      '--runs must name folders of runs, separated by commas; found no '
      f'metrics.jsonl in {workdir or "an empty name"}; check the path.'
    )
  measures = set(logs.dev_measures(workdir))
  for number, line in enumerate(lines, 1):
    missing = measures - line.keys()
    if measures & line.keys() and missing:
      path = pathlib.Path(workdir) / logs.METRICS_FILE
      raise reading.bad(
        path, 'the measures of dev must be there together',
        f'no {min(missing)}', 'remove the line', number
      )  # fmt: skip


def _columns(workdir, most):
  """Returns dev metrics of a run: the first two, then the last ones."""
  names = logs.dev_measures(workdir)
  return [*names[:2], *names[2:][2 - most :]]


def _draw_panel(axes, name, workdirs):
  """Draws one metric of some runs, and their refreshes as dotted lines."""
  late = []
  for number, workdir in enumerate(workdirs):
    series, style = logs.series(workdir, name), {'ms': 4, 'marker': 'o'}
    refreshes = logs.series(workdir, 'refresh/judged')
    late += [v for s, v in series.items() if refreshes and s >= min(refreshes)]
    if name == _LOSS:
      series, style = _smoothed(series), {}
    label = pathlib.Path(workdir).name
    axes.plot(
      series.keys(), series.values(), color=f'C{number}', label=label, **style
    )
    for step in refreshes:
      axes.axvline(step, color=f'C{number}', alpha=0.3, lw=0.8, ls=':')
  if late:
    # What comes before the first refresh is steeper than all that matters.
    spread = max(late) - min(late)
    lowest = max(min(late) - 0.5 * spread, 0)
    axes.set_ylim(lowest, max(late) + 0.1 * spread + 1e-6)
  title = 'training loss, nats' if name == _LOSS else name.replace('/', ' ')
  axes.set(title=title, xlabel='step')
  axes.grid(alpha=0.3)
  axes.legend()


def _smoothed(series):
  """Returns {step: mean of the last fiftieth of the values up to there}."""
  values = list(series.values())
  width = max(len(values) // 50, 1)
  means = {}
  for place, step in enumerate(series):
    recent = values[max(0, place - width + 1) : place + 1]
    means[step] = sum(recent) / len(recent)
  return means
