"""DPR's files: Wikipedia passages, and questions with contexts or answers.

Karpukhin et al. 2020; dpr/data/retriever_data.py and biencoder_data.py.
psgs_w100.tsv holds passages of 100 words. biencoder-<set>-<split>.json is for
training and holds gold passages and BM25 negatives; <set>-<split>.qa.csv is for
evaluation and holds only answers.
"""

import ast
import collections

from ance_jax import errors
from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.data import answers as answers_lib
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import downloads
from ance_jax.data import records
from ance_jax.data import registry

_PASSAGES = 'psgs_w100.tsv'
_HEADER = ['id', 'text', 'title']
# Question sets whose answers are regular expressions.
_PATTERNS = ('curatedtrec',)
# Maximum characters of a list of answers.
_LONGEST_ANSWERS = 2**20


def read(settings: records.Settings) -> corpus_lib.RawDataset:
  """Reads DPR's files in the folder `--data_dir`."""
  folder = records.open_folder(settings, _PASSAGES)
  path = _needed(settings, folder, _PASSAGES)
  corpus = records.corpus(path, _passages(path))
  records.say_corpus('Wikipedia passages of DPR', corpus)
  questions = settings.questions or _only_set(folder)

  def read_split(name):
    contexts = f'biencoder-{questions}-{name}.json'
    alone = f'{questions}-{name}.qa.csv'
    for file in (contexts, alone):
      if (
        settings.download
        and file in registry.DOWNLOADS
        and not records.first(folder, (contexts, alone))
      ):
        downloads.fetch(file, folder)
    if path := records.find(folder, contexts):
      judged = _read_contexts(path, f'{questions}-{name}', corpus.rows)
    elif path := records.find(folder, alone):
      judged = _read_answers(path, f'{questions}-{name}')
    elif name == settings.train_split:
      _needed(settings, folder, contexts)
    else:
      return None
    if questions in _PATTERNS:
      _check_patterns(path, judged.answers)
      judged = judged._replace(answers_are_patterns=True)
    return judged

  return corpus_lib.RawDataset(
    corpus, read_split, f'{folder} for questions {questions}'
  )


def _passages(path):
  """Yields (line number, id, title, text) of a file of id, text and title."""
  for line, (an_id, text, title) in records.cells(path, _HEADER, quotes=True):
    if line == 1 and [an_id, text, title] == _HEADER:
      continue
    if not text.strip():
      raise strict_io.refusal(
        path,
        f'the passage {strict_io.quoted(an_id)} has no text',
        'remove it',
        line,
      )
    yield line, an_id, title, text


def _read_contexts(path, name, passage_rows):
  """Returns the `corpus.RawSplit` of a file of questions with contexts.

  As in DPR, the first positive context is the question's positive. BM25
  contexts are its negatives, except those that the corpus lacks. Questions
  without a positive are skipped.
  """
  found = corpus_lib.RawSplit(
    [], [], {}, {}, {}, protocol='answers', missing={}
  )
  counts = collections.Counter()
  for number, record in records.json_array(path):
    place = f'question {number}'
    question, contexts = _question(path, place, record)
    counts['questions'] += 1
    if not contexts['positive_ctxs']:
      counts['left out'] += 1
      continue
    ids = {
      key: [_passage_id(path, place, context) for context in some]
      for key, some in contexts.items()
    }
    row = len(found.query_ids)
    found.query_ids.append(f'{name}-{number}')
    found.queries.append(question)
    found.answers[row] = record.get('answers')
    if not (found.answers[row] and records.are_texts(found.answers[row])):
      raise _bad_record(
        path,
        place,
        'has no list of answers, none empty',
        found.answers[row],
      )
    gold = ids['positive_ctxs'][0]
    gold_row = passage_rows.get(gold)
    if gold_row is None:
      found.missing[row, gold] = 1
    else:
      found.judgements[row, gold_row] = 1
    hard = list(map(passage_rows.get, ids['hard_negative_ctxs']))
    found.negatives[row] = [passage for passage in hard if passage is not None]
    counts['negatives'] += len(hard)
    counts['unknown'] += hard.count(None)
  records.check_any(path, found.query_ids)
  records.say_rows(path, counts['questions'])
  _say_contexts(path, counts, found.negatives)
  return found


