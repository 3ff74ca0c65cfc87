"""Flags: each has a reader and a meaning, and a file gives them all again."""

import dataclasses
import importlib
import pathlib
import re

from absl import flags
import jax.numpy as jnp
import pytest

from ance_jax import config
from ance_jax import errors
from ance_jax import flags as flags_lib
from ance_jax.core import logs
from ance_jax.data import datasets
from ance_jax.data import load
from ance_jax.jobs import forms
from ance_jax.jobs import mine_formats
from ance_jax.jobs import train
from ance_jax.training import losses
from ance_jax.training import methods
from ance_jax.training import optimizers

REPOSITORY = pathlib.Path(__file__).parents[1]
FIELDS = dataclasses.fields(config.Config)
RUN_FLAGS = REPOSITORY / 'tests' / 'data' / 'run_of_0.1.0' / 'run' / 'run.flags'
# Flags of 0.1.0 that its run.flags leaves out, as they were not given.
NOT_GIVEN = (
  'num_processes process_id coordinator compilation_cache_dir beir_set '
  'questions protocol tie_encoders head_size head_norm title_separator '
  'query_prompt passage_prompt lower_case prefix_space drop_answers max_score '
  'min_score absolute_margin relative_margin judge_max_score '
  'steps_per_checkpoint port'
).split()


SOURCES = '\n'.join(
  path.read_text()
  for path in (REPOSITORY / 'ance_jax').rglob('*.py')
  if path.stem not in ('config', 'config_checks')
)


def test_every_flag_is_read_somewhere_and_explained_in_a_sentence():
  # In pretrained.py settings are looked up by name.
  read = re.findall(r"(?:config|settings|FLAGS)\.(\w+)|'(\w+)': ", SOURCES)
  names = {field.name for field in FIELDS}
  assert not names - {name for pair in read for name in pair}
  for field in FIELDS:
    assert re.fullmatch(r'.{20,}\.', field.metadata['help']), field.name


def test_every_choice_is_made_somewhere():
  for row in methods.METHODS.values():
    assert callable(getattr(losses, row.loss))
  for name in datasets.READERS:
    assert callable(load.reader(name))
  for name in forms.FORMS:
    assert callable(getattr(mine_formats, name))
  for name in config.JOBS:
    assert callable(importlib.import_module(f'ance_jax.jobs.{name}').run)
  for name in methods.OPTIMIZERS:
    optimizers.make(config.Config(optimizer=name))


def test_the_table_of_methods_is_that_of_the_readme():
  lines = re.findall(
    r'^\| `(\w+)` \| (.*) \| (.*) \| (.*) \| [.–\d]+ \| [.–\d]+ \|$',
    (REPOSITORY / 'README.md').read_text().split('\n## Methods\n')[1],
    re.MULTILINE,
  )
  assert [name for name, *_ in lines] == list(methods.METHODS)
  words = {
    ('bm25',): 'bm25 dpr', (): 'in_batch guided', ('corpus',): 'random',
    ('given',): 'given given_in_batch distill_given margin_mse_given',
    ('index',): 'ance ance_code ance_code_qa ance_in_batch star distill '
    'margin_mse ance_guided',
    ('index', 'given'): 'ance_given', ('searched',): 'adore',
    ('index', 'lookahead', 'momentum'): 'ance_tele',
  }  # fmt: skip
  for name, source, refreshed, loss in lines:
    row = methods.METHODS[name]
    assert name in words[row.sources].split()
    assert row.in_batch == bool(re.search('in-batch|other queries', source))
    assert row.refreshes == (refreshed not in ('never', 'in each step'))
    assert row.once == (refreshed == 'once')
    assert row.searches == (refreshed == 'in each step')
    assert row.restarts == ('begins again' in source)
    assert row.loss == loss.lower().replace(' ', '_')
    assert row.without_answers == ('without an answer' in source)
    assert row.triplets == ('triplets in a row' in source)
    assert row.last_positive == bool(re.search(r'\bcode\b', source))


def test_a_default_is_the_papers_where_its_help_has_one():
  others = {
    'head_size', 'query_length', 'passage_length', 'chunks', 'warmup_steps',
    'micro_batch_size',
  }  # fmt: skip
  pattern = r'(?:ANCE|Anserini)\b[^.:;]*: ([\d,]*\d(?:\.\d+)?(?:e-\d)?)\b'
  said = {
    field: float(found[1].replace(',', ''))
    for field in FIELDS
    if (found := re.search(pattern, field.metadata['help']))
  }
  assert {f.name for f, value in said.items() if f.default != value} == others
  names = {field.name for field in said}
  assert {'learning_rate', 'top_k', 'bm25_k1'} <= names


