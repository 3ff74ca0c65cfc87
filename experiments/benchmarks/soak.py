"""Kills a run with SIGKILL at random moments, and compares how it ends.

    python experiments/benchmarks/soak.py --kills=300
    python experiments/benchmarks/soak.py --kills=12 --methods all

A small run that is never killed is the reference. Others are killed, started
again with the same command and killed again, and at last let finish: each must
go on from its newest committed checkpoint and end with the same bits. Three
kills of four are aimed at the phase that was hit least, which the run shows in
a file (watched.py); the others come at any moment.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

os.environ['JAX_PLATFORMS'] = 'cpu'  # Before jax is imported.

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp
import watched

from ance_jax import config
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.training import methods

NUM_PASSAGES, NUM_TRAIN, NUM_DEV, NUM_TOPICS = 150, 96, 16, 12
SETTINGS = config.Config(
  dataset='beir',
  method='ance_in_batch',
  warmup_method='in_batch',
  warmup_steps=4,
  max_steps=32,
  steps_per_refresh=6,
  steps_per_checkpoint=3,
  steps_per_eval=5,
  checkpoints_to_keep=1,
  num_devices=1,
  num_layers=1,
  hidden_size=16,
  num_heads=2,
  intermediate_size=32,
  vocab_size=200,
  dropout_rate=0.2,
  pooling='mean',
  similarity='cosine',
  temperature=0.1,
  query_length=8,
  passage_length=16,
  batch_size=8,
  num_hard_negatives=2,
  top_k=10,
  learning_rate=1e-2,
  lr_warmup_steps=2,
  tokens_per_batch=1024,
  rows_per_block=40,
  steps_per_log=1,
)
# What a row needs otherwise.
ROWS = {
  'adore': {'tie_encoders': False},
  'ance_code': {'query_slices': 3},
  'ance_given': {'negatives_per_source': 4},
  'ance_guided': {'guide': methods.OWN_GUIDE},
  'ance_tele': {'negatives_per_source': 4},
}
# The row that a guide is trained with.
GUIDE = 'in_batch'
# Seconds without a change of phase after which a process hangs.
HANGS = 120
# Runs that go wrong before all is stopped.
MOST_FAULTS = 5
WATCHED = pathlib.Path(__file__).with_name('watched.py')
STARTED = re.compile(
  r'^training .* (?:from step 0|goes on from the checkpoint of step (\d+))$',
  re.MULTILINE,
)


@dataclasses.dataclass
class Aim:
  """When to kill: `delay` seconds after a phase began for the n-th time.

  Without a phase, after the start.
  """

  delay: float
  phase: str | None = None
  times: int = 1


@dataclasses.dataclass
class Ended:
  """How a process ended.

  Attributes:
    code: Exit code.
    phase: What it was killed in; None if it ended by itself, or hung.
    began: List of the step it said that it goes on from, empty from the start;
      None if it did not come to say so.
    text: All that it printed.
    lost_secs: Since the newest checkpoint, or since its start if that is later.
  """

  code: int
  phase: str | None
  began: list | None
  text: str
  lost_secs: float


@dataclasses.dataclass
class Tally:
  """What all runs together came to."""

  phases: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  chains: list = dataclasses.field(default_factory=list)
  faults: list = dataclasses.field(default_factory=list)
  recovered: int = 0
  left_overs: int = 0
  redone_steps: list = dataclasses.field(default_factory=list)
  redone_blocks: list = dataclasses.field(default_factory=list)
  lost_secs: list = dataclasses.field(default_factory=list)

  @property
  def kills(self):
    """Number of kills."""
    return sum(self.phases.values())


def write_beir(folder):
  """Writes a BEIR folder whose texts are words of topics."""
  random = np.random.default_rng(0)

  def words(topic, count):
    return ' '.join(f't{topic}w{w}' for w in random.integers(40, size=count))

  topics = random.integers(NUM_TOPICS, size=NUM_PASSAGES)
  texts = [words(topic, 9) for topic in topics]
  texts[1:20:2] = texts[0:20:2]  # Ten pairs of passages with one text.
  passages = [{'_id': f'p{n}', 'text': text} for n, text in enumerate(texts)]
  queries, lines = [], {'train': [], 'dev': []}
  for number in range(NUM_TRAIN + NUM_DEV):
    row = int(random.integers(NUM_PASSAGES))
    text = ' '.join(random.choice(texts[row].split(), 4, replace=False))
    queries.append({'_id': f'q{number}', 'text': text})
    split = 'train' if number < NUM_TRAIN else 'dev'
    lines[split].append(f'q{number}\tp{row}\t1\n')
  (folder / 'qrels').mkdir(parents=True)
  for name, records in (('corpus', passages), ('queries', queries)):
    text = ''.join(json.dumps(record) + '\n' for record in records)
    (folder / f'{name}.jsonl').write_text(text)
  for split, rows in lines.items():
    head = 'query-id\tcorpus-id\tscore\n'
    (folder / 'qrels' / f'{split}.tsv').write_text(head + ''.join(rows))
  answers = [
    {'_id': query['_id'], 'answers': [query['text'].split()[0]]}
    for query in queries
  ]
  text = ''.join(json.dumps(record) + '\n' for record in answers)
  (folder / 'answers.jsonl').write_text(text)
  _write_scores(folder, lines['train'], random)


def _write_scores(folder, judged, random):
  """Writes a teacher's scores, as a run and with given negatives."""
  ranking, given = [], []
  for line in judged:
    query, positive, _ = line.split('\t')
    rows = random.choice(NUM_PASSAGES, 20, replace=False)
    names = [name for name in (f'p{row}' for row in rows) if name != positive]
    scores = np.sort(random.uniform(size=1 + len(names)))[::-1].round(4)
    for rank, name in enumerate([positive, *names]):
      score = scores[rank]
      ranking.append(f'{query} Q0 {name} {rank + 1} {score} teacher\n')
    record = {
      'query_id': query,
      'positive_ids': [positive],
      'positive_scores': scores[:1].tolist(),
      'negative_ids': names[:4],
      'negative_scores': scores[1:5].tolist(),
    }
    given.append(json.dumps(record) + '\n')
  (folder / 'teacher.trec').write_text(''.join(ranking))
  (folder / 'given.jsonl').write_text(''.join(given))


