"""Single-file web pages that load nothing, with at most one script.

The functions take text, which they escape, and return HTML; only `page` and
`folded` also take HTML, as returned by the others.
"""

import base64
from collections.abc import Iterable
from collections.abc import Sequence
import hashlib
import html
import urllib.parse

# Whatever the texts contain, the browser loads nothing and runs only KEYS,
# which the policy allows by hash. `plaintext` in the style makes Arabic run
# from the right.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; height: auto; }
pre, .wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0 1rem; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #8886;
  text-align: left; vertical-align: top; overflow-wrap: break-word;
  unicode-bidi: plaintext; }
.numbers th, .numbers td { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.numbers th:first-child, .numbers td:first-child { text-align: left; }
summary { cursor: pointer; font-weight: 600; }
td summary { font-weight: inherit; }
"""
# Script for the keyboard: / focuses the query; j and k, or arrows, move down
# and up a column of results or links; the browser's Enter unfolds or follows.
KEYS = """
document.addEventListener('keydown', event => {
  const field = document.querySelector('input');
  const here = document.activeElement;
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (here === field && event.key.length === 1) return;
  const step = {j: 1, ArrowDown: 1, k: -1, ArrowUp: -1}[event.key];
  const column = node => node?.closest('td')?.cellIndex;
  let places = [...document.querySelectorAll('td [tabindex], summary, li a')];
  const start = places.includes(here) ? here : places[0];
  places = places.filter(node => column(node) === column(start));
  const next = event.key === '/' ? field
    : step && (places[places.indexOf(here) + step] || (step < 0 && field));
  if (!next) return;
  event.preventDefault();
  next.focus();
  if (next === field) field.select();
});
"""


def page(title: str, parts: Sequence[str], script: str = '') -> str:
  """Returns a page.

  Args:
    title: Text of the title and first heading.
    parts: HTML of the parts, in order.
    script: `KEYS`, or '' for none.
  """
  policy = _POLICY
  if script:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy += f"; script-src 'sha256-{digest}'"
    parts = [*parts, f'<script>{script}</script>']
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n'
    f'<body>\n<h1>{html.escape(title)}</h1>\n'
    + '\n'.join(parts)
    + '\n</body>\n</html>\n'
  )


def heading(text: str) -> str:
  """Returns the heading of a section."""
  return f'<h2>{html.escape(text)}</h2>'


def paragraph(text: str) -> str:
  """Returns a paragraph."""
  return f'<p>{html.escape(text)}</p>'


def preformatted(text: str) -> str:
  """Returns preformatted lines."""
  return f'<pre>{html.escape(text)}</pre>'


def table(rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
  """Returns a table.

  Args:
    rows: Texts of the cells, the first row being the head.
    numbers: Whether to align all columns except the first on the right.
  """
  head, *body = rows
  cells = [map(html.escape, row) for row in body]
  return _table(head, cells, ' class="numbers"' if numbers else '')


def results(rows: Iterable[Sequence[str]], shown: int) -> str:
  """Returns a table whose cells can be unfolded and reached by `KEYS`.

  Args:
    rows: As for `table`; the first cell of a row is its rank.
    shown: Number of characters of a folded cell.
  """
  head, *body = rows
  cells = [
    [html.escape(place), *(_result(text, shown) for text in texts)]
    for place, *texts in body
  ]
  return _table(head, cells)


def search_form(query: str) -> str:
  """Returns a search form that sends the query to the same address.

  The form has the focus only if the query is empty.
  """
  focus = '' if query else ' autofocus'
  return (
    '<form role="search"><label>Query <input name="q" type="search" size="60" '
    f'value="{html.escape(query)}"{focus}></label> '
    '<button>Search</button></form>'
  )


def links(queries: Iterable[str]) -> str:
  """Returns a list of queries that link to their results."""
  lines = (
    f'<li><a href="?q={html.escape(urllib.parse.quote(query))}">'
    f'{html.escape(query)}</a></li>'
    for query in queries
  )
  return f'<ul>{"".join(lines)}</ul>'


def image(png: bytes, about: str) -> str:
  """Returns a picture embedded in the page.

  Args:
    png: Content of the PNG file.
    about: Alternative text.
  """
  data = base64.b64encode(png).decode()
  return f'<img src="data:image/png;base64,{data}" alt="{html.escape(about)}">'


def folded(summary: str, parts: Iterable[str]) -> str:
  """Returns HTML parts that are hidden until the summary is clicked."""
  return (
    f'<details><summary>{html.escape(summary)}</summary>\n'
    + '\n'.join(parts)
    + '\n</details>'
  )


def _result(text, shown):
  first, rest = html.escape(text[:shown]), html.escape(text[shown:])
  if not rest:
    return f'<span tabindex="0">{first}</span>' if first else ''
  return f'<details><summary>{first}…</summary>…{rest}</details>'


def _table(head, body, kind=''):
  """Returns a table; the head is text, the cells of the body are HTML."""
  rows = [('th', map(html.escape, head)), *(('td', cells) for cells in body)]
  lines = (
    '<tr>' + ''.join(f'<{tag}>{cell}</{tag}>' for cell in cells) + '</tr>\n'
    for tag, cells in rows
  )
  return f'<div class="wide"><table{kind}>\n{"".join(lines)}</table></div>'
