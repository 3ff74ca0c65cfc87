"""Jobs on a checkpoint: evaluate, encode, search, with the model or BM25."""

import dataclasses
import pathlib
import shutil

import conftest
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.core import workdirs
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import trec
from ance_jax.jobs import encode
from ance_jax.jobs import evaluate
from ance_jax.jobs import refresh
from ance_jax.jobs import report
from ance_jax.jobs import search
from ance_jax.jobs import train
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import encoding
from ance_jax.training import experiment
from ance_jax.training import refreshes


@pytest.fixture(scope='module')
def finished(beir_folder, tmp_path_factory):
  """Settings of a run that is over."""
  config = config_lib.Config(
    workdir=str(tmp_path_factory.mktemp('finished')),
    dataset='beir',
    data_dir=str(beir_folder),
    method='in_batch',
    max_steps=6,
    steps_per_eval=3,
    steps_per_refresh=3,
    num_devices=1,
    **conftest.SMALL,
  )
  train.run(config)
  return config


def test_evaluating_dev_again_gives_what_training_logged(finished):
  for step in (3, 6):
    logged = {
      name: logs.series(finished.workdir, f'dev/{name}')[step]
      for name in ('mrr@10', 'ndcg@10', 'recall@100')
    }
    config = dataclasses.replace(
      finished, job='evaluate', split='dev', checkpoint=str(step)
    )
    scores = evaluate.run(config)
    assert {name: scores[name] for name in logged} == logged


def test_a_test_score_has_a_file_of_its_own_however_often_it_is_read(finished):
  config = dataclasses.replace(finished, job='evaluate', split='test')
  scores = [evaluate.run(config) for _ in range(2)]
  assert scores[0] == scores[1]
  before = logs.read(finished.workdir)
  written = atomic.read_json(f'{finished.workdir}/test-model-6.json')
  assert written['metrics'] == scores[0]
  assert written['queries'] == 12
  assert logs.read(finished.workdir) == before
  run_file = pathlib.Path(finished.workdir, 'test-model-6.trec')
  assert len(run_file.read_text().splitlines()) == 12 * 100


def test_a_split_may_be_scored_by_another_protocol_but_not_dev_in_training(
  finished,
):
  scores = evaluate.run(
    dataclasses.replace(
      finished, job='evaluate', split='test', protocol='msmarco'
    )
  )
  assert list(scores)[0] == 'mrr@10'
  assert scores['recall@1000'] == 1  # Of 150 passages.
  longer = dataclasses.replace(finished, max_steps=8, protocol='msmarco')
  with pytest.raises(errors.BadInput, match='--protocol is .* began with'):
    train.run(longer)


def test_bm25_is_evaluated_without_a_model(finished, tmp_path):
  config = dataclasses.replace(
    finished,
    job='evaluate',
    retriever='bm25',
    split='test',
    workdir=str(tmp_path / 'bm25'),
  )
  scores = evaluate.run(config)
  # The small set's queries are words of their passage.
  assert scores['mrr@10'] > 0.5
  written = atomic.read_json(f'{config.workdir}/test-bm25-0.json')
  assert written['metrics'] == scores


def test_a_run_can_be_evaluated_from_another_folder_through_init_from(
  finished, tmp_path
):
  config = dataclasses.replace(
    finished,
    job='evaluate',
    init_from=finished.workdir,
    workdir=str(tmp_path / 'elsewhere'),
    pooling=None,
    similarity=None,
    query_length=None,
    passage_length=None,
  )
  scores = evaluate.run(config)
  logged = logs.series(finished.workdir, 'dev/mrr@10')[6]
  assert scores['mrr@10'] == pytest.approx(logged, abs=1e-6)
  assert not experiment.is_run(config.workdir)


