"""The page of a search shows what checkpoints find and what was mined."""

import dataclasses
import html
import http.client
import http.server
import re
import threading
import types
import urllib.parse

import numpy as np
import pages_test
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.data import trec
from ance_jax.jobs import pages
from ance_jax.jobs import serve
from ance_jax.jobs import train
from ance_jax.training import experiment


@pytest.fixture(scope='module')
def _once():
  """Keeps the server of the module's run."""
  return {}


@pytest.fixture
def ask(tiny, compiled_once, _once):
  """ask(path, **headers) -> status and body of a served run."""
  if not _once:
    config = dataclasses.replace(tiny, num_devices=1, checkpoints_to_keep=9)
    train.run(config)
    job = dataclasses.replace(config, job='search', port=0)
    _once['config'] = config
    _once['server'] = serve.make_server(job)
    threading.Thread(target=_once['server'].serve_forever, daemon=True).start()

  def ask(path, method='GET', **headers):
    connection = http.client.HTTPConnection(
      '127.0.0.1', _once['server'].server_port
    )
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()

  ask.config = _once['config']
  return ask


def cells(page):
  rows = re.findall(r'<tr>(.*?)</tr>', page)
  found = [re.findall(r'<t[hd]>(.*?)</t[hd]>', row) for row in rows]
  return [[html.unescape(cell) for cell in row] for row in found]


def test_a_page_to_begin_with_links_to_training_queries(ask):
  status, page = ask('/')
  assert status == 200
  pages_test.check(page, pages.KEYS)
  assert '<input name="q"' in page
  links = re.findall(r'href="(\?q=[^"]+)"', page)
  assert len(links) == 5
  status, page = ask(f'/{links[0]}')
  assert status == 200
  assert 'Mined for this training query' in page


def test_a_training_query_shows_both_checkpoints_and_both_refreshes(ask):
  config = ask.config
  run, last = experiment.open(
    dataclasses.replace(config, job='evaluate'), ('train',)
  )
  split = run.dataset.splits['train']
  query = split.texts[0]
  _, page = ask(f'/?q={urllib.parse.quote(query)}')
  table = cells(page)
  assert table[0] == ['', 'step 0', f'step {last}']
  indexed = run.index_corpus(_watch())
  best = indexed.search(
    run.retriever.encode_queries([query]), config.num_results
  )
  relevant = split.passages[: split.offsets[1]]
  for place, row in enumerate(best.rows[0].tolist(), 1):
    assert f'[{run.dataset.corpus.ids[row]}]' in table[place][2]
    assert ('judged right' in table[place][2]) == (row in relevant)
  first, newest = (
    np.load(run.workdir / 'refresh' / f'{step:08d}' / 'negatives.npy')[0]
    for step in (4, 8)
  )
  head = table.index(['', 'refresh at step 4', 'refresh at step 8'])
  for place in range(5):
    for column, rows in ((1, first), (2, newest)):
      an_id = run.dataset.corpus.ids[int(rows[place])]
      assert f'[{an_id}]' in table[head + 1 + place][column]


def _watch():
  return serve.logs.Stopwatch()


def test_what_is_typed_is_shown_as_text(ask):
  typed = '<script>alert("1")</script> & more'
  status, page = ask(f'/?q={urllib.parse.quote(typed)}')
  assert status == 200
  pages_test.check(page, pages.KEYS)
  assert typed not in page
  assert html.escape(typed) in page
  assert 'Mined for' not in page


@pytest.mark.parametrize(
  ('path', 'method', 'host', 'status'),
  [
    ('/', 'GET', 'localhost:1', 200),
    ('/', 'GET', 'evil.example:80', 403),
    ('/', 'GET', '127.0.0.1.evil.example:80', 403),
    ('/run.flags', 'GET', 'localhost:1', 404),
    ('/../run.flags', 'GET', 'localhost:1', 404),
    ('/', 'POST', 'localhost:1', 501),
  ],
)
def test_nothing_but_the_page_is_served_and_only_here(
  path, method, host, status, ask
):
  assert ask(path, method, Host=host)[0] == status
  assert ask('/?q=' + 'x' * 5000)[0] == 200