@pytest.fixture
def added(monkeypatch):
  """A method that somebody adds: a row, and a loss."""
  row = methods.Method(('bm25',), True, 'hinge', 'nowhere')
  monkeypatch.setitem(methods.METHODS, 'hinge', row)

  def hinge(columns):
    apart = jnp.maximum(columns.others - columns.positive[:, None] + 1, 0)
    return jnp.where(columns.counted, apart, 0).sum(1)

  monkeypatch.setattr(losses, 'hinge', hinge, raising=False)


@pytest.mark.parametrize('flag', ['method', 'warmup_method'])
def test_a_method_is_a_row_a_loss_and_a_flagfile(flag, added, tiny, tmp_path):
  settings = dataclasses.replace(tiny, **{flag: 'hinge'}, max_steps=2)
  path = tmp_path / 'hinge.flags'
  path.write_text(settings.to_flagfile())
  settings = flags_lib.from_flagfile(path)
  assert getattr(settings, flag) == 'hinge'
  flag_values = flags.FlagValues()
  flags_lib.define_flags(flag_values)
  assert 'given_in_batch|hinge>' in ''.join(str(flag_values).split())
  train.run(settings)
  assert min(logs.series(settings.workdir, 'train/loss').values()) > 1


def test_flags_give_the_defaults_and_what_was_set():
  flag_values = flags.FlagValues()
  flags_lib.define_flags(flag_values)
  flag_values(['main', '--seed=3', '--notie_encoders', '--index=SQ8'])
  found = flags_lib.from_flags(flag_values)
  assert found == config.Config(seed=3, tie_encoders=False, index='SQ8')


def test_a_flagfile_that_was_written_gives_the_same_settings(tmp_path):
  settings = config.Config(
    workdir='/some where/else',
    tie_encoders=True,
    pooling='mean',
    learning_rate=3e-5,
    passage_length=77,
    max_steps=5,
    query='two words',
    query_prompt='query: ',
  )
  path = tmp_path / 'run.flags'
  path.write_text(settings.to_flagfile())
  assert flags_lib.from_flagfile(path) == settings
  lines = settings.to_flagfile().split('\n')[:-1]
  assert config.Config.from_lines(lines, 'run.flags') == settings
  changes = {'max_steps': 6, 'workdir': '', 'tie_encoders': False}
  changed = flags_lib.from_flagfile(path, **changes)
  assert changed == dataclasses.replace(settings, **changes)


@pytest.mark.parametrize(
  'name',
  'workdir compilation_cache_dir data_dir init_from runs picture negatives '
  'bm25_run tokens_dir ranking output refresh_replay cross_encoder '
  'score_run'.split(),
)
def test_a_path_is_written_out(name):
  with pytest.raises(errors.BadInput, match=f'^--{name}=~/path has a ~'):
    config.Config(**{name: '~/path'})


def test_a_path_is_the_same_setting_as_its_text():
  assert config.Config(init_from=pathlib.Path('/x/y')) == config.Config(
    init_from='/x/y'
  )


def test_a_flagfile_that_was_written_names_defaults_too():
  """Those of another release may be others."""
  text = config.Config().to_flagfile()
  assert '--top_k=200\n' in text
  assert '--learning_rate=1e-06\n' in text
  assert 'steps_per_eval' not in text  # None: not given.


def test_a_flagfile_may_name_another_and_go_on_from_it(tmp_path):
  (tmp_path / 'base.flags').write_text('# Base.\n--seed=1\n--max_steps=5\n')
  (tmp_path / 'top.flags').write_text(
    f'# Top.\n--flagfile={tmp_path}/base.flags\n\n--max_steps=7\n'
  )
  found = flags_lib.from_flagfile(tmp_path / 'top.flags')
  assert (found.seed, found.max_steps) == (1, 7)


def parse(*arguments):
  """The settings of a command line, and what it has left over."""
  flag_values = flags.FlagValues()
  flags_lib.define_flags(flag_values)
  left_over = flags_lib.parse(['main', *arguments], flag_values)
  return flags_lib.from_flags(flag_values), left_over


def test_flags_and_flagfiles_of_a_command_line_go_in_their_order(tmp_path):
  path = tmp_path / 'a.flags'
  path.write_text('--seed=1\n--max_steps=5\n')
  found, left_over = parse('--seed=2', f'--flagfile={path}', '--max_steps=7')
  assert (found.seed, found.max_steps) == (1, 7)
  found, _ = parse('-flagfile', str(path), '--seed', '3', '--notie_encoders')
  assert (found.seed, found.max_steps, found.tie_encoders) == (3, 5, False)
  assert left_over == ['main']


