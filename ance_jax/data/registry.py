"""Public datasets: URLs, sizes, checksums and row counts of their files.

From public registries (the MS MARCO page, NIST, DPR's download_data.py, BEIR's
README, ir_datasets); values that none of them gives are left empty.
"""

from typing import NamedTuple

# DPR's question sets.
QUESTIONS = ('nq', 'trivia', 'webquestions', 'curatedtrec', 'squad1')
_MARCO = 'https://msmarco.z22.web.core.windows.net/msmarcoranking/'
_NIST = 'https://trec.nist.gov/data/deep/'
_DPR = 'https://dl.fbaipublicfiles.com/dpr/'


class Download(NamedTuple):
  """A file to download.

  Attributes:
    url: Address.
    size: Bytes, or None.
    md5: Checksum in hexadecimal, or None.
  """

  url: str
  size: int | None = None
  md5: str | None = None


_COLLECTION = Download(
  f'{_MARCO}collectionandqueries.tar.gz',
  1_057_717_952,
  '31644046b18952c1386cd4564ba2ae69',
)
_DL19_QUERIES = Download(
  f'{_MARCO}msmarco-test2019-queries.tsv.gz',
  4_276,
  'eda71eccbe4d251af83150abe065368c',
)
_DL20_QUERIES = Download(
  f'{_MARCO}msmarco-test2020-queries.tsv.gz',
  4_131,
  '00a406fb0d14ed3752d70d1e4eb98600',
)
# {name of a file, unpacked: download that contains it}.
DOWNLOADS = {
  'collection.tsv': _COLLECTION,
  'queries.train.tsv': _COLLECTION,
  'queries.dev.small.tsv': _COLLECTION,
  'qrels.train.tsv': _COLLECTION,
  'qrels.dev.small.tsv': _COLLECTION,
  'msmarco-test2019-queries.tsv': _DL19_QUERIES,
  '2019qrels-pass.txt': Download(
    f'{_NIST}2019qrels-pass.txt', 187_092, '2f4be390198da108f6845c822e5ada14'
  ),
  'msmarco-test2020-queries.tsv': _DL20_QUERIES,
  '2020qrels-pass.txt': Download(
    f'{_NIST}2020qrels-pass.txt', 218_617, '0355ccee7509ac0463e8278186cdd8d1'
  ),
  'msmarco-docs.tsv': Download(f'{_MARCO}msmarco-docs.tsv.gz'),
  'msmarco-doctrain-queries.tsv': Download(
    f'{_MARCO}msmarco-doctrain-queries.tsv.gz',
    6_457_962,
    '4086d31a9cf2d7b69c4932609058111d',
  ),
  'msmarco-doctrain-qrels.tsv': Download(
    f'{_MARCO}msmarco-doctrain-qrels.tsv.gz',
    2_385_717,
    '9d1609e240113b0504fd2e61cb36d924',
  ),
  'msmarco-docdev-queries.tsv': Download(
    f'{_MARCO}msmarco-docdev-queries.tsv.gz',
    91_837,
    'ac20593d71b9c32ab2633230f9cdf10d',
  ),
  'msmarco-docdev-qrels.tsv': Download(
    f'{_MARCO}msmarco-docdev-qrels.tsv.gz',
    38_553,
    '5eeafaeb4960979a62e7fed93273254e',
  ),
  '2019qrels-docs.txt': Download(
    f'{_NIST}2019qrels-docs.txt', 339_438, 'd7ef53b995ef7e01676ea85d7ec01dda'
  ),
  '2020qrels-docs.txt': Download(
    f'{_NIST}2020qrels-docs.txt', 182_852, 'e10f3545583b124a4ed5e7992293e15a'
  ),
  'psgs_w100.tsv': Download(
    f'{_DPR}wikipedia_split/psgs_w100.tsv.gz',
    4_694_541_059,
    '612fe66e0b6b41ee28f806140226c563',
  ),
  'biencoder-nq-train.json': Download(
    f'{_DPR}data/retriever/biencoder-nq-train.json.gz',
    2_314_892_908,
    'a1c927b5adae71388eb064329387709f',
  ),
  'biencoder-nq-dev.json': Download(
    f'{_DPR}data/retriever/biencoder-nq-dev.json.gz',
    256_239_282,
    '2640483dbe0df7ae29c6da419c551a80',
  ),
  'biencoder-trivia-train.json': Download(
    f'{_DPR}data/retriever/biencoder-trivia-train.json.gz',
    1_848_559_940,
    '5aa4d3577c91425cd20e239ed89a252b',
  ),
  'biencoder-trivia-dev.json': Download(
    f'{_DPR}data/retriever/biencoder-trivia-dev.json.gz',
    207_271_749,
    'd559dffe09acfe5a6370adea55b8abf2',
  ),
  'nq-test.qa.csv': Download(f'{_DPR}data/retriever/nq-test.qa.csv'),
  'nq-dev.qa.csv': Download(f'{_DPR}data/retriever/nq-dev.qa.csv'),
  'trivia-test.qa.csv': Download(f'{_DPR}data/retriever/trivia-test.qa.csv.gz'),
  'trivia-dev.qa.csv': Download(f'{_DPR}data/retriever/trivia-dev.qa.csv.gz'),
}
DOWNLOADS |= {
  file: Download(f'{_DPR}data/retriever/{file}{ending}')
  for name in QUESTIONS[2:]
  for file, ending in (
    (f'{name}-test.qa.csv', ''),
    (f'biencoder-{name}-train.json', '.gz'),
    (f'biencoder-{name}-dev.json', '.gz'),
  )
}


