"""Two rare settings at once, against slow versions in plain Python."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import devices
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import trec
from ance_jax.mining import candidates
from ance_jax.mining import filters
from ance_jax.mining import miner
from ance_jax.retrieval import index
from ance_jax.training import methods
from ance_jax.training import negatives
from ance_jax.training import refreshes as refreshes_lib
from ance_jax.training import schedule

NUM_QUERIES, TOP_K = 12, 6
# Two have one text; 2 and 3 stand in the corpus.
TEXTS = [f'query {n % 9}' for n in range(NUM_QUERIES)]


def world(seed, answers, patterns):
  """A corpus of many duplicates, and a split of it with answers."""
  random = np.random.default_rng(seed)
  texts = [
    f'text {n} {"abcdefgh"[n % 8]}' for n in random.integers(30, size=40)
  ]
  texts[5:9] = TEXTS[2], TEXTS[2], TEXTS[3], 'Query  3'
  corpus = corpus_lib.make_corpus(map(str, range(40)), [''] * 40, texts)
  judged = {
    (query, int(passage)): int(random.integers(3))
    for query in range(NUM_QUERIES)
    for passage in random.choice(40, 3, replace=False)
  }
  judged.update({(query, query + 20): 1 for query in range(NUM_QUERIES)})
  letters = {n: [random.choice(list('abcdefgh'))] for n in range(NUM_QUERIES)}
  split = corpus_lib.make_split(
    corpus_lib.RawSplit(
      list(map(str, range(NUM_QUERIES))), TEXTS, judged,
      answers=letters if answers else None,
      own={1: 30, 4: 31}, answers_are_patterns=patterns,
    ),
    corpus,
  )  # fmt: skip
  return corpus, texts, split, judged, letters


def slow_banned(query, texts, judged, last, same_text):
  """Returns a query's positives, these and their texts, all it may not have."""
  positives = set()
  for other in range(NUM_QUERIES):
    if TEXTS[other] == TEXTS[query]:
      own = [p for (q, p), grade in judged.items() if q == other and grade > 0]
      positives |= set(own[-1:] if last else own)
  normal = [' '.join(text.lower().split()) for text in texts]
  itself = {1: {30}, 4: {31}}.get(query, set())
  itself |= {p for p in range(40) if normal[p] == TEXTS[query]}
  sets = [positives, positives | itself]
  if same_text and not last:
    known = [{normal[p] for p in rows} for rows in sets]
    sets = [{p for p in range(40) if normal[p] in texts} for texts in known]
  return positives, *sets


def of_rows(rows):
  """A ranking whose scores tell of which passage they are."""
  rows = np.array(rows, np.int32)
  return trec.Ranking(rows, rows.astype(np.float32))


def select(run, method, rank, rows):
  source = candidates.CandidateSource('slow', rank)
  return negatives.select_negatives(run, method, source, rows, 'x')


@pytest.mark.parametrize('answers', ['none', 'words', 'patterns', 'allowed'])
@pytest.mark.parametrize('name', ['ance', 'ance_code', 'ance_code_qa'])
@pytest.mark.parametrize('same_text', [True, False])
def test_negatives_of_slices_are_those_of_slow_rules(answers, name, same_text):
  method = methods.METHODS[name]
  if answers == 'none' and method.without_answers:
    return
  corpus, texts, split, judged, letters = world(
    1, answers != 'none', answers == 'patterns'
  )
  config = config_lib.Config(
    method=name, top_k=TOP_K, drop_same_text=same_text,
    drop_answers=False if answers == 'allowed' else None,
  )  # fmt: skip
  data = SimpleNamespace(corpus=corpus, splits={'train': split})
  run = SimpleNamespace(config=config, dataset=data)
  random = np.random.default_rng(7)
  orders = [random.permutation(40) for _ in TEXTS]
  drops = answers in ('words', 'patterns') and not method.without_answers
  for start, end in ((0, 5), (5, 9), (9, 12), (0, 12)):
    depths, taken = [], []

    def rank(rows, depth, depths=depths):
      depths.append(depth)
      return of_rows([orders[row][:depth] for row in rows])

    selected, counts = select(run, method, rank, (start, end))
    table = selected.rows
    assert len(table) == end - start
    with_answer = 0
    for query, row in zip(range(start, end), table.tolist(), strict=True):
      held = {p for p in range(40)
              if letters[query][0] in texts[p].split()}  # fmt: skip
      positives, alike, banned = slow_banned(
        query, texts, judged, method.last_positive, same_text
      )
      ranked = set(orders[query][: depths[0]].tolist())
      sets = positives, alike - positives, banned - alike, held - banned
      taken.append([len(ranked & rows) for rows in sets])
      kept = [p for p in orders[query].tolist() if p not in banned]
      if method.without_answers:
        first = kept[:TOP_K]
        kept = [p for p in first if p not in held]
        with_answer += TOP_K - len(kept)
        kept += [-1] * (TOP_K - len(kept))
      elif drops:
        kept = [p for p in kept if p not in held]
      assert row == kept[:TOP_K], (query, start)
    assert counts['random'] == 0
    scores = np.where(table < 0, np.nan, table)
    np.testing.assert_array_equal(selected.scores, scores)
    names = ['judged', 'same_text', 'own_text', *(['answers'] if drops else [])]
    sums = np.sum(taken, 0).tolist()
    assert [counts[name] for name in names] == sums[: len(names)]
    if method.without_answers:
      empty = [row for row in table.tolist() if row[0] < 0]
      assert counts['answers'] == with_answer > 0
      assert counts['no_negatives'] == len(empty)


