"""Compares two working copies of this project, bit for bit.

    git worktree add ../before COMMIT
    python experiments/same_numbers.py ../before . --only='train ance'

Each case is a command, given to both copies on the small data of
tests/data/run_of_0.1.0: training of each row of the method table, plainly, in
micro-batches, with remat, on passages in pieces; what each row mines; and what
--job=mine writes with each of its filters. Losses, norms of gradients,
parameters, the optimizer's state and mined tables must have the same bits, but
for negatives that are drawn at random; written scores, six digits.

A sum in another order has other bits, and some steps later the runs are two.
Where training has other bits, both copies take one step from each of the first
states of the old one, with the same batch: losses and gradients must agree to
1e-6 of the largest entry, and mined tables be equal. Prints a line a case;
the exit code is 1 if one failed.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp

# What the script is called with as the process of a copy.
SERVE = 'serve'
HERE = pathlib.Path(__file__).parent
DATA = HERE.parent / 'tests' / 'data' / 'run_of_0.1.0'
TOLERANCE = 1e-6
TOWERS = 'tied', 'query', 'passage'
# Of AdamW: after one step from nothing, the first moment is this of the
# gradient.
FIRST_MOMENT = 0.1
# As in the tests: two devices, and XLA compiles in a third of the time.
XLA_FLAGS = (
  '--xla_force_host_platform_device_count=2 '
  '--xla_backend_optimization_level=0 '
  '--xla_llvm_disable_expensive_passes=true '
  '--xla_cpu_use_fusion_emitters=false'
)
# It starts where the committed run ends: a random encoder's embeddings are so
# alike that its gradients are small differences, and of 1e-6 nothing is left.
TRAINING = (
  '--dataset=beir --data_dir=data --workdir=made --init_from=run '
  '--max_steps=20 --batch_size=8 --hard_negatives=2 --top_k=8 --pooling=mean '
  '--similarity=cosine --temperature=0.25 --query_length=12 '
  '--passage_length=24 --optimizer=adamw --learning_rate=1e-2 '
  '--lr_warmup_steps=2 --tokens_per_batch=1024 --rows_per_block=32 '
  '--steps_per_refresh=8 --steps_per_log=1 --bm25_run=whole.trec'
).split()
# What a row needs beside TRAINING; refreshes are at steps 4 and 12.
WARM_UP = '--warmup_steps=4'
ROWS = {
  'ance_code': '--hard_negatives=3 --query_slices=3',
  'given': '--negatives=given.jsonl',
  'given_in_batch': '--negatives=given.jsonl',
}
VARIANTS = {
  'plain': '',
  'micro-batched': '--micro_batch_size=2',
  'remat': '--remat',
  'chunks': '--chunks=2 --passage_length=12',
}
# Tried with one row alone.
ONE_ROW = 'ance_in_batch'
MORE_VARIANTS = {
  'micro-batched, chunks': '--micro_batch_size=2 --chunks=2 --passage_length=9',
  'two towers': '--tie_encoders=false',
  'lamb': '--optimizer=lamb --weight_decay=0.01',
  'bfloat16': '--dtype=bfloat16',
  'one device': '--num_devices=1',
  'delayed': '--refresh=delayed --refresh_delay=2',
}
# A vocabulary and random weights.
BEGINNING = [
  *TRAINING, '--init_from=', '--max_steps=1', '--num_layers=2',
  '--hidden_size=16', '--num_heads=2', '--intermediate_size=32',
  '--vocab_size=160', '--head_size=12', '--method=in_batch',
]  # fmt: skip
MINING = [*TRAINING, '--max_steps=1', '--warmup_steps=0']
# Of rows on BM25's, which finds fewer than --top_k: the rest is drawn.
SHORT = '--bm25_run=ranking.trec'
MINING_VARIANTS = {
  'plain': '',
  'nodrop_same_text': '--nodrop_same_text',
  'nodrop_answers': '--nodrop_answers',
}
INDEX_VARIANTS = {
  'deep': '--top_k=30',
  'on devices': '--index=device',
  'centred': '--center_passages',
}
WRITING = (
  '--job=mine --data_dir=data --workdir=run --num_negatives=4 --mine_to=20 '
  '--output=mined.json --format=ids'
).split()
WRITING_VARIANTS = {
  'plain': '',
  'nodrop_same_text': '--nodrop_same_text --num_negatives=20',
  'nodrop_answers': '--nodrop_answers',
  'mine_from': '--mine_from=3',
  'mine_to': '--mine_to=4',
  'max_score': '--max_score=0.85',
  'min_score': '--min_score=0.85',
  'absolute_margin': '--absolute_margin=0.05',
  'relative_margin': '--relative_margin=0.05',
  'judge_run': '--judge_run=ranking.trec --judge_max_score=1.5',
  'ranking': '--ranking=ranking.trec',
  'bm25': '--retriever=bm25',
  'random': '--sampling=random',
  'fill': '--too_few=fill --absolute_margin=0.1',
  'drop': '--too_few=drop --absolute_margin=0.1',
  'chunks': '--chunks=2',
  'older': '--checkpoint=8',
  'triplets': '--format=triplets',
  'triplets_scored': '--format=triplets_scored',
  'n_tuples': '--format=n_tuples --too_few=fill',
  'n_tuples_scored': '--format=n_tuples_scored --too_few=fill',
  'flag_embedding': '--format=flag_embedding',
  'dpr': '--format=dpr',
  'tevatron': '--format=tevatron',
}


class Side(NamedTuple):
  """One of the two working copies.

  Attributes:
    name: 'old' or 'new'.
    folder: Path of the folder that its commands are run in.
    process: That which runs them.
  """

  name: str
  folder: pathlib.Path
  process: subprocess.Popen


class Failed(Exception):
  """The copies do not do the same; the text says what."""


def main(arguments):
  """Compares; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('old', type=pathlib.Path)
  parser.add_argument('new', type=pathlib.Path)
  parser.add_argument('--only', default='', help='Regular expression.')
  parser.add_argument('--states', type=int, default=20)
  parser.add_argument('--folder', help='Is kept; not given: one that goes.')
  given = parser.parse_args(arguments)
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(given.folder or temporary).absolute()
    codes = {'old': given.old, 'new': given.new}
    sides = [start(name, codes[name].absolute(), folder) for name in codes]
    prepared = folder / 'prepared'
    try:
      prepare(sides[0], prepared)
      wrong = 0
      for name, compare, flags in cases(codes['old']):
        if re.search(given.only, name):
          began = time.monotonic()
          found, is_right = tried(compare, sides, prepared, flags, given.states)
          secs = time.monotonic() - began
          print(f'{name}: {found} ({secs:.0f} s)', flush=True)
          wrong += not is_right
    finally:
      for side in sides:
        side.process.communicate()
  print(f'{wrong} cases differ' if wrong else 'no case differs')
  return bool(wrong)


