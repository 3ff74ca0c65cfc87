"""BM25 (Robertson et al. 1994) through bm25s: baseline, and negatives."""

import numpy as np
import Stemmer

from ance_jax import config as config_lib
from ance_jax import index
from ance_jax import logs

_QUERIES_AT_ONCE = 256


def make_rank(texts, *, k1, b):
  """Returns rank(queries, k) -> `index.Ranking`, of an index of `texts`.

  Lucene's variant, Snowball's English stemmer, English stop words. A passage
  without a word of the query is not found.

  Args:
    texts: List of N passages.
    k1: Term saturation.
    b: Length normalisation.

  Raises:
    BadInput: There is no word in all of the texts.
  """
  # It computes with jax when it is imported, which several processes must not
  # before they have found each other; and that takes a second.
  import bm25s

  stemmer = Stemmer.Stemmer('english')

  def tokenize(texts, **kwargs):
    return bm25s.tokenize(
      texts,
      stopwords='en',
      stemmer=stemmer,
      leave=False,
      show_progress=logs.has_bars(),
      **kwargs,
    )

  logs.say(f'bm25: indexing {len(texts):,} passages')
  bm25 = bm25s.BM25(method='lucene', k1=k1, b=b)
  with logs.working('cut the passages into words'):
    words = tokenize(texts)
  if not any(words.ids):
    raise config_lib.BadInput(
      'BM25 must have words to index; found stop words and marks alone in '
      f'{len(texts):,} passages; choose rows without bm25.'
    )
  with logs.working('index with BM25'):
    bm25.index(words, show_progress=logs.has_bars(), leave_progress=False)

  def rank(queries, k, what='bm25'):
    asked = tokenize(queries, return_ids=False)

    def find(numbers, depth):
      rows, scores = bm25.retrieve(
        [asked[n] for n in numbers], k=depth, show_progress=False
      )
      return scores, np.where(scores > 0, rows, -1)

    starts = range(0, len(queries), _QUERIES_AT_ONCE)
    if what:
      starts = logs.progress(starts, what, total=len(starts), unit='batches')
    parts = [
      index.top_k(
        find,
        np.arange(start, min(start + _QUERIES_AT_ONCE, len(queries))),
        k,
        len(texts),
      )
      for start in starts
    ]
    return index.Ranking(
      *(np.concatenate(part) for part in zip(*parts, strict=True))
    )

  return rank