def test_what_fills_up_a_short_ranking_holds_no_answer_and_is_no_positive(
  tmp_path, monkeypatch
):
  corpus, texts, split, judged, letters = world(1, True, False)
  run = SimpleNamespace(
    config=config_lib.Config(top_k=TOP_K),
    dataset=SimpleNamespace(corpus=corpus, splits={'train': split}),
    workdir=tmp_path,
  )

  def rank(rows, depth):  # Ends after three.
    return of_rows(np.tile([0, 1, 2], (len(rows), 1)))

  selected, counts = select(run, methods.METHODS['ance'], rank, (4, 12))
  table = selected.rows
  drawn = 0
  for query, row in zip(range(4, 12), table.tolist(), strict=True):
    *_, banned = slow_banned(query, texts, judged, False, True)
    banned |= {p for p in range(40)
               if letters[query][0] in texts[p].split()}  # fmt: skip
    kept = [p for p in (0, 1, 2) if p not in banned]
    assert row[: len(kept)] == kept
    assert len(set(row)) == TOP_K
    assert not banned & set(row)
    drawn += TOP_K - len(kept)
  assert counts['random'] == drawn
  assert counts['for_want_of_others'] == 0
  # A refresh with the same candidates matches no answer again.
  source = candidates.CandidateSource('slow', rank)
  for _ in range(2):
    known = negatives.known_of(run)
    again, counted = negatives.select_negatives(
      run, methods.METHODS['ance'], source, (4, 12), 'x', holds_answer=known
    )
    np.testing.assert_array_equal(again.rows, table)
    assert counted == counts
    known.save()
    monkeypatch.setattr(
      negatives.candidates, 'answer_matcher', lambda corpus, split: None
    )


@pytest.mark.parametrize('pieces', [False, True])
@pytest.mark.parametrize('center', [False, True])
@pytest.mark.parametrize('where', ['Flat', 1, 3])
def test_centered_pieces_on_any_index_rank_by_the_best_piece(
  where, center, pieces
):
  random = np.random.default_rng(0)
  passages = random.integers(-3, 4, (60, 4)).astype(np.float32)
  passages -= passages.mean(0).round()
  queries = random.integers(-3, 4, (9, 4)).astype(np.float32)
  blocks = np.array_split(passages, 3)
  texts_of = np.sort(random.integers(20, size=60)).astype(np.int32)
  texts_of = np.unique(texts_of, return_inverse=True)[1].astype(np.int32)
  made = (
    index.build(where, '', blocks, center=center)
    if where == 'Flat'
    else index.place(blocks, devices.local(where), 8, center=center)
  )
  scores = queries @ passages.T
  if not pieces:
    found, texts_of = index.search(made, queries, 7), np.arange(60)
  else:
    found = index.search_pieces(made, texts_of, queries, 7)
  less = queries @ passages.mean(0) if center else np.zeros(9)
  for query, row in enumerate(scores):
    best = {}
    for piece, score in enumerate(row.tolist()):
      text = int(texts_of[piece])
      best[text] = max(best.get(text, -np.inf), score)
    expected = sorted(best.values(), reverse=True)[:7]
    np.testing.assert_allclose(
      found.scores[query] + less[query], expected, atol=1e-5
    )
    mine = [best[text] for text in found.rows[query].tolist()]
    assert mine == expected
    assert len(set(found.rows[query].tolist())) == 7
  given = None if not pieces else texts_of
  exact = index.exact_scores(blocks, queries, found.rows, given)
  np.testing.assert_allclose(exact, found.scores + less[:, None], atol=1e-5)


