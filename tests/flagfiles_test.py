"""Each family of flagfiles, whole, on a miniature in the files' true format."""

import dataclasses
import functools
import itertools
import json

import bert_weights_test
import conftest
import formats
import needs
import pytest
import retriever_layouts_test

from ance_jax import errors
from ance_jax import flags
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.jobs import evaluate
from ance_jax.jobs import report
from ance_jax.jobs import search
from ance_jax.jobs import train

# What a miniature must have otherwise: its size, and random weights.
SMALL = {
  'init_from': '',
  'checkpoint': 'last',
  'num_layers': 1,
  'hidden_size': 16,
  'num_heads': 2,
  'intermediate_size': 32,
  'vocab_size': 300,
  'head_size': None,
  'lower_case': None,
  'prefix_space': None,
  'query_length': 8,
  'passage_length': 24,
  'batch_size': 8,
  'num_hard_negatives': 2,
  'top_k': 10,
  'warmup_steps': 4,
  'steps_per_refresh': 3,
  'max_steps': 9,
  'lr_warmup_steps': 1,
  'learning_rate': 1e-2,
  'tokens_per_batch': 1024,
  'num_devices': 1,
}
# Rows whose flagfile begins with another run or needs a teacher.
ROWS = {
  'msmarco_star': {},
  'msmarco_ance_tele': {'negatives_per_source': 3, 'max_refreshes': 2},
  'msmarco_adore': {'warmup_steps': 0},
  'msmarco_distill': {'cross_encoder': '', 'score_run': True},
  'msmarco_margin_mse': {'negatives': True, 'topics': 3, 'warmup_steps': 0},
}
WRITERS = {
  'msmarco_passage': (formats.write_msmarco, 'dl19', 'mrr@10', 'ndcg@10'),
  'msmarco_doc_maxp': (formats.write_documents, 'dl19', 'mrr@100', 'ndcg@10'),
  'msmarco_doc': (formats.write_documents, 'dl19', 'mrr@100', 'ndcg@10'),
  'nq': (formats.write_dpr, 'test', 'accuracy@20', 'accuracy@20'),
  'trivia_qa': (
    functools.partial(formats.write_dpr, questions='trivia'),
    'test',
    'accuracy@20',
    'accuracy@20',
  ),
  'beir_scifact': (conftest.write_beir, 'test', 'ndcg@10', 'ndcg@10'),
}


@pytest.mark.parametrize('name', WRITERS)
def test_a_miniature_is_trained_refreshed_twice_scored_and_searched(
  name, tmp_path, capsys
):
  write, split, on_dev, on_test = WRITERS[name]
  (tmp_path / 'data').mkdir()
  write(tmp_path / 'data')
  settings = flags.from_flagfile(
    f'experiments/{name}.flags',
    **{**SMALL, 'data_dir': str(tmp_path / 'data')},
    workdir=str(tmp_path / 'run'),
  )
  scores = train.run(settings)
  assert next(iter(scores)) == on_dev
  assert len(logs.series(settings.workdir, 'refresh/judged')) >= 2
  out = capsys.readouterr().out
  assert f': dev {on_dev} ' in out
  assert f'dev {on_dev} since the first refresh' in report.table(
    settings.workdir
  )
  job = dataclasses.replace(
    settings, job='evaluate', split=split, checkpoint='best'
  )
  found = evaluate.run(job)
  assert next(iter(found)) == on_test
  assert all(0 <= value <= 1 for value in found.values())
  assert any(found.values())
  (path,) = (tmp_path / 'run').glob(f'{split}-model-*.json')
  assert atomic.read_json(path)['metrics'] == found
  search.run(dataclasses.replace(settings, job='search', query='t1w1 t1w2'))
  assert len(capsys.readouterr().out.splitlines()) > 5


