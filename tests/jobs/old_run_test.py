"""A run that an earlier version wrote is read as it was, by all jobs but one.

Training refuses it: the optimizer's state has another form by now.

Its folder is in data/ and is never made again; what each job gave on it when it
was written is in expected.json beside it. All jobs are given as on the command
line, on a copy: no module but main.py is named here.
"""

import ast
import contextlib
import hashlib
import io
import json
import pathlib
import re
import shutil
import sys

from absl import app
from absl import flags
import jax
import numpy as np
import pytest

from ance_jax import main

pytestmark = pytest.mark.usefixtures('compiled_once')
FOLDER = pathlib.Path(__file__).parents[1] / 'data' / 'run_of_0.1.0'
EXPECTED = json.loads((FOLDER / 'expected.json').read_text())
# Its last checkpoint, its last refresh, and where a run from its weights ends.
LAST, REFRESHED, NEW_END = 10, 8, 14
# Other bits of XLA, and of the processor, are allowed.
ACCURACY = 1e-6
MINED = ['--job=mine', '--num_negatives=4', '--max_rank=20']
# With what each case of --job=mine is asked for, beside MINED.
FILTERS = {
  'plain': [],
  'nodrop_same_text': ['--nodrop_same_text', '--num_negatives=20'],
  'nodrop_answers': ['--nodrop_answers'],
  'mine_from': ['--skip_ranks=3'],
  'mine_to': ['--max_rank=4'],
  'max_score': ['--max_score=0.85'],
  'min_score': ['--min_score=0.85'],
  'absolute_margin': ['--absolute_margin=0.05'],
  'relative_margin': ['--relative_margin=0.05'],
  'judge': [
    '--score_run={old}/bm25/train-bm25-0.trec',
    '--rerank_max_score=1.5',
  ],
  'ranking': [f'--ranking={{old}}/run/train-model-{REFRESHED}.trec'],
  'bm25': ['--retriever=bm25'],
  'random': ['--choose=random'],
  'fill': ['--on_shortage=fill', '--absolute_margin=0.1'],
  'drop': ['--on_shortage=drop', '--absolute_margin=0.1'],
  'older': [f'--checkpoint={REFRESHED}'],
}
# Flags that leave what the two draw from.
RANDOM = {
  'random': ['--num_negatives=20'],
  'fill': ['--absolute_margin=0.1'],
}
# Of filters that a report has under other names now.
OLD_NAMES = {
  'skip_ranks': 'mine_from',
  'no score_run': 'no judge_run',
  'rerank_max_score': 'judge_max_score',
}
FORMATS = {
  'triplets': [],
  'triplets_scored': [],
  'n_tuples': ['--on_shortage=fill'],
  'n_tuples_scored': ['--on_shortage=fill'],
  'flag_embedding': [],
  'dpr': [],
  'tevatron': [],
}
# Of test.
QUERIES = {
  'q30': 'swims after fish',
  'q32': 'largest hunter of the pond',
  'q36': 'who keeps aphids',
}


def command(*arguments, code=0):
  """Runs `python -m ance_jax.main` in this process; returns what it printed."""
  codes = []

  def run(main, flags_parser):
    codes.append(main(flags_parser(sys.argv)))

  printed = io.TextIOWrapper(io.BytesIO())
  with pytest.MonkeyPatch.context() as patch:
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
      if module.startswith('ance_jax'):
        flags.FLAGS.remove_flag_values([flag.name for flag in defined])
    # It would end the process, and jax's own flags are defined once.
    patch.setattr(app, 'run', run)
    patch.setattr(jax.config, 'config_with_absl', lambda: None)
    patch.setattr(sys, 'argv', ['ance_jax', *map(str, arguments)])
    with contextlib.redirect_stdout(printed):
      main.run()
  printed.flush()
  text = printed.buffer.getvalue().decode()
  assert codes == [code], text
  return text