def cases(code):
  """Yields the name, the function and the flags of each case."""
  yield 'begin', compare_beginnings, BEGINNING
  for row in (rows := row_names(code)):
    more = MORE_VARIANTS if row == ONE_ROW else {}
    warm_up = WARM_UP if row.startswith('ance') else ''
    for variant, flags in {**VARIANTS, **more}.items():
      flags = f'--method={row} {warm_up} {ROWS.get(row, "")} {flags}'.split()
      yield f'train {row}, {variant}', compare_training, [*TRAINING, *flags]
  for row in rows:
    more = INDEX_VARIANTS if row.startswith('ance') else {}
    more = {'short': SHORT} if row in ('bm25', 'dpr') else more
    for variant, flags in {**MINING_VARIANTS, **more}.items():
      flags = f'--method={row} {ROWS.get(row, "")} {flags}'.split()
      if row not in ('random', 'in_batch'):
        yield f'mine for {row}, {variant}', compare_tables, [*MINING, *flags]
  for variant, flags in WRITING_VARIANTS.items():
    yield f'mine {variant}', compare_written, [*WRITING, *flags.split()]


def row_names(code):
  """Returns the rows of a copy's method table."""
  table = 'from ance_jax.training import methods; print(*methods.METHODS)'
  return subprocess.run(
    [sys.executable, '-c', table],
    env={**os.environ, 'PYTHONPATH': str(code.absolute())},
    capture_output=True, text=True, check=True,
  ).stdout.split()  # fmt: skip


def prepare(old, folder):
  """Makes what all cases read: the data, a run, and negatives of it."""
  shutil.rmtree(folder, ignore_errors=True)
  for name in ('data', 'run'):
    shutil.copytree(DATA / name, folder / name)
  bm25 = '--retriever=bm25 --dataset=beir --data_dir=data --workdir=bm25'
  for job, made, name in (
    ('--job=evaluate --split=train', 'bm25/train-bm25-0.trec', 'ranking.trec'),
    ('--job=mine --format=ids --too_few=fill', 'bm25/*.jsonl', 'given.jsonl'),
  ):
    run_one(old, folder, f'{job} {bm25}'.split())
    (path,) = old.folder.glob(made)
    shutil.move(path, folder / name)
  write_whole(folder)


