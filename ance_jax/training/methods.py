"""The table of training methods, which share one training cycle.

Each method is a row; its hyperparameters (rates, sizes, top_k) are flags. To
add one, write a row here, a flagfile, and a loss in losses.py if it is new.

config.py reads the choices of flags from here, so this module imports nothing.
"""

from typing import NamedTuple


class Method(NamedTuple):
  """One row of the table.

  Attributes:
    negatives: Source of a query's own negatives: 'none', 'corpus' (random
      passages), 'bm25' (top K of BM25), 'given' (read from a file) or 'index'
      (top K of the model's own index, mined at each refresh).
    in_batch: Whether the passages of other queries are negatives too,
      including passages on other devices.
    loss: Name of a function in losses.py.
    paper: Source of the row.
    trains: Sides whose towers are trained; other towers stay frozen.
    last_positive: Whether only the last judged positive of a query counts,
      identified by its id; other positives and copies of its text can be
      negatives.
    triplets: Whether a refresh draws `--num_hard_negatives` per query from the
      top K once, and steps visit (query, positive, negative) triplets in order,
      all triplets of a query in a row.
    without_answers: Whether passages that hold an answer of the query are
      removed from its top K without replacement.
  """

  negatives: str
  in_batch: bool
  loss: str
  paper: str
  trains: tuple[str, ...] = ('query', 'passage')
  last_positive: bool = False
  triplets: bool = False
  without_answers: bool = False

  @property
  def refreshes(self) -> bool:
    """Whether negatives are mined from the model's own index."""
    return self.negatives == 'index'


METHODS = {
  'random': Method('corpus', False, 'softmax_nll', 'ANCE, table 1'),
  'in_batch': Method('none', True, 'softmax_nll', 'DPR, section 3.2'),
  'bm25': Method('bm25', False, 'softmax_nll', 'DPR, section 3.2'),
  'dpr': Method('bm25', True, 'softmax_nll', 'DPR, section 3.2'),
  'ance': Method('index', False, 'pairwise_nll', 'ANCE, section 3'),
  # The paper uses all positives, with one negative per positive. Its code keeps
  # only the last judgement of each query (run_ann_data_gen.py:
  # training_query_positive_id), drops only that passage from the top 200, draws
  # 20 and yields 20 triplets without shuffling (msmarco_data.py:
  # GetTripletTrainingDataProcessingFn).
  'ance_code': Method(
    'index',
    False,
    'pairwise_nll',
    'microsoft/ANCE, drivers/run_ann.py',
    last_positive=True,
    triplets=True,
  ),
  # Its OpenQA code takes the first 100 passages other than the positive, drops
  # passages that hold an answer (run_ann_data_gen_dpr.py, where the counter
  # includes them), and draws one of the rest per visit (data/DPR_data.py).
  'ance_code_qa': Method(
    'index',
    False,
    'pairwise_nll',
    'microsoft/ANCE, drivers/run_ann_dpr.py',
    last_positive=True,
    without_answers=True,
  ),
  'ance_in_batch': Method(
    'index', True, 'softmax_nll', 'ANCE with in-batch negatives'
  ),
  # Negatives mined elsewhere, as for the trainer of sentence-transformers.
  'given': Method('given', False, 'softmax_nll', 'DPR, section 3.2'),
  'given_in_batch': Method('given', True, 'softmax_nll', 'DPR, section 3.2'),
}


def of_warm_up() -> list[str]:
  """Returns the names that `--warmup_method` allows: rows without refreshes."""
  return [name for name, row in METHODS.items() if not row.refreshes]


# Choices of --optimizer; optimizers.py builds them.
OPTIMIZERS = {
  'lamb': 'as in ANCE, with the weight norm clamped to 10',
  'adamw': 'as in DPR',
}
