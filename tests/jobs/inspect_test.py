"""The report of a dataset, against counts by hand."""

import dataclasses
import json
import pathlib
import shutil
import signal
import tempfile
import types

import conftest
import numpy as np
import pytest

from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.data import corpus
from ance_jax.data import tokenizer
from ance_jax.data import tokens
from ance_jax.jobs import batch_report
from ance_jax.jobs import inspect
from ance_jax.jobs import train
from ance_jax.retrieval import encoding
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import methods

pytestmark = pytest.mark.usefixtures('compiled_once')


def test_the_report_counts_what_is_in_the_set(
  tiny, tmp_path, capsys, monkeypatch
):
  # Nothing is trained, tokenized or encoded for it.
  for module, name in (
    (tokenizer, 'train_vocabulary'),
    (tokens, 'token_rows'),
    (encoding, 'encode_rows'),
  ):
    monkeypatch.delattr(module, name)
  # The first two of train have the text of the first of dev.
  tiny = dataclasses.replace(
    tiny, data_dir=str(shutil.copytree(tiny.data_dir, tmp_path / 'data'))
  )
  path = pathlib.Path(tiny.data_dir, 'queries.jsonl')
  queries = [json.loads(line) for line in path.read_text().splitlines()]
  for query in queries[:2]:
    # The same in upper case, and with more spaces.
    text = queries[conftest.NUM_TRAIN]['text'].upper()
    query['text'] = text.replace(' ', '  ')
  path.write_text(''.join(json.dumps(query) + '\n' for query in queries))
  settings = dataclasses.replace(tiny, job='inspect', num_devices=1)
  found = inspect.run(settings)
  assert atomic.read_json(f'{tiny.workdir}/inspection.json') == found
  assert found['corpus'] == {
    'passages': conftest.NUM_PASSAGES,
    'without a title': 50,
    'of the same text as another': 20,
    'most of one text': 2,
  }
  assert list(found['splits']) == ['train', 'dev', 'test']
  train = found['splits']['train']
  assert train['queries'] == conftest.NUM_TRAIN
  # Each fourth query has a second passage, of grade 2.
  assert train['judgements of grade 2'] == conftest.NUM_TRAIN // 4
  assert train['positives of a query, most'] == 2
  assert train['queries that dev has, too'] == 2
  assert found['splits']['dev']['queries that train has, too'] == 1
  assert train['queries that test has, too'] == 0
  assert train['positives of a query, mean'] == pytest.approx(1.25)
  lines = pathlib.Path(tiny.data_dir, 'corpus.jsonl').read_text().splitlines()
  texts = [json.loads(line) for line in lines]
  words = [len(f'{text["title"]} {text["text"]}'.split()) for text in texts]
  assert found['words']['passages']['100 % have at most'] == max(words)
  assert 'seconds to encode the corpus' not in found
  out = capsys.readouterr().out
  assert 'not timed without weights' in out
  assert 'examples of train' in out
  assert 'negatives being mined' in out
  assert 'checkpoints ' in out
  # Nothing of a run was begun: it can still be trained there.
  assert not logs.read(tiny.workdir)


