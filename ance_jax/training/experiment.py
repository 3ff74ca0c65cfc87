"""What main, the jobs and training share: settings, data, retriever, folder.

Nothing below training takes an `Experiment` or a `Config`. In training the
loop, refreshes, their rules and their diagnostics take one whole: a refresh
depends on nearly all of it, and its fingerprint names what it depends on.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import dataclasses
import json
import pathlib
import secrets
from typing import NamedTuple

import numpy as np

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import compiled
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.core import remote
from ance_jax.core import strict_io
from ance_jax.core import workdirs
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import load
from ance_jax.data import tokenized
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.data import trec
from ance_jax.models import bi_encoder
from ance_jax.models import pretrained
from ance_jax.models import snapshots
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import retriever as retriever_lib
from ance_jax.training import batches
from ance_jax.training import methods
from ance_jax.training import schedule
from ance_jax.training import settings as settings_lib

_DATA_FILE = 'data.json'
# Settings that may be names on the hub, which a run pins to a commit.
_ON_THE_HUB = 'init_from', 'guide', 'cross_encoder'
# Rows of tokens are as long as a multiple of this, 128 on accelerators.
_ROW_MULTIPLES = {'cpu': 16}
# Jobs that build no index.
_WITHOUT_INDEX = ('encode', 'prepare', 'inspect')


class Experiment(NamedTuple):
  """Settings, data and retriever of a job.

  Attributes:
    id: Unique identifier of the run; empty without a run.
    config: All settings.
    dataset: The data, as token rows.
    retriever: The retriever, without parameters if a training state has them.
  """

  id: str
  config: config_lib.Config
  dataset: tokenized.Dataset
  retriever: retriever_lib.Retriever

  @property
  def workdir(self) -> pathlib.Path:
    """Folder of the run."""
    return pathlib.Path(self.config.workdir)

  @property
  def devices(self) -> tuple:
    """Accelerators in use, of all processes."""
    return self.retriever.devices

  def with_params(self, params: dict) -> 'Experiment':
    """Returns a copy with parameters by tower, placed on all devices."""
    return self._replace(retriever=self.retriever.with_params(params))

  def on_devices(self, devices: tuple) -> 'Experiment':
    """Returns a copy that refreshes on other devices."""
    return self._replace(retriever=self.retriever.on_devices(devices))

  def embeddings_folder(self, passage_hash: str) -> pathlib.Path:
    """Returns the folder of the embeddings with a `Retriever.passage_hash`."""
    return corpus_index.embeddings_folder(
      self.retriever,
      self.dataset.passages,
      settings_lib.index(self.config),
      self.workdir / 'embeddings',
      passage_hash,
    )

  def index_corpus(
    self, watch: logs.Stopwatch, passage_hash: str | None = None
  ) -> corpus_index.IndexedCorpus:
    """Returns the corpus, encoded and indexed; see `corpus_index`."""
    return corpus_index.index_corpus(
      self.retriever,
      self.dataset.passages,
      settings_lib.index(self.config),
      self.workdir / 'embeddings',
      watch,
      passage_hash,
    )

  @contextlib.contextmanager
  def embedded_corpus(self) -> Iterator[list[np.ndarray]]:
    """Provides blocks of the embeddings of all passages or pieces."""
    folder = self.embeddings_folder(self.retriever.passage_hash())
    with atomic.in_use(folder):
      blocks, _ = corpus_index.encode_corpus(
        self.retriever,
        self.dataset.passages,
        settings_lib.index(self.config),
        folder,
      )
      yield blocks

  def encode_queries(
    self, split_name: str, watch: logs.Stopwatch, rows: np.ndarray | None = None
  ) -> np.ndarray:
    """Returns the embeddings of a split's queries; see `corpus_index`."""
    return corpus_index.encode_queries(
      self.retriever, self.dataset.queries[split_name], split_name, watch, rows
    )

  def evaluate(
    self,
    indexed: corpus_index.IndexedCorpus,
    split_name: str,
    watch: logs.Stopwatch,
  ) -> tuple[dict[str, float], trec.Ranking]:
    """Returns the scores and the ranking of a split; see `corpus_index`."""
    return corpus_index.evaluate(
      self.retriever, indexed, self.dataset, split_name, watch
    )


