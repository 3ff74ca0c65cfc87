"""A refresh follows the committed checkpoint, and works with any index."""

import dataclasses
import itertools
import shutil
from types import SimpleNamespace

import conftest
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import logs
from ance_jax.data import trec
from ance_jax.jobs import evaluate
from ance_jax.jobs import train
from ance_jax.mining import candidates
from ance_jax.mining import miner
from ance_jax.models import bi_encoder
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import negatives as negatives_lib
from ance_jax.training import refreshes

NO_ANSWERS = {'train': SimpleNamespace(answers=None)}


@pytest.fixture(scope='module')
def trained(beir_folder, tmp_path_factory):
  """Settings of a short run that is over, on one device."""
  settings = config_lib.Config(
    workdir=str(tmp_path_factory.mktemp('trained')),
    dataset='beir',
    data_dir=str(beir_folder),
    method='in_batch',
    max_steps=6,
    steps_per_refresh=3,
    num_devices=1,
    **conftest.SMALL,
  )
  train.run(settings)
  return settings


@pytest.fixture
def open_run(trained, tmp_path):
  """Opens a copy of that run with some settings changed."""

  def open_run(name='copy', **changes):
    folder = tmp_path / name
    shutil.copytree(trained.workdir, folder)
    config = dataclasses.replace(trained, workdir=str(folder), **changes)
    return experiment.restore(config, ('train', 'dev'), 6)

  return open_run


def with_settings(run, **changes):
  return run._replace(config=dataclasses.replace(run.config, **changes))


def with_split(run, **changes):
  """The run with other training queries."""
  split = run.dataset.splits['train']._replace(**changes)
  splits = {**run.dataset.splits, 'train': split}
  return run._replace(dataset=run.dataset._replace(splits=splits))


def slow_refresh(run, step):
  """Encodes a text at a time, compares with all passages, filters by loops."""
  shapes = bi_encoder.shapes(run.retriever.config)
  params = checkpoint.read_params(run.workdir, step, shapes, run.devices)
  encode = jax.jit(
    bi_encoder.make_encode(run.retriever.config, 'float32', 'query')
  )

  def embed(rows, length):
    ids, lengths = rows.padded(np.arange(len(rows)), length)
    return np.asarray(encode(params, ids, lengths))

  scores = (
    embed(run.dataset.queries['train'], 8) @ embed(run.dataset.passages, 16).T
  )
  queries, passages = run.dataset.splits['train'].positives()
  table = []
  for query, row in enumerate(scores):
    banned = run.dataset.corpus.groups[passages[queries == query]]
    kept = [
      p
      for p in np.lexsort((np.arange(len(row)), -row))
      if run.dataset.corpus.groups[p] not in banned
    ]
    table.append(kept[: run.config.top_k])
  return np.array(table)


def agreement(first, second):
  same = [
    set(a) & set(b)
    for a, b in zip(first.tolist(), second.tolist(), strict=True)
  ]
  return sum(map(len, same)) / first.size


def test_negatives_are_those_of_doing_it_slowly(open_run):
  run = open_run()
  refreshes.refresh(run, 6)
  # Scores that differ by rounding may change places.
  assert (
    agreement(refreshes.load(run, 6).negatives, slow_refresh(run, 6)) > 0.995
  )
  assert (
    refreshes.load(run, 6).negatives == slow_refresh(run, 6)
  ).mean() > 0.95


def test_a_refresh_follows_the_committed_checkpoint_not_memory(open_run):
  run = open_run()
  before = refreshes.refresh(run, 6)
  negatives = np.array(refreshes.load(run, 6).negatives)
  # Put the values of step 0 where those of step 6 are.
  folder = run.workdir / 'checkpoints'
  shapes = bi_encoder.shapes(run.retriever.config)
  other = checkpoint.read_params(run.workdir, 0, shapes, run.devices)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / '6' / 'params', other, force=True)
  (folder / '6' / atomic.MANIFEST).unlink()
  atomic.commit(folder / '6', {'step': 6})
  after = refreshes.refresh(run, 6)
  assert after['weights_hash'] != before['weights_hash']
  assert after['weights_hash'] == checkpoint.weights_hash(other)
  swapped = np.array(refreshes.load(run, 6).negatives)
  assert (swapped != negatives).any()
  run_at_zero = open_run('other')
  refreshes.refresh(run_at_zero, 0)
  np.testing.assert_array_equal(
    refreshes.load(run_at_zero, 0).negatives, swapped
  )


