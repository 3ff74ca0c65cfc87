"""Flagfiles, notebook and README: what they name exists, and works."""

import dataclasses
import importlib
import json
import pathlib
import re
import shutil

import nbclient
import nbformat
import numpy as np
import pytest

from ance_jax import api
from ance_jax import config
from ance_jax import flags as flags_lib
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.data import corpus as corpus_lib
from ance_jax.jobs import train
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import methods

REPOSITORY = pathlib.Path(__file__).parents[1]
FLAGFILES = sorted((REPOSITORY / 'experiments').glob('*.flags'))
NOTEBOOK = REPOSITORY / 'colab' / 'quickstart.ipynb'


@pytest.fixture(autouse=True)
def _from_the_top(monkeypatch):
  """Paths in flagfiles are relative to the repository."""
  monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize('path', FLAGFILES, ids=lambda p: p.stem)
def test_flagfile_parses_and_begins_with_its_claim(path):
  lines = path.read_text().splitlines()
  assert lines[0].startswith('# ')
  assert len(lines[0]) > 40
  assert all(line.startswith('--') for line in lines[1:] if line)
  settings = flags_lib.from_flagfile(path)
  assert settings.workdir


@pytest.fixture
def scripts(monkeypatch):
  monkeypatch.syspath_prepend(str(REPOSITORY / 'experiments'))
  names = ('compare_methods', 'figures', 'false_negatives', 'baselines')
  return [importlib.import_module(name) for name in names]


@pytest.mark.usefixtures('compiled_once')
def test_rows_are_compared_at_their_best_rate_and_drawn(
  scripts, tiny, tmp_path, capsys, monkeypatch
):
  compare_methods, figures, false_negatives, baselines = scripts
  base = dataclasses.replace(
    tiny, num_devices=1, max_steps=9, warmup_method='bm25', num_hard_negatives=1
  )
  rows = ['in_batch', 'ance', 'ance_in_batch_once', 'adore']
  rates = [1e-2, 1e-4]
  compare_methods.compare(base, tmp_path, [0], rates, rows, start=3)
  results = atomic.read_json(tmp_path / 'results.json')['rows']
  assert list(results) == rows
  for row, found in results.items():
    dev = {
      rate: logs.series(tmp_path / f'{row}-{rate:g}-0', 'dev/mrr@10')[6]
      for rate in rates
    }
    assert found['rate'] == max(dev, key=dev.get)
    assert found['runs'] == [str(tmp_path / f'{row}-{found["rate"]:g}-0')]
    (scores,) = (pathlib.Path(found['runs'][0])).glob('test-model-*.json')
    assert found['test'] == [atomic.read_json(scores)['metrics']]
    assert found['secs'][0]['train'] > 0
    check_flops(found['runs'][0], found['flops'])
    refreshes = logs.series(found['runs'][0], 'refresh/judged')
    number = {'in_batch': 0, 'ance': 2, 'ance_in_batch_once': 1, 'adore': 0}
    assert len(refreshes) == number[row]
  table = (tmp_path / 'table.md').read_text().splitlines()
  assert len(table) == 6
  assert f'{results["ance"]["test"][0]["mrr@10"]:.4f}' in table[3]
  shares = figures.main(tmp_path)
  for name in ('dev', 'gradients', 'overlap'):
    assert (tmp_path / f'{name}.png').read_bytes()[:4] == b'\x89PNG'
  # 100 of 150 passages are the final top; those mined last are all in it.
  assert shares['in_batch'].keys() == shares['ance'].keys() == set(range(6))
  assert shares['ance'][5] > 0.9 > max(shares['in_batch'].values())
  judge = results['ance']['runs'][0]
  shares = false_negatives.main(tmp_path, judge)
  # It was trained to score nearly all below; of rows mixed up, half would be.
  assert list(shares) == rows[:-1]  # Of those searched in the step is no list.
  assert all(0 < share < 0.2 for share in shares.values())
  arguments = judge, tmp_path / 'baselines', [base.data_dir]
  ((folder, found),) = baselines.main(*arguments).items()
  printed = capsys.readouterr().out
  assert f'| {folder} | ' in printed
  for scores in found.values():
    assert f'{scores["mrr@10"]:.4f}'.removeprefix('0') in printed
  bm25, _, model = found.values()
  assert bm25 != model
  monkeypatch.setattr(baselines.evaluate, 'run', None)
  assert baselines.main(*arguments) == {folder: found}


