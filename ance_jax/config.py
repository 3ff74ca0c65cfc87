"""Every knob of a run, once: name, type, default, unit, meaning.

The fields of `Config` become absl flags (flags.py); code below `main` is given
a `Config` and never reads a flag. The defaults are those of the paper's MS
MARCO passage run (Xiong et al. 2020, appendix A.1) where it has the knob;
`experiments/` holds the flagfiles of other runs.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
import unicodedata

from ance_jax import errors
from ance_jax.data import datasets
from ance_jax.data import registry
from ance_jax.jobs import forms
from ance_jax.models import choices
from ance_jax.retrieval import protocols
from ance_jax.retrieval import words
from ance_jax.training import methods

# The file in its folder that repeats a run.
FLAGS_FILE = 'run.flags'
# The value of --index that is no FAISS index.
ON_DEVICES = 'device'
# What there is to do, each a module of jobs.
JOBS = {
  'train': 'train a retriever',
  'prepare': 'only read and tokenize the data',
  'export': 'write a checkpoint as sentence-transformers reads it',
  'inspect': 'report on the dataset',
  'audit': 'look for false negatives in what a checkpoint ranks high',
  'mine': 'write filtered hard negatives for other trainers',
  'refresh': 'mine negatives once with a checkpoint',
  'encode': 'write the embeddings of the corpus',
  'evaluate': 'score a split',
  'compare': 'whether runs differ there by more than chance',
  'search': 'type queries, see passages',
  'report': 'draw the curves',
}


def _listed(rows):
  """Returns {name: what it is} as one text."""
  return '; '.join(f'{name}: {what}' for name, what in rows.items())


def knob(default, help, *, choices=None, may_change=False, section=None):
  """Returns the field of one flag.

  Args:
    default: Value when the flag is not given. None means "not given".
    help: Meaning, unit and the paper's value, for `--help`.
    choices: The values allowed, or a function that returns them; None if any
      of the type is.
    may_change: Whether a run may go on with another value than it began with.
    section: Heading of `--help` that this field and the next ones are under.
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


def values_of(field: dataclasses.Field) -> tuple[str, ...]:
  """Returns the values that a field may have, () if any of its type."""
  found = field.metadata['choices']
  return tuple(found() if callable(found) else found or ())