@pytest.mark.parametrize('seed', range(4))
def test_delay_schedule_slices_and_a_limit_together_are_those_of_a_loop(seed):
  random = np.random.default_rng(seed)
  every, later, delay, slices, most, warmup = random.integers(
    [2, 2, 1, 2, 0, 0], [7, 9, 12, 4, 5, 9]
  ).tolist()
  config = config_lib.Config(
    method='ance', max_steps=60, warmup_steps=warmup, max_refreshes=most,
    refresh_schedule=f'0-20:{every},20-:{later}', query_slices=slices,
    refresh_mode='delayed', refresh_delay=delay, steps_per_eval=7,
    steps_per_checkpoint=11,
  )  # fmt: skip
  refreshes, step = [], warmup
  while step < 60 and (not most or len(refreshes) < most):
    refreshes.append(step)
    step += every if step < 20 else later
  in_use = {n + delay if n else 0: n for n in refreshes}
  boundaries = {0, 60, *refreshes, *range(0, 60, 7), *range(0, 60, 11)}
  boundaries |= {n for n in in_use if n <= 60}
  boundaries |= {delay} if not warmup else set()  # Where nothing is due.
  for step in range(60):
    first = min(n for n in boundaries if n > step)
    assert schedule.next_boundary(config, step) == first
  for step in range(61):
    assert schedule.refresh_due(config, step) == (step in refreshes)
    assert schedule.comes_into_use(config, step) == in_use.get(step)
    assert schedule.save_due(config, step) == (
      step in refreshes or step % 11 == 0 or step == 60
    )
  for number, step in enumerate(refreshes):
    assert schedule.query_slice(config, step) == number % slices
  for first, last in itertools.combinations((0, 9, 20, 33, 60), 2):
    assert schedule.refreshes_between(config, first, last) == [
      n for n in refreshes if first < n < last
    ]
  sync = dataclasses.replace(config, refresh_mode='sync', refresh_delay=0)
  assert [n for n in range(61) if schedule.comes_into_use(sync, n) == n] == (
    refreshes
  )
  # Room is kept for as much as there is without a refresh.
  for every in (7, 60, 99, None):
    plain = dataclasses.replace(sync, method='in_batch', steps_per_eval=every)
    counts = schedule.num_encodings(plain), schedule.num_saves(plain)
    for due, count in zip(
      (schedule.eval_due, schedule.save_due), counts, strict=True
    ):
      assert count == sum(due(plain, n) for n in range(61))


