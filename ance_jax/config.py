"""Defines all knobs of a run: name, type, default, unit and meaning.

flags.py turns the fields of `Config` into absl flags; code below `main` takes a
`Config` and never reads a flag. Defaults follow the paper's MS MARCO passage
run (Xiong et al. 2020, appendix A.1) where it has the knob; `experiments/` has
flagfiles of other runs.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses
import difflib
import os
import re
from typing import Any

from ance_jax import config_checks
from ance_jax import errors
from ance_jax.data import datasets
from ance_jax.data import registry
from ance_jax.jobs import forms
from ance_jax.models import choices
from ance_jax.retrieval import protocols
from ance_jax.retrieval import words
from ance_jax.training import methods

# Flagfile in a run's folder that repeats the run.
FLAGS_FILE = 'run.flags'
# Jobs by name, each a module of `jobs`.
JOBS = {
  'train': 'train a retriever',
  'prepare': 'only read and tokenize the data',
  'export': 'write a checkpoint for sentence-transformers',
  'inspect': 'report on the dataset',
  'audit': 'look for false negatives among top-ranked passages',
  'mine': 'write filtered hard negatives for other trainers',
  'refresh': 'mine negatives once with a checkpoint',
  'encode': 'write the embeddings of the corpus',
  'evaluate': 'score a split',
  'compare': 'test whether runs differ on a split by more than chance',
  'search': 'answer typed queries with passages',
  'report': 'draw the curves',
}


def _listed(rows):
  """Returns {name: meaning} as one text."""
  return '; '.join(f'{name}: {what}' for name, what in rows.items())


def knob(
  default: object,
  help: str,
  *,
  choices: Iterable[str] | Callable[[], Iterable[str]] | None = None,
  may_change: bool = False,
  section: str | None = None,
) -> Any:
  """Returns the dataclass field of one flag.

  Args:
    default: Value if the flag is not given; None means "not given".
    help: Meaning, unit and the paper's value, for `--help`.
    choices: Allowed values, or a function that returns them; None allows any
      value of the type.
    may_change: Whether a run may resume with a different value.
    section: Heading in `--help` of this field and the following ones.
  """
  return dataclasses.field(
    default=default,
    metadata={
      'help': help,
      'choices': choices,
      'may_change': may_change,
      'section': section,
    },
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """The settings of one job; see `--help` for the meaning of each field."""

  job: str = knob(
    'train',
    f'Job to run. {_listed(JOBS)}.',
    choices=JOBS,
    may_change=True,
    section='The job',
  )
  workdir: str = knob(
    '', 'Folder of the run, for all that it writes.', may_change=True
  )
  remote_dir: str = knob(
    '',
    'Remote folder, such as gs://BUCKET/RUN, to which checkpoints, refreshes '
    "and the run's pages and pictures are copied and from which they are read. "
    'A refresher on another machine needs it, with a --workdir of its own, and '
    'so does a restart on a new machine. gs:// needs gcsfs, s3:// needs s3fs. '
    'Not given: no remote folder.',
    may_change=True,
  )
  seed: int = knob(0, 'Seed of weights, batches, dropout and mining.')
  num_devices: int = knob(
    0, 'Local accelerators to use; 0 uses all.', may_change=True
  )
  num_processes: int = knob(
    1,
    'Number of processes that train together, with the same flags except '
    '--process_id and with one --workdir that all can access; 0 reads it from '
    'the TPU pod, SLURM or Open MPI. --batch_size is the total over all '
    'processes.',
    may_change=True,
  )
  process_id: int = knob(
    0,
    'Number of this process, from 0, with --num_processes.',
    may_change=True,
  )
  coordinator: str = knob(
    '',
    'HOST:PORT at which the other processes reach process 0, with '
    '--num_processes.',
    may_change=True,
  )
  dry_run: bool = knob(
    False,
    'After reading the data, only print how much disk, memory and devices '
    '--job=train will need, with the arithmetic.',
    may_change=True,
  )
  debug: bool = knob(False, 'Show the traceback of an error.', may_change=True)

  compilation_cache_dir: str | None = knob(
    None,
    "Folder in which XLA's compiled programs are kept for later runs; it may "
    'be deleted at any time. Empty: no cache. Not given: ance_jax/compiled in '
    "the user's cache folder ($XDG_CACHE_HOME, ~/.cache), or jax's own "
    'JAX_COMPILATION_CACHE_DIR if set. The cache does not affect results.',
    may_change=True,
  )

  tokens_dir: str = knob(
    '',
    'Folder of token rows, which are made once per text, tokenizer and length, '
    'and of the embeddings by --guide; runs with the same folder share them. '
    'Not given: tokens in --workdir.',
    may_change=True,
    section='Data',
  )
  beam_runner: str = knob(
    '',
    'With --job=prepare: Apache Beam runner that tokenizes the passages (extra '
    'beam): DirectRunner, FlinkRunner, SparkRunner, DataflowRunner. Its '
    'workers must reach --tokens_dir under the same path. Not given: the cores '
    'of this machine.',
    may_change=True,
  )
  beam_options: str = knob(
    '',
    "Options of --beam_runner, as on a command line: '--parallelism=64'.",
    may_change=True,
  )
  dataset: str = knob(
    'pydocs',
    'Dataset to read, from --data_dir except for pydocs. '
    f'{_listed({name: row.what for name, row in datasets.READERS.items()})}.',
    choices=datasets.READERS,
  )
  data_dir: str = knob(
    '',
    'Folder of the files of --dataset, named as at their source, plain or '
    'gzipped; for beir corpus.jsonl, queries.jsonl and qrels/; for pairs '
    'pairs.jsonl and optionally corpus.jsonl.',
    may_change=True,
  )
  download: bool = knob(
    False,
    'Download the files of --dataset=msmarco, msmarco_doc, dpr, or beir with '
    '--beir_set that are missing in --data_dir: up to gigabytes, from their '
    'source, verified by checksum.',
    may_change=True,
  )
  beir_set: str | None = knob(
    None,
    'BEIR set that is in --data_dir, or that --download fetches into it; '
    'scored by --protocol=beir unless another is given. A warning is printed '
    'if the number of passages differs from that set. Not given: any folder in '
    'BEIR format.',
    choices=registry.BEIR_PASSAGES,
    may_change=True,
  )
  questions: str | None = knob(
    None,
    'Question set of --dataset=dpr. Not given: the set whose files are in '
    '--data_dir.',
    choices=registry.QUESTIONS,
  )
  protocol: str | None = knob(
    None,
    'How dev and --split are scored, a row of the protocols in '
    'ance_jax/data/README.md; its first measure chooses checkpoints. Not '
    "given: the dataset's own, or beir with --beir_set.",
    choices=protocols.PROTOCOLS,
  )
  train_split: str = knob('train', 'Name of the judgements to train on.')
  dev_split: str = knob(
    'dev', 'Name of the judgements for choosing settings and checkpoints.'
  )
  dev_fraction: float = knob(
    0.1,
    'Fraction of the training queries, chosen by a hash of their ids, to hold '
    'out as dev if the data has no --dev_split. 0: training on such data has '
    'no dev, and the best checkpoint is the last.',
  )

  # None defers to --init_from.
  init_from: str = knob(
    '',
    'Weights to start from: a run of ance_jax; a folder, or a name on the hub '
    'as OWNER/NAME or OWNER/NAME@REVISION, of a BERT, RoBERTa, DistilBERT or '
    'MPNet model, of ANCE, DPR or sentence-transformers; a file of weights '
    'with config.json and tokenizer in the same folder; or two of these for '
    'queries and passages, separated by a comma. A run keeps the commit that '
    'it started from. Empty: random weights and a vocabulary trained on the '
    'corpus.',
    section='Encoder',
  )
  vocab_size: int = knob(8192, 'Size of the vocabulary, without --init_from.')
  num_layers: int = knob(
    12, 'Number of transformer layers, without --init_from.'
  )
  hidden_size: int = knob(768, 'Width of the encoder, without --init_from.')
  num_heads: int = knob(12, 'Number of attention heads, without --init_from.')
  intermediate_size: int = knob(
    3072, 'Width of the feed-forward layers, without --init_from.'
  )
  tie_encoders: bool | None = knob(
    None,
    'Use one encoder for queries and passages. ANCE: true on MS MARCO, false '
    "on NQ and TriviaQA; DPR: false. Not given: the checkpoint's own, else "
    'true.',
  )
  pooling: str | None = knob(
    None,
    f'How token vectors are pooled. {_listed(choices.POOLINGS)}. Not given: '
    "the checkpoint's own, else cls (ANCE and DPR).",
    choices=choices.POOLINGS,
  )
  similarity: str | None = knob(
    None,
    "Similarity that scores a query and a passage. Not given: the checkpoint's "
    'own, else dot (ANCE and DPR).',
    choices=choices.SIMILARITIES,
  )
  head_size: int | None = knob(
    None,
    'Width of a linear projection after the pooling; 0: no projection. ANCE: '
    "768; DPR: none. Not given: the checkpoint's own, else none.",
  )
  head_norm: bool | None = knob(
    None,
    'Whether a LayerNorm follows the projection of --head_size. ANCE: true; '
    "DPR: false. Not given: the checkpoint's own, else true.",
  )
  query_length: int | None = knob(
    None,
    'Maximum number of tokens of a query. ANCE: 64. Not given: the '
    "checkpoint's own, else 64.",
  )
  passage_length: int | None = knob(
    None,
    'Maximum number of tokens of a passage. ANCE: 512. Not given: the '
    "checkpoint's own, else 512.",
  )
  chunks: int = knob(
    1,
    'Maximum number of pieces of --passage_length tokens per passage; a '
    'passage scores as its best piece (MaxP). 1: only the first piece '
    '(FirstP). ANCE on documents: 4.',
  )
  whole_chunks: bool = knob(
    False,
    'With --chunks, tokenize each passage once before cutting it, so that only '
    "the first piece starts with a special token, as in ANCE's code. Otherwise "
    'every piece has its own.',
  )
  title_separator: str | None = knob(
    None,
    'Separator between the title and the text of a passage: a space, or the '
    "tokenizer's separator token. DPR, and ANCE on MS MARCO documents: token. "
    "Not given: the checkpoint's own, else space.",
    choices=('space', 'token'),
  )
  query_prompt: str | None = knob(
    None,
    "Prefix of each query, such as 'query: ' for E5. Not given: the "
    "checkpoint's own, else none.",
  )
  passage_prompt: str | None = knob(
    None,
    "Prefix of each passage, such as 'passage: ' for E5. Not given: the "
    "checkpoint's own, else none.",
  )
  lower_case: bool | None = knob(
    None,
    'Lower-case and strip all texts before tokenizing them. ANCE: true, with a '
    "RoBERTa. Not given: as the checkpoint's tokenizer does.",
  )
  prefix_space: bool | None = knob(
    None,
    'Put a space before each text, so that its first word is tokenized like '
    "the others; only for byte-level tokenizers such as RoBERTa's. ANCE: "
    "false; STAR: true. Not given: as the checkpoint's tokenizer does.",
  )
  dropout_rate: float = knob(
    0.1,
    'Dropout rate in training, for activations and, without '
    '--attention_dropout_rate, attention. BERT: 0.1.',
  )
  attention_dropout_rate: float | None = knob(
    None,
    'Dropout rate of attention weights in training. At 0 attention stores no '
    'weights on a GPU with --dtype=bfloat16. Not given: --dropout_rate, or 0 '
    'if the config of --init_from trains without.',
  )
  dtype: str = knob(
    'float32',
    'Compute type of the encoder; parameters and scores are float32.',
    choices=('float32', 'bfloat16'),
  )

  method: str = knob(
    'ance',
    'Row of the method table (README), which sets the source of negatives and '
    'the loss.',
    choices=methods.METHODS,
    section='Method',
  )
  warmup_method: str = knob(
    'bm25',
    'Row whose negatives and loss are used in the first --warmup_steps. ANCE: '
    'bm25.',
    choices=methods.of_warm_up,
  )
  warmup_steps: int = knob(
    0,
    'Steps on --warmup_method before the first refresh; only for rows that '
    'mine from the index. ANCE: 60,000, in a separate run.',
  )
  num_hard_negatives: int = knob(
    1,
    'Hard negatives per query and step, drawn from its --top_k; with '
    '--method=ance_code, the number that a refresh draws per query, to be used '
    'one by one. ANCE: 1; its code: 20.',
  )
  top_k: int = knob(
    200,
    'Passages to mine per query, best first, without positives and their '
    'duplicates. ANCE: 200.',
  )
  negatives_per_source: int = knob(
    0,
    'Negatives that a refresh draws from the --top_k of each source, for rows '
    'with several sources. 0: all. In ANCE-Tele 30 of 200, on NQ 80.',
  )
  draw: str = knob(
    'uniform',
    'How a step draws hard negatives for a query: '
    f'{_listed(methods.DRAWS)}. All but uniform and top need scores: bins by a '
    'teacher, the others by the weights that mined the negatives. Applies to '
    '--method, not to its warm-up.',
    choices=methods.DRAWS,
  )
  simans_a: float = knob(
    0.5, 'a of --draw=simans. SimANS: 0.5, and 3 with simans_abs.'
  )
  simans_b: float = knob(
    0.0,
    "b of --draw=simans, the place of its peak above the positive's score. "
    'SimANS: 0 on TriviaQA; its code, with the sign turned: -1 on NQ.',
  )
  mask_above: float | None = knob(
    None,
    'Leave a column out of the loss if it scores above the positive by more '
    'than this, as a likely false negative. Qwen3 Embedding: 0.1, on cosines.',
  )
  topics: int = knob(
    0,
    'Clusters of the training queries, by the first weights; the queries of a '
    'step are of one, drawn at random. 0: none. TAS-Balanced: 2,000.',
  )
  hardness_weight: float = knob(
    0.0,
    "Adds this share of a negative's score, without gradient, to its score "
    'over the temperature. EmbeddingGemma: 5, on cosines.',
  )
  hardness_columns: str = knob(
    'hard',
    'Negatives that --hardness_weight is for: the hard ones of the query, or '
    'all, in-batch ones too.',
    choices=('hard', 'all'),
  )
  symmetric_columns: bool = knob(
    False,
    'Take as columns, too, the other queries of the batch, for the query and '
    'for its positive, and the other positives, for its positive; only for '
    'rows with in-batch negatives. GTE.',
  )
  matryoshka_widths: str = knob(
    '',
    'Widths, such as 64,128,256: the loss is averaged over the full embeddings '
    'and their first 64, 128 and 256 entries (Kusupati et al. 2022).',
  )
  drop_same_text: bool = knob(
    True,
    'Never use a passage with the text of a positive as a negative, in mining '
    'or in the batch; --method=ance_code has its own rule.',
  )
  drop_answers: bool | None = knob(
    None,
    'Never mine a passage that holds an answer as a negative; the next ones '
    'take its place. Not given: true if the data has answers. DPR, ANCE on NQ: '
    'true.',
  )
  temperature: float = knob(
    1.0,
    'Divisor of scores in the loss. ANCE and DPR: 1; with cosine, 0.05 is '
    'common.',
  )
  teacher_temperature: float = knob(
    1.0,
    "Divisor of the teacher's scores in the loss, for rows with a teacher: "
    '--cross_encoder, whose output counts without a sigmoid, or --score_run, '
    'or scores that come with the given negatives.',
  )
  guide: str = knob(
    '',
    'Fixed bi-encoder, a folder, run or name on the hub as for --init_from, '
    "that encodes the training queries and the corpus once; or 'refresh', the "
    "run's own weights of the active refresh. The teacher of --method=guided "
    'and ance_guided, and for other rows what --guide_margin needs.',
  )
  guide_margin: float | None = knob(
    None,
    'Leave a column out of the loss if --guide scores it above the positive '
    'less this, as a likely false negative. GISTEmbed: 0.',
  )
  also_weight: float = knob(
    0.0,
    "Share of the row's second loss, which --method=distill has: the negative "
    'log-likelihood of the positive. SimLM: 1/6.',
  )
  steps_per_refresh: int = knob(
    10_000,
    'Optimizer steps between refreshes. ANCE: 10,000 on MS MARCO, 1,000 on NQ.',
  )
  query_slices: int = knob(
    1,
    'Number of slices of the training queries; each refresh mines the next '
    'slice, which is then trained on; only for rows that mine from the index. '
    'ANCE: 1; its code: 5 (--ann_chunk_factor).',
  )
  restart_from: str = knob(
    'first',
    'Weights from which a row that begins again with each refresh does so, '
    'such as ance_tele: the first of the run, or those after --warmup_steps.',
    choices=('first', 'warmup'),
  )
  max_refreshes: int = knob(
    0,
    'Maximum number of refreshes, including the first; 0: no limit. 1 freezes '
    'the negatives.',
  )
  refresh_schedule: str = knob(
    '',
    'Steps between refreshes by interval of steps, instead of '
    '--steps_per_refresh: 0-2000:500,2000-:5000 refreshes every 500 steps up '
    'to step 2,000 and every 5,000 from then on. The first refresh is at '
    '--warmup_steps.',
  )
  refresh_trigger: float = knob(
    0.0,
    'Refresh only if the current weights rank less than this share of the '
    'active negatives in the first 100 of a sample of training queries. Each '
    'scheduled step without a refresh still costs an encoding of the corpus. '
    '0: refresh at every scheduled step, as in ANCE.',
  )
  warmup_until_plateau: int = knob(
    0,
    'Consecutive evaluations on dev, --steps_per_eval apart, without a new '
    'best first measure, after which the first refresh is at the next '
    'evaluation, and at --warmup_steps at the latest. 0: it is at '
    '--warmup_steps. ANCE: 0.',
  )
  refresh_mode: str = knob(
    'sync',
    'How negatives are refreshed. sync: training waits for refreshes; async: '
    'in the background, in this process (one process only); external: in the '
    'background, in another process with --job=refresh --watch and the same '
    '--workdir, on this machine or another, as in ANCE; delayed: as sync, but '
    'active --refresh_delay steps later, to study staleness.',
    choices=('sync', 'async', 'external', 'delayed'),
    may_change=True,
  )
  refresh_delay: int = knob(
    0,
    'Steps from the weights that mined negatives to the first step trained on '
    'them, with --refresh_mode=delayed.',
  )
  refresh_devices: int = knob(
    0,
    'Local accelerators that refresh in the background with '
    '--refresh_mode=async, numbered after those that train; 0: the same ones.',
    may_change=True,
  )
  max_staleness: int = knob(
    0,
    'Maximum age in steps of the weights that mined the active negatives, with '
    '--refresh_mode=async or external; training waits when it is reached. 0: '
    'training never waits.',
    may_change=True,
  )
  refresh_replay: str = knob(
    '',
    'Folder of a run whose refreshes to use, each from the same step as in '
    'that run, instead of mining.',
    may_change=True,
  )
  watch: bool = knob(
    False,
    'Keep refreshing with newer checkpoints until training ends, with '
    '--job=refresh.',
    may_change=True,
  )

  batch_size: int = knob(
    64,
    'Queries per step over all devices, or triplets with --method=ance_code. '
    'ANCE: 64 on MS MARCO, 128 on NQ.',
    section='Optimizer',
  )
  micro_batch_size: int = knob(
    0,
    'Splits what a device computes into as many parts as if each had so many '
    "queries, with their passages; it must divide the device's part of "
    '--batch_size. Activations of one part are in memory at a time. The '
    'gradient still covers the whole batch; texts are encoded twice for this '
    '(gradient caching). 0: all at once. ANCE: 8.',
    may_change=True,
  )
  remat: bool = knob(
    False,
    'Recompute each layer in the backward pass instead of keeping its '
    'activations, which saves memory for a third more work. ANCE: false.',
    may_change=True,
  )
  max_steps: int = knob(
    1_000_000,
    'Optimizer steps of the whole run. If a resumed run changes it, the '
    'learning rate falls to 0 at the new end.',
    may_change=True,
  )
  optimizer: str = knob(
    'lamb',
    f'Optimizer. {_listed(methods.OPTIMIZERS)}.',
    choices=methods.OPTIMIZERS,
  )
  learning_rate: float = knob(
    1e-6, 'Peak learning rate. ANCE: 1e-6 (LAMB); DPR: 2e-5 (AdamW).'
  )
  trainable: str = knob(
    '',
    'Regular expression that a parameter must match somewhere in its path, '
    "such as 'body/layer_[45]|head', to be trained; others get no update and "
    'no moments. Not given: all.',
  )
  rate_steps: int = knob(
    0,
    'Steps after which the learning rate is 0. 0: --max_steps. For rows that '
    'begin again, counted from there. ANCE-Tele: its last episode in steps.',
  )
  lr_warmup_steps: int = knob(
    5000,
    'Steps in which the learning rate rises from 0, before it falls linearly '
    'to 0 at --max_steps; refreshes restart it only for rows that begin again. '
    'ANCE: 5,000.',
  )
  weight_decay: float = knob(
    0.0, 'Weight decay, except on biases and LayerNorm. ANCE and DPR: 0.'
  )
  adam_epsilon: float = knob(
    1e-8, 'Constant added to the root of the second moment. ANCE and DPR: 1e-8.'
  )
  clip_norm: float = knob(
    1.0,
    'Maximum norm of the gradient of the whole batch; 0: no clipping. ANCE: 1; '
    'DPR: 2 on a gradient divided by its 8 devices, 16 here.',
  )

  tokens_per_batch: int = knob(
    65_536,
    'Tokens per batch of the encoding pass over all devices, including '
    'padding. 4,096 is fast on CPUs.',
    may_change=True,
    section='Encoding, index, evaluation',
  )
  rows_per_block: int = knob(
    65_536, 'Passages per block, the unit of encoding and indexing.'
  )
  index: str = knob(
    'Flat',
    'FAISS factory string; Flat is exact search on the host, as in ANCE. '
    'device is exact search on the devices.',
  )
  search_memory_mb: int = knob(
    4096,
    'MiB that --index=device may use on each device: half for embeddings and '
    'half for scores. If the embeddings are larger, they are copied from the '
    'host in blocks for every 1,024 queries at most. On CPUs this is memory of '
    'the host. ANCE: FAISS on GPUs, no bound.',
    may_change=True,
  )
  index_params: str = knob(
    '', 'FAISS search parameters of the index, for example nprobe=32.'
  )
  center_passages: bool = knob(
    False,
    'Subtract the mean passage from each passage in the index. This lowers all '
    'scores of a query by the same number and keeps their order, and an '
    '--index of 16 bits (SQbf16, SQfp16) loses less precision if embeddings '
    'are alike, as in ANCE. ANCE: false.',
  )
  steps_per_eval: int | None = knob(
    None,
    'Steps between evaluations on dev, including step 0. Not given: only at '
    'refreshes. The end of the run is always evaluated.',
    may_change=True,
  )
  retriever: str = knob(
    'model',
    'Retriever for --job=evaluate, --job=search and --job=mine.',
    choices=('model', 'bm25'),
    may_change=True,
  )
  split: str = knob(
    'dev',
    'Split that --job=evaluate and --job=compare score. Choose on dev, read '
    'test once.',
    may_change=True,
  )
  output: str = knob(
    '',
    'Output path of a job. export: a folder; not given: export-<step> in '
    '--workdir. mine: a file, with its report in the same folder; not given: '
    'hard_negatives.FORMAT in --workdir.',
    may_change=True,
  )
  overwrite: bool = knob(
    False,
    'Replace an existing --output, which is an error otherwise.',
    may_change=True,
  )
  export_corpus: bool = knob(
    False,
    'With --job=export: also write the embeddings of the corpus, its ids, and '
    'a FAISS index of type --index, or Flat for --index=device.',
    may_change=True,
  )
  checkpoint: str = knob(
    'last',
    'Checkpoint to read, of the run or of --init_from: last, best (by dev '
    'MRR@10) or a step.',
    may_change=True,
  )
  negatives: str = knob(
    '',
    'File of negatives of the training queries, for --method=given and '
    '--job=audit: JSON lines or an array, optionally gzipped, in the formats '
    'of --job=mine, sentence-transformers, FlagEmbedding, Tevatron or DPR. '
    'Empty: the negatives in pairs.jsonl.',
  )
  bm25_run: str = knob(
    '',
    "TREC run file of the training queries to use as BM25's ranking, such as "
    '--job=evaluate --retriever=bm25 --split=train or Anserini writes. Empty: '
    'the ranking in the data, or else bm25s ranks.',
  )
  bm25_language: str = knob(
    'auto',
    'How BM25 splits texts into words. english: stemmed, without stop words; '
    'another language of Snowball: stemmed, without stop words if bm25s has a '
    'list; none: lower-cased words; bigrams: lower-cased words, but every two '
    'neighbouring letters of Chinese, Japanese, Korean, Thai and other scripts '
    'without spaces, as in Lucene. auto: english, none or bigrams, chosen from '
    'a sample of the corpus and printed.',
    choices=words.LANGUAGES,
  )
  bm25_k1: float = knob(0.9, 'BM25 term saturation. Anserini: 0.9.')
  bm25_b: float = knob(0.4, 'BM25 length normalisation. Anserini: 0.4.')

  ranking: str = knob(
    '',
    'TREC run file of the training queries from which --job=mine takes '
    'negatives and their scores. Empty: --retriever ranks.',
    may_change=True,
    section='Hard negatives',
  )
  num_negatives: int = knob(
    4,
    'Negatives per query that --job=mine writes. NV-Retriever: 4.',
    may_change=True,
  )
  skip_ranks: int = knob(
    0,
    'Number of top ranks that mining skips, in a refresh and with --job=mine; '
    "ranks do not count positives, passages with a positive's text, the query "
    'itself or passages that hold an answer. NV-Retriever: Top-k shifted by N. '
    'sentence-transformers: range_min.',
  )
  max_rank: int | None = knob(
    None,
    'Last rank from which mining takes a candidate, before the filters by '
    'score. Not given: 100 with --job=mine; in training, --top_k after '
    '--skip_ranks. sentence-transformers: range_max.',
  )
  max_score: float | None = knob(
    None,
    'Highest score of a mined negative. NV-Retriever: TopK-Abs. In training, '
    'this and all other score rules apply to negatives of --method, not of its '
    'warm-up.',
  )
  min_score: float | None = knob(None, 'Lowest score of a mined negative.')
  absolute_margin: float | None = knob(
    None,
    'Mined negatives must score below p - margin, where p is the lowest score '
    "of the query's positives. NV-Retriever, TopK-MarginPos: 0.05.",
  )
  relative_margin: float | None = knob(
    None,
    'Mined negatives must score below p - margin * |p|, which is p * (1 - '
    "margin) for p above 0, where p is the lowest score of the query's "
    'positives. NV-Retriever, TopK-PercPos at 95 %: 0.05. Few candidates pass '
    "if all scores are alike, as ANCE's dot products are: see --center_scores.",
  )
  z_margin: float | None = knob(
    None,
    'Mined negatives must score below p - margin * the standard deviation of '
    "the query's scores, over the first --top_k candidates, or --max_rank with "
    '--job=mine.',
  )
  center_scores: bool = knob(
    False,
    "Subtract the query's mean score, over the same candidates as --z_margin, "
    'before --relative_margin, so that negatives must score below p - margin * '
    '|p - mean|.',
  )
  cross_encoder: str = knob(
    '',
    'Cross-encoder for --rerank_max_score, which scores the candidates that '
    'pass all other filters of mining: a folder or name on the hub of a BERT, '
    'RoBERTa, DistilBERT or MPNet for sequence classification with one output, '
    "as sentence-transformers' CrossEncoder saves it. It scores as predict "
    'does there: the sigmoid of the output, or the output itself if the '
    'folder names Identity as activation.',
  )
  score_run: str = knob(
    '',
    'TREC run file of the training queries whose scores --rerank_max_score '
    'uses instead of --cross_encoder.',
  )
  rerank_max_score: float | None = knob(
    None,
    'Highest score of a mined negative by --cross_encoder or --score_run; '
    'candidates without a score are rejected. RocketQA: 0.1.',
  )
  positive_min_score: float | None = knob(
    None,
    'Passages that --score_run scores at least this high become positives of '
    'training queries, like relabelled candidates in RLHN. Not given: none.',
  )
  choose: str = knob(
    'top',
    'Which of the candidates that pass the filters to store, --num_negatives '
    'of them or --top_k in training: the best, or a uniform draw by --seed.',
    choices=('top', 'random'),
  )
  on_shortage: str | None = knob(
    None,
    'What mining does for a query with fewer negatives than it stores: keep '
    'them, drop the query, or fill up with random passages of the corpus other '
    'than those that a filter rejected. A query without negatives is left out, '
    'and so is any with fewer for --format=n_tuples. Not given: fill in '
    'training, keep with --job=mine.',
    choices=('keep', 'drop', 'fill'),
  )
  format: str = knob(
    'triplets',
    'Output format of --job=mine. '
    f'{_listed({name: row.what for name, row in forms.FORMS.items()})}.',
    choices=forms.FORMS,
    may_change=True,
  )

  steps_per_checkpoint: int | None = knob(
    None,
    'Steps between checkpoints, in addition to those at refreshes. Not given: '
    '--steps_per_refresh.',
    may_change=True,
    section='Saving and showing',
  )
  checkpoints_to_keep: int = knob(
    3,
    'Newest checkpoints to keep, in addition to the best on dev.',
    may_change=True,
  )
  steps_per_log: int = knob(
    10,
    'Steps between records of training metrics; without bars, they are also '
    'printed.',
    may_change=True,
  )
  progress_bars: bool = knob(
    True,
    'Show bars on a terminal. Without a terminal, with --noprogress_bars, or '
    'with TQDM_DISABLE=1 in the environment, print lines instead: every '
    '--steps_per_log steps of training, every 20 seconds of other long phases.',
    may_change=True,
  )
  query: str = knob(
    '',
    'Query of --job=search. Empty: read queries from the terminal.',
    may_change=True,
  )
  port: int | None = knob(
    None,
    'With --job=search: port of a web page that only this machine can open; 0 '
    'takes a free port. Not given: search in the terminal.',
    may_change=True,
  )
  num_results: int = knob(
    5, 'Passages per query that --job=search shows.', may_change=True
  )
  runs: str = knob(
    '',
    'Folders of the runs that --job=report draws into one picture, separated '
    'by commas. Empty: --workdir. With --job=compare: folders that '
    '--job=evaluate scored, or TREC run files; all are compared with the '
    'first.',
    may_change=True,
  )
  picture: str = knob(
    '',
    'PNG file that --job=report writes. Empty: curves.png in the first of '
    '--runs.',
    may_change=True,
  )

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, os.PathLike):
        value = os.fspath(value)
        object.__setattr__(self, field.name, value)
      config_checks.check(field, value)
    config_checks.check_together(self)

  @classmethod
  def from_lines(cls, lines: list[str], where: str) -> 'Config':
    """Parses the lines that `to_flagfile` writes.

    Args:
      lines: Lines --name=value, also with flag names of older releases.
      where: Origin of the lines, for messages.

    Raises:
      BadInput: A line has another form or an invalid value.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values, place = {}, f'{where}: '
    for line in of_a_run(lines):
      if line is None:
        continue
      name, equals, text = line.partition('=')
      if not (name.startswith('--') and equals):
        refuse_left_over([line], place)
      name = name.removeprefix('--')
      if name not in fields:
        raise unknown_flag(name, place)
      values[name] = config_checks.parse(fields[name], text, place)
      config_checks.check(fields[name], values[name], place)
    return cls(**values)

  def to_flagfile(self) -> str:
    """Returns the text of a flagfile with these settings.

    It includes defaults, which may change between releases, and leaves out the
    flags in `LAUNCH`.
    """
    lines = []
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is not None and field.name not in LAUNCH:
        lines.append(f'--{field.name}={config_checks.as_text(value)}\n')
    return ''.join(lines)


