"""What cannot be written is said first; a run of others is only read."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import types

from absl import flags
import conftest
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax import flags as flags_lib
from ance_jax import launch
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.core import places
from ance_jax.data.readers import docstrings
from ance_jax.jobs import systems
from ance_jax.jobs import train
from ance_jax.training import experiment

# Root may write anywhere: without these capabilities it may not. The jobs are
# run one after the other in processes that need not import all of it again.
_DRIVER = """
import ctypes, json, os, sys
if len(sys.argv) == 2:
  for capability in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
  os.execv(sys.executable, [sys.executable, __file__, sys.argv[1], 'less'])
from ance_jax.jobs import compare
from ance_jax.jobs import evaluate
from ance_jax.jobs import export
from ance_jax import launch
from ance_jax import main
from ance_jax.jobs import mine
from ance_jax.jobs import serve
for number, job in enumerate(json.loads(sys.argv[1])):
  child = os.fork()
  if not child:
    out = os.open(f'{number}.out', os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ['main', *job]
    main.run()
  code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
  open(f'{number}.code', 'w').write(str(code))
"""


@pytest.fixture(scope='module')
def theirs(beir_folder, tmp_path_factory):
  """Settings of a run that is over and cannot be written; and its folder."""
  config = config_lib.Config(
    workdir=str(tmp_path_factory.mktemp('theirs') / 'run'),
    dataset='beir',
    data_dir=str(beir_folder),
    dev_fraction=0.2,
    method='in_batch',
    max_steps=2,
    steps_per_refresh=2,
    num_devices=1,
    index='IVF4,Flat',
    index_params='nprobe=4',
    **conftest.SMALL,
  )
  train.run(config)
  paths = [config.workdir, *pathlib.Path(config.workdir).rglob('*')]
  for path in paths:
    os.chmod(path, os.stat(path).st_mode & ~0o222)
  yield config
  for path in paths:
    os.chmod(path, os.stat(path).st_mode | 0o200)


def listing(folder):
  """Returns {path: what changes where something is written} of a folder."""
  found = {}
  for path in [pathlib.Path(folder), *pathlib.Path(folder).rglob('*')]:
    status = path.stat()
    found[str(path)] = status.st_mtime_ns, status.st_ctime_ns, status.st_size
  return found


def run_jobs(folder, jobs):
  """Returns (exit code, output) of each command line, run as no root."""
  (folder / 'driver.py').write_text(_DRIVER)
  subprocess.run(
    [sys.executable, 'driver.py', json.dumps(jobs)],
    cwd=folder,
    env={**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[2])},
    check=True,
    timeout=600,
    capture_output=True,
  )
  return [
    (
      int((folder / f'{number}.code').read_text()),
      (folder / f'{number}.out').read_text(),
    )
    for number in range(len(jobs))
  ]


def test_a_run_of_others_is_used_and_nothing_is_written_into_it(
  theirs, tmp_path
):
  run, before = theirs.workdir, listing(theirs.workdir)
  jobs = [
    ['--job=evaluate', f'--workdir={run}'],
    ['--job=evaluate', f'--init_from={run}', '--workdir=mine'],
    ['--job=search', f'--workdir={run}', '--query=t3w5'],
    [
      '--job=mine', f'--workdir={run}', '--output=negatives.jsonl',
      '--num_negatives=2', '--index=Flat'
    ],
    [
      '--job=export', f'--workdir={run}', '--output=exported',
      '--export_corpus'
    ],
    ['--job=compare', f'--runs={run},mine', '--workdir=mine'],
    ['--job=report', f'--workdir={run}'],
    ['--job=report', f'--workdir={run}', '--picture=curves.png'],
  ]  # fmt: skip
  ended = run_jobs(tmp_path, jobs)
  assert listing(run) == before
  codes = [code for code, _ in ended]
  assert codes == [2, 0, 0, 0, 0, 2, 2, 0], ended
  refused, scored, searched, _, _, compared, drawn, _ = (t for _, t in ended)
  way = f'--init_from={run} --workdir=FOLDER_OF_YOUR_OWN'
  assert f'{run} cannot be written (permission denied); use a' in refused
  assert way in refused
  assert f'{way} keeps them' in searched
  assert '\n  5  ' in searched
  assert f'--split=dev {way}, and name that folder' in compared
  assert 'name another --picture' in drawn
  # What training logged is what is scored now, of the same split.
  logged = logs.series(run, 'dev/mrr@10')[2]
  found = atomic.read_json(tmp_path / 'mine' / 'dev-model-2.json')
  assert found['metrics']['mrr@10'] == pytest.approx(logged, abs=1e-6)
  assert f'dev at step 2, 16 queries: mrr@10 {logged:.4f}' in scored
  lines = (tmp_path / 'negatives.jsonl').read_text().splitlines()
  qrels = pathlib.Path(theirs.data_dir, 'qrels', 'train.tsv').read_text()
  assert len(lines) == 2 * (qrels.count('\n') - 1)
  card = (tmp_path / 'exported' / 'README.md').read_text()
  assert card.split('# ')[1].startswith('run, step 2\n')
  assert f'{logged:14.4f}' in card
  ids = (tmp_path / 'exported' / 'corpus' / 'ids.txt').read_text().split()
  assert ids == [f'p{number}' for number in range(150)]


@pytest.fixture
def given(monkeypatch):
  """given(*arguments) -> the settings that the command line comes to."""

  def given(*arguments):
    values = flags.FlagValues()
    flags_lib.define_flags(values)
    flags_lib.parse(['main', *arguments], values)
    monkeypatch.setattr(launch, 'flags', types.SimpleNamespace(FLAGS=values))
    return launch.with_flags_of_run(flags_lib.from_flags(values))

  return given


def test_a_run_to_start_from_gives_its_settings_and_flags_go_before(
  theirs, given
):
  run = f'--init_from={theirs.workdir}'
  found = given('--job=audit', run, '--workdir=mine', '--top_k=7')
  expected = dataclasses.replace(
    theirs, job='audit', init_from=theirs.workdir, workdir='mine', top_k=7,
    protocol='usual'
  )  # fmt: skip
  assert found == expected
  # Another dataset is read by its own rules, with the run's model.
  found = given(
    '--job=encode', run, '--workdir=mine', '--dataset=beir', '--data_dir=other'
  )
  assert found == dataclasses.replace(
    theirs, job='encode', init_from=theirs.workdir, workdir='mine',
    data_dir='other', dev_fraction=0.1
  )  # fmt: skip
  # Training, and what is done before it, take no more than they are told.
  for job in ('train', 'prepare', 'inspect'):
    assert given(f'--job={job}', run).dataset == 'pydocs'


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('data_dir', 'theirs'),
    ('beir_set', 'nq'),
    ('questions', 'nq'),
    ('protocol', 'msmarco'),
    ('train_split', 'x'),
    ('dev_split', 'y'),
    ('dev_fraction', 0.3),
    ('bm25_run', 'theirs.trec'),
  ],
)
def test_all_that_describes_data_goes_with_another_dataset(
  name, value, theirs, given, monkeypatch
):
  settings = dataclasses.replace(theirs, **{name: value})
  monkeypatch.setattr(experiment, 'settings', lambda *_: settings)
  run = (f'--init_from={theirs.workdir}', '--workdir=mine', '--job=audit')
  assert getattr(given(*run), name) == value
  default = getattr(config_lib.Config(), name)
  assert getattr(given(*run, '--dataset=pairs'), name) == default


PLACES = 'remote_dir tokens_dir compilation_cache_dir output picture'.split()


@pytest.mark.parametrize('name', PLACES)
def test_nothing_is_written_where_the_run_to_start_from_wrote(
  name, theirs, given, monkeypatch
):
  settings = dataclasses.replace(theirs, **{name: '/theirs'})
  monkeypatch.setattr(experiment, 'settings', lambda *_: settings)
  found = given(
    f'--init_from={theirs.workdir}', '--workdir=mine', '--job=evaluate'
  )
  assert getattr(found, name) == getattr(config_lib.Config(), name)


def test_places_that_are_written_are_those_of_the_flags():
  # Whatever is looked at before a job writes there is one of them, or its own.
  config = config_lib.Config(
    workdir='new', tokens_dir='new', remote_dir='/new', output='new',
    picture='new',
  )  # fmt: skip
  for job in config_lib.JOBS:
    written = places._written(dataclasses.replace(config, job=job))
    assert {flag for flag, _ in written} <= {'workdir', *PLACES}


@pytest.mark.parametrize('job', ['export', 'report'])
def test_what_reads_no_data_does_without_it(job, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = config_lib.Config(
    job=job, dataset='beir', data_dir='gone', workdir='new'
  )
  with places.own(config) as same:
    assert same == config


@pytest.mark.parametrize(
  ('flag', 'name', 'first', 'default', 'own'),
  [
    ('--beir_set=scifact', 'protocol', 'msmarco', None, 'usual'),
    ('--index=IVF9,Flat', 'index_params', 'nprobe=4', '', 'nprobe=2'),
  ],
)
def test_another_set_or_index_comes_without_what_goes_with_the_first(
  flag, name, first, default, own, theirs, given, monkeypatch
):
  settings = dataclasses.replace(theirs, **{name: first})
  monkeypatch.setattr(experiment, 'settings', lambda *_: settings)
  run = (f'--init_from={theirs.workdir}', '--workdir=mine', '--job=evaluate')
  for flags_given, expected in (
    ([], first), ([flag], default), ([flag, f'--{name}={own}'], own)
  ):  # fmt: skip
    assert getattr(given(*run, *flags_given), name) == expected


def test_no_run_is_meant_where_none_is_named(theirs, given, monkeypatch):
  monkeypatch.chdir(theirs.workdir)
  assert given('--job=evaluate').dataset == 'pydocs'


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'workdir': 'file'}, '--workdir: .*/file is a file, and a folder is'),
    ({'workdir': 'file/run'}, '--workdir: .*/file is a file, and a folder'),
    (
      {'workdir': 'shut/run'},
      r'--workdir: .*/shut cannot be written \(perm.*; name another --workdir',
    ),
    ({'workdir': 'x' * 300}, '--workdir: .* is longer than a name may be'),
    ({'job': 'mine', 'output': 'shut/a'}, '--output: .*/shut cannot be wri'),
    ({'job': 'export', 'output': 'file/a'}, '--output: .*/file is a file'),
    ({'job': 'report', 'picture': 'shut/a.png'}, '--picture: .*/shut cannot'),
    ({'job': 'report', 'runs': 'shut,b'}, '--picture: .*/shut cannot be wr'),
    ({'tokens_dir': 'shut'}, '--tokens_dir: .*/shut cannot be written'),
    ({'tokens_dir': 'file'}, '--tokens_dir: .*/file is a file'),
    ({'job': 'report', 'workdir': 'shut'}, '--picture: .*/shut cannot be wri'),
    ({'dataset': 'beir', 'data_dir': 'file'}, '--data_dir=file names a file'),
    ({'dataset': 'beir', 'data_dir': 'none'}, '--data_dir=none names nothing'),
    ({'job': 'train', 'remote_dir': '/dev/null/a'}, '--remote_dir: /dev/null'),
    ({'job': 'refresh', 'remote_dir': '/dev/null/a'}, '--remote_dir: /dev/nu'),
  ],
)
def test_a_place_that_cannot_be_written_is_refused_first(
  changes, expected, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  pathlib.Path('file').touch()
  pathlib.Path('shut').mkdir()
  real = os.access
  monkeypatch.setattr(
    os, 'access', lambda path, how: path.name != 'shut' and real(path, how)
  )
  config = config_lib.Config(job='evaluate', workdir='new')
  with (
    pytest.raises(errors.BadInput, match=expected),
    places.own(dataclasses.replace(config, **changes)),
  ):
    pass
  with places.own(config) as same:
    assert same == config
  assert sorted(os.listdir()) == ['file', 'shut']


@pytest.fixture
def shut(tmp_path, monkeypatch):
  """A run beside where we are, and a folder, which may not be written."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'theirs' / 'checkpoints').mkdir(parents=True)
  (tmp_path / 'shut').mkdir()
  real = os.access
  monkeypatch.setattr(
    os, 'access',
    lambda path, how: path.name not in ('theirs', 'shut') and real(path, how)
  )  # fmt: skip
  return tmp_path / 'theirs'


READERS = [
  {'job': 'search'},
  {'job': 'mine', 'output': 'a.jsonl'},
  {'job': 'export', 'output': 'a'},
]


@pytest.mark.parametrize('changes', READERS, ids=lambda c: c['job'])
@pytest.mark.parametrize(
  ('end', 'raises', 'code'),
  [
    (lambda: None, contextlib.nullcontext(), None),
    (lambda: 1 / 0, pytest.raises(ZeroDivisionError), None),
    (
      lambda: os.kill(os.getpid(), signal.SIGTERM),
      pytest.raises(SystemExit),
      143,
    ),
  ],
  ids=['end', 'error', 'SIGTERM'],
)
def test_what_is_made_of_a_run_of_others_is_gone_afterwards(
  end, raises, code, changes, shut, capsys
):
  config = config_lib.Config(workdir=str(shut), **changes)
  before, handler = listing(shut), signal.getsignal(signal.SIGTERM)
  try:
    with raises as raised, places.own(config) as given:
      folder = pathlib.Path(given.workdir)
      (folder / 'tokens').mkdir()
      end()
  finally:
    signal.signal(signal.SIGTERM, handler)
  assert given == dataclasses.replace(
    config, workdir=str(folder), init_from=str(shut)
  )
  assert shut not in (folder, *folder.parents)
  assert not folder.exists()
  assert code is None or raised.value.code == code
  assert listing(shut) == before
  way = f'--init_from={shut} --workdir=FOLDER_OF_YOUR_OWN keeps them'
  assert f'in {folder} until this ends ({way})' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('job', 'output'),
  [
    ('evaluate', ''),
    ('evaluate', 'a'),
    ('mine', ''),
    ('export', ''),
    ('mine', 'shut/a'),
    ('export', 'shut/a'),
  ],
)
def test_what_a_run_of_others_cannot_take_is_refused_with_the_way_round(
  job, output, shut
):
  config = config_lib.Config(job=job, workdir=str(shut), output=output)
  says = f'; use a run that is not yours with --init_from={shut} --workdir='
  if output == 'shut/a':
    says = '--output: .*/shut cannot be written'
  with pytest.raises(errors.BadInput, match=says), places.own(config):
    pass


