"""Checks the values of `Config`: each by itself, and those that go together.

The fields and their meanings are in config.py; here are the values that they
may have, in tables.
"""

import dataclasses
import math
import re
import types
import typing
from typing import Any
import unicodedata

from ance_jax import errors
from ance_jax.training import methods

# Names of fields, test of valid values (never NaN), and its wording.
RANGES = (
  (
    'vocab_size num_layers hidden_size num_heads intermediate_size '
    'num_hard_negatives top_k steps_per_refresh query_slices chunks '
    'batch_size tokens_per_batch rows_per_block steps_per_eval '
    'steps_per_checkpoint checkpoints_to_keep steps_per_log num_results '
    'num_negatives max_rank search_memory_mb',
    lambda value: value >= 1,
    'at least 1',
  ),
  (
    'query_length passage_length',
    lambda value: value >= 3,
    'at least 3: two special tokens and a word',
  ),
  (
    'num_devices num_processes process_id warmup_steps max_refreshes '
    'refresh_delay refresh_devices max_staleness micro_batch_size max_steps '
    'warmup_until_plateau lr_warmup_steps rate_steps weight_decay clip_norm '
    'head_size bm25_k1 skip_ranks absolute_margin z_margin simans_a '
    'negatives_per_source topics hardness_weight',
    lambda value: value >= 0,
    'at least 0',
  ),
  (
    'temperature teacher_temperature learning_rate adam_epsilon',
    lambda value: value > 0,
    'a number above 0',
  ),
  (
    'dropout_rate attention_dropout_rate dev_fraction relative_margin',
    lambda value: 0 <= value < 1,
    'at least 0 and below 1',
  ),
  ('seed', lambda value: 0 <= value < 2**31, 'at least 0 and below 2**31'),
  (
    'bm25_b refresh_trigger also_weight',
    lambda value: 0 <= value <= 1,
    'a number from 0 to 1',
  ),
  ('port', lambda value: 0 <= value < 2**16, 'a port from 0 to 65,535'),
)
_RANGE_OF = {name: row for names, *row in RANGES for name in names.split()}
# Fields that are paths, or file names without extension.
_PATHS = (
  'workdir', 'compilation_cache_dir', 'data_dir', 'init_from', 'runs',
  'picture', 'negatives', 'bm25_run', 'tokens_dir', 'ranking',
  'cross_encoder', 'score_run', 'guide',
  'output', 'refresh_replay'
)  # fmt: skip
_SPLITS = ('train_split', 'dev_split', 'split')
# Splits on which nothing may be chosen.
TEST_SPLITS = ('test', 'dl19', 'dl20')
# Patterns that are errors in a path because no shell expands it, and the cure.
_NO_PATHS = (
  (r'\s#', 'has a comment after it', 'put it on a line of its own'),
  (r'://', 'is an address, not a path', 'download or mount the data'),
  (
    r'^[A-Za-z]:[\\/]|\\',
    'has a drive or a backslash',
    'write it with / between its parts',
  ),
  (r'^["\']|["\']$', 'is in quotes, which no shell removes', 'leave them out'),
  (r'^~|\$', 'has a ~ or $, which no shell expands', 'write the whole path'),
)
# No '..', no spaces, and no characters that a shell or a bucket rejects.
_REMOTE = re.compile(r'((gs|s3|az):/)?(/(?!\.\.?(/|$))[\w.=@+-]+)+/?')
_KINDS = {
  str: ('is not a text', 'quote it'),
  int: ('is not a whole number', 'write digits only, such as 1000000'),
  float: ('is not a number', 'write it such as 0.5 or 2e-5'),
  bool: ('is neither true nor false', 'set it to one of them'),
}
_BOOLS = {'true': True, 'false': False}
_OTHER_JOB = 'is for --job={} alone, and the job is {{c.job}}'
_OTHER_MODE = 'cannot be used with --refresh_mode={c.refresh_mode}'
_SEVERAL = 'with --num_processes={c.num_processes}'
_BESIDE = ('async', 'external')
_LEAVE, _LEAVE_OR = 'leave it out', 'leave it out, or change --refresh_mode'
# Rules between fields: the field to blame, a test whether a `Config` breaks the
# rule, fact and cure; {c.NAME} is the value of a field.
# fmt: off
_TOGETHER = (
  ('dry_run', lambda c: c.dry_run and c.job != 'train',
   _OTHER_JOB.format('train'), _LEAVE),
  ('beam_runner', lambda c: c.beam_runner and c.job != 'prepare',
   _OTHER_JOB.format('prepare'), _LEAVE),
  ('watch', lambda c: c.watch and c.job != 'refresh',
   _OTHER_JOB.format('refresh'), _LEAVE),
  ('download',
   lambda c: c.download and c.dataset == 'beir' and not c.beir_set,
   'does not know which set of BEIR to fetch',
   'name it, such as --beir_set=scifact'),
  ('index_params', lambda c: c.index_params and c.index == 'device',
   'is for indexes of FAISS, and --index is {c.index}', _LEAVE),
  # Refreshes.
  ('refresh_schedule',
   lambda c: c.refresh_schedule and not _spans(c.refresh_schedule),
   'does not cover the steps from 0 on without a gap, open at the end',
   'write it as FIRST-LAST:STEPS,...: 0-2000:500,2000-:5000'),
  ('max_staleness', lambda c: 0 < c.max_staleness < _longest_interval(c),
   'is less than the {longest} steps between refreshes',
   'raise it, as nothing newer comes while training waits'),
  ('warmup_until_plateau',
   lambda c: c.warmup_until_plateau and not (
     c.steps_per_eval and c.warmup_steps),
   'needs evaluations, and a latest end of the warm-up',
   'set --steps_per_eval and --warmup_steps'),
  ('refresh_trigger', lambda c: c.refresh_trigger and c.query_slices > 1,
   'needs all queries in each refresh, and --query_slices is {c.query_slices}',
   'change one of them'),
  ('refresh_trigger',
   lambda c: c.refresh_trigger and c.refresh_mode == 'delayed',
   _OTHER_MODE, _LEAVE_OR),
  ('warmup_until_plateau',
   lambda c: c.warmup_until_plateau and c.refresh_mode in _BESIDE,
   _OTHER_MODE, _LEAVE_OR),
  ('refresh_delay',
   lambda c: c.refresh_delay and c.refresh_mode != 'delayed',
   _OTHER_MODE, _LEAVE_OR),
  ('refresh_devices',
   lambda c: c.refresh_devices and c.refresh_mode != 'async',
   _OTHER_MODE, _LEAVE_OR),
  ('max_staleness',
   lambda c: c.max_staleness and c.refresh_mode not in _BESIDE,
   _OTHER_MODE, _LEAVE_OR),
  ('refresh_mode',
   lambda c: c.refresh_mode == 'delayed' and not c.refresh_delay,
   'does not say by how many steps', 'set --refresh_delay'),
  # Mining.
  ('min_score',
   lambda c: None not in (c.min_score, c.max_score)
   and c.min_score > c.max_score,
   'is above --max_score={c.max_score}', 'change one'),
  ('center_scores', lambda c: c.center_scores and c.relative_margin is None,
   'is given without --relative_margin, which it is for', 'give both'),
  ('score_run', lambda c: c.score_run and c.cross_encoder,
   'cannot be used with --cross_encoder={c.cross_encoder}',
   'leave one of them out'),
  *((name, lambda c, name=name: getattr(c, name) and
     c.rerank_max_score is None and not _is_taught(c)
     and not (name == 'score_run' and c.positive_min_score is not None),
     'is given without --rerank_max_score, which it is for, or a --method '
     'with a teacher', 'give both')
    for name in ('score_run', 'cross_encoder')),
  ('rerank_max_score',
   lambda c: c.rerank_max_score is not None
   and not (c.cross_encoder or c.score_run),
   'is given without scores', 'give --cross_encoder or --score_run'),
  # Rows.
  *((name, lambda c, wrong=wrong: _row(c).restarts and wrong(c),
     'cannot be used with --method={c.method}, which begins again at each '
     'refresh', _LEAVE)
    for name, wrong in (
      ('refresh_mode', lambda c: c.refresh_mode != 'sync'),
      ('refresh_trigger', lambda c: c.refresh_trigger),
      ('query_slices', lambda c: c.query_slices > 1),
    )),
  ('topics', lambda c: c.topics and _row(c).triplets,
   'cannot be used with --method={c.method}, which takes its triplets in order',
   _LEAVE),
  ('draw',
   lambda c: c.draw != 'uniform' and _row(c).triplets,
   'cannot be used with --method={c.method}, which takes its triplets in order',
   _LEAVE),
  ('draw',
   lambda c: c.draw.startswith('simans') and not _row(c).refreshes,
   'needs scores, and the negatives of --method={c.method} have none',
   'choose a row that mines from the index'),
  ('draw', lambda c: c.draw == 'bins' and _row(c).teacher != 'mined',
   'needs scores of a teacher, and --method={c.method} mines with none',
   'choose a row with a teacher, such as margin_mse'),
  ('chunks', lambda c: c.chunks > 1 and _row(c).searches,
   'cannot be used with --method={c.method}, which searches whole passages',
   'leave it out'),
  ('positive_min_score',
   lambda c: c.positive_min_score is not None and not c.score_run,
   'is given without scores', 'give --score_run'),
  ('positive_min_score',
   lambda c: c.positive_min_score is not None and _row(c).last_positive,
   'cannot be used with --method={c.method}, which has one positive a query',
   _LEAVE),
  ('trainable', lambda c: not _is_pattern(c.trainable),
   'is not a regular expression', 'correct it'),
  ('draw', lambda c: c.draw != 'uniform' and set(_row(c).sources) <= {
     'corpus', 'searched'},
   'cannot be used with --method={c.method}, which has no lists to draw from',
   _LEAVE),
  ('draw', lambda c: c.draw == 'top' and len(_row(c).sources) > 1,
   'cannot be used with --method={c.method}, which has no one order',
   'choose uniform or simans'),
  ('hardness_weight', lambda c: c.hardness_weight and _row(c).teacher,
   'cannot be used with --method={c.method}, which learns scores', _LEAVE),
  ('hardness_weight',
   lambda c: c.hardness_weight and c.hardness_columns == 'hard'
   and not _row(c).sources,
   'is for hard negatives, and --method={c.method} has none',
   'set --hardness_columns=all'),
  ('rate_steps', lambda c: 0 < c.rate_steps <= c.lr_warmup_steps,
   'is over before --lr_warmup_steps={c.lr_warmup_steps}', 'raise it'),
  ('also_weight', lambda c: c.also_weight and not _row(c).also,
   'is the share of a second loss, and --method={c.method} has one alone',
   'leave it out, or choose distill'),
  ('method',
   lambda c: c.job in ('train', 'refresh') and _row(c).teacher == 'mined'
   and 'given' not in _row(c).sources and not (c.cross_encoder or c.score_run),
   'needs a teacher',
   'set --cross_encoder, or --score_run to a run file of its scores'),
  ('method',
   lambda c: c.job == 'train' and _row(c).teacher == 'guide' and not c.guide,
   'needs a guide', 'set --guide to a bi-encoder'),
  ('symmetric_columns',
   lambda c: c.symmetric_columns and not _row(c).in_batch,
   'needs in-batch negatives, and --method={c.method} has none',
   'choose a row that has, such as in_batch'),
  ('symmetric_columns',
   lambda c: c.symmetric_columns and (_row(c).teacher or c.chunks > 1),
   'cannot be used with a teacher, who does not score them, or --chunks',
   _LEAVE),
  ('symmetric_columns',
   lambda c: c.symmetric_columns and c.guide_margin is not None,
   'cannot be used with --guide_margin, whose guide does not score them',
   'leave one of them out'),
  ('matryoshka_widths',
   lambda c: c.matryoshka_widths and not numbers(c.matryoshka_widths),
   'is not a list of widths', 'write them as 64,128,256'),
  *((name, lambda c, name=name: getattr(c, name) and _row(c).searches,
     'cannot be used with --method={c.method}, which searches in the step',
     _LEAVE)
    for name in ('matryoshka_widths', 'hardness_weight', 'symmetric_columns',
                 'mask_above')),
  ('guide_margin', lambda c: c.guide_margin is not None and not c.guide,
   'needs a guide', 'set --guide to a bi-encoder'),
  ('guide', lambda c: c.guide and _row(c).searches,
   'cannot be used with --method={c.method}, which searches in the step',
   _LEAVE),
  ('guide', lambda c: c.guide and c.guide_margin is None
   and _row(c).teacher != 'guide',
   'is given without --guide_margin, which it is for, or --method=guided or '
   'ance_guided', 'give both'),
  ('guide', lambda c: c.guide == methods.OWN_GUIDE and not _row(c).refreshes,
   "is of a run's refreshes, and --method={c.method} has none",
   'name a folder, or choose a row that has, such as ance_guided'),
  ('guide', lambda c: c.guide == methods.OWN_GUIDE
   and (c.chunks > 1 or c.refresh_replay or c.refresh_mode == 'external'),
   'cannot be used with --chunks, --refresh_replay or --refresh_mode=external',
   'name a folder'),
  # Processes.
  ('num_processes', lambda c: c.num_processes != 1 and c.job != 'train',
   _OTHER_JOB.format('train'), _LEAVE),
  ('remote_dir', lambda c: c.remote_dir and c.num_processes != 1,
   f'cannot be used {_SEVERAL}, which share --workdir', _LEAVE),
  ('process_id', lambda c: c.process_id and c.num_processes <= 1,
   f'is not a process {_SEVERAL}', _LEAVE),
  ('process_id', lambda c: c.process_id >= c.num_processes > 1,
   f'is not a process {_SEVERAL}', 'number them from 0 to {last_process}'),
  ('coordinator', lambda c: c.num_processes > 1 and not c.coordinator,
   f'is missing {_SEVERAL}', 'set it to HOST:PORT of process 0'),
  ('coordinator', lambda c: c.coordinator and c.num_processes <= 1,
   f'is not needed {_SEVERAL}', _LEAVE),
  ('refresh_mode',
   lambda c: c.num_processes != 1 and c.refresh_mode == 'async',
   f'cannot be used {_SEVERAL}', 'choose sync, delayed or external'),
)
# fmt: on


