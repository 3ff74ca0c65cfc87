"""MS MARCO, TREC DL, DPR's sets and BEIR as TFDS builders, a config per table.

They hold the same rows as the readers, so a dataset can be shared in TFDS's
format and read without this project:

    tfds.MsMarcoPassage(config='corpus').download_and_prepare()
    tfds.Beir(config='scifact_corpus').download_and_prepare()

`source_dir` is a folder with the original files; without it they are
downloaded.
"""

import os

import numpy as np
import tensorflow_datasets as tfds

from ance_jax.data import load
from ance_jax.data import records
from ance_jax.data import registry

_MARCO_SPLITS = ('train', 'dev', 'dl19', 'dl20')
_MARCO_CITATION = """\
@inproceedings{nguyen2016msmarco,
  title={{MS MARCO}: A Human Generated MAchine Reading COmprehension Dataset},
  author={Nguyen, Tri and Rosenberg, Mir and Song, Xia and Gao, Jianfeng and
    Tiwary, Saurabh and Majumder, Rangan and Deng, Li},
  booktitle={CoCo@NIPS}, year={2016}}"""
_DPR_CITATION = """\
@inproceedings{karpukhin2020dense,
  title={Dense Passage Retrieval for Open-Domain Question Answering},
  author={Karpukhin, Vladimir and Oguz, Barlas and Min, Sewon and Lewis, Patrick
    and Wu, Ledell and Edunov, Sergey and Chen, Danqi and Yih, Wen-tau},
  booktitle={EMNLP}, year={2020}}"""
_BEIR_CITATION = """\
@inproceedings{thakur2021beir,
  title={{BEIR}: A Heterogeneous Benchmark for Zero-shot Evaluation of
    Information Retrieval Models},
  author={Thakur, Nandan and Reimers, Nils and R{\\"u}ckl{\\'e}, Andreas and
    Srivastava, Abhishek and Gurevych, Iryna},
  booktitle={NeurIPS Datasets and Benchmarks}, year={2021}}"""
_TEXT = tfds.features.Text()
_TEXTS = tfds.features.Sequence(tfds.features.Text())
_TABLES = {
  'corpus': {'id': _TEXT, 'title': _TEXT, 'text': _TEXT},
  'queries': {'id': _TEXT, 'text': _TEXT, 'answers': _TEXTS},
  'judgements': {
    'query': _TEXT,
    'passage': _TEXT,
    'grade': np.int32,
  },
}


def _flat(name):
  """Returns the name of a BEIR dataset in the form of a TFDS config name."""
  return name.replace('/', '-')


class _RetrievalSet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A dataset as three tables, with rows in the order of the source."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(name=name, description=f'The table of {name}.')
    for name in _TABLES
  ]
  DATASET, SPLITS, LICENCE, CITATION, HOMEPAGE = '', (), '', '', ''
  # Names of a set of questions and of a set of BEIR.
  QUESTIONS, beir_set = None, None

  @property
  def table(self) -> str:
    """Name of this config's table."""
    return self.builder_config.name.rpartition('_')[2]

  def __init__(self, *, source_dir: str | os.PathLike | None = None, **kwargs):
    self._source_dir = source_dir
    super().__init__(**kwargs)

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      description=type(self).__doc__,
      features=tfds.features.FeaturesDict(_TABLES[self.table]),
      license=self.LICENCE,
      citation=self.CITATION,
      homepage=self.HOMEPAGE,
      # Keeps the row order of the source.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    folder = self._source_dir or dl_manager.download_dir.joinpath(
      self.name, _flat(self.beir_set or '')
    )
    settings = records.Settings(
      self.DATASET,
      str(folder),
      download=self._source_dir is None,
      questions=self.QUESTIONS,
      beir_set=self.beir_set,
    )
    source = load.reader(self.DATASET)(settings)
    if self.table == 'corpus':
      corpus = source.corpus
      rows = zip(corpus.ids, corpus.titles, corpus.texts, strict=True)
      return {'corpus': self._generate_examples(rows)}
    found = {
      name: judged
      for name in self.SPLITS
      if (judged := source.read_split(name))
    }
    if self.table == 'queries':
      return {
        name: self._generate_examples(_queries(judged))
        for name, judged in found.items()
      }
    return {
      name: self._generate_examples(_judgements(judged, source.corpus))
      for name, judged in found.items()
      # Questions with only answers have no judgements.
      if judged.judgements
    }

  def _generate_examples(self, rows):
    names = _TABLES[self.table]
    for number, row in enumerate(rows):
      yield number, dict(zip(names, row, strict=True))