def test_parameters_of_one_tower_are_hashed_once_a_refresh(
  open_run, monkeypatch
):
  run, hashed = open_run(), []
  real = checkpoint.weights_hash
  monkeypatch.setattr(
    checkpoint, 'weights_hash', lambda params: hashed.append(1) or real(params)
  )
  made = refreshes.refresh(run, 6)
  assert made['weights_hash'] == made['passage_hash']
  assert len(hashed) == 1
  folder = run.embeddings_folder(made['passage_hash'])
  (folder.parent / 'other').mkdir()
  del made['passage_hash']  # As an older release published it.
  refreshes.prune_embeddings(run, made)
  assert list(folder.parent.glob('[!.]*')) == [folder]


def test_a_published_refresh_is_taken_and_made_again_for_other_settings(
  open_run,
):
  run = open_run()
  first = refreshes.refresh(run, 6)
  folder = run.workdir / 'refresh' / '00000006'
  stamp = (folder / atomic.MANIFEST).stat().st_mtime_ns
  assert refreshes.refresh(run, 6) == first
  assert (folder / atomic.MANIFEST).stat().st_mtime_ns == stamp
  deeper = with_settings(run, top_k=12)
  refreshes.refresh(deeper, 6)
  assert refreshes.load(deeper, 6).negatives.shape[1] == 12


def test_an_index_that_is_not_exact_finds_most_of_what_flat_finds(open_run):
  run = open_run()
  refreshes.refresh(run, 6)
  exact = np.array(refreshes.load(run, 6).negatives)
  for index, params, least in (
    ('IVF8,Flat', 'nprobe=4', 0.6),
    ('SQ8', '', 0.8),
    ('SQfp16', '', 0.95),
  ):
    other = with_settings(run, index=index, index_params=params)
    assert refreshes.refresh(other, 6)['index'] == index
    assert agreement(refreshes.load(other, 6).negatives, exact) > least


def test_an_index_on_the_devices_finds_what_flat_finds(open_run):
  run = open_run(num_devices=2, search_memory_mb=1)
  manifests, tables = [], []
  for where in ('Flat', 'device'):
    manifests.append(refreshes.refresh(with_settings(run, index=where), 6))
    tables.append(
      np.array(refreshes.load(with_settings(run, index=where), 6).negatives)
    )
  np.testing.assert_array_equal(*tables)
  assert [found['index'] for found in manifests] == ['Flat', 'device']
  dev = [found['metrics']['dev/mrr@10'] for found in manifests]
  assert dev[0] == dev[1]


def test_an_index_is_centered_on_request_and_its_refresh_another(open_run):
  run = open_run()
  refreshes.refresh(run, 6)
  plain = np.array(refreshes.load(run, 6).negatives)
  centered = with_settings(run, center_passages=True)
  assert refreshes.refresh(centered, 6)['center_passages']
  # The same order, but for scores that rounding can tell apart or not.
  assert agreement(refreshes.load(centered, 6).negatives, plain) > 0.995
  shapes = bi_encoder.shapes(run.retriever.config)
  params = checkpoint.read_params(run.workdir, 6, shapes, run.devices)
  means = [
    indexed.passage_index.reconstruct_n(0, len(run.dataset.passages)).mean(0)
    for indexed in (
      one.with_params(params).index_corpus(logs.Stopwatch())
      for one in (run, centered)
    )
  ]
  assert np.abs(means[0]).max() > 1e-2
  np.testing.assert_allclose(means[1], 0, atol=1e-6)