@pytest.mark.parametrize('name', ROWS)
def test_a_published_row_is_trained_whole_and_scored(name, tmp_path):
  data = tmp_path / 'data'
  data.mkdir()
  formats.write_msmarco(data)
  changes = {**SMALL, **ROWS[name]}
  if changes.get('score_run'):
    changes['score_run'] = str(tmp_path / 'teacher.trec')
    queries = (data / 'queries.train.tsv').read_text().splitlines()
    pairs = itertools.product(queries, range(formats.NUM_PASSAGES))
    lines = (
      f'{query.split()[0]} Q0 {formats.pid(row)} 1 {-(row % 7)} teacher'
      for query, row in pairs
    )
    (tmp_path / 'teacher.trec').write_text('\n'.join(lines) + '\n')
  if changes.get('negatives'):
    changes['negatives'] = str(tmp_path / 'given.jsonl')
    write_given(data, tmp_path / 'given.jsonl')
  settings = flags.from_flagfile(
    f'experiments/{name}.flags',
    **{
      **changes,
      'data_dir': str(data),
      'steps_per_eval': 4,
      'steps_per_log': 1,
    },
    workdir=str(tmp_path / 'run'),
  )
  assert next(iter(train.run(settings))) == 'mrr@10'
  assert len(logs.series(settings.workdir, 'train/loss')) >= 1
  job = dataclasses.replace(settings, job='evaluate', split='dl19')
  assert next(iter(evaluate.run(job))) == 'ndcg@10'


def write_given(data, path):
  """Gives each query its positive and three others, with scores."""
  qrels = (data / 'qrels.train.tsv').read_text().splitlines()
  positives = {line.split()[0]: line.split()[2] for line in qrels}
  everyone = [formats.pid(row) for row in range(formats.NUM_PASSAGES)]
  with open(path, 'w') as file:
    for number, (query, positive) in enumerate(positives.items()):
      others = [name for name in everyone if name != positive]
      record = {
        'query_id': query,
        'positive_ids': [positive],
        'positive_scores': [3.0],
        'negative_ids': others[number : number + 3],
        'negative_scores': [2.0, 1.0, -1.0],
      }
      file.write(json.dumps(record) + '\n')


def make_two(folder):
  for seed, side in enumerate(retriever_layouts_test.SIDES):
    retriever_layouts_test.make_dpr(folder / side, side, seed)
  return ','.join(str(folder / side) for side in retriever_layouts_test.SIDES)


def make_ance(folder):
  retriever_layouts_test.make_ance(folder)
  return str(folder)


def make_plain(kind, folder):
  bert_weights_test.make_torch(kind, folder, positions=512)
  return str(folder)


RELEASED = {
  'eval_ance_passage': (formats.write_msmarco, make_ance, 'mrr@10'),
  'eval_ance_nq': (formats.write_dpr, make_two, 'accuracy@20'),
  'eval_contriever': (
    formats.write_dpr, functools.partial(make_plain, 'bert'), 'accuracy@20'
  ),
  'eval_tas_b': (
    formats.write_msmarco, functools.partial(make_plain, 'distilbert'), 'mrr@10'
  ),
}  # fmt: skip


@needs.torch
@pytest.mark.parametrize('name', RELEASED)
def test_a_released_checkpoint_is_scored_as_its_flagfile_says(name, tmp_path):
  write, make, measure = RELEASED[name]
  (tmp_path / 'data').mkdir()
  write(tmp_path / 'data')
  settings = flags.from_flagfile(
    f'experiments/{name}.flags',
    data_dir=str(tmp_path / 'data'),
    workdir=str(tmp_path / 'run'),
    init_from=make(tmp_path / 'model'),
    num_devices=1,
  )
  found = evaluate.run(settings)
  path = tmp_path / 'run' / f'{settings.split}-model-0.json'
  assert atomic.read_json(path)['metrics'] == found
  assert next(iter(found)) == measure
  assert all(0 <= value <= 1 for value in found.values())
  assert any(found.values())


def test_data_that_is_not_there_ends_in_a_sentence_that_names_it(tmp_path):
  settings = flags.from_flagfile(
    # A name on the hub is looked up before the data is read.
    'experiments/nq.flags',
    workdir=str(tmp_path),
    init_from='',
  )
  with pytest.raises(errors.BadInput, match='--data_dir=.* names nothing'):
    train.run(settings)
  (tmp_path / 'data').mkdir()
  settings = dataclasses.replace(settings, data_dir=str(tmp_path / 'data'))
  says = r'neither psgs_w100.tsv .*; fetch https://dl.*4,694.5 MB'
  with pytest.raises(errors.BadInput, match=says):
    train.run(settings)
