"""Equal texts: a query is not its own negative, and equal queries are one.

Expected values are from plain Python over a small random set in which copies
are planted: queries that are passages, and queries of one text.
"""

import json
import types

import numpy as np
import pytest

from ance_jax import batches
from ance_jax import config as config_lib
from ance_jax import corpora
from ance_jax import methods
from ance_jax import negatives as negatives_lib

NUM_PASSAGES, NUM_QUERIES, TOP_K = 60, 24, 12
WORDS = 'ada bob cy dot'.split()


def normal(text):
  return ' '.join(text.lower().split())


def words(random):
  return ' '.join(random.choice(WORDS, random.integers(1, 4), replace=False))


def write(folder, seed):
  """Writes a BEIR set of so few words that texts are often equal."""
  random = np.random.default_rng(seed)
  passages = [
    {
      '_id': f'p{row}',
      'title': words(random) if row % 3 else '',
      'text': words(random) + ' ' * int(random.integers(2)),
    }
    for row in range(NUM_PASSAGES)
  ]
  queries = [
    {'_id': f'p{row}' if row % 2 else f'q{row}', 'text': words(random).upper()}
    for row in range(NUM_QUERIES)
  ]
  (folder / 'qrels').mkdir(parents=True)
  lines = {'train': [], 'dev': []}
  for row, query in enumerate(queries):
    chosen = random.choice(NUM_PASSAGES, 3, replace=False)
    # A passage that is the query itself may be its positive, too.
    for place, grade in zip(chosen, (1, 0, int(row % 3 > 0)), strict=True):
      name = 'dev' if row % 5 == 4 else 'train'
      lines[name].append(f'{query["_id"]}\tp{place}\t{grade}')
  for name, records in (('corpus', passages), ('queries', queries)):
    path = folder / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(r) + '\n' for r in records))
  for name, found in lines.items():
    (folder / 'qrels' / f'{name}.tsv').write_text('\n'.join(found) + '\n')


@pytest.fixture(scope='module', params=range(3))
def folder(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('equal')
  write(folder, request.param)
  return folder


def settings(folder, **changes):
  return config_lib.Config(
    dataset='beir', data_dir=str(folder), top_k=TOP_K, workdir=str(folder),
    **changes
  )  # fmt: skip


class Slow:
  """What is right, by loops over texts."""

  def __init__(self, folder, protocol):
    lines = {
      name: [json.loads(x) for x in (folder / name).read_text().splitlines()]
      for name in ('corpus.jsonl', 'queries.jsonl')
    }
    self.passages, asked = lines.values()
    self.texts = [normal(p['text']) for p in self.passages]
    wholes = [normal(f'{p["title"]} {p["text"]}') for p in self.passages]
    text_of = {query['_id']: normal(query['text']) for query in asked}
    judged = {}
    for line in (folder / 'qrels' / 'train.tsv').read_text().splitlines():
      query, passage, grade = line.split('\t')
      if int(grade) > 0:
        judged.setdefault(query, []).append(int(passage[1:]))
    self.ids = [query for query in text_of if query in judged]
    self.judged = [judged[query] for query in self.ids]
    asked = [text_of[query] for query in self.ids]
    self.equal = [
      [other for other, text in enumerate(asked) if text == mine]
      for mine in asked
    ]
    self.own = [
      {
        row
        for row, whole in enumerate(wholes)
        if query in (self.texts[row], whole)
        or (protocol == 'beir' and an_id == f'p{row}')
      }
      for an_id, query in zip(self.ids, asked, strict=True)
    ]

  def positives(self, query, last):
    """What a query may draw, its own first, and all that it shares."""
    found = self.judged[query]
    shared = [p for q in self.equal[query] for p in self.judged[q][-1:]]
    if last:
      return found[-1:], {*found[-1:], *shared}
    every = {p for q in self.equal[query] for p in self.judged[q]}
    return [*found, *sorted(every - {*found})], every

  def of_text(self, rows, same_text):
    """Passages, and with `same_text` all of their texts."""
    texts = {self.texts[row] for row in rows}
    return {
      row
      for row, text in enumerate(self.texts)
      if row in rows or (same_text and text in texts)
    }


CASES = [
  (row, same_text, protocol)
  for row in methods.METHODS
  if row != 'ance_code_qa'  # It wants answers; its rule is that of ance_code.
  for same_text in (True, False)
  for protocol in ('usual', 'beir')
]


@pytest.mark.parametrize(('row', 'same_text', 'protocol'), CASES)
def test_mined_is_all_but_positives_and_the_query_itself(
  row, same_text, protocol, folder
):
  config = settings(folder, protocol=protocol, drop_same_text=same_text)
  dataset = corpora.load(config, ('train', 'dev'))
  run = types.SimpleNamespace(
    config=config, corpus=dataset.corpus, splits=dataset.splits
  )
  slow, method = Slow(folder, protocol), methods.METHODS[row]
  size = len(slow.ids)
  assert list(dataset.splits['train'].ids) == slow.ids
  random = np.random.default_rng(0)
  orders = np.array([random.permutation(NUM_PASSAGES) for _ in range(size)])
  start = size // 3  # A slice of the queries, as of --query_slices.

  def rank(rows, depth):
    return orders[start + rows][:, :depth].astype(np.int32)

  expected = dict.fromkeys(('judged', 'same_text', 'own_text'), 0)
  found, counts = negatives_lib.of_ranking(run, method, rank, (start, size), '')
  same_text = same_text and not method.last_positive
  depth = 0
  for query in range(start, size):
    _, positives = slow.positives(query, method.last_positive)
    own = slow.own[query]
    banned = slow.of_text(positives | own, same_text)
    depth = max(depth, TOP_K + len(banned))
  for query in range(start, size):
    _, positives = slow.positives(query, method.last_positive)
    of_positives = slow.of_text(positives, same_text)
    own = slow.of_text(slow.own[query], same_text) - of_positives
    left = [p for p in orders[query] if p not in of_positives | own]
    assert found[query - start].tolist() == left[:TOP_K]
    looked_at = set(orders[query, :depth].tolist())
    expected['judged'] += len(looked_at & positives)
    expected['same_text'] += len(looked_at & of_positives - positives)
    expected['own_text'] += len(looked_at & own)
  assert {name: counts[name] for name in expected} == expected
  assert expected['own_text'] > 0


@pytest.mark.parametrize(('row', 'same_text', 'protocol'), CASES)
def test_a_step_draws_shared_positives_and_counts_no_column_of_them(
  row, same_text, protocol, folder
):
  config = settings(folder, protocol=protocol)
  corpus, splits = corpora.load(config, ('train', 'dev'))
  slow, method = Slow(folder, protocol), methods.METHODS[row]
  size = len(slow.ids)
  made = batches.training_data(
    splits['train'],
    corpus,
    range(size),
    types.SimpleNamespace(first=None),
    types.SimpleNamespace(query_length=0, passage_length=0),
    method,
    same_text,
  )
  same_text = same_text and not method.last_positive
  for query in range(size):
    drawn, shared = slow.positives(query, method.last_positive)
    found = made.positives[made.offsets[query] : made.offsets[query + 1]]
    own = len(slow.judged[query])
    assert sorted(found) == sorted(drawn)
    assert len(set(found.tolist())) == len(found)
    assert method.last_positive or found[:own].tolist() == slow.judged[query]
    counted = ~np.isin(made.groups, made.positive_groups[query])
    banned = slow.of_text(shared | slow.own[query], same_text)
    assert set(np.flatnonzero(counted)) == set(range(NUM_PASSAGES)) - banned
  assert any(len(equal) > 1 for equal in slow.equal)
