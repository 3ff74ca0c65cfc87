"""A run's page: what the folder tells is in it, whole, and as text."""

import base64
import dataclasses
import json
import re

import matplotlib.image
import numpy as np
from pages_test import HOSTILE
from pages_test import check
import pytest

from ance_jax import config as config_lib
from ance_jax.core import atomic
from ance_jax.jobs import report

DEV = {'dev/mrr@10': 0.25, 'dev/ndcg@10': 0.5, 'dev/recall@100': 0.75}
LINES = [
  {'step': 0, **DEV, 'time/encode_secs': 1.0, 'time/compiles': 3.0},
  {'step': 10, 'train/loss': 2.5},
  {'step': 10, 'time/train_secs': 4.0},
  {
    'step': 10, **DEV, 'dev/mrr@10': 0.3125, 'refresh/judged': 12345.0,
    'refresh/same_text': 7.0, 'refresh/random': 0.0, 'time/encode_secs': 2.0,
  },
  {'step': 15, 'time/train_secs': 8.0},
  {'step': 20, 'train/loss': 1.5, 'train/negatives_age': 10.0},
  {'step': 20, 'time/train_secs': 16.0},
  {
    'step': 20, **DEV, 'refresh/judged': 11.0, 'refresh/same_text': 8.0,
    'refresh/random': 2.0, 'refresh/overlap': 0.625, 'time/encode_secs': 32.0,
    'probe/overlap': 0.875, 'probe/cosine': 0.25,
    'flops/encode': 16e12, 'flops/train': 46e12,
  },
  {'step': 30, 'time/train_secs': 64.0},
  {
    'step': 30, **DEV, 'dev/mrr@10': 0.4375, 'time/encode_secs': 128.0,
    'probe/overlap': 0.5, 'flops/encode': 16e12, 'flops/train': 92e12,
    'flops_real/train': 69e12,
  },
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
  """The folder of a run with all that a page shows, its texts hostile."""
  folder = tmp_path / 'a run & <b>more</b>'
  (folder / 'examples').mkdir(parents=True)
  write_lines(folder, LINES)
  config = config_lib.Config(workdir='/tmp/<i>', max_steps=30, dataset='beir')
  (folder / 'run.flags').write_text(config.to_flagfile())
  for step, place in ((0, None), (10, 17), (30, 4)):
    example = {'query': HOSTILE[0], 'place': place, 'results': list(HOSTILE)}
    atomic.write_json(
      folder / f'examples/{step:08d}.json', {'examples': [example]}
    )
  atomic.write_json(
    folder / 'audit-20.json',
    {
      'queries': 48,
      'ranks up to': [10, 50],
      'shares': {'same text': [0.125, None]},
      'examples': [
        {
          'query': HOSTILE[1], 'positive': HOSTILE[2], 'rank 3': HOSTILE[3],
          'is': 'same text',
        }
      ],
    },
  )  # fmt: skip
  return folder


def write_lines(folder, lines):
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text)


def page_of(folder):
  report.write_page(folder, folder / 'report.html')
  return (folder / 'report.html').read_text()


def rows_of(page, heading):
  """The cells of the table behind a heading, row by row."""
  table = page.split(f'<h2>{heading}</h2>')[1].split('</table>')[0]
  return [
    re.findall(r'<t[hd]>(.*?)</t[hd]>', row)
    for row in re.findall(r'<tr>(.*?)</tr>', table)
  ]


def test_a_page_is_whole_and_shows_hostile_texts_as_texts(folder):
  reader = check(page_of(folder))
  assert f'Run {folder.name}' in reader.texts
  for text in (HOSTILE[0], f'rank 3: {HOSTILE[3]}', HOSTILE[1]):
    assert text in reader.texts