def write_whole(folder):
  """Writes BM25's ranking with all other passages behind it, as a run file.

  Passages that are drawn where it ends need not be the same ones.
  """
  corpus = (folder / 'data' / 'corpus.jsonl').read_text().splitlines()
  ids = [json.loads(line)['_id'] for line in corpus]
  lines = (folder / 'ranking.trec').read_text().splitlines()
  ranked = {}
  for query, _, passage, *_ in map(str.split, lines):
    ranked.setdefault(query, []).append(passage)
  for query, found in ranked.items():
    rest = [an_id for an_id in ids if an_id not in found]
    lines += [
      f'{query} Q0 {an_id} 0 {-rank} x' for rank, an_id in enumerate(rest, 1)
    ]
  (folder / 'whole.trec').write_text('\n'.join(lines) + '\n')


def tried(compare, sides, prepared, flags, states):
  """Returns what came of a case, as text, and whether that is right."""
  try:
    return compare(sides, prepared, flags, states), True
  except Failed as failed:
    return f'DIFFERS: {failed}', False


def compare_training(sides, prepared, flags, states):
  """Trains with both copies; see the top."""
  if refused := run_both(sides, prepared, flags):
    return refused
  if (found := difference_of_runs(*sides)) is None:
    return 'equal'
  return f'{found}; {compare_states(sides, prepared, flags, states)}'


def compare_beginnings(sides, prepared, flags, states):
  """Has both copies begin from nothing."""
  if refused := run_both(sides, prepared, flags):
    return refused
  tokens = [
    sorted(p.read_bytes() for p in (side.folder / 'made').rglob('ids.bin'))
    for side in sides
  ]
  if tokens[0] != tokens[1]:
    raise Failed('texts have other tokens')
  if name := difference_of_arrays(*sides, 'params', step=0):
    raise Failed(f'the weights {name} have other bits')
  return 'equal'


def compare_states(sides, prepared, flags, states):
  """Has both copies take a step from each of the old run's first states."""
  old = sides[0]
  every = ['--steps_per_checkpoint=1', f'--checkpoints_to_keep={states + 1}']
  run_one(old, prepared, [*flags, *every, f'--max_steps={states}'])
  start = prepared.with_name('start')
  shutil.rmtree(start, ignore_errors=True)
  shutil.copytree(prepared, start)
  shutil.rmtree(start / 'run')
  shutil.move(old.folder / 'made', start / 'run')
  worst = 0.0
  for state in reversed(range(states)):
    # The newest one there is, is where a run starts.
    shutil.rmtree(start / 'run' / 'checkpoints' / str(state + 1))
    step = [
      '--init_from=run', '--max_steps=1', '--warmup_steps=0',
      '--optimizer=adamw', '--clip_norm=0', f'--seed={state}',
    ]  # fmt: skip
    if refused := run_both(sides, start, [*flags, *step]):
      raise Failed(refused)
    worst = max(worst, difference_of_steps(*sides, state))
  return f'{worst:.1e} of the largest entry in {states} states'


def compare_tables(sides, prepared, flags, states):
  """Has both copies mine for a row, and take a step on it."""
  if refused := run_both(sides, prepared, flags):
    return refused
  check_tables(*sides)
  return 'equal'


def compare_written(sides, prepared, flags, states):
  """Has both copies write negatives for others."""
  if refused := run_both(sides, prepared, flags):
    return refused
  reports = [
    json.loads((side.folder / 'mined.report.json').read_text())
    for side in sides
  ]
  # Filters may have other names, and there may be more of them.
  old, new = (
    [counts for counts in report['taken'].values() if counts['queries']]
    for report in reports
  )
  if old != new:
    raise Failed(f'filters took {old} and {new}')
  old, new = (
    [
      json.loads(line.rstrip(','))
      for line in (side.folder / 'mined.json').read_text().splitlines()
      if line.strip('[]')
    ]
    for side in sides
  )
  if {'--too_few=fill', '--sampling=random'} & set(flags):
    if len(old) != len(new) or reports[0]['drawn'] != reports[1]['drawn']:
      raise Failed(f'{len(old)} and {len(new)} lines')
    return 'equal counts, as negatives are drawn'
  same = sum(alike(*lines) for lines in zip(old, new, strict=False))
  if not same == len(old) == len(new):
    raise Failed(f'{len(old)} and {len(new)} lines, {same} the same')
  return 'equal'