def _is_pattern(text):
  try:
    return re.compile(text) is not None
  except re.error:
    return False


def numbers(text: str) -> tuple[int, ...]:
  """Returns the whole numbers above 0 in '64,128', () for another form."""
  found = [re.fullmatch('[1-9][0-9]{0,6}', part) for part in text.split(',')]
  return tuple(int(one[0]) for one in found) if all(found) else ()


def _is_taught(config):
  """Returns whether the job mines for a row with a teacher."""
  return config.job != 'mine' and _row(config).teacher == 'mined'


def _row(config):
  return methods.METHODS[config.method]


def plain_type(annotation: Any) -> type:
  """Returns `int` for `int` and for `int | None`."""
  if isinstance(annotation, types.UnionType):
    return typing.get_args(annotation)[0]
  return annotation


def values_of(field: dataclasses.Field) -> tuple[str, ...]:
  """Returns the allowed values of a field, () for any value of its type."""
  found = field.metadata['choices']
  return tuple(found() if callable(found) else found or ())


def as_text(value: Any) -> str:
  """Returns a value as it is written on a command line."""
  return str(value).lower() if isinstance(value, bool) else str(value)


def check(field: dataclasses.Field, value: Any, place: str = '') -> None:
  """Raises `BadInput` for a value that a field may never have.

  Args:
    field: Field of `Config`.
    value: Value to check.
    place: File and line of the value, to start the message with.
  """
  if value is None and field.default is None:
    return
  for find in (_wrong_type, _wrong_choice, _wrong_number, _wrong_text):
    if problem := find(field, value):
      raise _bad(field.name, value, *problem, place)


