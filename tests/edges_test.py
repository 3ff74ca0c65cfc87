"""Checks of numbers at their edge: one below it, at it, one above it."""

import dataclasses
import math
import re
from types import SimpleNamespace

from bad_input_tools import refused
import filters_test
import fingerprint_test
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import config_checks
from ance_jax import errors
from ance_jax.core import distributed
from ance_jax.data import corpus as corpus_lib
from ance_jax.jobs import footprint
from ance_jax.jobs import mine
from ance_jax.jobs import systems
from ance_jax.mining import filters
from ance_jax.models import pretrained
from ance_jax.models import sources
from ance_jax.training import checks
from ance_jax.training import experiment
from ance_jax.training import negatives
from ance_jax.training import refreshes
from ance_jax.training import resume
from ance_jax.training import schedule

# By the words of the rule: what passes at the edge, and what is next to it.
EDGES = {
  'at least 1': ([1], [0, -1]),
  'at least 3: two special tokens and a word': ([3], [2]),
  'at least 0': ([0], [-1]),
  'a number above 0': ([1e-300], [0]),
  'at least 0 and below 1': ([0, math.nextafter(1, 0)], [-5e-324, 1]),
  'at least 0 and below 2**31': ([0, 2**31 - 1], [-1, 2**31]),
  'a number from 0 to 1': ([0, 1], [-5e-324, math.nextafter(1, 2)]),
  'a port from 0 to 65,535': ([0, 65_535], [-1, 65_536]),
}
RULE_OF = {
  name: rule
  for names, _, rule in config_checks.RANGES
  for name in names.split()
}

# What a flag goes with, so that its range is what is wrong.
WITH = {
  'refresh_delay': {'refresh_mode': 'delayed'},
  'refresh_devices': {'refresh_mode': 'async'},
  'max_staleness': {'refresh_mode': 'async'},
  'warmup_until_plateau': {'steps_per_eval': 1, 'warmup_steps': 1},
}
TAUGHT = {'method': 'distill', 'score_run': 'run.trec'}


@pytest.mark.parametrize('name', RULE_OF)
def test_a_number_may_be_at_its_edge_and_not_beyond(name):
  passes, beyond = EDGES[RULE_OF[name]]
  plain = config_checks.plain_type(fingerprint_test.FIELDS[name].type)
  for value in passes:
    row = TAUGHT if name == 'also_weight' else {}
    config_lib.Config(**row, **{name: value})
  rule = re.escape(f' is out of range; set it to {RULE_OF[name]}.')
  for value in [*beyond, *([math.nan] if plain is float else [])]:
    with pytest.raises(errors.BadInput, match=f'--{name}=.*{rule}'):
      config_lib.Config(**WITH.get(name, {}), **{name: value})


def test_each_number_has_a_range_but_scores():
  numbers = {
    name
    for name, field in fingerprint_test.FIELDS.items()
    if config_checks.plain_type(field.type) in (int, float)
  }
  scores = {
    'max_score', 'min_score', 'rerank_max_score', 'positive_min_score',
    'mask_above', 'guide_margin', 'simans_b'
  }  # fmt: skip
  assert numbers - RULE_OF.keys() == scores


@pytest.mark.parametrize(
  ('flags', 'name', 'beyond', 'passes', 'says'),
  [
    (
      {'refresh_mode': 'async', 'refresh_schedule': '0-100:10,100-:50'},
      'max_staleness', [1, 49], [0, 50], 'less than the 50',
    ),
    (
      {'refresh_mode': 'external', 'refresh_schedule': '0-100:50,100-:10'},
      'max_staleness', [49], [50], 'less than the 50',
    ),
    (
      {'refresh_mode': 'async', 'steps_per_refresh': 30},
      'max_staleness', [29], [30], 'less than the 30',
    ),
    (
      {'num_processes': 3, 'coordinator': 'h:1'},
      'process_id', [3], [2], 'from 0 to 2',
    ),
    ({}, 'process_id', [1], [0], 'process_id=1 is not a process'),
    ({'refresh_trigger': 0.5}, 'query_slices', [2], [1], 'query_slices is 2'),
    ({'refresh_mode': 'delayed'}, 'refresh_delay', [0], [1], 'by how many'),
    ({}, 'refresh_delay', [1], [0], 'leave it out'),
    ({'refresh_mode': 'async'}, 'max_steps', [2**31], [2**31 - 1], 'below 2'),
  ],
)  # fmt: skip
def test_flags_that_bound_each_other_do_so_at_the_edge(
  flags, name, beyond, passes, says
):
  for value in passes:
    config_lib.Config(**flags, **{name: value})
  for value in beyond:
    with pytest.raises(errors.BadInput, match=says):
      config_lib.Config(**flags, **{name: value})