def load_texts(
  config: config_lib.Config, split_names: Sequence[str] | None
) -> corpus_lib.TextDataset:
  """Returns the data of a run, not tokenized; see `load.load`."""
  return load.load(settings_lib.data(config), split_names)


def load_model(
  config: config_lib.Config, texts: Iterable[str] = ()
) -> pretrained.Model:
  """Returns the model of `--init_from`; see `pretrained.load`."""
  return pretrained.load(*settings_lib.model(config), texts)


def planned_model(config: config_lib.Config) -> pretrained.Model:
  """Returns the model of `load_model`, without weights or tokenizer."""
  retriever = pretrained.planned(*settings_lib.model(config))
  return pretrained.Model(retriever, None, None)


def rank_by_bm25(
  config: config_lib.Config, split_names: Sequence[str] | None
) -> tuple[Callable, corpus_lib.Corpus, dict[str, corpus_lib.Split]]:
  """Returns the function of `bm25.make_rank`, the corpus and its splits."""
  workdirs.require(config)
  corpus, splits = load_texts(config, split_names)
  rank = corpus_index.bm25(
    corpus,
    splits,
    k1=config.bm25_k1,
    b=config.bm25_b,
    language=config.bm25_language,
  )
  return rank, corpus, splits


def make_retriever(
  config: config_lib.Config, model: pretrained.Model, devices: tuple
) -> retriever_lib.Retriever:
  """Returns the retriever of a model, with the settings of a run."""
  return retriever_lib.make(model, devices, settings_lib.encoding(config))


def check_index(
  config: config_lib.Config, width: int, num_vectors: int | None = None
) -> None:
  """Raises `BadInput` if the job could not build `--index`.

  Args:
    config: The settings.
    width: E, the width of embeddings.
    num_vectors: Maximum number of passages or pieces; None if unknown yet.
  """
  if config.job not in _WITHOUT_INDEX:
    num_devices = len(devices_lib.training_devices(config)[0])
    corpus_index.check_index(
      settings_lib.index(config), width, num_devices, num_vectors
    )


def create(
  config: config_lib.Config,
  split_names: Sequence[str] | None,
  spread: Callable | None = None,
) -> tuple[Experiment, dict]:
  """Returns a new run without parameters, and its initial parameters.

  Args:
    config: Settings of the run.
    split_names: As for `load.load`.
    spread: As for `tokens.token_rows`, for the passages.
  """
  # Records the protocol, so that a later --beir_set does not change it.
  config = dataclasses.replace(
    config, protocol=load.protocol(settings_lib.data(config))
  )
  config = _pinned(_as_begun(config))
  if config.job == 'train':
    names = {n: getattr(config, n) for n in _ON_THE_HUB[1:]}
    names = {
      field: name if name == methods.OWN_GUIDE else pretrained.pinned(name)
      for field, name in names.items()
    }
    config = dataclasses.replace(config, **names)
  texts, model = _texts_and_model(config, split_names)
  new = distributed.broadcast(lambda: secrets.token_hex(8))
  texts = with_verdicts(config, texts)
  made = _experiment(new, config, texts, model._replace(params=None), spread)
  return made, model.params


def _texts_and_model(config, split_names):
  """Returns the `corpus.TextDataset` and the `pretrained.Model` to start from.

  This checks the index first, as far as possible before reading either.
  """
  if config.init_from:
    model = load_model(config)
    retriever_lib.check_chunks(model.config, config.chunks)
    check_index(config, model.config.embedding_size)
    return load_texts(config, split_names), model
  check_index(config, config.head_size or config.hidden_size)
  data = load_texts(config, split_names)
  texts = tokens.passage_texts(data.corpus, tokenizer_lib.SPACE)
  return data, load_model(config, texts)


def record(run: Experiment) -> dict[str, bytes]:
  """Returns the files of a checkpoint that `restore` needs, by name."""
  data = run.dataset
  hashes = {name: split.hash for name, split in data.splits.items()}
  began = {'run': run.id, 'corpus': data.corpus.hash, 'splits': hashes}
  train = data.splits.get(run.config.train_split)
  if train and train.added:
    began['added'] = train.added
  if run.config.score_run:
    began['score_run'] = _score_run_hash(run.config)
  return {
    workdirs.FLAGS_FILE: run.config.to_flagfile().encode(),
    _DATA_FILE: json.dumps(began).encode(),
    **pretrained.model_files(run.retriever.config, run.retriever.tokenizer),
  }


