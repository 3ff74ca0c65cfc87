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
  return Refused(append(FILE, f'{text}\n'), says, FILE, 3)


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


WHOLE = 'is not a whole number; write digits'
DIGITS = '9' * 10_000
CASES = {
  # Not flags.
  'unknown flag': line('--no_such=1', 'no flag --no_such; see --help'),
  'flag misspelt': line('--batchsize=3', 'write --batch_size=value'),
  'flag with hyphens': line('--batch-size=3', 'write --batch_size=value'),
  'no dashes': line('seed=1', "'seed=1' is not a flag; write --name=value"),
  'en dash': line('–seed=1', "'–seed=1' is not a flag"),
  'em dash': line('—seed=1', 'is not a flag'),
  'space for =': line('--seed 1', 'no flag --seed 1; write --seed=value'),
  'spaces around =': line('--seed = 1', 'no flag --seed ; write --seed=value'),
  'value on the next line': line(
    '--seed\n1', 'write --name=value, or --noname'
  ),
  'two flags a line': line('--max_steps=1 --top_k=2', WHOLE),
  'shell line': line('python -m ance_jax.main \\', 'is not a flag'),
  'one dash': Accepted(append(FILE, '-seed=1\n')),
  'flag twice': Accepted(append(FILE, '--max_steps=1\n--max_steps=2\n')),
  'slashes as comment': Accepted(append(FILE, '// note\n\n  \n')),
  'Windows flagfile': Accepted(put(FILE, '# A run.\r\n--max_steps=5\r\n')),
  'no newline at the end': Accepted(put(FILE, '--max_steps=5')),
  'empty flagfile': Accepted(put(FILE, '')),
  # Values of the wrong type.
  'word for a number': line('--seed=one', f'--seed=one {WHOLE}'),
  'comment behind a number': line('--seed=1 # why', f"'1 # why' {WHOLE}"),
  'exponent in a whole number': line('--max_steps=1e6', f'1e6 {WHOLE}'),
  'thousands separator': line('--max_steps=1,000', f'1,000 {WHOLE}'),
  'fraction of a step': line('--max_steps=10.5', f'10.5 {WHOLE}'),
  'no number': line('--batch_size=', f'--batch_size= {WHOLE}'),
  'quoted number': line('--seed="1"', WHOLE),
  '10,000 digits': line(f'--seed={DIGITS}', WHOLE),
  'unit behind a number': line('--passage_length=512 tokens', WHOLE),
  'word for a fraction': line('--learning_rate=fast', 'is not a number'),
  'decimal comma': line('--learning_rate=0,1', '0,1 is not a number'),
  'percent': line('--dev_fraction=10%', '10% is not a number'),
  'neither true nor false': line(
    '--tie_encoders=perhaps', 'neither true nor false'
  ),
  'number for a bool': line('--tie_encoders=2', 'neither true nor false'),
  'no with a value': line('--notie_encoders=true', 'write --name=value'),
  'underscores in a number': Accepted(append(FILE, '--max_steps=1_000\n')),
  # Values out of range.
  'pieces of less': value(
    '--micro_batch_size=-1',
    '--micro_batch_size=-1 is out of range; set it to at least 0',
  ),
  'no batch': value('--batch_size=0', '--batch_size=0 is out of range'),
  'negative width': value('--hidden_size=-8', '-8 is out of range'),
  'no layers': value('--num_layers=0', '--num_layers=0 is out of range'),
  'no heads': value('--num_heads=0', '--num_heads=0 is out of range'),
  'no vocabulary': value('--vocab_size=0', '--vocab_size=0 is out of range'),
  'no negatives': value(
    '--num_hard_negatives=0', '=0 is out of range; set it to at least 1'
  ),
  'no passages mined': value('--top_k=-1', '--top_k=-1 is out of range'),
  'no slices': value(
    '--query_slices=0', '=0 is out of range; set it to at least 1'
  ),
  'no memory to search in': value(
    '--search_memory_mb=0', '=0 is out of range; set it to at least 1'
  ),
  'parameters of no index of FAISS': Refused(
    append(FILE, '--index=device\n--index_params=nprobe=1\n'),
    'nprobe=1 is for indexes of FAISS',
  ),
  'no block': value(
    '--rows_per_block=0', '=0 is out of range; set it to at least 1'
  ),
  'no refresh': value(
    '--steps_per_refresh=0', '=0 is out of range; set it to at least 1'
  ),
  'trigger that is no share': value(
    '--refresh_trigger=1.5',
    '1.5 is out of range; set it to a number from 0 to 1',
  ),
  'fewer processes than none': value('--num_processes=-1', 'at least 0'),
  'no checkpoint kept': value('--checkpoints_to_keep=0', 'at least 1'),
  'query of special tokens': value(
    '--query_length=2', 'at least 3: two special'
  ),
  'passage of one token': value(
    '--passage_length=1', 'at least 3: two special'
  ),
  'negative steps': value(
    '--max_steps=-1', '=-1 is out of range; set it to at least 0'
  ),
  'negative devices': value(
    '--num_devices=-1', '=-1 is out of range; set it to at least 0'
  ),
  'negative clipping': value(
    '--clip_norm=-0.5', '=-0.5 is out of range; set it to at least 0'
  ),
  'negative head': value(
    '--head_size=-1', '=-1 is out of range; set it to at least 0'
  ),
  'separator by its text': value(
    '--title_separator=[SEP]', "[SEP]' does not exist; choose one of space, tok"
  ),
  'cold softmax': value(
    '--temperature=0', '=0.0 is out of range; set it to a number above 0'
  ),
  'no learning': value(
    '--learning_rate=0', '=0.0 is out of range; set it to a number above 0'
  ),
  'learning rate NaN': value('--learning_rate=nan', '=nan is out of range'),
  'learning rate infinite': value('--learning_rate=inf', '=inf is infinite'),
  'number beyond floats': value('--weight_decay=1e999', '=inf is infinite'),
  'all dropped': value(
    '--dropout_rate=1', 'is out of range; set it to at least 0 and below 1'
  ),
  'dropout NaN': value(
    '--dropout_rate=nan', 'is out of range; set it to at least 0 and below 1'
  ),
  'all held out': value(
    '--dev_fraction=1.0', 'is out of range; set it to at least 0 and below 1'
  ),
  'percent held out': value(
    '--dev_fraction=10', 'is out of range; set it to at least 0 and below 1'
  ),
  'BM25 b': value(
    '--bm25_b=1.5', '1.5 is out of range; set it to a number from 0 to 1'
  ),
  'negative seed': value(
    '--seed=-1', 'is out of range; set it to at least 0 and below 2**31'
  ),
  'long seed': value(
    f'--seed={2**31}', 'is out of range; set it to at least 0 and below 2**31'
  ),
  'steps beyond int32': value(
    f'--max_steps={2**31}', 'is out of range; set it below 2**31'
  ),
  'steps beyond int64': value(
    f'--max_steps={10**30}', 'is out of range; set it below 2**31'
  ),
  # Values that are not among the choices.
  'method misspelt': line(
    '--method=anse', 'anse does not exist; choose one of random, in_batch'
  ),
  'similarity misspelt': line(
    '--similarity=cos', 'does not exist; choose one of dot, cosine'
  ),
  'another similarity': line(
    '--similarity=euclidean', 'does not exist; choose one of dot, cosine'
  ),
  'capital in a choice': line('--pooling=CLS', '--pooling=CLS does not exist'),
  'another pooling': line('--pooling=sum', 'choose one of cls, max, mean'),
  'half precision': line('--dtype=float16', 'choose one of float32, bfloat16'),
  'job misspelt': line(
    '--job=eval', 'eval does not exist; choose one of train, prepare'
  ),
  'dataset by its name': line(
    '--dataset=nq', 'choose one of pydocs, beir, pairs'
  ),
  'retriever in capitals': line(
    '--retriever=BM25', 'choose one of model, bm25'
  ),
  'warm-up that mines': line(
    '--warmup_method=ance', 'choose one of random, in_batch'
  ),
  'comment behind a choice': line(
    '--method=ance # paper', "'ance # paper' does not exist"
  ),
  # Names of splits.
  'split out of the folder': value(
    '--train_split=../train', 'is not a name of letters'
  ),
  'split below a folder': value(
    '--dev_split=qrels/dev', 'is not a name of letter'
  ),
  'absolute split': value('--split=/etc/passwd', 'without its folder'),
  'no split': value(
    '--split=', '= is not a name of letters, digits, _, - and .'
  ),
  'chosen on test': value('--dev_split=test', 'is a test split'),
  'chosen on TREC DL': value('--dev_split=dl19', 'is a test split'),
  'trained on test': value('--train_split=test', 'is a test split'),
  'dots as split': value('--train_split=..', '=.. is not a name'),
  'space in a split': value('--split=my test', "'my test' is not a name"),
  'long split': value(f'--split={"a" * 300}', 'is not a name of letters'),
  'pattern as split': value('--split=*', '=* is not a name'),
  # Paths.
  'tilde': value('--workdir=~/run', '=~/run has a ~ or $'),
  'variable': value('--data_dir=$DATA/nq', '=$DATA/nq has a ~ or $'),
  'tilde in a list': value('--runs=/tmp/a,~/b', 'has a ~ or $'),
  'quotes': value('--workdir="/tmp/run"', 'is in quotes'),
  'bucket': value('--workdir=gs://bucket/run', 'is an address, not a path'),
  'web page': value('--init_from=https://hf.co/bert', 'is an address'),
  'Windows path': value(
    '--data_dir=C:\\data\\nq', 'write it with / between its parts'
  ),
  'backslashes': value(
    '--data_dir=data\\nq', 'write it with / between its parts'
  ),
  'comment behind a path': value(
    '--workdir=/tmp/a # b', 'has a comment after it'
  ),
  'bell in a path': value(
    '--workdir=/tmp/\a', 'has line breaks or other control'
  ),
  'escape in a query': value(
    '--query=\x1b[2J', 'has line breaks or other control'
  ),
  'hash in a query': Accepted(append(FILE, '--query=what is # in C\n')),
  # Flagfiles.
  'no flagfile': Refused(lambda f: os.remove(f / FILE), 'there is no flagfile'),
  'folder as flagfile': Refused(folder_as(FILE), 'there is no flagfile'),
  'pipe as flagfile': Refused(pipe(FILE), 'there is no flagfile'),
  'device as flagfile': Refused(
    link(FILE, '/dev/zero'), 'there is no flagfile'
  ),
  'UTF-16 flagfile': Refused(
    put(FILE, '--seed=1\n'.encode('utf-16')), 'is not a text of at most', FILE
  ),
  'Latin-1 flagfile': Refused(
    append(FILE, '--query=caf\xe9\n'.encode('latin-1')), 'is not UTF-8', FILE, 3
  ),
  'flagfile with BOM': Refused(
    put(FILE, b'\xef\xbb\xbf--seed=1\n'), 'byte order mark', FILE, 1
  ),
  'NUL in a flagfile': Refused(
    append(FILE, '--query=\0'), 'not a text of', FILE
  ),
  'huge flagfile': Refused(
    put(FILE, '#\n' * 2**20), 'not a text of at most', FILE
  ),
  'a picture as flagfile': Refused(
    put(FILE, b'\x89PNG\r\n\x1a\n\0\0'), 'not a text of', FILE
  ),
  'flagfile names itself': Refused(_includes(FILE), 'names itself'),
  'flagfiles in a circle': Refused(
    _includes(FILE, 'a.flags', 'b.flags'), 'names itself'
  ),
  'flagfile names none': Refused(
    _names('none.flags'), 'relative to the working directory', FILE, 3
  ),
  'flagfile names a folder': Refused(
    _names('.'), 'there is no flagfile', FILE, 3
  ),
  'mistake in a flagfile below': Refused(
    lambda f: [put('a.flags', 'seed\n')(f), _names('a.flags')(f)][0],
    'is not a flag',
    'a.flags',
    1,
  ),
  # Settings of a notebook.
  'setting misspelt': given(
    'no flag --batchsize; write --batch_size', batchsize=3
  ),
  'text for a number': given(f'--seed=3 {WHOLE}', seed='3'),
  'bool for a number': given(f'--seed=true {WHOLE}', seed=True),
  'float for a whole number': given(f'64.0 {WHOLE}', batch_size=64.0),
  'text for a fraction': given('is not a number', learning_rate='1e-5'),
  'number as bool': given('neither true nor false', tie_encoders=1),
  'number for a path': given('=3 is not a text', workdir=3),
  'None for a path': given('=None is not a text', workdir=None),
  'newline in a query': given(
    'has line breaks or other control', query='a\n--seed=1'
  ),
  'half a surrogate pair': given(
    'has line breaks or other control', workdir='/tmp/\udcff'
  ),
  'list as method': given("--method=['ance'] is not a text", method=['ance']),
  'path object': Accepted(settings(workdir=pathlib.Path('/tmp/run'))),
  'whole number as fraction': Accepted(settings(temperature=1)),
}
