"""Numbers that are printed and logged, against plain recounts."""

import collections
from types import SimpleNamespace

import numpy as np
import pytest
import transformers

from ance_jax import config as config_lib
from ance_jax.core import checkpoint
from ance_jax.core import logs
from ance_jax.data import tokens
from ance_jax.models import bert
from ance_jax.retrieval import encoding
from ance_jax.training import negatives
from ance_jax.training import run_log
from ance_jax.training import schedule


@pytest.mark.parametrize('rows_per_block', [7, 50, 200])
def test_shares_and_operations_of_encoding_are_of_what_was_encoded(
  rows_per_block, tmp_path
):
  random, shapes = np.random.default_rng(0), []
  lengths = random.integers(1, 40, 120)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  ids = np.ones(offsets[-1], np.uint16)
  rows = tokens.TokenRows(ids, offsets, 0, '')

  def encode_batch(params, ids, lengths):
    shapes.append(ids.shape)
    return np.zeros((len(ids), 4), np.float32)

  encoder = encoding.Encoder(encode_batch, 2, 256, 48, 4)
  for expected in ('all of it', None):
    shapes.clear()
    _, share = encoding.encode_corpus(
      encoder, None, rows, tmp_path, rows_per_block=rows_per_block
    )
    if expected:
      body = bert.BodyConfig('bert', 9, 8, 3, 2, 16, 48, 1, 1e-12, 'gelu')
      a_token = {
        n: 3 * (2 * (4 * 64 + 2 * 8 * 16) + 4 * n * 8) for _, n in shapes
      }
      assert encoding.flops(encoder, body, lengths, rows_per_block) == sum(
        rows * n * a_token[n] for rows, n in shapes
      )
      expected = lengths.sum() / sum(rows * n for rows, n in shapes)
    assert share == expected
  # What is there is not encoded again, but counts as the work that it is.
  assert shapes == []


