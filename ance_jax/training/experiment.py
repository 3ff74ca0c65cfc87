"""What the jobs of a run share: its data as rows, its model, its folder."""

import dataclasses
import json
import pathlib
import secrets
from typing import NamedTuple

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.core import compiled
from ance_jax.core import devices as devices_lib
from ance_jax.core import distributed
from ance_jax.core import logs
from ance_jax.core import remote
from ance_jax.core import workdirs
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import load
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.models import bi_encoder
from ance_jax.models import pretrained
from ance_jax.models import snapshots
from ance_jax.retrieval import corpus_index
from ance_jax.retrieval import encoding
from ance_jax.training import batches

_DATA_FILE = 'data.json'


class Run(NamedTuple):
  """All that stays as it is while a job runs.

  Attributes:
    id: What tells this run from all others; empty without one.
    config: `Config`.
    devices: The accelerators used, those of all processes.
    corpus: `corpus.Corpus`, N passages.
    splits: `corpus.Split` by name.
    passages: `tokens.TokenRows` of the corpus.
    queries: `tokens.TokenRows` by split.
    retriever: `bi_encoder.Retriever`.
    tokenizer: Its tokenizer.
    query_encoder: `encoding.Encoder` of queries.
    passage_encoder: `encoding.Encoder` of passages.
  """

  id: str
  config: config_lib.Config
  devices: tuple
  corpus: corpus_lib.Corpus
  splits: dict[str, corpus_lib.Split]
  passages: tokens.TokenRows
  queries: dict[str, tokens.TokenRows]
  retriever: bi_encoder.Retriever
  tokenizer: tokenizer_lib.Tokenizer
  query_encoder: encoding.Encoder
  passage_encoder: encoding.Encoder

  @property
  def workdir(self):
    """Folder of the run, a `pathlib.Path`."""
    return pathlib.Path(self.config.workdir)


def begin(config, split_names, spread=None):
  """Returns (Run, parameters) of a new run.

  Args:
    config: The run's `Config`.
    split_names: As for `load.load`.
    spread: As for `tokens.token_rows`, of the passages.
  """
  # Recorded, so that it stays whatever --beir_set is later.
  config = load.with_protocol(config)
  config = pretrained.pinned(_as_begun(config))
  dataset, model = _dataset_and_model(config, split_names)
  new = distributed.told(lambda: secrets.token_hex(8))
  run = _run(new, config, dataset, model.retriever, model.tokenizer, spread)
  return run, model.params


def _dataset_and_model(config, split_names):
  """Returns the `corpus.Dataset` and the `pretrained.Model` to start from.

  The index is looked at before either is read, as far as that can be.
  """
  if config.init_from:
    model = pretrained.load(config, ())
    corpus_index.check_index(config, model.retriever.embedding_size)
    return load.load(config, split_names), model
  corpus_index.check_index(config, config.head_size or config.hidden_size)
  dataset = load.load(config, split_names)
  texts = tokens.passage_texts(dataset.corpus, tokenizer_lib.SPACE)
  return dataset, pretrained.load(config, texts)


def beside(run, devices):
  """Returns the run as one that refreshes it on other devices needs it."""
  encoders_there = _encoders(run.config, run.retriever, devices)
  return run._replace(
    devices=devices,
    query_encoder=encoders_there[0],
    passage_encoder=encoders_there[1],
  )


def record(run):
  """Returns the {name: bytes} that `go_on` needs, for a checkpoint."""
  hashes = {name: split.hash for name, split in run.splits.items()}
  began = {'run': run.id, 'corpus': run.corpus.hash, 'splits': hashes}
  return {
    workdirs.FLAGS_FILE: run.config.to_flagfile().encode(),
    _DATA_FILE: json.dumps(began).encode(),
    **pretrained.model_files(run.retriever, run.tokenizer),
  }


def tokens_folder(config):
  """Returns the folder of token rows, a `pathlib.Path`."""
  return pathlib.Path(config.tokens_dir or f'{config.workdir}/tokens')


def go_on(config, split_names, step):
  """Returns the `Run` of a folder at the checkpoint of a step.

  Raises:
    BadInput: The data is not what the run began with.
  """
  retriever, tokenizer = pretrained.load_model(config.workdir, step)
  began, before = _began(config.workdir, step), settings(config.workdir, step)
  # With the commit that the hub's name stood for.
  config = dataclasses.replace(config, init_from=before.init_from)
  config = _with_protocol(config, before)
  return _go_on(config, split_names, began, retriever, tokenizer)


def _began(workdir, step):
  return json.loads(checkpoint.read_record(workdir, step)[_DATA_FILE])