@pytest.mark.parametrize(
  ('changed', 'says'),
  [
    (None, None),
    ('corpus.jsonl', 'the corpus is another than that of {}\n'),
    (
      'qrels/dev.tsv',
      "split 'dev' is another than that of {}, which may have ",
    ),
    ('qrels/test.tsv', None),
  ],
)
def test_data_other_than_that_of_the_run_in_init_from_is_said(
  changed, says, finished, tmp_path, capsys
):
  folder = shutil.copytree(finished.data_dir, tmp_path / 'data')
  if changed:
    first, *others = (folder / changed).read_text().splitlines(keepends=True)
    (folder / changed).write_text(''.join([first, *others[:-1]]))
  config = dataclasses.replace(
    finished, job='evaluate', init_from=finished.workdir,
    workdir=str(tmp_path / 'mine'), data_dir=str(folder)
  )  # fmt: skip
  experiment.open(config, ('dev', 'test'))
  out = capsys.readouterr().out
  assert out.count('is another than') == bool(says)
  assert not says or says.format(finished.workdir) in out


def test_a_run_can_start_from_the_weights_of_another(finished, tmp_path):
  config = dataclasses.replace(
    finished,
    init_from=finished.workdir,
    workdir=str(tmp_path / 'second'),
    tie_encoders=False,
    max_steps=1,
  )
  train.run(config)
  first = logs.series(config.workdir, 'dev/mrr@10')[0]
  assert first == pytest.approx(
    logs.series(finished.workdir, 'dev/mrr@10')[6], abs=1e-6
  )


def test_encode_writes_the_embeddings_that_search_and_evaluate_use(
  finished, capsys
):
  config = dataclasses.replace(finished, job='encode', checkpoint='3')
  encode.run(config)
  out = capsys.readouterr().out
  assert '150 rows in 3 blocks' in out
  folder = pathlib.Path(out.strip().rsplit(': ', 1)[1])
  blocks = [np.load(path) for path in sorted(folder.glob('*/*.npy'))]
  assert [len(block) for block in blocks] == [64, 64, 22]
  run, _ = experiment.open(config, ())
  ids = (folder / 'ids.txt').read_text().splitlines()
  assert ids == list(run.dataset.corpus.ids)
  stamps = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
  evaluate.run(dataclasses.replace(config, job='evaluate'))
  assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == stamps


def test_each_piece_of_a_document_has_its_row_and_its_id(
  finished, tmp_path, capsys
):
  config = dataclasses.replace(
    finished,
    job='encode',
    init_from=finished.workdir,
    workdir=str(tmp_path / 'pieces'),
    chunks=3,
  )
  encode.run(config)
  folder = pathlib.Path(capsys.readouterr().out.strip().rsplit(': ', 1)[1])
  ids = (folder / 'ids.txt').read_text().splitlines()
  blocks = [np.load(path) for path in sorted(folder.glob('*/*.npy'))]
  assert len(ids) == sum(map(len, blocks)) > 150
  run, _ = experiment.open(config, ())
  first = run.dataset.passages.first
  expected = zip(run.dataset.corpus.ids, np.diff(first), strict=True)
  assert ids == [an_id for an_id, pieces in expected for _ in range(pieces)]


def test_a_trainer_leaves_the_embeddings_that_a_job_beside_it_makes(
  finished, tmp_path, monkeypatch
):
  run, _ = experiment.open(
    dataclasses.replace(finished, checkpoint='3'), ('dev',)
  )
  real = corpus_index.encoding.encode_rows

  def encode_rows(*arguments):
    # What the trainer does at a boundary, here before each block.
    corpus_index.prune_embeddings(run.embeddings_folder('of another'))
    return real(*arguments)

  monkeypatch.setattr(corpus_index.encoding, 'encode_rows', encode_rows)
  assert run.index_corpus(logs.Stopwatch())
  corpus_index.prune_embeddings(run.embeddings_folder('of another'))
  assert list((run.workdir / 'embeddings').iterdir()) == []


