"""BEIR folders as users make or download them, and hostile ones."""

import gzip
import json

from bad_input_tools import Accepted
from bad_input_tools import Refused
from bad_input_tools import append
from bad_input_tools import edit
from bad_input_tools import folder_as
from bad_input_tools import link
from bad_input_tools import pipe
from bad_input_tools import put
from bad_input_tools import remove
from bad_input_tools import rename
from bad_input_tools import settings
from bad_input_tools import together
from bad_input_tools import zipped

from ance_jax import config
from ance_jax.retrieval import bm25
from ance_jax.training import experiment

CORPUS, QUERIES, TRAIN, DEV = (
  'corpus.jsonl', 'queries.jsonl', 'qrels/train.tsv', 'qrels/dev.tsv'
)  # fmt: skip
ANSWERS, JSON_DEV = 'answers.jsonl', 'qrels/dev.jsonl'
HEADER = 'query-id\tcorpus-id\tscore\n'


def make_sound(folder, _):
  """Writes a BEIR folder with five passages, three queries and two splits."""
  put(CORPUS, ''.join(map(passage, range(5))))(folder)
  put(QUERIES, ''.join(record(_id=f'q{i}', text='what') for i in range(3)))(
    folder
  )
  put(TRAIN, f'{HEADER}q0\tp0\t1\nq1\tp1\t1\n')(folder)
  put(DEV, f'{HEADER}q2\tp2\t1\nq2\tp3\t0\n')(folder)


def use(folder, changes):
  """Loads the folder and indexes it with BM25."""
  changes = {'data_dir': str(folder), **(changes or {})}
  given = config.Config(dataset='beir', **changes)
  dataset = experiment.load_texts(given, (given.train_split, given.dev_split))
  bm25.make_rank(list(dataset.corpus.texts), k1=0.9, b=0.4)


def record(**values):
  """Returns a line of JSON."""
  return json.dumps(values) + '\n'


def passage(number):
  """Returns the corpus line of passage `number`."""
  return record(_id=f'p{number}', title=f't{number}', text=f'text {number}')


def sixth(data, says):
  """Returns the case of a bad sixth line of the corpus."""
  return Refused(append(CORPUS, data), says, CORPUS, 6)


def sixth_id(an_id, says):
  """Returns the case of a sixth passage with a bad id."""
  return sixth(record(_id=an_id, text='a'), says)


def fourth(data, says):
  """Returns the case of a bad fourth line of the queries."""
  return Refused(append(QUERIES, data), says, QUERIES, 4)


def judged(line, says):
  """Returns the case of a bad judgement."""
  return Refused(append(DEV, f'{line}\n'), says, DEV, 4)


def answered(line, says, number=1):
  """Returns the case of bad lines of answers."""
  return Refused(put(ANSWERS, line), says, ANSWERS, number)


def corpus_as(data, says, line=None):
  """Returns the case of a bad corpus file."""
  return Refused(put(CORPUS, data), says, CORPUS, line)


def judged_in_json(*lines):
  """Returns a `make` that writes dev as JSON lines, all for query q2."""
  lines = [{'query-id': 'q2', 'corpus-id': 'p2', **line} for line in lines]
  text = ''.join(record(**line) for line in lines)
  return together(remove(DEV), put(JSON_DEV, text))


def _utf16(data):
  return data.decode().encode('utf-16')


def _bomb(folder):
  (folder / CORPUS).unlink()
  with gzip.open(folder / f'{CORPUS}.gz', 'wb', 1) as file:
    file.write(b'{"_id": "')
    for _ in range(20):
      file.write(b'a' * 2**20)


def _moved(folder):
  (folder / 'nq').mkdir()
  for name in (CORPUS, QUERIES, 'qrels'):
    (folder / name).rename(folder / 'nq' / name)


def _both(folder):
  data = (folder / CORPUS).read_bytes()
  (folder / f'{CORPUS}.gz').write_bytes(gzip.compress(data))


