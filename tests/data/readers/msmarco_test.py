"""MS MARCO's files as they are."""

import formats
import numpy as np
import pytest

from ance_jax import config
from ance_jax.data import downloads
from ance_jax.data import registry
from ance_jax.data import tokens
from ance_jax.data.readers import msmarco
from ance_jax.training import experiment


def load(folder, dataset, *splits):
  settings = config.Config(dataset=dataset, data_dir=str(folder))
  return experiment.load_texts(settings, splits)


@pytest.fixture
def passages(tmp_path):
  formats.write_msmarco(tmp_path)
  return tmp_path


def test_passages_are_taken_as_they_stand_quotes_and_mojibake(passages):
  corpus = load(passages, 'msmarco', 'dev').corpus
  rows = range(formats.NUM_PASSAGES)
  assert list(corpus.ids) == [formats.pid(row) for row in rows]
  assert list(corpus.texts) == [formats.passage_text(row) for row in rows]
  assert set(corpus.titles) == {''}
  assert corpus.texts[2].endswith('"Quoted from its start to its end"')


def test_each_split_has_its_files_and_its_protocol(passages):
  (passages / 'queries.mine.tsv').write_text('7\ta query of my own\n')
  (passages / 'qrels.mine.tsv').write_text(f'7 0 {formats.pid(3)} 1\n')
  found = load(passages, 'msmarco', 'train', 'dev', 'dl19', 'mine').splits
  assert {name: split.protocol for name, split in found.items()} == {
    'train': 'msmarco',
    'dev': 'msmarco',
    'dl19': 'trec_dl',
    'mine': 'msmarco',
  }
  assert found['mine'].passages.tolist() == [3]
  for name, formatted in (('train', 'train'), ('dl19', 'test')):
    wanted = list(formats.queries(formatted))
    split = found[name]
    assert list(split.ids) == [str(1000 + number) for number, _, _ in wanted]
    assert list(split.texts) == [f' {text}' for _, text, _ in wanted]
    first = split.passages[split.offsets[:-1]]
    assert first.tolist() == [row for _, _, row in wanted]
  assert found['dl19'].grades.tolist() == [3, 1] * formats.NUM_TEST


def test_titled_passages_are_another_corpus_and_say_so(passages, capsys):
  plain = load(passages, 'msmarco', 'dev').corpus
  titled = load(passages, 'msmarco_titled', 'dev').corpus
  assert list(titled.texts) == list(plain.texts)
  assert titled.titles[4] == 'Title 4'
  assert titled.titles[5] == ''
  assert titled.hash != plain.hash
  out = capsys.readouterr().out
  assert 'MS MARCO passages, without titles: 120 passages' in out
  assert 'MS MARCO passages, with titles (unofficial): 120 passages' in out
  assert '60 passages without a title' in out


def test_a_document_is_address_title_and_body_cut_as_in_ance(tmp_path, capsys):
  formats.write_documents(tmp_path)
  dataset = load(tmp_path, 'msmarco_doc', 'dev', 'dl19')
  protocols = {name: split.protocol for name, split in dataset.splits.items()}
  assert protocols == {'dev': 'msmarco_doc', 'dl19': 'trec_dl_doc'}
  corpus = dataset.corpus
  texts = list(tokens.passage_texts(corpus, '</s>'))
  body = formats.passage_text(7)
  assert texts[7] == f'http://site.org/7?a=b</s>Title 7</s>{body}'
  whole = 'http://site.org/6?a=b</s>Title 6</s>' + 'long ' * 3000
  assert texts[6] == whole[:10_000]
  # Without a title, and without a body.
  assert (
    texts[10] == f'http://site.org/10?a=b</s></s>{formats.passage_text(10)}'
  )
  assert texts[4] == 'http://site.org/4?a=b</s>Title 4'
  assert '1 documents cut at 10,000 characters' in capsys.readouterr().out


def test_all_files_of_the_splits_have_an_address():
  for splits in (msmarco._PASSAGE_SPLITS, msmarco._DOCUMENT_SPLITS):
    for files in splits.values():
      for name in (files.queries[0], files.judgements[0]):
        assert downloads.how(registry.DOWNLOADS[name]).startswith(
          ('fetch https://', 'unpack https')
        )
  # Each is in the file of its name, and a track's files are of its year.
  for name, found in registry.DOWNLOADS.items():
    file = found.url.rpartition('/')[2].removesuffix('.gz')
    assert file == name or file == 'collectionandqueries.tar'
  for splits in (msmarco._PASSAGE_SPLITS, msmarco._DOCUMENT_SPLITS):
    for year in ('19', '20'):
      files = splits[f'dl{year}']
      names = (*files.queries, *files.judgements)
      assert all(f'20{year}' in n or f'dl{year}' in n for n in names)
      assert files.protocol == splits['dl19'].protocol
  sizes = [d.size for d in registry.DOWNLOADS.values() if d.size]
  assert np.min(sizes) > 1000
  assert all(
    d.md5 is None or len(d.md5) == 32 for d in registry.DOWNLOADS.values()
  )
