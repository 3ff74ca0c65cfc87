"""Web pages of one file: no script, nothing loaded, and all text escaped.

The functions take texts, which they escape, and return HTML; only `page` and
`folded` take HTML, which is what the others returned.
"""

import base64
import html
import urllib.parse

# Whatever a text holds, a browser runs nothing and loads nothing; and a text in
# Arabic runs from the right.
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
"""


def page(title, parts):
  """Returns a page.

  Args:
    title: A text, also the first heading.
    parts: HTML of its parts, in order.
  """
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
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


def search_form(query):
  """Returns a line to type a query into, which asks the same address."""
  return (
    '<form role="search"><label>Query <input name="q" type="search" size="60" '
    f'value="{html.escape(query)}" autofocus></label> '
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


def _row(tag, cells):
  cells = ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)
  return f'<tr>{cells}</tr>\n'