def test_the_manifest_says_what_was_made_of_what(open_run):
  run = open_run()
  refreshes.refresh(run, 3)
  manifest = refreshes.refresh(run, 6, before=3)
  assert manifest['step'] == 6
  assert manifest['passages'] == run.dataset.passages.hash
  assert manifest['top_k'] == 10
  assert set(manifest['secs']) == {
    'encode',
    'index',
    'search',
    'probe',
    'mine',
    'evaluate',
  }
  values = manifest['metrics']
  assert 0 < values['refresh/overlap'] < 1
  assert values['refresh/judged'] > 0
  # Passages 0 to 19 come in pairs of one text.
  assert values['refresh/same_text'] > 0
  assert len(manifest['examples']) == 3
  published = atomic.read_manifest(run.workdir / 'refresh' / '00000006')
  assert published['metrics'] == values
  arrays = 'negatives', 'scores', 'positive_scores', 'ranks', 'right'
  assert set(published['files']) == {f'{name}.npy' for name in arrays}


def test_bm25_negatives_are_the_filtered_bm25_ranking(open_run):
  run = open_run()
  negatives = negatives_lib.by_bm25(run).negatives
  stamp = (run.workdir / 'bm25' / atomic.MANIFEST).stat().st_mtime_ns
  np.testing.assert_array_equal(negatives, negatives_lib.by_bm25(run).negatives)
  assert (run.workdir / 'bm25' / atomic.MANIFEST).stat().st_mtime_ns == stamp
  rank = negatives_lib.bm25.make_rank(
    list(negatives_lib.tokens.passage_texts(run.dataset.corpus, ' ')),
    k1=0.9,
    b=0.4,
  )
  queries, passages = run.dataset.splits['train'].positives()
  for query in range(len(negatives)):
    (ranking,) = rank([run.dataset.splits['train'].texts[query]], 100).rows
    banned = run.dataset.corpus.groups[passages[queries == query]]
    kept = [
      p
      for p in ranking
      if p >= 0 and run.dataset.corpus.groups[p] not in banned
    ]
    kept = kept[: run.config.top_k]
    assert negatives[query, : len(kept)].tolist() == kept


def test_bm25_negatives_are_made_again_in_another_language(open_run, capsys):
  run, manifests, kept = open_run(), [], []
  folder = run.workdir / 'bm25'
  for language in ('english', 'none', 'auto'):
    other = with_settings(run, bm25_language=language)
    kept.append(np.array(negatives_lib.by_bm25(other).negatives))
    manifests.append(atomic.read_manifest(folder))
    shown = 'english (auto' if language == 'auto' else f'{language}\n'
    assert f'--bm25_language={shown}' in capsys.readouterr().out
  assert [m['language'] for m in manifests] == ['english', 'none', 'auto']
  # What an earlier version left does not say; it is made again, and the same.
  del manifests[2]['language'], manifests[2]['files']
  atomic.commit(folder, manifests[2])
  np.testing.assert_array_equal(negatives_lib.by_bm25(run).negatives, kept[0])
  assert atomic.read_manifest(folder)['language'] == 'auto'


def test_negatives_that_bm25_does_not_find_are_counted(open_run, capsys):
  run = open_run(top_k=40)
  table = np.array(negatives_lib.by_bm25(run).negatives)
  texts = list(negatives_lib.tokens.passage_texts(run.dataset.corpus, ' '))
  queries = list(run.dataset.splits['train'].texts)
  found = negatives_lib.bm25.make_rank(texts, k1=0.9, b=0.4)(queries, 100)
  drawn = sum(
    len(set(row) - set(ranked))
    for row, ranked in zip(table.tolist(), found.rows.tolist(), strict=True)
  )
  assert drawn
  share = f'{drawn:,} drawn at random ({drawn / table.size:.1%} of all) where'
  assert share in capsys.readouterr().out


def test_queries_that_bm25_finds_nothing_for_are_told_or_refused(
  open_run, capsys
):
  run = open_run()
  split = run.dataset.splits['train']
  for lost, is_refused in ((24, False), (25, True)):  # Of 48.
    texts = ['zebra'] * lost + list(split.texts)[lost:]
    other = with_settings(with_split(run, texts=texts), seed=lost)
    if is_refused:
      with pytest.raises(errors.BadInput, match='for 25 of 48 queries'):
        negatives_lib.by_bm25(other)
    else:
      assert (np.array(negatives_lib.by_bm25(other).negatives) >= 0).all()
      assert 'no passage for 24 of 48 queries' in capsys.readouterr().out


