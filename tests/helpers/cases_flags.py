"""Flags and flagfiles with mistakes that users make."""

import os
import pathlib

from bad_input_tools import Accepted
from bad_input_tools import Refused
from bad_input_tools import append
from bad_input_tools import folder_as
from bad_input_tools import link
from bad_input_tools import pipe
from bad_input_tools import put
from bad_input_tools import settings

from ance_jax import flags

FILE = 'run.flags'


def make_sound(folder, _):
  """Writes a flagfile of two lines."""
  (folder / FILE).write_text('# A run.\n--max_steps=5\n')


def use(folder, changes):
  """Reads the flagfile, overridden by the changed settings."""
  flags.from_flagfile(folder / FILE, **(changes or {}))


def line(text, says):
  """Returns the case of a bad third line."""
  return Refused(append(FILE, f'{text}\n'), says, FILE, 3)


def value(text, says):
  """Returns the case of a well-formed value that is out of range."""
  return Refused(append(FILE, f'{text}\n'), says)


def given(says, **changes):
  """Returns the case of bad settings from a notebook."""
  return Refused(settings(**changes), says)


def _includes(*names):
  def make(folder):
    for name, other in zip(names, (*names[1:], FILE), strict=True):
      with open(folder / name, 'a') as file:
        file.write(f'--flagfile={folder / other}\n')

  return make


def _names(other):
  def make(folder):
    append(FILE, f'--flagfile={folder / other}\n')(folder)

  return make


