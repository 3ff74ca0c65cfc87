"""Whether a text holds an answer: DPR's rule, for questions with answers.

Karpukhin et al. 2020, dpr/data/qa_validation.py (`has_answer`): the tokens of
an answer stand in the text, in a row, case and Unicode form aside; or, for
answers that are regular expressions (CuratedTREC), one is found in it. Only the
text counts, not the title.
"""

import functools
import unicodedata

import numpy as np
import regex

from ance_jax import errors
from ance_jax.core import logs

# dpr/utils/tokenizers.py, SimpleTokenizer: words, else single characters that
# are neither spaces nor control characters.
_TOKEN = r'[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]'
# Passages whose tokens are kept; the same few are mined for many queries.
_TEXTS_KEPT = 100_000
# Of a regular expression in one text; some double their time with each letter.
_MAX_SECS = 10


class BadPattern(errors.BadInput):
  """An answer is no regular expression that can be searched for."""


def tokens(text):
  """Returns the tokens of a text, a space around each.

  No token holds a space, so that tokens stand in a row in a text where their
  string stands in its.
  """
  found = regex.findall(_TOKEN, unicodedata.normalize('NFD', text))
  return f' {" ".join(found)} '.lower()


def is_in(pattern, text):
  """Returns whether a regular expression of CuratedTREC is found in a text.

  Args:
    pattern: The expression.
    text: The text, in Unicode form NFD.

  Raises:
    BadPattern: It is no regular expression, or takes far too long.
  """
  flags = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
  pattern = unicodedata.normalize('NFD', pattern)
  try:
    return regex.search(pattern, text, flags, timeout=_MAX_SECS) is not None
  except (regex.error, TimeoutError) as error:
    raise BadPattern(str(error) or 'too slow') from error


def held(rows, answers, texts, are_patterns, what='match answers'):
  """Returns which passages hold an answer of their query, (q, K) bool.

  Args:
    rows: (q, K) int32 passage rows, -1 where there is none.
    answers: q lists of strings.
    texts: Texts of all passages.
    are_patterns: Whether answers are regular expressions.
    what: Name of the phase for the progress bar.
  """

  @functools.lru_cache(_TEXTS_KEPT)
  def passage(row):
    if are_patterns:
      return unicodedata.normalize('NFD', texts[row])
    return tokens(texts[row])

  found = np.zeros(rows.shape, bool)
  for query, ranking in enumerate(
    logs.progress(rows.tolist(), what, total=len(rows), unit='queries')
  ):
    if are_patterns:
      tests = [functools.partial(is_in, each) for each in answers[query]]
    else:
      tests = [_holder(tokens(answer)) for answer in answers[query]]
    found[query] = [
      row >= 0 and any(test(passage(row)) for test in tests) for row in ranking
    ]
  return found


def without(negatives, answers, texts, are_patterns, what):
  """Returns negatives that hold no answer, in their order, none put in place.

  Args:
    negatives: (q, K) int32 passage rows.
    answers: q lists of strings.
    texts: Texts of all passages.
    are_patterns: Whether answers are regular expressions.
    what: Name of the phase for the progress bar.

  Returns:
    (q, K) int32, -1 at the end of a row in place of what was left out; and a
    dict of counts: 'answers', passages left out, and 'no_negatives', queries
    that have none.
  """
  right = held(negatives, answers, texts, are_patterns, what)
  order = np.argsort(right, 1, kind='stable')
  kept = np.take_along_axis(np.where(right, -1, negatives), order, 1)
  counts = {
    'answers': int(right.sum()),
    'no_negatives': int((kept[:, 0] < 0).sum()),
  }
  return kept, counts


def _holder(answer):
  """Returns a function of a passage's tokens: whether those of `answer` are."""
  return lambda passage: answer in passage
