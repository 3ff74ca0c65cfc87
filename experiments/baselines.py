"""What BM25 and a model that is not trained here reach on test splits.

    python experiments/baselines.py MODEL WORKDIR FOLDER [FOLDER ...]

MODEL is a folder or hub name, such as all-MiniLM-L6-v2; each FOLDER is one of
BEIR's form. Prints a line of a table for each, and goes on where it stopped if
it is called again.
"""

import pathlib
import sys

from ance_jax import config
from ance_jax.core import atomic
from ance_jax.jobs import evaluate

MEASURES = ('mrr@10', 'ndcg@10', 'recall@100')
WAYS = {
  'BM25 (k1 0.9, b 0.4)': {'retriever': 'bm25'},
  'BM25 (k1 1.2, b 0.75)': {
    'retriever': 'bm25', 'bm25_k1': 1.2, 'bm25_b': 0.75
  },
  'model': {},
}  # fmt: skip


def main(model, workdir, folders):
  """Prints the table; returns {folder's name: {way: {measure: value}}}."""
  found = {}
  names = ', '.join(MEASURES)
  lines = [
    f'| set | {" | ".join(WAYS)} |',
    f'|---|{"---|" * len(WAYS)}',
  ]
  for folder in map(pathlib.Path, folders):
    found[folder.name] = scores = {}
    for way, settings in WAYS.items():
      scores[way] = score(
        config.Config(
          job='evaluate',
          dataset='beir',
          data_dir=folder,
          workdir=f'{workdir}/{folder.name}/{way.replace(" ", "_")}',
          split='test',
          init_from=model,
          tokens_per_batch=4096,
          **settings,
        )
      )
    cells = (
      ' · '.join(f'{one[name]:.4f}'.removeprefix('0') for name in MEASURES)
      for one in scores.values()
    )
    lines.append(f'| {folder.name} | {" | ".join(cells)} |')
    print('\n'.join(('', names, *lines)), flush=True)
  return found


def score(settings):
  """Returns {measure: value}, from disk if it is there."""
  # A run that is named as the model's source brings its step into the name.
  name = f'{settings.split}-{settings.retriever}-*.json'
  folder = pathlib.Path(settings.workdir)
  if not any(folder.glob(name)):
    evaluate.run(settings)
  (path,) = folder.glob(name)
  return atomic.read_json(path)['metrics']


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2], sys.argv[3:])
