"""Judged passages that the corpus lacks, and passages with the id of a query.

What is scored is held against pytrec_eval, with the judgements as they are.
"""

import dataclasses
import json
import re

import formats
import numpy as np
import pytest
import pytrec_eval

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import tfds
from ance_jax.data.readers import beir
from ance_jax.jobs import compare
from ance_jax.jobs import evaluate
from ance_jax.training import experiment

NUM_PASSAGES, NUM_QUERIES = 160, 24


def write(folder, passages, queries, **judged):
  """Writes a BEIR folder of {id: text} twice, and {split: judgements}.

  A number stands for so many texts, with ids p0, ... and q0, ...
  """
  (folder / 'qrels').mkdir(parents=True)
  for name, texts in (('corpus', passages), ('queries', queries)):
    if isinstance(texts, int):
      kind = 'q' if name == 'queries' else 'p'
      texts = {f'{kind}{n}': f'text {n}' for n in range(texts)}
    lines = [json.dumps({'_id': i, 'text': t}) for i, t in texts.items()]
    (folder / f'{name}.jsonl').write_text('\n'.join(lines))
  for name, pairs in judged.items():
    lines = [
      f'{query}\t{passage}\t{g}' for (query, passage), g in pairs.items()
    ]
    head = 'query-id\tcorpus-id\tscore'
    (folder / 'qrels' / f'{name}.tsv').write_text('\n'.join([head, *lines]))
  return str(folder)


@pytest.fixture
def arguments(tmp_path):
  """A folder like ArguAna: most queries are passages; some judged ones lack."""
  random = np.random.default_rng(5)
  words = [f'word{number}' for number in range(12)]
  passages = {
    f'a{row}': ' '.join(random.choice(words, 6)) for row in range(NUM_PASSAGES)
  }
  queries = dict(list(passages.items())[: NUM_QUERIES - 4])
  queries |= {f'other{n}': ' '.join(random.choice(words, 4)) for n in range(4)}
  ids = [*passages, *(f'gone{number}' for number in range(60))]
  judged = {
    (query, str(passage)): int(random.integers(-1, 4))
    for query in queries
    for passage in random.choice(ids, 1 + random.integers(9), replace=False)
  }
  judged |= {('a0', 'a0'): 1, ('a0', 'a1'): 2}
  for query in ('a3', 'other2'):
    judged = {pair: g for pair, g in judged.items() if pair[0] != query}
    judged[query, 'gone1'] = 2
  return write(tmp_path / 'data', passages, queries, test=judged), judged


def bm25(folder, workdir, **changes):
  """Scores test; returns the scores, and {query id: ranked passage ids}."""
  config = config_lib.Config(
    job='evaluate', retriever='bm25', dataset='beir', split='test',
    data_dir=folder, workdir=str(workdir), **changes
  )  # fmt: skip
  scores, run = evaluate.run(config), {}
  for line in (workdir / 'test-bm25-0.trec').read_text().splitlines():
    query, _, passage, *_ = line.split()
    run.setdefault(query, []).append(passage)
  return scores, run


def means_of_pytrec_eval(judged, run, cut=None):
  """Returns {measure: mean over judged queries} by name of pytrec_eval."""
  qrels = {}
  for (query, passage), grade in judged.items():
    qrels.setdefault(query, {})[passage] = grade
  scored = {
    query: {
      p: -float(place) for place, p in enumerate(run.get(query, ())[:cut])
    }
    or {'none': 0.0}
    for query in qrels
  }
  found = pytrec_eval.RelevanceEvaluator(
    qrels, {'ndcg_cut.10', 'recall', 'recip_rank'}
  ).evaluate(scored)
  assert len(found) == len(qrels)
  measures = next(iter(found.values()))
  return {
    name: sum(values[name] for values in found.values()) / len(qrels)
    for name in measures
  }


@pytest.mark.parametrize('changes', [{'protocol': 'beir'}, {}])
def test_scores_are_pytrec_evals_with_the_judgements_as_they_are(
  changes, arguments, tmp_path, capsys
):
  folder, judged = arguments
  scores, run = bm25(folder, tmp_path / 'bm25', **changes)
  assert len({query for query, _ in judged}) == NUM_QUERIES
  theirs = means_of_pytrec_eval(judged, run)
  assert scores['ndcg@10'] == pytest.approx(theirs['ndcg_cut_10'])
  at_100 = means_of_pytrec_eval(judged, run, 100)
  assert scores['recall@100'] == pytest.approx(at_100['recall_100'])
  at_10 = means_of_pytrec_eval(judged, run, 10)
  assert scores['mrr@10'] == pytest.approx(at_10['recip_rank'])
  missing = sum(passage.startswith('gone') for _, passage in judged)
  says = f'test: the corpus lacks {missing} of {len(judged)} judged passages'
  assert says in capsys.readouterr().out


