"""MS MARCO's files: passages and documents, with the TREC DL tracks.

Nguyen et al. 2016; Craswell et al. 2020. All are tab-separated, without quotes
or header; judgements are in TREC's format.
"""

from typing import NamedTuple

from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import downloads
from ance_jax.data import records

_PART = corpus_lib.TITLE_PART
# ANCE's code keeps this many characters of url</s>title</s>body
# (msmarco_data.py). `_PART` is one character, so the separators take 7 more.
_DOCUMENT_CHARACTERS, _SEPARATORS = 10_000, 7

_TEXTS = ('id', 'text')


class _Files(NamedTuple):
  """File names of a split, the original name first."""

  queries: tuple
  judgements: tuple
  protocol: str


_PASSAGE_SPLITS = {
  'train': _Files(('queries.train.tsv',), ('qrels.train.tsv',), 'msmarco'),
  'dev': _Files(
    ('queries.dev.small.tsv',), ('qrels.dev.small.tsv',), 'msmarco'
  ),
  'dl19': _Files(
    ('msmarco-test2019-queries.tsv', 'queries.dl19.tsv'),
    ('2019qrels-pass.txt', 'qrels.dl19-passage.txt'),
    'trec_dl',
  ),
  'dl20': _Files(
    ('msmarco-test2020-queries.tsv', 'queries.dl20.tsv'),
    ('2020qrels-pass.txt', 'qrels.dl20-passage.txt'),
    'trec_dl',
  ),
}
_DOCUMENT_SPLITS = {
  'train': _Files(
    ('msmarco-doctrain-queries.tsv',),
    ('msmarco-doctrain-qrels.tsv',),
    'msmarco_doc',
  ),
  'dev': _Files(
    ('msmarco-docdev-queries.tsv',),
    ('msmarco-docdev-qrels.tsv',),
    'msmarco_doc',
  ),
  'dl19': _Files(
    ('msmarco-test2019-queries.tsv',), ('2019qrels-docs.txt',), 'trec_dl_doc'
  ),
  'dl20': _Files(
    ('msmarco-test2020-queries.tsv',), ('2020qrels-docs.txt',), 'trec_dl_doc'
  ),
}


def read_passages(settings: records.Settings) -> corpus_lib.RawDataset:
  """Reads the passages in `--data_dir`."""
  folder = records.open_folder(settings, 'collection.tsv')
  corpus = _corpus(
    _needed(settings, folder, 'collection.tsv'),
    lambda an_id, text: (an_id, '', text),
    _TEXTS,
  )
  records.say_corpus('MS MARCO passages, without titles', corpus)
  return _source(settings, folder, corpus, _PASSAGE_SPLITS)


def read_titled_passages(settings: records.Settings) -> corpus_lib.RawDataset:
  """Reads the passages in `--data_dir`, with the titles of their pages.

  This is the corpus of RocketQA, coCondenser, Tevatron, SimLM and ANCE-Tele,
  which is not MS MARCO's: para.txt and para.title.txt. Some passages have no
  title.
  """
  folder = records.open_folder(settings, 'para.txt')
  path = _needed(settings, folder, 'para.title.txt')
  titles = _corpus(
    path,
    lambda an_id, title: (an_id, '', title),
    ('id', 'title'),
    may_be_empty=True,
  )

  def titled(an_id, text):
    row = titles.rows.get(an_id)
    return an_id, '' if row is None else titles.texts[row], text

  corpus = _corpus(_needed(settings, folder, 'para.txt'), titled, _TEXTS)
  records.say_corpus('MS MARCO passages, with titles (unofficial)', corpus)
  missing = sum(not title for title in corpus.titles)
  logs.log(f'{path}: {missing:,} passages without a title')
  return _source(settings, folder, corpus, _PASSAGE_SPLITS)


def read_documents(settings: records.Settings) -> corpus_lib.RawDataset:
  """Reads the documents in `--data_dir`.

  As in ANCE, the text is the first 10,000 characters of URL, title and body,
  separated by `--title_separator`.
  """
  folder = records.open_folder(settings, 'msmarco-docs.tsv')
  path = _needed(settings, folder, 'msmarco-docs.tsv')
  shortened = 0

  def document(an_id, url, title, body):
    nonlocal shortened
    # A document without a body gets its title as text.
    head, text = (f'{url}{_PART}{title}', body) if body else (url, title or url)
    room = max(_DOCUMENT_CHARACTERS - len(head) - _SEPARATORS, 1)
    shortened += len(text) > room
    return an_id, head, text[:room]

  corpus = _corpus(
    path, document, ('id', 'url', 'title', 'body'), may_be_empty=True
  )
  records.say_corpus('MS MARCO documents', corpus)
  logs.log(
    f'{path}: {shortened:,} documents cut at {_DOCUMENT_CHARACTERS:,} '
    'characters'
  )
  return _source(settings, folder, corpus, _DOCUMENT_SPLITS)


def _source(settings, folder, corpus, splits):
  def read_split(name):
    files = splits.get(
      name, _Files((f'queries.{name}.tsv',), (f'qrels.{name}.tsv',), 'msmarco')
    )
    queries = records.first(folder, files.queries)
    judgements = records.first(folder, files.judgements)
    if not (queries or judgements or (settings.download and name in splits)):
      return None
    queries = queries or _needed(settings, folder, files.queries[0])
    query_ids, texts = records.queries(queries, _lines(queries, _TEXTS))
    path = judgements or _needed(settings, folder, files.judgements[0])
    rows = {query_id: row for row, query_id in enumerate(query_ids)}
    pairs, missing = records.judgements(path, _judged(path), rows, corpus.rows)
    return corpus_lib.RawSplit(
      query_ids, texts, pairs, protocol=files.protocol, missing=missing
    )

  return corpus_lib.RawDataset(
    corpus, read_split, _splits_found(folder, splits)
  )


def _judged(path):
  """Yields (line number, query id, passage id, grade) in TREC's format."""
  for number, line in strict_io.lines(path):
    cells = line.split()
    if len(cells) != 4:
      raise strict_io.refusal(
        path,
        f'{strict_io.quoted(line)} is not query id, 0, passage id and grade',
        'correct the line',
        number,
      )
    yield number, cells[0], *cells[2:]


def _corpus(path, row, names, *, may_be_empty=False):
  """Returns the `corpus.Corpus` of a file.

  Args:
    path: The file.
    row: row(*cells) -> id, title and text.
    names: Names of the columns.
    may_be_empty: Whether the last cell may be empty.
  """
  lines = _lines(path, names, may_be_empty)
  return records.corpus(path, ((line, *row(*cells)) for line, *cells in lines))


def _lines(path, names, may_be_empty=False):
  """Yields the line number and the cells, the first of which is an id."""
  for line, cells in records.cells(path, names):
    if not may_be_empty and not cells[-1].strip():
      raise strict_io.refusal(
        path,
        f'{strict_io.quoted(cells[0])} has no text after its id',
        'remove it',
        line,
      )
    yield line, *cells


def _needed(settings, folder, name):
  return downloads.existing(settings, folder, name, 'a folder of MS MARCO')


def _splits_found(folder, splits):
  """Returns the existing splits, for error messages."""
  there = [
    name
    for name, files in splits.items()
    if records.first(folder, files.judgements)
  ]
  found = ', '.join(there) or f'none, not even {splits["train"].judgements[0]}'
  return f'{folder}, where there is {found}'
