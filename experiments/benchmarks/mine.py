"""Hard negatives against sentence-transformers' `mine_hard_negatives`.

    python experiments/benchmarks/mine.py

Twice, alternating. First search and mining alone, of embeddings that are given
to both, so that nothing is padded: random ones of width 384 in clusters, the
size of InsuranceQA (27,413 passages, 8,000 queries, 13,162 pairs); 20 of the
best 200 that are no positives. Then all of it, files to files: texts and the
real all-MiniLM-L6-v2 are read, 2,000 passages and 1,000 queries of pydocs are
encoded at 64 tokens, in float32; 4 negatives of 100 with a relative margin of
5 %, as triplets. The last line is JSON: `ratio` of the whole, `core` of the
first, above 1 where ance_jax is faster.
"""

import json
import pathlib
import tempfile

import datasets
import numpy as np
import sentence_transformers
from sentence_transformers import util
import side_by_side
import torch

from ance_jax import config
from ance_jax.jobs import mine
from ance_jax.mining import candidates
from ance_jax.mining import miner
from ance_jax.mining import selection
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import index

PASSAGES, QUERIES, PAIRS, WIDTH, TOP_K, KEPT = (
  27_413,
  8000,
  13_162,
  384,
  200,
  20,
)
# Of the whole: passages, queries, tokens, last rank, negatives, margin.
TEXTS, ASKED, LENGTH, DEPTH, NEGATIVES, MARGIN = 2000, 1000, 64, 100, 4, 0.05


class Given(sentence_transformers.SentenceTransformer):
  """A model whose embeddings are looked up by text."""

  def __init__(self, embeddings):
    super().__init__(modules=[torch.nn.Identity()], device='cpu')
    self.given = embeddings

  def _look_up(self, texts, **_):
    rows = np.stack([self.given[text] for text in texts])
    return torch.from_numpy(rows)

  encode = encode_query = encode_document = _look_up


def core():
  """Returns the ratio of search and mining alone."""
  random = np.random.default_rng(0)
  centres = random.normal(size=(200, WIDTH)).astype(np.float32)

  def embed(count):
    noise = random.normal(size=(count, WIDTH)).astype(np.float32)
    rows = centres[random.integers(200, size=count)] + noise
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

  passages, queries = embed(PASSAGES), embed(QUERIES)
  pair_queries = np.sort(
    np.concatenate(
      [np.arange(QUERIES), random.integers(QUERIES, size=PAIRS - QUERIES)]
    )
  )
  # Positives that the queries rank high, as after training.
  near = index.search(index.build('Flat', '', [passages]), queries, 40).rows
  picks = random.integers(40, size=PAIRS)
  pairs = np.unique(
    np.stack([pair_queries, near[pair_queries, picks]], 1), axis=0
  )
  texts = [f'passage {row}' for row in range(PASSAGES)]
  asked = [f'query {row}' for row in range(QUERIES)]
  model = Given(
    dict(zip(asked, queries, strict=True))
    | dict(zip(texts, passages, strict=True))
  )
  table = datasets.Dataset.from_dict(
    {
      'query': [asked[q] for q, _ in pairs],
      'passage': [texts[p] for _, p in pairs],
    }
  )
  positives = pairs[:, 0], pairs[:, 1]
  excluded = selection.make_excluded(*positives, np.arange(PASSAGES), QUERIES)

  def ours():
    built = index.build('Flat', '', [passages])
    indexed = corpus_index.IndexedCorpus(
      built, '', None, None, [passages], exact=True
    )
    task = miner.Task(
      candidates.of_index(indexed, queries, 'given'),
      positives,
      excluded,
      miner.Settings(TOP_K),
    )
    negatives = miner.mine_table(task, 0, QUERIES, 'mine').rows
    columns = selection.draw(random, negatives, KEPT)
    return np.take_along_axis(negatives, columns, 1)

  def theirs():
    return util.mine_hard_negatives(
      table,
      model,
      corpus=texts,
      range_max=TOP_K,
      num_negatives=KEPT,
      sampling_strategy='random',
      output_format='n-tuple',
      verbose=False,
    )

  print(f'{len(ours())} queries mined here, {len(theirs())} pairs there')
  return side_by_side.compare(
    f'search and mine, {QUERIES} queries x {PASSAGES} passages',
    ours,
    theirs,
    units=QUERIES,
    unit='queries',
    rounds=3,
  )


