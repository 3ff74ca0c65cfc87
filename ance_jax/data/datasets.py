"""The table of datasets that `--dataset` may name, and their readers."""

from typing import NamedTuple


class Reader(NamedTuple):
  """One dataset.

  Attributes:
    function: Module in this package and function that read it, imported on
      demand.
    what: Description for `--help`.
    own_ids: Whether the data has query ids; otherwise the reader generates
      them.
  """

  function: str
  what: str
  own_ids: bool = True


READERS = {
  'pydocs': Reader(
    'docstrings.read',
    'docstrings of the installed Python packages, no download',
    own_ids=False,
  ),
  'beir': Reader('beir.read', 'a BEIR folder'),
  'pairs': Reader(
    'pairs.read', 'a file of queries and positives', own_ids=False
  ),
  'msmarco': Reader('msmarco.read_passages', 'the passages of MS MARCO'),
  'msmarco_titled': Reader(
    'msmarco.read_titled_passages',
    'the same with titles, which are not part of it',
  ),
  'msmarco_doc': Reader('msmarco.read_documents', 'its documents'),
  'dpr': Reader('dpr.read', "Wikipedia and DPR's questions", own_ids=False),
}