@pytest.mark.parametrize('retriever', ['model', 'bm25'])
def test_search_finds_the_passage_that_is_asked_for(
  retriever, finished, capsys, monkeypatch
):
  run = experiment.open(finished, ())[0]
  config = dataclasses.replace(
    finished,
    job='search',
    retriever=retriever,
    query=run.dataset.corpus.texts[40],
  )
  search.run(config)
  out = capsys.readouterr().out
  assert '  1  ' in out
  assert 'p40' in out
  typed = iter([run.dataset.corpus.texts[41], ''])
  monkeypatch.setattr('builtins.input', lambda prompt: next(typed))
  search.run(dataclasses.replace(config, query=''))
  assert 'p41' in capsys.readouterr().out


def test_a_search_that_finds_nothing_says_so(finished, capsys):
  config = dataclasses.replace(finished, job='search', retriever='bm25')
  for query, found in (('t1w1', False), ('zebra', True)):
    search.run(dataclasses.replace(config, query=query))
    assert ('nothing found' in capsys.readouterr().out) == found


def test_examples_leave_out_what_the_index_did_not_find(finished):
  run = experiment.open(finished, ('dev',))[0]
  rows = np.full((len(run.dataset.splits['dev'].ids), 10), -1, np.int32)
  rows[:, 0] = 40
  ranking = trec.Ranking(rows, np.zeros(rows.shape, np.float32))
  for example in corpus_index.examples(
    ranking, run.dataset.splits['dev'], run.dataset.corpus, 0
  ):
    assert example['results'] == [
      corpus_index.passage_name(run.dataset.corpus, 40)
    ]


def test_the_refresh_job_mines_with_the_chosen_checkpoint(finished, capsys):
  config = dataclasses.replace(finished, job='refresh', checkpoint='3')
  refresh.run(config)
  assert 'refresh at step 3: dev mrr@10' in capsys.readouterr().out
  run = experiment.open(finished, ('train', 'dev'))[0]
  assert refreshes.load(run, 3).negatives.shape == (48, 10)


@pytest.mark.parametrize(
  ('job', 'changes', 'expected'),
  [
    (evaluate.run, {'workdir': ''}, 'without --workdir'),
    (
      evaluate.run,
      {'checkpoint': '5'},
      '--checkpoint=5 is not last, best or one of',
    ),
    (evaluate.run, {'retriever': 'bm25'}, 'folder of a run, and scores'),
    (evaluate.run, {'split': 'nope'}, "no judged queries of split 'nope'"),
    (evaluate.run, {'hidden_size': 32}, '--hidden_size is 32'),
    (report.run, {'runs': '/nowhere'}, 'no metrics.jsonl in /nowhere'),
    (report.run, {'picture': '/nowhere/a.png'}, 'a.png is in a folder'),
  ],
)
def test_what_a_job_cannot_use_is_refused(finished, job, changes, expected):
  with pytest.raises(errors.BadInput, match=expected):
    job(dataclasses.replace(finished, **changes))


def test_a_run_is_evaluated_with_another_index_but_refreshed_with_its_own(
  finished,
):
  exact = evaluate.run(finished)
  other = dataclasses.replace(
    finished, index='IVF150,Flat', index_params='nprobe=150', seed=3
  )
  found = evaluate.run(dataclasses.replace(other, job='evaluate'))
  # All lists are looked at.
  assert found == pytest.approx(exact, abs=1e-6)
  only_a_list = dataclasses.replace(other, index_params='nprobe=1')
  assert evaluate.run(only_a_list)['recall@100'] < exact['recall@100']
  # By the best of two pieces is another score.
  assert evaluate.run(dataclasses.replace(other, chunks=2)) != found
  evaluate.run(
    dataclasses.replace(other, center_passages=True, dtype='bfloat16')
  )
  for changes in ({'index': 'SQ8'}, {'center_passages': True}, {'seed': 3}):
    with pytest.raises(errors.BadInput, match='and the run in .* began with'):
      refresh.run(dataclasses.replace(finished, **changes))


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    ({'index': 'IVF8,PQ7'}, 'multiple of the number of subquantizers'),
    ({'index': 'IDMap,Flat'}, 'leave out IDMap'),
    ({'index': 'IVF151,Flat'}, '151 lists for 150 passages'),
    ({'index': 'IVF228,Flat', 'chunks': 2}, '228 lists for 227 passages'),
    ({'index_params': 'nprobe=2'}, 'could not set parameter'),
  ],
)
def test_an_index_is_refused_before_anything_is_encoded(
  changes, expected, finished, monkeypatch
):
  monkeypatch.setattr(encoding, 'encode_rows', None)
  with pytest.raises(errors.BadInput, match=expected):
    evaluate.run(dataclasses.replace(finished, **changes))


