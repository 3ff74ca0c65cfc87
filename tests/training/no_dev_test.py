"""`--dev_fraction=0`: data without a dev split trains on all of its queries."""

import dataclasses
import pathlib
import shutil

import crash_test
import due_test
import numpy as np
import pytest
from report_test import rows_of

from ance_jax import errors
from ance_jax.core import checkpoint
from ance_jax.core import logs
from ance_jax.core import workdirs
from ance_jax.jobs import evaluate
from ance_jax.jobs import export
from ance_jax.jobs import refresh
from ance_jax.jobs import report
from ance_jax.jobs import train
from ance_jax.training import experiment

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture
def config(eventful, beir_folder, tmp_path):
  folder = tmp_path / 'data'
  shutil.copytree(beir_folder, folder)
  (folder / 'qrels' / 'dev.tsv').unlink()
  return dataclasses.replace(
    eventful,
    workdir=str(tmp_path / 'without'),
    data_dir=str(folder),
    dev_fraction=0.0,
  )


@pytest.mark.parametrize('fraction', [0.0, 0.4])
def test_where_the_data_has_dev_the_fraction_changes_nothing(
  fraction, eventful, capsys
):
  changed = dataclasses.replace(eventful, dev_fraction=fraction)
  both = experiment.load_texts(changed, ('train', 'dev')).splits
  usual = experiment.load_texts(eventful, ('train', 'dev')).splits
  assert {n: s.hash for n, s in both.items()} == {
    n: s.hash for n, s in usual.items()
  }
  assert '--dev_fraction' not in capsys.readouterr().out


def test_a_run_without_dev_is_that_with_it_but_for_what_dev_says(
  config, eventful, monkeypatch, capsys
):
  train.run(eventful)
  with_dev = crash_test.outcome(eventful)
  capsys.readouterr()
  due_test.stopped_now_and_then(config, monkeypatch, (9,))
  said = capsys.readouterr().out

  found = crash_test.outcome(config)
  of_dev = ('dev/', 'probe/dev_', 'flops/')
  values = {k: v for k, v in with_dev[3].items() if not k[1].startswith(of_dev)}
  assert {k: v for k, v in found[3].items() if k[1][:6] != 'flops/'} == values
  assert {k[0] for k in values if k[1] == 'probe/positive_rank'} == {
    0, 4, 5, 8, 10, 12, 15, 16
  }  # fmt: skip
  crash_test.check_same((*found[:3], None, found[4]), (
    *with_dev[:3], None, with_dev[4]
  ))  # fmt: skip
  assert 'train: 48 queries' in said
  assert "no split 'dev' in the data, and --dev_fraction=0" in said
  rank = found[3][5, 'probe/positive_rank']
  line = f'no dev split, median rank of training positives {rank:g}'
  assert f'evaluation at step 5: {line}' in said.splitlines()
  assert train.run(config) == {}  # It is over: nothing but what it came to.

  # What looks at such a run.
  workdir = pathlib.Path(config.workdir)
  assert not (workdir / 'examples').exists()
  assert report.table(workdir) == 'no dev split'
  page = (workdir / workdirs.PAGE_FILE).read_text()
  for title in ('Dev by evaluation', 'Examples of dev'):
    assert f'<h2>{title}</h2>\n<p>no dev split</p>' in page
  assert len(rows_of(page, 'Refreshes')) == 4
  runs_of_both = f'{config.workdir},{eventful.workdir}'
  report.run(
    dataclasses.replace(
      config, job='report', runs=runs_of_both, picture=f'{workdir}/both.png'
    )
  )
  _check_jobs(config, capsys)


def _check_jobs(config, capsys):
  capsys.readouterr()
  assert checkpoint.choose(config.workdir, 'best') == 16
  assert 'its best checkpoint is the last' in capsys.readouterr().out
  folder = export.run(dataclasses.replace(config, job='export'))
  assert (
    '## Dev\n\n```\nno dev split\n```' in (folder / 'README.md').read_text()
  )
  evaluating = dataclasses.replace(config, job='evaluate', split='test')
  assert evaluate.run(evaluating)['mrr@10'] > 0
  with pytest.raises(errors.BadInput, match="the data has no split 'dev'"):
    evaluate.run(dataclasses.replace(evaluating, split='dev'))
  again = dataclasses.replace(config, job='refresh', checkpoint='12')
  shutil.rmtree(pathlib.Path(config.workdir) / 'refresh')
  refresh.run(again)
  line = 'refresh at step 12: no dev split, median rank of'
  assert line in capsys.readouterr().out
  # A dev split that comes later would be another run.
  qrels = pathlib.Path(config.data_dir) / 'qrels'
  shutil.copy(qrels / 'test.tsv', qrels / 'dev.tsv')
  longer = dataclasses.replace(config, max_steps=20)
  for job, change in ((train.run, longer), (refresh.run, again)):
    with pytest.raises(errors.BadInput, match="has a split 'dev' where"):
      job(change)
  # To score it, or to look at the training queries alone, is no other run.
  assert evaluate.run(dataclasses.replace(evaluating, split='dev'))
  assert experiment.open(again, ('train',))[1] == 12


def test_a_row_that_never_refreshes_does_without_dev_too(config):
  config = dataclasses.replace(
    config, max_steps=4, method='in_batch', steps_per_eval=None
  )
  assert train.run(config) == {}
  assert set(logs.series(config.workdir, 'probe/positive_rank')) == {4}
  assert logs.dev_measures(config.workdir) == []


def test_refreshes_beside_training_do_without_dev_too(config):
  config = dataclasses.replace(
    config,
    max_steps=10,
    refresh_mode='async',
    max_staleness=8,
    refresh_trigger=0.01,
  )
  assert train.run(config) == {}
  ranks = logs.series(config.workdir, 'probe/positive_rank')
  # When a refresh beside training comes into use is a matter of time.
  assert 10 in ranks
  assert all(np.isfinite(list(ranks.values())))
  assert logs.dev_measures(config.workdir) == []