class Old:
  """A copy of the old run and of its data."""

  def __init__(self, folder, *, without=('tokens', 'embeddings')):
    """Copies it; what is `without` has to be made again."""
    self.run, self.data = folder / 'run', folder / 'data'
    left_out = shutil.ignore_patterns(*without)
    shutil.copytree(FOLDER / 'run', self.run, ignore=left_out)
    shutil.copytree(FOLDER / 'data', self.data)
    self.folder = folder

  def read(self, *arguments):
    """Runs a job on it, in its folder."""
    return command(
      f'--workdir={self.run}', f'--data_dir={self.data}', *arguments
    )

  def read_elsewhere(self, name, *arguments):
    """Runs a job on it that writes into a folder of its own."""
    return command(
      f'--init_from={self.run}',
      f'--workdir={self.folder / name}',
      f'--data_dir={self.data}',
      *arguments,
    )

  def go_on(self, *arguments, code=0):
    """Trains on, with the flags that the run left."""
    return command(
      f'--flagfile={self.run / "run.flags"}',
      f'--workdir={self.run}',
      f'--data_dir={self.data}',
      *arguments,
      code=code,
    )

  def bm25(self, split):
    """Returns the run file of BM25 on a split."""
    folder = self.folder / 'bm25'
    command(
      '--job=evaluate', '--retriever=bm25', f'--split={split}',
      f'--workdir={folder}', '--dataset=beir', f'--data_dir={self.data}',
    )  # fmt: skip
    return folder / f'{split}-bm25-0.trec'


@pytest.fixture
def old(tmp_path):
  return Old(tmp_path)


def check(name, found):
  """Compares with what was found when the run was written."""
  assert_same(found, EXPECTED[name], name)


def assert_same(found, expected, where, accuracy=ACCURACY):
  if isinstance(expected, dict):
    assert list(found) == list(expected), where
    for key in expected:
      assert_same(found[key], expected[key], f'{where}: {key}', accuracy)
  elif isinstance(expected, list):
    assert len(found) == len(expected), where
    for place, pair in enumerate(zip(found, expected, strict=True)):
      assert_same(*pair, f'{where}: {place}', accuracy)
  elif isinstance(expected, float):
    close = pytest.approx(expected, rel=accuracy, abs=accuracy, nan_ok=True)
    assert found == close, where
  else:
    assert found == expected, where


def read_json(path):
  """Returns a JSON file without its own hash."""
  found = json.loads(path.read_text())
  found.pop('sha256', None)
  return found


def keys_of(path):
  """Returns the keys of a JSON file, its own hash's among them."""
  return sorted(json.loads(path.read_text()))


def read_ranking(path, depth=None):
  """Returns {query id: ids and scores, best first} of a TREC run file."""
  found = {}
  for line in path.read_text().splitlines():
    query, _, passage, rank, score, _ = line.split()
    ids, scores = found.setdefault(query, [[], []])
    if depth is None or int(rank) <= depth:
      ids.append(passage)
      scores.append(float(score))
  return found


def read_embeddings(folder):
  """Returns {passage id: embedding} of what --job=encode wrote."""
  (ids,) = folder.rglob('ids.txt')
  blocks = [np.load(path) for path in sorted(ids.parent.rglob('*.npy'))]
  rows = np.concatenate(blocks).tolist()
  return dict(zip(ids.read_text().split(), rows, strict=True))


def shown(embeddings):
  """Returns some rows of embeddings whole, and the mean of each row."""
  means = [float(np.mean(row)) for row in embeddings.values()]
  some = list(embeddings)[::8]
  return {'means': means, **{name: embeddings[name] for name in some}}


@pytest.mark.parametrize('split', ['dev', 'test'])
@pytest.mark.parametrize('step', [REFRESHED, LAST])
def test_evaluate(split, step, old):
  old.read('--job=evaluate', f'--split={split}', f'--checkpoint={step}')
  name = f'{split}-model-{step}'
  found = read_json(old.run / f'{name}.json')
  found['ranking'] = read_ranking(old.run / f'{name}.trec', depth=5)
  check(f'evaluate {name}', found)


def test_evaluate_on_more_devices_than_it_was_trained_on(old):
  old.read('--job=evaluate', '--split=test', '--num_devices=2')
  found = read_json(old.run / f'test-model-{LAST}.json')
  name = f'evaluate test-model-{LAST}'
  assert_same(found['metrics'], EXPECTED[name]['metrics'], 'test')
  ranking = read_ranking(old.run / f'test-model-{LAST}.trec', depth=5)
  assert_same(ranking, EXPECTED[name]['ranking'], 'ranking')


def test_evaluate_with_bm25(old):
  path = old.bm25('test')
  found = read_json(path.with_suffix('.json'))
  found['ranking'] = read_ranking(path, depth=5)
  check('evaluate bm25', found)


def test_encode(old):
  old.read_elsewhere('mine', '--job=encode')
  check('encode', shown(read_embeddings(old.folder / 'mine')))


