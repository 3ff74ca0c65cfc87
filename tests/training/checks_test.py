"""What will keep a run from learning is said before its first step."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import due_test
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.jobs import train
from ance_jax.training import batches
from ance_jax.training import checks
from ance_jax.training import methods
from ance_jax.training import optimizers
from ance_jax.training import refreshes


def lines_of(capsys, **settings):
  capsys.readouterr()
  settings = {'lr_warmup_steps': 0, 'steps_per_refresh': 1, **settings}
  checks.of_flags(config_lib.Config(**settings))
  return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize('steps', [1, 2, 5, 6, 7, 100])
@pytest.mark.parametrize('rise', [0, 1, 6])
def test_the_peak_of_the_learning_rate_is_that_of_the_steps(
  steps, rise, capsys
):
  settings = {
    'learning_rate': 0.5, 'max_steps': steps, 'lr_warmup_steps': rise
  }  # fmt: skip
  config = config_lib.Config(**settings)
  rate = optimizers.learning_rate_schedule(config)
  peak = max(float(rate(step)) for step in range(steps))
  assert optimizers.peak(config) == pytest.approx(peak)
  lines = lines_of(capsys, method='in_batch', **settings)
  assert len(lines) == (peak < 0.5)
  if lines:
    assert f'--max_steps={steps}: the learning rate ' in lines[0]
    assert f'at {peak:.3g} instead of --learning_rate=0.5' in lines[0]


@pytest.mark.parametrize(
  ('settings', 'line'),
  [
    ({'warmup_steps': 8, 'max_steps': 8}, 'nothing is mined, and all steps'),
    ({'warmup_steps': 9, 'max_steps': 8}, '--warmup_method=bm25'),
    ({'warmup_steps': 8, 'max_steps': 8, 'method': 'in_batch'}, None),
    ({'warmup_steps': 8, 'max_steps': 8, 'refresh_replay': '/r'}, None),
    ({'warmup_steps': 8, 'max_steps': 0}, None),
    ({'warmup_steps': 6, 'max_steps': 8}, None),
    ({'warmup_steps': 7, 'max_steps': 8}, 'leaves one refresh, at step 7, '),
    ({'warmup_steps': 7, 'max_steps': 8, 'max_refreshes': 1}, None),
    ({'steps_per_refresh': 8, 'max_steps': 8}, '--steps_per_refresh=8 leaves'),
    ({'steps_per_refresh': 8, 'max_steps': 9}, None),
    ({'steps_per_refresh': 8, 'max_steps': 8, 'method': 'star'}, None),
    (
      {'refresh_schedule': '0-:8', 'max_steps': 8},
      '--refresh_schedule=0-:8 leaves one',
    ),
    (
      {
        'warmup_steps': 4, 'refresh_mode': 'delayed', 'refresh_delay': 4,
        'max_steps': 8,
      },
      'at step 8, and --max_steps=8: they are never trained on',
    ),
    (
      {
        'warmup_steps': 4, 'refresh_mode': 'delayed', 'refresh_delay': 4,
        'max_steps': 9,
      },
      None,
    ),
    # Where there is nothing else to train on, the first one is not delayed.
    ({'refresh_mode': 'delayed', 'refresh_delay': 9, 'max_steps': 9}, None),
    ({'query_slices': 5, 'max_steps': 4}, '4 refreshes mine 4 of the --query_'),
    ({'query_slices': 5, 'max_steps': 5}, None),
  ],
)  # fmt: skip
def test_refreshes_that_never_come_are_told_of(settings, line, capsys):
  lines = lines_of(capsys, **settings)
  assert len(lines) == (line is not None)
  assert line is None or line in lines[0]


def test_one_refresh_of_several_slices_is_told_of_twice(capsys):
  lines = lines_of(capsys, query_slices=4, steps_per_refresh=8, max_steps=8)
  assert len(lines) == 2
  assert 'leaves one refresh' in lines[0]
  assert '1 refreshes mine 1 of the --query_slices=4' in lines[1]


@pytest.mark.parametrize(
  ('settings', 'name'),
  [
    ({'method': 'in_batch'}, '--method=in_batch'),
    (
      {'warmup_method': 'in_batch', 'warmup_steps': 1},
      '--warmup_method=in_batch',
    ),
  ],
)
def test_a_batch_of_one_without_negatives_of_its_own_is_refused(
  settings, name, tiny
):
  tiny = dataclasses.replace(
    tiny, **{'method': 'ance', 'batch_size': 1, 'num_devices': 1, **settings}
  )
  with pytest.raises(errors.BadInput, match=f'=1 leaves {name} no other'):
    checks.before_reading(tiny)
  checks.before_reading(dataclasses.replace(tiny, batch_size=2))
  for other in ({'warmup_steps': 0, 'method': 'ance'}, {'method': 'dpr'}):
    checks.before_reading(dataclasses.replace(tiny, **other))


def data_of(positives, groups, own=()):
  """`batches.TrainingData` of queries with lists of positive passages."""
  groups = np.array(groups)
  banned = [{int(groups[p]) for p in rows} for rows in positives]
  for query, passage in own:
    banned[query].add(int(groups[passage]))
  width = max(map(len, banned))
  return batches.TrainingData(
    None,
    None,
    np.cumsum([0, *map(len, positives)]),
    np.array([p for rows in positives for p in rows]),
    np.array([[*sorted(b), *[-1] * (width - len(b))] for b in banned]),
    groups,
    8,
    8,
  )


# Passages 0 and 1 have one text; queries 0 to 2 share it, 3 and 4 are alone.
ALIKE = data_of(
  [[0], [1], [0], [2], [3]], [0, 0, 1, 2, 3], own=[(2, 2), (4, 4)]
)


@pytest.mark.parametrize('batch_size', [1, 2, 3, 4, 5, 8])
def test_how_often_a_query_has_no_other_in_its_batch_is_exact(batch_size):
  row = methods.METHODS['in_batch']
  found = checks.idle_shares(ALIKE, row, batch_size, 0)
  positive = ALIKE.groups[ALIKE.positives]
  for query in range(5):
    others = [n for n in range(5) if n != query]
    seen = [
      all(positive[n] in ALIKE.positive_groups[query] for n in drawn)
      for drawn in itertools.combinations(others, min(batch_size - 1, 4))
    ]
    assert found[query] == pytest.approx(np.mean(seen))


@pytest.mark.parametrize('number', [1, 2, 3])
def test_how_often_all_passages_drawn_are_positives_is_exact(number):
  found = checks.idle_shares(ALIKE, methods.METHODS['random'], 8, number)
  for query in range(5):
    seen = [
      all(ALIKE.groups[p] in ALIKE.positive_groups[query] for p in drawn)
      for drawn in itertools.product(range(5), repeat=number)
    ]
    assert found[query] == pytest.approx(np.mean(seen))


def test_only_what_is_certain_is_exactly_one():
  row = methods.METHODS['in_batch']
  # Each has three positives, a third of a column each; all but one are shared.
  shared = [[0, 1, 2]] * 6
  assert checks.idle_shares(data_of(shared, range(4)), row, 4, 0).min() == 1
  other = data_of([*shared, [0, 1, 3]], range(4))
  found = checks.idle_shares(other, row, 4, 0)
  assert 0 < found.min() <= found.max() < 1
  many = data_of([[0]] * 100_000 + [[1]], range(2))
  assert checks.idle_shares(many, row, 2, 0).max() < 1
  for name in ('bm25', 'dpr', 'ance', 'ance_in_batch'):
    row = methods.METHODS[name]
    assert checks.idle_shares(ALIKE, row, 1, 1).tolist() == [0] * 5


DATASET = SimpleNamespace(splits={'train': SimpleNamespace(ids=range(5))})


@pytest.fixture
def told(monkeypatch, capsys):
  """Returns the lines of a run with some data, or the `BadInput`."""

  def told(data, similarity='dot', **settings):
    monkeypatch.setattr(
      checks.experiment, 'training_data', lambda run, row: data
    )
    run = SimpleNamespace(
      config=config_lib.Config(**settings),
      dataset=DATASET,
      retriever=SimpleNamespace(
        config=SimpleNamespace(
          similarity=similarity, tied=True, embedding_size=16
        )
      ),
    )
    capsys.readouterr()
    checks.of_run(run)
    return capsys.readouterr().out.splitlines()

  return told


def test_a_share_of_queries_without_negatives_is_told_of(told):
  (line,) = told(ALIKE, method='in_batch', batch_size=2)
  # Queries 0 and 1: two of four others; query 2: one more; 3 and 4: none.
  assert '--method=in_batch: about 35.0% of the queries of a step' in line
  assert '(0 of the 5 training queries never have one)' in line
  alone = data_of([[0], [0], [1]], range(2), own=[(0, 1)])
  (line,) = told(alone, method='in_batch', batch_size=4)
  assert 'about 33.3% of' in line
  assert '(1 of the 3 training queries never have one)' in line
  # A triplet has one negative, in the warm-up, too.
  (line,) = told(
    data_of([[0, 1, 2]], range(9)), method='ance_code', num_hard_negatives=20,
    warmup_method='random', warmup_steps=1,
  )  # fmt: skip
  assert '--warmup_method=random: about 33.3% of' in line
  # One passage in 100, and one in 101.
  for number, lines in ((100, 1), (101, 0)):
    data = data_of([[0]], range(number))
    assert len(told(data, method='random', num_hard_negatives=1)) == lines


def test_rows_of_a_run_without_any_negative_are_refused(told):
  same = data_of([[0], [1]], [0, 0])
  for settings in (
    {'method': 'in_batch'},
    {'method': 'random'},
    {'method': 'ance', 'warmup_method': 'random', 'warmup_steps': 1},
  ):
    with pytest.raises(errors.BadInput, match='finds no negative for any'):
      told(same, **settings)
  assert told(same, method='ance', warmup_method='random') == []


@pytest.mark.parametrize(
  ('similarity', 'temperature', 'lines'),
  [('cosine', 1.0, 1), ('cosine', 0.99, 0), ('dot', 1.0, 0)],
)
def test_cosines_that_are_not_divided_are_told_of(
  similarity, temperature, lines, told
):
  found = told(
    data_of([[0], [1]], range(900)), similarity, method='in_batch',
    temperature=temperature,
  )  # fmt: skip
  assert len(found) == lines
  assert all('0.05 is usual' in line for line in found)


def write_set(folder, texts, qrels):
  """Writes a BEIR folder with a query for each (query number, passage)."""
  (folder / 'qrels').mkdir(parents=True)
  for name, rows in (
    ('corpus', texts), ('queries', ['first', 'second', 'third'])
  ):  # fmt: skip
    lines = [
      json.dumps({'_id': f'{name[0]}{n}', 'text': t})
      for n, t in enumerate(rows)
    ]
    (folder / f'{name}.jsonl').write_text('\n'.join(lines))
  for split, pairs in qrels.items():
    lines = ['query-id\tcorpus-id\tscore']
    lines += [f'q{query}\tc{passage}\t1' for query, passage in pairs]
    (folder / 'qrels' / f'{split}.tsv').write_text('\n'.join(lines) + '\n')


@pytest.mark.parametrize(
  ('texts', 'train_pairs', 'settings', 'message'),
  [
    (
      ['one', 'two', 'three'],
      [(0, 0)],
      {'warmup_method': 'in_batch', 'top_k': 2},
      '--warmup_method=in_batch finds no negative .* .1 in all.',
    ),
    # The one alone that the row takes for a positive leaves two, but the
    # warm-up takes all three.
    (
      ['one', 'two', 'three'],
      [(0, 0), (0, 1), (0, 2)],
      {'method': 'ance_code', 'warmup_method': 'bm25', 'top_k': 1,
       'num_hard_negatives': 1},
      'all 3 passages of the corpus are positives of one training query',
    ),
  ],
)  # fmt: skip
def test_a_run_that_could_not_learn_is_refused_before_it_starts(
  texts, train_pairs, settings, message, tiny, tmp_path
):
  write_set(tmp_path / 'set', texts, {'train': train_pairs, 'dev': [(2, 2)]})
  config = dataclasses.replace(
    tiny, data_dir=str(tmp_path / 'set'), num_devices=1,
    **{'method': 'ance', 'warmup_steps': 2, **settings},
  )  # fmt: skip
  with pytest.raises(errors.BadInput, match=message):
    train.run(config)


@pytest.mark.parametrize(
  ('above', 'is_said'), [(0.0, True), (1e-3, False), (None, False)]
)
def test_a_refresh_whose_negatives_are_all_below_says_so(above, is_said):
  names = ('judged', 'same_text', 'own_text', 'random', 'answers')
  counts = dict(zip(names, range(1, 6), strict=True))
  values = {f'refresh/{name}': n for name, n in counts.items()}
  values['probe/positive_rank'] = 1.0
  if above is not None:
    values['probe/above_positive'] = above
  made = {'step': 4, 'mined': True, 'metrics': values, 'secs': {}}
  line = refreshes.summary(made)
  assert ('no negative scores as high as its positive' in line) == is_said
  assert line.startswith('refresh at step 4: no dev split, median rank of ')
  assert "1 judged, 2 of their text, 3 of the query's own; 4 drawn at" in line
  assert '5 with an answer left out' in line


def said_after(steps, signs=None):
  """The numbers of the steps that a sign was said after, and what it was."""
  signs = signs or checks.Signs()
  found = [(n, signs.seen(*step)) for n, step in enumerate(steps, 1)]
  return [pair for pair in found if pair[1]]


def test_a_sign_is_said_once_for_the_same_negatives():
  signs = checks.Signs()
  ((number, text),) = said_after([(0.0, 1.0, None)] * 200, signs)
  assert number == 50
  assert text.startswith('the loss was 0 in each of the last 50 steps')
  # Other negatives are other ones: what was seen before does not count.
  ((number, _),) = said_after([(0.0, 1.0, 7)] * 200, signs)
  assert number == 50
  steps = [(0.0, 1.0, None)] * 49
  assert said_after([*steps, (1e-6, 1.0, None)])[0][1][:12] == 'in the last '
  assert said_after([*steps, (0.0, 1.0, 4), *steps]) == []


def test_a_loss_that_no_batch_changes_is_told_of():
  ((number, text),) = said_after([(0.75, 0.0, None)] * 60)
  assert number == 50
  assert text.startswith('the loss was exactly 0.75 in each of the last 50 ')
  varied = [(0.75 + 1e-7 * (n % 50 == 0), 0.0, None) for n in range(300)]
  assert said_after(varied) == []


@pytest.mark.parametrize(
  ('losses', 'accuracies', 'is_said'),
  [
    ((0.0, 0.019), (1.0, 1.0), True),
    ((0.0, 0.021), (1.0, 1.0), False),
    ((0.0, 0.019), (1.0, 0.9982), True),
    ((0.0, 0.019), (1.0, 0.9978), False),
  ],
)
def test_solved_negatives_are_told_of(losses, accuracies, is_said):
  steps = [(losses[n % 2], accuracies[n % 2], None) for n in range(90)]
  found = said_after(steps)
  assert [number for number, _ in found] == [50] * is_said
  # A hundred steps of before do not hide what is now.
  hard = [(2.0 + n, 0.0, None) for n in range(100)]
  assert [n for n, _ in said_after(hard + steps)] == [150] * is_said


def test_a_run_says_once_a_start_that_nothing_is_left_to_learn(
  tiny, monkeypatch, capsys
):
  monkeypatch.setattr(checks.logs.pace, '_FIRST_SECS', 0)
  monkeypatch.setattr(checks, '_STEPS', 3)
  monkeypatch.setattr(checks, '_SOLVED_LOSS', 99)
  monkeypatch.setattr(checks, '_SOLVED_ACCURACY', -1)
  config = dataclasses.replace(
    tiny, num_devices=1, warmup_steps=5, steps_per_refresh=5, max_steps=20,
    max_refreshes=2,
  )  # fmt: skip
  due_test.stopped_now_and_then(config, monkeypatch, (12,))
  said = capsys.readouterr().out.splitlines()
  assert 'first step: 00:00 so far' in said
  start = said.index(
    f'training {config.workdir} goes on from the checkpoint of step 14'
  )
  signs = [
    (line.split(': ')[0], place > start)
    for place, line in enumerate(said)
    if 'little is left to learn' in line
  ]
  # In the warm-up, of both refreshes, and of the last one again.
  assert signs == [
    ('step 3', False), ('step 8', False), ('step 13', False), ('step 17', True)
  ]  # fmt: skip


def test_a_row_that_trains_one_side_is_refused_where_both_share_a_tower(
  tiny, monkeypatch
):
  row = methods.METHODS['in_batch']._replace(trains=('query',))
  monkeypatch.setitem(methods.METHODS, 'in_batch', row)
  run = SimpleNamespace(
    config=dataclasses.replace(tiny, method='in_batch', warmup_steps=0),
    dataset=DATASET,
    retriever=SimpleNamespace(
      config=SimpleNamespace(tied=True, embedding_size=16)
    ),
  )
  with pytest.raises(errors.BadInput, match='query tower alone.*set --notie'):
    checks.of_run(run)


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'matryoshka_widths': '8,16'}, 'is not below the width of embeddings, 16'),
    ({'topics': 49}, '--topics=49 is more than the 48 training queries'),
    ({'trainable': 'layer_7'}, 'matches no parameter, such as body/'),
  ],
)
def test_sizes_that_the_run_has_not_are_refused(changes, says, tiny):
  with pytest.raises(errors.BadInput, match=says):
    train.run(dataclasses.replace(tiny, dry_run=True, **changes))


@pytest.mark.parametrize(
  'changes',
  [
    {'matryoshka_widths': '8,15'}, {'topics': 48}, {'trainable': 'layer_0'},
  ],
)  # fmt: skip
def test_sizes_at_their_edge_are_taken(changes, tiny):
  assert train.run(dataclasses.replace(tiny, dry_run=True, **changes)) is None
