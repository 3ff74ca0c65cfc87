"""Trains, loads, saves and configures tokenizers.

The flavour of a tokenizer (lower case, leading space) is stored in its
tokenizer.json, so that training, encoding and search cannot differ in it.
"""

from collections.abc import Collection
import json
import os
import pathlib
from typing import Any

import tokenizers
import transformers

from ance_jax import errors
from ance_jax.core import strict_io
from ance_jax.data import vocabulary

Tokenizer = transformers.PreTrainedTokenizerFast

# Separates title and text, as in BEIR and sentence-transformers.
SPACE = ' '


def read_backend(path: str | os.PathLike) -> tokenizers.Tokenizer:
  """Loads a tokenizer.json."""
  return tokenizers.Tokenizer.from_file(str(path))


def train_vocabulary(texts: Collection[str], vocab_size: int) -> Tokenizer:
  """Returns a transformers tokenizer with a vocabulary trained on `texts`.

  Args:
    texts: As for `vocabulary.train`.
    vocab_size: Maximum number of entries, including special tokens.
  """
  tokenizer = vocabulary.train(texts, vocab_size)
  pad, unknown, cls, sep, mask = vocabulary.SPECIAL
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single=f'{cls} $A {sep}',
    pair=f'{cls} $A {sep} $B {sep}',
    special_tokens=[(t, tokenizer.token_to_id(t)) for t in (cls, sep)],
  )
  return Tokenizer(
    tokenizer_object=tokenizer,
    pad_token=pad,
    unk_token=unknown,
    cls_token=cls,
    sep_token=sep,
    mask_token=mask,
  )


def load(name: str) -> Tokenizer:
  """Loads the transformers tokenizer of a folder.

  Raises:
    BadInput: There is none, it needs code of its own, or it lacks a required
      feature.
  """
  _check_tokenizer_files(name)
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      name, trust_remote_code=False
    )
  except Exception as error:  # Its parsers raise errors of any type.
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip('.')
    raise errors.refusal(
      f'no tokenizer loads at {name} ({reason})', 'check the name'
    ) from error
  for is_wrong, fact, cure in _PROBLEMS:
    if is_wrong(tokenizer):
      raise errors.refusal(f'the tokenizer at {name} {fact}', cure)
  return _plain(tokenizer)


# What a tokenizer may lack, and the cure, in the order of the checks.
_PROBLEMS = (
  (
    lambda tokenizer: not tokenizer.is_fast,
    'is not a fast one (tokenizer.json)',
    'convert it with transformers',
  ),
  # Without any files, transformers returns an empty tokenizer.
  (
    lambda t: set(t.get_vocab()) <= set(t.all_special_tokens),
    'has no vocabulary but its special tokens',
    'add its tokenizer.json',
  ),
  (
    lambda tokenizer: tokenizer.pad_token_id is None,
    'has no padding token',
    'name it as pad_token in tokenizer_config.json',
  ),
  (
    lambda tokenizer: not backend(tokenizer).encode('').ids,
    'puts no special tokens around a text',
    'add its post_processor to tokenizer.json',
  ),
)


def save(
  tokenizer: Tokenizer,
  folder: pathlib.Path,
  *,
  max_length: int,
  token_types: bool,
) -> None:
  """Saves a tokenizer so that transformers 4.57 and 5 produce equal ids.

  `save_pretrained` of version 5 names a class that version 4 lacks, and omits
  the length for vocabularies trained here.

  Args:
    tokenizer: A fast tokenizer.
    folder: Folder to write into.
    max_length: Maximum length of the model's input, including special tokens.
    token_types: Whether the model takes token types; some models fail on them.
  """
  (folder / 'tokenizer.json').write_text(backend(tokenizer).to_str(pretty=True))
  types = ['token_type_ids'] if token_types else []
  settings = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_max_length': max_length,
    'model_input_names': ['input_ids', *types, 'attention_mask'],
    'clean_up_tokenization_spaces': False,
    **_special(tokenizer),
  }
  (folder / 'tokenizer_config.json').write_text(
    json.dumps(settings, indent=2, ensure_ascii=False) + '\n'
  )


def check_case(tokenizer: Tokenizer, name: str) -> None:
  """Raises `BadInput` if a tokenizer contradicts its files on lower-casing.

  transformers 2 lower-cased with ANCE's tokenizer, but transformers 5 does not,
  because its RoBERTa class ignores both `do_lower_case` and tokenizer.json.

  Args:
    tokenizer: Result of `load`.
    name: Folder it was loaded from.
  """
  said, does = _says_lower_case(name), _lower_cases(tokenizer)
  if said not in (None, does):
    facts = {True: 'lower-cases', False: 'keeps capitals'}
    raise errors.refusal(
      f'the tokenizer at {name} {facts[does]}, but its files say that it '
      f'{facts[said]}',
      'set --lower_case or --nolower_case, or correct tokenizer_config.json',
    )