def tokens_folder(config: config_lib.Config) -> pathlib.Path:
  """Returns the folder of token rows."""
  return pathlib.Path(config.tokens_dir or f'{config.workdir}/tokens')


def restore(
  config: config_lib.Config, split_names: Sequence[str] | None, step: int
) -> Experiment:
  """Returns the run in `--workdir` at the checkpoint of a step.

  It has no parameters; they are in the checkpoint's training state.

  Raises:
    BadInput: The data differs from the data that the run started with.
  """
  model = pretrained.Model(*pretrained.load_model(config.workdir, step), None)
  began, before = _began(config.workdir, step), settings(config.workdir, step)
  # Keeps the commits to which names on the hub were pinned.
  names = {name: getattr(before, name) for name in _ON_THE_HUB}
  config = dataclasses.replace(config, **names)
  config = _with_protocol(config, before)
  return _restore(config, split_names, began, model)


def _began(workdir, step):
  return json.loads(checkpoint.read_record(workdir, step)[_DATA_FILE])


def _restore(config, split_names, began, model):
  check_index(config, model.config.embedding_size)
  texts = load_texts(config, split_names)
  _check_dev(config, split_names, texts, began)
  compared = {'the corpus': (texts.corpus.hash, began['corpus'])}
  for name, split in texts.splits.items():
    old = began['splits'].get(name, split.hash)  # Test has none.
    compared[f'split {name!r}'] = split.hash, old
  for what, (new, old) in compared.items():
    if new != old:
      raise _other_data(
        config,
        f'{what} is not the one with which the run in {config.workdir} began '
        f'(hash {new[:12]} instead of {old[:12]})',
      )
  texts = with_verdicts(config, texts)
  train = texts.splits.get(config.train_split)
  if (
    train
    and _sees_batches(config)
    and (
      train.added != began.get('added', '')
      or (
        config.score_run and _score_run_hash(config) != began.get('score_run')
      )
    )
  ):
    raise errors.refusal(
      f'--score_run={config.score_run} is not the file with which the run in '
      f'{config.workdir} began',
      'give it back, or name another --workdir',
    )
  return _experiment(began['run'], config, texts, model)


def _check_dev(config, split_names, texts, began):
  """Raises `BadInput` if a run would lose or gain its dev split."""
  dev = config.dev_split
  has, had = (dev in splits for splits in (texts.splits, began['splits']))
  # None means all splits; a job may ask for none with ().
  asked = (dev, config.train_split) if split_names is None else split_names
  if has != had and {dev, config.train_split} <= set(asked):
    found, instead = ('a', 'none') if has else ('no', 'one')
    raise _other_data(
      config,
      f'the data has {found} split {dev!r} where the run in {config.workdir} '
      f'began with {instead}',
    )


def _other_data(config, fact):
  cure = 'give back the data, or name another --workdir, with --init_from='
  return errors.refusal(fact, cure + config.workdir)


def open(
  config: config_lib.Config,
  split_names: Sequence[str] | None,
  *,
  for_training: bool = False,
) -> tuple[Experiment, int]:
  """Returns the run or model that a job reads without training, and its step.

  This is the run in `--workdir` at its `--checkpoint`, or else `--init_from`,
  with step 0 if that is not a run.

  Args:
    config: The settings.
    split_names: As for `load.load`.
    for_training: Whether the run will train on the job's output, so that no
      setting may differ from the run's.
  """
  fetch(config, every=config.checkpoint != 'last')
  devices, _ = devices_lib.training_devices(config)
  compiled.enable_cache(config.compilation_cache_dir, devices)
  if is_run(config.workdir):
    # Reads the checkpoint before the data, because training may delete it.
    step, (before, began, model) = checkpoint.read_chosen(
      config.workdir,
      config.checkpoint,
      lambda step: _read_saved(config, step, devices, for_training),
    )
    if not (config.job == 'evaluate' and config.beir_set):
      config = _with_protocol(config, before)
    return _restore(config, split_names, began, model), step
  if not config.init_from:
    raise errors.refusal(
      f'there is no run in {config.workdir} and no --init_from, and --job='
      f'{config.job} needs a run or a checkpoint',
      'set one of the two',
    )
  config, step = pinned(config)
  texts, model = _texts_and_model(config, split_names)
  if pretrained.is_run(config.init_from):
    _say_other_data(config, texts, _began(config.init_from, step))
  return _experiment('', config, texts, model), step