@pytest.mark.parametrize('name', ['theirs', 'mine'])
def test_to_compare_a_run_of_others_its_ranking_is_made_elsewhere(name, shut):
  pathlib.Path('mine').mkdir()
  config = config_lib.Config(job='compare', runs=f'{name},other', split='dev')
  with pytest.raises(errors.BadInput, match='; make it with') as says:
    systems.read(config)
  way = f'--init_from={name} --workdir=FOLDER_OF_YOUR_OWN, and name that folder'
  assert (f' --split=dev {way}.' in str(says.value)) == (name == 'theirs')


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('x' * 300, f'{"x" * 300} is longer than a name may be;'),
    ('loop', '--data_dir=loop names a link to itself,'),
  ],
)
def test_data_that_cannot_be_looked_at_is_told_by_its_kind(
  name, expected, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  os.symlink('loop', 'loop')
  config = config_lib.Config(job='evaluate', dataset='beir', data_dir=name)
  with pytest.raises((OSError, errors.BadInput)) as raised:
    places.check(config)
  sentence, code = launch.explain(raised.value)
  assert sentence.startswith(expected)
  assert code == 2


def test_a_read_only_file_system_is_called_one(tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'access', lambda *_: False)
  flag = types.SimpleNamespace(f_flag=os.ST_RDONLY)
  monkeypatch.setattr(os, 'statvfs', lambda _: flag)
  found = places.problem(tmp_path / 'new')
  assert found == f'{tmp_path} is on a read-only file system'


def test_token_rows_of_others_are_read_where_they_cannot_be_made(
  tmp_path, monkeypatch
):
  (tmp_path / 'passages-0123').mkdir()
  monkeypatch.setattr(os, 'access', lambda path, _: path != tmp_path)
  config = config_lib.Config(job='evaluate', tokens_dir=str(tmp_path))
  with places.own(config) as same:
    assert same == config


def test_the_docstrings_of_a_run_are_those_that_it_was_trained_on(
  tmp_path, monkeypatch
):
  theirs = tmp_path / 'theirs'
  with atomic.publish(theirs / 'datasets', {}) as made:
    (made / 'a').write_text('a')
  asked = []

  def builder(folder):
    asked.append(folder)
    raise KeyboardInterrupt

  monkeypatch.setattr(docstrings, '_builder', builder)
  config = config_lib.Config(workdir=str(tmp_path), init_from=str(theirs))
  for job in ('evaluate', 'compare', 'train'):
    with pytest.raises(KeyboardInterrupt):
      experiment.load_texts(dataclasses.replace(config, job=job), ('dev',))
  assert asked[:2] == [theirs / 'datasets'] * 2
  assert asked[2] != theirs / 'datasets'
  with atomic.publish(tmp_path / 'own' / 'datasets', {}) as made:
    (made / 'a').write_text('b')
  own = dataclasses.replace(
    config, job='evaluate', workdir=str(tmp_path / 'own')
  )
  with pytest.raises(KeyboardInterrupt):
    experiment.load_texts(own, ('dev',))
  assert asked[3] == tmp_path / 'own' / 'datasets'
  (theirs / 'datasets' / 'a').write_text('b')
  with pytest.raises(errors.Damaged, match='datasets/a is missing or was'):
    experiment.load_texts(dataclasses.replace(config, job='evaluate'), ('dev',))
  assert (theirs / 'datasets').is_dir()


@pytest.mark.parametrize('number', [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_run_that_turns_out_not_to_be_writable_names_the_way_round(
  number, tmp_path
):
  (tmp_path / 'checkpoints').mkdir()
  config = config_lib.Config(job='evaluate', workdir=str(tmp_path))

  def fails(path, number=number):
    with places.own(config):
      raise OSError(number, 'text', str(path))

  way = f'use a run that is not yours with --init_from={tmp_path} --workdir='
  inside, outside = tmp_path / 'tokens' / 'a', tmp_path.parent / 'a'
  with pytest.raises(errors.BadInput, match=f'{inside}.*; {way}'):
    fails(inside)
  pytest.raises(OSError, fails, outside)
  pytest.raises(OSError, fails, inside, errno.ENOSPC)
  # Its name begins as that of the run does.
  pytest.raises(OSError, fails, f'{tmp_path}-out/a')
