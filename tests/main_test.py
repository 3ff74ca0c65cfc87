"""The command line as a person uses it: train, evaluate, search; bad input."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

from absl import flags
import old_run_test
import pytest

from ance_jax import config as config_lib
from ance_jax import errors as errors_lib
from ance_jax import flags as flags_lib
from ance_jax import launch
from ance_jax.core import atomic
from ance_jax.core import checkpoint

REPOSITORY = pathlib.Path(__file__).parents[1]
FIELDS = dataclasses.fields(config_lib.Config)
SECTIONS = filter(None, (field.metadata['section'] for field in FIELDS))


def run_main(*arguments, typed=''):
  return subprocess.run(
    [sys.executable, '-m', 'ance_jax.main', *arguments],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=300,
    input=typed,
  )


def test_a_pipe_has_each_line_at_once(tmp_path):
  with subprocess.Popen(
    [
      sys.executable,
      '-m',
      'ance_jax.main',
      '--job=inspect',
      f'--workdir={tmp_path}',
    ],
    cwd=REPOSITORY,
    stdout=subprocess.PIPE,
    text=True,
    env={**os.environ, 'PYTHONUNBUFFERED': ''},
  ) as process:
    assert process.stdout.readline() == 'inspecting pydocs\n'
    process.kill()
    # What is kept back comes all at once, at the end.
    assert 'report:' not in process.stdout.read()


def test_train_evaluate_and_search_from_the_shell(tiny, tmp_path):
  config = dataclasses.replace(tiny, num_devices=1)
  flagfile = tmp_path / 'tiny.flags'
  flagfile.write_text('# A tiny run.\n' + config.to_flagfile())
  trained = run_main(f'--flagfile={flagfile}')
  assert trained.returncode == 0, trained.stderr[-2000:]
  assert 'refresh at step 8: dev mrr@10' in trained.stdout
  # No terminal, no bars.
  assert 'step 12 of 12 | loss ' in trained.stdout
  assert ' steps/s, 00:00 left' in trained.stdout
  assert 'it/s' not in trained.stderr
  assert 'steps/s' not in trained.stderr
  assert 'Traceback' not in trained.stderr

  workdir = f'--workdir={config.workdir}'
  scored = run_main('--job=evaluate', workdir, '--split=test')
  assert scored.returncode == 0, scored.stderr[-2000:]
  written = atomic.read_json(f'{config.workdir}/test-model-12.json')
  value = written['metrics']['mrr@10']
  assert f'test at step 12, 12 queries: mrr@10 {value:.4f}' in scored.stdout
  run_file = pathlib.Path(config.workdir, 'test-model-12.trec').read_text()
  assert len({line.split()[0] for line in run_file.splitlines()}) == 12

  found = run_main('--job=search', workdir, typed='t3w5 t3w7\n\n')
  assert found.returncode == 0, found.stderr[-2000:]
  assert found.stdout.count('topic') + found.stdout.count('w') > 5
  assert '\n  5  ' in found.stdout


def test_ctrl_c_at_the_prompt_ends_the_search_without_a_traceback(
  tiny, tmp_path
):
  flags = dataclasses.replace(
    tiny, job='search', retriever='bm25', workdir=str(tmp_path)
  ).to_flagfile()
  with subprocess.Popen(
    [sys.executable, '-m', 'ance_jax.main', *flags.splitlines()],
    cwd=REPOSITORY,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    shown = ''
    while not shown.endswith('query> '):
      letter = process.stdout.read(1)
      assert letter, process.stderr.read()
      shown += letter
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
  assert process.returncode == 130
  assert 'ance_jax: interrupted.' in errors
  assert 'Traceback' not in errors


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['--no_such_flag=1'], 'there is no flag --no_such_flag; see --help'),
    (
      ['left', 'over'],
      "'left' is not a flag; write --name=value",
    ),
    (['--method=anse'], 'anse'),
    (
      ['--batch_size=0'],
      '--batch_size=0 is out of range; set it to at least 1',
    ),
    (['--batch_size=0', '--debug'], '--batch_size=0 is out of range; set it'),
    (['--flagfile={folder}/bad.flags'], "'max_steps 4' is not a flag"),
  ],
)
def test_bad_flags_end_with_a_sentence_and_a_traceback_only_with_debug(
  arguments, expected, tmp_path
):
  (tmp_path / 'bad.flags').write_text('--max_steps=3\nmax_steps 4\n')
  ended = run_main(*(text.format(folder=tmp_path) for text in arguments))
  assert ended.returncode == 2
  assert expected in ended.stderr
  assert ('Traceback' in ended.stderr) == ('--debug' in arguments)


@pytest.mark.parametrize(
  ('error', 'code', 'expected'),
  [
    (OSError(28, 'No space left on device'), 1, 'No space left on device'),
    (errors_lib.SaveFailed('not saved.'), 1, 'not saved.'),
    (errors_lib.BadInput('bad.'), 2, 'bad.'),
    (FloatingPointError('not finite.'), 2, 'not finite.'),
    (errors_lib.Stopped('encode'), 143, 'stopped on request in encode'),
    (KeyboardInterrupt(), 130, 'interrupted.'),
    (KeyError('a\nb'), 1, 'KeyError: '),
    (MemoryError(), 1, 'MemoryError: '),
  ],
  ids=lambda value: type(value).__name__,
)
def test_whatever_ends_a_job_is_one_sentence_and_an_exit_code(
  error, code, expected
):
  sentence, found = launch.explain(error)
  assert found == code
  assert expected in sentence
  assert '\n' not in sentence
  assert sentence.endswith('.')


@pytest.mark.parametrize(
  'kind', [errors_lib.SaveFailed, errors_lib.Damaged, errors_lib.BadInput]
)
def test_a_sentence_of_ours_goes_before_that_of_its_cause(kind):
  error = kind('not saved; make room.')
  error.__cause__ = OSError(28, 'No space left on device')
  assert launch.explain(error)[0] == 'not saved; make room.'


def test_flags_are_parsed_without_what_takes_seconds_to_import():
  code = """