@pytest.mark.usefixtures('compiled_once')
def test_negatives_in_figures_are_those_that_the_steps_drew(
  scripts, tiny, monkeypatch
):
  config = dataclasses.replace(
    tiny, num_devices=1, draw='simans', simans_a=9.0, topics=3
  )
  draw_rows, drawn = batches.draw_rows, {}

  def noting(data, step, **settings):
    drawn[step] = draw_rows(data, step, **settings)
    return drawn[step]

  with monkeypatch.context() as patch:
    patch.setattr(batches, 'draw_rows', noting)
    train.run(config)
  run, last = experiment.open(config, ('train', 'dev'))
  for step, batch in scripts[1].drawn(run, last):
    queries, positives, of_query = zip(*batch, strict=True)
    assert queries == tuple(drawn[step].queries)
    assert positives == tuple(drawn[step].passages[:, 0])
    own = drawn[step].passages[:, 1:]
    np.testing.assert_array_equal(np.stack(of_query)[:, : own.shape[1]], own)


def check_flops(workdir, found):
  """A last line has the steps' operations; each line, those of other things."""
  text = pathlib.Path(workdir, logs.METRICS_FILE).read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  training = [line['flops/train'] for line in lines if 'flops/train' in line]
  others = sum(
    value
    for line in lines
    for name, value in line.items()
    if name.startswith('flops/') and name != 'flops/train'
  )
  assert found == [pytest.approx(training[-1] + others)]
  assert training[-1] == max(training)


def test_a_row_that_needs_a_teacher_is_left_out_or_refused(
  scripts, monkeypatch, capsys
):
  compare_methods, run = scripts[0], []
  monkeypatch.setattr(
    compare_methods, 'compare', lambda *args: run.append(args)
  )
  arguments = ['', str(FLAGFILES[0]), 'folder']
  monkeypatch.setattr('sys.argv', arguments)
  compare_methods.main()
  assert 'ance' in run[0][4]
  assert not compare_methods.NEEDS.keys() & set(run[0][4])
  monkeypatch.setattr('sys.argv', [*arguments, '--rows', 'guided'])
  with pytest.raises(SystemExit):
    compare_methods.main()
  assert 'guided needs --guide' in capsys.readouterr().err


@pytest.mark.usefixtures('compiled_once', 'scripts')
def test_staleness_is_studied_from_one_start(tiny, tmp_path, capsys):
  staleness = importlib.import_module('staleness')
  base = dataclasses.replace(
    tiny, num_devices=1, max_steps=15, num_hard_negatives=1, workdir=''
  )
  flags = tmp_path / 'base.flags'
  flags.write_text(base.to_flagfile())
  folder = tmp_path / 'study'
  counts = '--start=3 --every 3 6 --delays 2 --delay_every 3'.split()
  staleness.main([str(flags), str(folder), *counts])
  found = atomic.read_json(folder / 'staleness.json')
  assert found['every'].keys() == {'3', '6'}
  assert found['delay'].keys() == {'2'}
  # Late ones are 1 to 5 steps old at first, and then 3 to 5.
  assert found['every']['3']['age'] == [2]
  assert found['every']['6']['age'] == [3.5]
  assert found['delay']['2']['age'] == [(15 + 12 + 12 + 3) / 12]
  assert (folder / 'staleness.png').read_bytes()[:4] == b'\x89PNG'
  scores = [f'{runs["test"][0]:.4f}' for runs in found['every'].values()]
  table = capsys.readouterr().out
  assert all(score in table for score in scores)