# Renamed flags: {name in older releases: name}. A run's own flagfile may use
# old names; on a command line they raise an error that has the new name.
RENAMED = {
  'hard_negatives': 'num_hard_negatives',
  'refresh': 'refresh_mode',
  'mine_from': 'skip_ranks',
  'mine_to': 'max_rank',
  'judge': 'cross_encoder',
  'judge_run': 'score_run',
  'judge_max_score': 'rerank_max_score',
  'sampling': 'choose',
  'too_few': 'on_shortage',
}
# Fields that differ between the processes of a run, and are not its settings.
LAUNCH = ('num_processes', 'process_id', 'coordinator')
# Fields that decide which passages become negatives. A run keeps its own; other
# jobs use only those on their command line, never the run's.
MINING_RULES = (
  'skip_ranks',
  'max_rank',
  'max_score',
  'min_score',
  'absolute_margin',
  'relative_margin',
  'z_margin',
  'center_scores',
  'cross_encoder',
  'score_run',
  'rerank_max_score',
  'positive_min_score',
  'choose',
  'on_shortage',
)
# Fields that a job which only reads a run may set differently from the run.
OF_READING = (
  'index',
  'index_params',
  'center_passages',
  'dtype',
  'rows_per_block',
  'chunks',
  'whole_chunks',
  'drop_same_text',
  'drop_answers',
  'seed',
  *MINING_RULES,
)
# Fields, with the jobs that read them or, after 'not', that do not; all jobs
# read the other fields. A test runs the jobs and fails if one reads more.
_READ_BY = (
  (
    'init_from dataset data_dir download beir_set questions protocol '
    'train_split dev_split dev_fraction',
    'not report',
  ),
  (
    'num_devices tokens_dir tie_encoders pooling similarity head_size '
    'head_norm query_length passage_length chunks whole_chunks title_separator '
    'query_prompt passage_prompt lower_case prefix_space dtype '
    'tokens_per_batch refresh_mode',
    'not report compare',
  ),
  ('seed', 'not report export'),
  ('compilation_cache_dir rows_per_block', 'not report compare prepare'),
  (
    'index search_memory_mb index_params',
    'not report compare prepare encode',
  ),
  ('center_passages', 'not report compare prepare encode inspect'),
  ('checkpoint', 'not prepare'),
  (
    'vocab_size num_layers hidden_size num_heads intermediate_size',
    'train prepare inspect',
  ),
  (
    'warmup_method warmup_steps top_k num_hard_negatives steps_per_refresh '
    'query_slices max_refreshes '
    'refresh_schedule warmup_until_plateau max_steps',
    'train refresh inspect',
  ),
  ('method', 'train refresh inspect export'),
  ('temperature', 'train refresh inspect'),
  ('draw simans_a simans_b topics', 'train inspect'),
  ('negatives_per_source refresh_trigger', 'train refresh'),
  ('positive_min_score', 'train refresh inspect'),
  ('drop_same_text drop_answers', 'train refresh inspect mine'),
  ('negatives', 'train refresh inspect mine audit prepare'),
  ('bm25_run', 'train refresh inspect'),
  ('guide', 'train inspect'),
  (
    'bm25_language bm25_k1 bm25_b',
    'train refresh inspect mine evaluate search',
  ),
  (
    'batch_size steps_per_eval steps_per_checkpoint checkpoints_to_keep',
    'train inspect',
  ),
  (
    'mask_above hardness_weight hardness_columns symmetric_columns '
    'matryoshka_widths guide_margin teacher_temperature also_weight '
    'num_processes process_id coordinator dry_run dropout_rate '
    'attention_dropout_rate '
    'refresh_delay refresh_devices '
    'restart_from max_staleness refresh_replay micro_batch_size remat '
    'optimizer trainable learning_rate rate_steps lr_warmup_steps weight_decay '
    'adam_epsilon clip_norm steps_per_log',
    'train',
  ),
  ('watch', 'refresh'),
  ('beam_runner beam_options', 'prepare'),
  ('split', 'evaluate compare'),
  ('retriever', 'evaluate search mine'),
  ('output overwrite', 'mine export'),
  ('export_corpus', 'export'),
  (
    'skip_ranks max_rank max_score min_score absolute_margin relative_margin '
    'z_margin center_scores cross_encoder score_run rerank_max_score choose '
    'on_shortage',
    'train refresh inspect mine',
  ),
  (
    'ranking num_negatives format',
    'mine',
  ),
  ('query port num_results', 'search'),
  ('runs', 'report compare'),
  ('picture', 'report'),
)


