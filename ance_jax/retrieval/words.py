"""What BM25 takes for the words of a text, in every script."""

import itertools
import unicodedata

import regex
import Stemmer

# Of `--bm25_language`; the others are languages of Snowball.
AUTO, ENGLISH, NONE, BIGRAMS = 'auto', 'english', 'none', 'bigrams'
LANGUAGES = (AUTO, NONE, BIGRAMS, *sorted(Stemmer.algorithms()))

# Letters of scripts that put no space between words, and of Korean, which puts
# them between phrases: Lucene's CJKAnalyzer pairs its syllables, too. (Tibetan
# has a mark between syllables, which are its words here.)
_UNSPACED = (
  r'[[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Hangul}\p{Thai}\p{Lao}'
  r'\p{Khmer}\p{Myanmar}\p{Tai_Tham}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Viet}'
  r'\p{Javanese}\p{Balinese}\p{Yi}\p{Nushu}\p{Tangut}ー〆]&&\p{L}]'
)
# A letter with its marks, such as vowel signs and tones.
_CLUSTER = regex.compile(rf'(?V1){_UNSPACED}\p{{M}}*')
_RUN = regex.compile(rf'(?V1)(?:{_UNSPACED}\p{{M}}*)+')
# As Python's \w with the marks of letters, without which words of Indic
# scripts fall to pieces.
_WORD = regex.compile(r'[\p{L}\p{N}_][\p{L}\p{N}\p{M}_]*')
# Joiners and selectors of a glyph's form.
_INVISIBLE = regex.compile(
  r'[\u200c\u200d\u00ad\ufe00-\ufe0f\U000e0100-\U000e01ef]'
)
_LATIN = regex.compile(r'\p{Latin}')
# Texts of the corpus that are looked at, and characters of each.
_SAMPLE, _LENGTH = 1_000, 1_000
# Share of the sample's words from which a script or a language counts.
_ENOUGH = 0.05
# Frequent words of other languages in Latin letters, none of them English or
# usual in code; letters with accents tell most of the languages that lack here.
_FOREIGN = frozenset(
  'der und das ist nicht mit dem von eine auf auch sich het een van niet zijn '
  'voor maar les une dans pour que qui sur avec par elle ce los las para '
  'como una el di che della sono gli nel uma dos ao mais och att det '
  'som av inte til ikke af og jag jeg yang dan dengan untuk itu dari pada '
  'tidak adalah ya wa kwa katika ang mga bir bu je nie jest egy nem hogy '
  'az eta ez cum quod'.split()
)


def choose(texts, stop_words):
  """Returns the `--bm25_language` that fits a corpus, and why, for people.

  Args:
    texts: List of N passages, of which some are looked at.
    stop_words: Those of English.
  """
  counts = dict.fromkeys(('pairs', 'others', 'english', 'foreign', 'plain'), 0)
  for text in texts[:: max(1, len(texts) // _SAMPLE)]:
    for kind in _kinds(normalized(text[:_LENGTH]), stop_words):
      counts[kind] += 1
  number = max(sum(counts.values()), 1)
  share = {kind: count / number for kind, count in counts.items()}
  if share['pairs'] >= _ENOUGH:
    return BIGRAMS, f'{share["pairs"]:.1%} of it is in scripts without spaces'
  if share['others'] >= _ENOUGH:
    return NONE, f'{share["others"]:.1%} of words are in other alphabets'
  english, foreign = share['english'], share['foreign']
  seen = f'{english:.1%} of words are English stop words, {foreign:.1%} foreign'
  is_foreign = foreign >= _ENOUGH and foreign > english
  return NONE if is_foreign else ENGLISH, seen


def spaced(text, language):
  """Returns the words of a text, in small letters, a space between each.

  Args:
    text: str.
    language: Of `--bm25_language`, but English.
  """
  if language == 'turkish':
    text = text.replace('\u0130', 'i').replace('I', '\u0131')
  text = normalized(text)
  if language == BIGRAMS:
    text = _RUN.sub(_in_pairs, text)
  return ' '.join(_WORD.findall(text))


def normalized(text):
  """Returns a text in small letters, however its letters were encoded."""
  text = unicodedata.normalize('NFKC', text).casefold()
  text = unicodedata.normalize('NFKC', text.replace('i\u0307', 'i'))
  return _INVISIBLE.sub('', text)


def _in_pairs(run):
  """Returns each two neighbours of a run of letters, or the only one."""
  letters = _CLUSTER.findall(run[0])
  pairs = map(''.join, zip(letters, letters[1:], strict=False))
  return f' {" ".join(pairs) if len(letters) > 1 else run[0]} '


def _kinds(text, stop_words):
  """Yields what each word of a normalized text tells of its language."""
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
