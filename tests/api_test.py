"""The Python API finds what the jobs find."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from ance_jax import api
from ance_jax import errors
from ance_jax.data import trec
from ance_jax.jobs import evaluate
from ance_jax.jobs import export
from ance_jax.jobs import mine
from ance_jax.jobs import train
from ance_jax.mining import filters
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import device_index
from ance_jax.retrieval import encoding as encoding_lib
from ance_jax.training import experiment

README = pathlib.Path(__file__).parents[1] / 'README.md'


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
  return tmp_path_factory.mktemp('kept')


@pytest.fixture
def trained(tiny, kept):
  """A run with prompts, titles and pieces, all of its passages one block."""
  config = dataclasses.replace(
    tiny, workdir=str(kept / 'run'), method='in_batch', max_steps=2,
    warmup_steps=0, num_devices=1, query_prompt='t1w1 ',
    passage_prompt='t2w2 ', title_separator='token', lower_case=True, chunks=2,
    rows_per_block=1000,
  )  # fmt: skip
  if not (kept / 'run').exists():
    train.run(config)
  return config


def texts_of(config, split):
  """The data as plain lists, and a query's positives."""
  corpus, splits = experiment.load_texts(config, (split,))
  pairs = np.stack(splits[split].positives())
  queries = list(splits[split].texts)
  positives = [
    pairs[1, pairs[0] == row].tolist() for row in range(len(queries))
  ]
  return corpus, splits[split], queries, positives


@functools.cache
def index_of(config):
  corpus, *_ = texts_of(config, 'dev')
  retriever = api.load(config.workdir, num_devices=1)
  return api.index(retriever, list(corpus.texts), list(corpus.titles))


@pytest.fixture
def index(trained):
  return index_of(trained)


def test_a_search_ranks_as_the_job_evaluate_does(trained, index):
  evaluate.run(dataclasses.replace(trained, job='evaluate', split='dev'))
  corpus, split, queries, _ = texts_of(trained, 'dev')
  rows = {split.ids[row]: row for row in range(len(queries))}
  path = next(pathlib.Path(trained.workdir).glob('dev-model-*.trec'))
  expected = trec.read_run(path, rows, corpus.rows).block(
    np.arange(len(queries))
  )
  found = index.search(queries, top_k=expected.rows.shape[1])
  np.testing.assert_array_equal(found.rows, expected.rows)
  np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
  assert index.search(queries, top_k=10**6).rows.shape[1] == len(corpus.ids)


@pytest.mark.parametrize(
  'rules',
  [
    filters.Rules(max_rank=100),
    filters.Rules(skip_ranks=2, max_rank=40, relative_margin=0.01),
    filters.Rules(max_rank=30, z_margin=0.5),
  ],
)
@pytest.mark.parametrize('on_shortage', ['keep', 'fill'])
def test_negatives_are_those_that_the_job_mine_writes(
  rules, on_shortage, trained, index, tmp_path
):
  asked = {name: value for name, value in rules._asdict().items() if value}
  path = tmp_path / 'mined.jsonl'
  mine.run(
    dataclasses.replace(
      trained, job='mine', output=str(path), num_negatives=6, seed=3,
      on_shortage=on_shortage, format='ids', **asked,
    )
  )  # fmt: skip
  corpus, split, queries, positives = texts_of(trained, 'train')
  found = api.mine(
    index, queries, positives, num_negatives=6, seed=3, rules=rules,
    on_shortage=on_shortage,
  )  # fmt: skip
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  written = {line['query_id']: line for line in lines}
  for row, an_id in enumerate(split.ids):
    there = found.rows[row] >= 0
    expected = written.get(an_id, {'negative_ids': [], 'negative_scores': []})
    ids = [corpus.ids[place] for place in found.rows[row][there].tolist()]
    assert ids == expected['negative_ids']
    np.testing.assert_allclose(
      found.scores[row][there], expected['negative_scores'], rtol=1e-5
    )
  assert len(lines) > 10


def test_margins_are_of_as_many_scores_as_are_asked_for(trained, index):
  _, _, queries, positives = texts_of(trained, 'train')
  rules = filters.Rules(max_rank=100, z_margin=0.5)
  of_all, of_some = (
    api.mine(index, queries, positives, rules=one)
    for one in (rules, rules._replace(num_scores=3))
  )
  z_margin = filters.FILTERS.index('z_margin')
  assert of_all.rejected[z_margin] > of_some.rejected[z_margin]


