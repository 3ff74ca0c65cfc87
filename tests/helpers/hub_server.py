"""A local fake of Hugging Face's hub, and a function that fills its cache."""

import hashlib
import http.server
import json
import pathlib
import shutil
import threading

COMMITS = ('1' * 40, '2' * 40)


def put(cache, name, source, commit=COMMITS[0], refs=('main',), without=()):
  """Copies a folder into the layout of the hub's cache: links to blobs.

  Returns:
    Folder of the commit.
  """
  storage = pathlib.Path(cache, 'models--' + name.replace('/', '--'))
  snapshot = storage / 'snapshots' / commit
  for path in sorted(pathlib.Path(source).rglob('*')):
    inside = path.relative_to(source)
    if path.is_dir() or str(inside) in without:
      continue
    blob = storage / 'blobs' / hashlib.sha256(path.read_bytes()).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, blob)
    link = snapshot / inside
    link.parent.mkdir(parents=True, exist_ok=True)
    up = '../' * (len(inside.parts) + 1)
    link.symlink_to(f'{up}blobs/{blob.name}')
  for ref in refs:
    (storage / 'refs' / ref).parent.mkdir(parents=True, exist_ok=True)
    (storage / 'refs' / ref).write_text(commit)
  return snapshot


class Hub(http.server.ThreadingHTTPServer):
  """Serves the part of the hub's API that huggingface_hub uses in our tests.

  Attributes:
    models: {name: {commit: folder}}.
    refs: {(name, branch or tag): commit}.
    gated: Names of gated models.
    broken: Names of files whose download breaks off.
    fetched: Names of downloaded files, in order.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(('localhost', 0), _Handler)
    self.models, self.refs, self.gated, self.fetched = {}, {}, set(), []
    self.broken = set()
    threading.Thread(target=self.serve_forever, daemon=True).start()

  @property
  def address(self):
    return f'http://localhost:{self.server_port}'

  def add(self, name, folder, commit=COMMITS[0], ref='main'):
    self.models.setdefault(name, {})[commit] = pathlib.Path(folder)
    self.refs[name, ref] = commit


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    parts = self.path.partition('?')[0].strip('/').split('/')
    is_api = parts[:2] == ['api', 'models']
    parts = parts[2:] if is_api else parts
    name, rest = '/'.join(parts[:2]), parts[2:]
    if name in self.server.gated:
      return self._answer(403, error='GatedRepo')
    if name not in self.server.models:
      return self._answer(401, error='RepoNotFound')
    revision = rest[1] if len(rest) > 1 else 'main'
    commit = self.server.refs.get((name, revision), revision)
    folder = self.server.models[name].get(commit)
    if folder is None:
      return self._answer(404, error='RevisionNotFound')
    files = [p for p in sorted(folder.rglob('*')) if p.is_file()]
    if not is_api:
      file = '/'.join(rest[2:])
      if file in self.server.broken:
        self.close_connection = True
        return None
      if self.command == 'GET':
        self.server.fetched.append(file)
      return self._answer(200, (folder / file).read_bytes(), commit)
    if rest[:1] == ['tree']:
      return self._answer_json([_entry(p, folder) for p in files])
    siblings = [{'rfilename': str(p.relative_to(folder))} for p in files]
    return self._answer_json({'id': name, 'sha': commit, 'siblings': siblings})

  do_HEAD = do_GET

  def _answer_json(self, value):
    self._answer(200, json.dumps(value).encode(), kind='application/json')

  def _answer(self, status, body=b'', commit='', error='', kind='text/plain'):
    self.send_response(status)
    for name, value in {
      'Content-Type': kind,
      'Content-Length': str(len(body)),
      'ETag': f'"{_sha1(body)}"',
      'X-Repo-Commit': commit,
      'X-Error-Code': error,
    }.items():
      if value:
        self.send_header(name, value)
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(body)

  def log_message(self, *_):
    pass


def _entry(path, folder):
  data = path.read_bytes()
  return {
    'type': 'file',
    'path': str(path.relative_to(folder)),
    'size': len(data),
    'oid': _sha1(data),
  }


def _sha1(data):
  return hashlib.sha1(data).hexdigest()
