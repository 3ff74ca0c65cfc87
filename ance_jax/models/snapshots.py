"""Maps names on Hugging Face's hub to folders of the hub's cache.

A name is OWNER/NAME or OWNER/NAME@REVISION, where the revision is a branch, tag
or commit. Only settings, tokenizer and one format of the weights are fetched.
"""

import os
import pathlib
import re

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors

from ance_jax import errors as errors_lib
from ance_jax.core import logs
from ance_jax.core import strict_io

_NAME = re.compile(r'(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(\w[\w/-]*(?:\.[\w/-]+)*))?')
_COMMIT = re.compile('[0-9a-f]{40}')
# Files to fetch first. `*` also matches slashes, so these cover subfolders.
_SETTINGS = (
  '*config.json', '*config_sentence_transformers.json', '*modules.json',
  '*tokenizer.json', '*special_tokens_map.json', '*added_tokens.json',
  '*vocab.json', '*vocab.txt', '*merges.txt', '*.model', '*.index.json',
  '*retriever.json',
)  # fmt: skip
_UNUSED = ('onnx/*', 'openvino/*', 'coreml/*', 'checkpoint-*', 'tf_*', 'flax_*')
# Files of weights in order of preference.
_WEIGHTS = ('model.safetensors', 'pytorch_model.bin')
_VOCABULARIES = ('tokenizer.json', 'vocab.txt', 'vocab.json', '*.model')
_WITH_WEIGHTS = ('Transformer', 'Dense', 'LayerNorm')
_WITH_SETTINGS = (*_WITH_WEIGHTS, 'Pooling')
# Only sentence-transformers saves these.
_SIGNS = ('config_sentence_transformers.json', '1_Pooling')


def folder(name: str) -> str:
  """Returns the folder of a model, fetching it from the hub if necessary.

  Existing paths are returned unchanged, even if the hub has such a name. A
  commit that is complete in the cache needs no network.

  Args:
    name: Path, or name on the hub.

  Raises:
    BadInput: The model cannot be found or fetched; the text says why.
  """
  if os.path.lexists(name):
    return name
  repository, revision = _parts(name)
  cached = _cached(repository, revision)
  lacks = cached and _missing(cached)
  if cached and revision == cached.name and not lacks:
    return str(cached)
  problem = _problem(repository, revision)
  if problem is None:
    return str(_fetched(name, repository, revision))
  if cached is None:
    raise _refusal(
      f'{name} is not a folder here, and not in the cache '
      f'{constants.HF_HUB_CACHE}',
      problem,
    )
  if lacks:
    raise _refusal(
      f'the cache {constants.HF_HUB_CACHE} has only a part of {name}, no '
      f'{lacks}',
      problem,
    )
  # The cache notes files that the hub lacks.
  noted = cached.parents[1] / '.no_exist' / cached.name / 'modules.json'
  if not (cached / 'modules.json').exists() and not noted.exists():
    logs.log(
      f'{name}: read as a plain body, as the cache has no modules.json of it; '
      'the hub, which may have one, was not asked'
    )
  return str(cached)


def pinned(names: str) -> str:
  """Returns comma-separated names, each hub name with its current commit.

  Raises:
    BadInput: As `folder`.
  """
  return ','.join(map(_pinned, names.split(',')))


def is_pin(pin: str, names: str) -> bool:
  """Returns whether `pinned(names)` may have returned `pin`.

  Branches and tags are resolved with the cache's current state.
  """
  pins, names = pin.split(','), names.split(',')
  return len(pins) == len(names) and all(map(_is_pin, pins, names))


def _pinned(name):
  path = folder(name) if name else name
  if path == name:
    return name
  return f'{_parts(name)[0]}@{pathlib.Path(path).name}'


def _is_pin(pin, name):
  if pin == name:
    return True
  old, new = _NAME.fullmatch(pin), _NAME.fullmatch(name)
  if not (old and new and old[2]) or old[1] != new[1]:
    return False
  cached = _cached(new[1], new[2])
  return new[2] is None or bool(cached and cached.name == old[2])


def _parts(name):
  """Returns (repository, revision or None) of a name."""
  found = _NAME.fullmatch(name)
  if not found:
    raise errors_lib.refusal(
      f'there is no file or folder {name!r}, and no model on the hub can have '
      'that name',
      'give a folder, a file of weights, OWNER/NAME or OWNER/NAME@REVISION',
    )
  return found.groups()


def _cached(repository, revision):
  """Returns the folder of a revision in the hub's cache, or None."""
  storage = pathlib.Path(
    constants.HF_HUB_CACHE, f'models--{repository.replace("/", "--")}'
  )
  commit = revision if revision and _COMMIT.fullmatch(revision) else None
  if commit is None:
    ref = storage / 'refs' / (revision or 'main')
    commit = ref.read_text().strip() if ref.is_file() else None
  snapshot = storage / 'snapshots' / (commit or '')
  return snapshot if commit and snapshot.is_dir() else None