@dataclasses.dataclass(frozen=True)
class Config:
  """The settings of one job; see `--help` for the meaning of each field."""

  job: str = knob(
    'train',
    f'What to do. {_listed(JOBS)}.',
    choices=JOBS,
    may_change=True,
    section='The job',
  )
  workdir: str = knob(
    '', 'Folder of the run: all that it writes.', may_change=True
  )
  remote_dir: str = knob(
    '',
    'Folder elsewhere, such as gs://BUCKET/RUN, that checkpoints, refreshes '
    'and what is drawn of a run are copied to and taken from: for a refresher '
    'on another machine, with a --workdir of its own, or a start on a fresh '
    'one. gs:// wants gcsfs, s3:// s3fs. Not given: there is none.',
    may_change=True,
  )
  seed: int = knob(0, 'Seed of weights, batches, dropout and mining.')
  num_devices: int = knob(
    0, 'Local accelerators to use; 0 uses all.', may_change=True
  )
  num_processes: int = knob(
    1,
    'Processes that train together, with the same flags but --process_id, and '
    'with one --workdir that all of them see; 0: as a TPU pod, SLURM or Open '
    'MPI says. --batch_size is that of all.',
    may_change=True,
  )
  process_id: int = knob(
    0,
    'Number of this process, from 0 on, with --num_processes.',
    may_change=True,
  )
  coordinator: str = knob(
    '',
    'HOST:PORT of process 0 that the others reach it under, with '
    '--num_processes.',
    may_change=True,
  )
  dry_run: bool = knob(
    False,
    'Only print what --job=train will need of disk, memory and devices, with '
    'the arithmetic, once the data is read.',
    may_change=True,
  )
  debug: bool = knob(
    False, 'Show where an error comes from: its traceback.', may_change=True
  )

  compilation_cache_dir: str | None = knob(
    None,
    'Folder that what XLA compiles is kept in for the next start; it may be '
    'deleted at any time. Empty: nothing is kept. Not given: ance_jax/compiled '
    "in the user's cache folder ($XDG_CACHE_HOME, ~/.cache), or what jax's own "
    'JAX_COMPILATION_CACHE_DIR says. No bit depends on it.',
    may_change=True,
  )

  tokens_dir: str = knob(
    '',
    'Folder of token rows, made once per text, tokenizer and length: runs that '
    'name the same one share them. Not given: tokens in --workdir.',
    may_change=True,
    section='Data',
  )
  beam_runner: str = knob(
    '',
    'With --job=prepare: the runner of Apache Beam that passages are tokenized '
    'on (extra beam): DirectRunner, FlinkRunner, SparkRunner, DataflowRunner; '
    'its workers must see --tokens_dir under the same path. Not given: the '
    'cores of this machine.',
    may_change=True,
  )
  beam_options: str = knob(
    '',
    "Options of --beam_runner, as on a command line: '--parallelism=64'.",
    may_change=True,
  )
  dataset: str = knob(
    'pydocs',
    'What is read, all but pydocs from --data_dir. '
    f'{_listed({name: row.what for name, row in datasets.READERS.items()})}.',
    choices=datasets.READERS,
  )
  data_dir: str = knob(
    '',
    'Folder of the files of --dataset as their source names them, plain or '
    'gzipped; for beir corpus.jsonl, queries.jsonl and qrels/; for pairs '
    'pairs.jsonl and perhaps corpus.jsonl.',
    may_change=True,
  )
  download: bool = knob(
    False,
    'Fetch the files of --dataset=msmarco, msmarco_doc, dpr, or beir with '
    '--beir_set, that are not in --data_dir: up to gigabytes, from their '
    'source, with their checksums.',
    may_change=True,
  )
  beir_set: str | None = knob(
    None,
    'Set of BEIR that is in --data_dir, or that --download fetches into it: '
    'scored by --protocol=beir unless another is given. A line says so if it '
    'has not as many passages as that set. Not given: any folder of the form.',
    choices=registry.BEIR_PASSAGES,
    may_change=True,
  )
  questions: str | None = knob(
    None,
    'Set of questions of --dataset=dpr. Not given: the one whose files are in '
    '--data_dir.',
    choices=registry.QUESTIONS,
  )
  protocol: str | None = knob(
    None,
    'How dev and --split are scored, a row of the protocols in '
    'ance_jax/data/README.md; by the first measure checkpoints are chosen. '
    "Not given: the dataset's own; with --beir_set, beir.",
    choices=protocols.PROTOCOLS,
  )
  train_split: str = knob('train', 'Name of the judgements to train on.')
  dev_split: str = knob(
    'dev', 'Name of the judgements that settings and checkpoints are chosen on.'
  )
  dev_fraction: float = knob(
    0.1,
    'Share of the training queries, chosen by hash of their id, that are held '
    'out as dev where the data has no --dev_split. 0: such data is trained on '
    'without dev, and the best checkpoint is the last.',
  )

  # None: what --init_from brings with it.
  init_from: str = knob(
    '',
    'Weights to start from: a run of ours; a folder, or a name on the hub as '
    'OWNER/NAME or OWNER/NAME@REVISION, of a BERT, RoBERTa, DistilBERT or '
    'MPNet model, of ANCE, DPR or sentence-transformers; a file of weights, '
    'config.json and tokenizer beside it; or two of these, of queries and of '
    'passages, with a comma between. A run keeps the commit it began with. '
    'Empty: random weights and a vocabulary trained on the corpus.',
    section='Encoder',
  )
  vocab_size: int = knob(
    8192, 'Entries of the vocabulary, without --init_from.'
  )
  num_layers: int = knob(12, 'Transformer layers, without --init_from.')
  hidden_size: int = knob(768, 'Width of the encoder, without --init_from.')
  num_heads: int = knob(12, 'Attention heads, without --init_from.')
  intermediate_size: int = knob(
    3072, 'Width of the feed-forward layers, without --init_from.'
  )
  tie_encoders: bool | None = knob(
    None,
    'One encoder for queries and passages. ANCE: true on MS MARCO, false on NQ '
    "and TriviaQA; DPR: false. Not given: the checkpoint's own, else true.",
  )
  pooling: str | None = knob(
    None,
    f'How token vectors become one. {_listed(choices.POOLINGS)}. Not given: '
    "the checkpoint's own, else cls (ANCE and DPR).",
    choices=choices.POOLINGS,
  )
  similarity: str | None = knob(
    None,
    'Score of a query and a passage. Not given: the '
    "checkpoint's own, else dot (ANCE and DPR).",
    choices=choices.SIMILARITIES,
  )
  head_size: int | None = knob(
    None,
    'Width of a linear projection after the pooling; 0: none. ANCE: 768; DPR: '
    "none. Not given: the checkpoint's own, else none.",
  )
  head_norm: bool | None = knob(
    None,
    'Whether a LayerNorm follows the projection of --head_size. ANCE: true; '
    "DPR: false. Not given: the checkpoint's own, else true.",
  )
  query_length: int | None = knob(
    None,
    'Tokens of a query at most. ANCE: 64. Not given: the '
    "checkpoint's own, else 64.",
  )
  passage_length: int | None = knob(
    None,
    "Tokens of a passage at most. ANCE: 512. Not given: the checkpoint's own, "
    'else 512.',
  )
  chunks: int = knob(
    1,
    'Pieces of --passage_length tokens that a passage is cut into; the best of '
    'them is its score (MaxP). 1: the first alone (FirstP). ANCE on documents: '
    '4.',
  )
  whole_chunks: bool = knob(
    False,
    'With --chunks, tokenize a passage once and cut it then, so that the first '
    "piece alone begins with a special token, as ANCE's code has it. Else each "
    'piece has its own.',
  )
  title_separator: str | None = knob(
    None,
    'What stands between title and text of a passage: a space, or the '
    "tokenizer's separator token. DPR, and ANCE on MS MARCO documents: token. "
    "Not given: the checkpoint's own, else space.",
    choices=('space', 'token'),
  )
  query_prompt: str | None = knob(
    None,
    "What is put before each query, such as 'query: ' for E5. Not given: the "
    "checkpoint's own, else nothing.",
  )
  passage_prompt: str | None = knob(
    None,
    "What is put before each passage, such as 'passage: ' for E5. Not given: "
    "the checkpoint's own, else nothing.",
  )
  lower_case: bool | None = knob(
    None,
    'Lower-case all texts, and drop spaces at their ends, before they are '
    'tokenized. ANCE: true, with a RoBERTa. Not given: what the '
    "checkpoint's tokenizer does.",
  )
  prefix_space: bool | None = knob(
    None,
    'Put a space before each text, so that its first word is one like others; '
    'only for byte-level tokenizers, such as those of RoBERTa. ANCE asks for '
    "none, STAR for one. Not given: what the checkpoint's tokenizer does.",
  )
  dropout_rate: float = knob(
    0.1, 'Dropout in training, on activations and attention. BERT: 0.1.'
  )
  dtype: str = knob(
    'float32',
    'Type that the encoder computes in; parameters and scores are float32.',
    choices=('float32', 'bfloat16'),
  )

  method: str = knob(
    'ance',
    'Row of the method table (README): where negatives come from, and the '
    'loss.',
    choices=methods.METHODS,
    section='Method',
  )
  warmup_method: str = knob(
    'bm25',
    'Row whose negatives and loss are used for the first --warmup_steps. '
    'ANCE: bm25.',
    choices=methods.of_warm_up,
  )
  warmup_steps: int = knob(
    0,
    'Steps on --warmup_method before the first refresh; only for rows that '
    'mine from the index. ANCE: 60,000, as a run of its own.',
  )
  hard_negatives: int = knob(
    1,
    'Negatives of its own that a query has in a step, drawn from its --top_k; '
    'with --method=ance_code, that a refresh draws for it, to take them one by '
    'one. ANCE: 1; its code: 20.',
  )
  top_k: int = knob(
    200,
    'Passages that are mined for each query, best first, positives and their '
    'duplicates removed. ANCE: 200.',
  )
  drop_same_text: bool = knob(
    True,
    'No passage with the text of a positive is a negative, in mining or in the '
    'batch; --method=ance_code has its own rule.',
  )
  drop_answers: bool | None = knob(
    None,
    'No passage whose text holds an answer is mined as a negative; the next '
    'ones take its place. Not given: true where there are answers. DPR, ANCE '
    'on NQ: true.',
  )
  temperature: float = knob(
    1.0,
    'Scores are divided by it in the loss. ANCE and DPR: 1; with cosine, 0.05 '
    'is common.',
  )
  steps_per_refresh: int = knob(
    10_000,
    'Optimizer steps between two refreshes. ANCE: 10,000 on MS MARCO, 1,000 on '
    'NQ.',
  )
  query_slices: int = knob(
    1,
    'Slices of the training queries, of which each refresh mines one, in turn, '
    'to train on; only for rows that mine from the index. ANCE: 1; its code: 5 '
    '(--ann_chunk_factor).',
  )
  max_refreshes: int = knob(
    0, 'Refreshes at most, the first one counted; 0: no limit. 1 freezes it.'
  )
  refresh_schedule: str = knob(
    '',
    'Steps between refreshes by interval of steps, instead of '
    '--steps_per_refresh: 0-2000:500,2000-:5000 makes one every 500 steps up '
    'to step 2,000 and every 5,000 from there on. The first one is at '
    '--warmup_steps.',
  )
  refresh_trigger: float = knob(
    0.0,
    'Share of the negatives in use that the weights must rank in the first 100 '
    'of some training queries, or else a refresh is due: the steps of the '
    'schedule are then only looked at, which costs an encoding of the corpus. '
    '0: every step of the schedule is one of a refresh, as in ANCE.',
  )
  warmup_until_plateau: int = knob(
    0,
    'Evaluations in a row, --steps_per_eval apart, in which the first measure '
    'of dev was no better than before: the first refresh is then at the next '
    'one, and at --warmup_steps at the latest. 0: it is at --warmup_steps. '
    'ANCE: 0.',
  )
  refresh: str = knob(
    'sync',
    'How negatives are refreshed. sync: training waits for them; async: beside '
    'training, in this process (one process only); external: by another one, '
    'with --job=refresh --watch and the same --workdir, on this machine or '
    'another, as in ANCE; delayed: in step, and in use --refresh_delay steps '
    'later, to study what staleness does.',
    choices=('sync', 'async', 'external', 'delayed'),
    may_change=True,
  )
  refresh_delay: int = knob(
    0,
    'Steps from the weights that mined negatives to the first step trained on '
    'them, with --refresh=delayed.',
  )
  refresh_devices: int = knob(
    0,
    'Local accelerators that refresh beside training with --refresh=async, '
    'taken behind those that train; 0: the same ones.',
    may_change=True,
  )
  max_staleness: int = knob(
    0,
    'Steps that the weights which mined the negatives in use may be behind, '
    'with --refresh=async or external: then training waits. 0: it never does.',
    may_change=True,
  )
  refresh_replay: str = knob(
    '',
    'Folder of a run whose refreshes are used, each from the step on that it '
    'was used from there: none is made.',
    may_change=True,
  )
  watch: bool = knob(
    False,
    '--job=refresh goes on with newer checkpoints until training is over.',
    may_change=True,
  )

  batch_size: int = knob(
    64,
    'Queries a step, over all devices; with --method=ance_code, triplets. '
    'ANCE: 64 on MS MARCO, 128 on NQ.',
    section='Optimizer',
  )
  micro_batch_size: int = knob(
    0,
    'Queries, with their passages, that a device has the activations of at '
    "once; it divides the device's part of --batch_size. The gradient stays "
    "that of the whole batch: other queries' passages included, where the row "
    'has these, at the price of encoding twice (gradient caching). 0: all. '
    'ANCE: 8.',
    may_change=True,
  )
  remat: bool = knob(
    False,
    'Compute each layer a second time in the backward pass instead of keeping '
    'its activations: less memory, a third more work. ANCE: false.',
    may_change=True,
  )
  max_steps: int = knob(
    1_000_000,
    'Optimizer steps of the whole run. Where a run goes on with other ones, '
    'the learning rate falls to 0 at the new end.',
    may_change=True,
  )
  optimizer: str = knob(
    'lamb',
    f'What makes a step of a gradient. {_listed(methods.OPTIMIZERS)}.',
    choices=methods.OPTIMIZERS,
  )
  learning_rate: float = knob(
    1e-6, 'Peak learning rate. ANCE: 1e-6 (LAMB); DPR: 2e-5 (AdamW).'
  )
  lr_warmup_steps: int = knob(
    5000,
    'Steps in which the learning rate rises from 0, to fall in a straight '
    'line to 0 at --max_steps; no refresh restarts it. ANCE: 5,000.',
  )
  weight_decay: float = knob(
    0.0, 'Weight decay, not on biases and LayerNorm. ANCE and DPR: 0.'
  )
  adam_epsilon: float = knob(
    1e-8, 'Added to the root of the second moment. ANCE and DPR: 1e-8.'
  )
  clip_norm: float = knob(
    1.0,
    'Norm that the gradient of the whole batch is clipped to; 0: not clipped. '
    'ANCE: 1; DPR: 2 on a gradient divided by its 8 devices, 16 here.',
  )

  tokens_per_batch: int = knob(
    65_536,
    'Tokens of a batch of the encoding pass over all devices, padding '
    'included. CPUs like 4,096.',
    may_change=True,
    section='Encoding, index, evaluation',
  )
  rows_per_block: int = knob(
    65_536, 'Passages of a block: the unit in which encoding goes on.'
  )
  index: str = knob(
    'Flat',
    'FAISS factory string: Flat searches exactly, on the host, as in ANCE. Or '
    'device: exactly, on the devices.',
  )
  search_memory_mb: int = knob(
    4096,
    'MiB of each device that --index=device may take: half for embeddings, '
    'which come from the host in blocks where they are more, anew for each '
    '1,024 queries at most; half for scores. A CPU has them of its memory. '
    'ANCE: FAISS on GPUs, no bound.',
    may_change=True,
  )
  index_params: str = knob(
    '', 'FAISS search parameters of that index, for example nprobe=32.'
  )
  center_passages: bool = knob(
    False,
    'Take the mean passage from each passage in the index. The order stays, '
    'all scores of a query are less by one number, and an --index of 16 bits '
    '(SQbf16, SQfp16) keeps more of it where embeddings are alike, as those of '
    'ANCE are. ANCE: false.',
  )
  steps_per_eval: int | None = knob(
    None,
    'Steps between evaluations on dev, step 0 included. Not given: only at '
    'refreshes. The end of the run is always evaluated.',
    may_change=True,
  )
  retriever: str = knob(
    'model',
    'What --job=evaluate, --job=search and --job=mine rank with.',
    choices=('model', 'bm25'),
    may_change=True,
  )
  split: str = knob(
    'dev',
    'Split that --job=evaluate scores, and --job=compare. Choose on dev, read '
    'test once.',
    may_change=True,
  )
  output: str = knob(
    '',
    'What a job writes. export: a folder; not given: export-<step> in '
    '--workdir. mine: a file, and beside it its report; not given: '
    'hard_negatives.FORMAT in --workdir.',
    may_change=True,
  )
  overwrite: bool = knob(
    False,
    'Let a job replace what is at --output. Without it, it is refused.',
    may_change=True,
  )
  export_corpus: bool = knob(
    False,
    'With --job=export: write also the embeddings of the corpus, its ids, and '
    'a FAISS index of --index; of --index=device, Flat.',
    may_change=True,
  )
  checkpoint: str = knob(
    'last',
    'Checkpoint of a run that is read, also of --init_from: last, best (by dev '
    'MRR@10) or a step.',
    may_change=True,
  )
  negatives: str = knob(
    '',
    'File of negatives of the training queries, for --method=given and '
    '--job=audit: JSON lines or an array, also gzipped, as --job=mine, '
    'sentence-transformers, FlagEmbedding, Tevatron and DPR have them. Empty: '
    'those that pairs.jsonl has.',
  )
  bm25_run: str = knob(
    '',
    'TREC run file of the training queries, such as --job=evaluate '
    '--retriever=bm25 --split=train or Anserini writes, whose ranking is taken '
    'for that of BM25. Empty: what the data brings, or else bm25s ranks.',
  )
  bm25_language: str = knob(
    'auto',
    'How BM25 cuts texts into words. english: stemmed, without stop words; '
    'another language of Snowball: the same, with its stop words where bm25s '
    'has a list; none: words as they are written, in small letters; bigrams: '
    'the same, but every two neighbouring letters of Chinese, Japanese, '
    'Korean, Thai and other scripts without spaces, as in Lucene. auto: '
    'english, none or bigrams by a sample of the corpus; a line says which.',
    choices=words.LANGUAGES,
  )
  bm25_k1: float = knob(0.9, 'BM25 term saturation. Anserini: 0.9.')
  bm25_b: float = knob(0.4, 'BM25 length normalisation. Anserini: 0.4.')

  ranking: str = knob(
    '',
    'TREC run file of the training queries that --job=mine takes negatives '
    'from, with its scores. Empty: --retriever ranks.',
    may_change=True,
    section='Hard negatives',
  )
  num_negatives: int = knob(
    4,
    'Negatives that --job=mine writes for a query. NV-Retriever: 4.',
    may_change=True,
  )
  skip_ranks: int = knob(
    0,
    'Ranks that mining skips, in a refresh and with --job=mine; ranks count '
    'what is neither judged a positive, nor of its text, nor the query '
    'itself, nor holds an answer. NV-Retriever: Top-k shifted by N. '
    'sentence-transformers: range_min.',
  )
  max_rank: int | None = knob(
    None,
    'Last rank that mining takes a candidate from, before its filters of '
    'scores. Not given: 100 with --job=mine; in training, --top_k behind '
    '--skip_ranks. sentence-transformers: range_max.',
  )
  max_score: float | None = knob(
    None,
    'No mined negative scores more. NV-Retriever: TopK-Abs. In training, this '
    'and all other rules of scores are for what --method mines, not for its '
    'warm-up.',
  )
  min_score: float | None = knob(None, 'No mined negative scores less.')
  absolute_margin: float | None = knob(
    None,
    'A mined negative scores less than p - margin, p being the least score of '
    "the query's positives. NV-Retriever, TopK-MarginPos: 0.05.",
  )
  relative_margin: float | None = knob(
    None,
    'A mined negative scores less than p - margin * |p|, which is '
    "p * (1 - margin) for p above 0; p is the least score of the query's "
    'positives. NV-Retriever, TopK-PercPos at 95 %: 0.05. Little passes it '
    'where all scores are alike, as dot products of ANCE are: see '
    '--center_scores.',
  )
  z_margin: float | None = knob(
    None,
    'A mined negative scores less than p - margin * the standard deviation of '
    "the query's scores, over the first --top_k candidates, with --job=mine "
    '--max_rank.',
  )
  center_scores: bool = knob(
    False,
    'The relative margin is of scores less the mean of the query, over the '
    'same candidates as --z_margin: less than p - margin * |p - mean|.',
  )
  cross_encoder: str = knob(
    '',
    'Cross-encoder that scores what the other filters of mining leave, for '
    '--rerank_max_score: a folder or name on the hub of a BERT, RoBERTa, '
    'DistilBERT or MPNet for sequence classification with one output, as '
    "sentence-transformers' CrossEncoder saves it. Scores are those of its "
    'predict: the sigmoid of the output, or the output itself where the folder '
    'names Identity as activation.',
  )
  score_run: str = knob(
    '',
    'TREC run file of the training queries with scores for '
    '--rerank_max_score, instead of --cross_encoder.',
  )
  rerank_max_score: float | None = knob(
    None,
    'No mined negative has more than this from --cross_encoder, or from '
    '--score_run, or no score there. RocketQA: 0.1.',
  )
  choose: str = knob(
    'top',
    'Which of the candidates that the filters leave are stored, '
    '--num_negatives of them or in training --top_k: the best, or some drawn '
    'evenly by --seed.',
    choices=('top', 'random'),
  )
  on_shortage: str | None = knob(
    None,
    'What mining does with a query that is left fewer negatives than are '
    'stored of one: keep what there is; drop the query; fill up with passages '
    'at random that no filter rejects. A query with none is left out, and '
    'with --format=n_tuples any that has fewer. Not given: fill in training, '
    'keep with --job=mine.',
    choices=('keep', 'drop', 'fill'),
  )
  format: str = knob(
    'triplets',
    'What --job=mine writes. '
    f'{_listed({name: row.what for name, row in forms.FORMS.items()})}.',
    choices=forms.FORMS,
    may_change=True,
  )

  steps_per_checkpoint: int | None = knob(
    None,
    'Steps between checkpoints besides those at refreshes. Not given: '
    '--steps_per_refresh.',
    may_change=True,
    section='Saving and showing',
  )
  checkpoints_to_keep: int = knob(
    3, 'Newest checkpoints kept, besides the best on dev.', may_change=True
  )
  steps_per_log: int = knob(
    10,
    'Steps between lines of training metrics; where there are no bars, they '
    'are printed, too.',
    may_change=True,
  )
  progress_bars: bool = knob(
    True,
    'Show bars on a terminal. Without one, with --noprogress_bars, or with '
    'TQDM_DISABLE=1 in the environment, lines are printed: of training every '
    '--steps_per_log, of other long phases every 20 seconds.',
    may_change=True,
  )
  query: str = knob(
    '',
    'Query of --job=search. Empty: they are read from the terminal.',
    may_change=True,
  )
  port: int | None = knob(
    None,
    'With --job=search: serve a web page on this port of this machine alone; 0 '
    'takes a free one. Not given: the terminal.',
    may_change=True,
  )
  num_results: int = knob(
    5, 'Passages that --job=search shows.', may_change=True
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
    'PNG that --job=report writes. Empty: curves.png in the first of --runs.',
    may_change=True,
  )

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if isinstance(value := getattr(self, field.name), os.PathLike):
        object.__setattr__(self, field.name, os.fspath(value))
    for field in dataclasses.fields(self):
      check(field.name, getattr(self, field.name))
    self._check_together()

  def _check_together(self):
    """Raises `BadInput` for flags that do not go together."""
    of_one_job = {
      'dry_run': 'train',
      'beam_runner': 'prepare',
      'watch': 'refresh',
    }
    for name, job in of_one_job.items():
      value = getattr(self, name)
      if value and self.job != job:
        fact = f'is for --job={job} alone, and the job is {self.job}'
        raise _bad(name, value, fact, 'leave it out')
    if self.download and self.dataset == 'beir' and not self.beir_set:
      raise _bad(
        'download', True, 'does not know which set of BEIR to fetch',
        'name it, such as --beir_set=scifact'
      )  # fmt: skip
    if self.index == ON_DEVICES and self.index_params:
      fact = f'is for indexes of FAISS, and --index is {ON_DEVICES}'
      raise _bad('index_params', self.index_params, fact, 'leave it out')
    self._check_refresh()
    self._check_mining()
    self._check_processes()

  def _check_mining(self):
    """Raises `BadInput` for rules of mining that do not go together."""
    if None not in (self.min_score, self.max_score) and (
      self.min_score > self.max_score
    ):
      raise errors.BadInput(
        f'--min_score={self.min_score} is above --max_score={self.max_score}; '
        'change one.'
      )
    if self.center_scores and self.relative_margin is None:
      raise errors.BadInput(
        '--center_scores is given without --relative_margin, which it is for; '
        'give both.'
      )
    scorers = [n for n in ('cross_encoder', 'score_run') if getattr(self, n)]
    if len(scorers) != (self.rerank_max_score is not None):
      raise errors.BadInput(
        f'--rerank_max_score is {self.rerank_max_score} with '
        f'{" and ".join(f"--{name}" for name in scorers) or "no scorer"}; it '
        'goes with one of --cross_encoder and --score_run: give one of each.'
      )

  def _check_processes(self):
    """Raises `BadInput` for processes that could not find each other."""
    count, told = self.num_processes, self.num_processes > 1
    several = f'with --num_processes={count}'
    if count != 1 and self.job != 'train':
      fact = f'is for --job=train alone, and the job is {self.job}'
      raise _bad('num_processes', count, fact, 'leave it out')
    if count != 1 and self.remote_dir:
      fact = f'cannot be used {several}, which share --workdir'
      raise _bad('remote_dir', self.remote_dir, fact, 'leave it out')
    if self.process_id >= (count if told else 1):
      cure = f'number them from 0 to {count - 1}' if told else 'leave it out'
      raise _bad(
        'process_id', self.process_id, f'is no process {several}', cure
      )
    if bool(self.coordinator) != told:
      fact = f'is missing {several}' if told else f'is not needed {several}'
      cure = 'set it to HOST:PORT of process 0' if told else 'leave it out'
      raise _bad('coordinator', self.coordinator, fact, cure)
    if count != 1 and self.refresh == 'async':
      cure = 'choose sync, delayed or external'
      raise _bad('refresh', 'async', f'cannot be used {several}', cure)

  def _check_refresh(self):
    """Raises `BadInput` for ways to refresh that do not go together."""
    if self.refresh_schedule:
      try:
        intervals(self.refresh_schedule)
      except ValueError as error:
        raise _bad(
          'refresh_schedule', self.refresh_schedule,
          'does not cover the steps from 0 on without a gap, open at the end',
          'write it as FIRST-LAST:STEPS,...: 0-2000:500,2000-:5000'
        ) from error  # fmt: skip
    spans = intervals(self.refresh_schedule) if self.refresh_schedule else ()
    longest = max((every for _, every in spans), default=self.steps_per_refresh)
    if 0 < self.max_staleness < longest:
      fact = f'is less than the {longest} steps between refreshes'
      cure = 'raise it, as nothing newer comes while training waits'
      raise _bad('max_staleness', self.max_staleness, fact, cure)
    plateau = self.warmup_until_plateau
    if plateau and not (self.steps_per_eval and self.warmup_steps):
      fact = 'needs evaluations, and a latest end of the warm-up'
      cure = 'set --steps_per_eval and --warmup_steps'
      raise _bad('warmup_until_plateau', plateau, fact, cure)
    if self.refresh_trigger and self.query_slices > 1:
      raise _bad(
        'refresh_trigger', self.refresh_trigger,
        f'needs all queries a refresh, and --query_slices is '
        f'{self.query_slices}', 'change one of them'
      )  # fmt: skip
    delayed, beside = self.refresh == 'delayed', ('async', 'external')
    wrong = {
      'refresh_trigger': self.refresh_trigger and delayed,
      'warmup_until_plateau': plateau and self.refresh in beside,
      'refresh_delay': self.refresh_delay and not delayed,
      'refresh_devices': self.refresh_devices and self.refresh != 'async',
      'max_staleness': self.max_staleness and self.refresh not in beside,
    }
    for name in [name for name, is_wrong in wrong.items() if is_wrong]:
      fact = f'cannot be used with --refresh={self.refresh}'
      raise _bad(
        name, getattr(self, name), fact, 'leave it out, or change that'
      )
    if delayed and not self.refresh_delay:
      raise _bad(
        'refresh', 'delayed', 'does not say by how many steps',
        'set --refresh_delay'
      )  # fmt: skip

  @classmethod
  def from_lines(cls, lines, where):
    """Returns the settings of the lines that `to_flagfile` writes.

    Args:
      lines: List of str, each --name=value; names of older releases, too.
      where: What they are from, for messages.

    Raises:
      BadInput: A line is of another form, or its value cannot be used.
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
      values[name] = _parsed(fields[name], text, place)
      check(name, values[name], place)
    return cls(**values)

  def to_flagfile(self):
    """Returns the text of a flagfile that gives these settings again.

    Defaults are in it, too: those of another release may be others. Which
    process of how many this is, is not.
    """
    lines = []
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is not None and field.name not in LAUNCH:
        if isinstance(value, bool):
          value = str(value).lower()
        lines.append(f'--{field.name}={value}\n')
    return ''.join(lines)


# Names of flags in older releases: {old: new}. The flags that a run wrote are
# read through it; a person is told the new name.
RENAMED = {
  'mine_from': 'skip_ranks',
  'mine_to': 'max_rank',
  'judge': 'cross_encoder',
  'judge_run': 'score_run',
  'judge_max_score': 'rerank_max_score',
  'sampling': 'choose',
  'too_few': 'on_shortage',
}
# Fields that tell the processes of a run from each other, and are none of its
# settings.
LAUNCH = ('num_processes', 'process_id', 'coordinator')
# Fields that say which passages become negatives. A run keeps its own; a job on
# a run has those that it is given, and none of the run's.
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
  'choose',
  'on_shortage',
)
# Fields that say how a job which only reads a run computes, and what it draws:
# they may be others than those that the run was trained with.
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
# Fields, and the jobs that read them, or those that do not; the others are read
# by all. A test runs the jobs, and fails if one reads anything else.
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
    'tokens_per_batch refresh',
    'not report compare',
  ),
  ('seed', 'not report export'),
  ('compilation_cache_dir rows_per_block', 'not report compare prepare'),
  (
    'index search_memory_mb index_params center_passages',
    'not report compare prepare encode',
  ),
  ('checkpoint', 'not prepare'),
  (
    'vocab_size num_layers hidden_size num_heads intermediate_size',
    'train prepare inspect',
  ),
  (
    'warmup_method warmup_steps top_k hard_negatives steps_per_refresh '
    'query_slices max_refreshes refresh_schedule warmup_until_plateau '
    'max_steps',
    'train refresh inspect',
  ),
  ('method', 'train refresh inspect export'),
  ('temperature refresh_trigger', 'train refresh'),
  ('drop_same_text drop_answers', 'train refresh inspect mine'),
  ('negatives', 'train refresh inspect mine audit prepare'),
  ('bm25_run', 'train refresh inspect'),
  (
    'bm25_language bm25_k1 bm25_b',
    'train refresh inspect mine evaluate search',
  ),
  (
    'batch_size steps_per_eval steps_per_checkpoint checkpoints_to_keep',
    'train inspect',
  ),
  (
    'num_processes process_id coordinator dry_run dropout_rate refresh_delay '
    'refresh_devices max_staleness refresh_replay micro_batch_size remat '
    'optimizer learning_rate lr_warmup_steps weight_decay adam_epsilon '
    'clip_norm steps_per_log',
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
# Names of fields, what their values may be (never NaN), and how to say it.
_RANGES = (
  (
    'vocab_size num_layers hidden_size num_heads intermediate_size '
    'hard_negatives top_k steps_per_refresh query_slices chunks '
    'batch_size tokens_per_batch rows_per_block steps_per_eval '
    'steps_per_checkpoint checkpoints_to_keep steps_per_log num_results '
    'num_negatives max_rank search_memory_mb',
    lambda value: value >= 1,
    'at least 1',
  ),
  (
    'query_length passage_length',
    lambda value: value >= 3,
    'at least 3: two special tokens and a word',
  ),
  (
    'num_devices num_processes process_id warmup_steps max_refreshes '
    'refresh_delay refresh_devices max_staleness micro_batch_size max_steps '
    'warmup_until_plateau lr_warmup_steps weight_decay clip_norm head_size '
    'bm25_k1 skip_ranks absolute_margin z_margin',
    lambda value: value >= 0,
    'at least 0',
  ),
  (
    'temperature learning_rate adam_epsilon',
    lambda value: value > 0,
    'a number above 0',
  ),
  (
    'dropout_rate dev_fraction relative_margin',
    lambda value: 0 <= value < 1,
    'at least 0 and below 1',
  ),
  ('seed', lambda value: 0 <= value < 2**31, 'at least 0 and below 2**31'),
  (
    'bm25_b refresh_trigger',
    lambda value: 0 <= value <= 1,
    'a number from 0 to 1',
  ),
  ('port', lambda value: 0 <= value < 2**16, 'a port from 0 to 65,535'),
)
_RANGE_OF = {name: row for names, *row in _RANGES for name in names.split()}
# Fields that are paths, or names of files without their ending.
_PATHS = (
  'workdir', 'compilation_cache_dir', 'data_dir', 'init_from', 'runs',
  'picture', 'negatives', 'bm25_run', 'tokens_dir', 'ranking',
  'cross_encoder', 'score_run',
  'output', 'refresh_replay'
)  # fmt: skip
_SPLITS = ('train_split', 'dev_split', 'split')
# What nothing may be chosen on.
TEST_SPLITS = ('test', 'dl19', 'dl20')
# What a path cannot have, as no shell reads it, and what to do instead.
_NO_PATHS = (
  (r'\s#', 'has a comment behind it', 'put it on a line of its own'),
  (r'://', 'is an address, not a path', 'fetch or mount what is there'),
  (
    r'^[A-Za-z]:[\\/]|\\',
    'has a drive or a backslash',
    'write it with / between its parts',
  ),
  (r'^["\']|["\']$', 'is in quotes, which no shell removes', 'leave them out'),
  (r'^~|\$', 'has a ~ or $, which no shell expands', 'write the whole path'),
)
# Without a step up, a space, or what a shell or a bucket would not take.
_REMOTE = re.compile(r'((gs|s3|az):/)?(/(?!\.\.?(/|$))[\w.=@+-]+)+/?')
_KINDS = {
  str: ('is not a text', 'quote it'),
  int: ('is not a whole number', 'write digits only, such as 1000000'),
  float: ('is not a number', 'write it such as 0.5 or 2e-5'),
  bool: ('is neither true nor false', 'set it to one of them'),
}
_BOOLS = {'true': True, 'false': False}


def refuse_left_over(arguments, place=''):
  """Raises `BadInput` if `arguments`, which no flag took, is not empty.

  Args:
    arguments: List of str.
    place: File and line that they are from, to begin the text with.
  """
  if arguments:
    raise errors.refusal(
      f'{arguments[0][:80]!r} is not a flag',
      'write --name=value with two dashes, without spaces, and without a '
      'comment behind it',
      place,
    )


def unknown_flag(name, place=''):
  """Returns the error of a name that no flag has; `place` begins its text."""
  old = f'--{name}'.partition(' ')[0]
  if old != (new := renamed(old)):
    return errors.refusal(f'{old} is now {new}', 'write that', place)
  names = [field.name for field in dataclasses.fields(Config)]
  similar = difflib.get_close_matches(name.split('=')[0], names, 1)
  cure = f'write --{similar[0]}=value' if similar else 'see --help'
  return errors.refusal(f'there is no flag --{name[:80]}', cure, place)


def renamed(argument: str) -> str:
  """Returns --name, --noname or --name=value under the flag's present name."""
  found = re.fullmatch(r'(--?)(no)?(\w+)(=.*)?', argument, re.DOTALL)
  if not found:
    return argument
  dashes, no, name, value = found.groups(default='')
  if no + name in RENAMED:
    no, name = '', no + name
  return f'{dashes}{no}{RENAMED.get(name, name)}{value}'