def test_what_is_logged_of_a_step_is_of_that_step():
  config = config_lib.Config(
    learning_rate=1.0,
    lr_warmup_steps=4,
    max_steps=10,
    steps_per_log=2,
    steps_per_checkpoint=4,
  )
  written = {}
  log = run_log.RunLog(
    SimpleNamespace(config=config),
    SimpleNamespace(write=written.__setitem__),
    collections.Counter(),
    None,
    {0: [100.0, 10.0]},
  )
  # Step n is made with the rate after n - 1 steps: up from 0, then down to 0.
  rates = [0, 1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
  for step in range(1, 11):
    active = schedule.ActiveRefresh(5, 3) if step > 5 else None
    metrics = {'loss': step / 8, 'accuracy': 0.5, 'grad_norm': 2.0}
    work = {'flops': 2.0 * step, 'flops_real': 1.0}
    log.log_step(step, metrics | work, active)
  # On top of what the steps before the restart took, 110 = 2 (1 + ... + 10).
  # What was done up to a checkpoint is kept for a refresh that comes later.
  assert log.work == {
    0: [100.0, 10.0], 4: [120.0, 14.0], 8: [172.0, 18.0], 10: [210.0, 20.0]
  }  # fmt: skip
  assert list(written) == [2, 4, 6, 8, 10]
  for step, values in written.items():
    assert values.pop('train/learning_rate') == pytest.approx(rates[step - 1])
    age = {'train/negatives_age': step - 3} if step > 5 else {}
    assert values == {
      'train/loss': step / 8, 'train/accuracy': 0.5, 'train/grad_norm': 2, **age
    }  # fmt: skip


def test_operations_are_summed_without_rounding():
  log = run_log.RunLog(
    SimpleNamespace(config=config_lib.Config(steps_per_log=9)),
    None,
    collections.Counter(),
    None,
    {0: [2.0**40, 2.0**50]},
  )
  metrics = {'loss': 1.0, 'accuracy': 0.5, 'grad_norm': 2.0}
  metrics |= {'flops': np.float32(3), 'flops_real': np.float32(1)}
  for step in (1, 2):
    log.log_step(step, metrics, None)
  assert log.work[2] == [2**40 + 6, 2**50 + 2]


@pytest.mark.parametrize(
  ('step', 'expected'), [(4, (120.0, 14.0)), (8, (172.0, 18.0)), (6, None)]
)
def test_a_refresh_that_comes_late_has_the_operations_of_its_own_step(
  step, expected, monkeypatch
):
  monkeypatch.setattr(run_log.distributed, 'is_first', lambda: False)
  written = {}
  log = run_log.RunLog(
    SimpleNamespace(config=config_lib.Config()),
    SimpleNamespace(write=written.__setitem__),
    collections.Counter(),
    None,
    {4: [120.0, 14.0], 8: [172.0, 18.0], 10: [210.0, 20.0]},
  )
  made = {'metrics': {'dev/mrr@10': 0.5}, 'secs': {}, 'flops': {'encode': 7.0}}
  log.log_evaluation(step, made)
  names = 'flops/train', 'flops_real/train'
  found = {name: written[step].get(name) for name in names}
  assert found == dict(zip(names, expected or (None, None), strict=True))
  assert written[step]['flops/encode'] == 7


@pytest.mark.parametrize('name', ['loss', 'grad_norm'])
@pytest.mark.parametrize('value', [np.inf, np.nan])
def test_a_non_finite_step_ends_the_run(name, value):
  log = run_log.RunLog(
    SimpleNamespace(config=config_lib.Config(steps_per_log=1)),
    SimpleNamespace(write=lambda *_: pytest.fail('it is written')),
    collections.Counter(),
    None,
    {},
  )
  metrics = {'loss': 1.0, 'accuracy': 0.5, 'grad_norm': 2.0, name: value}
  metrics |= {'flops': 1.0, 'flops_real': 1.0}
  with pytest.raises(FloatingPointError, match=f'step 3 has .*{value}'):
    log.log_step(3, metrics, None)


@pytest.mark.parametrize(
  ('settings', 'given', 'source'),
  [
    ({'bm25_run': '/x'}, [[1]], 'file'),
    ({'bm25_run': '/x'}, None, 'file'),
    ({}, [[1]], 'lists'),
    ({}, None, 'bm25s'),
  ],
)
def test_bm25_is_the_file_that_is_named_then_the_data_then_our_own(
  settings, given, source, monkeypatch
):
  config = config_lib.Config(
    bm25_k1=0.5, bm25_b=0.25, bm25_language='none', **settings
  )
  run = SimpleNamespace(config=config, dataset=SimpleNamespace(corpus=None))
  split = SimpleNamespace(negatives=given, texts=['q'])
  made = []
  for name, what in (('of_run_file', 'file'), ('of_lists', 'lists')):
    monkeypatch.setattr(
      negatives.candidates,
      name,
      lambda *_, what=what: SimpleNamespace(name=what),
    )
  monkeypatch.setattr(negatives.tokens, 'passage_texts', lambda *_: ['p'])
  monkeypatch.setattr(
    negatives.bm25, 'make_rank', lambda *texts, **kw: made.append((texts, kw))
  )
  assert negatives._bm25_source(run, split).name == source
  flags = {'k1': 0.5, 'b': 0.25, 'language': 'none', 'queries': ['q']}
  assert made == [((['p'],), flags)] * (source == 'bm25s')


@pytest.mark.parametrize(
  ('cut', 'most'),
  [
    (tokens.Cut(6), 4),
    (tokens.Cut(6, 3), 12),  # Each piece has special tokens of its own.
    (tokens.Cut(6, 3, whole=True), 16),
  ],
)
def test_texts_are_counted_as_cut_from_the_first_token_that_is_lost(
  cut, most, tmp_path, capsys
):
  words = {'[PAD]': 0, '[UNK]': 1, '[CLS]': 2, '[SEP]': 3, 'w': 4}
  tokenizer = transformers.BertTokenizer(vocab=words)
  for number, sizes in enumerate(((1, most), (most + 1, most, 40, most + 1))):
    rows = tokens.token_rows(
      tokenizer, ['w ' * size for size in sizes], what='texts',
      num_texts=len(sizes), cut=cut, content_hash=str(number), folder=tmp_path,
    )  # fmt: skip
    num_cut = sum(size > most for size in sizes)
    assert (np.asarray(rows.ids) == 4).sum() == sum(min(n, most) for n in sizes)
    mean = rows.lengths().mean()
    assert f'of {mean:.1f} tokens in the mean, {num_cut} of them cut' in (
      capsys.readouterr().out
    )


@pytest.mark.parametrize(
  ('scores', 'best'),
  [
    ({}, 12),  # Without dev the last.
    ({4: 0.5, 8: 0.5}, 8),
    ({4: 0.6, 8: 0.5, 12: 0.5}, 4),
    ({4: 0.0}, 4),
    ({0: 0.9, 8: 0.1}, 8),  # That of step 0 was not kept.
  ],
)
def test_the_best_checkpoint_is_the_newest_of_the_best(
  scores, best, monkeypatch
):
  monkeypatch.setattr(logs, 'dev_measures', lambda _: ['dev/mrr@10'])
  monkeypatch.setattr(logs, 'series', lambda *_: scores)
  assert checkpoint.best('/nowhere', [4, 8, 12]) == best


def test_tensorboard_is_told_from_which_step_on_a_restart_begins(
  tmp_path, monkeypatch
):
  from tensorboardX import event_file_writer

  events = []
  writer = SimpleNamespace(write_event=events.append)
  monkeypatch.setattr(event_file_writer, 'EventsWriter', lambda _: writer)
  logs._Board(tmp_path, 7)
  assert [event.step for event in events] == [8]
