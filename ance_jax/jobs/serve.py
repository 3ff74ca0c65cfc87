"""Serves search as a local web page: `--job=search --port=8000`.

The page compares the results of the oldest saved checkpoint and the requested
one, and shows the negatives mined for a training query. It works without a
mouse; see `pages.KEYS`.
"""

import errno
import functools
from http import server
import itertools
import pathlib
import urllib.parse

import numpy as np

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import logs
from ance_jax.data import corpus as corpus_lib
from ance_jax.jobs import pages
from ance_jax.jobs import search
from ance_jax.models import bi_encoder
from ance_jax.training import experiment

# Loopback only, so that no other machine can connect.
_HOST = '127.0.0.1'
_MOST_CHARS, _PASSAGE_CHARS, _NUM_SAMPLES = 1000, 300, 5
_HINT = 'Keys: / query, j and k or arrows up and down, Tab across, Enter opens.'


def run(config: config_lib.Config) -> None:
  """Serves the page until Ctrl-C."""
  with make_server(config) as made:
    logs.log(f'http://{_HOST}:{made.server_port}/ (Ctrl-C ends it)')
    made.serve_forever()


def make_server(config: config_lib.Config) -> server.HTTPServer:
  """Returns a server that already listens.

  It opens the port before it reads the run; early requests wait.

  Args:
    config: Settings with the port; 0 for any free port.
  """
  made = _listen(config.port)
  try:
    made.RequestHandlerClass = _handler(_shower(config))
  except BaseException:
    made.server_close()
    raise
  return made


class _Server(server.HTTPServer):
  """A server that shares its port with no other."""

  allow_reuse_port = False


def _listen(port):
  """Returns a `_Server` that does not handle requests yet."""
  try:
    return _Server((_HOST, port), server.BaseHTTPRequestHandler)
  except OSError as error:
    facts = {
      errno.EADDRINUSE: 'is in use by another program',
      errno.EACCES: 'is one that only root may open, as all below 1024 are',
    }
    fact = facts.get(error.errno, f'cannot be opened ({error.strerror})')
    raise errors.refusal(
      f'--port={port} {fact}', 'choose another, or 0 for any that is free'
    ) from error


def _shower(config):
  """Returns show(query) -> HTML page."""
  this, step = experiment.open(config, (config.train_split,))
  finders = {step: search.finder(this)}
  source = experiment.source(config)
  committed = checkpoint.committed_steps(source) if source else ()
  oldest = min(committed, default=step)
  if oldest != step:
    old = checkpoint.read_params(
      source, oldest, bi_encoder.shapes(this.retriever.config), this.devices
    )
    finders = {oldest: search.finder(this.with_params(old)), **finders}
  split = this.dataset.splits[config.train_split]
  rows = {text: row for row, text in enumerate(split.texts)}
  # `HTTPServer` serves in one thread; threads do not share compiled code.
  return functools.partial(_page, this, finders, rows)


def _handler(show):
  """Returns a handler class that answers with show(query)."""

  class Handler(server.BaseHTTPRequestHandler):
    def do_GET(self):  # Name that the library requires.
      url = urllib.parse.urlsplit(self.path)
      # Blocks other sites that resolve their names to this machine.
      host = self.headers.get('Host', '').rpartition(':')[0]
      if host not in (_HOST, 'localhost'):
        self.send_error(403)
      elif url.path != '/':
        self.send_error(404)
      else:
        given = urllib.parse.parse_qs(url.query).get('q', [''])[0]
        page = show(' '.join(given.split())[:_MOST_CHARS]).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.send_header('Content-Length', str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *args):
      pass

  return Handler


def _page(run, finders, rows, query):
  """Returns the page of a query, or the start page for ''."""
  split = run.dataset.splits[run.config.train_split]
  parts = [pages.search_form(query), pages.paragraph(_HINT)]
  if query:
    row = rows.get(query, -1)
    of_query, positives = split.shared_positives()
    judged = set(positives[of_query == row].tolist())
    parts += [
      pages.results(_results(run, finders, query, judged), _PASSAGE_CHARS),
      *(_mined(run, row) if row >= 0 else []),
    ]
  else:
    random = np.random.default_rng(run.config.seed)
    size = min(_NUM_SAMPLES, len(split.texts))
    chosen = random.choice(len(split.texts), size, replace=False)
    parts += [
      pages.paragraph('Some of the training queries:'),
      pages.links(split.texts[row] for row in chosen),
    ]
  title = pathlib.Path(experiment.source(run.config) or run.workdir).name
  return pages.page(title, parts, pages.KEYS)


def _results(run, finders, query, judged):
  """Returns the rows of a table with the results of each checkpoint.

  Args:
    run: `experiment.Experiment`.
    finders: {step: `search.finder`} of each checkpoint.
    query: Text of the query.
    judged: Set of the rows of its positives.
  """
  depth = min(run.config.num_results, len(run.dataset.corpus.ids))
  rankings = [find([query], depth) for find in finders.values()]
  columns = [
    [
      f'{score:.3f}{" (judged right)" * (row in judged)} '
      + _passage(run.dataset.corpus, row)
      for row, score in zip(
        ranking.rows[0].tolist(), ranking.scores[0].tolist(), strict=True
      )
      if row >= 0
    ]
    for ranking in rankings
  ]
  rows = itertools.zip_longest(*columns, fillvalue='')
  return [
    ['', *(f'step {step:,}' for step in finders)],
    *([str(place), *cells] for place, cells in enumerate(rows, 1)),
  ]


def _mined(run, row):
  """Returns HTML of the negatives of a training query, by refresh."""
  found, source = [], experiment.source(run.config) or run.workdir
  split = run.dataset.splits[run.config.train_split]
  folders = sorted(pathlib.Path(source, 'refresh').glob('[0-9]*'))
  for folder in filter(atomic.is_committed, folders):
    manifest = atomic.read_json(folder / atomic.MANIFEST)
    # With --query_slices a refresh covers only some queries; with --init_from
    # the data may differ.
    start, end = manifest['query_slice']
    rows = manifest['groups'], manifest['judgements']
    if start <= row < end and rows == (run.dataset.corpus.hash, split.hash):
      negatives = atomic.load_array(folder / 'negatives.npy')[row - start]
      found.append((int(folder.name), negatives.tolist()))
  if not found:
    return [pages.paragraph('Nothing was mined for it.')]
  shown = found[:1] + found[1:][-1:]
  size = min(run.config.num_results, *(len(rows) for _, rows in shown))
  table = [
    ['', *(f'refresh at step {step:,}' for step, _ in shown)],
    *(
      [
        str(place + 1),
        *(_passage(run.dataset.corpus, n[place]) for _, n in shown),
      ]
      for place in range(size)
    ),
  ]
  return [
    pages.heading('Mined for this training query'),
    pages.results(table, _PASSAGE_CHARS),
  ]


def _passage(corpus, row):
  """Returns a passage as text, '' for row -1."""
  if row < 0:
    return ''
  title = corpus_lib.whole_title(corpus, row)
  return f'[{corpus.ids[row]}] {title and f"{title} | "}{corpus.texts[row]}'
