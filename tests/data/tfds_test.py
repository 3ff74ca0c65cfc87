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

  def rows(table):
    made = build(builder, folder, table, out)
    return [text(row) for row in made['corpus' if table == 'corpus' else split]]

  columns = zip(corpus.ids, corpus.titles, corpus.texts, strict=True)
  assert rows('corpus') == [
    {'id': an_id, 'title': title, 'text': found}
    for an_id, title, found in columns
  ]
  queries = rows('queries')
  columns = zip(judged.ids, judged.texts, strict=True)
  assert [(q['id'], q['text']) for q in queries] == list(columns)
  if judged.answers:
    found = [[a.decode() for a in q['answers']] for q in queries]
    assert found == judged.answers
  passages = [corpus.ids[int(row)] for row in judged.passages]
  columns = zip(passages, judged.grades.tolist(), strict=True)
  judgements = rows('judgements')
  assert [(r['passage'], r['grade']) for r in judgements] == list(columns)
