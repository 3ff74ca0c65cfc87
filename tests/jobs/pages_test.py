"""Pages: balanced, self-contained, and no text of theirs is HTML."""

import base64
import hashlib
import html.parser

from ance_jax.jobs import pages

HOSTILE = (
  '<script>alert(1)</script>',
  '</td></table></body><img src=x onerror=alert(1)>',
  '" onmouseover="alert(1)',
  "' autofocus onfocus='alert(1)",
  '<!-- ',
  ']]>',
  '&lt;script&gt; &amp; &#60;',
  '<style>@import url(http://example.com)</style>',
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_VOID = {'meta', 'img', 'br', 'hr', 'link', 'input'}


class Reader(html.parser.HTMLParser):
  """Checks that tags are closed in their order; keeps tags and texts.

  Attributes:
    tags: (name, attributes) of all of them.
    texts: What is between them, unescaped.
  """

  def __init__(self, page):
    super().__init__(convert_charrefs=True)
    self.tags, self.texts, self._open = [], [], []
    self.feed(page)
    self.close()
    assert self._open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in _VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_comment(self, data):
    raise AssertionError(f'a comment: {data}')

  def handle_data(self, data):
    self.texts.append(data)


def check(page, script=''):
  """Returns the `Reader` of a page, which is whole and loads nothing.

  It runs no script but one, which stands in it and in its policy.
  """
  assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
  reader = Reader(page)
  names = {name for name, _ in reader.tags}
  assert not names & {'link', 'iframe', 'object', 'embed', 'base'}
  assert page.count('<script') == bool(script)
  policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}'
  if script:
    assert f'<script>{script}</script>' in page
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest())
    policy += f"; script-src 'sha256-{digest.decode()}'"
  assert f'{policy}">' in page
  for name, attributes in reader.tags:
    assert not [key for key in attributes if key.startswith('on')], name
    assert attributes.get('href', '?q=').startswith('?q=')
    if 'src' in attributes:
      assert attributes['src'].startswith('data:image/png;base64,')
  return reader


def test_a_page_holds_every_hostile_text_as_text():
  rows = [['head', 'of it'], *([text, text] for text in HOSTILE)]
  for hostile in HOSTILE:
    parts = [
      pages.heading(hostile),
      pages.paragraph(hostile),
      pages.preformatted(hostile),
      pages.table(rows),
      pages.table(rows, numbers=True),
      pages.results(rows, 1000),
      pages.image(b'png', hostile),
      pages.folded(hostile, [pages.paragraph(hostile)]),
    ]
    reader = check(pages.page(hostile, parts, pages.KEYS), pages.KEYS)
    # Title, h1, h2, p, pre, three tables of two columns, summary, p in details.
    assert reader.texts.count(hostile) == 13
    alts = [attrs['alt'] for name, attrs in reader.tags if name == 'img']
    assert alts == [hostile]


def test_a_page_is_readable_in_light_and_dark_and_lets_nothing_in():
  page = pages.page('title', [])
  check(page)
  assert 'color-scheme: light dark' in page
  assert "default-src 'none'" in page
  assert 'http' not in page.replace('http-equiv', '')


def test_numbers_are_flush_right_and_the_head_is_one():
  table = pages.table([['a', 'b'], ['c', '1.5']], numbers=True)
  assert '<table class="numbers">' in table
  assert '<tr><th>a</th><th>b</th></tr>' in table
  assert '<tr><td>c</td><td>1.5</td></tr>' in table


def test_a_result_is_reached_by_keys_and_its_rest_is_folded():
  rows = [['', 'a', 'b'], ['1', 'short', '<&>' * 3], ['2', '', 'four']]
  table = pages.results(rows, 5)
  assert '<tr><th></th><th>a</th><th>b</th></tr>' in table
  first = html.escape('<&><&')
  rest = html.escape('><&>')
  assert (
    '<tr><td>1</td><td><span tabindex="0">short</span></td>'
    f'<td><details><summary>{first}…</summary>…{rest}</details></td></tr>'
  ) in table
  assert '<tr><td>2</td><td></td><td><span tabindex="0">four</span>' in table
  assert 'autofocus' in pages.search_form('')
  assert 'autofocus' not in pages.search_form('a query')