def test_candidates_are_drawn_and_copies_of_positives_taken_if_asked_for(
  trained, index
):
  _, _, queries, positives = texts_of(trained, 'train')
  top, drawn = (
    api.mine(index, queries, positives, choose=name).rows
    for name in ('top', 'random')
  )
  assert (top != drawn).any(1).mean() > 0.9
  few = api.index(
    index.retriever, ['t1w1', 'T1W1 ', 't2w2', 't3w3'],
    settings=corpus_index.Settings(corpus_index.ON_DEVICES),
  )  # fmt: skip
  assert isinstance(few.indexed.passage_index, device_index.DeviceIndex)
  found = [
    sorted(api.mine(few, ['t1w2'], [[0]], same_text=same).rows[0].tolist())
    for same in (True, False)
  ]
  assert found == [[-1, -1, 2, 3], [-1, 1, 2, 3]]


def test_what_is_given_goes_before_what_the_run_has(trained):
  given = {
    'query_prompt': 'a ', 'passage_prompt': 'b ', 'query_length': 5,
    'passage_length': 7, 'pooling': 'cls', 'similarity': 'dot',
  }  # fmt: skip
  encoding = encoding_lib.Settings(tokens_per_batch=96)
  found = api.load(trained.workdir, **given, encoding=encoding, num_devices=2)
  assert {name: getattr(found.config, name) for name in given} == given
  assert (found.settings, len(found.devices)) == (encoding, 2)
  assert api.load(trained.workdir).settings.chunks == 2


def test_an_exported_folder_encodes_as_its_run(trained, index, tmp_path):
  config = dataclasses.replace(
    trained, job='export', output=str(tmp_path / 'out'), chunks=1
  )
  export.run(config)
  *_, queries, _ = texts_of(trained, 'dev')
  found = api.load(str(tmp_path / 'out'), num_devices=1)
  expected = index.retriever.encode_queries(queries)
  np.testing.assert_allclose(found.encode_queries(queries), expected, atol=1e-6)
  other = api.load(str(tmp_path / 'out'), num_devices=1, query_prompt='')
  assert np.abs(other.encode_queries(queries) - expected).max() > 1e-3


def test_a_checkpoint_may_be_named(trained):
  first, last = (
    api.load(trained.workdir, checkpoint=name, num_devices=1)
    for name in ('0', 'last')
  )
  texts = ['t1w3 t1w5']
  assert (
    np.abs(first.encode_queries(texts) - last.encode_queries(texts)).max() > 0
  )


def test_pieces_of_passages_have_a_row_each(trained, index):
  corpus, *_ = texts_of(trained, 'dev')
  found = index.retriever.encode_passages(
    list(corpus.texts), list(corpus.titles)
  )
  np.testing.assert_array_equal(found, np.concatenate(index.indexed.blocks))
  assert len(found) > len(corpus.ids)


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'positives': [[0]]}, '2 queries have 1 lists of positives'),
    ({'positives': [[0], []]}, '1 of them not empty'),
    ({'queries': [], 'positives': []}, '0 queries have 0 lists'),
    ({'positives': [[0], [-1]]}, 'found -1 to 0'),
    ({'positives': [[0], [10**6]]}, 'found 0 to 1000000'),
    ({'num_negatives': 101}, 'num_negatives=101 does not fit'),
    ({'rules': filters.Rules(6, 9)}, 'between skip_ranks=6 and max_rank=9'),
    ({'choose': 'best'}, "choose='best' is unknown; use one of top, random"),
    ({'on_shortage': 'cry'}, "on_shortage='cry' is unknown"),
    (
      {'on_shortage': 'fill', 'num_negatives': 150,
       'rules': filters.Rules(max_rank=200)},
      'needs 150 passages besides',
    ),
  ],
)  # fmt: skip
def test_arguments_of_mine_that_cannot_be_used_are_refused(
  changes, says, index
):
  given = {'queries': ['a', 'b'], 'positives': [[0], [1]], **changes}
  with pytest.raises(errors.BadInput, match=re.escape(says)):
    api.mine(index, **given)


def test_no_passages_and_one_text_for_a_list_are_refused(index):
  with pytest.raises(errors.BadInput, match='no passages to index'):
    api.index(index.retriever, [])
  with pytest.raises(TypeError, match='is a text, not a list'):
    index.search('one query')
  with pytest.raises(TypeError, match='is a text, not a list'):
    api.index(index.retriever, 'one passage')


def test_the_lines_of_the_readme_run(trained, tmp_path):
  (lines,) = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
  assert '/tmp/ance_jax/refreshed' in lines
  here = shutil.copytree(trained.workdir, tmp_path / 'run')
  names = {}
  exec(lines.replace('/tmp/ance_jax/refreshed', str(here)), names)
  assert names['ranking'].rows.shape == names['negatives'].rows.shape == (2, 2)
  assert (names['negatives'].rows >= 0).all()
