"""Tokenizers: trained, loaded, and their flavour set; and what they are given.

A flavour (lower case, a space in front) is a part of tokenizer.json, so that
training, encoding and search cannot differ in it.
"""

import json
import os
import pathlib

import tokenizers
import transformers

from ance_jax import errors
from ance_jax.core import strict_io
from ance_jax.data import vocabulary

Tokenizer = transformers.PreTrainedTokenizerFast

# Between title and text, as in BEIR and sentence-transformers.
SPACE = ' '


def read_backend(path):
  """Returns the `tokenizers.Tokenizer` of a tokenizer.json."""
  return tokenizers.Tokenizer.from_file(str(path))


def train_vocabulary(texts, vocab_size):
  """Returns a transformers tokenizer with a vocabulary trained on `texts`.

  Args:
    texts: As for `vocabulary.train`.
    vocab_size: Entries at most, special tokens included.
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


def load(name):
  """Returns the transformers tokenizer of a folder.

  Raises:
    BadInput: There is none, it needs code of its own, or it cannot do what
      is asked of one here.
  """
  _check_tokenizer_files(name)
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      name, trust_remote_code=False
    )
  except Exception as error:  # Its parsers raise any kind.
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip('.')
    raise errors.BadInput(
      f'a model must come with its tokenizer; found none that loads at {name} '
      f'({reason}); check the name.'
    ) from error
  if not tokenizer.is_fast:
    raise errors.BadInput(
      'a tokenizer must be a fast one (tokenizer.json); found '
      f'{type(tokenizer).__name__} at {name}; convert it with transformers.'
    )
  # Without any file transformers makes one of nothing.
  if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
    raise errors.BadInput(
      'a tokenizer must have a vocabulary; found none but its special tokens '
      f'at {name}; add its tokenizer.json.'
    )
  if tokenizer.pad_token_id is None:
    raise errors.BadInput(
      f'a tokenizer must have a padding token; found none at {name}; name it '
      'as pad_token in tokenizer_config.json.'
    )
  if not backend(tokenizer).encode('').ids:
    raise errors.BadInput(
      'a tokenizer must put special tokens around a text; found none around '
      f'an empty one at {name}; add its post_processor to tokenizer.json.'
    )
  return _plain(tokenizer)


def save(tokenizer, folder, *, max_length, token_types):
  """Writes a tokenizer as transformers 4.57 and 5 read it, with equal ids.

  `save_pretrained` of 5 names a class that 4 does not have, and no length for a
  vocabulary of our own.

  Args:
    tokenizer: A fast transformers tokenizer.
    folder: `pathlib.Path` of the folder.
    max_length: Tokens that the model takes, special tokens included.
    token_types: Whether the model takes token types; some stop if given any.
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
  text = json.dumps(settings, indent=2, ensure_ascii=False)
  (folder / 'tokenizer_config.json').write_text(text + '\n')


def check_case(tokenizer, name):
  """Raises `BadInput` if a tokenizer's files and its class differ on case.

  What ANCE's tokenizer lower-cased with transformers 2, that of transformers 5
  does not: the class of RoBERTa takes no notice of `do_lower_case`, nor of what
  tokenizer.json says.

  Args:
    tokenizer: What `load` gave.
    name: Folder that it is of.
  """
  said, does = _says_lower_case(name), _lower_cases(tokenizer)
  if said not in (None, does):
    cases, keeps = 'one that lower-cases', 'one that keeps capitals'
    raise errors.BadInput(
      'a tokenizer must lower-case if its files say so, and only then; found '
      f'{cases if does else keeps}, and files of {cases if said else keeps}, '
      f'at {name}; set --lower_case or --nolower_case, or mend '
      'tokenizer_config.json.'
    )


