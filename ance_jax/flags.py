"""Converts settings to absl flags, and parses command lines and flagfiles."""

import dataclasses
import os
import re
import textwrap
from typing import Any

from absl import flags

from ance_jax import config as config_lib
from ance_jax import config_checks
from ance_jax import errors

# Bytes.
_MAX_FLAGFILE = 2**20
_FIELDS = {field.name: field for field in dataclasses.fields(config_lib.Config)}
_DEFINE = {
  str: flags.DEFINE_string,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  bool: flags.DEFINE_boolean,
}


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines one absl flag per field of `Config`."""
  for name, field in _FIELDS.items():
    default, text = field.default, field.metadata['help']
    if choices := config_checks.values_of(field):
      flags.DEFINE_enum(name, default, choices, text, flag_values)
    else:
      define = _DEFINE[config_checks.plain_type(field.type)]
      define(name, default, text, flag_values=flag_values)


def from_flags(
  flag_values: flags.FlagValues = flags.FLAGS,
) -> config_lib.Config:
  """Returns the settings that were parsed into `flag_values`."""
  return config_lib.Config(**{n: flag_values[n].value for n in _FIELDS})


def from_flagfile(
  path: str | os.PathLike, **overrides: Any
) -> config_lib.Config:
  """Returns the settings of a flagfile, with overrides.

  Args:
    path: Flagfile; paths of flagfiles that it includes are relative to the
      working directory.
    **overrides: Values of fields, which replace the flagfile's.

  Raises:
    BadInput: The file is missing or contains an invalid flag.
  """
  for name in overrides.keys() - _FIELDS:
    raise config_lib.unknown_flag(name)
  flag_values = flags.FlagValues()
  define_flags(flag_values)
  _parse_flagfile(str(path), flag_values)
  return dataclasses.replace(from_flags(flag_values), **overrides)


def parse(
  argv: list[str], flag_values: flags.FlagValues = flags.FLAGS
) -> list[str]:
  """Parses a command line and the flagfiles that it names, in order.

  Args:
    argv: Name of the program and its arguments.
    flag_values: Defined flags, whose values are set.

  Returns:
    The name of the program and the arguments that are not flags.

  Raises:
    BadInput: An argument or a line of a flagfile has an unknown flag or an
      invalid value.
  """
  program, *rest = argv
  given, left_over = [], []
  while rest:
    argument = rest.pop(0)
    name, _, path = argument.partition('=')
    if argument == '--':
      left_over, rest = rest, []
    elif name in ('--flagfile', '-flagfile'):
      _parse(given, flag_values, left_over)
      given = []
      path = path or (rest.pop(0) if rest else '')
      _parse_flagfile(os.path.expanduser(path), flag_values)
    else:
      given.append(argument)
  _parse(given, flag_values, left_over)
  return [program, *left_over]


def unread(config: config_lib.Config, arguments: list[str]) -> list[str]:
  """Returns a line for each flag of a command line that has no effect.

  Args:
    config: Settings of the job.
    arguments: Arguments of the command line. Flags in flagfiles are ignored
      because several jobs may share a flagfile.
  """
  return [
    f'--{name} has no effect {why}'
    for name in _names(arguments)
    if (why := config_lib.why_unread(config, name))
  ]


def _names(arguments):
  """Returns the distinct fields that arguments set, in order."""
  found = [re.match(r'--?(no)?(\w+)', argument) for argument in arguments]
  return [n for n in dict.fromkeys(m[2] for m in found if m) if n in _FIELDS]


def asks_for_help(arguments: list[str]) -> bool:
  """Returns whether a command line asks for `help_text`."""
  return bool({'--help', '-help', '-h', '-?', '--helpshort'} & {*arguments})


def help_text(arguments: list[str] = ()) -> str:
  """Returns the text of --help: all flags, or only those that --job reads."""
  job = next((a[6:] for a in arguments if a.startswith('--job=')), None)
  parts = [
    'python -m ance_jax.main --flagfile=FILE --FLAG=VALUE --noFLAG ...',
    '',
    *_filled(
      'Each flag has its default, and in parentheses the jobs that read it; '
      '--help --job=NAME lists those of one job, and --helpfull those of absl, '
      'too. --jax_NAME=VALUE sets an option of jax. Of a flag that is given '
      'twice the last value counts, flagfiles included.'
    ),
  ]
  for title, fields in _sections().items():
    read = [f for f in fields if job in config_lib.readers(f.name)]
    shown = read if job in config_lib.JOBS else fields
    parts += ['', f'{title}:'] if shown else []
    for field in shown:
      parts += ['', *_described(field)]
  return '\n'.join(parts)


def _sections():
  """Returns the fields of `Config` by section title."""
  sections, title = {}, ''
  for field in _FIELDS.values():
    title = field.metadata['section'] or title
    sections.setdefault(title, []).append(field)
  return sections


def _described(field):
  """Yields the help lines of a flag: its default, jobs and meaning."""
  default = '' if field.default is None else field.default
  readers = config_lib.readers(field.name)
  others = [job for job in config_lib.JOBS if job not in readers]
  jobs = readers if len(readers) <= len(others) else ['all', 'but', *others]
  read_by = ' '.join(jobs if others else ['all'])
  yield f'  --{field.name}={config_checks.as_text(default)}  ({read_by})'
  text, choices = field.metadata['help'], config_checks.values_of(field)
  if not all(f'{choice}: ' in text for choice in choices):
    text = f'{text} One of: {", ".join(choices)}.'
  yield from _filled(text, '      ')


def _filled(text, indent=''):
  return textwrap.wrap(
    text, 80, initial_indent=indent, subsequent_indent=indent,
    break_long_words=False, break_on_hyphens=False,
  )  # fmt: skip


def _parse(arguments, flag_values, left_over, place=''):
  """Sets `flag_values`; appends arguments that are not flags to `left_over`."""
  try:
    left_over += flag_values(['', *arguments])[1:]
  except flags.UnrecognizedFlagError as error:
    if _define_flags_of_jax(error.flagname, flag_values):
      return _parse(arguments, flag_values, left_over, place)
    raise config_lib.unknown_flag(error.flagname, place) from error
  # absl raises ValueError for --noname=value.
  except (flags.Error, ValueError) as error:
    raise _value_problem(str(error), place) from error


def _define_flags_of_jax(name, flag_values):
  """Defines jax's flags if `name` may be one; returns whether it is."""
  name = name.removeprefix('no').replace('-', '_')
  if flag_values is not flags.FLAGS or not name.startswith('jax_'):
    return False
  import jax  # Takes half a second, too long for --help.

  jax.config.config_with_absl()
  return name in flag_values


