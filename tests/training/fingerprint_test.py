"""Keys of what is kept and of what is compared: each input that counts is in.

A key is flipped one input at a time; a field of `Config` that is in no list
here fails a test until somebody says which key it belongs to.
"""

import dataclasses
from types import SimpleNamespace

from bad_input_tools import refused
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import config_checks
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.models import bert
from ance_jax.models import bi_encoder
from ance_jax.models import pretrained
from ance_jax.training import experiment
from ance_jax.training import negatives
from ance_jax.training import refreshes

FIELDS = {field.name: field for field in dataclasses.fields(config_lib.Config)}
# Of data and model: in the hashes of corpus, splits and weights, in the token
# rows, or in the retriever that a checkpoint holds.
OF_DATA = (
  'dataset data_dir beir_set questions protocol train_split dev_split '
  'dev_fraction negatives'
).split()
OF_MODEL = (
  'init_from vocab_size num_layers hidden_size num_heads intermediate_size '
  'tie_encoders pooling similarity head_size head_norm query_length '
  'passage_length chunks whole_chunks title_separator query_prompt '
  'passage_prompt lower_case prefix_space'
).split()
# In what negatives depend on, with a value that is another.
OF_NEGATIVES = {
  'seed': 5,
  'method': 'ance_in_batch',
  'top_k': 7,
  'num_hard_negatives': 3,
  'drop_same_text': False,
  'drop_answers': True,
  'index': 'SQ8',
  'index_params': 'nprobe=3',
  'center_passages': True,
}
# In it only where they are given, as one: a run without them goes on.
OF_RULES = {
  'skip_ranks': 1,
  'max_rank': 9,
  'max_score': 0.5,
  'min_score': 0.5,
  'absolute_margin': 0.0,
  'relative_margin': 0.5,
  'z_margin': 0.0,
  'center_scores': True,
  'cross_encoder': '/',
  'score_run': __file__,
  'rerank_max_score': 0.0,
  'positive_min_score': 0.0,
  'choose': 'random',
  'on_shortage': 'fill',
  'negatives_per_source': 2,
}
OF_BM25 = {
  'bm25_k1': 0.5,
  'bm25_b': 0.5,
  'bm25_language': 'none',
  'bm25_run': 'run.trec',
}
# In the key of embeddings.
OF_EMBEDDINGS = {
  'dtype': 'bfloat16',
  'rows_per_block': 9,
  'tokens_per_batch': 512,
  'refresh_mode': 'async',  # It does without a kernel.
}
# What a job may be given otherwise than the run that it reads.
OF_READING = (
  'index index_params center_passages dtype rows_per_block chunks '
  'whole_chunks drop_same_text drop_answers seed'
).split()
# Of training alone: a run keeps those that may not change.
OF_TRAINING = (
  'dropout_rate attention_dropout_rate warmup_method warmup_steps temperature '
  'steps_per_refresh '
  'query_slices max_refreshes refresh_schedule refresh_trigger '
  'warmup_until_plateau refresh_delay batch_size optimizer learning_rate '
  'lr_warmup_steps weight_decay adam_epsilon clip_norm rate_steps trainable '
  'draw simans_a simans_b mask_above topics '
  'hardness_weight hardness_columns symmetric_columns matryoshka_widths guide '
  'guide_margin teacher_temperature also_weight restart_from'
).split()
# No bit of weights, embeddings or negatives hangs on these, but for rounding,
# which a line tells of, and for what a person asks of one start.
OF_A_START = (
  'job workdir remote_dir num_devices num_processes process_id coordinator '
  'dry_run debug compilation_cache_dir tokens_dir beam_runner beam_options '
  'download refresh_devices max_staleness refresh_replay watch '
  'micro_batch_size remat max_steps search_memory_mb steps_per_eval retriever '
  'split output overwrite export_corpus checkpoint ranking num_negatives '
  'format steps_per_checkpoint '
  'checkpoints_to_keep steps_per_log progress_bars query port num_results runs '
  'picture'
).split()