WHOLE = 'must be a whole number; found '
DIGITS = '9' * 10_000
CASES = {
  # Not flags.
  'unknown flag': line('--no_such=1', 'found --no_such; see --help'),
  'flag misspelt': line('--batchsize=3', 'write --batch_size=value'),
  'flag with hyphens': line('--batch-size=3', 'write --batch_size=value'),
  'no dashes': line('seed=1', "found 'seed=1'"),
  'en dash': line('–seed=1', "found '–seed=1'"),
  'em dash': line('—seed=1', 'must be a flag, --name=value'),
  'space for =': line('--seed 1', 'found --seed 1; write --seed=value'),
  'spaces around =': line('--seed = 1', 'found --seed ; write --seed=value'),
  'value on the next line': line(
    '--seed\n1', 'must have the form --name=value'
  ),
  'two flags a line': line('--max_steps=1 --top_k=2', WHOLE),
  'shell line': line('python -m ance_jax.main \\', 'must be a flag'),
  'one dash': Accepted(append(FILE, '-seed=1\n')),
  'flag twice': Accepted(append(FILE, '--max_steps=1\n--max_steps=2\n')),
  'slashes as comment': Accepted(append(FILE, '// note\n\n  \n')),
  'Windows flagfile': Accepted(put(FILE, '# A run.\r\n--max_steps=5\r\n')),
  'no newline at the end': Accepted(put(FILE, '--max_steps=5')),
  'empty flagfile': Accepted(put(FILE, '')),
  # Values of the wrong type.
  'word for a number': line('--seed=one', f"--seed {WHOLE}'one'"),
  'comment behind a number': line('--seed=1 # why', f"{WHOLE}'1 # why'"),
  'exponent in a whole number': line('--max_steps=1e6', f"{WHOLE}'1e6'"),
  'thousands separator': line('--max_steps=1,000', f"{WHOLE}'1,000'"),
  'fraction of a step': line('--max_steps=10.5', f"{WHOLE}'10.5'"),
  'no number': line('--batch_size=', f"{WHOLE}''"),
  'quoted number': line('--seed="1"', WHOLE),
  '10,000 digits': line(f'--seed={DIGITS}', WHOLE),
  'unit behind a number': line('--passage_length=512 tokens', WHOLE),
  'word for a fraction': line('--learning_rate=fast', 'must be a number'),
  'decimal comma': line('--learning_rate=0,1', "a number; found '0,1'"),
  'percent': line('--dev_fraction=10%', "a number; found '10%'"),
  'neither true nor false': line('--tie_encoders=perhaps', 'true or false'),
  'number for a bool': line('--tie_encoders=2', 'true or false'),
  'no with a value': line('--notie_encoders=true', 'have the form'),
  'underscores in a number': Accepted(append(FILE, '--max_steps=1_000\n')),
  # Values out of range.
  'pieces of less': value(
    '--micro_batch_size=-1', '--micro_batch_size must be at least 0'
  ),
  'no batch': value('--batch_size=0', '--batch_size must be at least 1'),
  'negative width': value('--hidden_size=-8', 'at least 1; found -8'),
  'no layers': value('--num_layers=0', '--num_layers must be at least 1'),
  'no heads': value('--num_heads=0', '--num_heads must be at least 1'),
  'no vocabulary': value('--vocab_size=0', '--vocab_size must be at least 1'),
  'no negatives': value('--hard_negatives=0', 'at least 1; found 0'),
  'no passages mined': value('--top_k=-1', '--top_k must be at least 1'),
  'no slices': value('--query_slices=0', 'at least 1; found 0'),
  'no memory to search in': value(
    '--search_memory_mb=0', 'at least 1; found 0'
  ),
  'parameters of no index of FAISS': value(
    '--index=device\n--index_params=nprobe=1', 'with an index of FAISS; found'
  ),
  'no block': value('--rows_per_block=0', 'at least 1; found 0'),
  'no refresh': value('--steps_per_refresh=0', 'at least 1; found 0'),
  'trigger that is no share': value(
    '--refresh_trigger=1.5', 'from 0 to 1; found 1.5'
  ),
  'fewer processes than none': value('--num_processes=-1', 'at least 0'),
  'no checkpoint kept': value('--checkpoints_to_keep=0', 'at least 1'),
  'query of special tokens': value('--query_length=2', 'at least 3, for two'),
  'passage of one token': value('--passage_length=1', 'at least 3, for two'),
  'negative steps': value('--max_steps=-1', 'at least 0; found -1'),
  'negative devices': value('--num_devices=-1', 'at least 0; found -1'),
  'negative clipping': value('--clip_norm=-0.5', 'at least 0; found -0.5'),
  'negative head': value('--head_size=-1', 'at least 0; found -1'),
  'separator by its text': value(
    '--title_separator=[SEP]', 'one of space, tok'
  ),
  'cold softmax': value('--temperature=0', 'above 0; found 0.0'),
  'no learning': value('--learning_rate=0', 'above 0; found 0.0'),
  'learning rate NaN': value('--learning_rate=nan', 'above 0; found nan'),
  'learning rate infinite': value('--learning_rate=inf', 'be finite'),
  'number beyond floats': value('--weight_decay=1e999', 'be finite; found inf'),
  'all dropped': value('--dropout_rate=1', 'at least 0 and below 1'),
  'dropout NaN': value('--dropout_rate=nan', 'at least 0 and below 1'),
  'all held out': value('--dev_fraction=1.0', 'at least 0 and below 1'),
  'percent held out': value('--dev_fraction=10', 'at least 0 and below 1'),
  'BM25 b': value('--bm25_b=1.5', 'from 0 to 1; found 1.5'),
  'negative seed': value('--seed=-1', 'at least 0 and below 2**31'),
  'long seed': value(f'--seed={2**31}', 'at least 0 and below 2**31'),
  'steps beyond int32': value(f'--max_steps={2**31}', 'be below 2**31'),
  'steps beyond int64': value(f'--max_steps={10**30}', 'be below 2**31'),
  # Values that are not among the choices.
  'method misspelt': line(
    '--method=anse', 'ance_code_qa, ance_in_batch, given, given_in_batch; '
  ),
  'similarity misspelt': line('--similarity=cos', 'one of dot, cosine'),
  'another similarity': line('--similarity=euclidean', 'one of dot, cosine'),
  'capital in a choice': line('--pooling=CLS', "lasttoken; found 'CLS'"),
  'another pooling': line('--pooling=sum', 'one of cls, max, mean'),
  'half precision': line('--dtype=float16', 'one of float32, bfloat16'),
  'job misspelt': line('--job=eval', 'must be one of train, prepare'),
  'dataset by its name': line('--dataset=nq', 'one of pydocs, beir, pairs'),
  'retriever in capitals': line('--retriever=BM25', 'one of model, bm25'),
  'warm-up that mines': line('--warmup_method=ance', 'one of random, in_batch'),
  'comment behind a choice': line('--method=ance # paper', "'ance # paper'"),
  # Names of splits.
  'split out of the folder': value('--train_split=../train', 'be a name of'),
  'split below a folder': value('--dev_split=qrels/dev', 'be a name of letter'),
  'absolute split': value('--split=/etc/passwd', 'without its folder'),
  'no split': value('--split=', 'be a name of letters, digits, _, - and .'),
  'chosen on test': value('--dev_split=test', 'not be a test split'),
  'chosen on TREC DL': value('--dev_split=dl19', 'not be a test split'),
  'trained on test': value('--train_split=test', 'not be a test split'),
  'dots as split': value('--train_split=..', "found '..'"),
  'space in a split': value('--split=my test', "found 'my test'"),
  'long split': value(f'--split={"a" * 300}', 'be a name of letters'),
  'pattern as split': value('--split=*', "found '*'"),
  # Paths.
  'tilde': value('--workdir=~/run', "without ~ and $; found '~/run'"),
  'variable': value('--data_dir=$DATA/nq', "without ~ and $; found '$DATA/nq'"),
  'tilde in a list': value('--runs=/tmp/a,~/b', 'without ~ and $'),
  'quotes': value('--workdir="/tmp/run"', 'be without quotes'),
  'bucket': value('--workdir=gs://bucket/run', 'be a path, not an address'),
  'web page': value('--init_from=https://hf.co/bert', 'not an address'),
  'Windows path': value('--data_dir=C:\\data\\nq', 'have / between its parts'),
  'backslashes': value('--data_dir=data\\nq', 'have / between its parts'),
  'comment behind a path': value('--workdir=/tmp/a # b', 'without a comment'),
  'bell in a path': value('--workdir=/tmp/\a', 'be one line of text'),
  'escape in a query': value('--query=\x1b[2J', 'be one line of text'),
  'hash in a query': Accepted(append(FILE, '--query=what is # in C\n')),
  # Flagfiles.
  'no flagfile': Refused(lambda f: os.remove(f / FILE), 'found none at'),
  'folder as flagfile': Refused(folder_as(FILE), 'a flagfile must exist'),
  'pipe as flagfile': Refused(pipe(FILE), 'a flagfile must exist'),
  'device as flagfile': Refused(link(FILE, '/dev/zero'), 'must exist'),
  'UTF-16 flagfile': Refused(
    put(FILE, '--seed=1\n'.encode('utf-16')), 'must be a text of at most', FILE
  ),
  'Latin-1 flagfile': Refused(
    append(FILE, '--query=caf\xe9\n'.encode('latin-1')), 'be UTF-8', FILE, 3
  ),
  'flagfile with BOM': Refused(
    put(FILE, b'\xef\xbb\xbf--seed=1\n'), 'no byte order mark', FILE, 1
  ),
  'NUL in a flagfile': Refused(append(FILE, '--query=\0'), 'a text of', FILE),
  'huge flagfile': Refused(put(FILE, '#\n' * 2**20), 'a text of at most', FILE),
  'a picture as flagfile': Refused(
    put(FILE, b'\x89PNG\r\n\x1a\n\0\0'), 'must be a text', FILE
  ),
  'flagfile names itself': Refused(_includes(FILE), 'must not lead to itself'),
  'flagfiles in a circle': Refused(
    _includes(FILE, 'a.flags', 'b.flags'), 'must not lead to itself'
  ),
  'flagfile names none': Refused(
    _names('none.flags'), 'must exist, from the working directory', FILE, 3
  ),
  'flagfile names a folder': Refused(_names('.'), 'must exist', FILE, 3),
  'mistake in a flagfile below': Refused(
    lambda f: [put('a.flags', 'seed\n')(f), _names('a.flags')(f)][0],
    'must be a flag',
    'a.flags',
    1,
  ),
  # Settings of a notebook.
  'setting misspelt': given(
    'found --batchsize; write --batch_size', batchsize=3
  ),
  'text for a number': given(f"{WHOLE}'3'", seed='3'),
  'bool for a number': given(f'{WHOLE}True', seed=True),
  'float for a whole number': given(f'{WHOLE}64.0', batch_size=64.0),
  'text for a fraction': given('must be a number', learning_rate='1e-5'),
  'number as bool': given('must be true or false', tie_encoders=1),
  'number for a path': given('must be a text; found 3', workdir=3),
  'None for a path': given('must be a text; found None', workdir=None),
  'newline in a query': given('be one line of text', query='a\n--seed=1'),
  'half a surrogate pair': given('be one line of text', workdir='/tmp/\udcff'),
  'list as method': given('must be a text', method=['ance']),
  'path object': Accepted(settings(workdir=pathlib.Path('/tmp/run'))),
  'whole number as fraction': Accepted(settings(temperature=1)),
}
