"""Files are fetched from a server on this machine, whole or not at all."""

import functools
import gzip
import hashlib
import http.server
import io
import shutil
import tarfile
import threading
import types
import zipfile

import formats
import pytest

from ance_jax import config
from ance_jax import errors
from ance_jax.data import downloads
from ance_jax.data import registry
from ance_jax.training import experiment


class Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


@pytest.fixture
def served(tmp_path, monkeypatch):
  """serve(name, data) puts a file on a server, as what a name is in."""
  source = tmp_path / 'source'
  source.mkdir()
  server = http.server.ThreadingHTTPServer(
    ('127.0.0.1', 0), functools.partial(Quiet, directory=str(source))
  )
  threading.Thread(target=server.serve_forever, daemon=True).start()

  def serve(file, data, *names, md5=None):
    (source / file).write_bytes(data)
    md5 = md5 or hashlib.md5(data).hexdigest()
    url = f'http://127.0.0.1:{server.server_port}/{file}'
    for name in names:
      found = registry.Download(url, len(data), md5)
      monkeypatch.setitem(registry.DOWNLOADS, name, found)
    return source / file

  serve.address = f'http://127.0.0.1:{server.server_port}/'
  yield serve
  server.shutdown()
  server.server_close()


@pytest.fixture
def marco(tmp_path):
  """A folder of MS MARCO's passages, put there by hand."""
  folder = tmp_path / 'by_hand'
  folder.mkdir()
  formats.write_msmarco(folder)
  return folder


def read(folder, **changes):
  settings = config.Config(data_dir=str(folder), download=True, **changes)
  return experiment.load_texts(settings, ('train', 'dev'))


def zipped(folder, name):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as opened:
    for path in sorted(folder.rglob('*')):
      if path.is_file():
        opened.write(path, f'{name}/{path.relative_to(folder)}')
    opened.writestr(f'{name}/../../out.tsv', 'a path that leads out')
    opened.writestr(f'{name}/qrels/../../../out.tsv', 'another')
  return file.getvalue()


@pytest.mark.parametrize('name', ['scifact', 'cqadupstack/unix'])
def test_a_set_of_beir_is_fetched_by_its_name(
  name, served, beir_folder, tmp_path, monkeypatch, capsys
):
  data = zipped(beir_folder, name)
  file = name.split('/')[0]
  source = served(f'{file}.zip', data)
  found = len(data), hashlib.md5(data).hexdigest()
  monkeypatch.setitem(registry._BEIR_ARCHIVES, file, found)
  monkeypatch.setattr(registry, '_BEIR', served.address)
  folder = tmp_path / 'one' / 'new'
  fetched = read(folder, dataset='beir', beir_set=name)
  assert f"150 rows; the source's has {registry.BEIR_PASSAGES[name]:,}" in (
    capsys.readouterr().out
  )
  assert not list(tmp_path.rglob('out.tsv'))
  by_hand = experiment.load_texts(
    config.Config(dataset='beir', data_dir=str(beir_folder)), ('train', 'dev')
  )
  assert fetched.corpus.hash == by_hand.corpus.hash
  assert fetched.splits['dev'].hash == by_hand.splits['dev'].hash
  source.unlink()
  again = read(folder, dataset='beir', beir_set=name)
  assert again.corpus.hash == fetched.corpus.hash


def test_a_set_of_beir_that_another_archive_holds_is_refused(
  served, beir_folder, tmp_path, monkeypatch
):
  data = zipped(beir_folder, 'nfcorpus')
  served('scifact.zip', data)
  monkeypatch.setattr(registry, '_BEIR', served.address)
  with pytest.raises(errors.BadInput, match='not 5f7d1de60b17'):
    read(tmp_path / 'new', dataset='beir', beir_set='scifact')
  found = len(data), hashlib.md5(data).hexdigest()
  monkeypatch.setitem(registry._BEIR_ARCHIVES, 'scifact', found)
  with pytest.raises(
    errors.BadInput, match='does not hold scifact/corpus.jsonl'
  ):
    read(tmp_path / 'new', dataset='beir', beir_set='scifact')