def check_together(config: Any) -> None:
  """Raises `BadInput` for fields of a `Config` that contradict each other."""
  for name, is_wrong, fact, cure in _TOGETHER:
    if is_wrong(config):
      values = {
        'c': config,
        'longest': _longest_interval(config),
        'last_process': config.num_processes - 1,
      }
      raise _bad(
        name,
        getattr(config, name),
        fact.format(**values),
        cure.format(**values),
      )


def parse(field: dataclasses.Field, text: str, place: str) -> Any:
  """Parses a value as `Config.to_flagfile` writes it."""
  plain = plain_type(field.type)
  try:
    return _BOOLS[text] if plain is bool else plain(text)
  except (KeyError, ValueError) as error:
    raise bad_value(field, text, place) from error


def bad_value(
  field: dataclasses.Field, text: str, place: str = ''
) -> errors.BadInput:
  """Returns the error for a text that is not a value of a flag."""
  problem = _wrong_choice(field, text) or _KINDS[plain_type(field.type)]
  return _bad(field.name, text, *problem, place)


def intervals(text: str) -> tuple[tuple[int, int], ...]:
  """Parses `--refresh_schedule` into (first step, steps between) pairs.

  Args:
    text: Schedule such as '0-2000:500,2000-:5000'.

  Raises:
    ValueError: The text has another form or leaves out steps.
  """
  parts = [part.split(':') for part in text.split(',')]
  spans = [span.split('-') for span, _ in parts]
  every = [int(steps) for _, steps in parts]
  starts = [int(first) for first, _ in spans]
  ends = [int(last) for _, last in spans[:-1]]
  if (
    starts != [0, *ends]
    or spans[-1][1]
    or starts != sorted(set(starts))
    or min(every) < 1
  ):
    raise ValueError(text)
  return tuple(zip(starts, every, strict=True))