# Fields, a test of the settings and the row of --method under which nothing
# reads them, and why; {c.NAME} is the value of a field.
_UNREAD = (
  (
    'warmup_method warmup_steps max_refreshes',
    lambda _, row: not row.refreshes,
    'on --method={c.method}, which does not mine from the index',
  ),
  (
    'max_refreshes',
    lambda _, row: row.once,
    'on --method={c.method}, which refreshes once',
  ),
  (
    'restart_from',
    lambda _, row: not row.restarts,
    'on --method={c.method}, which does not begin again',
  ),
  (
    'teacher_temperature',
    lambda _, row: not row.teacher,
    'on --method={c.method}, which has no teacher',
  ),
  (
    'negatives_per_source',
    lambda _, row: len(row.sources) < 2,
    'on --method={c.method}, whose negatives have one source',
  ),
  (
    'hardness_columns',
    lambda config, _: not config.hardness_weight,
    'without --hardness_weight',
  ),
  (
    'simans_a simans_b',
    lambda config, _: not config.draw.startswith('simans'),
    'with --draw={c.draw}',
  ),
  (
    'warmup_method',
    lambda config, _: not config.warmup_steps,
    'without --warmup_steps',
  ),
  ('whole_chunks', lambda config, _: config.chunks == 1, 'without --chunks'),
)