@pytest.mark.parametrize(
  ('name', 'slices', 'missing', 'rows', 'since'),
  [
    # All queries: their order goes on whatever was refreshed in between.
    ('ance', 1, [], range(6), 0),
    ('ance_code', 1, [], range(6), 9),
    ('ance', 2, [], range(3, 6), 9),
    ('ance_code', 2, [], range(3, 6), 9),
    ('ance_code_qa', 1, [0, 4], [1, 2, 3, 5], 9),
    ('ance_code_qa', 2, [1], [3, 5], 9),
  ],
)
def test_negatives_in_use_are_of_the_queries_that_have_any(
  name, slices, missing, rows, since, monkeypatch
):
  config = config_lib.Config(
    method=name, query_slices=slices, steps_per_refresh=4, max_steps=20
  )
  run = SimpleNamespace(
    config=config, dataset=SimpleNamespace(queries={'train': range(6)})
  )
  table = np.arange(6 // slices)[:, None] + [[0, 10]]
  table[missing] = -1
  stored = negatives.Stored(table)
  monkeypatch.setattr(refreshes_lib, 'load', lambda *_: stored)
  in_use = schedule.ActiveRefresh(9, 4)
  found = refreshes_lib.negatives_for(run, methods.METHODS[name], in_use)
  assert found.rows.tolist() == list(rows)
  assert found.since == since
  there = [n for n in range(6 // slices) if n not in missing]
  np.testing.assert_array_equal(found.passages, table[there])
  table[:] = -1
  with pytest.raises(errors.BadInput, match='mining left none of'):
    refreshes_lib.negatives_for(run, methods.METHODS[name], in_use)


def test_a_run_that_may_end_its_warm_up_early_may_refresh_more_often():
  config = config_lib.Config(
    method='ance', max_steps=20, warmup_steps=16, steps_per_refresh=4,
    steps_per_eval=2, warmup_until_plateau=1,
  )  # fmt: skip
  most = 0
  for scores in itertools.product((0, 1), repeat=8):
    end = schedule.end_of_warmup(
      config, dict(zip(range(0, 16, 2), scores, strict=True))
    )
    ended = dataclasses.replace(config, warmup_steps=end)
    most = max(
      most,
      schedule.num_refreshes(
        dataclasses.replace(ended, warmup_until_plateau=0)
      ),
    )
  # At least as many as room is kept for.
  assert schedule.num_refreshes(config) >= most > 1


@pytest.mark.parametrize('slices', [1, 2, 3, 7, 11])
def test_slices_in_turn_have_each_query_once(slices):
  config = config_lib.Config(
    method='ance', query_slices=slices, steps_per_refresh=1, max_steps=99
  )
  run = SimpleNamespace(
    config=config, dataset=SimpleNamespace(queries={'train': range(11)})
  )
  for turn in range(2):
    found = [
      refreshes_lib._query_slice(run, turn * slices + n) for n in range(slices)
    ]
    assert [row for rows in found for row in range(*rows)] == list(range(11))


@pytest.mark.parametrize('where', ['Flat', 2])
def test_a_text_of_many_good_pieces_leaves_room_for_the_others(where):
  values = np.array([*[9] * 30, 5, 4, 3, 2, 1], np.float32)
  blocks = [np.stack([values, values], 1)]
  texts_of = np.array([*[0] * 30, 1, 2, 3, 4, 5], np.int32)
  made = (
    index.build(where, '', blocks)
    if where == 'Flat'
    else index.place(blocks, devices.local(where), 8)
  )
  queries = np.ones((3, 2), np.float32)
  found = index.search_pieces(made, texts_of, queries, 5)
  assert found.rows.tolist() == [[0, 1, 2, 3, 4]] * 3
  assert found.scores.tolist() == [[18, 10, 8, 6, 4]] * 3


EVERY_RULE = {
  'skip_ranks': 2, 'max_rank': 30, 'max_score': 0.9, 'min_score': 0.1,
  'absolute_margin': 0.2, 'relative_margin': 0.3, 'z_margin': 0.4,
  'center_scores': True, 'rerank_max_score': 0.8,
}  # fmt: skip


@pytest.mark.parametrize(
  ('flags', 'rules', 'on_shortage'),
  [
    ({}, {}, 'fill'),
    # Any lower rank may take the place of one that is left out, until a score
    # or a draw has to choose among so many.
    ({'skip_ranks': 3}, {}, 'fill'),
    ({'skip_ranks': 3, 'choose': 'random'}, {'max_rank': 11}, 'fill'),
    ({'z_margin': 0.0, 'on_shortage': 'keep'}, {'max_rank': 8}, 'keep'),
    (
      {'rerank_max_score': 0.0, 'skip_ranks': 1, 'score_run': '/x'},
      {'max_rank': 9},
      'fill',
    ),
    ({'score_run': '/x', 'choose': 'random', **EVERY_RULE}, {}, 'fill'),
  ],
)
def test_a_run_mines_by_each_of_its_rules_but_in_its_warm_up(
  flags, rules, on_shortage
):
  config = config_lib.Config(method='ance', top_k=6, seed=5, **flags)
  asked = {n: v for n, v in flags.items() if n in filters.Rules._fields}
  expected = filters.Rules(**{**asked, **rules, 'num_scores': 6})
  choose = 'random' if 'choose' in flags else 'top'
  found = negatives._settings(config, methods.METHODS['ance_in_batch'], 8, 2)
  assert found == miner.Settings(8, expected, choose, on_shortage, 2, 5)
  warming_up = negatives._settings(config, methods.METHODS['dpr'], 8, None)
  assert warming_up == miner.Settings(
    8, filters.Rules(), 'top', 'fill', None, 5
  )
