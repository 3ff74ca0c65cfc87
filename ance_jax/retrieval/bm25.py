"""BM25 (Robertson et al. 1994) by bm25s, for baselines and negatives."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import logging
import unicodedata

import numpy as np
import Stemmer

from ance_jax import errors
from ance_jax.core import logs
from ance_jax.core import strict_io
from ance_jax.data import trec
from ance_jax.retrieval import index
from ance_jax.retrieval import words

_QUERIES_AT_ONCE = 256
# Print a line if more than one in `_SAID` queries matches no passage; raise an
# error if more than one in `_REFUSED` does.
_SAID, _REFUSED = 100, 2


def make_rank(
  texts: Sequence[str],
  *,
  k1: float,
  b: float,
  language: str = words.AUTO,
  queries: Sequence[str] = (),
) -> Callable[..., trec.Ranking]:
  """Indexes `texts`; returns rank(queries, k, what='bm25') -> `trec.Ranking`.

  It uses Lucene's variant. Passages that share no word with a query are not
  ranked for it. `what` labels a progress bar; None shows no bar.

  Args:
    texts: N passages.
    k1: Term saturation.
    b: Length normalisation.
    language: `--bm25_language`.
    queries: Queries to check in advance for words that the passages contain.

  Raises:
    BadInput: The passages contain no words, or more than half of the queries
      share no word with them.
  """
  # Imported here because the import takes a second and runs a jax computation,
  # which must not happen before jax.distributed is initialized.
  import bm25s

  # It would log a line per index.
  logging.getLogger('bm25s').setLevel(logging.WARNING)
  why = ''
  if language == words.AUTO:
    language, why = words.choose(texts, frozenset(bm25s.stopwords.STOPWORDS_EN))
    why = f' (auto: {why})'
  logs.log(
    f'bm25: indexing {len(texts):,} passages, --bm25_language={language}{why}'
  )
  tokenize = _make_tokenize(bm25s, language)
  bm25 = bm25s.BM25(method='lucene', k1=k1, b=b)
  found = tokenize(
    logs.progress(
      texts, 'cut the passages into words', total=len(texts), unit='passages'
    )
  )
  if not any(found.ids):
    raise errors.refusal(
      f'the {len(texts):,} passages have no words for BM25 to index, only stop '
      'words and marks',
      'choose rows without bm25',
    )
  with logs.working('index with BM25'):
    bm25.index(found, show_progress=logs.has_bars(), leave_progress=False)
  _check(queries, tokenize, found.vocab.keys(), language)

  def rank(queries, k, what='bm25'):
    asked = tokenize(queries, return_ids=False)

    def find(numbers, depth):
      rows, scores = bm25.retrieve(
        [asked[n] for n in numbers], k=depth, show_progress=False
      )
      return scores, np.where(scores > 0, rows, -1)

    return index.top_k(
      find, np.arange(len(queries)), k, len(texts), what, _QUERIES_AT_ONCE
    )

  return rank


def _make_tokenize(bm25s, language):
  """Returns tokenize(texts) -> `bm25s.tokenization.Tokenized`, or words."""
  # English keeps the default pattern of bm25s, which omits one-letter words.
  # NFC joins letters and combining accents into one character.
  prepare, pattern = functools.partial(unicodedata.normalize, 'NFC'), {}
  if language != words.ENGLISH:
    prepare = functools.partial(words.spaced, language=language)
    pattern = {'token_pattern': r'\S+'}
  stemmer, stop_words = None, []
  if language not in (words.NONE, words.BIGRAMS):
    stemmer = Stemmer.Stemmer(language)
    name = 'EN' if language == words.ENGLISH else language.upper()
    stop_words = getattr(bm25s.stopwords, f'STOPWORDS_{name}', ())

  def tokenize(texts, **kwargs):
    return bm25s.tokenize(
      map(prepare, texts),
      stopwords=stop_words,
      stemmer=stemmer,
      show_progress=False,
      **pattern,
      **kwargs,
    )

  return tokenize


def _check(queries, tokenize, vocabulary, language):
  """Logs how many queries match no passage; raises `BadInput` if most do."""
  found = tokenize(queries, return_ids=False)
  lost = [n for n, asked in enumerate(found) if vocabulary.isdisjoint(asked)]
  if _SAID * len(lost) <= len(found):
    return
  said = (
    f'BM25 finds no passage for {len(lost):,} of {len(found):,} queries '
    f'({len(lost) / len(found):.1%}), the first of them '
    f'{strict_io.quoted(queries[lost[0]])}, as they share no word with any by '
    f'--bm25_language={language}'
  )
  if _REFUSED * len(lost) > len(found):
    raise errors.refusal(
      said,
      'set it to what the texts are in, or leave BM25 out if queries and '
      'passages are in different languages',
    )
  logs.log(said)