def _spans(schedule):
  """Returns the intervals of a schedule, () for one that has another form."""
  try:
    return intervals(schedule)
  except ValueError:
    return ()


def _longest_interval(config):
  """Returns the most steps between two refreshes."""
  return max(
    (every for _, every in _spans(config.refresh_schedule)),
    default=config.steps_per_refresh,
  )


def _wrong_type(field, value):
  plain = plain_type(field.type)
  fits = {
    str: isinstance(value, str),
    bool: isinstance(value, bool),
    int: isinstance(value, int) and not isinstance(value, bool),
    float: isinstance(value, (int, float)) and not isinstance(value, bool),
  }
  return None if fits[plain] else _KINDS[plain]


def _wrong_choice(field, value):
  choices = values_of(field)
  if choices and value not in choices:
    return 'does not exist', f'choose one of {", ".join(choices)}'
  return None


def _wrong_number(field, value):
  if isinstance(value, str):
    return None
  allowed, rule = _RANGE_OF.get(field.name, (lambda _: True, ''))
  if not allowed(value):
    return 'is out of range', f'set it to {rule}'
  if isinstance(value, float) and math.isinf(value):
    return 'is infinite', 'set it to a finite number'
  if not -(2**31) <= value < 2**31 and isinstance(value, int):
    return 'is out of range', 'set it below 2**31'
  return None