def settings_of(name, folder):
  """Returns the `Config` of a row, without its workdir.

  Args:
    name: Row of the method table.
    folder: Path of the folder of the data and of the guide.
  """
  row, beir = methods.METHODS[name], folder / 'beir'
  changes = {'method': name, 'data_dir': str(beir), **ROWS.get(name, {})}
  if not row.refreshes:
    changes['warmup_steps'] = 0
  if 'given' in row.sources:
    changes['negatives'] = str(beir / 'given.jsonl')
  elif row.teacher == 'mined':
    changes['score_run'] = str(beir / 'teacher.trec')
  elif row.teacher == 'guide':
    changes.setdefault('guide', str(folder / 'guide' / 'run'))
  return dataclasses.replace(SETTINGS, **changes)


def outcome(workdir):
  """Returns {what: value} of all that two runs must share."""
  last = checkpoint.committed_steps(workdir)[-1]
  found = {'last checkpoint': last}
  with ocp.StandardCheckpointer() as checkpointer:
    for item in ('params', 'opt_state'):
      path = workdir.absolute() / 'checkpoints' / str(last) / item
      leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(path))
      for name, leaf in leaves:
        found[f'{item}{jax.tree_util.keystr(name)}'] = _hash(leaf)
  for path in workdir.glob('refresh/*/negatives.npy'):
    found[f'negatives {path.parent.name}'] = _hash(np.load(path))
  found['pick-ups'] = atomic.read_json(workdir / 'pickups.json')['pickups']
  for line in (workdir / 'metrics.jsonl').read_text().splitlines():
    values = json.loads(line)
    step = values.pop('step')
    for name, value in values.items():
      # What was encoded before a kill is not encoded, and counted, again.
      if not name.startswith('time/') and name != 'refresh/real_tokens':
        key = f'{name} of step {step}'
        found[key] = 'written twice' if key in found else value
  return found


