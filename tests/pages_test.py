"""Pages: balanced, self-contained, and no text of theirs is HTML."""

import html.parser

from ance_jax import pages

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


def check(page):
  """Returns the `Reader` of a page, which is whole and loads nothing."""
  assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
  reader = Reader(page)
  names = {name for name, _ in reader.tags}
  assert not names & {'script', 'link', 'iframe', 'object', 'embed', 'base'}
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
      pages.image(b'png', hostile),
      pages.folded(hostile, [pages.paragraph(hostile)]),
    ]
    reader = check(pages.page(hostile, parts))
    # Title, h1, h2, p, pre, two tables of two columns, summary, p in details.
    assert reader.texts.count(hostile) == 11
    alts = [attrs['alt'] for name, attrs in reader.tags if name == 'img']
    assert alts == [hostile]


def test_a_page_is_readable_in_light_and_dark_and_lets_nothing_in():
  page = pages.page('title', [])
  assert 'color-scheme: light dark' in page
  assert "default-src 'none'" in page
  assert 'http' not in page.replace('http-equiv', '')


def test_numbers_are_flush_right_and_the_head_is_one():
  table = pages.table([['a', 'b'], ['c', '1.5']], numbers=True)
  assert '<table class="numbers">' in table
  assert '<tr><th>a</th><th>b</th></tr>' in table
  assert '<tr><td>c</td><td>1.5</td></tr>' in table