def refuse_left_over(arguments: list[str], place: str = '') -> None:
  """Raises `BadInput` if any arguments are left over after parsing flags.

  Args:
    arguments: Arguments that are not flags.
    place: File and line of the arguments, to start the message with.
  """
  if arguments:
    raise errors.refusal(
      f'{arguments[0][:80]!r} is not a flag',
      'write --name=value with two dashes, without spaces, and without a '
      'comment after it',
      place,
    )


def unknown_flag(name: str, place: str = '') -> errors.BadInput:
  """Returns the error for an unknown flag; `place` starts its message."""
  old = f'--{name}'.partition(' ')[0]
  if old != (new := renamed(old)):
    return errors.refusal(f'{old} is now {new}', 'write that', place)
  names = [field.name for field in dataclasses.fields(Config)]
  similar = difflib.get_close_matches(name.split('=')[0], names, 1)
  cure = f'write --{similar[0]}=value' if similar else 'see --help'
  return errors.refusal(f'there is no flag --{name[:80]}', cure, place)


def renamed(argument: str) -> str:
  """Returns --name, --noname or --name=value with the flag's current name."""
  found = re.fullmatch(r'(--?)(no)?(\w+)(=.*)?', argument, re.DOTALL)
  if not found:
    return argument
  dashes, no, name, value = found.groups(default='')
  if no + name in RENAMED:
    no, name = '', no + name
  return f'{dashes}{no}{RENAMED.get(name, name)}{value}'


