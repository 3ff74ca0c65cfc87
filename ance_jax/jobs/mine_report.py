"""Report of `--job=mine`: rejected and kept candidates, with examples."""

from typing import Any

import numpy as np

from ance_jax import config as config_lib
from ance_jax.data import corpus as corpus_lib
from ance_jax.jobs import forms
from ance_jax.mining import filters
from ance_jax.mining import miner
from ance_jax.training import negatives as negatives_lib

_EXAMPLES = 5
# Maximum number of negatives of an example, and of characters of a text.
_SHOWN, _CHARACTERS = 5, 160
_NAMES = (*filters.FILTERS, 'passed', 'candidates')


def only_full(config: config_lib.Config) -> bool:
  """Returns whether to omit queries with fewer than `--num_negatives`."""
  if config.on_shortage == 'keep':
    return forms.FORMS[config.format].one_width
  return config.on_shortage == 'drop'


def unscored(mined: miner.Mined) -> np.ndarray:
  """Returns a (q,) bool mask of queries with an unknown score.

  The score may be of a positive or of a negative.
  """
  unknown = (mined.negatives >= 0) & ~np.isfinite(mined.scores)
  return unknown.any(1) | (mined.least == -np.inf)


class Tally:
  """Counts over all queries, and examples of queries.

  Args:
    job: `mine.Job`.

  Attributes:
    written: Number of queries written.
  """

  def __init__(self, job):
    self._job, self.written = job, 0
    self._rejected = np.zeros((len(_NAMES), 2), np.int64)
    self._counts = {}
    size = len(job.split.ids)
    self._chosen = np.random.default_rng(job.config.seed).choice(
      size, min(_EXAMPLES, size), replace=False
    )
    self._examples = []

  def add(self, mined: miner.Mined, written: np.ndarray) -> None:
    """Counts a block of queries.

    Args:
      mined: Candidates and negatives of the block.
      written: (q,) bool, queries to write.
    """
    self.written += int(written.sum())
    self._rejected += filters.counts(mined.rejected)
    for name, more in (
      ('fewer', mined.found < self._job.config.num_negatives),
      ('none', mined.found == 0),
      ('drawn', mined.num_drawn),
      ('forced', mined.num_forced),
      ('unranked', mined.least == -np.inf),
      ('unscored', unscored(mined)),
      ('negatives', mined.negatives[written] >= 0),
    ):
      self._counts[name] = self._counts.get(name, 0) + int(np.sum(more))
    places = np.nonzero(np.isin(mined.queries, self._chosen))[0].tolist()
    self._examples += [self._example(mined, place) for place in places]

  def as_json(self) -> dict[str, Any]:
    """Returns the whole report, serializable as JSON."""
    job = self._job
    read = (
      n for n in config_lib.MINING_RULES if 'mine' in config_lib.readers(n)
    )
    rules = *read, 'num_negatives', 'format', 'seed'
    return {
      'ranked_by': job.task.source.name,
      'rules': {name: getattr(job.config, name) for name in rules},
      'queries': len(job.split.ids),
      'written': self.written,
      **self._counts,
      'taken': {
        name: {'candidates': int(row[0]), 'queries': int(row[1])}
        for name, row in zip(_NAMES, self._rejected, strict=True)
      },
      'examples': self._examples,
    }

  def table(self) -> str:
    """Formats the number of candidates per filter, and the outcome."""
    job = self._job
    lines = [
      f'candidates of {len(job.split.ids):,} training queries by '
      f'{job.task.source.name}, up to rank {job.config.max_rank}, and what '
      'each filter rejected of them:',
      f'  {"":22}{"candidates":>12}{"share":>9}{"queries":>12}',
    ]
    whole = max(int(self._rejected[-1, 0]), 1)
    rows = dict(zip(_NAMES, self._rejected.tolist(), strict=True))
    for name in (_NAMES[-1], *_NAMES[:-1]):
      number, queries = rows[name]
      if number or self._asked(name):
        lines.append(
          f'  {name:22}{number:12,}{number / whole:9.2%}{queries:12,}'
        )
    return '\n'.join([*lines, *self._outcome()])

  def examples_text(self) -> str:
    """Formats the examples."""
    lines = []
    for example in self._examples:
      lines += [
        f'\n  query: {example["query"]}',
        *(
          f'    {kind}: {text}'
          for kind in ('positive', 'kept', 'dropped')
          for text in example[kind]
        ),
      ]
    return '\n'.join(lines) + '\n'

  def _asked(self, name):
    """Returns whether a filter is enabled or always applies."""
    config, split = self._job.config, self._job.split
    if name == 'answer':
      return negatives_lib.drops_answers(config, split)
    always = 'positive', 'same text', 'own text', 'passed', 'candidates'
    return name in (*always, *self._job.task.settings.rules.filters())

  def _outcome(self):
    """Yields lines on lacking ranks, negatives or scores, and on the result."""
    counts, config = self._counts, self._job.config
    rules = self._job.task.settings.rules
    if warning := filters.warning(self._rejected[:, 0], rules):
      yield warning
    if counts['unranked']:
      what = ': it is below all that is, and no candidate is below it'
      has_margin = any(name.endswith('margin') for name in rules.scored())
      yield (
        f'{counts["unranked"]:,} queries have a positive not ranked'
        f'{what if has_margin else ""}'
      )
    done = {
      'keep': 'kept as they are, those with none left out',
      'drop': 'left out',
      'fill': f'filled up with {counts["drawn"]:,} passages at random',
    }[config.on_shortage]
    if config.on_shortage == 'keep' and only_full(config):
      done = f'left out, as all rows of {config.format} have one width '
      done += '(--on_shortage=fill fills them up)'
    if counts['forced']:
      done += f', {counts["forced"]:,} of which a filter rejects, too'
    yield (
      f'{counts["fewer"]:,} queries have fewer than {config.num_negatives} '
      f'negatives, {counts["none"]:,} of them none: {done}'
    )
    # FlagEmbedding's lines may lack all scores.
    scored = forms.FORMS[config.format].scored
    if counts['unscored'] and (scored or config.format == 'flag_embedding'):
      yield (
        f'{counts["unscored"]:,} queries have a passage whose score is not '
        f'known: {"left out" if scored else "written without scores"}'
      )
    yield (
      f'written: {self.written:,} queries with {counts["negatives"]:,} '
      'negatives'
    )

  def _example(self, mined, place):
    """Returns a query with its positives, negatives and rejected candidates.

    It shows only the best candidate that each filter rejected.
    """
    of_query = slice(*np.searchsorted(mined.of_query, (place, place + 1)))
    there = mined.negatives[place] >= 0
    dropped = []
    for number, name in enumerate(filters.FILTERS):
      for column in np.nonzero(mined.rejected[place] == number)[0][:1].tolist():
        why = self._why(name, mined, place, column)
        row = int(mined.ranking.rows[place, column])
        dropped.append(f'{name}, as it {why}: {self._passage(row)}')
    return {
      'query': self._job.split.texts[int(mined.queries[place])],
      'positive': self._scored(
        mined.positives[of_query], mined.positive_scores[of_query]
      ),
      'kept': self._scored(
        mined.negatives[place][there][:_SHOWN],
        mined.scores[place][there][:_SHOWN],
      ),
      'dropped': dropped,
    }

  def _why(self, name, mined, place, column):
    """Returns why a candidate was rejected, as text that follows 'as it'."""
    config, least = self._job.config, float(mined.least[place])
    score = f'has {float(mined.ranking.scores[place, column]):.4f}'
    bound = getattr(config, name, None)
    if name.endswith('margin') and least == -np.inf:
      return f'{score}, and a positive is not ranked'
    again = np.nan if mined.reranked is None else mined.reranked[place, column]
    return {
      'positive': 'was judged so',
      'same text': 'has the text of a positive',
      'own text': 'is the query itself',
      'answer': 'holds an answer',
      'skip_ranks': f'is among the first {bound}',
      'max_score': f'{score}, above {bound}',
      'min_score': f'{score}, below {bound}',
      'absolute_margin': f'{score}, not below {least:.4f} - {bound}',
      'relative_margin': f'{score}, not below {least:.4f} - {bound} of that',
      'z_margin': f'{score}, not below {least:.4f} - {bound} times the spread',
      'no score_run': 'has no score of --score_run',
      'rerank_max_score': f'is scored {again:.4f} again, above {bound}',
    }[name]

  def _scored(self, rows, scores):
    """Returns passages with their scores as texts."""
    return [
      f'{f"{score:.4f}" if np.isfinite(score) else "not ranked"} '
      f'{self._passage(row)}'
      for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
    ]

  def _passage(self, row):
    corpus = self._job.corpus
    title = corpus_lib.whole_title(corpus, row)[:60]
    text = ' '.join(corpus.texts[row][:_CHARACTERS].split())
    return f'{corpus.ids[row]} | {title and f"{title} | "}{text}'
