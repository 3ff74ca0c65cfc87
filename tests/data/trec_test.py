"""TREC run files as arrays."""

import numpy as np

from ance_jax.data import corpus
from ance_jax.data import trec


def test_lines_in_any_order_become_rankings_by_score(
  tmp_path, monkeypatch, capsys
):
  path = tmp_path / 'a.trec'
  path.write_text(
    'b Q0 p2 9 1.5 x\na Q0 p0 1 0.1 x\nz Q0 p0 1 3 x\nb Q0 p1 1 2.5 x\n'
    'b Q0 p0 1 1.5 x\nb Q0 p2 2 0.5 x\n'
  )
  monkeypatch.setattr(trec, '_LINES_AT_ONCE', 4)
  rows = corpus.make_corpus(['p0', 'p1', 'p2'], ['', '', ''], 'abc').rows
  ranked = trec.read_run(str(path), {'a': 0, 'none': 1, 'b': 2}, rows)
  # Equal scores keep the order of the file; a passage's best place counts.
  assert [ranked.of(query).tolist() for query in range(3)] == [
    [0], [], [1, 2, 0]
  ]  # fmt: skip
  block = ranked.block(np.array([2, 1]))
  assert block.rows.tolist() == [[1, 2, 0], [-1, -1, -1]]
  assert block.scores.tolist() == [[2.5, 1.5, 1.5], [-np.inf] * 3]
  assert ranked.block(np.array([1])).rows.shape == (1, 0)
  out = capsys.readouterr().out
  assert 'left out 1 lines of other queries' in out
  assert 'left out 1 lines of a passage that its query has' in out