def test_encode_takes_the_embeddings_and_token_rows_that_are_there(tmp_path):
  old = Old(tmp_path, without=())
  rows = sorted((old.run / 'tokens').iterdir())
  old.read('--job=encode')
  check('encode', shown(read_embeddings(old.run / 'embeddings')))
  (folder,) = (old.run / 'embeddings').iterdir()
  written = FOLDER / 'run' / 'embeddings' / folder.name
  for path in folder.rglob('*.npy'):
    assert (
      path.read_bytes() == (written / path.relative_to(folder)).read_bytes()
    )
  assert sorted((old.run / 'tokens').iterdir()) == rows


def test_prepare_cuts_texts_into_the_same_tokens(old):
  old.go_on('--job=prepare', f'--workdir={old.folder / "mine"}')
  found = {path.read_bytes() for path in old.folder.rglob('mine/**/ids.bin')}
  written = list((FOLDER / 'run' / 'tokens').rglob('ids.bin'))
  assert len(written) == 3
  assert {path.read_bytes() for path in written} <= found


def test_search(old):
  rankings = EXPECTED[f'evaluate test-model-{LAST}']['ranking']
  for query_id, query in QUERIES.items():
    text = old.read('--job=search', f'--query={query}', '--num_results=5')
    found = re.findall(r'^ +\d+ +(-?\d+\.\d+)  (\w+) ', text, re.M)
    ids, scores = rankings[query_id]
    assert [an_id for _, an_id in found] == ids
    # Three digits are printed.
    printed = [float(score) for score, _ in found]
    assert printed == pytest.approx(scores, abs=0.0005 + ACCURACY)


@pytest.mark.parametrize('name', FILTERS)
def test_mine(name, old):
  if name == 'ranking':
    old.read('--job=evaluate', '--split=train', f'--checkpoint={REFRESHED}')
  if name == 'judge':
    old.bm25('train')
  found = mined(old, *FILTERS[name])
  expected = EXPECTED[f'mine {name}']
  if name in RANDOM:
    # Drawn by block then, and by query now: of the same candidates.
    assert found['taken'] == expected['taken']
    assert found['ids'].keys() == expected['ids'].keys()
    left = mined(old, *RANDOM[name])['ids']
    for query_id, ids in left.items():
      drawn = found['ids'][query_id].split()
      if name == 'fill':
        for each in (found, expected):
          assert each['ids'][query_id].startswith(ids)
      else:
        assert len(drawn) == len(expected['ids'][query_id].split())
        assert [an_id for an_id in ids.split() if an_id in drawn] == drawn
  else:
    assert_same(found, expected, f'mine {name}')


def mined(old, *flags):
  """Returns ids by query, mean scores, and counts, of --job=mine."""
  path = old.folder / 'mined.jsonl'
  arguments = [text.format(old=old.folder) for text in flags]
  old.read(
    *MINED, '--format=ids', f'--output={path}', '--overwrite', *arguments
  )
  ids, means = {}, []
  for line in map(json.loads, path.read_text().splitlines()):
    ids[line['query_id']] = ' '.join(line['negative_ids'])
    scores = [s for s in line['negative_scores'] if s is not None]
    means.append(float(np.mean(scores)) if scores else None)
  report = read_json(path.with_suffix('.report.json'))
  taken = {
    OLD_NAMES.get(name, name): counts['candidates']
    for name, counts in report['taken'].items()
    if name != 'z_margin'
  }
  return {'ids': ids, 'mean scores': means, 'taken': taken}


@pytest.mark.parametrize('name', FORMATS)
def test_mine_for(name, old):
  path = old.folder / 'mined.jsonl'
  old.read(*MINED, f'--format={name}', f'--output={path}', *FORMATS[name])
  text = path.read_text()
  lines, scores = [text] if name == 'dpr' else text.splitlines(), []

  def apart(digits):  # A score, without which the rest is the same everywhere.
    scores.append(float(digits))

  rest = [json.loads(line, parse_float=apart) for line in lines]
  digest = hashlib.sha256(json.dumps(rest).encode()).hexdigest()
  mean = float(np.mean(scores)) if scores else None
  found = {'lines': len(lines), 'without scores': digest, 'scores': len(scores)}
  check(f'mine for {name}', {**found, 'mean score': mean})