def test_checkpoints_that_find_different_numbers_share_a_table():
  def finder(rows):
    rows = np.array([rows])
    return lambda *_: trec.Ranking(rows, np.where(rows < 0, -np.inf, 0.5))

  texts = [f'text{row}' for row in range(4)]
  corpus = types.SimpleNamespace(ids='abcd', titles=[''] * 4, texts=texts)
  run = types.SimpleNamespace(
    config=config_lib.Config(num_results=3),
    dataset=types.SimpleNamespace(corpus=corpus),
  )
  finders = {1: finder([3, -1, -1]), 2: finder([2, 3, 0])}
  assert serve._results(run, finders, 'q', {3}) == [
    ['', 'step 1', 'step 2'],
    ['1', '0.500 (judged right) [d] text3', '0.500 [c] text2'],
    ['2', '', '0.500 (judged right) [d] text3'],
    ['3', '', '0.500 [a] text0'],
  ]


def test_a_row_of_a_slice_is_that_of_its_query(tmp_path):
  corpus = types.SimpleNamespace(
    ids=[f'p{row}' for row in range(9)],
    titles=[''] * 9,
    texts=['text'] * 9,
    hash='corpus',
  )
  split = types.SimpleNamespace(hash='split')
  config = config_lib.Config(workdir=str(tmp_path), num_results=2)
  run = types.SimpleNamespace(
    config=config,
    workdir=tmp_path,
    dataset=types.SimpleNamespace(corpus=corpus, splits={'train': split}),
  )
  whose = {'groups': 'corpus', 'judgements': 'split'}
  others = {'groups': 'another', 'judgements': 'split'}
  of_others = {'groups': 'corpus', 'judgements': 'another'}
  for step, span, about in (
    (4, [0, 2], whose),
    (5, [2, 4], whose),
    (6, [2, 4], others),
    (7, [2, 4], of_others),
  ):
    manifest = {'query_slice': span, **about}
    with atomic.publish(tmp_path / 'refresh' / f'{step:08d}', manifest) as at:
      rows = np.arange(4).reshape(2, 2) + 10 * (step > 5) + 4 * (step == 5)
      np.save(at / 'negatives.npy', rows)

  # Another is being made.
  (tmp_path / 'refresh' / '00000008.new-1.unfinished').mkdir()

  def shown(query):
    page = ' '.join(serve._mined(run, query))
    steps = [int(n) for n in re.findall(r'refresh at step (\d)', page)]
    return steps, re.findall(r'\[(p\d)\]', page)

  assert shown(1) == ([4], ['p2', 'p3'])
  assert shown(2) == ([5], ['p4', 'p5'])
  assert shown(4) == ([], [])


@pytest.mark.parametrize(
  ('runs', 'source'),
  [(('own', 'other'), 'own'), (('other',), 'other'), ((), None)],
)
def test_what_was_mined_is_that_of_the_run_in_the_folder_first(
  runs, source, monkeypatch
):
  monkeypatch.setattr(experiment.pretrained, 'is_run', runs.__contains__)
  config = config_lib.Config(workdir='own', init_from='other')
  assert experiment.source(config) == source


@pytest.mark.parametrize('port', ['in use', 'of root'])
def test_a_port_that_cannot_be_had_is_refused_before_anything_is_read(
  port, tiny, monkeypatch
):
  monkeypatch.setattr(experiment, 'open', None)
  with http.server.HTTPServer(('127.0.0.1', 0), None) as other:
    number = other.server_port
    if port == 'of root':
      number = 80

      def bind(self):
        raise PermissionError(13, 'Permission denied')

      monkeypatch.setattr(serve._Server, 'server_bind', bind)
    config = dataclasses.replace(tiny, job='search', port=number)
    expected = f'--port={number} is {"in use" if port == "in use" else "one"}'
    with pytest.raises(errors.BadInput, match=expected):
      serve.make_server(config)


def test_a_start_that_fails_gives_its_port_back(tiny, monkeypatch):
  monkeypatch.setattr(experiment, 'open', lambda *_: 1 / 0)
  with http.server.HTTPServer(('127.0.0.1', 0), None) as other:
    number = other.server_port
  config = dataclasses.replace(tiny, job='search', port=number)
  with pytest.raises(ZeroDivisionError) as raised:
    serve.make_server(config)
  with http.server.HTTPServer(('127.0.0.1', number), None):
    assert raised.tb  # Which holds what was not closed.
