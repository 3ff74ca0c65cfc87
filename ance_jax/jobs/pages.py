"""Web pages of one file: nothing loaded, all text escaped, one script at most.

The functions take texts, which they escape, and return HTML; only `page` and
`folded` take HTML, which is what the others returned.
"""

import base64
import hashlib
import html
import urllib.parse

# Whatever a text holds, a browser runs nothing but KEYS, by its hash, and loads
# nothing; and a text in Arabic runs from the right.
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
# A script: / goes to the query; j and k, or arrows, go down and up a column of
# results or links; Enter, of the browser's own, unfolds or follows.
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


def page(title, parts, script=''):
  """Returns a page.

  Args:
    title: A text, also the first heading.
    parts: HTML of its parts, in order.
    script: `KEYS`, or none.
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


def heading(text):
  """Returns the heading of a section."""
  return f'<h2>{html.escape(text)}</h2>'


def paragraph(text):
  """Returns a paragraph."""
  return f'<p>{html.escape(text)}</p>'


def preformatted(text):
  """Returns lines that stay as they are."""
  return f'<pre>{html.escape(text)}</pre>'


def table(rows, *, numbers=False):
  """Returns a table.

  Args:
    rows: Lists of texts, the first one being the head.
    numbers: Whether all columns but the first are numbers, flush right.
  """
  head, *body = rows
  lines = [_row('th', head), *(_row('td', row) for row in body)]
  kind = ' class="numbers"' if numbers else ''
  return f'<div class="wide"><table{kind}>\n{"".join(lines)}</table></div>'


def results(rows, shown):
  """Returns a table whose cells are reached by `KEYS`, and unfolded.

  Args:
    rows: As for `table`; first in each is its place, which is no result.
    shown: Characters of a cell that are seen before it is unfolded.
  """
  head, *body = rows
  lines = [_row('th', head)]
  for place, *cells in body:
    cells = ''.join(f'<td>{_result(cell, shown)}</td>' for cell in cells)
    lines.append(f'<tr><td>{html.escape(place)}</td>{cells}</tr>\n')
  return f'<div class="wide"><table>\n{"".join(lines)}</table></div>'


def search_form(query):
  """Returns a line to type a query into, which asks the same address.

  Keys go to the results of a query, and else to the line.
  """
  focus = '' if query else ' autofocus'
  return (
    '<form role="search"><label>Query <input name="q" type="search" size="60" '
    f'value="{html.escape(query)}"{focus}></label> '
    '<button>Search</button></form>'
  )


def links(queries):
  """Returns a list of queries, each a link to what it finds."""
  lines = (
    f'<li><a href="?q={html.escape(urllib.parse.quote(query))}">'
    f'{html.escape(query)}</a></li>'
    for query in queries
  )
  return f'<ul>{"".join(lines)}</ul>'


def image(png, about):
  """Returns a picture, which lies in the page.

  Args:
    png: Its bytes.
    about: What it shows, for those who do not see it.
  """
  data = base64.b64encode(png).decode()
  return f'<img src="data:image/png;base64,{data}" alt="{html.escape(about)}">'


def folded(summary, parts):
  """Returns HTML parts of which only a line is seen until it is clicked."""
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


def _row(tag, cells):
  cells = ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)
  return f'<tr>{cells}</tr>\n'
