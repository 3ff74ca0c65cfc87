"""Writes small datasets in the original formats of MS MARCO and DPR.

They use the vocabulary of conftest.py's BEIR dataset, and contain oddities of
the real files (quotes, mojibake, leading spaces).
"""

import csv
import io
import json

import numpy as np

NUM_PASSAGES, NUM_TRAIN, NUM_DEV, NUM_TEST = 120, 32, 10, 8
ODD = {
  0: 'He said "no", and: "never" \'\' twice',
  1: 'The cafÃ© of naÃ¯ve people â\x80\x93 mojibake',
  2: '"Quoted from its start to its end"',
  3: 'a tab-less line with  two spaces and 5 < 6 & 7',
}


def passage_text(number):
  """Returns the text of passage `number`, deterministically."""
  random = np.random.default_rng(number)
  topic = number % 10
  words = [f't{topic}w{word}' for word in random.integers(40, size=9)]
  return ' '.join([*words, ODD.get(number, '')]).strip()


def queries(split):
  """Yields (number, text, row of the positive) per query of a split."""
  sizes = {'train': NUM_TRAIN, 'dev': NUM_DEV, 'test': NUM_TEST}
  before = {'train': 0, 'dev': NUM_TRAIN, 'test': NUM_TRAIN + NUM_DEV}
  for number in range(before[split], before[split] + sizes[split]):
    row = (7 * number) % NUM_PASSAGES
    random = np.random.default_rng(1000 + number)
    words = passage_text(row).split()[:9]
    yield number, ' '.join(random.choice(words, 4, replace=False)), row


def write_msmarco(folder):
  """Writes passages, titles and the splits train, dev, dl19."""
  passages = [(pid(row), passage_text(row)) for row in range(NUM_PASSAGES)]
  _tsv(folder / 'collection.tsv', passages)
  _tsv(folder / 'para.txt', passages)
  titles = [(pid(row), f'Title {row}') for row in range(0, NUM_PASSAGES, 2)]
  _tsv(folder / 'para.title.txt', titles)
  for split, query_file, judged in (
    ('train', 'queries.train.tsv', 'qrels.train.tsv'),
    ('dev', 'queries.dev.small.tsv', 'qrels.dev.small.tsv'),
    ('test', 'msmarco-test2019-queries.tsv', '2019qrels-pass.txt'),
  ):
    _queries(folder, split, query_file, judged, pid)


def write_documents(folder):
  """Writes documents and the splits train, dev, dl19."""
  rows = [
    (
      f'D{row}',
      f'http://site.org/{row}?a=b',
      f'Title {row}' if row % 5 else '',
      passage_text(row) if row != 4 else '',
    )
    for row in range(NUM_PASSAGES)
  ]
  rows[6] = (*rows[6][:3], 'long ' * 3000)
  _tsv(folder / 'msmarco-docs.tsv', rows)
  for split, query_file, judged in (
    ('train', 'msmarco-doctrain-queries.tsv', 'msmarco-doctrain-qrels.tsv'),
    ('dev', 'msmarco-docdev-queries.tsv', 'msmarco-docdev-qrels.tsv'),
    ('test', 'msmarco-test2019-queries.tsv', '2019qrels-docs.txt'),
  ):
    _queries(folder, split, query_file, judged, lambda row: f'D{row}')


def pid(row):
  """Returns a passage's id, a number; ids are not ascending."""
  return str((row * 37) % 1000)


def write_dpr(folder, questions='nq'):
  """Writes passages and questions, with context ids as in NQ or TriviaQA."""
  passages = [('id', 'text', 'title')]
  passages += [
    (str(row + 1), passage_text(row), f'Title "{row // 4}"')
    for row in range(NUM_PASSAGES)
  ]
  (folder / 'psgs_w100.tsv').write_text(_csv(passages))
  for split in ('train', 'dev'):
    records = [
      {
        'dataset': f'{questions}_{split}_psgs_w100',
        'question': text.replace('w1', 'w1\u2019s', 1),
        'answers': [answer_of(row)],
        'positive_ctxs': [
          _context(row, questions),
          _context(row + 1, questions),
        ]
        if number != 3
        else [],
        'negative_ctxs': [_context(row + 9, questions)],
        'hard_negative_ctxs': [
          _context(row + near, questions) for near in (10, 20, 30)
        ]
        if number != 5
        else [],
      }
      for number, text, row in queries(split)
    ]
    path = folder / f'biencoder-{questions}-{split}.json'
    path.write_text(json.dumps(records, indent=4))
  rows = [
    (text, str([answer_of(row), "or O'Neill's"]))
    for _, text, row in queries('test')
  ]
  (folder / f'{questions}-test.qa.csv').write_text(_csv(rows))


def answer_of(row):
  """Returns two adjacent words of a passage in upper case."""
  return ' '.join(passage_text(row).split()[2:4]).upper()


def _context(row, questions):
  row %= NUM_PASSAGES
  key, before = ('psg_id', '') if questions == 'trivia' else ('passage_id', '')
  return {
    'title': f'Title "{row // 4}"',
    'text': passage_text(row),
    'score': 12.5,
    'title_score': 0,
    key: f'{before}{row + 1}',
  }


def _queries(folder, split, query_file, judged, an_id):
  found = list(queries(split))
  _tsv(
    folder / query_file, [(f'{1000 + n}', f' {text}') for n, text, _ in found]
  )
  lines = []
  for number, _, row in found:
    graded = [(row, 3), (row + 10, 1)] if split == 'test' else [(row, 1)]
    for passage, grade in graded:
      gap = ' ' if split == 'test' else '\t'
      zero = 'Q0' if split == 'test' else '0'
      lines.append(
        gap.join([str(1000 + number), zero, an_id(passage % 120), str(grade)])
      )
  (folder / judged).write_text(''.join(f'{line}\n' for line in lines))


def _tsv(path, rows):
  path.write_text(''.join('\t'.join(row) + '\n' for row in rows))


def _csv(rows):
  text = io.StringIO()
  csv.writer(text, delimiter='\t', lineterminator='\n').writerows(rows)
  return text.getvalue()
