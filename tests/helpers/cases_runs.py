"""Run directories that were edited, truncated, mixed up or made elsewhere."""

import json
import os
import shutil

from bad_input_tools import Accepted
from bad_input_tools import Refused
from bad_input_tools import append
from bad_input_tools import change_json
from bad_input_tools import edit
from bad_input_tools import pipe
from bad_input_tools import put
from bad_input_tools import remove
from bad_input_tools import settings
from bad_input_tools import together
import cases_beir
import numpy as np

from ance_jax import config as config_lib
from ance_jax import flags as flags_lib
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.jobs import compare
from ance_jax.jobs import encode
from ance_jax.jobs import evaluate
from ance_jax.jobs import export
from ance_jax.jobs import report
from ance_jax.jobs import train
from ance_jax.training import checks
from ance_jax.training import experiment
from ance_jax.training import negatives

METRICS, STEP = 'run/metrics.jsonl', 'run/checkpoints/2'
RECORD = f'{STEP}/record'
FLAGS, DATA = f'{RECORD}/run.flags', f'{RECORD}/data.json'
RETRIEVER = f'{RECORD}/model/retriever.json'
DEV = {
  'dev/mrr@10': 0.5, 'dev/ndcg@10': 0.5, 'dev/recall@20': 1, 'dev/recall@100': 1
}  # fmt: skip


def make_sound(folder, sound):
  """Copies the start of a run on the sound data, made on the first call."""
  if not os.listdir(sound):
    (sound / 'data').mkdir()
    (sound / 'run').mkdir()
    cases_beir.make_sound(sound / 'data', None)
    config = config_lib.Config(
      workdir=str(sound / 'run'),
      data_dir=str(sound / 'data'),
      dataset='beir',
      num_layers=1,
      hidden_size=8,
      num_heads=2,
      intermediate_size=8,
      vocab_size=60,
      query_length=8,
      passage_length=8,
      top_k=2,
    )
    record = experiment.record(experiment.create(config, ('train', 'dev'))[0])
    lines = [{'step': 0, 'train/loss': 2.5}, {'step': 2, **DEV}]
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    put(METRICS, text)(sound)
    for name, content in record.items():
      atomic.make_folder((sound / RECORD / name).parent)
      put(f'{RECORD}/{name}', content)(sound)
    atomic.commit(sound / STEP, {'format': checkpoint.FORMAT})
    put('sound.flags', record['run.flags'])(sound)
  shutil.copytree(sound, folder, dirs_exist_ok=True)


def use(folder, changes):
  """Calls the job, or part of a job, that the setting `call` names."""
  changes = {
    'workdir': str(folder / 'run'),
    'data_dir': str(folder / 'data'),
    'picture': str(folder / 'curves.png'),
    **(changes or {}),
  }
  call = changes.pop('call', 'report')
  path = folder / 'sound.flags'
  CALLS[call](flags_lib.from_flagfile(path, **changes))


def _go_on(config):
  return experiment.restore(config, ('train', 'dev'), 2)


CALLS = {
  'report': report.run,
  'go on': _go_on,
  'check a refresh': lambda config: negatives.check(_go_on(config)),
  'choose': lambda config: checkpoint.choose(config.workdir, config.checkpoint),
  'check': checks.before_reading,
  'begin': train.run,
  'mine with BM25': lambda config: negatives.by_bm25(_go_on(config)),
  'read': lambda config: experiment.open(config, ('dev',)),
  'evaluate': evaluate.run,
  'encode': encode.run,
  'compare': compare.run,
  'export': export.run,
}


def metric(text, says):
  """Returns the case of a bad third line of metrics.jsonl."""
  return Refused(append(METRICS, f'{text}\n'), says, METRICS, 3)


def job(call, says, **changes):
  """Returns the case of settings that do not fit the run."""
  return Refused(settings(call=call, **changes), says)


def ranked(text):
  """Returns a `make` that writes a BM25 run file and mines with it."""

  def make(folder):
    put('run.trec', text)(folder)
    return {'call': 'mine with BM25', 'bm25_run': str(folder / 'run.trec')}

  return make


def misranked(text, says, line=1):
  """Returns the case of a bad run file."""
  return Refused(ranked(text), says, 'run.trec', line)