def _linked(folder):
  (folder / CORPUS).rename(folder / 'elsewhere')
  (folder / CORPUS).symlink_to(folder / 'elsewhere')


def _crlf(data):
  return data.replace(b'\n', b'\r\n')


def _as_data_dir(name):
  return lambda folder: {'data_dir': str(folder / name)}


TABS = 'query id, passage id and grade with tabs between'
RAW = '{"_id": "x", "text": "a", "n": %s}\n'
DEEP = '[' * 100_000
NO_BYTES = b'{"_id": "x", "text": "a\0b"}\n'
CASES = {
  # The folder.
  'no folder named': Refused(settings(data_dir=''), '--data_dir is not given'),
  'no such folder': Refused(_as_data_dir('none'), 'none names nothing, and'),
  'file as folder': Refused(_as_data_dir(CORPUS), 'corpus.jsonl names a file'),
  'folder above': Refused(_moved, '/nq.'),
  'folder below': Refused(_as_data_dir('qrels'), 'holds dev.tsv, train.tsv)'),
  'no corpus': Refused(remove(CORPUS), 'neither corpus.jsonl nor'),
  'no queries': Refused(remove(QUERIES), 'neither queries.jsonl nor'),
  'corpus in CSV': Refused(rename(CORPUS, 'corpus.csv'), 'holds corpus.csv, q'),
  'capital name': Refused(rename(CORPUS, 'Corpus.jsonl'), 'holds Corpus.jsonl'),
  'json as ending': Refused(rename(CORPUS, 'corpus.json'), 'neither corpus.'),
  'plain and zipped': Accepted(_both, '1 of 2 files is read'),
  'linked corpus': Accepted(_linked),
  'folder as corpus': Refused(folder_as(CORPUS), 'there is a folder', CORPUS),
  'pipe as corpus': Refused(pipe(CORPUS), 'there is a pipe, socket', CORPUS),
  'device as corpus': Refused(
    link(CORPUS, '/dev/zero'), 'there is a pipe, socket or device', CORPUS
  ),
  'link to nothing': Refused(
    link(CORPUS, 'gone'), 'there is nothing, and a file', CORPUS
  ),
  'link to itself': Refused(
    link(CORPUS, CORPUS), 'there is a link to itself', CORPUS
  ),
  'pipe as judgements': Refused(pipe(DEV), 'there is a pipe', DEV),
  # Bytes.
  'Latin-1': sixth(
    '{"_id": "x", "text": "caf\xe9"}\n'.encode('latin-1'), 'is not UTF-8'
  ),
  'cut in a letter': sixth(
    '{"_id": "x", "text": "é'.encode()[:-1], 'is not UTF-8'
  ),
  'UTF-16': Refused(edit(CORPUS, _utf16), 'is not UTF-8', CORPUS, 1),
  'UTF-16 without BOM': Refused(
    edit(CORPUS, lambda data: data.decode().encode('utf-16-le')),
    'a NUL is in',
    CORPUS,
    1,
  ),
  'NUL': sixth(NO_BYTES, 'a NUL is in'),
  'old Mac line ends': Refused(
    edit(CORPUS, lambda data: data.replace(b'\n', b'\r')),
    'a carriage return is in',
    CORPUS,
    1,
  ),
  'BOM': Accepted(
    edit(CORPUS, lambda data: b'\xef\xbb\xbf' + data),
    '1 byte order mark removed',
  ),
  'CRLF': Accepted(edit(CORPUS, _crlf), '5 line ends of Windows (CRLF)'),
  'CRLF in judgements': Accepted(edit(DEV, _crlf), '3 line ends of Windows'),
  'BOM in judgements': Accepted(
    edit(DEV, lambda data: b'\xef\xbb\xbf' + data), '1 byte order mark removed'
  ),
  'empty lines': Accepted(append(CORPUS, '\n \n\n'), '3 empty lines left out'),
  'empty lines of queries': Accepted(append(QUERIES, '\n'), '1 empty lines'),
  'no newline at the end': Accepted(edit(CORPUS, bytes.rstrip)),
  'empty corpus': corpus_as('', 'the file has no entries'),
  'blank corpus': corpus_as('\n\n', 'the file has no entries'),
  'no queries in the file': Refused(
    put(QUERIES, ''), 'has no entries', QUERIES
  ),
  'huge line': sixth(
    b'{"_id": "x", "text": "' + b'a' * 2**24 + b'"}\n', 'more than 16,777,216'
  ),
  # Gzip.
  'zipped': Accepted(zipped(CORPUS)),
  'cut gzip': Refused(
    zipped(CORPUS, lambda d: d[: len(d) // 2]), 'data is damaged', CORPUS
  ),
  'gzip without its end': Refused(
    zipped(CORPUS, lambda d: d[:-8]), 'data is damaged', f'{CORPUS}.gz', 6
  ),
  'gzip of another sum': Refused(
    zipped(CORPUS, lambda d: d[:-8] + bytes(8)), 'CRC check failed', CORPUS
  ),
  'gzip with a spoilt middle': Refused(
    zipped(CORPUS, lambda d: d[:20] + b'\xff' * 9 + d[29:]), 'fetch it again'
  ),
  'something behind a gzip': Refused(
    zipped(CORPUS, lambda d: d + b'garbage'), 'data is damaged'
  ),
  'plain file in .gz': Refused(
    rename(CORPUS, f'{CORPUS}.gz'), 'not gzipped, and its name', CORPUS
  ),
  'empty file in .gz': Refused(
    together(remove(CORPUS), put(f'{CORPUS}.gz', '')),
    'not gzipped, and',
    CORPUS,
  ),
  'gzip without .gz': Refused(
    edit(CORPUS, gzip.compress), 'gzipped, and its name does not', CORPUS
  ),
  'gzip bomb': Refused(_bomb, 'more than 16,777,216 bytes', f'{CORPUS}.gz', 1),
  # JSON.
  'no JSON': sixth('{"_id": \n', 'not one JSON value'),
  'CSV inside': corpus_as('id,text\np0,hello\n', 'one JSON value', 1),
  'TSV inside': corpus_as('p0\thello\n', "('p0\\thello')", 1),
  'two objects in a line': sixth('{} {}\n', 'not one JSON value'),
  'object over lines': corpus_as('{\n"_id": "p0"}', 'not one JSON', 1),
  'single quotes': sixth("{'_id': 'x'}\n", 'not one JSON value'),
  'a list of all': corpus_as(
    '[{"_id": "p0", "text": "a"}]', 'is not a JSON object', 1
  ),
  'no object': sixth('[1]\n', 'is not a JSON object'),
  'null': sixth('null\n', 'is not a JSON object'),
  'tab in a string': sixth('{"_id": "x", "text": "a\tb"}\n', 'one JSON value'),
  'nested deep': sixth(DEEP, 'nested a thousand deep or more'),
  'nested deep below a key': sixth(
    '{"_id": "x", "text": "a", "m": ' + '{"a":' * 50_000, 'nested a thousand'
  ),
  'NaN': sixth(RAW % 'NaN', "'NaN' is not a finite number"),
  'infinity': sixth(RAW % '-Infinity', 'is not a finite number'),
  'number beyond floats': sixth(RAW % '1e999', 'is not a finite number'),
  '10,000 digits': sixth(RAW % ('9' * 10_000), '10,000 digits, more than 300'),
  'key twice': sixth(
    '{"_id": "x", "text": "a", "text": "b"}\n', "the key 'text' is 2 times in"
  ),
  'more keys': Accepted(append(CORPUS, record(_id='x', text='a', metadata={}))),
  # Passages.
  'no id': sixth(record(text='a'), "no '_id' among the keys 'text'"),
  'id, not _id': Accepted(
    append(CORPUS, record(id='x', text='a')), "1 lines with 'id' for '_id'"
  ),
  'id beside _id': Accepted(
    append(CORPUS, record(_id='x', id='p3', text='a')),
  ),
  'neither id nor _id': sixth(record(docid='x', text='a'), 'name it _id'),
  'contents, not text': sixth(record(_id='x', contents='a'), 'name it text'),
  'empty object': sixth('{}\n', 'among the keys none'),
  'number as id': Accepted(
    append(CORPUS, record(_id=7, text='a')),
    '1 ids that are numbers, read as their digits',
  ),
  'number as id of two': Refused(
    append(CORPUS, record(_id=7, text='a') + record(_id='7', text='a')),
    "the id '7' is in lines 6 and 7",
    CORPUS,
  ),
  'fraction as id': sixth(
    record(_id=7.0, text='a'), "7.0 as '_id' is not a string; quote it"
  ),
  'true as id': sixth(
    record(_id=True, text='a'), "True as '_id' is not a string; quote it"
  ),
  'null as id': sixth(
    record(_id=None, text='a'), "None as '_id' is not a string"
  ),
  'null as text': Accepted(
    append(CORPUS, record(_id='x', title='t', text=None)),
    "1 times null as 'text', read as empty",
  ),
  'null as query': fourth(
    record(_id='q9', text=None), "'q9' has no text; give it"
  ),
  'list as text': sixth(
    record(_id='x', text=['a', 'b']),
    "['a', 'b'] as 'text' is not a string; join its",
  ),
  'object as text': sixth(record(_id='x', text={'en': 'a'}), 'its text alone'),
  'number as text': sixth(
    record(_id='x', text=7), "7 as 'text' is not a string; quote it"
  ),
  'title a list': sixth(
    record(_id='x', text='a', title=['b']), "as 'title' is no"
  ),
  'title a number': sixth(
    record(_id='x', text='a', title=3), "as 'title' is no"
  ),
  'title null': Accepted(append(CORPUS, record(_id='x', text='a', title=None))),
  'empty text': Accepted(
    append(CORPUS, record(_id='x', text=' ')), '1 passages without a title and'
  ),
  'empty title and text': Accepted(
    append(CORPUS, record(_id='x', text='', title=' ')), 'kept empty'
  ),
  'title alone': Accepted(
    append(CORPUS, record(_id='x', text='', title='b')),
    '1 passages without a text, whose title is taken for it',
  ),
  'half a surrogate pair': Accepted(
    append(CORPUS, '{"_id": "x", "text": "a \\ud83d b"}\n'),
    '1 texts with half a surrogate pair, read as ?',
  ),
  'duplicate passage': Refused(
    append(CORPUS, record(_id='p3', text='a')),
    "the id 'p3' is in lines 4 and 6",
    CORPUS,
  ),
  'duplicate behind an empty line': Refused(
    append(CORPUS, '\n' + record(_id='p3', text='a')),
    "the id 'p3' is in lines 4 and 7",
    CORPUS,
  ),
  'id in another case': Accepted(append(CORPUS, record(_id='P3', text='a'))),
  'id of letters of elsewhere': Accepted(
    append(CORPUS, record(_id='東京-é', text='a'))
  ),
  'space in an id': sixth_id('p 3', 'has a space'),
  'space behind an id': sixth_id('p3 ', 'has a space'),
  'newline in an id': sixth_id('p3\n', 'has a space'),
  'no characters in an id': sixth_id('', "the id '' is empty"),
  'NUL in an id': sixth_id('p\0', 'an invisible character'),
  'escape in an id': sixth_id('\x1b[2J', 'an invisible character'),
  'half a surrogate pair in an id': sixth_id(
    '\ud83d', 'an invisible character'
  ),
  'id of a megabyte': sixth_id('a' * 2**20, 'is longer than 500; shorten it'),
  'id of 501': sixth_id('a' * 501, 'an id of 501 characters, beginning'),
  'id of 500': Accepted(append(CORPUS, record(_id='a' * 500, text='a'))),
  'only stop words': Refused(
    put(CORPUS, ''.join(record(_id=f'p{i}', text='the') for i in range(5))),
    'no words for BM25 to index',
  ),
  # Queries.
  'duplicate query': Refused(
    append(QUERIES, record(_id='q1', text='a')),
    "the id 'q1' is in lines 2 and 4",
    QUERIES,
  ),
  'query without a text': fourth(
    record(_id='q9', text=''), 'has no text; give it one'
  ),
  'number as query id': Accepted(
    together(
      append(QUERIES, record(_id=9, text='a')), append(DEV, '9\tp2\t1\n')
    ),
    '1 ids that are numbers, read as their digits',
  ),
  'query, not text': fourth(record(_id='q9', query='a'), 'name it text'),
  'space in a query id': fourth(record(_id='q 9', text='a'), 'has a space'),
  'Latin-1 in a query': fourth(b'{"_id": "\xe9"}', 'is not UTF-8'),
  # Judgements.
  'no header': Accepted(put(DEV, 'q2\tp2\t1\n')),
  'other header': Accepted(put(DEV, 'qid\tdocid\trelevance\nq2\tp2\t1\n')),
  'judgements in JSON': Accepted(
    judged_in_json({'score': 1}, {'score': 0.0, 'corpus-id': 'p3'}),
    '1 grades with a decimal point, such as 1.0, read as whole numbers',
  ),
  'header with a space': Accepted(
    put(DEV, 'query id\tcorpus-id\tscore\nq2\tp2\t1\n'),
    'dev: 1 queries, 1 judged passages',
  ),
  'judgements in both forms': Accepted(
    together(put(JSON_DEV, '[]'), append(DEV, 'q2\tp4\t1\n')),
    'dev: 1 queries, 3 judged passages',
  ),
  'judgements in JSON with numbers': Accepted(
    together(
      append(CORPUS, record(_id='7', text='a')),
      judged_in_json({'score': 1, 'corpus-id': 7}),
    ),
    'dev: 1 queries, 1 judged passages',
  ),
  'no score in JSON': Refused(
    judged_in_json({}), "no 'score' among", JSON_DEV, 1
  ),
  'half a score in JSON': Refused(
    judged_in_json({'score': 0.5}),
    "grade '0.5' is not a whole number;",
    JSON_DEV,
    1,
  ),
  'no passage in JSON': Refused(
    judged_in_json({'corpus-id': None}), "as 'corpus-id' is no", JSON_DEV, 1
  ),
  'all TREC columns': Accepted(
    put(DEV, 'q2 0 p2 1\nq2 Q0 p3 0\n'), 'read as judgements of TREC, of four'
  ),
  'all TREC columns with tabs and a header': Accepted(
    put(DEV, 'query\titer\tpassage\tgrade\nq2\t0\tp2\t1\n'),
    'dev: 1 queries, 1 judged passages',
  ),
  'BEIR columns in TREC': Refused(
    put(DEV, 'q2 0 p2 1\nq2\tp3\t0\n'), TABS, DEV, 2
  ),
  'a column too many': Refused(
    put(DEV, 'q2\tp2\t1\ttest\n'), "grade 'test' is not a whole number;", DEV, 1
  ),
  'TREC columns': judged('q2 0 p2 1', TABS),
  'TREC columns with tabs': judged('q2\t0\tp2\t1', TABS),
  'two columns': judged('q2\tp2', TABS),
  'commas': judged('q2,p2,1', TABS),
  'spaces between': judged('q2 p2 1', TABS),
  'tab at the end': judged('q2\tp2\t1\t', TABS),
  'header of spaces': Refused(
    put(DEV, 'query-id corpus-id score\nq2\tp2\t1\n'), TABS, DEV, 1
  ),
  'second header': judged(
    HEADER.strip(), "grade 'score' is not a whole number"
  ),
  'float grade': Accepted(
    put(DEV, f'{HEADER}q2\tp2\t1.0\n'), '1 grades with a decimal point, such as'
  ),
  'float grade first': Refused(put(DEV, 'q2\tp2\t0.5\n'), "'0.5'", DEV, 1),
  # A first line with a grade is not a header.
  'unknown ids first': Refused(
    put(DEV, 'q9\tnope\t1\nq2\tp2\t1\n'), "'q9'", DEV, 1
  ),
  'word as grade first': Refused(
    put(DEV, 'q2\tp2\trelevant\n'), "'relevant' is not a whole number", DEV, 1
  ),
  'no grade': judged('q2\tp2\t', "the grade '' is not a whole number"),
  'two signs': judged('q2\tp2\t--1', "grade '--1' is not a whole number"),
  'grade in other digits': judged('q2\tp2\t١', 'is not a whole number'),
  'NaN as grade': judged('q2\tp2\tnan', "grade 'nan' is not a whole number"),
  'grade of a billion': judged(
    'q2\tp2\t1000000000', 'number from -1000 to 1000'
  ),
  'grade of 1,001': judged('q2\tp2\t1001', 'number from -1000 to 1000'),
  'grade of -1,001': judged('q2\tp2\t-1001', 'number from -1000 to 1000'),
  'grade of 1,000 and -1,000': Accepted(
    append(DEV, 'q2\tp4\t1000\nq2\tp1\t-1000\n')
  ),
  'grade of 10,000 digits': judged(
    f'q2\tp2\t{"9" * 10_000}', 'number from -1000'
  ),
  'negative grade': Accepted(append(DEV, 'q2\tp4\t-1\n')),
  'unknown passage': Accepted(
    append(DEV, 'q2\tnope\t1\n'),
    "warning: dev: the corpus lacks 1 of 3 judged passages, such as 'nope'; ch",
  ),
  'unknown passage twice': Accepted(
    append(DEV, 2 * 'q2\tnope\t1\n'), '1 repeated judgements, read once'
  ),
  'unknown passage of two grades': Refused(
    append(DEV, 'q2\tnope\t1\nq2\tnope\t2\n'), 'has the grades 1 and 2', DEV, 5
  ),
  'unknown passage to train on': Accepted(
    append(TRAIN, 'q2\tnope\t1\n'),
    'train: left out 1 queries without a positive passage',
  ),
  'no passage known': Refused(
    put(DEV, 'q2\tx1\t1\nq1\tx2\t1\n'),
    "of 'dev', which judges 'x1', 'x2', but ids such as 'p0'",
  ),
  'no relevant passage known': Refused(
    put(DEV, 'q2\tx1\t1\nq2\tp2\t0\n'), 'corpus has none of the relevant pass'
  ),
  'unknown query': judged('nope\tp2\t1', "the judged query 'nope' is not in"),
  'columns swapped': judged('p2\tq2\t1', "the judged query 'p2' is not in"),
  'id in another case judged': Accepted(
    append(DEV, 'q2\tP2\t1\n'), "passages, such as 'P2';"
  ),
  'space behind a judged id': judged('q2\tp2 \t1', 'remove the spaces around'),
  'quoted ids': Accepted(
    append(DEV, '"q2"\t"p2"\t1\n'), '1 repeated judgements, read once'
  ),
  'all in quotes': Accepted(
    put(DEV, '"query-id"\t"corpus-id"\t"score"\n"q2"\t"p2"\t"1"\n'),
    'dev: 1 queries, 1 judged passages',
  ),
  'quote without an end': judged('"q2\tp2\t1', 'not end with its quote'),
  'two grades': judged('q2\tp2\t2', 'the pair has the grades 1 and 2'),
  'two grades, the lower one last': judged(
    'q2\tp2\t0', 'pair has the grades 1 and 0'
  ),
  'same judgement twice': Accepted(
    append(DEV, 'q2\tp2\t1\n'), '1 repeated judgements, read once'
  ),
  'huge judgement': judged('a' * 2**24, 'more than 16,777,216 bytes'),
  'Latin-1 in a judgement': Refused(
    append(DEV, b'q2\tp\xe9\t1\n'), 'is not UTF-8', DEV, 4
  ),
  'no judgements to train on': Refused(
    remove(TRAIN), "no judged queries of split 'train' are in"
  ),
  'header alone': Refused(put(TRAIN, HEADER), "of split 'train' are in"),
  'no folder of judgements': Refused(remove('qrels'), 'which is not a folder'),
  'judgements beside the folder': Refused(
    together(rename(TRAIN, 'train.tsv'), rename(DEV, 'dev.tsv')),
    'where there is nothing',
  ),
  'judgements in .txt': Refused(
    rename(TRAIN, 'qrels/train.txt'), 'where there is dev.tsv, train.txt'
  ),
  'no positives': Refused(
    put(TRAIN, f'{HEADER}q0\tp0\t0\n'),
    "none of the 1 queries of split 'train' has",
  ),
  'queries without a positive': Accepted(
    append(TRAIN, 'q2\tp0\t0\n'), 'left out 1 queries without a positive'
  ),
  'dev without positives': Refused(
    put(DEV, 'q2\tp2\t0\nq1\tp2\t-1\n'),
    "none of the 2 queries of split 'dev' has a positive passage",
  ),
  'dev without positives but with answers': Accepted(
    together(
      put(DEV, 'q2\tp2\t0\n'),
      put(ANSWERS, record(_id='q2', answers=['a']), protocol='answers'),
    )
  ),
  'no positives but answers': Refused(
    together(
      put(TRAIN, f'{HEADER}q0\tp0\t0\n'),
      put(
        ANSWERS,
        ''.join(record(_id=f'q{i}', answers=['a']) for i in range(3)),
        protocol='answers',
      ),
    ),
    "none of the 1 queries of split 'train' has a positive passage",
  ),
  'dev without judgements': Refused(put(DEV, HEADER), "of split 'dev' are in"),
  'nothing held out': Accepted(
    lambda folder: {**(remove(DEV)(folder) or {}), 'dev_fraction': 0.0},
    'nothing is scored on dev',
  ),
  'too little held out': Refused(
    lambda folder: {**(remove(DEV)(folder) or {}), 'dev_fraction': 0.0001},
    "--dev_fraction=0.0001 leaves no query to 'dev': it holds out that share",
  ),
  'all held out': Refused(
    lambda folder: {**(remove(DEV)(folder) or {}), 'dev_fraction': 0.9999},
    "--dev_fraction=0.9999 leaves no query to 'train': it holds out that sha",
  ),
  # Answers.
  'answers': Accepted(put(ANSWERS, record(_id='q0', answers=['a', 'b']))),
  'answer as a text': answered(
    record(_id='q0', answers='a'), "as 'answers' is not a list of strings"
  ),
  'answer as a number': answered(
    record(_id='q0', answers=[1970]), "as 'answers' is not a list of strings"
  ),
  'empty answer': answered(
    record(_id='q0', answers=['a', ' ']),
    "['a', ' '] as 'answers' is not a list",
  ),
  'answers by another name': answered(
    record(_id='q0', answer=['a']), "as 'answers' is not a list of strings"
  ),
  'answer to no query': answered(
    record(_id='q9', answers=['a']), "answered query 'q9' is not in the data"
  ),
  'answered twice': answered(
    2 * record(_id='q0', answers=['a']), 'has answers in an earlier line', 2
  ),
  'split that is not there': Refused(
    settings(train_split='trian'), 'where there is dev.tsv, train.tsv; name'
  ),
}