def pinned(config: config_lib.Config) -> tuple[config_lib.Config, int]:
  """Resolves `--init_from` to an exact version.

  Returns:
    The settings, with the step of a run or the commit of a name on the hub, and
    the step, 0 if `--init_from` is not a run.
  """
  if not pretrained.is_run(config.init_from):
    return _pinned(config), 0
  step = checkpoint.choose(config.init_from, config.checkpoint)
  return dataclasses.replace(config, checkpoint=str(step)), step


def _pinned(config):
  name = pretrained.pinned(config.init_from)
  return dataclasses.replace(config, init_from=name)


def _say_other_data(config, texts, began):
  """Prints the data that differs from the data of the run in `--init_from`."""
  if texts.corpus.hash != began['corpus']:
    logs.log(f'the corpus is another than that of {config.init_from}')
    return
  for name, split in texts.splits.items():
    if split.hash != began['splits'].get(name, split.hash):
      logs.log(
        f'split {name!r} is another than that of {config.init_from}, which may '
        'have trained on some of its queries: --dev_fraction, --dev_split and '
        '--train_split say which'
      )


def _read_saved(config, step, devices, for_training):
  """Returns a checkpoint's `Config`, data hashes and `pretrained.Model`."""
  before = settings(config.workdir, step)
  free = ('protocol', *(() if for_training else config_lib.OF_READING))
  kept = {name: getattr(before, name) for name in free}
  if not for_training:
    kept['job'] = before.job  # Whose rules may need its row.
  check_same_run(dataclasses.replace(config, **kept), step)
  model = pretrained.load_whole(config.workdir, step, devices)
  return before, _began(config.workdir, step), model


def _with_protocol(config, before):
  """Returns the `Config`, with the protocol of `before` if it has none."""
  return dataclasses.replace(
    config, protocol=config.protocol or before.protocol
  )


def training_data(
  run: Experiment, method: methods.Method
) -> batches.TrainingData:
  """Returns the data from which a row of the method table draws batches."""
  split, data = run.config.train_split, run.dataset
  return batches.training_data(
    data.splits[split],
    data.corpus,
    data.queries[split],
    data.passages,
    run.retriever.config,
    method,
    run.config.drop_same_text,
    _ROW_MULTIPLES.get(run.devices[0].platform, 128),
  )


def draw(config: config_lib.Config, method: methods.Method) -> batches.Draw:
  """Returns how steps of a row of the method table draw their negatives.

  The flags are for `--method`, not for its warm-up.
  """
  if method is not methods.METHODS[config.method]:
    return batches.UNIFORM
  return batches.Draw(
    config.draw, config.simans_a, config.simans_b, 1 / config.temperature
  )


def trees(method: methods.Method, params: Iterable[str]) -> list[str]:
  """Returns the names of the parameter trees that a row trains."""
  both = bi_encoder.TIED
  return [name for name in params if name == both or name in method.trains]


def trees_of_run(config: config_lib.Config, params: Iterable[str]) -> list[str]:
  """Returns the names of the parameter trees that any row of a run trains."""
  rows = schedule.rows(config).values()
  trained = {name for row in rows for name in trees(row, params)}
  return sorted(trained)


def fetch(config: config_lib.Config, *, every: bool = False) -> bool:
  """Copies newer files of a run in from `--remote_dir`, if it has any.

  Args:
    config: Settings of the run.
    every: As for `checkpoint.fetch`, whose result this returns.
  """
  workdirs.require(config)
  came_further = checkpoint.fetch(config.workdir, every=every)
  if came_further:
    examples = remote.files(f'{config.workdir}/{workdirs.EXAMPLES_FOLDER}')
    for name in (f'{config.workdir}/{logs.METRICS_FILE}', *examples):
      remote.pull_file(name)
  return came_further


def is_run(workdir: str | pathlib.Path) -> bool:
  """Returns whether a folder has a run."""
  begun = (workdirs.FLAGS_FILE, logs.METRICS_FILE)
  return pretrained.is_run(workdir) or any(
    (pathlib.Path(workdir) / name).exists() for name in begun
  )


