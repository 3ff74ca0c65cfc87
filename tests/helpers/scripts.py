"""Runs the scripts of experiments/benchmarks as a person does."""

import os
import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parents[2]


def run_benchmark(name: str, *flags: str, timeout: float) -> str:
  """Returns the standard output of a script that must exit with code 0.

  Args:
    name: File name in experiments/benchmarks.
    *flags: Its command line.
    timeout: Seconds.
  """
  done = subprocess.run(
    [sys.executable, f'experiments/benchmarks/{name}', *flags],
    cwd=REPOSITORY,
    env={**os.environ, 'PYTHONPATH': str(REPOSITORY)},
    capture_output=True,
    text=True,
    timeout=timeout,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  return done.stdout