def set_flavour(tokenizer, *, lower_case, prefix_space):
  """Makes a tokenizer change texts first, as a part of its tokenizer.json.

  So it cannot be forgotten where a text is tokenized, and is saved with it.

  Args:
    tokenizer: A fast transformers tokenizer.
    lower_case: Whether texts are lower-cased, and spaces at their ends dropped;
      None: as it is.
    prefix_space: Whether a space is put before each text; None: as it is.

  Raises:
    BadInput: It cannot do what is asked for.
  """
  backend = tokenizer.backend_tokenizer
  if lower_case is False and _lower_cases(tokenizer):
    raise errors.BadInput(
      '--lower_case must be true, or left out, with a tokenizer that '
      'lower-cases; found it false; use a checkpoint that has capitals.'
    )
  if lower_case and not _lower_cases(tokenizer):
    # As transformers 2 did for ANCE, which had lower() of one letter at a time,
    # and stripped all texts: between special tokens, too.
    steps = [
      tokenizers.normalizers.Strip(),
      tokenizers.normalizers.Lowercase(),
    ]
    if backend.normalizer is not None:
      steps.append(backend.normalizer)
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
  if prefix_space is not None:
    if not isinstance(
      backend.pre_tokenizer, tokenizers.pre_tokenizers.ByteLevel
    ):
      raise errors.BadInput(
        '--prefix_space must be left out for a tokenizer that is not '
        f'byte-level; found it {str(prefix_space).lower()}; leave it out.'
      )
    backend.pre_tokenizer.add_prefix_space = prefix_space


def lower_case(tokenizer):
  """Makes a tokenizer lower-case texts first, and no more.

  As sentence-transformers' do_lower_case does, which leaves spaces at their
  ends.
  """
  backend = tokenizer.backend_tokenizer
  if not _lower_cases(tokenizer):
    steps = [tokenizers.normalizers.Lowercase()]
    if backend.normalizer is not None:
      steps.append(backend.normalizer)
    backend.normalizer = tokenizers.normalizers.Sequence(steps)


def prompt_tokens(tokenizer, prompt, length):
  """Returns how many tokens at the start of a text are those of its prompt.

  As sentence-transformers counts them: the prompt alone is tokenized, cut, and
  the special token at its end is not counted, those at its start are.
  """
  if not prompt:
    return 0
  cut = backend(tokenizer)
  cut.enable_truncation(length)
  ids = cut.encode(prompt).ids
  cut.no_truncation()
  return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def flavour(tokenizer):
  """Returns what a tokenizer does with a text, by name, as JSON can hold it."""
  pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
  return {
    'kind': type(tokenizer.backend_tokenizer.model).__name__,
    'vocabulary': len(tokenizer),
    'lower_case': _lower_cases(tokenizer),
    'prefix_space': getattr(pre_tokenizer, 'add_prefix_space', None),
  }


def title_separator(tokenizer, name):
  """Returns the text that `--title_separator` names: 'space' or 'token'."""
  if name == 'space':
    return SPACE
  if tokenizer.sep_token is None:
    raise errors.BadInput(
      '--title_separator must be space for a tokenizer without a separator '
      'token; found token; set it so.'
    )
  return tokenizer.sep_token


def _check_tokenizer_files(folder):
  """Raises `BadInput` if JSON files of a local tokenizer cannot be used."""
  for name in ('tokenizer_config.json', 'special_tokens_map.json'):
    path = pathlib.Path(folder) / name
    if os.path.lexists(path) and 'auto_map' in strict_io.json_file(path):
      raise strict_io.bad(
        path,
        'a tokenizer must need no code of its own',
        'auto_map',
        'use a model of a class that transformers has',
      )
  path = pathlib.Path(folder) / 'tokenizer.json'
  if os.path.lexists(path):
    strict_io.json_file(path)


def _plain(tokenizer):
  """Returns a tokenizer that is what its tokenizer.json says, and no more.

  Classes such as RobertaTokenizer make their own when they are read back, of
  the vocabulary alone: what was added to it would be lost without a word.
  """
  plain = Tokenizer(
    tokenizer_object=tokenizer.backend_tokenizer,
    model_max_length=tokenizer.model_max_length,
    **_special(tokenizer),
  )
  # Whether a model is given token types.
  plain.model_input_names = tokenizer.model_input_names
  return plain


def _special(tokenizer):
  """Returns {name: text} of the special tokens that a tokenizer has."""
  names = ('pad', 'unk', 'cls', 'sep', 'mask', 'bos', 'eos')
  tokens = {f'{n}_token': getattr(tokenizer, f'{n}_token') for n in names}
  return {name: token for name, token in tokens.items() if token is not None}


def _says_lower_case(name):
  """Returns whether a tokenizer lower-cases by its files; None: not said."""
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


def backend(tokenizer):
  """Returns the `tokenizers.Tokenizer`, without the limits some files bring."""
  backend = tokenizer.backend_tokenizer
  backend.no_truncation()
  backend.no_padding()
  return backend