def test_without_a_folder_it_is_printed_and_nothing_is_left(
  tiny, tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
  monkeypatch.setattr(signal, 'signal', lambda *_: None)
  kept = inspect.run(dataclasses.replace(tiny, job='inspect'))
  free = inspect.run(dataclasses.replace(tiny, job='inspect', workdir=''))
  assert free == kept
  assert not list(tmp_path.glob('ance_jax-*'))
  assert 'nothing of this was written' in capsys.readouterr().out


def test_prompts_count_as_words_of_the_texts(tiny):
  settings = dataclasses.replace(tiny, job='inspect', num_devices=1)
  without = inspect.run(settings)['words']
  prompts = {'query_prompt': 'find: ', 'passage_prompt': 'from the corpus: '}
  with_them = inspect.run(dataclasses.replace(settings, **prompts))['words']
  for side, words in (('queries', 1), ('passages', 3)):
    for share in ('50 % have at most', '100 % have at most'):
      assert with_them[side][share] == without[side][share] + words


@pytest.mark.parametrize('method', ['in_batch', 'random'])
def test_a_batch_shows_the_columns_of_the_step_and_why_some_are_masked(
  method, tiny
):
  settings = dataclasses.replace(
    tiny, job='inspect', num_devices=1, method=method, batch_size=48
  )
  run = inspect._open(settings)
  row = methods.METHODS[method]
  drawn_from = experiment.training_data(run, row)
  rows, passages, _ = batches.draw_rows(
    drawn_from, 0, seed=0, batch_size=48, num_negatives=2, negatives=None
  )
  groups, split = run.dataset.corpus.groups, run.dataset.splits['train']
  for place in range(48):
    found = batch_report.columns(drawn_from, row, rows, passages, place)
    judged = slice(*split.offsets[rows[place] : rows[place] + 2])
    positives = split.passages[judged].tolist()
    others = range(48) if method == 'in_batch' else [place]
    expected = []
    for other in others:
      for number, passage in enumerate(passages[other].tolist()):
        why = ''
        if passage in positives:
          why = 'a positive of it, too'
        elif groups[passage] in groups[positives]:
          why = 'the text of a positive of it'
        expected.append((other, number, passage, why))
    expected.remove((place, 0, passages[place, 0], 'a positive of it, too'))
    if method == 'random':
      expected = [column for column in expected if column[1]]
    assert found == expected
    same = sum(group in groups[positives] for group in groups)
    distinct = len(set(positives))
    assert batch_report._never_text(drawn_from, int(rows[place])) == (
      f'never its negative: {distinct} positives, {same - distinct} of their '
      'text, 0 of its own'
    )
  lines = inspect.batch_report.lines(run)
  assert lines[0] == f'  --method={method}, 48 queries'
  number = 47 if method == 'in_batch' else 2
  assert sum(f'{number} columns: ' in line for line in lines) == 3
  if method == 'in_batch':
    # Four that count, and four that do not if there are so many.
    masked = [
      int(line.split(' count, ')[1].split()[0])
      for line in lines
      if ' columns: ' in line
    ]
    assert max(masked) > 0
    shown = [line for line in lines if line.startswith('      ')]
    assert len(shown) == sum(4 + min(4, number) for number in masked)
    assert sum('(masked: ' in line for line in shown) == sum(
      min(4, number) for number in masked
    )
  drawn_rows = batches.draw_rows(
    drawn_from, 0, seed=settings.seed, batch_size=48, num_negatives=2,
    negatives=None,
  )[0]  # fmt: skip
  assert [line.strip() for line in lines if 'never its negative' in line] == [
    batch_report._never_text(drawn_from, int(row)) for row in drawn_rows[:3]
  ]


def test_what_may_be_no_negative_is_counted_by_why():
  groups = np.array([7, 7, 5, 5, 1])
  drawn_from = batches.TrainingData(
    None,
    None,
    np.array([0, 1]),
    np.array([2]),
    np.array([[5, 7]]),
    groups,
    1,
    1,
  )
  assert batch_report._never_text(drawn_from, 0) == (
    'never its negative: 1 positives, 1 of their text, 2 of its own'
  )
  masks = [batch_report._why_masked(drawn_from, 0, row) for row in range(5)]
  assert masks == [
    'the text of the query itself',
    'the text of the query itself',
    'a positive of it, too',
    'the text of a positive of it',
    '',
  ]


def test_a_run_and_a_checkpoint_are_reported_in_tokens_and_seconds(
  tiny, capsys
):
  settings = dataclasses.replace(
    tiny, num_devices=1, warmup_steps=0, max_steps=4, method='ance',
    steps_per_refresh=2
  )  # fmt: skip
  train.run(settings)
  run_dir = tiny.workdir
  capsys.readouterr()
  found = inspect.run(dataclasses.replace(settings, job='inspect'))
  assert found['tokens']['passages']['limit'] == 16
  assert found['seconds to encode the corpus'] > 0
  mined = atomic.load_array(f'{run_dir}/refresh/00000002/negatives.npy')
  # The batch of step 2, the first one on what was mined last.
  run, _ = experiment.open(settings, None)
  rows, *_ = batches.draw_rows(
    experiment.training_data(run, methods.METHODS['ance']),
    2,
    seed=0,
    batch_size=8,
    num_negatives=2,
    negatives=batches.Negatives(np.arange(48), mined, 0),
  )
  queries = [line for line in found['batch'] if line.startswith('  query ')]
  assert [line.split(': ')[1] for line in queries] == [
    run.dataset.splits['train'].texts[int(row)] for row in rows[:3]
  ]
  corpus_ids = [f'[p{row}]' for row in range(conftest.NUM_PASSAGES)]
  shown = [line for line in found['batch'] if 'own, negative' in line]
  assert len(shown) == 3 * settings.num_hard_negatives
  names = [line.split(': ')[1].split()[0] for line in shown]
  assert {corpus_ids.index(name) for name in names} <= set(mined.flat)
  of_checkpoint = dataclasses.replace(
    settings, job='inspect', init_from=run_dir, workdir=f'{run_dir}-other'
  )
  found = inspect.run(of_checkpoint)
  assert found['seconds to encode the corpus'] > 0
  assert 'only a run has' in found['batch'][1]


def test_the_batch_of_a_run_is_the_first_on_what_it_picked_up_last(
  tiny, monkeypatch
):
  settings = dataclasses.replace(
    tiny, num_devices=1, warmup_steps=0, max_steps=4, method='ance',
    steps_per_refresh=2, refresh_mode='delayed', refresh_delay=1,
  )  # fmt: skip
  train.run(settings)
  steps, draw_rows = [], batches.draw_rows

  def drawn(data, step, **kwargs):
    steps.append(step)
    return draw_rows(data, step, **kwargs)

  monkeypatch.setattr(batches, 'draw_rows', drawn)
  inspect.run(dataclasses.replace(settings, job='inspect'))
  assert steps == [3]


def test_before_anything_is_mined_the_batch_is_that_of_the_warm_up(tiny):
  settings = dataclasses.replace(
    tiny, job='inspect', num_devices=1, method='ance', warmup_steps=4,
    warmup_method='in_batch',
  )  # fmt: skip
  assert inspect.run(settings)['batch'][0] == '  --method=in_batch, 8 queries'


def test_what_a_run_ranked_by_bm25_is_shown_in_a_batch(tiny):
  settings = dataclasses.replace(
    tiny, num_devices=1, method='bm25', max_steps=1
  )
  train.run(settings)
  found = inspect.run(dataclasses.replace(settings, job='inspect'))
  shown = [line for line in found['batch'] if 'own, negative' in line]
  assert len(shown) == 3 * settings.num_hard_negatives


def test_given_negatives_are_shown_in_a_batch(tiny, tmp_path):
  ids = [f'q{row}' for row in range(conftest.NUM_TRAIN)]
  given = {'q0': ['p140', 'p141'], 'q1': ['p142', 'p143']}
  path = tmp_path / 'given.jsonl'
  lines = [
    {'query_id': an_id, 'negatives': given.get(an_id, ['p144', 'p145'])}
    for an_id in ids
  ]
  path.write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
  settings = dataclasses.replace(
    tiny, job='inspect', method='given', negatives=str(path), num_devices=1
  )
  found = inspect.run(settings)['batch']
  own = [line for line in found if 'own, negative' in line]
  assert len(own) == 3 * settings.num_hard_negatives
  assert all(f'[p14{n}]' in ''.join(found) for n in '45')
  assert all(line.split('[')[1][:3] == 'p14' for line in own)
  assert not pathlib.Path(tiny.workdir, 'given').exists()
  without = dataclasses.replace(settings, negatives='')
  assert 'only a run has' in inspect.run(without)['batch'][1]


def test_what_encoding_takes_is_that_of_a_sample_times_the_work(
  tiny, monkeypatch
):
  settings = dataclasses.replace(tiny, job='inspect', num_devices=1, chunks=2)
  run = inspect._open(settings)
  clock = iter([0.0, 100.0, 200.0, 203.0])
  # Not the module itself, of which progress asks the time, too.
  timer = types.SimpleNamespace(perf_counter=lambda: next(clock))
  monkeypatch.setattr(inspect, 'time', timer)
  monkeypatch.setattr(encoding, 'encode_rows', lambda *_: None)
  vocabulary = tokenizer.train_vocabulary(['a b c d'], 50)
  run = run._replace(retriever=run.retriever._replace(tokenizer=vocabulary))
  # Half of the texts have one piece of 16 tokens, half two, one of them short.
  lengths = np.array([16] * 64 + [20] * 64)
  secs = inspect._encode_secs(run, ['a b c'] * 128, lengths)
  # 64 rows of 16 tokens were timed, and 192 are what 128 of the texts take.
  assert secs == pytest.approx(3 * 3 * 150 / 128)


def test_a_query_without_a_positive_is_counted():
  judged = {(0, 0): 0, (1, 0): 1}
  split = corpus.make_split(corpus.RawSplit(['q', 'r'], ['x', 'y'], judged))
  assert inspect.split_facts(split)['queries without a positive'] == 1


def test_what_a_limit_cuts_is_a_share_of_texts_and_of_tokens():
  lengths = np.array([2, 4, 6, 8])
  facts = inspect.length_facts(lengths, 5)
  assert facts['share of texts cut there'] == 0.5
  assert facts['share of tokens cut there'] == pytest.approx(4 / 20)
  assert facts['100 % have at most'] == 8
  lines = inspect.histogram(lengths, 5).splitlines()
  assert sum(int(line.split()[1]) for line in lines) == 4
  assert sum('<- limit' in line for line in lines) == 1
