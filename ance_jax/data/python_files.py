"""The docstrings of Python files, parsed without importing them.

As a program it needs only the standard library: it reads a JSON list of (path,
module name) from standard input and prints, per file, the list of its
(qualified name, docstring).
"""

import ast
from collections.abc import Iterator
import gc
import json
import pathlib
import sys
import warnings


def docstrings(path: str, module: str) -> Iterator[tuple[str, str]]:
  """Yields (qualified name, docstring) in file order."""
  try:
    tree = ast.parse(pathlib.Path(path).read_bytes())
  except SyntaxError:  # Templates and bad-syntax samples are not modules.
    return
  stack = [(module, tree)]
  while stack:
    name, node = stack.pop()
    if docstring := ast.get_docstring(node):
      yield name, docstring
    stack += [
      (f'{name}.{child.name}', child)
      for child in reversed(node.body)
      if isinstance(
        child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
      )
    ]


if __name__ == '__main__':
  # Syntax trees have no cycles; searching for them would take half of the time.
  gc.disable()
  warnings.simplefilter('ignore')  # Invalid escapes in library sources.
  files = json.load(sys.stdin)
  json.dump(
    [list(docstrings(path, module)) for path, module in files], sys.stdout
  )