def of_a_run(lines: list[str]) -> list[str | None]:
  """Returns lines of a run's flags, --name=value, under their present names.

  None instead of rules of mining in a file that has old names for some: they
  were of --job=mine then, and none of the run's.
  """
  now = [renamed(line) for line in lines]
  names = [line.partition('=')[0].removeprefix('--') for line in now]
  dropped = (
    MINING_RULES
    if any(
      old != new and name in MINING_RULES
      for old, new, name in zip(lines, now, names, strict=True)
    )
    else ()
  )
  return [
    None if name in dropped else line
    for line, name in zip(now, names, strict=True)
  ]


def check(name: str, value: object, place: str = '') -> None:
  """Raises `BadInput` for a value that a field may never have.

  Args:
    name: Of the field.
    value: What it is to be.
    place: File and line that it is from, to begin the text with.
  """
  field = Config.__dataclass_fields__[name]
  if value is None and field.default is None:
    return
  for find in (_wrong_type, _wrong_choice, _wrong_number, _wrong_text):
    if problem := find(field, value):
      raise _bad(name, value, *problem, place)


def bad_value(name: str, text: str, place: str = '') -> errors.BadInput:
  """Returns the error of a text that is no value of a flag."""
  field = Config.__dataclass_fields__[name]
  problem = _wrong_choice(field, text) or _KINDS[plain_type(field.type)]
  return _bad(name, text, *problem, place)