@pytest.mark.usefixtures('scripts')
def test_two_working_copies_are_compared_bit_for_bit(tmp_path, capsys):
  same_numbers = importlib.import_module('same_numbers')
  other = tmp_path / 'ance_jax'
  shutil.copytree(REPOSITORY / 'ance_jax', other)
  for name, before, after in (
    # The same sum in another order; a filter that takes more.
    (
      'training/losses',
      'logsumexp(_above(positive, others, counted), 1)',
      'logsumexp(_above(positive, others, counted)[:, ::-1], 1)',
    ),
    (
      'mining/filters',
      'scores > rules.max_score',
      'scores + 0.1 > rules.max_score',
    ),
  ):
    text = (other / f'{name}.py').read_text()
    assert before in text
    (other / f'{name}.py').write_text(text.replace(before, after))
  only = '^(train in_batch, plain|mine (plain|max_score))$'
  arguments = [str(REPOSITORY), str(tmp_path), f'--only={only}', '--states=1']
  assert same_numbers.main(arguments)
  printed = capsys.readouterr().out
  assert re.search(r'train in_batch, plain: .* entry in 1 states', printed)
  assert 'mine plain: equal' in printed
  assert 'mine max_score: DIFFERS: ' in printed
  assert '1 cases differ' in printed


def test_negatives_at_or_above_their_positive_are_counted(scripts):
  queries = np.eye(2, dtype=np.float32)
  passages = np.float32([[0.5, 0.1], [0.5, 0.9], [0.4, 0.2], [0.6, 0.3]])
  batch = [(0, 0, np.array([1, 2, 3])), (1, 1, np.array([3]))]
  assert scripts[2].share_above(batch, queries, passages) == 0.5


def test_the_notebook_holds_no_logic_and_no_output():
  notebook = json.loads(NOTEBOOK.read_text())
  for cell in notebook['cells']:
    source = ''.join(cell['source'])
    assert 'def ' not in source
    assert 'class ' not in source
    assert not cell.get('outputs')
    assert not cell.get('execution_count')


def test_the_notebook_runs_with_a_tiny_run_in_its_settings(tiny):
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  (settings,) = [
    c for c in notebook.cells if 'settings' in c.metadata.get('tags', [])
  ]
  changed = dataclasses.replace(tiny, num_devices=1, max_steps=9)
  values = {
    field.name: getattr(changed, field.name)
    for field in dataclasses.fields(changed)
  }
  settings.source = (
    'clone_from = ""\nflagfile = "experiments/quickstart.flags"\n'
    f'overrides = {values!r}'
  )
  for cell in notebook.cells:
    # The environment of the tests stays as it is.
    cell.source = cell.source.replace('%pip install -q -e .', '')
  # Where a notebook opened from a clone begins.
  start = {'metadata': {'path': str(NOTEBOOK.parent)}}
  client = nbclient.NotebookClient(notebook, timeout=240, resources=start)
  client.execute()
  assert 9 in logs.series(tiny.workdir, 'dev/mrr@10')
  outputs = [
    o for c in notebook.cells if c.cell_type == 'code' for o in c.outputs
  ]
  assert any('image/png' in o.get('data', {}) for o in outputs)


def test_the_readme_lists_the_methods_and_the_modules_that_exist():
  text = (REPOSITORY / 'README.md').read_text()
  for name in methods.METHODS:
    assert f'`{name}`' in text
  modules = {p.stem for p in (REPOSITORY / 'ance_jax').rglob('*.py')} - {
    '__init__'
  }
  text = (REPOSITORY / 'ance_jax' / 'README.md').read_text()
  listed = re.findall(r'^(\w+)\.py ', text, re.M)
  assert set(listed) == modules