def set_flavour(
  tokenizer: Tokenizer, *, lower_case: bool | None, prefix_space: bool | None
) -> None:
  """Sets how a tokenizer normalizes texts, inside its tokenizer.json.

  There the setting applies wherever text is tokenized, and is saved along.

  Args:
    tokenizer: A fast tokenizer.
    lower_case: Whether to lower-case texts and strip surrounding spaces; None
      leaves it unchanged.
    prefix_space: Whether to put a space before each text; None leaves it
      unchanged.

  Raises:
    BadInput: The tokenizer does not support the setting.
  """
  backend = tokenizer.backend_tokenizer
  if lower_case is False and _lower_cases(tokenizer):
    raise errors.refusal(
      '--lower_case=false is given with a tokenizer that lower-cases',
      'use a checkpoint that has capitals, or leave the flag out',
    )
  if lower_case:
    # As transformers 2 did for ANCE: lower() of one character at a time, and
    # all texts stripped, including those between special tokens.
    _lower_case(tokenizer, tokenizers.normalizers.Strip())
  if prefix_space is not None:
    if not isinstance(
      backend.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel
    ):
      raise errors.refusal(
        f'--prefix_space={str(prefix_space).lower()} is given with a tokenizer '
        'that is not byte-level',
        'leave it out',
      )
    backend.pre_tokenizer.add_prefix_space = prefix_space


def lower_case(tokenizer: Tokenizer) -> None:
  """Makes a tokenizer lower-case texts, without stripping them.

  Same as do_lower_case in sentence-transformers.
  """
  _lower_case(tokenizer)


def _lower_case(tokenizer, *before):
  """Lower-cases after some normalizers and before the tokenizer's own."""
  backend = tokenizer.backend_tokenizer
  if not _lower_cases(tokenizer):
    steps = [*before, tokenizers.normalizers.Lowercase()]
    if backend.normalizer is not None:
      steps.append(backend.normalizer)
    backend.normalizer = tokenizers.normalizers.Sequence(steps)


def prompt_tokens(tokenizer: Tokenizer, prompt: str, length: int) -> int:
  """Returns how many tokens at the start of a text belong to its prompt.

  As in sentence-transformers, the prompt is tokenized and truncated alone, and
  all its tokens count except the special token at the end.
  """
  if not prompt:
    return 0
  cut = backend(tokenizer)
  cut.enable_truncation(length)
  ids = cut.encode(prompt).ids
  cut.no_truncation()
  return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def flavour(tokenizer: Tokenizer) -> dict[str, Any]:
  """Returns how a tokenizer treats texts, {name: JSON value}."""
  backend = tokenizer.backend_tokenizer
  return {
    'kind': type(backend.model).__name__,
    'vocabulary': len(tokenizer),
    'lower_case': _lower_cases(tokenizer),
    'prefix_space': getattr(backend.pre_tokenizer, 'add_prefix_space', None),
  }


def title_separator(tokenizer: Tokenizer, name: str) -> str:
  """Returns the text that `--title_separator` names: 'space' or 'token'."""
  if name == 'space':
    return SPACE
  if tokenizer.sep_token is None:
    raise errors.refusal(
      '--title_separator=token is given with a tokenizer without a separator '
      'token',
      'set it to space',
    )
  return tokenizer.sep_token


def _check_tokenizer_files(folder):
  """Raises `BadInput` if JSON files of a local tokenizer are unusable."""
  for name in ('tokenizer_config.json', 'special_tokens_map.json'):
    path = pathlib.Path(folder) / name
    if os.path.lexists(path) and 'auto_map' in strict_io.json_file(path):
      raise strict_io.refusal(
        path,
        'the tokenizer needs code of its own (auto_map)',
        'use a model of a class that transformers has',
      )
  path = pathlib.Path(folder) / 'tokenizer.json'
  if os.path.lexists(path):
    strict_io.json_file(path)


def _plain(tokenizer):
  """Returns a tokenizer that depends only on its tokenizer.json.

  Classes such as RobertaTokenizer rebuild theirs from the vocabulary alone when
  loaded, which would silently drop anything added to it.
  """
  plain = Tokenizer(
    tokenizer_object=tokenizer.backend_tokenizer,
    model_max_length=tokenizer.model_max_length,
    **_special(tokenizer),
  )
  # Decides whether a model gets token types.
  plain.model_input_names = tokenizer.model_input_names
  return plain


def _special(tokenizer):
  """Returns {name: text} of a tokenizer's special tokens."""
  names = ('pad', 'unk', 'cls', 'sep', 'mask', 'bos', 'eos')
  tokens = {f'{n}_token': getattr(tokenizer, f'{n}_token') for n in names}
  return {name: token for name, token in tokens.items() if token is not None}


def _says_lower_case(name):
  """Returns whether the files say that a tokenizer lower-cases, or None."""
  settings = transformers.models.auto.tokenization_auto.get_tokenizer_config
  said = settings(name).get('do_lower_case')
  if isinstance(said, bool):
    return said
  path = pathlib.Path(name) / 'tokenizer.json'
  if not path.exists():
    return None
  normalizer = json.dumps(strict_io.json_file(path).get('normalizer'))
  return '"Lowercase"' in normalizer or '"lowercase": true' in normalizer


def _lower_cases(tokenizer):
  normalizer = tokenizer.backend_tokenizer.normalizer
  return normalizer is not None and normalizer.normalize_str('A') == 'a'


def backend(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
  """Returns the Rust tokenizer, without its files' truncation and padding."""
  backend = tokenizer.backend_tokenizer
  backend.no_truncation()
  backend.no_padding()
  return backend
