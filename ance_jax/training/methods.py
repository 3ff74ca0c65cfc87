"""The methods: one training cycle, its cells filled in differently.

What a method is stands in its row; how much of it (rates, sizes, top_k) are
flags. To add one: a row here, a loss in losses.py if it is new, a flagfile.

The flags' choices are read from here, so that nothing is imported.
"""

from typing import NamedTuple


class Method(NamedTuple):
  """One row.

  Attributes:
    negatives: Where a query's own negatives come from: 'none', 'corpus' (at
      random), 'bm25' (its top-K), 'given' (those of a file) or 'index' (the
      top-K of the model's own index, mined anew at each refresh).
    in_batch: Whether the other queries' passages are negatives, too, those on
      other devices included.
    loss: Name of a function of losses.py.
    paper: Where the row is from.
    trains: Sides whose towers it trains; another one stays as it is.
    last_positive: Whether the last judged positive of a query is its only one,
      known by its id: the others, and copies of its text, can be negatives.
    triplets: Whether a refresh draws a query's `--hard_negatives` from its
      top-K once, and steps take (query, positive, negative) one after the
      other, all of a query in a row.
    without_answers: Whether passages whose text holds an answer of the query
      are taken from its top-K, and nothing is put in their place.
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
  def refreshes(self):
    """Whether the negatives are mined from the model's own index."""
    return self.negatives == 'index'


METHODS = {
  'random': Method('corpus', False, 'softmax_nll', 'ANCE, table 1'),
  'in_batch': Method('none', True, 'softmax_nll', 'DPR, section 3.2'),
  'bm25': Method('bm25', False, 'softmax_nll', 'DPR, section 3.2'),
  'dpr': Method('bm25', True, 'softmax_nll', 'DPR, section 3.2'),
  'ance': Method('index', False, 'pairwise_nll', 'ANCE, section 3'),
  # The paper has one negative a positive, and all positives. Its code keeps the
  # last line of each query in the judgements (run_ann_data_gen.py:
  # training_query_positive_id), drops that passage alone from the top 200,
  # draws 20 and yields 20 triplets without shuffling them (msmarco_data.py:
  # GetTripletTrainingDataProcessingFn).
  'ance_code': Method(
    'index',
    False,
    'pairwise_nll',
    'microsoft/ANCE, drivers/run_ann.py',
    last_positive=True,
    triplets=True,
  ),
  # Its OpenQA code goes through the first 100 that are not the positive, leaves
  # out those that hold an answer (run_ann_data_gen_dpr.py: the counter runs on
  # over them), and draws one of the rest at each visit (data/DPR_data.py).
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
  # The same with what others mined, as sentence-transformers' trainer has it.
  'given': Method('given', False, 'softmax_nll', 'DPR, section 3.2'),
  'given_in_batch': Method('given', True, 'softmax_nll', 'DPR, section 3.2'),
}


def of_warm_up() -> list[str]:
  """Returns the rows that `--warmup_method` may name: they mine no index."""
  return [name for name, row in METHODS.items() if not row.refreshes]


# Names of --optimizer, made in optimizers.py.
OPTIMIZERS = {
  'lamb': 'that of ANCE, its weight norm clamped to 10',
  'adamw': 'that of DPR',
}
