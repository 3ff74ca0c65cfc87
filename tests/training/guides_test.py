"""The guide: its own tokenizer, prompts and lengths, once for all runs."""

import dataclasses
import pathlib
from types import SimpleNamespace

import conftest
import crash_test
import numpy as np
import pytest

from ance_jax import api
from ance_jax import errors
from ance_jax.core import checkpoint
from ance_jax.core import remote
from ance_jax.data import corpus as corpus_lib
from ance_jax.jobs import train
from ance_jax.training import batches
from ance_jax.training import experiment
from ance_jax.training import guides
from ance_jax.training import trainer


@pytest.fixture(scope='module')
def teacher(tmp_path_factory, beir_folder):
  """A run with lengths, a prompt and a vocabulary of its own."""
  folder = tmp_path_factory.mktemp('teacher') / 'run'
  config = dataclasses.replace(
    conftest.make_tiny(beir_folder, folder), method='in_batch', max_steps=4,
    num_devices=1, passage_length=12, query_length=6, vocab_size=150,
    query_prompt='find: ', hidden_size=24, similarity='dot',
  )  # fmt: skip
  train.run(config)
  return folder


def test_it_may_be_the_weights_of_the_active_refresh(tiny):
  """Those of before the warm-up's end have none; columns then all count."""
  seen = []

  def make_batch(*given, guide, **settings):
    seen.append((len(seen), guide))  # Steps are made in order.
    return real(*given, guide=guide, **settings)

  config = dataclasses.replace(
    tiny, method='ance_guided', warmup_method='in_batch', warmup_steps=2,
    steps_per_refresh=3, max_steps=9, guide='refresh', guide_margin=-0.1,
    refresh_mode='delayed', refresh_delay=1, num_devices=2,
    checkpoints_to_keep=9, steps_per_eval=4,
  )  # fmt: skip
  real = batches.make_batch
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batches, 'make_batch', make_batch)
    train.run(config)
  refreshes = {3: 2, 4: 2, 5: 2, 6: 5, 7: 5, 8: 5}
  assert [step for step, guide in seen if guide is None] == [0, 1, 2]
  run, _ = experiment.open(config, ('train', 'dev'))
  for step, guide in seen[3:]:
    own = api.load(config.workdir, checkpoint=str(refreshes[step]))
    check_embeddings(guide, own, run.dataset)


@pytest.mark.parametrize('damaged', [False, True])
def test_its_weights_are_kept_for_each_checkpoint_that_may_be_resumed(
  damaged, tiny, monkeypatch
):
  """Even for the checkpoint before the newest, where that one is damaged."""
  config = dataclasses.replace(
    tiny, method='ance_guided', warmup_method='in_batch', warmup_steps=2,
    steps_per_refresh=5, max_steps=14, guide='refresh', guide_margin=-0.1,
    num_devices=1, checkpoints_to_keep=2, steps_per_checkpoint=1,
    steps_per_eval=20,
  )  # fmt: skip
  whole = dataclasses.replace(config, workdir=f'{config.workdir}-whole')
  train.run(whole)
  # Not kept for another reason.
  monkeypatch.setattr(checkpoint, 'best', lambda *_: None)
  take_step = trainer.Trainer.take_step

  def killed(self, batch):
    if self.step == 8:
      raise KeyboardInterrupt
    take_step(self, batch)

  with monkeypatch.context() as patch:
    patch.setattr(trainer.Trainer, 'take_step', killed)
    with pytest.raises(KeyboardInterrupt):
      train.run(config)
  committed = checkpoint.committed_steps(config.workdir)
  assert committed[-1] == 8
  if damaged:
    # Training goes on from step 6, on the refresh of step 2.
    assert 6 in committed
    for step in (7, 8):
      folder = pathlib.Path(config.workdir, 'checkpoints', str(step))
      (folder / 'record' / 'run.flags').write_text('')
  train.run(config)
  crash_test.check_same(crash_test.outcome(config), crash_test.outcome(whole))


def check_embeddings(guide, retriever, dataset):
  """Returns the passages' embeddings, seen to be the guide's."""
  corpus, split = dataset.corpus, dataset.splits['train']
  np.testing.assert_allclose(
    guide.queries, retriever.encode_queries(list(split.texts)), atol=1e-5
  )
  rows = range(len(corpus.texts))
  passages = retriever.encode_passages(
    [corpus.texts[row] for row in rows],
    [corpus_lib.whole_title(corpus, row) for row in rows],
  )
  np.testing.assert_allclose(np.concatenate(guide.blocks), passages, atol=1e-5)
  return passages


def of_params(**params):
  """What is read of a guide's retriever."""
  params = {'query': np.zeros(3), 'passage': np.zeros(3), **params}
  return SimpleNamespace(
    config=SimpleNamespace(tied=False),
    params=params,
    passage_hash=lambda: checkpoint.weights_hash(params['passage']),
  )


def run_in(workdir):
  return SimpleNamespace(
    id='run', workdir=workdir, config=SimpleNamespace(guide='guide')
  )


@pytest.mark.parametrize('tower', ['query', 'passage'])
def test_another_one_is_refused_whichever_tower_differs(tower, tmp_path):
  run = run_in(tmp_path)
  guides._check_same(run, of_params())
  guides._check_same(run, of_params())
  with pytest.raises(errors.BadInput, match='has other weights than when'):
    guides._check_same(run, of_params(**{tower: np.ones(3)}))


def test_another_one_is_refused_on_another_machine_too(tmp_path):
  here, there = tmp_path / 'here', tmp_path / 'there'
  for folder in (here, there):
    folder.mkdir()
    remote.connect(folder, str(tmp_path / 'remote'))
  guides._check_same(run_in(here), of_params())
  with pytest.raises(errors.BadInput, match='has other weights than when'):
    guides._check_same(run_in(there), of_params(query=np.ones(3)))
  guides._check_same(run_in(there), of_params())


def test_its_embeddings_are_those_of_its_own_retriever(teacher, tiny, tmp_path):
  config = dataclasses.replace(
    tiny, method='guided', guide=str(teacher), num_devices=2,
    tokens_dir=str(tmp_path / 'tokens'), passage_length=9,
  )  # fmt: skip
  run, _ = experiment.create(config, ('train', 'dev'))
  run.workdir.mkdir()
  guide = guides.make(run)
  passages = check_embeddings(guide, api.load(str(teacher)), run.dataset)
  queries, rows = np.array([3, 0]), np.array([[70, 5], [149, 0]])
  found = guide.of_batch(queries, rows)
  np.testing.assert_array_equal(found[0], guide.queries[queries])
  np.testing.assert_allclose(found[1], passages[rows], atol=1e-5)
  # Another run takes the same embeddings, however it is refreshed.
  (kept,) = pathlib.Path(config.tokens_dir, 'guide').iterdir()
  stamps = {path: path.stat().st_mtime_ns for path in kept.rglob('*.npy')}
  assert stamps
  again = dataclasses.replace(
    config, workdir=str(tmp_path / 'other'), refresh_mode='delayed',
    refresh_delay=1,
  )  # fmt: skip
  other, _ = experiment.create(again, ('train', 'dev'))
  other.workdir.mkdir()
  guides.make(other)
  assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