def test_each_flag_is_in_one_list_and_kept_by_a_run_or_in_a_key():
  lists = (
    OF_DATA, OF_MODEL, OF_NEGATIVES, OF_RULES, OF_BM25, OF_EMBEDDINGS,
    OF_TRAINING, OF_A_START,
  )  # fmt: skip
  assert sorted(name for each in lists for name in each) == sorted(FIELDS)
  free = {name for name in FIELDS if FIELDS[name].metadata['may_change']}
  # Where the data is may change, what it holds may not; the others are in keys.
  others = {'data_dir', 'beir_set', 'refresh_mode', 'tokens_per_batch'}
  assert free == {*OF_A_START, *others}


def other(field, value):
  """Another value of a field, of its kind."""
  if choices := config_checks.values_of(field):
    return next(c for c in choices if c != value)
  plain = config_checks.plain_type(field.type)
  if plain is bool:
    return not value
  return f'{value}x' if plain is str else plain((value or 0) + 1)


def test_a_run_goes_on_with_another_value_only_of_what_may_change(monkeypatch):
  before = config_lib.Config(workdir='/somewhere')
  # Whatever must go with it.
  monkeypatch.setattr(config_lib.Config, '__post_init__', lambda _: None)
  monkeypatch.setattr(experiment, 'settings', lambda *_: before)
  experiment.check_same_run(before, 3)
  for name, field in FIELDS.items():
    value = other(field, getattr(before, name))
    after = dataclasses.replace(before, **{name: value})
    may_change = field.metadata['may_change']
    with refused(not may_change and f'^--{name} is .* began with '):
      experiment.check_same_run(after, 3)


def test_only_a_job_that_the_run_does_not_train_on_reads_it_otherwise(
  monkeypatch,
):
  before = config_lib.Config(workdir='/somewhere')
  monkeypatch.setattr(config_lib.Config, '__post_init__', lambda _: None)
  monkeypatch.setattr(experiment, 'settings', lambda *_: before)
  monkeypatch.setattr(experiment, '_began', lambda *_: None)
  monkeypatch.setattr(experiment.pretrained, 'load_whole', lambda *_: None)
  for name in ('learning_rate', *OF_READING):
    value = other(FIELDS[name], getattr(before, name))
    after = dataclasses.replace(before, **{name: value})
    for for_training in (False, True):
      is_free = name in OF_READING and not for_training
      with refused(not is_free and f'^--{name} is .* began with '):
        experiment._read_saved(after, 3, None, for_training)


JUDGED = corpus_lib.RawSplit(
  ['a', 'bc'],
  ['x', 'yz'],
  {(0, 3): 1, (0, 1): 2, (1, 2): 1},
  answers={0: ['1']},
  negatives={1: [4, 5]},
  missing={(0, 'gone'): 1},
  given=corpus_lib.Given(
    *np.array([[0, 0, 1], [7, 8, 9], [5, 4, 3]], np.int32)
  ),
  scores={(0, 3): 0.5},
)
JUDGED_CHANGES = {
  'query_ids': ['ab', 'c'],
  'queries': ['xy', 'z'],
  'judgements': {(0, 1): 2, (0, 3): 1, (1, 2): 1},  # Another order.
  'answers': {0: ['2']},
  'negatives': {1: [5, 4]},
  'missing': {(0, 'gone'): 2},
  'given': JUDGED.given._replace(queries=np.array([0, 1, 1], np.int32)),
  'scores': {(0, 1): 0.5},
}


def test_a_split_has_all_that_is_judged_in_its_hash():
  hashes = {corpus_lib.make_split(JUDGED).hash}
  found = [
    *JUDGED_CHANGES.items(),
    ('judgements', {**JUDGED.judgements, (0, 3): 2}),
    ('judgements', {(0, 3): 1, (0, 1): 2, (1, 4): 1}),
    ('judgements', {(0, 3): 1, (1, 1): 2, (1, 2): 1}),
    ('answers', {1: ['1']}),
    ('missing', None),
    ('given', JUDGED.given._replace(passages=JUDGED.given.queries)),
    ('given', JUDGED.given._replace(scores=JUDGED.given.queries)),
  ]
  for name, value in found:
    hashes.add(corpus_lib.make_split(JUDGED._replace(**{name: value})).hash)
  assert len(hashes) == 1 + len(found)
  # What else there is follows from ids and texts, flags, or the dataset.
  known = {*JUDGED_CHANGES, 'all_count', 'own', 'protocol'}
  known.add('answers_are_patterns')
  assert known == set(corpus_lib.RawSplit._fields)