def test_a_set_of_beir_that_is_not_unpacked_to_its_end_is_unpacked_again(
  served, beir_folder, tmp_path, monkeypatch
):
  data = zipped(beir_folder, 'scifact')
  served('scifact.zip', data)
  found = len(data), hashlib.md5(data).hexdigest()
  monkeypatch.setitem(registry._BEIR_ARCHIVES, 'scifact', found)
  monkeypatch.setattr(registry, '_BEIR', served.address)
  real, files = shutil.copyfileobj, []

  def killed_at_third(*args):
    files.append(args)
    if len(files) == 3:
      raise KeyboardInterrupt
    real(*args)

  copier = types.SimpleNamespace(copyfileobj=killed_at_third)
  monkeypatch.setattr(downloads, 'shutil', copier)
  with pytest.raises(KeyboardInterrupt):
    downloads.fetch_beir('scifact', tmp_path)
  downloads.fetch_beir('scifact', tmp_path)
  for path in beir_folder.rglob('*.*'):
    there = tmp_path / path.relative_to(beir_folder)
    assert there.read_bytes() == path.read_bytes()


def test_where_a_set_of_beir_can_be_had_is_said(tmp_path):
  (tmp_path / 'empty').mkdir()
  settings = config.Config(
    dataset='beir', beir_set='nq', data_dir=str(tmp_path / 'empty')
  )
  with pytest.raises(
    errors.BadInput, match=r'unpack https://\S+/nq.zip \(498.3 MB\), or set'
  ):
    experiment.load_texts(settings, ('train',))
  for name in registry.BEIR_PASSAGES:
    assert registry.beir_archive(name).md5


def archive(folder):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w:gz') as opened:
    for path in sorted(folder.iterdir()):
      opened.add(path, path.name)
  return file.getvalue()


def test_an_archive_is_fetched_once_and_read_as_if_it_lay_there(
  served, marco, tmp_path, capsys
):
  source = served(
    'collectionandqueries.tar.gz',
    archive(marco),
    'collection.tsv',
    'queries.train.tsv',
    'queries.dev.small.tsv',
    'qrels.train.tsv',
    'qrels.dev.small.tsv',
  )
  fetched = read(tmp_path / 'new', dataset='msmarco')
  source.unlink()
  again = read(tmp_path / 'new', dataset='msmarco')
  by_hand = experiment.load_texts(
    config.Config(dataset='msmarco', data_dir=str(marco)),
    ('train', 'dev'),
  )
  assert fetched.corpus.hash == again.corpus.hash == by_hand.corpus.hash
  assert fetched.splits['train'].hash == by_hand.splits['train'].hash
  assert 'collection.tsv: fetching http://127' in capsys.readouterr().out


def test_an_archive_that_is_not_unpacked_to_its_end_is_not_there(
  served, marco, tmp_path, monkeypatch
):
  served('collectionandqueries.tar.gz', archive(marco), 'collection.tsv')

  def half(source, file, _):
    file.write(source.read(100))
    raise KeyboardInterrupt

  copier = types.SimpleNamespace(copyfileobj=half)
  monkeypatch.setattr(downloads, 'shutil', copier)
  (tmp_path / 'new').mkdir()
  with pytest.raises(KeyboardInterrupt):
    downloads.fetch('collection.tsv', tmp_path / 'new')
  assert not (tmp_path / 'new' / 'collection.tsv').exists()


def test_gzipped_and_plain_files_are_fetched(served, tmp_path):
  (tmp_path / 'by_hand').mkdir()
  formats.write_dpr(tmp_path / 'by_hand')
  for name in (
    'psgs_w100.tsv',
    'biencoder-nq-train.json',
    'biencoder-nq-dev.json',
  ):
    data = (tmp_path / 'by_hand' / name).read_bytes()
    served(f'{name}.gz', gzip.compress(data), name)
  data = (tmp_path / 'by_hand' / 'nq-test.qa.csv').read_bytes()
  served('nq-test.qa.csv', data, 'nq-test.qa.csv')
  settings = config.Config(
    data_dir=str(tmp_path / 'new'), download=True, dataset='dpr', questions='nq'
  )
  splits = experiment.load_texts(settings, ('train', 'test')).splits
  assert len(splits['train'].ids) == formats.NUM_TRAIN - 1
  assert len(splits['test'].ids) == formats.NUM_TEST


def test_a_file_with_another_checksum_is_removed_and_named(served, tmp_path):
  served('psgs_w100.tsv.gz', gzip.compress(b'x'), 'psgs_w100.tsv', md5='0' * 32)
  with pytest.raises(errors.BadInput, match='not 000.*, and was removed'):
    read(tmp_path / 'new', dataset='dpr', questions='nq')
  assert not (tmp_path / 'new' / 'psgs_w100.tsv.gz').is_symlink()


def test_what_cannot_be_fetched_is_to_be_put_there_by_hand(served, tmp_path):
  served('psgs_w100.tsv.gz', b'', 'psgs_w100.tsv').unlink()
  with pytest.raises(
    errors.BadInput, match='put psgs_w100.tsv into .* by hand'
  ):
    read(tmp_path / 'new', dataset='dpr', questions='nq')