def alike(old, new):
  """Returns whether two JSON values are the same, scores to `TOLERANCE`."""
  if isinstance(old, dict) and isinstance(new, dict):
    return old.keys() == new.keys() and all(
      alike(old[key], new[key]) for key in old
    )
  if isinstance(old, list) and isinstance(new, list):
    return len(old) == len(new) and all(map(alike, old, new))
  if isinstance(old, float) and isinstance(new, float):
    return abs(old - new) <= TOLERANCE * max(abs(old), 1.0)
  return old == new


def difference_of_runs(old, new):
  """Returns what is not bit-equal of two runs that were trained; or None."""
  lines = [metrics_of(side) for side in (old, new)]
  for key, value in lines[0].items():
    if key not in lines[1]:
      raise Failed(f'no {key[1]} at step {key[0]}')
    if value != lines[1][key]:
      step, name = key
      return f'{name} at step {step} was {value!r} and is {lines[1][key]!r}'
  for item in ('params', 'opt_state'):
    if name := difference_of_arrays(old, new, item):
      return f'{name} of {item} at the end has other bits'
  check_tables(old, new)
  return None


def difference_of_arrays(old, new, item, step=None):
  """Returns the name of an array of a checkpoint with other bits, or None."""
  trees = [arrays_of(side, item, step) for side in (old, new)]
  check_names(*trees)
  for name, array in trees[0].items():
    other = trees[1][name]
    if (array.dtype, array.tobytes()) != (other.dtype, other.tobytes()):
      return name
  return None


def difference_of_steps(old, new, state):
  """Returns how far apart a loss and its gradient are, of the largest entry."""
  key = 1, 'train/loss'
  losses = [metrics_of(side)[key] for side in (old, new)]
  far = abs(losses[1] - losses[0]) / max(abs(losses[0]), 1.0)
  gradients = [
    {
      name: array / FIRST_MOMENT
      for name, array in arrays_of(side, 'opt_state').items()
      if '.mu.' in name
    }
    for side in (old, new)
  ]
  check_names(*gradients)
  largest = max(np.abs(array).max() for array in gradients[0].values())
  apart = max(
    np.abs(gradients[1][name] - array).max()
    for name, array in gradients[0].items()
  )
  far = max(far, float(apart / max(largest, 1e-30)))
  if not far <= TOLERANCE:
    raise Failed(
      f'at state {state} loss {losses[0]!r} and {losses[1]!r}, with the '
      f'gradient {far:.1e} of the largest entry apart'
    )
  check_tables(old, new)
  return far


def check_tables(old, new):
  """Raises `Failed` unless what was mined is the same."""
  tables = [
    {
      str(path.relative_to(side.folder)): path
      for path in sorted((side.folder / 'made').rglob('negatives.npy'))
    }
    for side in (old, new)
  ]
  check_names(*tables)
  for name in tables[0]:
    before, after = (np.load(paths[name]) for paths in tables)
    if before.shape != after.shape or before.dtype != after.dtype:
      raise Failed(f'{name} was {before.shape} and is {after.shape}')
    # What is drawn, at the end of a row, may be something else.
    others = int(np.logical_or.accumulate(before != after, 1).sum())
    if others > num_drawn(tables[1][name].parent):
      raise Failed(f'{others / before.size:.2%} of {name} is another')


def num_drawn(folder):
  """Returns how many entries of a folder's negatives were drawn at random."""
  metrics = json.loads((folder / 'manifest.json').read_text())['metrics']
  return metrics.get('refresh/random', metrics.get('random', 0))


def check_names(old, new):
  """Raises `Failed` unless two dicts have the same names."""
  if other := old.keys() ^ new.keys():
    raise Failed(f'one has {", ".join(sorted(other)[:3])}, and one has not')


def metrics_of(side):
  """Returns {(step, name): value} of all that is no time and no operation."""
  lines = (side.folder / 'made' / 'metrics.jsonl').read_text().splitlines()
  return {
    (line['step'], name): value
    for line in map(json.loads, lines)
    for name, value in line.items()
    if name.split('/')[0] in ('train', 'dev', 'probe', 'refresh')
  }


def arrays_of(side, item, step=None):
  """Returns {name: array} of an item of a checkpoint, or of the newest."""
  folder = side.folder / 'made' / 'checkpoints'
  if step is None:
    step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  with ocp.PyTreeCheckpointer() as reader:
    path = folder / str(step) / item
    tree = reader.metadata(path).item_metadata.tree
    found = dict(named(reader.restore(path, restore_args=as_numpy(tree))))
  if item == 'opt_state':
    return {by_tree(name): array for name, array in found.items()}
  return found