def plain_type(annotation):
  """Returns `int` for `int` and for `int | None`."""
  if isinstance(annotation, types.UnionType):
    return typing.get_args(annotation)[0]
  return annotation


def intervals(text):
  """Returns what `--refresh_schedule` says: (first step, steps between) pairs.

  Args:
    text: Such as '0-2000:500,2000-:5000'.

  Raises:
    ValueError: It has another form, or leaves out steps.
  """
  found, end = [], 0
  for part in text.split(','):
    span, every = part.split(':')
    first, last = span.split('-')
    if end is None or int(first) != end or int(every) < 1:
      raise ValueError(part)
    found.append((end, int(every)))
    end = int(last) if last else None
    if end is not None and end <= found[-1][0]:
      raise ValueError(part)
  if end is not None:
    raise ValueError(text)
  return tuple(found)


def readers(name: str) -> tuple[str, ...]:
  """Returns the jobs that read a field, in the order of `JOBS`."""
  rows = (jobs for names, jobs in _READ_BY if name in names.split())
  named = next(rows, 'not').split()
  return tuple(job for job in JOBS if (job in named) != ('not' in named))


def why_unread(config: Config, name: str) -> str | None:
  """Returns why nothing reads a field that was set, None if something does."""
  if config.job not in readers(name):
    return f'on --job={config.job}'
  of_index = ('warmup_method', 'warmup_steps', 'max_refreshes')
  if name in of_index and not methods.METHODS[config.method].refreshes:
    return f'on --method={config.method}, which mines no index'
  if name == 'warmup_method' and not config.warmup_steps:
    return 'without --warmup_steps'
  if name == 'whole_chunks' and config.chunks == 1:
    return 'without --chunks'
  return None