def _go_on(config, split_names, began, retriever, tokenizer):
  corpus_index.check_index(config, retriever.embedding_size)
  dataset = load.load(config, split_names)
  _check_dev(config, split_names, dataset, began)
  compared = {'the corpus': (dataset.corpus.hash, began['corpus'])}
  for name, split in dataset.splits.items():
    old = began['splits'].get(name, split.hash)  # Test has none.
    compared[f'split {name!r}'] = split.hash, old
  for what, (new, old) in compared.items():
    if new != old:
      raise errors.BadInput(
        f'the data must stay as the run in {config.workdir} began; found {what}'
        f' of hash {new[:12]} instead of {old[:12]}; give back the data, or '
        f'name another --workdir, with --init_from={config.workdir}.'
      )
  return _run(began['run'], config, dataset, retriever, tokenizer)


def _check_dev(config, split_names, dataset, began):
  """Raises `BadInput` where a run would lose its dev split, or get one."""
  dev = config.dev_split
  has, had = (dev in splits for splits in (dataset.splits, began['splits']))
  # None is all of them; a job may well ask for none.
  asked = (dev, config.train_split) if split_names is None else split_names
  if has != had and {dev, config.train_split} <= set(asked):
    found, instead = ('a', 'none') if has else ('no', 'one')
    raise errors.BadInput(
      f'the data has {found} split {dev!r} where the run in {config.workdir} '
      f'began with {instead}; give back the data, or name another --workdir, '
      f'with --init_from={config.workdir}.'
    )


def read(config, split_names, *, for_training=False):
  """Returns (Run, parameters, step) for a job that does not train.

  They are those of the run in `--workdir` at its `--checkpoint`, or, where no
  run is, of `--init_from`, at step 0 if that is no run.

  Args:
    config: `Config`.
    split_names: As for `load.load`.
    for_training: Whether the run trains on what the job makes: then no setting
      may be another than the run's.
  """
  fetch(config, every=config.checkpoint != 'last')
  devices, _ = devices_lib.training_devices(config)
  compiled.keep(config.compilation_cache_dir, devices)
  if is_run(config.workdir):
    # Before the data, which may take longer than a checkpoint is kept.
    step, (before, began, model) = checkpoint.read_chosen(
      config.workdir,
      config.checkpoint,
      lambda step: _read_saved(config, step, devices, for_training),
    )
    if not (config.job == 'evaluate' and config.beir_set):
      config = _with_protocol(config, before)
    run = _go_on(config, split_names, began, model.retriever, model.tokenizer)
    return run, model.params, step
  if not config.init_from:
    raise errors.BadInput(
      f'--job={config.job} must be given a run or a checkpoint; found no run '
      f'in {config.workdir} and no --init_from; set one of the two.'
    )
  config, step = pinned(config)
  dataset, model = _dataset_and_model(config, split_names)
  if pretrained.is_run(config.init_from):
    _say_other_data(config, dataset, _began(config.init_from, step))
  run = _run('', config, dataset, model.retriever, model.tokenizer)
  return run, devices_lib.replicate(model.params, devices), step


def pinned(config):
  """Returns the settings with what exactly `--init_from` is read at.

  Returns:
    `Config`, with the step of a run or the commit of a name of the hub; and the
    step, 0 where `--init_from` is no run.
  """
  if not pretrained.is_run(config.init_from):
    return pretrained.pinned(config), 0
  step = checkpoint.choose(config.init_from, config.checkpoint)
  return dataclasses.replace(config, checkpoint=str(step)), step


def _say_other_data(config, dataset, began):
  """Prints what data is not that which the run in `--init_from` began with."""
  if dataset.corpus.hash != began['corpus']:
    logs.say(f'the corpus is another than that of {config.init_from}')
    return
  for name, split in dataset.splits.items():
    if split.hash != began['splits'].get(name, split.hash):
      logs.say(
        f'split {name!r} is another than that of {config.init_from}, which may '
        'have trained on some of its queries: --dev_fraction, --dev_split and '
        '--train_split say which'
      )


def _read_saved(config, step, devices, for_training):
  """Returns what a checkpoint has: `Config`, what it began with, `Model`."""
  before = settings(config.workdir, step)
  free = ('protocol', *(() if for_training else config_lib.OF_READING))
  kept = {name: getattr(before, name) for name in free}
  check_same_run(dataclasses.replace(config, **kept), step)
  model = pretrained.load_whole(config.workdir, step, devices)
  return before, _began(config.workdir, step), model


def _with_protocol(config, before):
  """Returns the `Config`; its protocol is that of `before` if it has none."""
  return dataclasses.replace(
    config, protocol=config.protocol or before.protocol
  )


def training_data(run, method):
  """Returns the `batches.TrainingData` of a row of the method table."""
  split = run.config.train_split
  return batches.training_data(
    run.splits[split],
    run.corpus,
    run.queries[split],
    run.passages,
    run.retriever,
    method,
    run.config.drop_same_text,
  )