def _parse_flagfile(path, flag_values, above=(), place=''):
  """Sets `flag_values` from a flagfile with one flag per line.

  Args:
    path: Flagfile, relative to the working directory.
    flag_values: Defined flags.
    above: Real paths of the flagfiles that include this one.
    place: File and line that name this one, to start messages with.
  """
  lines = [line.lstrip().rstrip('\r') for line in _flagfile_lines(path, place)]
  above = (*above, os.path.realpath(path))
  if above[-1] in above[:-1]:
    raise errors.refusal(
      f'flagfile {path} names itself', 'leave that out', place
    )
  # Spaces at the end of a prompt count.
  lines = [
    line if line.partition('=')[0].endswith('_prompt') else line.rstrip()
    for line in lines
  ]
  if os.path.basename(path) == config_lib.FLAGS_FILE:
    # Flags of an older release must still repeat the run.
    lines = [line or '' for line in config_lib.of_a_run(lines)]
  for number, line in enumerate(lines, 1):
    place = f'{path}, line {number}: '
    name, _, other = line.partition('=')
    if name in ('--flagfile', '-flagfile'):
      _parse_flagfile(os.path.expanduser(other), flag_values, above, place)
    elif line and not line.startswith(('#', '//')):
      # absl would take two dashes for the end of the flags.
      left_over = ['--'] if line == '--' else []
      _parse([line], flag_values, left_over, place)
      config_lib.refuse_left_over(left_over, place)
      for name in _names([line]):
        config_checks.check(_FIELDS[name], flag_values[name].value, place)


def _flagfile_lines(path, place):
  if not os.path.isfile(path):
    raise errors.refusal(
      f'there is no flagfile {path!r}',
      'check the path, which is relative to the working directory',
      place,
    )
  try:
    with open(path, 'rb') as file:
      data = file.read(_MAX_FLAGFILE + 1)
  except OSError as error:
    raise errors.refusal(
      f'flagfile {path} cannot be read ({error.strerror})',
      'check its rights',
      place,
    ) from error
  if len(data) > _MAX_FLAGFILE or b'\0' in data:
    raise errors.refusal(
      f'{path}: is not a text of at most {_MAX_FLAGFILE:,} bytes, and begins '
      f'with {data[:20]!r}',
      'check the path',
    )
  try:
    text = data.decode()
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise errors.refusal(
      f'{data[error.start : error.start + 4]!r} is not UTF-8',
      'convert the file',
      f'{path}, line {line}: ',
    ) from error
  if text.startswith('\ufeff'):
    raise errors.refusal(
      'the file begins with a byte order mark',
      'save it as plain UTF-8',
      f'{path}, line 1: ',
    )
  return text.split('\n')


def _value_problem(message, place):
  """Returns our error for absl's message about the value of a flag."""
  found = re.match(r'flag --(\w+)=(.*?): ', message, re.DOTALL)
  if found and found[1] in _FIELDS:
    return config_checks.bad_value(_FIELDS[found[1]], found[2], place)
  text = ' '.join(message.split())[:200].rstrip('.')
  return errors.refusal(
    f'a flag has no value of its kind ({text})',
    'write --name=value, or --noname for false',
    place,
  )