@pytest.mark.parametrize(
  'path',
  [
    'README.md',
    'ance_jax/README.md',
    'ance_jax/data/README.md',
    'ance_jax/jobs/README.md',
    'ance_jax/training/README.md',
  ],
)
def test_a_readme_names_only_flags_and_files_that_exist(path):
  text = (REPOSITORY / path).read_text()
  names = {field.name for field in dataclasses.fields(config.Config)}
  for flag in re.findall(r'--(\w+)=', text):
    assert flag in names | {'flagfile'} or flag.startswith('xla_'), flag
  for path in re.findall(
    r'(?:ance_jax|experiments|colab|tests)/[\w/]+\.\w+', text
  ):
    assert (REPOSITORY / path).exists(), path


def test_the_readme_s_own_numbers_are_those_of_the_experiments():
  text = (REPOSITORY / 'experiments' / 'README.md').read_text()
  _, start = text.split('### From a common start')
  measured = {}
  for row, score in re.findall(r'^\| `(\w+)` \| 0(\.\d{4}) \(', start, re.M):
    measured.setdefault(row, float(score))
  lines = re.findall(
    r'^\| `(\w+)` \| .* \| (\S+) \|$',
    (REPOSITORY / 'README.md').read_text().split('\n## Methods\n')[1],
    re.M,
  )
  shown = {row: ours for row, ours in lines if row in methods.METHODS}
  assert shown.keys() == methods.METHODS.keys()
  for row, ours in shown.items():
    if ours != '–':
      assert float(ours) == pytest.approx(measured[row], abs=5.1e-4)
  assert set(measured) <= {row for row, ours in shown.items() if ours != '–'}


def test_the_first_screen_of_the_readme_holds_two_commands():
  text = (REPOSITORY / 'README.md').read_text()
  screen = text.split('\n## ')[0]
  assert len(screen.splitlines()) < 40
  assert len(text.splitlines()) <= 250
  blocks = re.findall(r'^```\w*\n(.*?)^```', screen, re.S | re.M)
  assert len(blocks) == 2
  assert 'ance_jax.main --flagfile=experiments/quickstart.flags' in blocks[0]
  assert 'pytest' in blocks[1]


@pytest.mark.usefixtures('compiled_once', 'scripts')
def test_hidden_positives_are_counted_as_loops_count_them(tiny, tmp_path):
  hidden_positives = importlib.import_module('hidden_positives')
  settings = dataclasses.replace(
    tiny, method='in_batch', num_devices=1, max_steps=2, warmup_steps=0
  )
  train.run(settings)
  ranked = config.Config(
    job='evaluate', dataset='beir', data_dir=tiny.data_dir, seed=3,
    workdir=str(tmp_path / 'hidden'), init_from=tiny.workdir, top_k=20,
    tokens_per_batch=1024, on_shortage='keep', num_devices=1,
  )  # fmt: skip
  rules = {'first': {'draw': 'top'}, 'margin': {'relative_margin': 0.001}}
  found = hidden_positives.count(ranked, rules)
  run, _ = experiment.open(ranked, ('train',))
  kept, (queries, passages) = hidden_positives._hide(run)
  hidden = set(zip(queries.tolist(), passages.tolist(), strict=True))
  judged = run.dataset.splits['train'].positives()
  pairs = set(zip(*(x.tolist() for x in judged), strict=True))
  alone = kept.dataset.splits['train'].positives()
  one = dict(zip(*(x.tolist() for x in alone), strict=True))
  assert hidden | set(one.items()) == pairs
  assert not hidden & set(one.items())
  own = api.load(tiny.workdir)
  corpus, split = run.dataset.corpus, run.dataset.splits['train']
  titles = [corpus_lib.whole_title(corpus, row) for row in range(150)]
  scores = own.encode_queries(list(split.texts)) @ np.transpose(
    own.encode_passages([corpus.texts[row] for row in range(150)], titles)
  )
  own_texts = {tuple(pair) for pair in split.own_passages().T.tolist()}
  wrong = number = none = 0
  for query in sorted({query for query, _ in hidden}):
    banned = {corpus.groups[one[query]]}
    banned |= {corpus.groups[p] for q, p in own_texts if q == query}
    order = np.argsort(-scores[query], kind='stable').tolist()
    drawn = [row for row in order if corpus.groups[row] not in banned][:7]
    wrong += sum((query, row) in hidden for row in drawn)
    number += 7
    best = [row for row in order if corpus.groups[row] not in banned][:20]
    highest = scores[query, one[query]]
    none += not any(
      scores[query, row] < highest - 0.001 * abs(highest) for row in best
    )
  assert found['first'] == (wrong, number, 0)
  assert wrong > 0
  share = none / len({query for query, _ in hidden})
  assert found['margin'][2] == pytest.approx(share)
  text = hidden_positives.table(found)
  assert f'| first | {1000 * wrong / number:.1f} ± ' in text