@pytest.mark.parametrize(
  ('num_devices', 'batch', 'micro', 'says'),
  [
    (1, 8, 0, None), (1, 8, 8, None), (1, 8, 4, None), (4, 8, 2, None),
    (1, 8, 9, 'divisor of 8'), (1, 8, 3, 'divisor of 8'),
    (4, 8, 4, 'divisor of 2'), (8, 7, 0, 'multiple of 8'),
    (8, 9, 0, 'multiple of 8'), (8, 8, 1, None),
  ],
)  # fmt: skip
def test_a_batch_divides_over_devices_and_pieces(
  num_devices, batch, micro, says, tmp_path
):
  config = config_lib.Config(
    workdir=str(tmp_path), num_devices=num_devices, batch_size=batch,
    micro_batch_size=micro,
  )  # fmt: skip
  with refused(says):
    checks.before_reading(config)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of five queries, each with one of five passages as its positive."""
  run = fingerprint_test.make_run(
    tmp_path_factory.mktemp('edges'), lr_warmup_steps=0
  )
  return fingerprint_test.changed(run, top_k=4, max_steps=10)


@pytest.mark.parametrize(
  ('flags', 'num_processes', 'says'),
  [
    ({'top_k': 4}, 1, None),
    ({'top_k': 5}, 1, '--top_k=5 and up to 1 positives of a query'),
    ({'num_hard_negatives': 4}, 1, None),
    (
      {'num_hard_negatives': 5},
      1,
      '--num_hard_negatives=5 is more than --top_k=4',
    ),
    ({'query_slices': 5}, 1, None),
    ({'query_slices': 6}, 1, '--query_slices=6 is more than the 5'),
    (
      {'warmup_until_plateau': 2},
      1,
      'needs dev to end the warm-up',
    ),
    ({'refresh_trigger': 0.5, 'method': 'ance_code'}, 1, '=0.5 cannot be used'),
    ({'refresh_trigger': 0.5, 'method': 'dpr'}, 1, '=0.5 cannot be used with'),
    # What a row does not draw from it has no bounds.
    ({'method': 'dpr', 'top_k': 5}, 1, '--top_k=5 and up to 1 positives of'),
    ({'method': 'in_batch', 'top_k': 5}, 1, None),
    ({'method': 'in_batch', 'top_k': 5, 'job': 'refresh'}, 1, 'up to 1 posit'),
    ({'method': 'random', 'num_hard_negatives': 9}, 1, None),
    ({'method': 'dpr', 'query_slices': 2}, 1, '=2 cannot be used with --meth'),
    ({'method': 'ance_code_qa'}, 1, 'needs answers, and 5 training queries'),
    ({'rows_per_block': 9}, 2, None),
    ({'rows_per_block': 10}, 2, '=10 leaves .* set it to at most 5'),
    ({'rows_per_block': 5}, 2, None),
    ({'rows_per_block': 3}, 4, None),
    ({'rows_per_block': 4}, 4, '=4 leaves .* set it to at most 2'),
    ({'index': 'IVF10,Flat'}, 1, None),
    ({'index': 'IVF11,Flat'}, 1, 'has 11 lists for 10 passages'),
  ],
)
def test_what_a_corpus_allows_is_allowed_to_the_last(
  flags, num_processes, says, run, monkeypatch
):
  assert len(run.dataset.passages.pieces()) == 10
  monkeypatch.setattr(distributed, 'count', lambda: num_processes)
  run = fingerprint_test.changed(run, **flags)
  with refused(says):
    negatives.check(run)


NEGATIVES, ANSWERS = [[1]] * 5, [['a']] * 5


@pytest.mark.parametrize(
  ('flags', 'split', 'says'),
  [
    ({'method': 'bm25'}, {'negatives': NEGATIVES}, '^--min_score needs scores'),
    ({'method': 'bm25', 'bm25_run': 'x'}, {'negatives': NEGATIVES}, None),
    ({'method': 'bm25'}, {}, None),
    ({'method': 'given'}, {'negatives': NEGATIVES}, '^--min_score needs score'),
    ({'method': 'given'}, {}, 'the data gives no negatives'),
    ({'method': 'ance'}, {'negatives': NEGATIVES}, None),
    ({'method': 'ance_code_qa'}, {'answers': ANSWERS}, None),
    (
      {'method': 'ance_code_qa'},
      {'answers': [*ANSWERS[1:], []]},
      'needs answers, and 1 training queries have none',
    ),
    ({'drop_answers': True}, {'answers': ANSWERS}, None),
    ({'drop_answers': True}, {}, '^--drop_answers needs answers'),
  ],
)
def test_what_a_row_needs_of_the_data_is_asked_of_the_data(
  flags, split, says, run
):
  run = fingerprint_test.changed(run, min_score=0.5, **flags)
  changed = run.dataset.splits['train']._replace(**split)
  with refused(says):
    negatives.check(fingerprint_test.with_data(run, splits={'train': changed}))


@pytest.mark.parametrize(
  ('dropped', 'says'), [(True, '--top_k=4 and up to 2'), (False, None)]
)
def test_a_copy_of_a_positive_takes_a_rank_only_if_it_is_dropped(
  dropped, says, tmp_path
):
  texts = [*fingerprint_test.TEXTS[:4], fingerprint_test.TEXTS[0]]
  run = fingerprint_test.make_run(
    tmp_path, texts=texts, queries='vwxyz', top_k=4, drop_same_text=dropped,
    method='ance', num_hard_negatives=1,
  )  # fmt: skip
  with refused(says):
    negatives.check(run)


@pytest.mark.parametrize(
  ('index', 'kind', 'says'),
  [
    ('PQ12', LookupError, 'it is read first'),
    ('PQ16', errors.BadInput, 'PQ16'),
  ],
)
def test_an_index_of_a_new_run_is_looked_at_before_its_data(
  index, kind, says, monkeypatch
):
  """It divides the width of the head, not of the body."""

  def load(*_):
    raise LookupError('it is read first')

  monkeypatch.setattr(experiment.load, 'load', load)
  config = config_lib.Config(hidden_size=32, head_size=24, index=index)
  with pytest.raises(kind, match=says):
    experiment.create(config, ('train',))


def test_an_index_may_have_a_list_for_each_chunk_of_the_corpus(tmp_path):
  run = fingerprint_test.make_run(tmp_path / 'most', index='IVF10,Flat')
  assert len(run.dataset.passages.pieces()) == 10
  with pytest.raises(errors.BadInput, match='has 11 lists for 10 passages'):
    fingerprint_test.make_run(tmp_path / 'more', index='IVF11,Flat')


@pytest.mark.parametrize('name', ['query_length', 'passage_length'])
def test_a_length_may_be_all_that_the_model_can_take(name):
  body = SimpleNamespace(max_length=32)
  source = SimpleNamespace(body=body, settings={}, tokenizer=None)
  asked = pretrained.Settings('', **{name: 32})
  assert getattr(pretrained._retriever_config(asked, source), name) == 32
  with pytest.raises(errors.BadInput, match=f'--{name}=33 is more than the 32'):
    pretrained._retriever_config(asked._replace(**{name: 33}), source)


@pytest.mark.parametrize(
  ('lengths', 'most'),
  [((64, 32), 64), ((None, 32), 64), ((8, 700), 700), ((None, None), 512)],
)
def test_a_random_model_takes_the_longest_text_that_it_may_be_given(
  lengths, most
):
  asked = pretrained.Settings(
    '', query_length=lengths[0], passage_length=lengths[1]
  )
  r = pretrained.planned(asked, sources.Sizes(60, 1, 8, 2, 8))
  assert r.body.max_length == most
  assert r.query_length == (lengths[0] or 64)
  assert r.passage_length == (lengths[1] or 512)


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    ({'num_negatives': 5, 'skip_ranks': 3, 'max_rank': 8}, None),
    ({'num_negatives': 6, 'skip_ranks': 3, 'max_rank': 8}, '--num_negatives'),
    ({'min_score': 0.5, 'max_score': 0.5}, None),
    ({'min_score': math.nextafter(0.5, 1), 'max_score': 0.5}, '--min_score'),
  ],
)
def test_ranks_and_scores_of_mining_bound_each_other(flags, says):
  flags = {'max_rank': 100, **flags}
  with refused(says and f'^{says}'):
    mine._check_flags(config_lib.Config(job='mine', **flags))


@pytest.mark.parametrize('on_shortage', ['keep', 'fill'])
def test_filling_up_needs_as_many_passages_as_it_writes(on_shortage, run):
  config = config_lib.Config(
    job='mine', on_shortage=on_shortage, num_negatives=4
  )
  excluded = SimpleNamespace(num_excluded=np.array([1, 1]))
  job = SimpleNamespace(
    config=config,
    corpus=run.dataset.corpus,
    split=run.dataset.splits['train'],
    task=SimpleNamespace(excluded=excluded),
  )
  mine._check_data(job)
  job.config = dataclasses.replace(config, num_negatives=5)
  with refused(on_shortage == 'fill' and 'needs 5 .* up to 1, .* has 5'):
    mine._check_data(job)


@pytest.mark.parametrize('seed', range(3))
def test_scores_that_are_equal_to_a_bound_fall_on_its_side(seed):
  """As the loop over the words of `Rules` has it; all are on a coarse grid."""
  rows, scores, never, least, rules, reranked, most = filters_test.many(seed)
  scores, least, reranked = (
    np.round(2 * array) / 2 for array in (scores, least, reranked)
  )
  rules = rules._replace(absolute_margin=0.5, relative_margin=0.5)
  rejected = filters.rejected_by(rows, scores, never, least, rules)
  filters.reject_reranked(rejected, reranked, most)
  slow = filters_test.slowly(rows, scores, never, least, rules, reranked, most)
  names = {**dict(enumerate(filters.FILTERS)), filters.KEPT: 'kept'}
  found = [[names.get(n) for n in row] for row in rejected.tolist()]
  assert found == slow


@pytest.mark.parametrize(
  ('free', 'says'), [(9, '9 bytes .* 10 bytes, 6 bytes'), (10, None)]
)
def test_a_run_may_need_all_that_there_is(free, says, monkeypatch):
  needs = [
    footprint.Need('disk', 'one', '', 4),
    footprint.Need('disk', 'b', '', 6),
  ]
  monkeypatch.setattr(footprint, '_needs', lambda _: needs)
  monkeypatch.setattr(footprint, '_room', lambda _: {'disk': free})
  run = SimpleNamespace(config=SimpleNamespace(dry_run=False))
  with refused(says):
    footprint.check(run)


def test_a_refresh_is_due_below_its_trigger(monkeypatch):
  last = SimpleNamespace(table=None)
  monkeypatch.setattr(refreshes.diagnostics, 'stale_overlap', lambda *_: 0.5)
  for trigger, fresh in ((0, False), (0.5, True), (0.51, False), (0.49, True)):
    run = SimpleNamespace(config=SimpleNamespace(refresh_trigger=trigger))
    assert refreshes._is_fresh(run, None, last) == fresh


def test_what_is_due_begins_and_ends_at_its_step():
  config = config_lib.Config(method='ance', max_steps=10, steps_per_refresh=4)
  for changes, steps in (
    ({'warmup_steps': 9}, [9]),
    ({'warmup_steps': 10}, []),
    ({'warmup_steps': 1}, [1, 5, 9]),
    ({'warmup_steps': 2}, [2, 6]),
    ({'max_refreshes': 2}, [0, 4]),
    ({'max_refreshes': 3}, [0, 4, 8]),
    # The interval that a refresh is in says when the next one is.
    ({'refresh_schedule': '0-4:2,4-:3'}, [0, 2, 4, 7]),
    ({'refresh_schedule': '0-3:2,3-:3'}, [0, 2, 4, 7]),
    ({'refresh_schedule': '0-5:2,5-:3'}, [0, 2, 4, 6, 9]),
  ):
    changed = dataclasses.replace(config, **changes)
    due = [n for n in range(12) if schedule.refresh_due(changed, n)]
    assert due == steps, changes
    assert schedule.num_refreshes(changed) == len(steps)


def test_a_run_at_its_last_step_goes_on_to_show_it(monkeypatch):
  """And one that came further than --max_steps is refused."""
  monkeypatch.setattr(
    resume.checkpoint,
    'newest_whole',
    lambda _: (7, {'format': resume.checkpoint.FORMAT}),
  )
  for name in ('fetch', 'check_same_run', 'restore'):
    monkeypatch.setattr(resume.experiment, name, lambda *_, **__: None)
  monkeypatch.setattr(resume, '_say_what_changed', lambda *_: None)
  monkeypatch.setattr(resume, '_restore_history', lambda *_: b'')
  monkeypatch.setattr(
    resume.checkpoint, 'read_record', lambda *_: {resume.WORK_FILE: b'{}'}
  )
  config = config_lib.Config(workdir='/nowhere', max_steps=7)
  assert resume.begin(config).step == 7
  with pytest.raises(errors.BadInput, match='--max_steps=6 is less than the 7'):
    resume.begin(dataclasses.replace(config, max_steps=6))


def test_the_last_rank_that_a_protocol_looks_at_counts(tmp_path):
  corpus = corpus_lib.make_corpus(map(str, range(120)), [''] * 120, ['x'] * 120)
  split = corpus_lib.make_split(
    corpus_lib.RawSplit(['a', 'b'], ['x', 'y'], {(0, 99): 1, (1, 100): 1})
  )
  path = tmp_path / 'run.trec'
  path.write_text(
    ''.join(f'{q} Q0 {n} 1 {-n} x\n' for q in 'ab' for n in range(120))
  )
  for own, right in ((None, [1, 0]), (np.array([5, 6]), [1, 1])):
    of_own = split._replace(own=own)
    found = systems._system('name', path, corpus, of_own)
    assert found.values['recall@100'].tolist() == right