def of_a_run(lines: list[str]) -> list[str | None]:
  """Returns a run's flags, lines of --name=value, with their current names.

  If the file has old names of mining rules, all its mining rules become None,
  because in that release they applied to --job=mine and not to the run.
  """
  now = [renamed(line) for line in lines]
  names = [line.partition('=')[0].removeprefix('--') for line in now]
  is_old = any(
    old != new and name in MINING_RULES
    for old, new, name in zip(lines, now, names, strict=True)
  )
  return [
    None if is_old and name in MINING_RULES else line
    for line, name in zip(now, names, strict=True)
  ]


def readers(name: str) -> tuple[str, ...]:
  """Returns the jobs that read a field, in the order of `JOBS`."""
  rows = (jobs for names, jobs in _READ_BY if name in names.split())
  named = next(rows, 'not').split()
  return tuple(job for job in JOBS if (job in named) != ('not' in named))


def why_unread(config: Config, name: str) -> str | None:
  """Returns why a field is not read under these settings; None if it is."""
  if config.job not in readers(name):
    return f'on --job={config.job}'
  row = methods.METHODS[config.method]
  for names, is_unread, why in _UNREAD:
    if name in names.split() and is_unread(config, row):
      return why.format(c=config)
  return None


def differences(
  before: Config, after: Config, *, may_change: bool
) -> Iterator[tuple[str, Any, Any]]:
  """Yields (name, old, new) of each field that differs.

  Args:
    before: Settings with which a run started or was last saved.
    after: Settings with which to resume it.
    may_change: Whether to compare the fields that may change, or the others.
  """
  for field in dataclasses.fields(Config):
    old, new = getattr(before, field.name), getattr(after, field.name)
    if old != new and field.metadata['may_change'] == may_change:
      yield field.name, old, new
