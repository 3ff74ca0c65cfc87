"""Splits texts of any script into words for BM25."""

import collections
from collections.abc import Sequence
from collections.abc import Set
import itertools
import unicodedata

import regex
import Stemmer

# Values of `--bm25_language`; the others are Snowball's languages.
AUTO, ENGLISH, NONE, BIGRAMS = 'auto', 'english', 'none', 'bigrams'
LANGUAGES = (AUTO, NONE, BIGRAMS, *sorted(Stemmer.algorithms()))

# Letters of scripts without spaces between words, and of Korean, whose spaces
# separate phrases: Lucene's CJKAnalyzer also pairs its syllables. (Tibetan
# marks the ends of syllables, which count as words here.)
_UNSPACED = (
  r'[[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Hangul}\p{Thai}\p{Lao}'
  r'\p{Khmer}\p{Myanmar}\p{Tai_Tham}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Viet}'
  r'\p{Javanese}\p{Balinese}\p{Yi}\p{Nushu}\p{Tangut}ー〆]&&\p{L}]'
)
# A letter with its marks (vowel signs, tones).
_CLUSTER = regex.compile(rf'(?V1){_UNSPACED}\p{{M}}*')
_RUN = regex.compile(rf'(?V1)(?:{_UNSPACED}\p{{M}}*)+')
# Python's \w plus combining marks, without which Indic words would be split.
_WORD = regex.compile(r'[\p{L}\p{N}_][\p{L}\p{N}\p{M}_]*')
# Joiners, soft hyphens and variation selectors.
_INVISIBLE = regex.compile(
  r'[\u200c\u200d\u00ad\ufe00-\ufe0f\U000e0100-\U000e01ef]'
)
_LATIN = regex.compile(r'\p{Latin}')
# Texts of the corpus to sample, and characters of each.
_SAMPLE, _LENGTH = 1_000, 1_000
# Minimum share of a script or language among the sample's words.
_ENOUGH = 0.05
# Frequent words of other languages in Latin letters that are neither English
# nor common in code; accented letters reveal most languages not listed here.
_FOREIGN = frozenset(
  'der und das ist nicht mit dem von eine auf auch sich het een van niet zijn '
  'voor maar les une dans pour que qui sur avec par elle ce los las para '
  'como una el di che della sono gli nel uma dos ao mais och att det '
  'som av inte til ikke af og jag jeg yang dan dengan untuk itu dari pada '
  'tidak adalah ya wa kwa katika ang mga bir bu je nie jest egy nem hogy '
  'az eta ez cum quod'.split()
)


def choose(texts: Sequence[str], stop_words: Set[str]) -> tuple[str, str]:
  """Returns the `--bm25_language` that fits a corpus, and the reason to log.

  Args:
    texts: N passages, of which a sample is read.
    stop_words: English stop words.
  """
  counts = collections.Counter(
    kind
    for text in texts[:: max(1, len(texts) // _SAMPLE)]
    for kind in _kinds(normalized(text[:_LENGTH]), stop_words)
  )
  number = max(counts.total(), 1)
  pairs, others, english, foreign = (
    counts[kind] / number for kind in ('pairs', 'others', 'english', 'foreign')
  )
  if pairs >= _ENOUGH:
    return BIGRAMS, f'{pairs:.1%} of it is in scripts without spaces'
  if others >= _ENOUGH:
    return NONE, f'{others:.1%} of words are in other alphabets'
  seen = f'{english:.1%} of words are English stop words, {foreign:.1%} foreign'
  is_foreign = foreign >= _ENOUGH and foreign > english
  return NONE if is_foreign else ENGLISH, seen


def spaced(text: str, language: str) -> str:
  """Returns the words of a text, lower-cased and separated by single spaces.

  Args:
    text: Passage or query.
    language: Value of `--bm25_language` except English.
  """
  if language == 'turkish':
    text = text.replace('\u0130', 'i').replace('I', '\u0131')
  text = normalized(text)
  if language == BIGRAMS:
    text = _RUN.sub(_in_pairs, text)
  return ' '.join(_WORD.findall(text))


def normalized(text: str) -> str:
  """Returns a text case-folded, in NFKC and without invisible characters."""
  text = unicodedata.normalize('NFKC', text).casefold()
  text = unicodedata.normalize('NFKC', text.replace('i\u0307', 'i'))
  return _INVISIBLE.sub('', text)


def _in_pairs(run):
  """Returns all pairs of adjacent letters in a run, or its single letter."""
  letters = _CLUSTER.findall(run[0])
  pairs = map(''.join, zip(letters, letters[1:], strict=False))
  return f' {" ".join(pairs) if len(letters) > 1 else run[0]} '


def _kinds(text, stop_words):
  """Yields the kind of each word of a normalized text; see `choose`."""
  yield from itertools.repeat('pairs', len(_CLUSTER.findall(text)))
  for word in _WORD.findall(_RUN.sub(' ', text)):
    if not _LATIN.search(word):
      if not word.isascii():
        yield 'others'
    elif word in stop_words:
      yield 'english'
    elif word in _FOREIGN or not word.isascii():
      yield 'foreign'
    else:
      yield 'plain'