def test_an_index_on_devices_is_refused_as_early(finished):
  config = dataclasses.replace(finished, index='device', search_memory_mb=1)
  experiment.check_index(config, 16, 150)
  with pytest.raises(errors.BadInput, match='--search_memory_mb=1 does not'):
    experiment.check_index(config, 4096, 10**6)


def test_a_set_of_beir_brings_its_protocol_but_to_no_run_that_began_otherwise(
  finished, tmp_path, monkeypatch
):
  named = dataclasses.replace(finished, beir_set='scifact')
  # Begun before, or without --beir_set: it goes on as it was.
  assert experiment.settings(finished.workdir, 6).protocol == 'usual'
  experiment.check_same_run(named, 6)
  again = experiment.restore(named, ('dev',), 6)
  assert again.dataset.splits['dev'].protocol == 'usual'
  assert again.config.protocol == 'usual'
  refreshed, *_ = experiment.open(
    dataclasses.replace(named, job='refresh'), ('dev',)
  )
  assert refreshed.dataset.splits['dev'].protocol == 'usual'
  # What is scored now is scored as the set is.
  scored, *_ = experiment.open(
    dataclasses.replace(named, job='evaluate'), ('dev',)
  )
  assert scored.dataset.splits['dev'].protocol == 'beir'
  # A new run keeps it, without --beir_set, too.
  begun, _ = experiment.create(
    dataclasses.replace(named, workdir=str(tmp_path)), ('dev',)
  )
  assert begun.dataset.splits['dev'].protocol == 'beir'
  flags = experiment.record(begun)[workdirs.FLAGS_FILE].decode()
  assert '--protocol=beir\n' in flags
  monkeypatch.setattr(
    experiment,
    'settings',
    lambda *_: dataclasses.replace(finished, protocol='beir'),
  )
  scored, *_ = experiment.open(
    dataclasses.replace(finished, job='evaluate'), ('dev',)
  )
  assert scored.dataset.splits['dev'].protocol == 'beir'
  for config in (finished, named):
    experiment.check_same_run(config, 6)
    again = experiment.restore(config, ('dev',), 6)
    assert again.dataset.splits['dev'].protocol == 'beir'
    loaded, *_ = experiment.open(config, ('dev',))
    assert loaded.dataset.splits['dev'].protocol == 'beir'
  with pytest.raises(errors.BadInput, match='--protocol is .* began with'):
    experiment.check_same_run(dataclasses.replace(named, protocol='usual'), 6)


def test_a_passage_of_grade_0_is_no_first_relevant_one():
  split = corpus_lib.make_split(
    corpus_lib.RawSplit(['q'], ['text'], {(0, 0): 0, (0, 1): 1, (0, 2): 2})
  )
  corpus = corpus_lib.make_corpus(list('abcd'), [''] * 4, list('abcd'))
  for rows, place in (([0, 3, 1, 2], 3), ([3, 0, -1, -1], None)):
    ranking = trec.Ranking(np.array([rows], np.int32), None)
    (example,) = corpus_index.examples(ranking, split, corpus, 0)
    assert example['place'] == place