def two_run_files(folder):
  """Writes two run files of dev, which has one query, to compare."""
  names = [str(folder / name) for name in ('first.trec', 'second.trec')]
  for name in names:
    put(name, 'q2 Q0 p1 1 2.5 x\n')(folder)
  return {'call': 'compare', 'runs': ','.join(names)}


def going_on(make, says, file=''):
  """Returns the case of a run that cannot resume."""
  return Refused(together(make, settings(call='go on')), says, file)


def flags(make, says, **changes):
  """Returns the case of a checkpoint with bad flags, the job's being sound."""

  def keep(folder):
    make(folder)
    if changes:
      (folder / STEP / atomic.MANIFEST).unlink()
      atomic.commit(folder / STEP, {})
    return {'call': 'read'}

  return Refused(keep, says)


def stored(says, change):
  """Returns the case of changed token rows with matching hashes."""

  def make(folder):
    (path,) = (folder / 'run/tokens').glob('passages-*')
    manifest = json.loads((path / 'manifest.json').read_text())
    (path / 'manifest.json').unlink()
    about = {k: manifest[k] for k in ('dtype', 'mean_length', 'num_cut')}
    change(path, about)
    atomic.commit(path, about)
    return {'call': 'go on'}

  return Refused(make, says)


def _manifest_cut(folder):
  (path,) = (folder / 'run/tokens').glob('passages-*')
  edit('manifest.json', lambda data: data[:20])(path)
  return {'call': 'go on'}


def _file_as_workdir(folder):
  return {'call': 'check', 'workdir': str(folder / FLAGS)}


def _below_a_file(folder):
  return {'call': 'check', 'workdir': str(folder / FLAGS / 'run')}


def _without_run(call):
  return lambda folder: {'call': call, 'workdir': str(folder / 'data')}