@pytest.mark.usefixtures('compiled_once', 'scripts')
def test_sources_and_filters_are_compared_from_one_start(tiny, tmp_path):
  script = importlib.import_module('sources_and_filters')
  base = dataclasses.replace(
    tiny, num_devices=1, max_steps=9, num_hard_negatives=1, workdir=''
  )
  given = tmp_path / 'base.flags'
  given.write_text(base.to_flagfile())
  teacher = dataclasses.replace(
    tiny, workdir=str(tmp_path / 'fixed'), method='in_batch', num_devices=1
  )
  train.run(teacher)
  arms = ('once-margin', 'refreshed-guided', 'teacher-raw', 'teacher-margin')
  folder = tmp_path / 'arms'
  arguments = f'{given} {folder} {teacher.workdir} --start=3 --arms'.split()
  script.main([*arguments, *arms])
  settings = {
    arm: flags_lib.from_flagfile(folder / f'{arm}-0.01-0' / 'run.flags')
    for arm in arms
  }
  assert {one.init_from for one in settings.values()} == {
    str(folder / 'start-0')
  }
  assert [one.relative_margin for one in settings.values()] == [
    0.05, None, None, None
  ]  # fmt: skip
  assert [one.guide_margin for one in settings.values()] == [
    None, 0.0, None, None
  ]  # fmt: skip
  assert [one.max_refreshes for one in settings.values()] == [1, 0, 0, 0]
  raw, margin = (
    [json.loads(line) for line in path.read_text().splitlines()]
    for name in ('teacher-????????', 'teacher-margin-*')
    for path in folder.glob(f'{name}.jsonl')
  )
  assert len(raw) == len(margin) == 48
  # Candidates near the positive went, and random passages came in their place.
  near = dict.fromkeys(('raw', 'margin'), 0)
  for before, after in zip(raw, margin, strict=True):
    least = min(before['positive_scores'])
    for name, one in (('raw', before), ('margin', after)):
      near[name] += sum(
        passage in before['negative_ids']
        and score > least - 0.05 * abs(least) + 1e-6
        for passage, score in zip(
          one['negative_ids'], one['negative_scores'], strict=True
        )
      )
  assert near['raw'] > 50
  assert near['margin'] == 0
  assert (folder / 'dev.png').read_bytes()[:4] == b'\x89PNG'
  results = atomic.read_json(folder / 'results.json')['rows']
  assert list(results) == list(arms)
  lines = (folder / 'arms.md').read_text().splitlines()[2:]
  encoded = script.teacher_flops(
    dataclasses.replace(
      base, job='evaluate', workdir=str(tmp_path / 'its'),
      init_from=teacher.workdir,
    )
  )  # fmt: skip
  for arm, line in zip(arms, lines, strict=True):
    name, dev, test, _, flops, of_teacher = line.strip('| ').split(' | ')
    assert name == f'`{arm}`'
    scores = logs.series(folder / f'{arm}-0.01-0', 'dev/mrr@10')
    assert dev == f'{scores[6]:.4f}'
    assert test == f'{results[arm]["test"][0]["mrr@10"]:.4f}'
    has_teacher = arm != 'once-margin'
    assert of_teacher == f'{has_teacher * encoded / 1e12:.3g}'
    whole = results[arm]['flops'][0] + has_teacher * encoded
    assert flops == f'{whole / 1e12:.3g}'