def by_tree(name):
  """Returns a name in the optimizer's state that copies have in common.

  It was of one state for all towers: .1.0.mu.tied.body; it is .tied.0.mu.body,
  one for each. Of how many steps were counted there is one.
  """
  parts = [part for part in name.split('.')[1:] if not part.isdigit()]
  if 'count' in parts:
    return '.count'
  if parts[0] not in TOWERS:
    parts[:2] = reversed(parts[:2])
  return '.'.join(['', *parts])


def as_numpy(tree):
  """Returns what tells Orbax to read a tree of arrays without devices."""
  if isinstance(tree, dict):
    return {key: as_numpy(value) for key, value in tree.items()}
  if isinstance(tree, list | tuple):
    return type(tree)(as_numpy(value) for value in tree)
  return ocp.RestoreArgs(restore_type=np.ndarray)


def named(tree, place=''):
  """Yields the name and the array of each leaf of a tree."""
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from named(value, f'{place}.{key}')
  elif isinstance(tree, list | tuple):
    for key, value in enumerate(tree):
      yield from named(value, f'{place}.{key}')
  elif tree is not None:
    yield place, np.asarray(tree)


def run_both(sides, prepared, flags):
  """Gives a command to both copies, each in a folder that is made anew.

  Returns:
    Text if both refuse it with the same sentence, else ''.

  Raises:
    Failed: One of them ended otherwise than the other.
  """
  for side in sides:
    begin(side, prepared, flags)
  (old, old_text), (new, new_text) = map(finish, sides)
  if old != new:
    raise Failed(f'exit codes {old} and {new}: {old_text} {new_text}')
  if old and old_text != new_text:
    raise Failed(f'refused with {old_text!r} and {new_text!r}')
  return f'equal, refused: {old_text}' if old else ''


def run_one(side, prepared, flags):
  """Gives a command to one copy, which must take it."""
  begin(side, prepared, flags)
  code, text = finish(side)
  if code:
    raise Failed(f'{side.name}: {text}')


def begin(side, prepared, flags):
  """Gives a command to the process of a copy, in what was prepared."""
  shutil.rmtree(side.folder, ignore_errors=True)
  shutil.copytree(prepared, side.folder)
  line = json.dumps([str(side.folder), flags])
  side.process.stdin.write(f'{line}\n')
  side.process.stdin.flush()


def finish(side):
  """Returns the exit code of a command, and the last line of its errors."""
  line = side.process.stdout.readline()
  if not line:
    raise RuntimeError(f'the process of the {side.name} copy ended')
  return json.loads(line)


def start(name, code, folder):
  """Returns a `Side` whose process waits for commands."""
  environment = {
    **os.environ,
    'PYTHONPATH': str(code),
    'XLA_FLAGS': XLA_FLAGS,
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'TQDM_DISABLE': '1',
  }
  process = subprocess.Popen(
    [sys.executable, __file__, SERVE], env=environment, text=True,
    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
  )  # fmt: skip
  return Side(name, folder / name, process)


def serve():
  """Runs the command line for each line that comes in; names main.py alone.

  One process for all cases: to import everything anew takes seconds.
  """
  from absl import app
  from absl import flags
  import jax
  import matplotlib.figure

  from ance_jax import config
  from ance_jax import main as command_line

  # Flags have the old copy's names.
  renamed = getattr(config, 'renamed', str)
  ended = []
  # They would end the process, define jax's flags twice, and draw for seconds.
  app.run = lambda run, flags_parser: ended.append(run(flags_parser(sys.argv)))
  jax.config.config_with_absl = lambda: None
  matplotlib.figure.Figure.savefig = lambda *args, **kwargs: None
  answers, sys.stdout = sys.stdout, open(os.devnull, 'w')
  for line in sys.stdin:
    folder, arguments = json.loads(line)
    os.chdir(folder)
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
      if module.startswith('ance_jax'):
        flags.FLAGS.remove_flag_values([flag.name for flag in defined])
    sys.argv = ['ance_jax', *map(renamed, arguments)]
    with contextlib.redirect_stderr(io.StringIO()) as errors:
      try:
        command_line.run()
      except SystemExit as end:
        ended.append(end.code)
    text = errors.getvalue().strip().split('\n')[-1]
    print(json.dumps([ended.pop(), text]), file=answers, flush=True)
    jax.clear_caches()  # They would come to gigabytes.


if __name__ == '__main__':
  logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax warns of nothing.
  sys.exit(serve() if sys.argv[1:] == [SERVE] else main(sys.argv[1:]))
