"""The table of training methods, which share one training cycle.

Each method is a row; its hyperparameters (rates, sizes, top_k) are flags. To
add one, write a row here, a flagfile, and a loss in losses.py if it is new.

config.py reads the choices of flags from here, so this module imports nothing.
"""

from typing import NamedTuple


class Method(NamedTuple):
  """One row of the table.

  Attributes:
    sources: Sources of a query's own negatives, () for none: 'corpus' (random
      passages), 'bm25' (top K of BM25), 'given' (read from a file), 'index'
      (top K of the model's own index, mined at each refresh). Of several, a
      refresh publishes the union. Or 'searched' alone: the top K of the step's
      own queries among passages whose tower is not trained. Beside 'index':
      'lookahead' (top K of the first positive as the query) and 'momentum' (the
      negatives of the refresh before).
    in_batch: Whether the passages of other queries are negatives too,
      including passages on other devices.
    loss: Name of a function in losses.py.
    also: Name of a second loss, whose share is `--also_weight`; '' for none.
    teacher: Whose scores the loss learns from: '' for none, 'mined' for those
      that a teacher gives to negatives and positives where they are mined,
      'guide' for those of `--guide` on all columns.
    paper: Source of the row.
    trains: Sides whose towers are trained; other towers stay frozen.
    restarts: Whether training begins again, from the run's first weights, with
      each refresh that becomes active.
    once: Whether the first refresh is the only one.
    last_positive: Whether only the last judged positive of a query counts,
      identified by its id; other positives and copies of its text can be
      negatives.
    triplets: Whether a refresh draws `--num_hard_negatives` per query from the
      top K once, and steps visit (query, positive, negative) triplets in order,
      all triplets of a query in a row.
    without_answers: Whether passages that hold an answer of the query are
      removed from its top K without replacement.
  """

  sources: tuple[str, ...]
  in_batch: bool
  loss: str
  paper: str
  trains: tuple[str, ...] = ('query', 'passage')
  also: str = ''
  teacher: str = ''
  restarts: bool = False
  once: bool = False
  last_positive: bool = False
  triplets: bool = False
  without_answers: bool = False

  @property
  def refreshes(self) -> bool:
    """Whether negatives are mined from the model's own index."""
    return 'index' in self.sources

  @property
  def searches(self) -> bool:
    """Whether each step searches its own negatives."""
    return 'searched' in self.sources


METHODS = {
  'random': Method(('corpus',), False, 'softmax_nll', 'ANCE, table 1'),
  'in_batch': Method((), True, 'softmax_nll', 'DPR, section 3.2'),
  'bm25': Method(('bm25',), False, 'softmax_nll', 'DPR, section 3.2'),
  'dpr': Method(('bm25',), True, 'softmax_nll', 'DPR, section 3.2'),
  'ance': Method(('index',), False, 'pairwise_nll', 'ANCE, section 3'),
  # The paper uses all positives, with one negative per positive. Its code keeps
  # only the last judgement of each query (run_ann_data_gen.py:
  # training_query_positive_id), drops only that passage from the top 200, draws
  # 20 and yields 20 triplets without shuffling (msmarco_data.py:
  # GetTripletTrainingDataProcessingFn).
  'ance_code': Method(
    ('index',),
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
    ('index',),
    False,
    'pairwise_nll',
    'microsoft/ANCE, drivers/run_ann_dpr.py',
    last_positive=True,
    without_answers=True,
  ),
  'ance_in_batch': Method(
    ('index',), True, 'softmax_nll', 'ANCE with in-batch negatives'
  ),
  # In its released code every hard negative of the batch is a column of every
  # query, too (star/train.py). There the mean is over all pairs of the batch,
  # here over those of each query first.
  'star': Method(
    ('index',), True, 'pairwise_nll', 'STAR, section 4.1', once=True
  ),
  # Its code draws 30 of 200 from each of the first two, and takes over all from
  # the episode before (shells/, combine_marco_negative.py), with repetitions;
  # here each passage counts once. Its paper's weights of the three are not
  # there.
  'ance_tele': Method(
    ('index', 'lookahead', 'momentum'),
    True,
    'softmax_nll',
    'ANCE-Tele, section 3',
    restarts=True,
  ),
  'adore': Method(
    ('searched',),
    False,
    'lambda_rank',
    'ADORE, section 5',
    trains=('query',),
  ),
  # The teacher is --cross_encoder, --score_run, or scores that come with given
  # negatives. SimLM trains on both losses, section 3.3.
  'distill': Method(
    ('index',),
    False,
    'distillation',
    'KL to a teacher, RocketQAv2, section 3.2',
    also='softmax_nll',
    teacher='mined',
    once=True,
  ),
  'distill_given': Method(
    ('given',),
    False,
    'distillation',
    'KL to a teacher, RocketQAv2, section 3.2',
    also='softmax_nll',
    teacher='mined',
  ),
  'margin_mse': Method(
    ('index',),
    False,
    'margin_mse',
    'Hofstaetter et al. 2020, section 4.1',
    teacher='mined',
    once=True,
  ),
  'margin_mse_given': Method(
    ('given',),
    False,
    'margin_mse',
    'Hofstaetter et al. 2020, section 4.1',
    teacher='mined',
  ),
  # A fixed bi-encoder scores all columns of a batch.
  'guided': Method(
    (),
    True,
    'distillation',
    'KL to a bi-encoder on in-batch columns',
    also='softmax_nll',
    teacher='guide',
  ),
  'ance_guided': Method(
    ('index',),
    True,
    'distillation',
    'guided, with negatives of the own index',
    also='softmax_nll',
    teacher='guide',
  ),
  # Negatives mined elsewhere, as for the trainer of sentence-transformers.
  'given': Method(('given',), False, 'softmax_nll', 'DPR, section 3.2'),
  'given_in_batch': Method(('given',), True, 'softmax_nll', 'DPR, section 3.2'),
  'ance_given': Method(
    ('index', 'given'), True, 'softmax_nll', 'ANCE with given negatives, too'
  ),
}


def of_warm_up() -> list[str]:
  """Returns the names that `--warmup_method` allows.

  They are the rows without refreshes and teachers that train all towers.
  """
  return [
    name
    for name, row in METHODS.items()
    if not (row.refreshes or row.searches or row.teacher)
  ]


# The --guide that is a run's own weights, of the active refresh.
OWN_GUIDE = 'refresh'
# Choices of --draw; selection.log_weights computes the weights.
DRAWS = {
  'uniform': 'all alike',
  'top': 'the best-ranked',
  'simans': 'SimANS, which prefers those that score like the positive',
  'simans_abs': 'as in its released code for MS MARCO',
  'bins': "TAS-Balanced, uniform over bins of the teacher's margin",
}
# Choices of --optimizer; optimizers.py builds them.
OPTIMIZERS = {
  'lamb': 'as in ANCE, with the weight norm clamped to 10',
  'adamw': 'as in DPR',
}
