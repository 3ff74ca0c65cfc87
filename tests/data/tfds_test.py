"""The TFDS builders hold the rows that the readers give."""

import formats
import pytest

from ance_jax import config
from ance_jax.data import tfds
from ance_jax.training import experiment


def build(builder, folder, table, out):
  made = builder(
    config=table,
    source_dir=str(folder),
    data_dir=out,
    file_format='array_record',
  )
  made.download_and_prepare()
  return {name: list(made.as_data_source(name)) for name in made.info.splits}


def text(row):
  return {k: v.decode() if isinstance(v, bytes) else v for k, v in row.items()}


def test_a_set_of_beir_is_built_by_its_name(beir_folder, tmp_path):
  read = experiment.load_texts(
    config.Config(dataset='beir', data_dir=str(beir_folder)), ('dev',)
  )
  corpus = build(tfds.Beir, beir_folder, 'cqadupstack-unix_corpus', tmp_path)
  assert [text(row)['id'] for row in corpus['corpus']] == list(read.corpus.ids)
  found = build(tfds.Beir, beir_folder, 'scifact_judgements', tmp_path)
  assert set(found) == {'train', 'dev', 'test'}
  judged = read.splits['dev']
  assert [row['grade'] for row in found['dev']] == judged.grades.tolist()


@pytest.mark.parametrize(
  ('builder', 'write', 'dataset', 'split'),
  [
    (tfds.MsMarcoPassage, formats.write_msmarco, 'msmarco', 'dl19'),
    (tfds.MsMarcoPassageTitled, formats.write_msmarco, 'msmarco_titled', 'dev'),
    (tfds.MsMarcoDocument, formats.write_documents, 'msmarco_doc', 'train'),
    (tfds.DprNq, formats.write_dpr, 'dpr', 'dev'),
  ],
)
def test_a_builder_gives_the_rows_of_the_reader(
  builder, write, dataset, split, tmp_path
):
  folder = tmp_path / 'files'
  folder.mkdir()
  write(folder)
  out = tmp_path / 'tfds'
  read = experiment.load_texts(
    config.Config(dataset=dataset, data_dir=str(folder)), (split,)
  )
  corpus, judged = read.corpus, read.splits[split]
  passages = [text(r) for r in build(builder, folder, 'corpus', out)['corpus']]
  assert [p['id'] for p in passages] == list(corpus.ids)
  assert [p['title'] for p in passages] == list(corpus.titles)
  assert [p['text'] for p in passages] == list(corpus.texts)
  queries = [text(r) for r in build(builder, folder, 'queries', out)[split]]
  assert [q['id'] for q in queries] == list(judged.ids)
  assert [q['text'] for q in queries] == list(judged.texts)
  if judged.answers:
    found = [[a.decode() for a in q['answers']] for q in queries]
    assert found == judged.answers
  rows = [text(r) for r in build(builder, folder, 'judgements', out)[split]]
  assert [r['passage'] for r in rows] == [
    corpus.ids[int(p)] for p in judged.passages
  ]
  assert [r['grade'] for r in rows] == judged.grades.tolist()