import sys
from ance_jax import main
heavy = 'jax numpy faiss orbax optax transformers tensorflow_datasets torch'
print({*heavy.split()} & {*sys.modules})
main.run()
"""
  ended = subprocess.run(
    [sys.executable, '-c', code, '--help'], capture_output=True, text=True
  )
  assert ended.stdout.startswith('set()\n')


def test_jobs_import_what_they_use():
  code = """
import importlib
import sys
def heavy(*jobs):
  for job in jobs:
    importlib.import_module(f'ance_jax.jobs.{job}')
  names = 'jax optax matplotlib tensorflow_datasets faiss transformers flax'
  return {*names.split()} & {*sys.modules}
print(heavy('report'))
print(sorted(heavy(
  *'compare encode evaluate export inspect mine'.split(),
  *'prepare refresh search serve'.split(),
)))
"""
  ended = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True
  )
  expected = "set()\n['faiss', 'flax', 'jax', 'transformers']\n"
  assert ended.stdout == expected, ended.stderr


def test_flags_of_jax_are_set_where_they_are_named(tmp_path):
  code = """
import sys
import jax
from ance_jax import launch
from ance_jax import main
names = 'jax_debug_nans', 'jax_log_compiles'
launch.run = lambda: print(*[getattr(jax.config, name) for name in names])
main.run()
"""
  path = tmp_path / 'a.flags'
  path.write_text('--jax_debug_nans\n--nojax_log_compiles\n--seed=3\n')
  ended = subprocess.run(
    [sys.executable, '-c', code, f'--flagfile={path}', '--jax_log_compiles'],
    capture_output=True, text=True,
  )  # fmt: skip
  assert ended.stdout == 'True True\n', ended.stderr
  assert run_main('--jax_no_such=1').returncode == 2


def test_help_tells_the_meaning_and_the_jobs_of_each_flag():
  shown = run_main('--help')
  assert shown.returncode == 0
  for field in FIELDS:
    assert f'\n  --{field.name}=' in shown.stdout
  assert 'ANCE: 10,000 on MS MARCO' in ' '.join(shown.stdout.split())
  assert '  --chunks=1  (all but compare report)\n' in shown.stdout
  assert '  --watch=false  (refresh)\n' in shown.stdout
  places = [shown.stdout.index(f'\n{title}:\n') for title in SECTIONS]
  assert places == sorted(places)


def test_help_of_a_job_has_the_flags_that_it_reads():
  shown = run_main('--help', '--job=compare').stdout
  for field in FIELDS:
    is_read = 'compare' in config_lib.readers(field.name)
    assert (f'\n  --{field.name}=' in shown) == is_read
  assert '\nOptimizer:\n' not in shown


def test_help_takes_less_than_a_second():
  seconds = []
  for _ in range(3):
    began = time.monotonic()
    run_main('--help')
    seconds.append(time.monotonic() - began)
  assert min(seconds) < 1


@pytest.mark.parametrize(
  ('arguments', 'lines'),
  [
    ([], []),
    (['--job=compare', '--chunks=2'], ['--chunks has no effect on --job=comp']),
    (['--job=report', '--noremat'], ['--remat has no effect on --job=report']),
    (['--job=train', '--chunks=2', '-seed=1', '--verbosity=1', 'x'], []),
    (['--warmup_method=dpr'], ['--warmup_method has no effect without --war']),
    (['--warmup_method=dpr', '--warmup_steps=2'], []),
    (['--whole_chunks'], ['--whole_chunks has no effect without --chunks']),
    (['--whole_chunks', '--chunks=2'], []),
    (
      ['--method=bm25', '--warmup_steps=9'],
      ['--warmup_steps has no effect on --method=bm25, which does'],
    ),
    (['--job=mine', '--num_results', '3', '--num_results=4'], ['--num_resu']),
  ],
)
def test_a_flag_typed_by_hand_that_nothing_reads_gets_a_line(arguments, lines):
  given = flags.FlagValues()
  flags_lib.define_flags(given)
  flags.DEFINE_integer('verbosity', 0, '', flag_values=given)
  flags_lib.parse(['', *arguments], given)
  found = flags_lib.unread(flags_lib.from_flags(given), arguments)
  assert len(found) == len(lines)
  for line, begins in zip(found, lines, strict=True):
    assert line.startswith(begins)


@pytest.mark.parametrize(('typed', 'number'), [('chunks', 1), ('workdir', 0)])
def test_a_flag_of_a_flagfile_that_nothing_reads_gets_no_line(
  typed, number, tmp_path
):
  path = tmp_path / 'a.flags'
  path.write_text('--job=report\n--chunks=2\n')
  said = old_run_test.command(f'--flagfile={path}', f'--{typed}=3', code=2)
  assert said.count('no effect') == number


def write_run(folder, config, step=2):
  """Writes what a job reads of a run before its weights: its settings."""
  record = checkpoint.record_folder(folder, step)
  atomic.make_folder(record)
  (record / 'run.flags').write_text(config.to_flagfile())
  atomic.commit(record.parent, {})


def settings_of(monkeypatch, *arguments):
  """The settings that a command line comes to."""
  given = flags.FlagValues()
  flags_lib.define_flags(given)
  flags_lib.parse(['', *arguments], given)
  monkeypatch.setattr(launch.flags, 'FLAGS', given)
  return launch.with_flags_of_run(flags_lib.from_flags(given))


@pytest.mark.parametrize(
  ('arguments', 'protocol'),
  [
    ([], 'usual'),
    (['--beir_set=scifact'], None),
    (['--beir_set=scifact', '--protocol=msmarco'], 'msmarco'),
  ],
)
def test_a_set_that_is_named_for_a_job_on_a_run_brings_its_protocol(
  arguments, protocol, tiny, tmp_path, monkeypatch
):
  write_run(tmp_path, tiny)
  config = settings_of(
    monkeypatch, '--job=evaluate', f'--workdir={tmp_path}', *arguments
  )
  assert config.protocol == protocol
  assert config.data_dir == tiny.data_dir


RULES = {'max_score': 0.9, 'skip_ranks': 3, 'on_shortage': 'keep'}


@pytest.mark.parametrize('job', ['refresh', 'mine', 'evaluate'])
def test_only_a_refresh_mines_by_the_rules_of_its_run(
  job, tiny, tmp_path, monkeypatch
):
  write_run(tmp_path, dataclasses.replace(tiny, seed=3, **RULES))
  given = ['--skip_ranks=1', f'--job={job}']
  for place in ('workdir', 'init_from')[: 1 + (job != 'refresh')]:
    config = settings_of(monkeypatch, *given, f'--{place}={tmp_path}')
    found = [getattr(config, name) for name in RULES]
    assert found == ([0.9, 1, 'keep'] if job == 'refresh' else [None, 1, None])
    assert config.seed == 3


def test_a_flagfile_that_an_older_release_left_repeats_its_run(tmp_path):
  """Its rules of mining were those of --job=mine."""
  lines = '--mine_from=3', '--sampling=random', '--seed=3', '--max_score=0.5'
  path = tmp_path / 'run.flags'
  path.write_text('\n'.join(lines) + '\n')
  expected = config_lib.Config(seed=3)
  assert flags_lib.from_flagfile(path) == expected
  assert config_lib.Config.from_lines(list(lines), 'run.flags') == expected
  path.write_text('--max_score=0.5\n')
  assert flags_lib.from_flagfile(path).max_score == 0.5
  other = tmp_path / 'my.flags'
  other.write_text('--mine_from=3\n')
  with pytest.raises(errors_lib.BadInput, match='--mine_from is now --skip_r'):
    flags_lib.from_flagfile(other)


OF_DATA = {
  'data_dir': '/held', 'protocol': 'answers', 'train_split': 'learn',
  'dev_split': 'held', 'dev_fraction': 0.4, 'bm25_run': '/x.trec',
  'beir_set': 'nq', 'questions': 'nq',
}  # fmt: skip
OF_PLACES = {
  'tokens_dir': '/t', 'compilation_cache_dir': '/c', 'output': '/o',
  'picture': '/p', 'remote_dir': '/r',
}  # fmt: skip


@pytest.mark.parametrize('is_named', [False, True])
def test_the_data_of_a_run_is_read_unless_another_is_named(
  is_named, tiny, tmp_path, monkeypatch
):
  write_run(tmp_path, dataclasses.replace(tiny, seed=3, **OF_DATA, **OF_PLACES))
  default = config_lib.Config()
  config = settings_of(
    monkeypatch, '--job=evaluate', f'--init_from={tmp_path}',
    *['--dataset=pairs'][:is_named],
  )  # fmt: skip
  for name, value in OF_DATA.items():
    found = getattr(config, name)
    assert found == (getattr(default, name) if is_named else value), name
  for name in OF_PLACES:
    assert getattr(config, name) == getattr(default, name)
  assert (config.seed, config.workdir) == (3, '')


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ([], ('IVF8,Flat', 'nprobe=4')),
    (['--index_params=nprobe=2'], ('IVF8,Flat', 'nprobe=2')),
    (['--index=Flat'], ('Flat', '')),
    (
      ['--index=IVF9,Flat', '--index_params=nprobe=3'],
      ('IVF9,Flat', 'nprobe=3'),
    ),
  ],
)
def test_parameters_of_an_index_are_not_those_of_another(
  arguments, expected, tiny, tmp_path, monkeypatch
):
  index = {'index': 'IVF8,Flat', 'index_params': 'nprobe=4'}
  write_run(tmp_path, dataclasses.replace(tiny, **index))
  config = settings_of(
    monkeypatch, '--job=evaluate', f'--workdir={tmp_path}', *arguments
  )
  assert (config.index, config.index_params) == expected


@pytest.mark.parametrize('job', config_lib.JOBS)
def test_a_job_that_can_be_of_another_run_takes_its_settings(
  job, tiny, tmp_path, monkeypatch
):
  write_run(tmp_path, dataclasses.replace(tiny, top_k=7))
  config = settings_of(monkeypatch, f'--job={job}', f'--init_from={tmp_path}')
  jobs = 'evaluate search audit mine export encode compare'.split()
  assert config.top_k == (7 if job in jobs else 200)


@pytest.mark.parametrize('job', ['evaluate', 'train'])
def test_a_job_takes_the_settings_of_a_run_that_went_on_elsewhere(
  job, tiny, tmp_path, monkeypatch
):
  """But training, which takes no more than it is told."""
  write_run(tmp_path / 'copy', tiny)
  config = settings_of(
    monkeypatch, f'--job={job}', f'--workdir={tmp_path}/here',
    f'--remote_dir={tmp_path}/copy'
  )  # fmt: skip
  is_read = job == 'evaluate'
  expected = tiny.data_dir if is_read else ''
  assert config.data_dir == expected
  assert (tmp_path / 'here').exists() == is_read
  alone = settings_of(monkeypatch, f'--job={job}', f'--workdir={tmp_path}/copy')
  assert alone.data_dir == expected


@pytest.mark.parametrize(
  ('name', 'steps'), [('last', [3]), ('best', [2, 3]), ('2', [2, 3])]
)
def test_a_checkpoint_that_is_named_is_copied_in(
  name, steps, tiny, tmp_path, monkeypatch
):
  for step in (2, 3):
    write_run(tmp_path / 'copy', tiny, step)
  settings_of(
    monkeypatch, '--job=export', f'--workdir={tmp_path}/here',
    f'--remote_dir={tmp_path}/copy', f'--checkpoint={name}'
  )  # fmt: skip
  assert checkpoint.committed_steps(tmp_path / 'here') == steps


@pytest.mark.parametrize(
  ('job', 'port', 'is_page'),
  [
    ('search', 0, True),
    ('search', 8000, True),
    ('search', None, False),
    ('evaluate', 8000, False),
  ],
)
def test_a_search_with_a_port_is_the_page(job, port, is_page, monkeypatch):
  ran = []
  monkeypatch.setattr(
    launch.importlib,
    'import_module',
    lambda name: ran.append(name) or mock.Mock(),
  )
  launch.run_job(config_lib.Config(job=job, port=port))
  assert (ran == ['ance_jax.jobs.serve']) == is_page