def test_a_corpus_has_ids_titles_texts_and_groups_in_its_hash():
  columns = [['a', 'bc'], ['t', ''], ['x', 'yz'], [0, 1]]
  hashes = {corpus_lib.make_corpus(*columns).hash}
  others = [['ab', 'c'], ['', 't'], ['xy', 'z'], [0, 0]]
  for number, column in enumerate(others):
    changed = [*columns[:number], column, *columns[number + 1 :]]
    hashes.add(corpus_lib.make_corpus(*changed).hash)
  assert len(hashes) == 5


BODY = bert.BodyConfig('bert', 90, 16, 1, 2, 32, 16, 1, 1e-12, 'gelu')
RETRIEVER = bi_encoder.RetrieverConfig(
  BODY, True, 'mean', 0, True, 'dot', 8, 8, ' ', 'q: ', 'p: '
)
TEXTS = [f'word{i} some more words, number {i} of all' for i in range(5)]


def make_run(folder, retriever=RETRIEVER, texts=TEXTS, queries=TEXTS, **flags):
  """An `experiment.Experiment` without weights."""
  config = config_lib.Config(
    workdir=str(folder), tokens_dir=str(folder / 'tokens'), num_devices=1,
    chunks=2, dataset='beir',
  )  # fmt: skip
  lower_case = flags.pop('lower_case', None)
  size = flags.pop('vocab_size', 90)
  tokenizer = tokenizer_lib.train_vocabulary(TEXTS, size)
  if lower_case:
    tokenizer.backend_tokenizer.normalizer = None
  corpus = corpus_lib.make_corpus(
    list('abcde'), ['Title', '', '', '', ''], texts
  )
  split = corpus_lib.make_split(
    corpus_lib.RawSplit(list('vwxyz'), queries, {(n, n): 1 for n in range(5)})
  )
  return experiment._experiment(
    'id',
    dataclasses.replace(config, **flags),
    corpus_lib.TextDataset(corpus, {'train': split}),
    pretrained.Model(retriever, tokenizer, None),
  )


def replaced(**changes):
  return {'retriever': dataclasses.replace(RETRIEVER, **changes)}


@pytest.mark.parametrize(
  ('changes', 'passages', 'queries'),
  [
    ({}, False, False),
    (replaced(passage_length=9), True, False),
    (replaced(query_length=9), False, True),
    (replaced(title_separator='[SEP]'), True, False),
    (replaced(passage_prompt='word1 '), True, False),
    (replaced(passage_prompt=''), True, False),
    (replaced(query_prompt='word1 '), False, True),
    ({'chunks': 1}, True, False),
    ({'chunks': 3}, True, False),
    ({'whole_chunks': True}, True, False),
    ({'vocab_size': 45}, True, True),
    ({'lower_case': True}, True, True),
    ({'texts': [*TEXTS[:4], 'word1']}, True, False),
    ({'queries': [*TEXTS[:4], 'word1']}, False, True),
    (replaced(pooling='cls', similarity='cosine'), False, False),
    ({'dtype': 'bfloat16', 'seed': 3}, False, False),
  ],
)
def test_runs_that_share_token_rows_each_have_their_own(
  changes, passages, queries, tmp_path
):
  first = make_run(tmp_path)
  shared = make_run(tmp_path, **changes)
  alone = make_run(tmp_path / 'alone', **changes)
  for rows, is_other in (
    ([run.dataset.passages for run in (first, shared, alone)], passages),
    ([run.dataset.queries['train'] for run in (first, shared, alone)], queries),
  ):
    assert (rows[0].hash != rows[1].hash) == is_other
    np.testing.assert_array_equal(rows[1].ids, rows[2].ids)
    np.testing.assert_array_equal(rows[1].offsets, rows[2].offsets)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp('run'))


def changed(run, **flags):
  config = dataclasses.replace(run.config)
  for name, value in flags.items():
    object.__setattr__(config, name, value)  # Whatever goes with it.
  return run._replace(
    config=config, retriever=remade(run, config, run.retriever.config)
  )


def remade(run, config, retriever):
  model = pretrained.Model(retriever, run.retriever.tokenizer, None)
  return experiment.make_retriever(config, model, run.devices)


