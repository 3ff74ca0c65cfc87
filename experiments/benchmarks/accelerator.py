r"""One GPU: right numbers, BERT-base's share of the matrix peak, runs, search.

    python experiments/benchmarks/accelerator.py --all --output=found.json
    python experiments/benchmarks/accelerator.py --parts encode step

Without either, it compares with torch: correct, encode, step, texts. --small
runs the same parts on two CPU cores in minutes; its figures mean nothing. A
part that needs more than the remaining time of --seconds is skipped.

The parts, in this order:

  correct   float32 against the CPU: embeddings, and the gradient of a step
  poisoned  packed rows where memory was NaN before
  encode    share of the peak on real tokens, 64 to 512 a text; and torch's
  step      the same of packed training steps
  fit       whether a step of 512 pairs of 256 tokens fits
  search    exact search on the device, 100,000 queries
  adore     a step that searches a million passages
  resumed   a run killed and resumed, bit for bit
  refresh   what refreshes hold up, in step and beside
  start     seconds to the first step, with and without compiled programs
  texts     texts to embeddings, tokenizing included; and torch's

The peak is what a product of two matrices of 8,192 rows and columns reaches.
The encoder has BERT-base's sizes, random weights and mean pooling; a step is
one of in-batch negatives with dropout of activations, AdamW and clipping. All
data is made by a seed (made.py). The peer is sentence-transformers with sdpa
attention; where torch or sentence-transformers is missing, or --without_torch
is given, so are its columns.

On a machine with jax, torch and what they bring but without a network, these
wheels are missing; a machine that has one fetches them for Python 3.12:

    python -m pip download --no-deps --only-binary=:all: --dest wheels \
      --python-version 3.12 --implementation cp \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
      --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
      $(python experiments/benchmarks/accelerator.py --wheels)

There, in the repository:

    python -m pip install --no-deps --no-index wheels/*.whl
    python setup.py -q egg_info
    export PYTHONPATH=.
"""

import argparse
from collections.abc import Callable
from collections.abc import Sequence
import importlib
import json
import os
import pathlib
import sys
import tempfile
import time
import traceback
from typing import NamedTuple

# In setup.py's ranges, and pytrec-eval-terrier for ir-measures. bm25s,
# tensorflow-datasets and importlib_resources are not used here.
WHEELS = (
  'faiss-cpu>=1.11,<2',
  'ijson>=3.2',
  'ir-measures>=0.3.7',
  'PyStemmer>=2.2',
  'pytrec-eval-terrier>=0.5.5',
  'tensorboardX>=2.6.2',
)


class Part(NamedTuple):
  """A part: its function's name in a module, and the seconds that it needs.

  The seconds are guesses for an H100 until one has run them.
  """

  module: str
  secs: int


PARTS = {
  'correct': Part('accelerator_checks', 45),
  'poisoned': Part('accelerator_checks', 40),
  'encode': Part('accelerator_speed', 45),
  'step': Part('accelerator_speed', 110),
  'fit': Part('accelerator_speed', 45),
  'search': Part('accelerator_speed', 40),
  'adore': Part('accelerator_speed', 25),
  'resumed': Part('accelerator_runs', 50),
  'refresh': Part('accelerator_runs', 100),
  'start': Part('accelerator_runs', 50),
  'texts': Part('accelerator_speed', 45),
}
COMPARISON = ('correct', 'encode', 'step', 'texts')


def run_parts(
  names: Sequence[str],
  call: Callable[[str], dict],
  *,
  seconds: float,
  needs: Callable[[str], float],
  write: Callable[[dict], None],
) -> dict[str, dict]:
  """Runs parts one after another, whatever becomes of the others.

  Args:
    names: The parts.
    call: call(name) returns the numbers of a part.
    seconds: Time limit; a part that needs more than the remaining time is
      skipped.
    needs: needs(name) returns the seconds that a part is known to take.
    write: Called with all results so far after each part.

  Returns:
    For each part its numbers and 'part_secs'; or 'error', or 'not_begun'.
  """
  found, begun = {}, time.monotonic()
  for name in names:
    start = time.monotonic()
    left = seconds - (start - begun)
    if left < needs(name):
      found[name] = {'not_begun': 'no time left', 'left_secs': round(left, 1)}
    else:
      print(f'{name}: begins, {left:.0f} s left', flush=True)
      try:
        found[name] = dict(call(name))
      except Exception as error:  # The other parts go on.
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ['']
        found[name] = {'error': f'{type(error).__name__}: {lines[0]}'}
      found[name]['part_secs'] = round(time.monotonic() - start, 1)
    print(f'{name}: {json.dumps(found[name])}', flush=True)
    write(found)
  return found


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the parts that were asked for; returns the exit code."""
  given = _parse(arguments)
  if given.wheels:
    print(*WHEELS)
    return 0
  import ance_jax  # Sets XLA's flags, so before jax.

  # Torch and other processes want some of the memory, too; and what they leave
  # is to be had, not only three quarters of it.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.92')
  if given.without_torch:
    sys.modules['torch_peer'] = None  # No import finds it.
  import jax
  import made

  sizes = made.SMALL if given.small else made.Sizes()
  device = jax.devices()[0]
  about = {
    'device': device.device_kind,
    'cores': os.cpu_count(),
    'jax': jax.__version__,
    'ance_jax': ance_jax.__version__,
    'small': given.small,
  }
  print(json.dumps(about))
  if given.small:
    print('--small: the figures mean nothing')

  def needs(name):
    return 0 if given.small else PARTS[name].secs

  def write(found):
    # Whole before it is visible: a run that is cut off keeps what it has.
    unfinished = given.output.with_suffix('.unfinished')
    text = json.dumps({**about, 'parts': found}, indent=1)
    unfinished.write_text(text + '\n')
    unfinished.replace(given.output)

  with tempfile.TemporaryDirectory() as folder:
    work = pathlib.Path(folder)
    if not jax.config.jax_compilation_cache_dir:
      # Parts share what is compiled.
      jax.config.update('jax_compilation_cache_dir', str(work / 'programs'))
      jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)

    def call(name):
      module = importlib.import_module(PARTS[name].module)
      return getattr(module, name)(sizes, work)

    found = run_parts(
      given.parts, call, seconds=given.seconds, needs=needs, write=write
    )
  failed = [name for name, numbers in found.items() if 'error' in numbers]
  if failed:
    print(f'failed: {", ".join(failed)}')
  print(json.dumps({**about, 'parts': found}))
  return 1 if failed else 0


def _parse(arguments):
  """Returns the parsed command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  which = parser.add_mutually_exclusive_group()
  which.add_argument(
    '--parts', nargs='+', choices=PARTS, default=COMPARISON, metavar='NAME'
  )
  which.add_argument('--all', action='store_true', help='Run all parts.')
  which.add_argument(
    '--wheels', action='store_true', help='Only print what pip is to download.'
  )
  parser.add_argument('--small', action='store_true')
  parser.add_argument('--without_torch', action='store_true')
  parser.add_argument('--seconds', type=float, default=540)
  parser.add_argument(
    '--output', type=pathlib.Path, default=pathlib.Path('accelerator.json')
  )
  given = parser.parse_args(arguments)
  if given.all:
    given.parts = tuple(PARTS)
  return given


if __name__ == '__main__':
  sys.exit(main())