def differences(before, after, *, may_change):
  """Yields (name, old, new) of each field that differs.

  Args:
    before: The `Config` that a run began with, or was last saved under.
    after: The `Config` that it is to go on with.
    may_change: Whether the fields that may change are meant, or those that
      may not.
  """
  for field in dataclasses.fields(Config):
    old, new = getattr(before, field.name), getattr(after, field.name)
    if old != new and field.metadata['may_change'] == may_change:
      yield field.name, old, new


def _parsed(field, text, place):
  """Returns the value that `Config.to_flagfile` wrote as a text."""
  plain = plain_type(field.type)
  try:
    return _BOOLS[text] if plain is bool else plain(text)
  except (KeyError, ValueError) as error:
    raise bad_value(field.name, text, place) from error


def _wrong_type(field, value):
  plain = plain_type(field.type)
  fits = {
    str: isinstance(value, str),
    bool: isinstance(value, bool),
    int: isinstance(value, int) and not isinstance(value, bool),
    float: isinstance(value, (int, float)) and not isinstance(value, bool),
  }
  return None if fits[plain] else _KINDS[plain]


def _wrong_choice(field, value):
  choices = values_of(field)
  if choices and value not in choices:
    return 'does not exist', f'choose one of {", ".join(choices)}'
  return None


