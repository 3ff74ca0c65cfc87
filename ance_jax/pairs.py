"""A file of pairs: pairs.jsonl, and perhaps a corpus.jsonl beside it.

What sentence-transformers trains on and `mine_hard_negatives` is given: texts
without ids. Equal queries are one query, equal passages one passage.
"""

import array
import collections

from ance_jax import beir
from ance_jax import data
from ance_jax import reading
from ance_jax import records

_LINE = '{"anchor": ..., "positive": ...}'
_QUERY_KEYS = ('anchor', 'query')


def read(config):
  """Returns the `data.Source` of the folder `--data_dir`."""
  folder = records.open_folder(config, 'pairs.jsonl')
  path = records.existing(folder, 'pairs.jsonl', 'a folder of pairs')
  queries, positives, judged = _read_pairs(path)
  corpus, rows = _read_corpus(folder, path, positives)
  records.say_corpus(folder.name, corpus)
  judgements = {(query, rows[place]): 1 for query, place in judged}
  ids = [f'q{row}' for row in range(len(queries))]

  def read_split(name):
    if name != config.train_split:
      return None
    return data.Judged(ids, queries, judgements)

  return data.Source(corpus, read_split, path)


def _read_pairs(path):
  """Returns the queries, the positives, and pairs of places in the two.

  The positives are {text: (place, first line)}.
  """
  queries, positives, judged = {}, {}, {}
  counts = collections.Counter()
  for line, record in records.json_lines(path, _LINE, 'read the pairs'):
    keys = [key for key in _QUERY_KEYS if key in record]
    if set(record) != {*keys[:1], 'positive'} or not keys:
      raise reading.bad(
        path, "a line must have 'anchor' or 'query', 'positive', and no more",
        records.keys_of(record),
        f'give each line as {_LINE}', line
      )  # fmt: skip
    texts = [
      records.text(path, line, record, key, counts)
      for key in (keys[0], 'positive')
    ]
    for text in texts:
      if not text.strip():
        raise reading.bad(
          path, 'a query and a positive must have a text', reading.quoted(text),
          'remove the line', line
        )  # fmt: skip
    query = queries.setdefault(texts[0], len(queries))
    place, _ = positives.setdefault(texts[1], (len(positives), line))
    counts['pairs that stand twice, read once'] += (query, place) in judged
    judged[query, place] = True
  records.check_any(path, queries)
  records.say_counts(path, +counts)
  return list(queries), positives, list(judged)


def _read_corpus(folder, path, positives):
  """Returns the `data.Corpus`, and the row of each positive.

  What corpus.jsonl has comes first, then the positives that are not in it; one
  that is may be there as text alone, or as title, space and text.
  """
  writer, lines, rows = data.CorpusWriter(), array.array('q'), {}
  counts = collections.Counter()
  given = records.find(folder, 'corpus.jsonl')
  for line, an_id, title, text in beir.passages(given, counts) if given else ():
    for whole in (text, f'{title} {text}'):
      if whole in positives:
        rows.setdefault(whole, len(writer))
    writer.add(an_id, title, text)
    lines.append(line)
  for text, (_, line) in positives.items():
    if text not in rows:
      rows[text] = len(writer)
      writer.add(f'pairs-{line}', '', text)
      lines.append(line)
  records.say_counts(given, counts)
  return records.corpus(given or path, writer, lines), [
    rows[text] for text in positives
  ]
