"""Flags: each has a reader and a meaning, and a file gives them all again."""

import dataclasses
import pathlib
import re

from absl import flags
import pytest

from ance_jax import config

REPOSITORY = pathlib.Path(__file__).parents[1]
FIELDS = dataclasses.fields(config.Config)


@pytest.mark.parametrize('name', [field.name for field in FIELDS])
def test_every_flag_is_read_somewhere(name):
  sources = [
    path.read_text()
    for path in (REPOSITORY / 'ance_jax').rglob('*.py')
    if path.name != 'config.py'
  ]
  # In weights.py settings are looked up by name.
  pattern = rf"(config|settings)\.{name}\b|'{name}': "
  assert any(re.search(pattern, text) for text in sources)


@pytest.mark.parametrize('field', FIELDS, ids=lambda field: field.name)
def test_every_flag_is_explained_in_a_sentence(field):
  text = field.metadata['help']
  assert len(text) > 20
  assert text.endswith('.')


def test_flags_give_the_defaults_and_what_was_set():
  flag_values = flags.FlagValues()
  config.define_flags(flag_values)
  flag_values(['main', '--seed=3', '--notie_encoders', '--index=SQ8'])
  found = config.Config.from_flags(flag_values)
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
  )
  path = tmp_path / 'run.flags'
  path.write_text(settings.to_flagfile())
  assert config.Config.from_flagfile(path) == settings
  changed = config.Config.from_flagfile(path, max_steps=6, workdir='w')
  assert changed == dataclasses.replace(settings, max_steps=6, workdir='w')


def test_a_flagfile_may_name_another_and_go_on_from_it(tmp_path):
  (tmp_path / 'base.flags').write_text('# Base.\n--seed=1\n--max_steps=5\n')
  (tmp_path / 'top.flags').write_text(
    f'# Top.\n--flagfile={tmp_path}/base.flags\n\n--max_steps=7\n'
  )
  found = config.Config.from_flagfile(tmp_path / 'top.flags')
  assert (found.seed, found.max_steps) == (1, 7)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('--no_such=1\n', 'no_such'),
    ('--seed=one\n', 'seed'),
    ('--method=anse\n', 'method'),
    ('seed=1\n', "found 'seed=1'"),
    ('--seed=1 # why\n', 'seed'),
    ('--tie_encoders=perhaps\n', 'tie_encoders'),
  ],
)
def test_a_line_that_is_no_flag_is_refused(text, expected, tmp_path):
  path = tmp_path / 'bad.flags'
  path.write_text(text)
  with pytest.raises(config.BadInput, match=expected):
    config.Config.from_flagfile(path)


def test_a_flagfile_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(config.BadInput, match='found none at'):
    config.Config.from_flagfile(tmp_path / 'none.flags')


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'method': 'anse'}, "--method must be one of random, .* found 'anse'"),
    ({'top_k': 0}, '--top_k must be at least 1; found 0'),
    ({'query_length': 0}, '--query_length must be at least 3'),
    ({'max_steps': -1}, '--max_steps must be at least 0; found -1'),
    ({'temperature': 0.0}, '--temperature must be above 0'),
    ({'seed': 2**31}, r'--seed must be at least 0 and below 2\*\*31'),
    ({'learning_rate': float('nan')}, '--learning_rate must be above 0'),
    ({'dropout_rate': 1.0}, '--dropout_rate must be at least 0 and below 1'),
  ],
)
def test_values_out_of_range_are_refused(changes, expected):
  with pytest.raises(config.BadInput, match=expected):
    config.Config(**changes)


def test_only_what_may_change_is_not_among_the_differences():
  first = config.Config()
  second = dataclasses.replace(first, max_steps=2, seed=1, job='evaluate')
  assert list(config.fixed_differences(first, second)) == [('seed', 0, 1)]