def source(config: config_lib.Config) -> str | None:
  """Returns the folder of the run that a job reads, or None.

  It is `--workdir` if that has a run, or else `--init_from`.
  """
  for folder in (config.workdir, config.init_from):
    if folder and pretrained.is_run(folder):
      return folder
  return None


def settings(workdir: str | pathlib.Path, step: int) -> config_lib.Config:
  """Returns the settings with which a checkpoint was saved."""
  text = checkpoint.read_record(workdir, step)[workdirs.FLAGS_FILE].decode()
  where = f'{workdirs.FLAGS_FILE} of the checkpoint of step {step}'
  before = config_lib.Config.from_lines(text.split('\n')[:-1], where)
  if before.dataset == 'beir' and not before.protocol:
    # Runs that are older than the protocol of --beir_set have none.
    return dataclasses.replace(before, protocol='usual')
  return before


def _as_begun(config):
  """Returns the `Config` with the commit in run.flags, if the run has one.

  A run that has lost its checkpoints thus starts from the same commit.
  """
  path = pathlib.Path(config.workdir) / workdirs.FLAGS_FILE
  lines = path.read_text().split('\n') if path.is_file() else []
  for line in lines:
    name, _, pin = line.partition('=')
    if name == '--init_from' and snapshots.is_pin(pin, config.init_from):
      return dataclasses.replace(config, init_from=pin)
  return config


def check_same_run(config: config_lib.Config, step: int) -> None:
  """Raises `BadInput` if the settings differ from the checkpoint's."""
  before = settings(config.workdir, step)
  for name, old, new in config_lib.differences(
    before, _with_protocol(config, before), may_change=False
  ):
    if name in _ON_THE_HUB and snapshots.is_pin(old, new):
      continue
    raise errors.refusal(
      f'--{name} is {new!r}, and the run in {config.workdir} began with '
      f'{old!r}',
      'set it back, or name another --workdir',
    )


def write_flags(config: config_lib.Config) -> None:
  """Writes `run.flags`, a flagfile that repeats the run."""
  if distributed.is_first():
    path = pathlib.Path(config.workdir) / workdirs.FLAGS_FILE
    atomic.write_text(path, config.to_flagfile())
    remote.push(path)


def _score_run_hash(config):
  return atomic.file_hash(strict_io.regular(config.score_run))


def _sees_batches(config):
  """Returns whether a job trains, mines for training or shows a batch."""
  return config.job in ('train', 'refresh', 'inspect')


def with_verdicts(
  config: config_lib.Config, texts: corpus_lib.TextDataset
) -> corpus_lib.TextDataset:
  """Returns the data, with the positives of `--positive_min_score`."""
  if not _sees_batches(config) or config.positive_min_score is None:
    return texts
  split = texts.splits[config.train_split]
  query_rows = {split.ids[row]: row for row in range(len(split.ids))}
  ranked = trec.read_run(config.score_run, query_rows, texts.corpus.rows)
  queries = np.repeat(np.arange(len(split.ids)), np.diff(ranked.offsets))
  is_positive = ranked.scores >= config.positive_min_score
  split = split.with_positives(
    queries[is_positive], ranked.passages[is_positive]
  )
  number = len(split.passages) - len(texts.splits[config.train_split].passages)
  logs.log(
    f'{config.score_run}: {number:,} passages that were not judged are '
    f'positives, as they score at least {config.positive_min_score:g}'
  )
  return texts._replace(splits={**texts.splits, config.train_split: split})


def _experiment(id, config, texts, model, spread=None):
  """Returns the `Experiment` with a dataset and a `pretrained.Model`."""
  most = len(texts.corpus.texts) * config.chunks
  check_index(config, model.config.embedding_size, most)
  devices, _ = devices_lib.training_devices(config)
  retriever = make_retriever(config, model, devices)
  made = retriever.config
  data = tokenized.make(
    texts, model.tokenizer, retriever.form, tokens_folder(config), spread
  )
  logs.log(
    f'{len(devices)} {devices[0].device_kind} device(s), encoder of '
    f'{made.body.num_layers} layers, width {made.body.hidden_size}, '
    f'{made.pooling} pooling, {made.similarity}'
  )
  return Experiment(id, config, data, retriever)