def test_beirs_protocol_removes_the_query_itself_and_ranks_one_more(
  arguments, tmp_path, capsys
):
  folder, judged = arguments
  usual, before = bm25(folder, tmp_path / 'usual')
  assert (
    '20 of 24 queries have the id of a passage, which may be a result of '
    'theirs; --protocol=beir leaves it out'
  ) in capsys.readouterr().out
  # A query's own text is what BM25 finds first.
  assert all(before[f'a{row}'][0] == f'a{row}' for row in range(20))
  beir, after = bm25(folder, tmp_path / 'beir', beir_set='arguana')
  said = capsys.readouterr().out
  assert said.count('have the id of a passage') == 1
  assert '20 of 24 queries have the id of a passage, which is left out' in said
  for query, passages in before.items():
    kept = [passage for passage in passages if passage != query]
    assert after[query][: len(kept)] == kept
    assert query not in after[query]
    if len(passages) == 100:
      assert len(after[query]) >= 100
  # Query a0 has itself for a positive, which nobody finds.
  assert beir != usual
  theirs = means_of_pytrec_eval(judged, after)
  assert list(beir) == [
    'ndcg@10', 'mrr@10', 'recall@10', 'recall@100', 'capped_recall@100'
  ]  # fmt: skip
  assert beir['ndcg@10'] == pytest.approx(theirs['ndcg_cut_10'])
  written = atomic.read_json(tmp_path / 'beir' / 'test-bm25-0.json')
  assert written['protocol'] == 'beir'
  given, _ = bm25(
    folder, tmp_path / 'given', beir_set='arguana', protocol='usual'
  )
  assert given == usual


def test_compare_scores_as_evaluate_does(arguments, tmp_path):
  folder, _ = arguments
  names = []
  for name, k1 in (('a', 0.9), ('b', 3.0)):
    scores, _ = bm25(folder, tmp_path / name, beir_set='arguana', bm25_k1=k1)
    names.append((str(tmp_path / name), scores))
  compare.run(
    config_lib.Config(
      job='compare', dataset='beir', data_dir=folder, split='test',
      beir_set='arguana', workdir=str(tmp_path / 'out'),
      runs=','.join(path for path, _ in names),
    )
  )  # fmt: skip
  found = atomic.read_json(tmp_path / 'out' / 'compare-test.json')
  assert found['metrics'] == {'a': names[0][1], 'b': names[1][1]}


@pytest.mark.parametrize(('lacking', 'warns'), [(1, False), (2, True)])
def test_more_than_one_in_ten_is_a_warning_with_three_ids(
  lacking, warns, tmp_path, capsys
):
  judged = {(f'q{n % 4}', f'p{n}'): 1 for n in range(9)}
  judged |= {('q0', f'x{number}'): 1 for number in range(lacking)}
  folder = write(tmp_path / 'data', 10, 4, test=judged)
  bm25(folder, tmp_path / 'bm25')
  said = capsys.readouterr().out
  ids = ', '.join(f"'x{number}'" for number in range(lacking))
  assert said.count('the corpus lacks') == 1
  assert (f'warning: test: the corpus lacks {lacking} of' in said) == warns
  assert (f'judged passages, such as {ids}; check that' in said) == warns
  assert 'warning' not in said or warns


def test_three_ids_are_shown_each_once_and_in_order(tmp_path, capsys):
  judged = {(f'q{n}', f'x{n // 2}'): 1 for n in range(9)} | {('q9', 'p0'): 1}
  folder = write(tmp_path / 'data', 1, 10, test=judged)
  scores, _ = bm25(folder, tmp_path / 'bm25')
  assert "such as 'x0', 'x1', 'x2'; check" in capsys.readouterr().out
  assert scores['recall@100'] == 0.1


def load(folder, *splits, **changes):
  config = config_lib.Config(data_dir=str(folder), **changes)
  return experiment.load_texts(config, splits)


def test_training_leaves_out_pairs_and_queries_that_the_corpus_lacks(
  tmp_path, capsys
):
  judged = {
    ('q0', 'p0'): 1, ('q0', 'x'): 1, ('q1', 'x'): 1, ('q2', 'p2'): 1,
    ('q2', 'p1'): 0, ('q3', 'p3'): 0, ('q3', 'y'): 2,
  }  # fmt: skip
  folder = write(tmp_path / 'data', 4, 4, train=judged, dev=judged)
  splits = load(folder, 'train', 'dev', dataset='beir').splits
  said = capsys.readouterr().out
  assert (
    'train: the corpus lacks 3 of 7 judged passages, such as '
    "'x', 'y'; check that the corpus and the judgements belong together; they "
    'are left out of training'
  ) in said
  assert 'train: left out 2 queries without a positive passage' in said
  train, dev = splits['train'], splits['dev']
  assert list(train.ids) == ['q0', 'q2']
  assert [column.tolist() for column in train.positives()] == [[0, 1], [0, 2]]
  assert train.missing == [[1], []]
  assert list(dev.ids) == ['q0', 'q1', 'q2', 'q3']
  assert dev.missing == [[1], [1], [], [2]]