def test_compare(old):
  old.read('--job=evaluate', '--split=test')
  folder = old.bm25('test').parent
  command(
    '--job=compare', '--split=test', f'--runs={old.run},{folder}',
    f'--workdir={old.folder / "compared"}', f'--data_dir={old.data}',
  )  # fmt: skip
  found = read_json(old.folder / 'compared' / 'compare-test.json')
  names = 'metrics', 'baseline', 'differences', 'same in first'
  check('compare', {name: found[name] for name in names})


def test_export(old):
  exported = old.folder / 'exported'
  old.read('--job=export', f'--output={exported}')
  text = command(
    '--job=encode', f'--init_from={exported}',
    f'--workdir={old.folder / "mine"}', '--dataset=beir',
    f'--data_dir={old.data}', '--rows_per_block=32', '--num_devices=1',
  )  # fmt: skip
  assert 'width 8, mean pooling, cosine' in text
  # The folder has one length for queries and passages: its passages'.
  assert_same(
    shown(read_embeddings(old.folder / 'mine')), EXPECTED['encode'], 'encode'
  )
  facts = read_json(exported / 'run.json')
  assert facts['step'] == LAST
  assert facts['flags']['method'] == 'ance'
  assert [*facts['dev']['dev/mrr@10']] == ['0', '4', '5', '8', '10']


def test_audit(old):
  text = old.read('--job=audit')
  assert 'share that is' in text
  assert text.count('\n  query: ') == EXPECTED['audit']['examples']
  found = read_json(old.run / f'audit-{LAST}.json')
  found['examples'] = len(found['examples'])
  check('audit', found)


def test_inspect(old):
  old.read('--job=inspect')
  found = read_json(old.run / 'inspection.json')
  assert found.pop('seconds to encode the corpus') > 0
  found['batch'] = len(found['batch'])
  check('inspect', found)


def test_report(old):
  text = command('--job=report', f'--workdir={old.run}')
  rows = [line.split() for line in text.splitlines()]
  table = [row for row in rows if row and row[0].isdigit()]
  assert (old.run / 'curves.png').read_bytes()[:4] == b'\x89PNG'
  rows = re.findall(r'<tr>.*?</tr>', (old.run / 'report.html').read_text())
  numbers = [re.findall(r'<td>([-+]?[\d.,]+%?)</td>', row) for row in rows]
  check('report', {'printed': table, 'page': [row for row in numbers if row]})


def test_refresh_mines_what_was_published(old):
  folder = old.run / 'refresh' / f'{REFRESHED:08d}'
  before = read_json(folder / 'manifest.json')
  published = np.load(folder / 'negatives.npy')
  shutil.rmtree(folder)
  old.read('--job=refresh', f'--checkpoint={REFRESHED}')
  np.testing.assert_array_equal(np.load(folder / 'negatives.npy'), published)
  after = read_json(folder / 'manifest.json')
  metrics, told = after.pop('metrics'), before.pop('metrics')
  for what in ('secs', 'made_with'):
    assert after.pop(what).keys() == before.pop(what).keys()
  assert after.pop('format') == 1  # New, and taken for 1 where it is not there.
  assert after.pop('passage_hash') == after['weights_hash']
  for name in ('scores', 'positive_scores'):  # Were not kept then.
    assert after['files'].pop(f'{name}.npy')
  assert_same(after, before, 'manifest')
  # The job is not told what was in use before, as training is.
  of_training = {
    'probe/overlap', 'probe/rank_drift', 'probe/dev_lost', 'probe/dev_won',
    'probe/grad_norm_in_use', 'refresh/overlap',
  }  # fmt: skip
  for name in told.keys() - of_training:
    assert_same(metrics[name], told[name], name)


def test_refresh_knows_that_it_was_made(old):
  folder = old.run / 'refresh' / f'{REFRESHED:08d}'
  before = (folder / 'manifest.json').read_bytes()
  old.read('--job=refresh', f'--checkpoint={REFRESHED}')
  assert (folder / 'manifest.json').read_bytes() == before


def metrics_of(run):
  """Returns the lines of metrics.jsonl."""
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def pick_ups_of(run):
  found = read_json(run / 'pickups.json')['pickups']
  return [(one['step'], one['refresh']) for one in found]


def test_training_is_refused_in_a_sentence_that_names_what_still_works(
  old, capsys
):
  before = sorted(old.run.rglob('*'))
  old.go_on(f'--max_steps={NEW_END}', code=2)
  assert capsys.readouterr().err.strip() == (
    f'ance_jax: the checkpoint of step {LAST} in {old.run} has format 1, and '
    'training resumes from format 3 alone; evaluate or export it, or train a '
    f'new --workdir from its weights with --init_from={old.run}.'
  )
  assert sorted(old.run.rglob('*')) == before


