"""The table of evaluation protocols.

A dataset's reader names the protocol of each split. All protocols average over
all judged queries, including those without a hit.
"""

from typing import NamedTuple

CAPPED = 'capped_recall@'


class Protocol(NamedTuple):
  """How a split is scored.

  Attributes:
    measures: {name: measure in ir-measures' notation}; the first one selects
      checkpoints. `capped_recall@k` divides the relevant passages found by the
      maximum for k passages (BEIR: recall_cap).
    depth: Passages to rank per query.
    by_answers: Whether passages are right if their text contains an answer of
      the query, regardless of judgements.
    source: Paper or code that defines the protocol.
  """

  measures: dict[str, str]
  depth: int
  by_answers: bool
  source: str


PROTOCOLS = {
  'usual': Protocol(
    {
      'mrr@10': 'RR@10',
      'ndcg@10': 'nDCG@10',
      'recall@1': 'R@1',
      'recall@5': 'R@5',
      'recall@20': 'R@20',
      'recall@100': 'R@100',
    },
    100,
    False,
    'MRR@10 first, as in MS MARCO',
  ),
  'beir': Protocol(
    {
      'ndcg@10': 'nDCG@10',
      'mrr@10': 'RR@10',
      'recall@10': 'R@10',
      'recall@100': 'R@100',
      f'{CAPPED}100': 'R@100',
    },
    100,
    False,
    'Thakur et al. 2021, beir/retrieval/evaluation.py',
  ),
  'msmarco': Protocol(
    {
      'mrr@10': 'RR@10',
      'ndcg@10': 'nDCG@10',
      'recall@50': 'R@50',
      'recall@100': 'R@100',
      'recall@1000': 'R@1000',
    },
    1000,
    False,
    'msmarco_passage_eval.py',
  ),
  'trec_dl': Protocol(
    # In binary measures, grades below 2 are not relevant.
    {
      'ndcg@10': 'nDCG@10',
      'mrr@10': 'RR(rel=2)@10',
      'map@1000': 'AP(rel=2)@1000',
      'recall@100': 'R(rel=2)@100',
      'recall@1000': 'R(rel=2)@1000',
    },
    1000,
    False,
    'Craswell et al. 2020; trec_eval -l 2',
  ),
  'msmarco_doc': Protocol(
    {
      'mrr@100': 'RR@100',
      'mrr@10': 'RR@10',
      'ndcg@10': 'nDCG@10',
      'recall@100': 'R@100',
    },
    100,
    False,
    'msmarco_doc_eval.py',
  ),
  'trec_dl_doc': Protocol(
    {
      'ndcg@10': 'nDCG@10',
      'mrr@100': 'RR@100',
      'map@100': 'AP@100',
      'recall@100': 'R@100',
    },
    100,
    False,
    'Craswell et al. 2020; trec_eval without -l',
  ),
  'answers': Protocol(
    {f'accuracy@{k}': f'Success@{k}' for k in (20, 1, 5, 100)},
    100,
    True,
    'Karpukhin et al. 2020, dpr/data/qa_validation.py',
  ),
}