def test_a_query_that_is_held_out_brings_what_the_corpus_lacks(tmp_path):
  judged = {(f'q{n}', f'p{n}' if n % 3 else f'x{n}'): 1 for n in range(60)}
  folder = write(tmp_path / 'data', 60, 60, train=judged)
  splits = load(folder, 'train', 'dev', dataset='beir', dev_fraction=0.5).splits
  held_out, trained = (set(splits[name].ids) for name in ('dev', 'train'))
  queries = {query for query, _ in judged}
  lacking = {f'q{n}' for n in range(0, 60, 3)}
  assert not held_out & trained
  assert held_out | trained == queries - (lacking - held_out)
  assert sum(map(len, splits['dev'].missing)) == len(held_out & lacking) > 0
  # The whole of both is the same hash of ids as without missing ones.
  whole = {(query, 'p1'): 1 for query in queries}
  folder = write(tmp_path / 'whole', 60, 60, train=whole)
  again = load(folder, 'dev', dataset='beir', dev_fraction=0.5).splits['dev']
  assert set(again.ids) == held_out


def test_queries_that_nobody_judged_are_no_dev_split(tmp_path):
  every = {(f'q{n}', f'p{n}'): 1 for n in range(20)}
  config = config_lib.Config(
    dataset='beir', data_dir=write(tmp_path / 'all', 20, 20, train=every),
    dev_fraction=0.5
  )  # fmt: skip
  splits = experiment.load_texts(config, None).splits
  assert sorted(splits) == ['dev', 'train']
  above = {pair: 1 for pair in every if pair[0] in set(splits['train'].ids)}
  folder = write(tmp_path / 'some', 20, 20, train=above)
  some = dataclasses.replace(config, data_dir=folder)
  assert list(experiment.load_texts(some, None).splits) == ['train']


@pytest.mark.parametrize(
  ('share', 'way'), [(0.0001, 'raise'), (0.9999, 'lower')]
)
def test_a_share_that_the_message_names_leaves_both_sides_a_query(
  share, way, tmp_path
):
  judged = {(f'q{number}', 'p0'): 1 for number in range(3)}
  folder = write(tmp_path / 'data', 1, 3, train=judged)
  with pytest.raises(errors.BadInput, match='3 judged queries') as found:
    load(folder, 'train', 'dev', dataset='beir', dev_fraction=share)
  named = float(re.search(rf'{way} it to ([\d.]+\d)', str(found.value))[1])
  dataset = load(folder, 'train', 'dev', dataset='beir', dev_fraction=named)
  sizes = [len(split.ids) for split in dataset.splits.values()]
  assert sorted(sizes) == [1, 2]


@pytest.mark.parametrize('share', [0.0001, 0.5, 0.9999])
def test_one_judged_query_alone_is_no_two_splits(share, tmp_path):
  folder = write(tmp_path / 'data', 1, 1, train={('q0', 'p0'): 1})
  with pytest.raises(errors.BadInput, match='; add queries, add') as found:
    load(folder, 'train', 'dev', dataset='beir', dev_fraction=share)
  assert not re.search('(raise|lower) it to', str(found.value))


def test_trecs_own_files_may_judge_what_the_corpus_lacks(tmp_path, capsys):
  formats.write_msmarco(tmp_path)
  qrels = tmp_path / '2019qrels-pass.txt'
  before = load(tmp_path, 'dl19', dataset='msmarco').splits['dl19']
  query = before.ids[0]
  with open(qrels, 'a') as file:
    file.write(f'{query} Q0 999999 3\n')
  capsys.readouterr()
  after = load(tmp_path, 'dl19', dataset='msmarco').splits['dl19']
  assert after.missing[0] == [3]
  assert not any(after.missing[1:])
  assert after.passages.tolist() == before.passages.tolist()
  assert after.hash != before.hash
  assert 'dl19: the corpus lacks 1 of' in capsys.readouterr().out