def test_same_texts_can_be_let_in(open_run):
  run = open_run(method='ance_in_batch', drop_same_text=False)
  step = checkpoint.committed_steps(run.workdir)[-1]
  assert refreshes.refresh(run, step)['metrics']['refresh/same_text'] == 0
  of_rows = experiment.training_data(run, methods.METHODS['ance_in_batch'])
  assert len(set(of_rows.groups.tolist())) == len(run.dataset.passages)


def test_a_run_file_is_taken_for_the_ranking_of_bm25(open_run, tmp_path):
  run = open_run(method='bm25')
  ranked = evaluate.run(
    dataclasses.replace(
      run.config,
      job='evaluate',
      retriever='bm25',
      split='train',
      workdir=str(tmp_path / 'bm25'),
    )
  )
  assert ranked['mrr@10'] > 0
  path = tmp_path / 'bm25' / 'train-bm25-0.trec'
  # The order of the lines says nothing, but between equal scores.
  lines = path.read_text().splitlines()
  lines.sort(key=lambda line: float(line.split()[4]))
  path.write_text('\n'.join(lines) + '\nother Q0 p1 1 2.5 x\n')
  of_file = with_settings(run, bm25_run=str(path), top_k=5)
  expected = np.array(
    negatives_lib.by_bm25(with_settings(run, top_k=5)).negatives
  )
  found = np.array(negatives_lib.by_bm25(of_file).negatives)
  np.testing.assert_array_equal(found, expected)
  path.write_text('\n'.join(lines[:50]) + '\n')
  assert (np.array(negatives_lib.by_bm25(of_file).negatives) != found).any()


def test_each_refresh_draws_the_columns_of_its_seed_and_step(monkeypatch):
  table = np.arange(60, dtype=np.int32).reshape(6, 10)
  selected = miner.Table(table, table / 2, np.zeros(9), None, 0, 0)
  watch = logs.Stopwatch()
  watch.secs['search'] = 0.0
  monkeypatch.setattr(
    negatives_lib, 'select_negatives', lambda *_, **__: (selected, {})
  )
  drawn = {}
  for seed, step in ((0, 4), (0, 8), (4, 0), (8, 4)):
    config = config_lib.Config(
      method='ance_code', seed=seed, num_hard_negatives=3
    )
    run = SimpleNamespace(
      config=config,
      dataset=SimpleNamespace(queries={'train': range(6)}, splits=NO_ANSWERS),
      encode_queries=lambda *_: None,
    )
    mined, _ = refreshes._mine(run, step, None, watch)
    drawn[seed, step] = mined.negatives
    np.testing.assert_array_equal(mined.scores, mined.negatives / 2)
    order = np.random.default_rng([seed, step]).random(table.shape).argsort(1)
    expected = np.take_along_axis(table, order[:, :3], 1)
    np.testing.assert_array_equal(drawn[seed, step], expected)
  assert len({rows.tobytes() for rows in drawn.values()}) == 4


