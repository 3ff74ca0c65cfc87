"""The table of file formats of --job=mine; mine_formats.py writes them."""

from typing import NamedTuple


class Form(NamedTuple):
  """A format; a function of the same name in mine_formats.py writes it.

  Attributes:
    what: Description for `--help`.
    array: Whether the file is one JSON array instead of lines.
    one_width: Whether all lines must have the same number of negatives.
    pairs: Whether each line has one positive.
    scored: Whether each line needs all scores.
  """

  what: str
  array: bool = False
  one_width: bool = False
  pairs: bool = False
  scored: bool = False


_FOR_LOSSES = 'the same with a list of ranking scores, for its MarginMSELoss'
FORMS = {
  'triplets': Form(
    'JSON lines of sentence-transformers, title and text as one', pairs=True
  ),
  'triplets_scored': Form(_FOR_LOSSES, pairs=True, scored=True),
  'n_tuples': Form(
    'its JSON lines of one width: a query with fewer than --num_negatives is '
    'not in them, unless --on_shortage=fill',
    one_width=True,
    pairs=True,
  ),
  'n_tuples_scored': Form(
    f'{_FOR_LOSSES} and DistillKLDivLoss',
    one_width=True,
    pairs=True,
    scored=True,
  ),
  'flag_embedding': Form('JSON lines of FlagEmbedding, with scores'),
  'dpr': Form('the JSON array of DPR', array=True),
  'tevatron': Form('JSON lines of Tevatron'),
  'ids': Form('JSON lines of ids and scores'),
}
