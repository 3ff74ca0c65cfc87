"""Whether a text contains an answer, by DPR's rule.

Karpukhin et al. 2020, dpr/data/qa_validation.py (`has_answer`): the text
contains the tokens of an answer in a row, ignoring case and Unicode form; or,
if answers are regular expressions (CuratedTREC), one matches in it. Titles do
not count.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import unicodedata

import numpy as np
import regex

from ance_jax import errors
from ance_jax.core import logs

# dpr/utils/tokenizers.py, SimpleTokenizer: words, or single characters other
# than spaces and control characters.
_TOKEN = r'[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]'
# Passages whose tokens are cached; many queries share the same few passages.
_TEXTS_KEPT = 100_000
# Limit per regular expression and text; some take time exponential in the
# length of the text.
_MAX_SECS = 10


class BadPattern(errors.BadInput):
  """An answer is not a regular expression."""


def tokens(text: str) -> str:
  """Returns the tokens of a text in one string, with spaces around each.

  No token contains a space, so a text contains the tokens of an answer in a row
  exactly if its string contains the answer's string.
  """
  found = regex.findall(_TOKEN, unicodedata.normalize('NFD', text))
  return f' {" ".join(found)} '.lower()


def is_in(pattern: str, text: str) -> bool:
  """Returns whether a regular expression of CuratedTREC matches in a text.

  Args:
    pattern: The expression.
    text: The text, in Unicode form NFD.

  Raises:
    BadPattern: The expression is invalid.
    BadInput: It takes too long on this text.
  """
  flags = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
  normal = unicodedata.normalize('NFD', pattern)
  try:
    return regex.search(normal, text, flags, timeout=_MAX_SECS) is not None
  except regex.error as error:
    raise BadPattern(str(error)) from error
  except TimeoutError as error:
    raise errors.refusal(
      f'the answer {pattern[:60]!r} is still being matched after {_MAX_SECS} s '
      f'in the passage that begins {text[:60]!r}',
      'write a simpler regular expression',
    ) from error


def held(
  rows: np.ndarray,
  answers: Sequence[list[str]],
  texts: Sequence[str],
  are_patterns: bool,
  what: str = 'match answers',
) -> np.ndarray:
  """Returns whether each passage contains an answer of its query, (q, K) bool.

  Args:
    rows: (q, K) int32 passage rows, -1 for none.
    answers: Answers of each of q queries.
    texts: Texts of all passages.
    are_patterns: Whether answers are regular expressions.
    what: Name of the phase for the progress bar.
  """
  match = matcher(answers, texts, are_patterns)
  found = np.zeros(rows.shape, bool)
  for query in logs.progress(
    range(len(rows)), what, total=len(rows), unit='queries'
  ):
    found[query] = match(query, rows[query].tolist())
  return found


def matcher(
  answers: Sequence[list[str]], texts: Sequence[str], are_patterns: bool
) -> Callable[[int, list[int]], list[bool]]:
  """Returns match(query, passage rows), whether each holds an answer.

  A row of -1 holds none. The function caches the tokens of passages, so use one
  for all queries.

  Args:
    answers: As for `held`.
    texts: As for `held`.
    are_patterns: As for `held`.
  """

  @functools.lru_cache(_TEXTS_KEPT)
  def passage(row):
    return (
      unicodedata.normalize('NFD', texts[row])
      if are_patterns
      else tokens(texts[row])
    )

  def match_patterns(query, rows):
    return [
      row >= 0 and any(is_in(answer, passage(row)) for answer in answers[query])
      for row in rows
    ]

  def match_words(query, rows):
    # An empty text contains no answer, not even one without tokens.
    found = [passage(row) if row >= 0 else '' for row in rows]
    held = [False] * len(rows)
    for answer in map(tokens, answers[query]):
      # Searching for the answer without its spaces is a third faster.
      bare = answer.strip(' ')
      held = [
        before or (bare in text and answer in text)
        for before, text in zip(held, found, strict=True)
      ]
    return held

  return match_patterns if are_patterns else match_words