def _wrong_text(field, value):
  if not isinstance(value, str):
    return None
  # Control characters, and surrogates that encode bytes other than UTF-8.
  if any(unicodedata.category(c) in ('Cc', 'Cs') for c in value):
    return 'has line breaks or other control characters', 'leave them out'
  if field.name in _SPLITS:
    return _wrong_split(field.name, value)
  if field.name == 'remote_dir' and value and not _REMOTE.fullmatch(value):
    return (
      'is not a folder that can be copied to',
      'write gs://BUCKET/FOLDER, s3://, az:// or a path from / on',
    )
  paths = value.split(',') if field.name == 'runs' else [value]
  for pattern, *problem in _NO_PATHS if field.name in _PATHS else ():
    if any(re.search(pattern, path) for path in paths):
      return problem
  return None


def _wrong_split(name, value):
  if not re.fullmatch(r'\w[\w.-]{0,99}', value):
    return (
      'is not a name of letters, digits, _, - and .',
      'name a file of qrels/, without its folder and its ending',
    )
  if name in ('train_split', 'dev_split') and value in TEST_SPLITS:
    return (
      'is a test split, on which nothing may be chosen',
      'name another; without a dev split in the data, a share of train is held '
      'out',
    )
  return None


def _bad(name, value, fact, cure, place=''):
  """Returns the error for an invalid value of a flag."""
  shown = as_text(value)
  if isinstance(value, str) and not re.fullmatch(r'[\w./:,+@%=~$*-]*', value):
    shown = repr(value)
  shown = shown if len(shown) <= 100 else f'{shown[:100]}...'
  return errors.refusal(f'--{name}={shown} {fact}', cure, place)
