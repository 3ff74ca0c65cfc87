"""Files of MS MARCO and DPR as downloads and editors break them."""

import json

from bad_input_tools import Accepted
from bad_input_tools import Refused
from bad_input_tools import append
from bad_input_tools import edit
from bad_input_tools import put
from bad_input_tools import remove
from bad_input_tools import settings
from bad_input_tools import zipped

from ance_jax import config
from ance_jax.training import experiment

PASSAGES, TRAIN = 'psgs_w100.tsv', 'biencoder-nq-train.json'
DEV, QA = 'nq-dev.qa.csv', 'nq-test.qa.csv'
COLLECTION, QRELS = 'collection.tsv', 'qrels.train.tsv'
DPR, MARCO = {'dataset': 'dpr'}, {'dataset': 'msmarco'}


def make_sound(folder, _):
  """Writes three passages and two questions in both formats."""
  rows = ''.join(f'{i}\ttext {i}\ttitle {i}\n' for i in (1, 2, 3))
  put(PASSAGES, f'id\ttext\ttitle\n{rows}')(folder)
  put(TRAIN, json.dumps([question(1), question(2)]))(folder)
  put(DEV, "who\t['a', 'b']\n")(folder)
  put(QA, "who\t['a', 'b']\nwhen\t['1970']\n")(folder)
  put(COLLECTION, ''.join(f'{i}\ttext {i}\n' for i in range(3)))(folder)
  put('queries.train.tsv', '7\twhat\n8\twho\n')(folder)
  put('queries.dev.small.tsv', '9\twhen\n')(folder)
  put(QRELS, '7\t0\t1\t1\n8\t0\t2\t1\n')(folder)
  put('qrels.dev.small.tsv', '9\t0\t0\t1\n')(folder)


def use(folder, changes):
  """Loads the dataset that the changed settings name."""
  changes = {'data_dir': str(folder), **DPR, **(changes or {})}
  splits = changes.pop('splits', ('train', 'dev'))
  experiment.load_texts(config.Config(**changes), splits)


def question(number, **changes):
  """Returns a question with contexts."""
  context = {'title': 't', 'text': 'x', 'passage_id': str(number)}
  return {
    'question': f'what {number}',
    'answers': ['a'],
    'positive_ctxs': [context],
    'hard_negative_ctxs': [{**context, 'passage_id': '3'}],
    **changes,
  }


def marco(make):
  """Returns `make` for --dataset=msmarco."""
  return lambda folder: {**MARCO, **(make(folder) or {})}


def asked(says, **changes):
  """Returns the case of a bad second question."""
  text = json.dumps([question(1), question(2, **changes)])
  return Refused(put(TRAIN, text), says, TRAIN)


def answered(line, says):
  """Returns the case of a bad second line of answers."""
  make = put(QA, f"who\t['a']\n{line}\n", splits=('test',))
  return Refused(make, says, QA, 2)


def columns(line, says):
  """Returns the case of a bad fourth line of MS MARCO's passages."""
  return Refused(marco(append(COLLECTION, line)), says, COLLECTION, 4)


def judged(line, says):
  """Returns the case of a bad third judgement of MS MARCO."""
  return Refused(marco(append(QRELS, f'{line}\n')), says, QRELS, 3)