def fetch(config, *, every=False):
  """Copies in what `--remote_dir` has of a run, if that went on elsewhere.

  Args:
    config: `Config`.
    every: As for `checkpoint.fetch`, whose result this returns.
  """
  workdirs.require(config)
  came_further = checkpoint.fetch(config.workdir, every=every)
  if came_further:
    examples = remote.files(f'{config.workdir}/{workdirs.EXAMPLES_FOLDER}')
    for name in (f'{config.workdir}/{logs.METRICS_FILE}', *examples):
      remote.pull_file(name)
  return came_further


def is_run(workdir):
  """Returns whether a run was begun in a folder."""
  begun = (workdirs.FLAGS_FILE, logs.METRICS_FILE)
  return pretrained.is_run(workdir) or any(
    (pathlib.Path(workdir) / name).exists() for name in begun
  )


def source(config):
  """Returns the folder of the run that a job reads, or None.

  It is `--workdir`, or where no run is there, that of `--init_from`.
  """
  for folder in (config.workdir, config.init_from):
    if folder and pretrained.is_run(folder):
      return folder
  return None


def settings(workdir, step):
  """Returns the `Config` that a checkpoint was saved under."""
  text = checkpoint.read_record(workdir, step)[workdirs.FLAGS_FILE].decode()
  where = f'{workdirs.FLAGS_FILE} of the checkpoint of step {step}'
  before = config_lib.Config.from_lines(text.split('\n')[:-1], where)
  if before.dataset == 'beir' and not before.protocol:
    # Also where it was begun before --beir_set brought a protocol.
    return dataclasses.replace(before, protocol='usual')
  return before


def _as_begun(config):
  """Returns the `Config` with the commits that a run began with and lost."""
  path = pathlib.Path(config.workdir) / workdirs.FLAGS_FILE
  lines = path.read_text().split('\n') if path.is_file() else []
  for line in lines:
    name, _, pin = line.partition('=')
    if name == '--init_from' and snapshots.is_pin(pin, config.init_from):
      return dataclasses.replace(config, init_from=pin)
  return config


def check_same_run(config, step):
  """Raises `BadInput` if a checkpoint is of other settings than these."""
  before = settings(config.workdir, step)
  for name, old, new in config_lib.differences(
    before, _with_protocol(config, before), may_change=False
  ):
    if name == 'init_from' and snapshots.is_pin(old, new):
      continue
    raise errors.BadInput(
      f'--{name} must stay as the run in {config.workdir} began; found {new!r} '
      f'instead of {old!r}; set it back, or name another --workdir.'
    )


def write_flags(config):
  """Writes `run.flags`, the flagfile that repeats the run."""
  if distributed.is_first():
    path = pathlib.Path(config.workdir) / workdirs.FLAGS_FILE
    atomic.write_text(path, config.to_flagfile())
    remote.push(path)


def _run(id, config, dataset, retriever, tokenizer, spread=None):
  corpus, folder = dataset.corpus, tokens_folder(config)
  most = len(corpus.texts) * config.chunks
  corpus_index.check_index(config, retriever.embedding_size, most)
  passages = tokens.token_rows(
    tokenizer,
    tokens.passage_texts(
      corpus, retriever.title_separator, retriever.passage_prompt
    ),
    what='passages',
    num_texts=len(corpus.texts),
    cut=tokens.Cut(
      retriever.passage_length, config.chunks, config.whole_chunks
    ),
    content_hash=_hash_of(
      corpus, repr(retriever.title_separator), retriever.passage_prompt
    ),
    folder=folder,
    spread=spread,
  )
  queries = {
    name: tokens.token_rows(
      tokenizer,
      (retriever.query_prompt + text for text in split.texts),
      what=f'{name}-queries',
      num_texts=len(split.texts),
      cut=tokens.Cut(retriever.query_length),
      content_hash=_hash_of(split, retriever.query_prompt),
      folder=folder,
    )
    for name, split in dataset.splits.items()
  }
  devices, _ = devices_lib.training_devices(config)
  query_encoder, passage_encoder = _encoders(config, retriever, devices)
  logs.say(
    f'{len(devices)} {devices[0].device_kind} device(s), encoder of '
    f'{retriever.body.num_layers} layers, width {retriever.body.hidden_size}, '
    f'{retriever.pooling} pooling, {retriever.similarity}'
  )
  return Run(
    id,
    config,
    devices,
    corpus,
    dataset.splits,
    passages,
    queries,
    retriever,
    tokenizer,
    query_encoder,
    passage_encoder,
  )


def _encoders(config, retriever, devices):
  return encoding.make_encoders(
    retriever,
    dtype=config.dtype,
    tokens_per_batch=config.tokens_per_batch,
    devices=devices,
    # While another thread uses the GPU, cuDNN may fail to load a kernel.
    kernel=config.refresh != 'async',
  )


def _hash_of(texts, *additions):
  """Returns the hash of a corpus or split with what is added to its texts."""
  return ' '.join([texts.hash, *filter(None, additions)])