def whole():
  """Returns the ratio from files to a file of triplets."""
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    _write(folder, *_texts())
    found = {}

    def ours():
      with tempfile.TemporaryDirectory() as workdir:
        path = folder / 'ours.jsonl'
        mine.run(
          config.Config(
            job='mine',
            workdir=workdir,
            dataset='beir',
            data_dir=str(folder),
            dev_fraction=0.0,
            init_from=side_by_side.minilm(),
            query_length=LENGTH,
            passage_length=LENGTH,
            tokens_per_batch=4096,
            max_rank=DEPTH,
            num_negatives=NEGATIVES,
            relative_margin=MARGIN,
            output=str(path),
            overwrite=True,
          )
        )
      found['ours'] = _lines(path)

    def theirs():
      model = sentence_transformers.SentenceTransformer(
        side_by_side.minilm(), device='cpu'
      )
      model.max_seq_length = LENGTH
      path = folder / 'theirs.jsonl'
      mined = util.mine_hard_negatives(
        datasets.Dataset.from_list(_lines(folder / 'pairs.jsonl')),
        model,
        corpus=[line['text'] for line in _lines(folder / 'corpus.jsonl')],
        range_max=DEPTH,
        num_negatives=NEGATIVES,
        relative_margin=MARGIN,
        verbose=False,
      )
      mined.to_json(path)
      found['theirs'] = _lines(path)

    ratio = side_by_side.compare(
      f'texts to triplets, {ASKED} queries x {TEXTS} passages',
      ours,
      theirs,
      units=ASKED,
      unit='queries',
      rounds=2,
    )
    sides = [{tuple(line.values()) for line in found[name]} for name in found]
    both, either = (len(f(*sides)) for f in (set.intersection, set.union))
    print(f'{both:,} of {either:,} triplets are those of both')
    assert both > 0.995 * either
    return ratio


def _texts():
  """Returns {query: its passage} of pydocs, and other passages, all unlike."""
  corpus, splits = side_by_side.pydocs()
  split, first = splits['train'], {}
  for row in range(len(corpus.texts)):
    first.setdefault(int(corpus.groups[row]), row)
  pairs, used = {}, set()
  for query, row in zip(*split.positives(), strict=True):
    group = int(corpus.groups[row])
    if group not in used and len(pairs) < ASKED:
      if split.texts[query] not in pairs:
        pairs[split.texts[query]] = corpus.texts[first[group]]
        used.add(group)
  rest = [corpus.texts[row] for g, row in first.items() if g not in used]
  return pairs, rest[: TEXTS - len(pairs)]


def _write(folder, pairs, rest):
  """Writes a BEIR folder, and the pairs beside it."""
  corpus = [*pairs.values(), *rest]
  (folder / 'qrels').mkdir()
  rows = [f'q{row}\tp{row}\t1\n' for row in range(len(pairs))]
  (folder / 'qrels' / 'train.tsv').write_text(
    'query-id\tcorpus-id\tscore\n' + ''.join(rows)
  )
  for name, records in (
    ('corpus', [{'_id': f'p{i}', 'text': t} for i, t in enumerate(corpus)]),
    ('queries', [{'_id': f'q{i}', 'text': t} for i, t in enumerate(pairs)]),
    ('pairs', [{'anchor': q, 'positive': p} for q, p in pairs.items()]),
  ):
    lines = ''.join(json.dumps(record) + '\n' for record in records)
    (folder / f'{name}.jsonl').write_text(lines)


def _lines(path):
  return [json.loads(line) for line in open(path)]


def main():
  """Prints both comparisons, and their ratios as JSON."""
  alone = core()
  print(json.dumps({'ratio': round(whole(), 3), 'core': round(alone, 3)}))


if __name__ == '__main__':
  main()
