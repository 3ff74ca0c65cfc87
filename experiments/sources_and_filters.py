"""Compares where negatives come from, and what takes false ones out.

    python experiments/sources_and_filters.py experiments/insuranceqa.flags \
      FOLDER TEACHER --data_dir=DATA --seeds 0 1 2 --rate=1e-2 --start=500

Nine arms: the own index, mined once or refreshed, or that of a fixed TEACHER (a
bi-encoder, folder or name on the hub); with all candidates, those at a relative
margin below the positive, or those that the TEACHER as a guide does not score
above the positive in the step. All have in-batch negatives, too, and all of a
seed begin with one run of in-batch negatives of so many steps. Two more arms
have in-batch negatives alone to the end, one of them with the guide. Runs that
are there are not made again.
Writes table.md, arms.md, results.json and dev.png into the folder: means over
the seeds, with the operations of the teacher's encoding in arms that use one.
"""

import argparse
import dataclasses
import hashlib
import pathlib
import statistics

import compare_methods
import figures

from ance_jax import flags
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.jobs import mine
from ance_jax.retrieval import encoding
from ance_jax.training import experiment

MARGIN = 0.05
SOURCES = {
  'once': {'method': 'ance_in_batch', 'max_refreshes': 1},
  'refreshed': {'method': 'ance_in_batch'},
  'teacher': {'method': 'given_in_batch'},
}
FILTERS = ('raw', 'margin', 'guided')
# Of the picture: colors of sources, lines of filters.
COLORS = {'once': 'tab:blue', 'refreshed': 'tab:orange', 'teacher': 'tab:green'}
LINES = {'raw': '-', 'margin': '--', 'guided': ':'}


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('flagfile')
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('teacher')
  parser.add_argument('--data_dir')
  parser.add_argument('--seeds', type=int, nargs='+', default=[0])
  parser.add_argument('--rate', type=float, default=1e-2)
  parser.add_argument('--start', type=int, default=500, metavar='STEPS')
  parser.add_argument('--arms', nargs='+', help='Only these, as SOURCE-FILTER.')
  given = parser.parse_args(arguments)
  folder = given.folder.absolute()
  changes = {'data_dir': given.data_dir} if given.data_dir else {}
  base = flags.from_flagfile(
    given.flagfile, tokens_dir=str(folder / 'tokens'), **changes
  )
  alone = {'method': 'in_batch'}
  arms = {
    'in_batch': alone,
    'in_batch-guided': {**alone, **_filter('guided', '', given.teacher)},
  }
  for source, of_source in SOURCES.items():
    for kind in FILTERS:
      arms[f'{source}-{kind}'] = {
        **of_source,
        **_filter(kind, source, given.teacher),
      }
  wanted = given.arms or list(arms)
  for name in wanted:
    if name.startswith('teacher'):
      mined = _mined(base, folder, given.teacher, 'margin' in name)
      arms[name]['negatives'] = str(mined)
  compare_methods.ROWS.update(arms)
  results = compare_methods.compare(
    base, folder, given.seeds, [given.rate], wanted, given.start
  )
  teacher = teacher_flops(_of_teacher(base, folder, given.teacher))
  before = {
    name: teacher if 'teacher' in name or 'guided' in name else 0
    for name in wanted
  }
  text = table(results, before)
  atomic.write_text(folder / 'arms.md', text)
  print(text)
  workdirs = {name: found['runs'] for name, found in results.items()}
  figures.draw_dev(workdirs, folder / 'dev.png', before, _styles(wanted))


def table(results, before):
  """Returns mean and range over seeds as a Markdown table.

  Args:
    results: As `compare_methods.compare` returns it.
    before: Operations of the teacher by arm.
  """
  columns = ['dev MRR@10', 'test MRR@10', 'Recall@100', 'TFLOP', 'of a teacher']
  lines = ['| arm | ' + ' | '.join(columns) + ' |', '|---' * 6 + '|']
  for name, found in results.items():
    dev = [logs.series(one, 'dev/mrr@10') for one in found['runs']]
    of_arm = statistics.mean(found['flops']) + before[name]
    cells = [
      compare_methods.cell([scores[max(scores)] for scores in dev]),
      compare_methods.cell([s['mrr@10'] for s in found['test']]),
      compare_methods.cell([s['recall@100'] for s in found['test']]),
      f'{of_arm / 1e12:.3g}',
      f'{before[name] / 1e12:.3g}',
    ]
    lines.append(f'| `{name}` | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def _styles(names):
  """Returns arguments of `plot` by arm."""
  styles = {}
  for name in names:
    source, _, kind = name.partition('-')
    styles[name] = {
      'color': COLORS.get(source, 'black'),
      'linestyle': LINES[kind or 'raw'],
    }
  return styles


def _filter(kind, source, teacher):
  if kind == 'guided':
    return {'guide': teacher, 'guide_margin': 0.0}
  # The teacher's are filtered where they are mined.
  is_own = kind == 'margin' and source != 'teacher'
  return {'relative_margin': MARGIN} if is_own else {}


def _of_teacher(base, folder, teacher):
  """Returns the settings of a job of the teacher, with its own lengths."""
  return dataclasses.replace(
    base,
    job='evaluate',
    workdir=str(folder / 'teacher'),
    init_from=teacher,
    pooling=None,
    similarity=None,
    query_length=None,
    passage_length=None,
  )


def _mined(base, folder, teacher, with_margin):
  """Returns the file of as many negatives as a refresh stores."""
  config = dataclasses.replace(
    _of_teacher(base, folder, teacher),
    job='mine',
    num_negatives=base.top_k,
    max_rank=base.top_k,
    on_shortage='fill',
    relative_margin=MARGIN if with_margin else None,
    format='ids',
  )
  # Of other settings it is another file.
  digest = hashlib.sha256(config.to_flagfile().encode()).hexdigest()[:8]
  name = 'teacher-margin' if with_margin else 'teacher'
  path = folder / f'{name}-{digest}.jsonl'
  if not path.exists():
    mine.run(dataclasses.replace(config, output=str(path)))
  return path


def teacher_flops(config):
  """Returns the operations with which it encodes the corpus and the queries.

  Args:
    config: `Config` of a job of the teacher.
  """
  run, _ = experiment.open(config, (config.train_split,))
  retriever, body = run.retriever, run.retriever.config.body
  of_passages = encoding.flops(
    retriever.passage_encoder,
    body,
    run.dataset.passages.lengths(),
    config.rows_per_block,
  )
  queries = run.dataset.queries[config.train_split]
  return of_passages + encoding.flops(
    retriever.query_encoder, body, queries.lengths()
  )


if __name__ == '__main__':
  main()