def test_dprs_first_positive_counts_and_its_negatives_are_those_there(
  tmp_path, capsys
):
  formats.write_dpr(tmp_path)
  path = tmp_path / 'biencoder-nq-dev.json'
  questions = json.loads(path.read_text())
  before = load(tmp_path, 'dev', dataset='dpr').splits['dev']
  first, second = questions[:2]
  first['positive_ctxs'].insert(0, {'passage_id': '123456', 'title': ''})
  corpus = load(tmp_path, 'dev', dataset='dpr').corpus
  second['hard_negative_ctxs'][:0] = [
    {'passage_id': corpus.ids[0]}, {'passage_id': '123457'}
  ]  # fmt: skip
  path.write_text(json.dumps(questions))
  capsys.readouterr()
  after = load(tmp_path, 'dev', dataset='dpr').splits['dev']
  said = capsys.readouterr().out
  assert after.missing == [[1], *([] for _ in range(len(questions) - 1))]
  before.negatives[1].insert(0, 0)
  assert after.negatives == before.negatives
  assert after.passages.tolist() == before.passages.tolist()[1:]
  number = sum(map(len, after.negatives)) + 1
  assert f'left out 1 of {number} negatives of BM25' in said
  assert 'protocol answers looks at texts alone' in said
  trained = load(tmp_path, 'dev', dataset='dpr', train_split='dev')
  assert list(trained.splits['dev'].ids) == list(after.ids)[1:]


def test_ids_of_queries_and_passages_of_ms_marco_are_compared(tmp_path, capsys):
  texts = {
    'collection.tsv': '7\tx\n8\ty\n',
    'queries.train.tsv': '8\tx\n9\ty\n7\tz\n',
    'qrels.train.tsv': '8\t0\t7\t1\n9\t0\t8\t1\n7\t0\t8\t1\n',
    'queries.dev.small.tsv': '7\tz\n',
    'qrels.dev.small.tsv': '7\t0\t8\t1\n',
  }
  for name, text in texts.items():
    (tmp_path / name).write_text(text)
  usual = load(tmp_path, 'train', 'dev', dataset='msmarco').splits
  assert '2 of 3 queries have the id of a pass' in capsys.readouterr().out
  assert [split.own for split in usual.values()] == [None, None]
  beir = load(tmp_path, 'train', 'dev', dataset='msmarco', protocol='beir')
  own = {name: split.own.tolist() for name, split in beir.splits.items()}
  assert own == {'train': [1, -1, 0], 'dev': [0]}
  # By text it is other two.
  said = capsys.readouterr().out
  assert 'train: 2 queries are passages of the corpus, too' in said


def test_ids_that_a_reader_makes_up_are_no_passages(tmp_path, capsys):
  write(tmp_path / 'data', {'q0': 'x', 'b': 'y'}, {})
  (tmp_path / 'data' / 'pairs.jsonl').write_text(
    '{"query": "a", "positive": "x"}\n' * 2
    + '{"query": "b", "positive": "y"}\n' * 2
  )
  split = load(
    tmp_path / 'data', 'train', dataset='pairs', protocol='beir',
    dev_split='train',
  ).splits['train']  # fmt: skip
  assert list(split.ids) == ['q0', 'q1']
  assert split.own is None
  assert 'the id of a passage' not in capsys.readouterr().out


def test_the_table_of_judgements_has_what_the_corpus_lacks():
  corpus = corpus_lib.make_corpus(['a', 'b'], ['', ''], ['x', 'y'])
  judged = corpus_lib.RawSplit(
    ['q', 'r'], ['', ''], {(1, 0): 1}, missing={(0, 'gone'): 2}
  )
  assert list(tfds._judgements(judged, corpus)) == [
    ('r', 'a', 1),
    ('q', 'gone', 2),
  ]


@pytest.mark.parametrize(
  ('dataset', 'recorded', 'protocol'),
  [('beir', None, 'usual'), ('beir', 'beir', 'beir'), ('msmarco', None, None)],
)
def test_the_protocol_of_a_run_is_what_it_recorded(
  dataset, recorded, protocol, tmp_path
):
  record = checkpoint.record_folder(tmp_path, 2)
  atomic.make_folder(record)
  began = config_lib.Config(
    dataset=dataset, protocol=recorded, beir_set='scifact'
  )
  (record / 'run.flags').write_text(began.to_flagfile())
  atomic.commit(record.parent, {})
  assert experiment.settings(tmp_path, 2).protocol == protocol


@pytest.mark.parametrize(
  'header',
  [
    '',
    'query-id\tcorpus-id\tscore\n',
    # Three columns of four words are not TREC's four.
    'query-id\tcorpus-id\trelevance score\n',
  ],
)
def test_an_id_that_has_quotes_of_its_own_is_read_as_it_stands(
  header, tmp_path
):
  path = tmp_path / 'dev.tsv'
  path.write_text(f'{header}"why"\tp1\t1\nwhy\tp1\t0\n"how\tp1\t2\n')
  rows = {'why': 0, '"why"': 1, '"how': 2}
  pairs, missing = beir.read_qrels(path, rows, {'p1': 0})
  assert pairs == {(1, 0): 1, (0, 0): 0, (2, 0): 2}
  assert not missing