def _problem(repository, revision):
  """Returns (fact, cure) if the hub cannot provide a model, else None."""
  try:
    huggingface_hub.HfApi().model_info(repository, revision=revision)
  except Exception as error:  # Its HTTP library differs between releases.
    return _explained(error, repository, revision)
  return None


def _explained(error, repository, revision):
  """Returns (fact, cure) for an error of the hub's client."""
  owner = '' if '/' in repository else ', with its owner'
  text = ' '.join(str(error).split())[:150].rstrip('.')
  table = (
    (
      errors.GatedRepoError,
      f'{repository} is gated on the hub',
      f'ask for access at {constants.ENDPOINT}/{repository}, then log in with '
      '`hf auth login` or set HF_TOKEN',
    ),
    (
      errors.RepositoryNotFoundError,
      f'the hub has no model {repository}, or it is private',
      f'check the name{owner}, or log in with `hf auth login`',
    ),
    (
      errors.RevisionNotFoundError,
      f'{repository} has no revision {revision} on the hub',
      'name a branch, a tag or all 40 digits of a commit',
    ),
    (
      errors.OfflineModeIsEnabled,
      'the hub is not asked in offline mode (HF_HUB_OFFLINE)',
      'unset that, or fetch the model first',
    ),
    (ValueError, f'the hub takes no such name ({text})', 'check it'),
    (
      Exception,
      f'the hub cannot be reached ({type(error).__name__}: {text})',
      'check the network, or copy the folder here',
    ),
  )
  return next(row[1:] for row in table if isinstance(error, row[0]))


def _refusal(fact, problem):
  return errors_lib.refusal(f'{fact}, and {problem[0]}', problem[1])


def _fetched(name, repository, revision):
  """Fetches all needed files of a revision; returns its folder."""

  def fetch(revision, patterns):
    try:
      return pathlib.Path(
        huggingface_hub.snapshot_download(
          repository,
          revision=revision,
          allow_patterns=['config.json', *patterns],
          ignore_patterns=list(_UNUSED),
        )
      )
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
      problem = _explained(error, repository, revision)
      raise _refusal(
        f'the cache {constants.HF_HUB_CACHE} has no whole {name}', problem
      ) from error

  found = fetch(revision, _SETTINGS)
  parts = [part for part, kind in _modules(found) if kind in _WITH_WEIGHTS]
  for weights in _WEIGHTS:
    files = [f for part in parts for f in _files_of(found, part, weights)]
    fetch(found.name, files)
    parts = [part for part in parts if not _are_whole(found, part, weights)]
  return found


def _modules(folder):
  """Yields (subfolder, class name) of each module that a model declares."""
  path = folder / 'modules.json'
  entries = strict_io.json_file(path, list) if path.exists() else []
  named = [(e.get('path'), e.get('type')) for e in entries if type(e) is dict]
  for part, kind in named or [('', 'Transformer')]:
    if not isinstance(part, str) or not isinstance(kind, str):
      continue
    yield part, kind.rpartition('.')[2]
    router = folder / part / 'router_config.json'
    types = strict_io.json_file(router).get('types') if router.exists() else {}
    for inner, kind in types.items() if isinstance(types, dict) else ():
      yield (
        str(pathlib.PurePosixPath(part, inner)),
        str(kind).rpartition('.')[2],
      )


def _files_of(folder, part, weights):
  """Returns the files, in a snapshot, of a module's weights in one format."""
  index = folder / part / f'{weights}.index.json'
  named = (
    strict_io.json_file(index).get('weight_map') if index.exists() else None
  )
  files = set(map(str, named.values())) if type(named) is dict else {weights}
  return [str(pathlib.PurePosixPath(part, file)) for file in sorted(files)]


def _are_whole(folder, part, weights):
  return all((folder / f).exists() for f in _files_of(folder, part, weights))


def _missing(folder):
  """Returns the first file missing from a copy of a model, or None."""
  there = {}
  if any((folder / sign).exists() for sign in _SIGNS):
    there['modules.json'] = (folder / 'modules.json').exists()
  for part, kind in _modules(folder):
    here = folder / part
    if kind in _WITH_SETTINGS:
      there[f'{part}/config.json'] = (here / 'config.json').exists()
    if kind in _WITH_WEIGHTS:
      there[f'{part}/{_WEIGHTS[0]}'] = any(
        _are_whole(folder, part, weights) for weights in _WEIGHTS
      )
    if kind == 'Transformer':
      there[f'{part}/{_VOCABULARIES[0]}'] = any(
        path.exists() for name in _VOCABULARIES for path in here.glob(name)
      )
  return next((file.strip('/') for file in there if not there[file]), None)