WRITTEN = 'token rows are not those that were written'
CASES = {
  # metrics.jsonl.
  'sound': Accepted(settings(), 'curves: '),
  'last line torn': Accepted(append(METRICS, '{"step": 3, "tra'), 'curves: '),
  'metric cut in the middle': metric('{"step"', 'not one JSON value'),
  'metric of no JSON': metric('step 3', "('step 3'); correct it"),
  'metric of NaN': metric(
    '{"step": 3, "train/loss": NaN}', 'not a finite number'
  ),
  'metric a list': metric('[3, 0.5]', "JSON object with a whole number 'step'"),
  'metric without a step': metric('{"train/loss": 1}', "whole number 'step'"),
  'step a fraction': metric('{"step": 3.5}', "a whole number 'step'"),
  'step a text': metric('{"step": "3"}', "a whole number 'step'"),
  'value a text': metric('{"step": 3, "a": "b"}', 'a metric is not a number'),
  'value null': metric('{"step": 3, "a": null}', 'a metric is not a number'),
  'step twice in a line': metric('{"step": 3, "step": 4}', 'is 2 times in'),
  'one measure of dev': metric(
    '{"step": 3, "dev/mrr@10": 1}', 'is missing among'
  ),
  'metric nested': metric('[' * 100_000, 'nested a thousand deep'),
  'metric of 10,000 digits': metric('{"step": %s}' % ('9' * 10_000), 'digits'),
  'NUL in metrics': metric('\0', 'a NUL is in'),
  'Latin-1 in metrics': Refused(
    append(METRICS, b'\xe9\n'), 'UTF-8', METRICS, 3
  ),
  'picture as metrics': Refused(
    put(METRICS, b'\x89PNG\n'), 'UTF-8', METRICS, 1
  ),
  'pipe as metrics': Refused(pipe(METRICS), 'there is a pipe', METRICS),
  'no metrics': Refused(remove(METRICS), 'no metrics.jsonl in'),
  'empty metrics': Refused(put(METRICS, ''), 'no metrics.jsonl in'),
  # Flags of a report.
  'run that is not there': job('report', 'in /no/run, so', runs='/no/run'),
  'runs by semicolon': job('report', 'in /no/a;/no/b, so', runs='/no/a;/no/b'),
  'picture nowhere': job(
    'report', 'in a folder that does', picture='/no/a.png'
  ),
  'picture a folder': job('report', '--picture=/tmp is a', picture='/tmp'),
  # Runs that are compared.
  'one run compared': job('compare', 'fewer than two runs', runs='/no/run'),
  'a run with itself': job('compare', 'names a run twice', runs='/a,/b,/a'),
  'run files nowhere': job('compare', 'a file is needed', runs='/no/a,/no/b'),
  'runs on one query': Refused(two_run_files, 'has one judged query'),
  # run.flags.
  'run.flags cut': flags(edit(FLAGS, lambda d: d[:-8]), 'run.flags is missing'),
  'no run.flags': flags(remove(FLAGS), 'run.flags is missing or was changed'),
  'run.flags with a new flag': flags(
    append(FLAGS, '--from_later=1\n'), 'no flag --from_later', sealed=True
  ),
  'run.flags with no flag': flags(
    append(FLAGS, 'later\n'), "'later' is not a flag; write", sealed=True
  ),
  'run.flags with no value': flags(
    append(FLAGS, '--seed=one\n'), '--seed=one is not a whole', sealed=True
  ),
  'run.flags out of range': flags(
    append(FLAGS, '--top_k=0\n'), '--top_k=0 is out of range', sealed=True
  ),
  # data.json and the data.
  'no data.json': going_on(remove(DATA), 'data.json is missing or was changed'),
  'data.json cut': going_on(edit(DATA, lambda d: d[:30]), 'or was changed'),
  'data.json edited': going_on(
    edit(DATA, lambda d: d.replace(b'a', b'b', 1)), 'or was changed'
  ),
  'data.json a list': going_on(put(DATA, '[]'), 'data.json is missing or was'),
  'data.json in Latin-1': going_on(put(DATA, b'"\xe9"'), 'missing or was'),
  'another corpus': going_on(
    append('data/corpus.jsonl', cases_beir.record(_id='x', text='new')),
    'is not the one with which the run in',
  ),
  'another judgement': going_on(
    append('data/qrels/train.tsv', 'q2\tp4\t1\n'),
    "split 'train' is not the one",
  ),
  'data gone': going_on(remove('data'), '/data names nothing, and'),
  # The model.
  'no model': going_on(remove(f'{RECORD}/model'), 'is missing or was changed'),
  'tokenizer cut': going_on(
    edit(f'{RECORD}/model/tokenizer.json', lambda data: data[:-9]),
    'tokenizer.json is missing or was changed',
  ),
  'manifest cut': going_on(
    edit(f'{STEP}/manifest.json', lambda data: data[:-9]),
    'manifest.json is missing or was changed',
  ),
  'manifest without files': going_on(
    lambda folder: atomic.write_json(folder / STEP / 'manifest.json', {}),
    'manifest.json is missing or was changed',
  ),
  'manifest nested': going_on(
    put(f'{STEP}/manifest.json', '[' * 100_000), 'missing or was changed'
  ),
  'retriever edited': going_on(
    change_json(RETRIEVER, pooling='max'), 'retriever.json is missing or was'
  ),
  'retriever gone': going_on(remove(RETRIEVER), 'is missing or was changed'),
  # Token rows.
  'manifest of token rows cut': Accepted(_manifest_cut, 'and is made again'),
  'pickle as offsets': stored(
    WRITTEN,
    lambda path, about: np.save(
      path / 'offsets.npy', np.array([{}], object), allow_pickle=True
    ),
  ),
  'offsets no array': stored(WRITTEN, lambda p, _: put('offsets.npy', 'x')(p)),
  'offsets of floats': stored(
    WRITTEN, lambda path, _: np.save(path / 'offsets.npy', np.zeros(6))
  ),
  'offsets of one number': stored(
    WRITTEN, lambda path, _: np.save(path / 'offsets.npy', np.int64(3))
  ),
  'offsets beyond the tokens': stored(
    WRITTEN, lambda path, _: np.save(path / 'offsets.npy', np.arange(6) * 99)
  ),
  'no tokens': stored(WRITTEN, lambda path, _: put('ids.bin', '')(path)),
  'tokens cut': stored(
    WRITTEN, lambda path, _: edit('ids.bin', lambda d: d[:-3])(path)
  ),
  'objects as tokens': stored(WRITTEN, lambda _, a: a.update(dtype='O')),
  'no type of numbers': stored(WRITTEN, lambda _, a: a.update(dtype='word')),
  'no type at all': stored(WRITTEN, lambda _, about: about.pop('dtype')),
  # Checkpoints.
  'no such checkpoint': job(
    'choose', '--checkpoint=9 is not last', checkpoint='9'
  ),
  'newest': job(
    'choose', 'is not last, best or one of [2]', checkpoint='newest'
  ),
  'checkpoint of 10,000 digits': job(
    'choose', 'is not last, best or one of [2]', checkpoint='9' * 10_000
  ),
  'no checkpoint named': job(
    'choose', '--checkpoint= is not last', checkpoint=''
  ),
  'negative checkpoint': job(
    'choose', '--checkpoint=-1 is not last', checkpoint='-1'
  ),
  'no checkpoints': Refused(
    together(remove('run/checkpoints'), settings(call='choose')),
    'there is no checkpoint in',
  ),
  # Folders.
  'workdir below a file': Refused(_below_a_file, 'cannot be a folder: '),
  'no workdir': job('check', 'without --workdir', workdir=''),
  'file as workdir': Refused(_file_as_workdir, 'cannot be a folder: '),
  'seed of another run': job('begin', '--seed is 1, and the run in', seed=1),
  'method of another run': job(
    'begin', "--method is 'random', and the run", method='random'
  ),
  'no run to read': Refused(
    _without_run('read'), 'needs a run or a checkpoint'
  ),
  'no run to encode': Refused(_without_run('encode'), 'needs a run or a check'),
  'no run to export': Refused(_without_run('export'), 'nothing to export'),
  'BM25 in a run': job('evaluate', 'and scores of BM25 need', retriever='bm25'),
  # Settings that do not fit the data or the machine.
  'more devices': job(
    'check', '=9 is more than the number of devices here (8)', num_devices=9
  ),
  'batch over devices': job('check', '=3 is not divisible by', batch_size=3),
  'batch in pieces': job(
    'check', '--micro_batch_size=3 does', micro_batch_size=3
  ),
  'mined beyond the corpus': job(
    'check a refresh', 'are more than the 5 passages', top_k=5
  ),
  'drawn beyond the mined': job(
    'check a refresh', '=3 is more than --top_k=', num_hard_negatives=3
  ),
  'more slices than queries': job(
    'check a refresh', '=3 is more than the 2 training queries', query_slices=3
  ),
  'slices of a row that does not mine': job(
    'check a refresh',
    'which does not mine from',
    query_slices=2,
    method='in_batch',
  ),
  'no answers': job(
    'check a refresh', '2 training queries have none', method='ance_code_qa'
  ),
  'answers dropped where there are none': job(
    'check a refresh', '--drop_answers needs answers', drop_answers=True
  ),
  # Run files of BM25.
  'run of BM25': Accepted(
    ranked('q0 Q0 p1 1 2.5 x\nq1 Q0 p2 1 2 x\n'), 'BM25 negatives of '
  ),
  'run without some queries': Accepted(
    ranked('q0 Q0 p1 1 2.5 x\n'), '1 training queries are not in it'
  ),
  'run of other queries': Accepted(
    ranked('q9 Q0 p1 1 2.5 x\n'), 'left out 1 lines of other queries'
  ),
  'run of other passages': misranked(
    'q0 Q0 p77 1 2.5 x\n', "the ranked passage 'p77' is not in"
  ),
  'run of five columns': misranked('q0 Q0 p1 1 2.5\n', 'query id, Q0, passage'),
  'run with a word as score': misranked(
    'q0 Q0 p1 1 2.5 x\nq0 Q0 p2 2 two x\n', "the score 'two' is not a number", 2
  ),
  'run with no score': misranked('q0 Q0 p1 1 nan x\n', "the score 'nan' is no"),
  'run file that is not there': job(
    'mine with BM25', 'there is nothing, and a file', bm25_run='/nowhere/run'
  ),
  'no index': job(
    'check a refresh', 'FAISS cannot make --index=Flatt', index='Flatt'
  ),
  'no parameter': job(
    'check a refresh', "--index_params='x'", index_params='x'
  ),
  'more lists than passages': job(
    'check a refresh', 'has 64 lists for', index='IVF64,Flat'
  ),
}