def with_data(run, **changes):
  return run._replace(dataset=run.dataset._replace(**changes))


def test_embeddings_have_all_that_their_bits_hang_on_in_their_key(run):
  def key(run, weights='w'):
    return run.embeddings_folder(weights).name

  kept = {key(run)}
  others = [
    changed(run, **{name: value}) for name, value in OF_EMBEDDINGS.items()
  ]
  others.append(
    with_data(run, passages=run.dataset.passages._replace(hash='other'))
  )
  others.append(run.on_devices(tuple(experiment.devices_lib.local(2))))
  device = SimpleNamespace(process_index=0, device_kind='other')
  with_it = run.retriever._replace(devices=(device,))
  others.append(run._replace(retriever=with_it))
  body = dataclasses.replace(BODY, activation='relu')
  for change in (
    {'pooling': 'cls'}, {'similarity': 'cosine'}, {'head_norm': False},
    {'body': body},
  ):  # fmt: skip
    other_config = replaced(**change)['retriever']
    others.append(run._replace(retriever=remade(run, run.config, other_config)))
  kept |= {key(other) for other in others} | {key(run, 'other weights')}
  assert len(kept) == len(others) + 2
  # What they do not hang on has no new ones made.
  for name in sorted({*OF_NEGATIVES, *OF_BM25, *OF_TRAINING}):
    assert key(changed(run, **{name: other(FIELDS[name], 1)})) == key(run)


def test_embeddings_hang_on_the_parameters_of_passages_alone(run):
  def hash_of(is_tied, **params):
    config = dataclasses.replace(RETRIEVER, tied=is_tied)
    retriever = run.retriever._replace(config=config)
    return retriever.with_params(
      {name: {'w': np.array(value)} for name, value in params.items()}
    ).passage_hash()

  first = hash_of(False, query=1, passage=2)
  assert first == hash_of(False, query=3, passage=2)
  assert first != hash_of(False, query=1, passage=3)
  # Of one tower it is the hash of all, by which older releases kept them.
  tied = hash_of(True, tied=1)
  assert tied == checkpoint.weights_hash({'tied': {'w': np.array(1)}})
  assert tied != hash_of(True, tied=2)


def test_negatives_have_all_that_they_hang_on_in_what_is_compared(run):
  split = run.dataset.splits['train']._replace(answers=[['x']] * 5)
  run = with_data(run, splits={'train': split})
  base = negatives.sources(changed(run, drop_answers=False))
  for name, value in OF_NEGATIVES.items():
    changes = {'drop_answers': False, name: value}
    found = negatives.sources(changed(run, **changes))
    differ = {key for key in found if found[key] != base[key]}
    # Manifests keep the name that the flag had when they were first written.
    on_disk = {'num_hard_negatives': 'hard_negatives'}
    assert differ == {on_disk.get(name, name)}
  kept = [base]
  for name, value in OF_RULES.items():
    found = negatives.sources(changed(run, drop_answers=False, **{name: value}))
    assert {**found, **base} == found
    assert list(found['rules']) == [name]
    kept += [found] if found not in kept else []
  assert len(kept) == len(OF_RULES) + 1
  for other_run, name in (
    (
      with_data(run, passages=run.dataset.passages._replace(hash='x')),
      'passages',
    ),
    (with_data(run, corpus=run.dataset.corpus._replace(hash='x')), 'groups'),
    (with_data(run, splits={'train': split._replace(hash='x')}), 'judgements'),
    (
      with_data(
        run, queries={'train': run.dataset.queries['train']._replace(hash='x')}
      ),
      'queries',
    ),
    (
      with_data(run, splits={'train': split._replace(own=np.zeros(5, int))}),
      'own',
    ),
  ):
    found = negatives.sources(changed(other_run, drop_answers=False))
    assert {key for key in found if found[key] != base[key]} == {name}


def test_what_was_mined_by_other_rules_is_not_taken(run, tmp_path):
  runs = [run, changed(run, max_score=0.5), changed(run, max_score=0.6)]
  for made in runs:
    with atomic.publish(tmp_path / 'made', negatives.sources(made)):
      pass
    for other_run in runs:
      about = negatives.sources(other_run)
      found = negatives.find(tmp_path / 'made', about)
      assert (found is not None) == (made is other_run)
      manifest = {'step': 8, 'query_slice': [0, 5], **refreshes._sources(made)}
      says = refreshes.refusal(other_run, manifest)
      assert (says is None) == (made is other_run)