def _hash(array):
  array = np.ascontiguousarray(array)
  head = f'{array.dtype} {array.shape} '.encode()
  return hashlib.sha256(head + array.tobytes()).hexdigest()


def left_over(workdir):
  """Returns the names that no finished run has."""
  return sorted(
    str(path.relative_to(workdir))
    for path in workdir.rglob('*')
    if re.search(r'\.unfinished|tmp|damaged', path.name)
  )


def run_process(folder, number, aim):
  """Runs the command line in `folder` once, and kills it where it is aimed at.

  Args:
    folder: Path; the run is in `folder / 'run'`.
    number: int, of the process in this run, for its log.
    aim: `Aim`, or None to let it end.

  Returns:
    `Ended`, and the `watched.Board` of the process.
  """
  workdir, log = folder / 'run', folder / f'log-{number:02d}.txt'
  name = GUIDE if folder.name == 'guide' else folder.parent.name
  settings = dataclasses.replace(
    settings_of(name, folder.parent), workdir=str(workdir)
  )
  board = watched.Board(folder / 'board', 'w+')
  paths = [folder / 'board', folder / 'units']
  start = time.time()
  with open(log, 'wb') as output:
    process = subprocess.Popen(
      [sys.executable, WATCHED, *paths, *settings.to_flagfile().split()],
      stdout=output,
      stderr=subprocess.STDOUT,
      start_new_session=True,
      env=os.environ
      | {
        'PYTHONUNBUFFERED': '1',
        'HF_HUB_OFFLINE': '1',
        'JAX_COMPILATION_CACHE_DIR': str(folder.parent / 'compiled'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      },
    )
  try:
    hung = _wait(process, board, aim)
  finally:  # Also where a person stops this script.
    os.killpg(process.pid, signal.SIGKILL)
  code, end = process.wait(), time.time()
  killed = code == -signal.SIGKILL and not hung
  manifests = workdir.glob('checkpoints/*/manifest.json')
  saved = max((path.stat().st_mtime for path in manifests), default=0)
  text = log.read_text(errors='replace')
  began = STARTED.search(text)
  return Ended(
    code,
    board.phase() if killed else None,
    began and [int(step) for step in began.groups() if step],
    text + ('\nhung' if hung else ''),
    end - max(saved, start),
  ), board


def _wait(process, board, aim):
  """Returns when it is time to kill, or the process ended, or hangs (True)."""
  begun = changed = time.monotonic()
  changes = 0
  due = begun + aim.delay if aim and not aim.phase else None
  # Not `poll`: the process must not be waited for before it is killed.
  while (
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    is None
  ):
    now = time.monotonic()
    if board.changes() != changes:
      changes, changed = board.changes(), now
    if now - changed > HANGS:
      return True
    if due is None and aim and board.count(aim.phase) >= aim.times:
      due = now + aim.delay
    if due is not None and now >= due:
      return False
    # Phases last from a millisecond on; the start takes seconds.
    wanted = due is not None or (aim and aim.phase)
    time.sleep(1e-4 if wanted and changes else 5e-3)
  return False


def draw_aim(random, targets, phases, board):
  """Returns where to kill next.

  Args:
    random: numpy Generator.
    targets: Names of the phases to aim at.
    phases: Counter of the phases hit.
    board: `watched.Board` of the reference.
  """
  if random.random() < 0.25:
    return Aim(random.uniform(0, 1.5 * board.secs('start')))
  least = min(phases[name] for name in targets)
  names = [name for name in targets if phases[name] == least]
  phase = str(random.choice(names))
  delay = np.exp(random.uniform(np.log(1e-4), np.log(2 * board.secs(phase))))
  # Near enough that ten kills fit into a run.
  times = 1 + int(random.integers(max(board.count(phase) // 8, 1)))
  return Aim(float(delay), phase, times)


def run_chain(folder, draw, most, tally):
  """Kills a run up to `most` times, and lets it finish.

  Args:
    folder: Path of the run and all about it.
    draw: Function that returns the next `Aim`.
    most: Kills of this run.
    tally: `Tally` to add to.

  Returns:
    What went wrong, as text, or None.
  """
  run, units = folder / 'run', folder / 'units'
  waiting, read, done, left = 0, 0, set(), []
  tally.chains.append(0)
  for number in range(most + 1):
    committed = checkpoint.committed_steps(run)[-1:]
    noted = [int(unit[7:]) for unit in done if unit.startswith('commit ')]
    if noted and committed < [max(noted)]:
      return f'step {max(noted)} was committed; the newest is {committed}'
    ended, _ = run_process(folder, number, draw() if number < most else None)
    if fault := judge(ended, committed):
      return fault
    if ended.began is not None:
      left = [name for name in left if (run / name).exists()]
      if left:
        return f'left over from an earlier process: {left}'
      tally.recovered, waiting = tally.recovered + waiting, 0
      lines = units.read_text().splitlines()
      made, read = lines[read:], len(lines)
      if number:
        again = collections.Counter(u.split()[0] for u in made if u in done)
        tally.redone_steps.append(again['step'])
        tally.redone_blocks.append(again['block'])
      done |= set(made)
    if not ended.phase:
      return None
    waiting, tally.chains[-1] = waiting + 1, number + 1
    tally.phases[ended.phase] += 1
    tally.lost_secs.append(ended.lost_secs)
    # The names hold the process's id: none is ever written again.
    found = [n for n in left_over(run) if n.endswith('.unfinished')]
    tally.left_overs += len(set(found) - set(left))
    left = found
    print(f'kill {tally.kills}: {folder.name} in {ended.phase}', flush=True)
  return None


def judge(ended, committed):
  """Returns what was wrong with a process, as text, or None.

  Args:
    ended: `Ended`.
    committed: List of the newest step that was committed before, or empty.
  """
  if not ended.phase and (ended.code or ended.began is None):
    return f'ended with {ended.code}: {ended.text[-3000:]}'
  if ended.began is not None and ended.began != committed:
    return f'began from step {ended.began}, not from {committed}'
  return None


def compare(folder, expected):
  """Returns how a finished run differs from the reference, or None."""
  try:
    found = outcome(folder / 'run')
  except Exception as error:  # Whatever it is, it is what is looked for here.
    return f'cannot be read: {error!r}'
  wrong = [
    f'{key}: {found.get(key)} instead of {expected.get(key)}'
    for key in sorted(found.keys() | expected.keys())
    if found.get(key) != expected.get(key)
  ]
  wrong += [f'left over: {name}' for name in left_over(folder / 'run')]
  if not wrong:
    return None
  return f'{len(wrong)} differences, such as\n  ' + '\n  '.join(wrong[:8])


def soak(folder, tally, *, kills, kills_per_run, seed, targets):
  """Runs a row that is killed so often, against one that is not.

  Args:
    folder: Path of an empty folder with the row's name.
    tally: `Tally` to add to.
    kills: int.
    kills_per_run: int.
    seed: int.
    targets: Names of the phases to aim at.
  """
  write_beir(folder / 'beir')
  # `ance_guided` has its own weights as the guide.
  reads_guide = settings_of(folder.name, folder).guide not in (
    '',
    methods.OWN_GUIDE,
  )
  for name in ['guide'] * reads_guide + ['reference']:
    (folder / name).mkdir()
    ended, board = run_process(folder / name, 0, None)
    if ended.code:
      raise RuntimeError(f'{name} did not end well: {ended.text[-3000:]}')
  expected = outcome(folder / 'reference' / 'run')
  for name in ('start', *watched.TARGETS):
    secs = 1000 * board.secs(name)
    print(f'{name:10s}{board.count(name):5d} times, {secs:9.2f} ms')
  random, kills = np.random.default_rng(seed), tally.kills + kills
  # Not all rows have all phases.
  targets = [name for name in targets if board.count(name)]

  def draw():
    return draw_aim(random, targets, tally.phases, board)

  while tally.kills < kills and len(tally.faults) < MOST_FAULTS:
    run = folder / f'run-{len(tally.chains):03d}'
    run.mkdir()
    most = min(kills_per_run, kills - tally.kills)
    fault = run_chain(run, draw, most, tally) or compare(run, expected)
    if fault:
      tally.faults.append(f'{run}: {fault}')
      print(f'FAULT {tally.faults[-1]}', flush=True)
    else:
      shutil.rmtree(run)


def report(tally, secs):
  """Prints the table, and the same numbers as a JSON object."""
  phases = {name: tally.phases[name] for name in watched.PHASES}
  kills, runs = tally.kills, len(tally.chains)
  numbers = {
    'kills': kills,
    'runs': runs,
    'bit_equal': runs - len(tally.faults),
    'recovered': tally.recovered,
    'left_overs_removed': tally.left_overs,
    'recovery_rate': round(tally.recovered / max(kills, 1), 4),
    'most_kills_of_a_run': max(tally.chains),
    'runs_of_ten_kills': sum(n >= 10 for n in tally.chains),
    'fewest_kills_of_a_phase': min(phases[name] for name in watched.TARGETS),
    'secs_per_kill': round(secs / max(kills, 1), 2),
  }
  for name in ('redone_steps', 'redone_blocks', 'lost_secs'):
    values = getattr(tally, name) or [0]
    numbers[f'{name}_mean'] = round(statistics.mean(values), 2)
    numbers[f'{name}_max'] = round(max(values), 2)
  print()
  for name, value in numbers.items():
    print(f'{name:24s}{value:>10}')
  for name, value in phases.items():
    print(f'killed in {name:14s}{value:>10}')
  print(json.dumps({**numbers, 'killed_in': phases}))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--kills', type=int, default=300, help='Of each row.')
  parser.add_argument(
    '--kills_per_run', type=int, default=12, help='Before a run may finish.'
  )
  parser.add_argument(
    '--seed',
    type=int,
    default=0,
    help='Of the moments, as far as the clock lets it.',
  )
  parser.add_argument(
    '--targets',
    nargs='+',
    choices=watched.TARGETS,
    default=watched.TARGETS,
    help='Phases to aim at; default: all.',
  )
  parser.add_argument(
    '--folder', default='', help='New folder to work in; default: a temporary.'
  )
  parser.add_argument(
    '--methods',
    nargs='+',
    choices=[*methods.METHODS, 'all'],
    default=[SETTINGS.method],
    help='Rows to train.',
  )
  given = parser.parse_args()
  logging.set_verbosity(logging.ERROR)  # Orbax tells of each array.
  folder = pathlib.Path(given.folder or tempfile.mkdtemp(prefix='soak-'))
  folder.mkdir(parents=True, exist_ok=True)
  start, tally = time.monotonic(), Tally()
  for name in methods.METHODS if 'all' in given.methods else given.methods:
    print(f'--method={name}', flush=True)
    (folder / name).mkdir()
    soak(
      (folder / name).absolute(),
      tally,
      kills=given.kills,
      kills_per_run=given.kills_per_run,
      seed=given.seed,
      targets=given.targets,
    )
  report(tally, time.monotonic() - start)
  if tally.faults:
    print(f'{len(tally.faults)} runs went wrong; see {folder}', file=sys.stderr)
    return 1
  if not given.folder:
    shutil.rmtree(folder)
  return 0


if __name__ == '__main__':
  sys.exit(main())