def test_each_source_of_each_refresh_has_a_draw_of_its_own():
  table = np.arange(60, dtype=np.int32).reshape(6, 10)
  names = 'index', 'lookahead', 'bm25', 'given'
  drawn = set()
  for seed, step, name in itertools.product((0, 4), (0, 4, 8), names):
    config = config_lib.Config(
      method='ance_tele', negatives_per_source=3, seed=seed
    )
    found, again = (
      refreshes._some_of(config, table, name, step) for _ in range(2)
    )
    np.testing.assert_array_equal(found, again)
    assert all(len(set(row)) == 3 for row in found.tolist())
    assert (found // 10 == np.arange(6)[:, None]).all()
    drawn.add(found.tobytes())
  assert len(drawn) == 2 * 3 * 4
  # What an episode takes over from the one before is taken over whole.
  whole = refreshes._some_of(config, table, 'momentum', 8)
  np.testing.assert_array_equal(whole, table)


@pytest.mark.parametrize('by_teacher', [False, True])
def test_scores_of_a_slice_begin_at_its_first_positive(by_teacher):
  """The queries have 2, 1, 1 and 1 positives; the slice is of the last two."""
  pairs = np.array([0, 0, 1, 2, 3]), np.array([9, 8, 7, 6, 5])
  run = SimpleNamespace(
    config=config_lib.Config(method='ance'),
    dataset=SimpleNamespace(
      splits={'train': SimpleNamespace(shared_positives=lambda last: pairs)},
      queries={'train': range(4)},
    ),
  )
  names = ('taught', 'positive_taught') if by_teacher else (
    'scores', 'positive_scores'
  )  # fmt: skip
  values = np.array([[1.0], [2.0]]), np.array([10.0, 20.0])
  stored = negatives_lib.Stored(
    np.array([[1], [2]]), **dict(zip(names, values, strict=True))
  )
  found = refreshes.of_table(run, 2, stored, since=6)
  assert found.rows.tolist() == [2, 3]
  assert found.first_pair == 3
  assert found.since == 6


def test_what_is_near_the_first_positive_has_the_scores_of_the_query():
  random = np.random.default_rng(0)
  passages, queries = random.normal(size=(30, 4)), random.normal(size=(3, 4))

  def rank(vectors, depth):
    scores = vectors @ passages.T
    rows = (-scores).argsort(1)[:, :depth]
    return trec.Ranking(rows, np.take_along_axis(scores, rows, 1))

  indexed = SimpleNamespace(
    embeddings=lambda rows: passages[rows],
    rank=rank,
    scores=lambda vectors, rows: np.einsum(
      'qe,qke->qk', vectors, passages[rows]
    ),
  )
  positives = np.array([0, 0, 1, 2, 3, 3, 4]), np.array([9, 8, 7, 6, 5, 4, 3])
  split = SimpleNamespace(shared_positives=lambda last: positives)
  run = SimpleNamespace(
    config=config_lib.Config(method='ance_tele'),
    dataset=SimpleNamespace(splits={'train': split}),
  )
  # The slice of queries 2 to 4.
  by_index = candidates.of_index(indexed, queries, 'index', 2)
  ahead = refreshes._lookahead(run, indexed, by_index, (2, 5))
  found = ahead.rank(np.array([4, 2, 3]), 6)
  near = rank(passages[[3, 6, 5]], 6).rows
  np.testing.assert_array_equal(found.rows, near)
  expected = np.take_along_axis(queries[[2, 0, 1]] @ passages.T, near, 1)
  np.testing.assert_allclose(found.scores, expected)


def test_a_search_in_blocks_costs_as_much_as_in_one(monkeypatch):
  """Search time is not counted as mining time."""
  config = config_lib.Config(
    method='ance', query_slices=2, steps_per_refresh=4, max_steps=9
  )
  run = SimpleNamespace(
    config=config,
    dataset=SimpleNamespace(queries={'train': range(6)}, splits=NO_ANSWERS),
    encode_queries=lambda split, watch, rows: rows,
  )
  indexed = SimpleNamespace(
    search_flops=lambda number: 10 * number,
    rank=lambda queries, depth: (queries.tolist(), depth),
  )
  watch, searched = logs.Stopwatch(), []
  watch.secs['search'] = 50.0

  def select_negatives(run, method, source, rows, what, holds_answer):
    assert holds_answer is None
    blocks = np.array([3, 4]), np.array([5])
    searched.extend(source.rank(block, 7) for block in blocks)
    watch.secs['search'] += 100
    return SimpleNamespace(rows=None, scores=None, positive_scores=None), {}

  monkeypatch.setattr(negatives_lib, 'select_negatives', select_negatives)
  refreshes._mine(run, 4, indexed, watch)
  assert searched == [([3, 4], 7), ([5], 7)]
  assert watch.flops == {'search': 30}
  assert watch.secs['mine'] == pytest.approx(-100, abs=9)


def scores_of(run, step):
  """All (Q, N) scores of training queries, and the least of their positives."""
  shapes = bi_encoder.shapes(run.retriever.config)
  params = checkpoint.read_params(run.workdir, step, shapes, run.devices)
  watch = logs.Stopwatch()
  indexed = run.with_params(params).index_corpus(watch)
  queries = run.with_params(params).encode_queries('train', watch)
  scores = queries @ np.concatenate(indexed.blocks).T
  of_query, positives = run.dataset.splits['train'].shared_positives()
  least = np.full(len(scores), np.inf, np.float32)
  np.minimum.at(least, of_query, scores[of_query, positives])
  return scores, least


def arrays_of(run, step):
  """The negatives of a refresh, their scores and those of positives."""
  names = 'negatives', 'scores', 'positive_scores'
  folder = refreshes.folder(run, step)
  return [np.load(folder / f'{name}.npy') for name in names]


@pytest.mark.parametrize(
  'changes',
  [
    {'index': 'SQ8'},
    {'center_passages': True},
    {'method': 'ance_code'},
    {'query_slices': 3},
  ],
)
def test_scores_are_published_of_negatives_and_positives(changes, open_run):
  """Those of the embeddings, whatever an index does with them."""
  run = open_run(method='ance_in_batch', num_hard_negatives=3)
  run = with_settings(run, **changes)
  start, end = refreshes.refresh(run, 6)['query_slice']
  assert (start, end) == ((16, 32) if 'query_slices' in changes else (0, 48))
  negatives, scores, positive_scores = arrays_of(run, 6)
  expected, _ = scores_of(run, 6)
  assert scores.dtype == positive_scores.dtype == np.float32
  assert scores.shape == negatives.shape
  of_negatives = np.take_along_axis(expected[start:end], negatives, 1)
  np.testing.assert_allclose(scores, of_negatives, atol=1e-5)
  last = changes.get('method') == 'ance_code'
  pairs = np.stack(run.dataset.splits['train'].shared_positives(last=last))
  queries, passages = pairs[:, (pairs[0] >= start) & (pairs[0] < end)]
  of_positives = expected[queries, passages]
  np.testing.assert_allclose(positive_scores, of_positives, atol=1e-5)


@pytest.mark.parametrize('on_shortage', ['keep', 'drop', 'fill', None])
def test_a_refresh_follows_the_rules_of_its_run(on_shortage, open_run):
  rules = {
    'skip_ranks': 1, 'max_rank': 30, 'max_score': 0.97,
    'absolute_margin': 0.02, 'on_shortage': on_shortage,
  }  # fmt: skip
  run = open_run(method='ance_in_batch', **rules)
  manifest = refreshes.refresh(run, 6)
  assert manifest['rules'] == {n: v for n, v in rules.items() if v is not None}
  table, scores, _ = arrays_of(run, 6)
  every, least = scores_of(run, 6)
  of_query, positives = run.dataset.splits['train'].shared_positives()
  counts = dict.fromkeys(('skip_ranks', 'max_score', 'absolute_margin'), 0)
  short = 0
  for query, row in enumerate(table):
    banned = run.dataset.corpus.groups[positives[of_query == query]]
    left = [
      p
      for p in np.lexsort((np.arange(len(every[query])), -every[query]))
      if run.dataset.corpus.groups[p] not in banned
    ][:30]
    above = [p for p in left[1:] if every[query, p] > 0.97]
    kept = [p for p in left[1:] if p not in above]
    within = [p for p in kept if every[query, p] >= least[query] - 0.02]
    kept = [p for p in kept if p not in within][:10]
    counts['skip_ranks'] += 1
    counts['max_score'] += len(above)
    counts['absolute_margin'] += len(within)
    short += len(kept) < 10
    if on_shortage == 'drop' and len(kept) < 10:
      kept = []
    assert row[: len(kept)].tolist() == kept
    drawn = row[len(kept) :]
    assert ((drawn >= 0) == (on_shortage in ('fill', None))).all()
    assert not np.isin(drawn, [*left[:1], *above, *within]).any()
  assert 0 < short < len(table)
  found = manifest['metrics']
  assert {name: found[f'refresh/{name}'] for name in counts} == counts
  text = f'absolute_margin {counts["absolute_margin"]:,}'
  assert text in refreshes.summary(manifest)
  assert np.isfinite(scores[table >= 0]).all()
  plain = with_settings(
    run, **{name: getattr(config_lib.Config, name) for name in rules}
  )
  assert 'set of rules' in refreshes.refusal(plain, manifest)


def test_rules_of_scores_are_not_for_the_negatives_of_a_warm_up(open_run):
  rules = {'max_score': -1.0, 'on_shortage': 'drop'}
  tables = [
    np.array(
      negatives_lib.by_bm25(open_run(name, method=name, **rules)).negatives
    )
    for name in ('ance_in_batch', 'bm25')
  ]
  assert (tables[0] >= 0).all()
  assert (tables[1] < 0).all()


def test_a_file_of_scores_says_what_is_no_negative(open_run, tmp_path):
  run = open_run(method='ance_in_batch')
  refreshes.refresh(run, 6)
  before = np.array(refreshes.load(run, 6).negatives)
  ids, queries = run.dataset.corpus.ids, run.dataset.splits['train'].ids
  path = tmp_path / 'scores.trec'
  path.write_text(
    ''.join(
      f'{queries[query]} Q0 {ids[int(row)]} 1 {column % 2} x\n'
      for query, rows in enumerate(before)
      for column, row in enumerate(rows)
    )
  )
  rules = {'score_run': str(path), 'rerank_max_score': 0.5}
  run = with_settings(run, on_shortage='keep', **rules)
  manifest = refreshes.refresh(run, 6)
  table = refreshes.load(run, 6).negatives
  np.testing.assert_array_equal(table[:, :5], before[:, ::2])
  assert (table[:, 5:] < 0).all()
  assert manifest['metrics']['refresh/rerank_max_score'] == before.size / 2


def test_a_rule_of_scores_is_for_the_first_top_k_candidates(open_run):
  """Those behind, which only a deep block has, do not make up for them."""
  run = open_run(method='ance_in_batch')
  refreshes.refresh(run, 6)
  before, scores, _ = arrays_of(run, 6)
  most = float(np.median(scores))
  run = with_settings(run, max_score=most, on_shortage='keep')
  refreshes.refresh(run, 6)
  for found, rows, row in zip(
    arrays_of(run, 6)[0], before, scores, strict=True
  ):
    assert found[found >= 0].tolist() == rows[row <= most].tolist()


def test_rules_that_a_run_cannot_follow_are_refused(open_run):
  run = open_run(method='given', min_score=0.5)
  run = with_split(run, negatives=[[1, 2, 3]] * conftest.NUM_TRAIN)
  with pytest.raises(errors.BadInput, match='^--min_score needs scores'):
    negatives_lib.check(run)
  run = with_settings(run, method='ance', skip_ranks=6, max_rank=15)
  with pytest.raises(errors.BadInput, match='^--top_k=10 does not fit'):
    negatives_lib.check(run)
  negatives_lib.check(with_settings(run, max_rank=16))


@pytest.mark.parametrize('method', ['ance_code', 'ance_in_batch'])
def test_training_goes_on_without_queries_that_the_rules_left_none(
  method, tiny
):
  config = dataclasses.replace(
    tiny, method=method, num_devices=1, max_steps=6, steps_per_refresh=4,
    num_hard_negatives=2, relative_margin=0.02, on_shortage='keep',
  )  # fmt: skip
  train.run(config)
  run = experiment.open(config, ('train', 'dev'))[0]
  table = refreshes.load(run, 4).negatives
  none = table[:, 0] < 0
  assert 0 < none.sum() < len(table)
  found = refreshes.negatives_for(run, methods.METHODS[method], (4, 4))
  np.testing.assert_array_equal(found.rows, np.flatnonzero(~none))
  values = logs.series(config.workdir, 'refresh/relative_margin')
  assert values[4] > 0
  page = (run.workdir / 'report.html').read_text()
  assert '<th>relative margin</th>' in page