# Rows of the original files, without headers, from papers and registries; other
# counts are unknown.
ROWS = {
  'collection.tsv': 8_841_823,
  'qrels.train.tsv': 532_761,
  'queries.dev.small.tsv': 6_980,
  'qrels.dev.small.tsv': 7_437,
  'msmarco-docs.tsv': 3_213_835,
  'msmarco-doctrain-queries.tsv': 367_013,
  'msmarco-docdev-queries.tsv': 5_193,
  'psgs_w100.tsv': 21_015_324,
  'biencoder-nq-train.json': 58_880,
  'biencoder-nq-dev.json': 6_515,
  'nq-dev.qa.csv': 8_757,
  'nq-test.qa.csv': 3_610,
  'trivia-test.qa.csv': 11_313,
}


_BEIR = 'https://public.ukp.informatik.tu-darmstadt.de/thakur/BEIR/datasets/'
# Bytes and MD5 of the BEIR archives (BEIR's README, ir_datasets).
_BEIR_ARCHIVES = {
  'arguana': (3_773_617, '8ad3e3c2a5867cdced806d6503f29b99'),
  'climate-fever': (1_228_666_652, '8b66f0a9126c521bae2bde127b4dc99d'),
  'cqadupstack': (5_343_728_040, '4e41456d7df8ee7760a7f866133bda78'),
  'dbpedia-entity': (639_285_131, 'c2a39eb420a3164af735795df012ac2c'),
  'fever': (1_236_988_269, '5a818580227bfb4b35bb6fa46d9b6c03'),
  'fiqa': (17_948_027, '17918ed23cd04fb15047f73e6c3bd9d9'),
  'hotpotqa': (654_025_350, 'f412724f78b0d91183a0e86805e16114'),
  'msmarco': (1_082_258_632, '444067daf65d982533ea17ebd59501e4'),
  'nfcorpus': (2_448_432, 'a89dba18a62ef92f7d323ec890a0d38d'),
  'nq': (498_307_926, 'd4d3d2e48787a744b6f6e691ff534307'),
  'quora': (15_853_968, '18fb154900ba42a600f84b839c173167'),
  'scidocs': (142_471_588, '38121350fc3a4d2f48850f6aff52e4a9'),
  'scifact': (2_816_079, '5f7d1de60b170fc8027bb7898e2efca1'),
  'trec-covid': (73_876_720, 'ce62140cb23feb9becf6270d0d1fe6d1'),
  'webis-touche2020': (227_132_363, '46f650ba5a527fc69e0a6521c5a23563'),
}
# {BEIR dataset: number of passages} (ir_datasets).
BEIR_PASSAGES = {
  'arguana': 8_674,
  'climate-fever': 5_416_593,
  'cqadupstack/android': 22_998,
  'cqadupstack/english': 40_221,
  'cqadupstack/gaming': 45_301,
  'cqadupstack/gis': 37_637,
  'cqadupstack/mathematica': 16_705,
  'cqadupstack/physics': 38_316,
  'cqadupstack/programmers': 32_176,
  'cqadupstack/stats': 42_269,
  'cqadupstack/tex': 68_184,
  'cqadupstack/unix': 47_382,
  'cqadupstack/webmasters': 17_405,
  'cqadupstack/wordpress': 48_605,
  'dbpedia-entity': 4_635_922,
  'fever': 5_416_568,
  'fiqa': 57_638,
  'hotpotqa': 5_233_329,
  'msmarco': 8_841_823,
  'nfcorpus': 3_633,
  'nq': 2_681_468,
  'quora': 522_931,
  'scidocs': 25_657,
  'scifact': 5_183,
  'trec-covid': 171_332,
  'webis-touche2020': 382_545,
}


def beir_archive(name: str) -> Download:
  """Returns the archive that contains a BEIR dataset."""
  archive = name.split('/')[0]
  return Download(f'{_BEIR}{archive}.zip', *_BEIR_ARCHIVES[archive])