def _wrong_number(field, value):
  if isinstance(value, str):
    return None
  allowed, rule = _RANGE_OF.get(field.name, (lambda _: True, ''))
  if not allowed(value):
    return 'is out of range', f'set it to {rule}'
  if isinstance(value, float) and math.isinf(value):
    return 'is infinite', 'set it to a finite number'
  if not -(2**31) <= value < 2**31 and isinstance(value, int):
    return 'is out of range', 'set it below 2**31'
  return None


def _wrong_text(field, value):
  if not isinstance(value, str):
    return None
  # Control characters, and what stands for bytes that are not UTF-8.
  if any(unicodedata.category(c) in ('Cc', 'Cs') for c in value):
    return 'has line breaks or other control characters', 'leave them out'
  if field.name in _SPLITS:
    return _wrong_split(field.name, value)
  if field.name == 'remote_dir' and value and not _REMOTE.fullmatch(value):
    cure = 'write gs://BUCKET/FOLDER, s3://, az:// or a path from / on'
    return 'is no folder that can be copied to', cure
  paths = value.split(',') if field.name == 'runs' else [value]
  for pattern, *problem in _NO_PATHS if field.name in _PATHS else ():
    if any(re.search(pattern, path) for path in paths):
      return problem
  return None


def _wrong_split(name, value):
  if not re.fullmatch(r'\w[\w.-]{0,99}', value):
    cure = 'name a file of qrels/, without its folder and its ending'
    return 'is not a name of letters, digits, _, - and .', cure
  if name in ('train_split', 'dev_split') and value in TEST_SPLITS:
    cure = (
      'name another; without a dev split in the data, a share of train is held '
      'out'
    )
    return 'is a test split, on which nothing may be chosen', cure
  return None


def _bad(name, value, fact, cure, place=''):
  """Returns the error of a value that a flag may not have."""
  shown = value if isinstance(value, str) else repr(value)
  shown = shown.lower() if isinstance(value, bool) else shown
  if isinstance(value, str) and not re.fullmatch(r'[\w./:,+@%=~$*-]*', value):
    shown = repr(value)
  shown = shown if len(shown) <= 100 else f'{shown[:100]}...'
  return errors.refusal(f'--{name}={shown} {fact}', cure, place)
