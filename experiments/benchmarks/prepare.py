"""Time, memory and disk of preparing a corpus of synthetic passages.

    python experiments/benchmarks/prepare.py 1000000 2000000

For each number of passages, in a process of its own: writes them in MS MARCO's
form, 60 words each of a Zipf-like vocabulary, reads them, tokenizes them with a
vocabulary of 30,000 trained on 20,000 of them, and opens the token rows once
more. Prints a table, what the last step between two of them means for 21M
passages, and JSON. Memory is what is not the cache of a file.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from ance_jax import config
from ance_jax.data import tokenizer
from ance_jax.data import tokens
from ance_jax.training import experiment

WORDS, LENGTH, VOCABULARY, TRAINED_ON, WIKIPEDIA = 60, 128, 30_000, 20_000, 21e6


def each(script, numbers):
  """Returns what a script measures of each number, in a process of its own.

  Args:
    script: Path of a script that takes --one NUMBER, and whose last line is a
      JSON object.
    numbers: The numbers.
  """
  found = []
  for number in numbers:
    done = subprocess.run(
      [sys.executable, script, '--one', str(number)],
      check=True,
      stdout=subprocess.PIPE,
      text=True,
    )
    found.append(json.loads(done.stdout.splitlines()[-1]))
  return found


def main(numbers):
  """Prints the table, and the same as JSON."""
  found = each(__file__, numbers)
  names = list(found[0])
  head = [*(f'{one["passages"]:,}' for one in found), '21M, by the line']
  print(''.join(f'{cell:>26}' for cell in ('', *head)))
  for name in names[1:]:
    cells = [one[name] for one in found]
    slope = (cells[-1] - cells[-2]) / (numbers[-1] - numbers[-2])
    scaled = cells[-1] + slope * (WIKIPEDIA - numbers[-1])
    print(''.join([f'{name:>26}', *(f'{c:26,.1f}' for c in (*cells, scaled))]))
  print(json.dumps(found))


def one(number):
  """Returns {what: value} of preparing `number` passages."""
  peak = Peak()
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    source = _write(folder, number)
    start = time.perf_counter()
    settings = config.Config(dataset='msmarco', data_dir=str(folder))
    corpus = experiment.load_texts(settings, ('dev',)).corpus
    read = time.perf_counter() - start
    memory_read = peak.value
    texts = [corpus.texts[row] for row in range(min(TRAINED_ON, number))]
    made = tokenizer.train_vocabulary(texts, VOCABULARY)
    secs = []
    for _ in range(2):
      start = time.perf_counter()
      rows = tokens.token_rows(
        made,
        tokens.passage_texts(corpus, tokenizer.SPACE),
        what='passages',
        num_texts=number,
        cut=tokens.Cut(LENGTH),
        content_hash=corpus.hash,
        folder=folder / 'tokens',
      )
      secs.append(time.perf_counter() - start)
    files = (folder / 'tokens').rglob('*')
    size = sum(path.stat().st_size for path in files if path.is_file())
    return {
      'passages': number,
      'source, MB': source / 1e6,
      'read, s': read,
      'tokenize, s': secs[0],
      'open again, s': secs[1],
      'peak memory, reading, MB': memory_read,
      'peak memory, all, MB': peak.value,
      'token rows on disk, MB': size / 1e6,
      'tokens, millions': len(rows.ids) / 1e6,
    }


def _write(folder, number):
  """Writes the files; returns the bytes of the passages."""
  random = np.random.default_rng(0)
  words = np.array([f'w{word:x}q' for word in range(200_000)])
  with open(folder / 'collection.tsv', 'w') as file:
    for row in range(number):
      ranks = random.zipf(1.2, WORDS) % len(words)
      file.write(f'{row}\t{" ".join(words[ranks])}\n')
  (folder / 'queries.dev.small.tsv').write_text('1\twhat\n')
  (folder / 'qrels.dev.small.tsv').write_text('1\t0\t0\t1\n')
  return (folder / 'collection.tsv').stat().st_size


class Peak:
  """The most memory of this process that is no file's, in MB, by samples."""

  def __init__(self):
    self.value = 0.0
    threading.Thread(target=self._watch, daemon=True).start()

  def _watch(self):
    while True:
      status = pathlib.Path('/proc/self/status').read_text()
      now = int(re.search(r'RssAnon:\s+(\d+)', status)[1]) / 1e3
      self.value = max(self.value, now)
      time.sleep(0.02)


if __name__ == '__main__':
  if sys.argv[1] == '--one':
    print(json.dumps(one(int(sys.argv[2]))))
  else:
    main([int(number) for number in sys.argv[1:]])