def test_a_file_of_scores_counts_by_what_is_in_it(run, tmp_path):
  path, found = tmp_path / 'scores.trec', []
  for text in 'xy':
    path.write_text(text)
    found.append(negatives.sources(changed(run, score_run=str(path)))['rules'])
  assert found[0] != found[1]


def test_negatives_of_bm25_are_made_again_for_other_settings_of_it(
  run, tmp_path, monkeypatch
):
  """Back and forth: what another setting left is never taken."""
  (tmp_path / 'run.trec').write_text('x')
  run = changed(run, workdir=str(tmp_path))
  made, source = [], lambda *_: SimpleNamespace(name='x')

  def select_negatives(*_):
    made.append(1)
    counts = dict.fromkeys(('judged', 'same_text', 'own_text', 'random'), 0)
    return SimpleNamespace(rows=np.zeros(3)), counts

  monkeypatch.setattr(negatives, 'select_negatives', select_negatives)
  monkeypatch.setattr(negatives.candidates, 'of_run_file', source)
  values = {**OF_BM25, 'bm25_run': str(tmp_path / 'run.trec'), 'top_k': 3}
  for number, (name, value) in enumerate(values.items()):
    for settings in (run, changed(run, **{name: value})):
      negatives.by_bm25(settings)
      negatives.by_bm25(settings)
    assert len(made) == 2 * number + 2
  # A run file counts by what is in it.
  given = changed(run, bm25_run=values['bm25_run'])
  negatives.by_bm25(given)
  (tmp_path / 'run.trec').write_text('y')
  negatives.by_bm25(given)
  assert len(made) == 2 * len(values) + 2


def test_a_refresh_of_another_run_tokenizer_or_slice_is_refused(run):
  run = changed(run, warmup_steps=4, steps_per_refresh=4)
  manifest = {
    'step': 8, 'query_slice': [0, 5], **refreshes._sources(run)
  }  # fmt: skip
  assert refreshes.refusal(run, manifest) is None
  assert 'another run' in refreshes.refusal(run._replace(id='y'), manifest)
  sliced = changed(run, query_slices=2)
  assert 'slice' in refreshes.refusal(sliced, manifest)
  cased = make_run(run.workdir, lower_case=True)
  assert 'tokenizer' in refreshes.refusal(cased, manifest)
  other_config = replaced(title_separator='[SEP]')['retriever']
  other_run = run._replace(retriever=remade(run, run.config, other_config))
  assert 'tokenizer' in refreshes.refusal(other_run, manifest)
  for name in manifest:
    if name != 'step':
      other_one = {**manifest, name: 'other'}
      assert refreshes.refusal(run, other_one)
      assert refreshes._sources(run).get(name) != 'other'


@pytest.mark.parametrize(
  ('began', 'names', 'says'),
  [
    ({}, ('train', 'dev', 'test'), None),  # Test had none.
    ({'corpus': 'x'}, ('train', 'dev'), '^the corpus is not the one .*hash c'),
    ({'train': 'x'}, ('train', 'dev'), "^split 'train' is not .*hash train"),
    ({'dev': 'x'}, ('train', 'dev'), "^split 'dev' is not .*instead of x"),
    ({}, ('train',), "has no split 'dev' where"),
  ],
)
def test_a_run_goes_on_with_the_data_that_it_began_with(
  began, names, says, run, monkeypatch
):
  split, corpus = run.dataset.splits['train'], run.dataset.corpus
  splits = {name: split._replace(hash=name) for name in names}
  dataset = corpus_lib.TextDataset(corpus._replace(hash='c'), splits)
  monkeypatch.setattr(experiment.load, 'load', lambda *_: dataset)
  monkeypatch.setattr(experiment, '_experiment', lambda *given: given[0])
  hashes = {'corpus': 'c', 'train': 'train', 'dev': 'dev', **began}
  began = {'run': 'id', 'corpus': hashes.pop('corpus'), 'splits': hashes}
  model = pretrained.Model(RETRIEVER, None, None)
  with refused(says):
    assert experiment._restore(run.config, None, began, model) == 'id'