CASES = {
  'sound DPR': Accepted(settings()),
  'sound MS MARCO': Accepted(settings(**MARCO)),
  # Passages of DPR.
  'passages without a header': Accepted(
    edit(PASSAGES, lambda data: data.split(b'\n', 1)[1])
  ),
  'gzipped passages': Accepted(
    zipped(PASSAGES), "psgs_w100.tsv.gz: 3 rows; the source's has 21,015,324"
  ),
  'passages cut off': Refused(
    zipped(PASSAGES, lambda data: data[:-9]), 'the gzipped data is damaged'
  ),
  'gzip under a plain name': Refused(
    put(PASSAGES, b'\x1f\x8b\x08'), 'does not end in .gz', PASSAGES
  ),
  'quote that does not end': Refused(
    append(PASSAGES, '4\t"text 4\ttitle\n'),
    'not end with its quote',
    PASSAGES,
    5,
  ),
  'quote that ends early': Refused(
    append(PASSAGES, '4\t"text" 4\ttitle\n'),
    'not end with its quote',
    PASSAGES,
    5,
  ),
  'quotes as they should be': Accepted(
    append(PASSAGES, '4\t"a ""text"" 4"\ttitle "4"\n')
  ),
  'title missing': Refused(
    append(PASSAGES, '4\ttext\n'), '2 columns, not 3', PASSAGES, 5
  ),
  'passage of a million characters in quotes': Accepted(
    append(PASSAGES, f'4\t"{"a " * 500_000}"\ttitle\n')
  ),
  'passage twice': Refused(
    append(PASSAGES, '3\ttext\tt\n'), "'3' is in lines 4 and 5", PASSAGES
  ),
  'passage without a text': Refused(
    append(PASSAGES, '4\t \tt\n'), "the passage '4' has no text", PASSAGES, 5
  ),
  'no passages': Refused(put(PASSAGES, ''), 'has no entries', PASSAGES),
  'passages missing': Refused(
    remove(PASSAGES), f'{PASSAGES}.gz (4,694.5 MB), or set --download'
  ),
  # Questions with contexts.
  'questions cut off': Refused(
    edit(TRAIN, lambda data: data[:-20]), 'a whole JSON array', TRAIN
  ),
  'questions cut off between two': Refused(
    put(TRAIN, f'[{json.dumps(question(1))},'), 'a whole JSON array', TRAIN
  ),
  'questions of no JSON': Refused(put(TRAIN, 'x'), 'a whole JSON arr', TRAIN),
  'questions of no UTF-8': Refused(
    put(TRAIN, b'[{"question": "\xff"}]'), 'a whole JSON array', TRAIN
  ),
  'no questions': Refused(put(TRAIN, '[]'), 'has no entries', TRAIN),
  'questions as an object': Refused(put(TRAIN, '{}'), 'has no entries', TRAIN),
  'question as a text': Refused(
    put(TRAIN, '["who"]'), 'question 1 is not an object', TRAIN
  ),
  'question without a text': asked("question 2 has no text: ' '", question=' '),
  'question as a number': asked('question 2 has no text: ', question=1),
  'no positive contexts': Accepted(
    put(TRAIN, json.dumps([question(1), question(2, positive_ctxs=[])])),
    'left out 1 questions without a positive',
  ),
  'no list of contexts': asked("has no list 'positive", positive_ctxs=None),
  'context as a text': asked(
    'a context that is not an object', positive_ctxs=['1']
  ),
  'context without an id': asked('a context without an id', positive_ctxs=[{}]),
  'negative that is no passage': Accepted(
    put(
      TRAIN,
      json.dumps([question(1, hard_negative_ctxs=[{'passage_id': 77}])]),
    ),
    'left out 1 of 1 negatives of BM25, which the corpus lacks',
  ),
  'positive that is no passage': Accepted(
    put(
      TRAIN,
      json.dumps([question(1), question(2, positive_ctxs=[{'psg_id': '77'}])]),
    ),
    'train: left out 1 queries without a positive passage',
  ),
  'contexts of another corpus': Refused(
    put(
      TRAIN,
      json.dumps([question(1, positive_ctxs=[{'passage_id': 'doc-1'}])]),
    ),
    "which judges 'doc-1', but ids such as '1'; check that",
  ),
  'context with the prefix of DPR': Accepted(
    put(
      TRAIN,
      json.dumps([question(1, positive_ctxs=[{'passage_id': 'wiki:2'}])]),
    )
  ),
  'answer as a text of contexts': asked('has no list of answers', answers='a'),
  'no answers': asked('has no list of answers', answers=[]),
  'training questions missing': Refused(
    remove(TRAIN), f'neither {TRAIN} nor {TRAIN}.gz'
  ),
  # Questions with answers alone.
  'sound answers': Accepted(settings(splits=('test',))),
  'answers as code': answered(
    "when\t__import__('os').getcwd()", 'is not a list of strings'
  ),
  'answers as a call': answered('when\t[print(1)]', 'is not a list of strings'),
  'answers as a sum': answered("when\t['a' + 'b']", 'is not a list of strings'),
  'answers as a text': answered("when\t'1970'", 'is not a list of strings'),
  'answers as numbers': answered('when\t[1970]', 'is not a list of strings'),
  'answers without an end': answered("when\t['a'", 'is not a list of strings'),
  'answers nested deep': answered(
    f'when\t{"[" * 5000}{"]" * 5000}', 'is not a list of strings'
  ),
  'empty list of answers': answered('when\t[]', 'is not a list of strings'),
  'answers missing': answered('when', '1 columns, not 2'),
  'spaces instead of a tab': answered("when ['a']", '1 columns, not 2'),
  'two sets of questions': Refused(
    put('trivia-test.qa.csv', "who\t['a']\n"), 'are nq, trivia; set it'
  ),
  'set that is not there': Refused(
    settings(questions='trivia'), 'neither biencoder-trivia-train.json'
  ),
  'answers for what has none': Refused(
    settings(**MARCO, protocol='answers'), 'has no answers; add'
  ),
  # Passages of MS MARCO.
  'passage with a second tab': columns(
    '3\ta\tb\n', '3 columns, not 2 with tabs between'
  ),
  'passage without a tab': columns('3 text\n', '1 columns, not 2 with tabs'),
  'quotes of MS MARCO stay': Accepted(marco(append(COLLECTION, '3\t"a\n'))),
  'empty passage of MS MARCO': columns(
    '3\t \n', "'3' has no text after its id"
  ),
  'long id without a text': columns(f'{"x" * 10**6}\t \n', 'has no text after'),
  'passage of MS MARCO twice': Refused(
    marco(append(COLLECTION, '2\ttext\n')), "'2' is in lines 3 and 4"
  ),
  'carriage return inside': columns('3\ta\rb\n', 'a carriage return is in'),
  'judgement of three columns': judged(
    '7\t1\t1', 'is not query id, 0, passage id'
  ),
  'judgement with spaces': Accepted(marco(append(QRELS, '7 Q0 2 3\n'))),
  'grade as a word': judged(
    '7\t0\t1\tyes', "the grade 'yes' is not a whole number"
  ),
  'two grades of a pair': judged('7\t0\t1\t2', 'the grades 1 and 2'),
  'judged passage missing': Accepted(
    marco(append(QRELS, '7\t0\t9\t1\n')),
    'warning: train: the corpus lacks 1 of 3 judged passages, such as ',
  ),
  'judged passages of another corpus': Refused(
    marco(put(QRELS, '7\t0\tD7\t1\n8\t0\tD8\t1\n')),
    "of 'train', which judges 'D7', 'D8', but ids such as '0'",
  ),
  'judged query missing': judged(
    '99\t0\t1\t1', "judged query '99' is not in the data"
  ),
  'collection missing': Refused(
    marco(remove(COLLECTION)), 'collectionandqueries.tar.gz (1,057.7 MB)'
  ),
  'queries missing': Refused(
    marco(remove('queries.train.tsv')), 'neither queries.train.tsv nor'
  ),
  'titles missing': Refused(
    lambda folder: {'dataset': 'msmarco_titled'}, 'neither para.title.txt nor'
  ),
}