def names_of(run, step, refreshed):
  """Returns the names that a run has on disk, by what was written last."""
  checkpoint = run / 'checkpoints' / str(step)
  refresh = run / 'refresh' / f'{refreshed:08d}'
  record = checkpoint / 'record'
  trees = {}
  for item in ('params', 'opt_state'):
    tree = json.loads((checkpoint / item / '_METADATA').read_text())
    trees[item] = {
      name: value['value_metadata'].get('write_shape')
      for name, value in tree['tree_metadata'].items()
    }
  new_lines = [line for line in metrics_of(run) if line['step'] > LAST]
  examples = read_json(run / 'examples' / f'{step:08d}.json')
  return {
    'folder': sorted(path.name for path in run.iterdir()),
    'items': sorted(p.name for p in checkpoint.iterdir() if p.is_dir()),
    'record': sorted(
      str(p.relative_to(record)) for p in record.rglob('*') if p.is_file()
    ),
    'data.json': keys_of(record / 'data.json'),
    'retriever.json': keys_of(record / 'model' / 'retriever.json'),
    'checkpoint': keys_of(checkpoint / 'manifest.json'),
    'meta': keys_of(checkpoint / 'meta' / 'metadata'),
    'params': trees['params'],
    'opt_state': trees['opt_state'],
    'refresh files': sorted(p.name for p in refresh.iterdir()),
    'refresh': keys_of(refresh / 'manifest.json'),
    'pickups.json': keys_of(run / 'pickups.json'),
    'a pick-up': sorted(read_json(run / 'pickups.json')['pickups'][-1]),
    'columns': sorted({name for line in new_lines for name in line}),
    'example': sorted(examples['examples'][0]),
  }


def by_tree(names):
  """Returns the names of the optimizer's state as formats from 2 on have them.

  In format 1 it was one for all trees, behind the clipping: 1, 0, mu, tied.
  """
  found = {}
  for name, shape in names.items():
    place, *rest = ast.literal_eval(name)[1:] or [None]
    if place is not None:
      key = ('tied', place, *(part for part in rest if part != 'tied'))
      found[str(key)] = shape
  return found


def test_names_on_disk_stay(old):
  mine = old.folder / 'mine'
  old.go_on(
    f'--init_from={old.run}', f'--workdir={mine}', f'--max_steps={NEW_END}'
  )
  found = names_of(mine, NEW_END, 12)
  names = EXPECTED['names']
  names = {**names, 'opt_state': by_tree(names['opt_state'])}
  for what, expected in names.items():
    if isinstance(expected, dict):
      assert found[what] == expected, what
    else:
      # New ones may come.
      assert set(expected) <= set(found[what]), what


def test_a_new_run_starts_from_its_weights(old):
  old.go_on(
    f'--init_from={old.run}', f'--workdir={old.folder / "mine"}',
    '--max_steps=1', '--warmup_steps=0', '--lr_warmup_steps=0',
  )  # fmt: skip
  lines = metrics_of(old.folder / 'mine')
  found = next(line for line in lines if 'dev/mrr@10' in line)
  expected = EXPECTED[f'evaluate dev-model-{LAST}']['metrics']
  assert found['step'] == 0
  for name, value in expected.items():
    assert found[f'dev/{name}'] == pytest.approx(value, abs=ACCURACY), name


def test_another_run_repeats_its_pick_ups(old):
  mine = old.folder / 'mine'
  old.go_on(f'--refresh_replay={old.run}', f'--workdir={mine}')
  assert pick_ups_of(mine) == [(4, 4), (8, 8)]
  for step in (4, 8):
    name = pathlib.Path('refresh', f'{step:08d}', 'negatives.npy')
    assert (mine / name).read_bytes() == (old.run / name).read_bytes()
  # What a run writes once has the names that it had.
  assert set(metrics_of(old.run)[0]) <= set(metrics_of(mine)[0])
  for name in ('bm25', 'tokens', 'embeddings'):
    (before, *_), (after, *_) = (
      sorted((run / name).rglob('manifest.json'))
      for run in (FOLDER / 'run', mine)
    )
    assert set(keys_of(before)) <= set(keys_of(after)), name
