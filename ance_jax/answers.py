"""Whether a text holds an answer: DPR's rule, for questions with answers.

Karpukhin et al. 2020, dpr/data/qa_validation.py (`has_answer`, string match):
the tokens of an answer stand in the text, in a row, case and Unicode form
aside. Only the text counts, not the title.
"""

import functools
import unicodedata

import numpy as np
import regex

from ance_jax import logs

# dpr/utils/tokenizers.py, SimpleTokenizer: words, else single characters that
# are neither spaces nor control characters.
_TOKEN = r'[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]'
# Passages whose tokens are kept; the same few are mined for many queries.
_TEXTS_KEPT = 100_000


def tokens(text):
  """Returns the tokens of a text, a space around each.

  No token holds a space, so that tokens stand in a row in a text where their
  string stands in its.
  """
  found = regex.findall(_TOKEN, unicodedata.normalize('NFD', text))
  return f' {" ".join(found)} '.lower()


def without(negatives, answers, texts, what):
  """Returns negatives that hold no answer, in their order, none put in place.

  Args:
    negatives: (q, K) int32 passage rows.
    answers: q lists of strings.
    texts: Texts of all passages.
    what: Name of the phase for the progress bar.

  Returns:
    (q, K) int32, -1 at the end of a row in place of what was left out; and a
    dict of counts: 'answers', passages left out, and 'no_negatives', queries
    that have none.
  """

  @functools.lru_cache(_TEXTS_KEPT)
  def passage(row):
    return tokens(texts[row])

  kept = np.full_like(negatives, -1)
  rows = logs.progress(
    range(len(negatives)), what, total=len(negatives), unit='queries'
  )
  for query in rows:
    wanted = [tokens(answer) for answer in answers[query]]
    found = [
      row
      for row in negatives[query].tolist()
      if not any(answer in passage(row) for answer in wanted)
    ]
    kept[query, : len(found)] = found
  counts = {
    'answers': int((kept < 0).sum()),
    'no_negatives': int((kept[:, 0] < 0).sum()),
  }
  return kept, counts