def test_what_no_flag_takes_is_left_over():
  found, left_over = parse('--seed=1', '--', '--seed=2', '--flagfile=b')
  assert found.seed == 1
  assert left_over == ['main', '--seed=2', '--flagfile=b']
  assert parse('a', '--seed=1')[1] == ['main', 'a']


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['--no_such=1'], '^there is no flag --no_such; see --help'),
    (['--seed=one'], '^--seed=one is not a whole number; write digits'),
    (['--seed'], '^a flag has no value of its kind .*; write --name=value'),
    (
      ['--flagfile=/no/such'],
      "^there is no flagfile '/no/such'; check the path",
    ),
    (['--flagfile'], "^there is no flagfile ''"),
    # As root may read all files: one that cannot be read from its beginning.
    (['--flagfile=/proc/self/mem'], '^flagfile /proc/self/mem cannot be read'),
  ],
)
def test_what_is_wrong_in_a_command_line_is_told(arguments, expected):
  with pytest.raises(errors.BadInput, match=expected):
    parse(*arguments)


def test_only_what_may_change_is_not_among_the_differences():
  first = config.Config()
  second = dataclasses.replace(first, max_steps=2, seed=1, job='evaluate')
  fixed = config.differences(first, second, may_change=False)
  assert list(fixed) == [('seed', 0, 1)]
  free = config.differences(first, second, may_change=True)
  assert [name for name, _, _ in free] == ['job', 'max_steps']


def test_each_flag_of_an_older_release_is_a_flag_or_has_a_new_name():
  lines = RUN_FLAGS.read_text().splitlines()
  old = [line[2:].partition('=')[0] for line in lines] + NOT_GIVEN
  assert len(set(old)) == 116
  now = {field.name for field in FIELDS}
  assert {config.RENAMED.get(name, name) for name in old} <= now
  assert set(config.RENAMED.values()) <= now
  assert not set(config.RENAMED) & now


@pytest.fixture
def renamed(monkeypatch):
  names = {'negs': 'num_hard_negatives', 'norm': 'head_norm'}
  monkeypatch.setattr(config, 'RENAMED', names)


@pytest.mark.parametrize(
  ('argument', 'expected'),
  [
    ('--negs=3', '--num_hard_negatives=3'),
    ('--negs', '--num_hard_negatives'),
    ('-nonorm', '-nohead_norm'),
    ('--norm=--negs=3', '--head_norm=--negs=3'),
    ('--seed=--negs', '--seed=--negs'),
    ('negs=3', 'negs=3'),
    ('--negs.flags', '--negs.flags'),
    ('', ''),
  ],
)
def test_a_flag_has_its_present_name(argument, expected, renamed):
  assert config.renamed(argument) == expected


def test_a_run_of_an_older_release_is_read_by_its_names(renamed):
  lines = ['--negs=3', '--norm=false', '--seed=1']
  found = config.Config.from_lines(lines, 'run.flags')
  assert found == config.Config(num_hard_negatives=3, head_norm=False, seed=1)


@pytest.mark.parametrize(
  ('argument', 'old', 'new'),
  [
    ('--negs=3', '--negs', '--num_hard_negatives'),
    ('--nonorm', '--nonorm', '--nohead_norm'),
    ('--negs 3', '--negs', '--num_hard_negatives'),
  ],
)
def test_a_person_is_told_the_new_name_of_a_flag(
  argument, old, new, renamed, tmp_path
):
  says = f'{old} is now {new}; write that.$'
  with pytest.raises(errors.BadInput, match=f'^{says}'):
    parse(argument)
  path = tmp_path / 'a.flags'
  path.write_text(f'--seed=1\n{argument}\n')
  for read in (parse, lambda _: flags_lib.from_flagfile(path)):
    with pytest.raises(errors.BadInput, match=f'^{path}, line 2: {says}'):
      read(f'--flagfile={path}')
  with pytest.raises(errors.BadInput, match=f'^{says}'):
    flags_lib.from_flagfile(path, **{old[2:]: 3})