def test_a_picture_of_the_curves_lies_in_the_page(folder):
  page = page_of(folder)
  (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
  (folder / 'found.png').write_bytes(base64.b64decode(data))
  pixels = matplotlib.image.imread(folder / 'found.png')
  assert pixels.shape[0] > 400
  assert pixels.shape[1] > 1000
  assert np.ptp(pixels) > 0.5
  (about,) = re.findall(r'alt="([^"]+)"', page)
  assert about.split(': ')[1].split(', ') == [
    'train/loss', *DEV, 'train/negatives_age', 'probe/overlap'
  ]  # fmt: skip


TABLES = {
  'Refreshes': [
    ['refresh', 'step', 'judged', 'same text', 'random', 'overlap'],
    ['1', '10', '12,345', '7', '0', ''],
    ['2', '20', '11', '8', '2', '0.6250'],
  ],
  'Negatives and embeddings': [
    ['step', 'overlap', 'cosine'],
    ['20', '0.8750', '0.2500'],
    ['30', '0.5000', ''],
  ],
  'Costs': [
    ['stage', 'seconds', 'of all', 'TFLOP', 'TFLOP/s', 'TFLOP without padding'],
    ['encode', '163.0', '63.9%', '32.000', '0.20', ''],
    # Its operations are counted from the start, and not to be added up.
    ['train', '92.0', '36.1%', '92.000', '1.00', '69.000'],
    ['all but train', '163.0', '63.9%', '32.000', '0.20', ''],
  ],
  # Up to a refresh.
  'Seconds by stage': [
    ['', 'encode', 'compiles', 'train'],
    ['all', '163.0', '3', '92.0'],
    ['to refresh 1 at step 10', '3.0', '3', '4.0'],
    ['to refresh 2 at step 20', '32.0', '0', '24.0'],
    ['after the last', '128.0', '0', '64.0'],
  ],
  'Dev by evaluation': [
    ['step', 'refresh', 'mrr@10', 'ndcg@10', 'recall@100'],
    ['0', '', '0.2500', '0.5000', '0.7500'],
    ['10', '1', '0.3125', '0.5000', '0.7500'],
    ['20', '2', '0.2500', '0.5000', '0.7500'],
    ['30', '', '0.4375', '0.5000', '0.7500'],
  ],
  'False negatives: audit-20': [
    ['share that is', 'ranks 1-10', 'ranks 11-50'],
    ['same text', '12.50%', ''],
  ],
}


def test_tables_of_a_page_are_those_of_its_metrics(folder):
  page = page_of(folder)
  assert {name: rows_of(page, name) for name in TABLES} == TABLES


def test_the_gain_and_the_first_and_last_examples_are_in_it(folder):
  page = page_of(folder)
  assert 'dev mrr@10 since the first refresh: +0.1250' in page
  examples = rows_of(page, 'Examples of dev')
  assert [row[1:3] for row in examples[1:]] == [
    ['0', 'beyond the ranking'], ['30', '4']
  ]  # fmt: skip


def test_flags_that_differ_are_shown_and_all_are_folded(folder):
  page = page_of(folder)
  changed = page.split('Flags that are not the default</h2>\n<pre>')[1]
  changed = changed.split('</pre>')[0].splitlines()
  assert changed == [
    '--workdir=/tmp/&lt;i&gt;', '--dataset=beir', '--max_steps=30'
  ]  # fmt: skip
  folded = page.split('<details><summary>all flags</summary>')[1]
  assert '--batch_size=64' in folded.split('</details>')[0]


def test_a_damaged_file_is_left_out_of_the_page_and_said(folder, capsys):
  for name in ('audit-20.json', 'examples/00000000.json'):
    path = folder / name
    path.write_text(path.read_text().replace('same text', 'sane text'))
  (folder / 'examples/00000010.json').write_text('{')
  page = page_of(folder)
  check(page)
  assert 'False negatives' not in page
  out = capsys.readouterr().out
  assert 'audit-20.json is missing or was changed' in out
  assert 'This audit is left out.' in out
  assert 'These examples are left out.' in out


@pytest.mark.parametrize('number', [1, 2, len(LINES)])
def test_a_run_of_few_lines_has_a_page_too(number, tmp_path):
  write_lines(tmp_path, LINES[:number])
  page = page_of(tmp_path)
  check(page)
  assert 'no run.flags in the folder' in page


@pytest.mark.parametrize(
  ('of_start', 'why'),
  [({}, 'not evaluated yet'), ({'time/compiles': 3.0}, 'no dev split')],
)
def test_a_run_without_dev_metrics_says_why(of_start, why, tmp_path):
  start = {'step': 0, 'probe/cosine': 0.5, **of_start}
  write_lines(tmp_path, [start, {'step': 10, 'train/loss': 2.0}])
  assert report.table(tmp_path) == why
  assert page_of(tmp_path).count(f'<p>{why}</p>') == 2


def test_runs_are_drawn_by_the_dev_metrics_of_the_first_that_has_any():
  without = [{'step': 4, 'probe/positive_rank': 3.0, 'train/loss': 1.0}]
  assert report._curves([without, LINES]) == list(DEV)
  assert report._curves([without]) == ['probe/positive_rank']
  # Of runs without any, by what one of them has.
  other = [{**without[0], 'probe/overlap': 0.5, 'train/negatives_age': 2.0}]
  expected = ['probe/positive_rank', 'probe/overlap', 'train/negatives_age']
  assert report._curves([without, other]) == expected


def test_without_dev_each_curve_is_drawn_once(tmp_path):
  line = {
    'step': 4, 'train/loss': 1.0, 'probe/positive_rank': 3.0,
    'probe/overlap': 0.5, 'train/negatives_age': 2.0,
  }  # fmt: skip
  write_lines(tmp_path, [line])
  (about,) = re.findall(r'alt="curves of: ([^"]+)"', page_of(tmp_path))
  assert sorted(about.split(', ')) == sorted({*line} - {'step'})


def test_the_smoothed_loss_is_the_mean_of_the_last_fiftieth():
  series = {step: float(step % 7) for step in range(175)}
  values = list(series.values())
  slow = {n: np.mean(values[max(0, n - 2) : n + 1]) for n in series}
  assert report._smoothed(series) == pytest.approx(slow)


def test_the_report_job_writes_the_page_of_one_run_beside_its_picture(
  folder, tmp_path, capsys
):
  config = config_lib.Config(job='report', runs=str(folder))
  report.run(config)
  assert (folder / 'curves.png').read_bytes()[:4] == b'\x89PNG'
  check((folder / 'report.html').read_text())
  assert f'page: {folder}/report.html' in capsys.readouterr().out
  elsewhere = tmp_path / 'out'
  elsewhere.mkdir()
  picture = str(elsewhere / 'both.png')
  both = dataclasses.replace(config, runs=f'{folder},{folder}', picture=picture)
  report.run(both)
  assert capsys.readouterr().out.count('0.4375') == 2  # In each run's table.
  assert [path.name for path in elsewhere.iterdir()] == ['both.png']