class MsMarcoPassage(_RetrievalSet):
  """MS MARCO passages, without titles, and TREC DL 2019 and 2020."""

  DATASET, SPLITS, CITATION = 'msmarco', _MARCO_SPLITS, _MARCO_CITATION
  LICENCE = 'Terms of MS MARCO: research that is not commercial.'
  HOMEPAGE = 'https://microsoft.github.io/msmarco/'


class MsMarcoPassageTitled(MsMarcoPassage):
  """MS MARCO passages with the titles of their pages, which are unofficial.

  The corpus of RocketQA, coCondenser, Tevatron, SimLM and ANCE-Tele.
  """

  DATASET = 'msmarco_titled'


class MsMarcoDocument(MsMarcoPassage):
  """The first 10,000 characters of MS MARCO's documents, and TREC DL."""

  DATASET = 'msmarco_doc'


class DprNq(_RetrievalSet):
  """Wikipedia in passages of 100 words, and Natural Questions as in DPR.

  Train and dev queries have the gold passage as their judgement; answers are in
  the queries table.
  """

  DATASET, QUESTIONS = 'dpr', 'nq'
  SPLITS, CITATION = ('train', 'dev', 'test'), _DPR_CITATION
  LICENCE = 'CC BY-NC 4.0'
  HOMEPAGE = 'https://github.com/facebookresearch/DPR'


class DprTrivia(DprNq):
  """The same Wikipedia, and TriviaQA as in DPR."""

  QUESTIONS = 'trivia'


class DprWebQuestions(DprNq):
  """The same Wikipedia, and WebQuestions as in DPR."""

  QUESTIONS = 'webquestions'


class DprCuratedTrec(DprNq):
  """The same Wikipedia, and CuratedTREC, whose answers are patterns."""

  QUESTIONS = 'curatedtrec'


class DprSquad(DprNq):
  """The same Wikipedia, and SQuAD 1.1 as in DPR."""

  QUESTIONS = 'squad1'


class Beir(_RetrievalSet):
  """A BEIR dataset; the config names dataset and table, as in 'nq_corpus'."""

  BUILDER_CONFIGS = [
    tfds.core.BuilderConfig(
      name=f'{_flat(name)}_{table}',
      description=f'The table of {table} of {name}.',
    )
    for name in registry.BEIR_PASSAGES
    for table in _TABLES
  ]
  DATASET, SPLITS, CITATION = 'beir', ('train', 'dev', 'test'), _BEIR_CITATION
  LICENCE = "Each set has its own: see BEIR's README."
  HOMEPAGE = 'https://github.com/beir-cellar/beir'

  @property
  def beir_set(self) -> str:
    """Name of this config's dataset."""
    wanted = self.builder_config.name.rpartition('_')[0]
    return {_flat(name): name for name in registry.BEIR_PASSAGES}[wanted]


def _queries(judged):
  answers = judged.answers or {}
  for row, query in enumerate(
    zip(judged.query_ids, judged.queries, strict=True)
  ):
    yield *query, answers.get(row, [])


def _judgements(judged, corpus):
  for (query, passage), grade in judged.judgements.items():
    yield judged.query_ids[query], corpus.ids[passage], grade
  for (query, passage_id), grade in (judged.missing or {}).items():
    yield judged.query_ids[query], passage_id, grade