def _say_contexts(path, counts, negatives):
  """Prints how many questions and negatives of a file are left out."""
  if without := counts['left out']:
    logs.log(f'{path}: left out {without:,} questions without a positive')
  if unknown := counts['unknown']:
    logs.log(
      f'{path}: left out {unknown:,} of {counts["negatives"]:,} negatives of '
      'BM25, which the corpus lacks'
    )
  if lacking := sum(not rows for rows in negatives.values()):
    logs.log(f'{path}: {lacking:,} questions without a negative of BM25')


def _read_answers(path, name):
  """Returns the `corpus.RawSplit` of a file of questions and answers."""
  ids, queries, answers = [], [], {}
  for line, (question, listed) in records.cells(
    path, ('question', 'answers'), quotes=True
  ):
    found = _listed(listed)
    if not (found and records.are_texts(found)):
      raise strict_io.refusal(
        path,
        f'{strict_io.quoted(listed)} is not a list of strings such as '
        "['a', 'b']",
        'fetch the file again',
        line,
      )
    answers[len(ids)] = found
    ids.append(f'{name}-{line}')
    queries.append(_normal(path, f'line {line}', question))
  records.check_any(path, ids)
  records.say_rows(path, len(ids))
  return corpus_lib.RawSplit(
    ids, queries, {}, answers, protocol='answers', all_count=True
  )


def _question(path, place, record):
  """Returns a question's text and its lists of contexts."""
  if not isinstance(record, dict):
    raise _bad_record(path, place, 'is not an object', record)
  contexts = {}
  for key in ('positive_ctxs', 'hard_negative_ctxs'):
    contexts[key] = record.get(key)
    if not isinstance(contexts[key], list):
      raise _bad_record(path, place, f'has no list {key!r}', contexts[key])
  return _normal(path, place, record.get('question')), contexts


def _normal(path, place, question):
  """Returns a question as normalized by DPR (normalize_question)."""
  if not isinstance(question, str) or not question.strip():
    raise _bad_record(path, place, 'has no text', question)
  return question.replace('\u2019', "'")


def _passage_id(path, place, context):
  """Returns the id of a context: 'passage_id', or 'psg_id' in TriviaQA."""
  if not isinstance(context, dict):
    raise _bad_record(
      path, place, 'has a context that is not an object', context
    )
  an_id = context.get('passage_id', context.get('psg_id'))
  if an_id is None:
    raise _bad_record(path, place, 'has a context without an id', context)
  return str(an_id).removeprefix('wiki:')


def _listed(text):
  """Returns the value of a Python literal, or None; executes nothing."""
  try:
    return ast.literal_eval(text) if len(text) <= _LONGEST_ANSWERS else None
  except (ValueError, SyntaxError, RecursionError, MemoryError):
    return None


def _check_patterns(path, answers):
  """Raises `BadInput` if an answer is not a regular expression."""
  for row, patterns in answers.items():
    for pattern in patterns:
      try:
        answers_lib.is_in(pattern, '')
      except answers_lib.BadPattern as error:
        raise _bad_record(
          path,
          f'question {row + 1}',
          f'has an answer that is not a regular expression ({error})',
          pattern,
        ) from error


def _bad_record(path, place, fact, found):
  return strict_io.refusal(
    path, f'{place} {fact}: {strict_io.quoted(found)}', 'fetch the file again'
  )


def _only_set(folder):
  """Returns the name of the only question set in a folder."""
  names = {
    path.name.split('-')[path.name.startswith('biencoder-')]
    for pattern in ('biencoder-*-*.json*', '*-*.qa.csv*')
    for path in folder.glob(pattern)
  }
  if len(names) != 1:
    raise errors.refusal(
      f'--questions is not given, and the sets of questions in {folder} are '
      f'{", ".join(sorted(names)) or "none"}',
      'set it to one of them, or fetch '
      f'{registry.DOWNLOADS["biencoder-nq-train.json"].url}',
    )
  return names.pop()


def _needed(settings, folder, name):
  return downloads.existing(settings, folder, name, "a folder of DPR's files")