@pytest.mark.parametrize(
  ('settings', 'fact', 'cure'),
  [
    ({'watch': True}, 'is for --job=refresh alone', 'leave it out'),
    ({'beam_runner': 'x'}, 'is for --job=prepare alone', 'leave it out'),
    ({'dry_run': True, 'job': 'search'}, 'for --job=train alone', 'leave it'),
    (
      {'index': 'device', 'index_params': 'nprobe=1'},
      'is for indexes of FAISS, and --index is device',
      'leave it out',
    ),
    (
      {'max_staleness': 4, 'refresh_schedule': '0-9:3,9-:5'},
      'is less than the 5 steps',
      'raise it',
    ),
    ({'num_processes': 2}, '= is missing with --num_processes=2', 'HOST:PORT'),
    ({'coordinator': 'a:1'}, 'is not needed with --num_pr', 'leave it out'),
    (
      {'num_processes': 2, 'process_id': 2, 'coordinator': 'a:1'},
      'process_id=2 is not a process',
      'number them from 0 to 1',
    ),
    (
      {'process_id': 1},
      'is not a process with --num_processes=1',
      'leave it out',
    ),
    (
      {'num_processes': 0, 'job': 'evaluate'},
      'num_processes=0 is for --job=train alone',
      'leave it out',
    ),
    (
      {'num_processes': 0, 'remote_dir': '/a'},
      'remote_dir=/a cannot be used with --num_processes=0',
      'leave it out',
    ),
    (
      {'num_processes': 0, 'refresh_mode': 'async'},
      'refresh_mode=async cannot be used with --num_processes=0',
      'choose sync, delayed or external',
    ),
    ({'download': True, 'dataset': 'beir'}, 'which set of BEIR', 'name it'),
    ({'max_staleness': 5}, 'is less than the 10000 steps', 'raise it'),
    (
      {'max_staleness': 10_000},
      'max_staleness=10000 cannot be used with --refresh_mode=sync',
      'leave it',
    ),
    (
      {
        'warmup_until_plateau': 1,
        'warmup_steps': 9,
        'steps_per_eval': 3,
        'refresh_mode': 'external',
      },
      'plateau=1 cannot be used with --refresh_mode=external',
      'leave it',
    ),
    ({'refresh_schedule': '5-:2'}, 'without a gap', '0-2000:500,2000-:5000'),
    (
      {'refresh_delay': 2},
      'cannot be used with --refresh_mode=sync',
      'leave it',
    ),
    ({'refresh_mode': 'delayed'}, 'by how many steps', 'set --refresh_delay'),
    (
      {'refresh_devices': 1},
      'cannot be used with --refresh_mode=sync',
      'leave it',
    ),
    ({'passage_length': 2}, 'is out of range', 'two special tokens and a word'),
    ({'job': 'eval'}, 'does not exist', 'choose one of train, prepare'),
    ({'seed': 'a b'}, "='a b' is not a whole number", 'write digits only'),
  ],
)
def test_a_refusal_names_the_flag_its_value_the_fact_and_then_the_cure(
  settings, fact, cure
):
  with pytest.raises(errors.BadInput) as raised:
    config.Config(**settings)
  found, *others = str(raised.value).split('; ')
  assert re.match('--[a-z_]+=', found)
  assert fact in found
  assert cure in others[0]
  assert len(others) == 1
  assert str(raised.value).endswith('.')


@pytest.mark.parametrize(
  ('names', 'unread', 'read'),
  [
    (
      'warmup_method warmup_steps max_refreshes',
      {'method': 'in_batch'},
      {'method': 'ance', 'warmup_steps': 3},
    ),
    ('max_refreshes', {'method': 'star'}, {'method': 'ance'}),
    ('restart_from', {'method': 'ance'}, {'method': 'ance_tele'}),
    ('teacher_temperature', {'method': 'ance'}, {'method': 'guided'}),
    ('negatives_per_source', {'method': 'ance'}, {'method': 'ance_given'}),
    ('negatives_per_source', {'method': 'in_batch'}, {'method': 'ance_tele'}),
    ('hardness_columns', {}, {'hardness_weight': 1.0}),
    ('simans_a simans_b', {'draw': 'top'}, {'draw': 'simans_abs'}),
    ('warmup_method', {'warmup_steps': 0}, {'warmup_steps': 1}),
    ('whole_chunks', {'chunks': 1}, {'chunks': 2}),
  ],
)
def test_a_flag_is_said_to_have_no_effect_only_where_it_has_none(
  names, unread, read, monkeypatch
):
  # Whatever must go with them.
  monkeypatch.setattr(config.Config, '__post_init__', lambda _: None)
  for name in names.split():
    assert config.why_unread(config.Config(**unread), name)
    assert config.why_unread(config.Config(**read), name) is None
