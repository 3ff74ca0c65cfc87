"""The methods: one training cycle, its cells filled in differently.

What a method is stands in its row; how much of it (rates, sizes, top_k) are
flags. To add one: a row here, a loss in losses.py if it is new, a flagfile.
"""

from collections.abc import Callable
from typing import NamedTuple

from ance_jax import losses


class Method(NamedTuple):
  """One row.

  Attributes:
    negatives: Where a query's own negatives come from: 'none', 'corpus' (at
      random), 'bm25' (its top-K) or 'index' (the top-K of the model's own
      index, mined anew at each refresh).
    in_batch: Whether the other queries' passages are negatives, too, those on
      other devices included.
    loss: A function of losses.py.
    paper: Where the row is from.
  """

  negatives: str
  in_batch: bool
  loss: Callable
  paper: str

  @property
  def refreshes(self):
    """Whether the negatives are mined from the model's own index."""
    return self.negatives == 'index'


METHODS = {
  'random': Method('corpus', False, losses.softmax_nll, 'ANCE, table 1'),
  'in_batch': Method('none', True, losses.softmax_nll, 'DPR, section 3.2'),
  'bm25': Method('bm25', False, losses.softmax_nll, 'DPR, section 3.2'),
  'dpr': Method('bm25', True, losses.softmax_nll, 'DPR, section 3.2'),
  'ance': Method('index', False, losses.pairwise_nll, 'ANCE, section 3'),
  'ance_in_batch': Method(
    'index', True, losses.softmax_nll, 'ANCE with in-batch negatives'
  ),
}
