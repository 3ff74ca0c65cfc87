"""Models for --init_from: broken, unsupported and hostile ones.

Also destinations to which no model may be exported.
"""

import json
import os
import shutil

from bad_input_tools import Accepted
from bad_input_tools import Refused
from bad_input_tools import append
from bad_input_tools import change_json
from bad_input_tools import edit
from bad_input_tools import folder_as
from bad_input_tools import link
from bad_input_tools import pipe
from bad_input_tools import put
from bad_input_tools import put_json
from bad_input_tools import remove
from bad_input_tools import rename
from bad_input_tools import settings
from bad_input_tools import together
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from ance_jax import config
from ance_jax.core import atomic
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.jobs import export
from ance_jax.models import bert
from ance_jax.models import bert_weights
from ance_jax.models import bi_encoder
from ance_jax.models import pretrained
from ance_jax.training import experiment

TEXTS = ['some text of few words', 'more words of another text']
WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
INDEX = 'model.safetensors.index.json'
TOKENS, TOKENS_CONFIG = 'tokenizer.json', 'tokenizer_config.json'
MODULES, LENGTH = 'modules.json', 'sentence_bert_config.json'
POOLING, SENTENCES = (
  '1_Pooling/config.json',
  'config_sentence_transformers.json',
)
DENSE, ROUTER = '2_Dense/model.safetensors', 'router_config.json'
BODY = bert.BodyConfig('bert', 60, 8, 1, 2, 8, 16, 2, 1e-12, 'gelu')
WORDS = 'embeddings.word_embeddings.weight'
BIAS = 'embeddings.LayerNorm.bias'
TYPE = 'sentence_transformers.models.'


def make_sound(folder, sound):
  """Copies a BERT folder, made on the first call."""
  if not os.listdir(sound):
    params = bi_encoder.init(
      bi_encoder.RetrieverConfig(BODY, True, 'cls', 0, True, 'dot', 8, 8, ' '),
      0,
    )['tied']['body']
    save_file(bert_weights.body_to_tensors(params, BODY), sound / WEIGHTS)
    tokenizer_lib.train_vocabulary(TEXTS, 60).save_pretrained(sound)
    theirs = {
      'model_type': 'bert',
      'vocab_size': 60,
      'hidden_size': 8,
      'num_hidden_layers': 1,
      'num_attention_heads': 2,
      'intermediate_size': 8,
      'max_position_embeddings': 16,
      'type_vocab_size': 2,
      'layer_norm_eps': 1e-12,
      'hidden_act': 'gelu',
    }
    put_json(CONFIG, theirs)(sound)
  shutil.copytree(sound, folder, dirs_exist_ok=True)


def use(folder, changes):
  """Initializes a retriever from the folder, or exports the run in it."""
  changes = {'init_from': str(folder), **(changes or {})}
  if 'output' in changes:
    export.run(config.Config(job='export', workdir=str(folder), **changes))
  else:
    experiment.load_model(config.Config(**changes), TEXTS)


def tensors(change):
  """Returns a `make` that applies `change` to the dict of tensors."""

  def make(folder):
    found = dict(load_file(folder / WEIGHTS))
    change(found)
    save_file(found, folder / WEIGHTS)

  return make


def all_as(dtype):
  """Returns a `make` that stores all tensors as `dtype`."""
  return tensors(
    lambda found: found.update({k: v.astype(dtype) for k, v in found.items()})
  )


def spoilt(value):
  """Returns a `make` that writes a value into one tensor."""

  def change(found):
    found[WORDS] = found[WORDS].copy()
    found[WORDS][3, 4] = value

  return tensors(change)


def shards(**names):
  """Returns a `make` that shards the weights and adds `names` to the index."""

  def make(folder):
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = {'a.safetensors': {}, 'b.safetensors': {}}
    for number, (key, array) in enumerate(found.items()):
      parts[f'{"ab"[number % 2]}.safetensors'][key] = array
    for file, part in parts.items():
      save_file(part, folder / file)
    weight_map = {key: file for file, part in parts.items() for key in part}
    put_json(INDEX, {'weight_map': {**weight_map, **names}})(folder)

  return make


def _shard_outside(folder):
  outside = folder / 'outside'
  outside.mkdir()
  (folder / WEIGHTS).rename(outside / 'blob')
  (folder / WEIGHTS).symlink_to(outside / 'blob')


def _shards_twice(folder):
  shards()(folder)
  shutil.copy(folder / 'a.safetensors', folder / 'c.safetensors')
  old = json.loads((folder / INDEX).read_text())['weight_map']
  put_json(INDEX, {'weight_map': {**old, 'x': 'c.safetensors'}})(folder)


def number(name, value, says):
  """Returns the case of an impossible number in config.json."""
  return Refused(change_json(CONFIG, **{name: value}), says, CONFIG)


def other(says, **values):
  """Returns the case of an unsupported architecture in config.json."""
  return Refused(change_json(CONFIG, **values), says)


def sentences(*makes, kinds=('Transformer', 'Pooling', 'Normalize')):
  """Returns a `make` of a sentence-transformers folder, changed by `makes`."""

  def make(folder):
    put_json(
      MODULES,
      [
        {'idx': i, 'path': f'{i}_{kind}' * bool(i), 'type': f'{TYPE}{kind}'}
        for i, kind in enumerate(kinds)
      ],
    )(folder)
    put_json(POOLING, {'pooling_mode_mean_tokens': True})(folder)
    put_json(LENGTH, {'max_seq_length': 12})(folder)
    put_json(SENTENCES, {'similarity_fn_name': 'cosine'})(folder)
    return together(*makes)(folder) if makes else None

  return make


def dense(config=None, tensors=None, *more):
  """Returns a `make` of a sentence-transformers folder with a Dense module."""
  config = {
    'in_features': 8,
    'out_features': 4,
    'bias': True,
    'activation_function': 'torch.nn.modules.linear.Identity',
    **(config or {}),
  }
  random = np.random.default_rng(0)
  shapes = {'linear.weight': (4, 8), 'linear.bias': (4,), **(tensors or {})}
  arrays = {
    name: random.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
    if shape
  }

  def make(folder):
    put_json('2_Dense/config.json', config)(folder)
    save_file(arrays, folder / DENSE)
    for one in more:
      one(folder)

  return sentences(make, kinds=('Transformer', 'Pooling', 'Dense'))


def spoilt_dense(value):
  """Returns a `make` that writes a value into the bias of a Dense."""

  def make(folder):
    found = dict(load_file(folder / DENSE))
    found['linear.bias'] = np.array([0, value, 0, 0], np.float32)
    save_file(found, folder / DENSE)

  return make


def modality(value):
  """Returns a `make` of a sentence-transformers folder with modality_config."""
  return sentences(change_json(LENGTH, modality_config=value))


def output(name):
  """Returns a modality_config that selects an output of the Transformer."""
  return {'text': {'method': 'forward', 'method_output_name': name}}


def router(**values):
  """Returns a `make` of a Router with changed settings."""
  kinds = {'': 'Transformer', '1_Pooling': 'Pooling'}
  types = {path: TYPE + kind for path, kind in kinds.items()}
  routes = {'query': list(kinds), 'document': list(kinds)}
  given = {'types': types, 'structure': routes, **values}
  return sentences(put_json(ROUTER, given), kinds=('Router',))


def module(number, **values):
  """Returns a `make` that changes one entry of modules.json."""

  def make(folder):
    modules = json.loads((folder / MODULES).read_text())
    modules[number] = {**modules[number], **values}
    put_json(MODULES, modules)(folder)

  return sentences(make)


def _with_last_id(number):
  """Returns a `make` that gives the tokenizer words up to an id."""

  def make(folder):
    tokenizer = tokenizer_lib.load(str(folder))
    words = range(len(tokenizer), number + 1)
    tokenizer.add_tokens([f'word{word}' for word in words])
    tokenizer.save_pretrained(folder)

  return make


def _run_of_ours(change):
  def make(folder):
    retriever = bi_encoder.RetrieverConfig(
      BODY, True, 'cls', 0, True, 'dot', 8, 8, ' '
    )
    tokenizer = tokenizer_lib.load(str(folder))
    record = pretrained.model_files(retriever, tokenizer)
    step = folder / 'checkpoints' / '3'
    for name, content in record.items():
      path = step / 'record' / name
      atomic.make_folder(path.parent)
      path.write_bytes(content)
    atomic.commit(step, {})
    change(step)

  return make


def _other_version(*without, **values):
  """Returns the case of another version's run, with valid hashes."""

  def change(folder):
    change_json('record/model/retriever.json', *without, **values)(folder)
    (folder / 'manifest.json').unlink()
    atomic.commit(folder, {})

  return Refused(
    _run_of_ours(change),
    'this version does not know its settings',
    'retriever.json',
  )


def exported(*makes, output='out', **changes):
  """Returns a `make` that runs `makes` and exports to a path in the folder."""

  def make(folder):
    for one in makes:
      one(folder)
    return {'output': str(folder / output), **changes}

  return make


def _export_before(folder):
  use(folder, {'output': str(folder / 'out')})


HIDDEN = 'last_hidden_state'
HEADER = b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, %s]}}'
NOT_OURS = 'model of Transformer, Pooling and any of Dense'
LFS = 'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n'


def raw(header, says='safetensors cannot read it'):
  """Returns the case of a safetensors file with a bad header."""
  data = len(header).to_bytes(8, 'little') + header
  return Refused(put(WEIGHTS, data), says, WEIGHTS)


CASES = {
  # Paths.
  'file in its folder': Accepted(
    lambda folder: {'init_from': str(folder / WEIGHTS)}, 'tie_encoders True'
  ),
  'file without a folder': Refused(
    together(
      remove(CONFIG), lambda folder: {'init_from': str(folder / WEIGHTS)}
    ),
    'there is no config.json in FOLDER',
  ),
  'empty folder': Refused(
    remove(WEIGHTS, CONFIG, TOKENS, TOKENS_CONFIG), 'no config.json in FOLDER'
  ),
  'sound': Accepted(settings()),
  # config.json.
  'no config': Refused(remove(CONFIG), 'there is no config.json in FOLDER'),
  'pipe as config': Refused(pipe(CONFIG), 'there is a pipe', CONFIG),
  'folder as config': Refused(folder_as(CONFIG), 'there is a folder', CONFIG),
  'device as config': Refused(link(CONFIG, '/dev/zero'), 'or device', CONFIG),
  'config no JSON': Refused(
    put(CONFIG, '{\n"a": 1,\nb}'), 'one JSON', CONFIG, 3
  ),
  'config cut': Refused(
    edit(CONFIG, lambda d: d[:40]), 'one JSON value', CONFIG
  ),
  'config empty': Refused(put(CONFIG, ''), 'one JSON value', CONFIG, 1),
  'config a list': Refused(put(CONFIG, '[1]'), 'is not a JSON object', CONFIG),
  'config nested': Refused(
    put(CONFIG, '[' * 100_000), 'a thousand deep', CONFIG
  ),
  'config with NaN': Refused(
    put(CONFIG, '{"layer_norm_eps": NaN}'), 'is not a finite', CONFIG
  ),
  'config of 10,000 digits': Refused(
    put(CONFIG, '{"vocab_size": %s}' % ('9' * 10_000)), 'more than 300', CONFIG
  ),
  'config with a key twice': Refused(
    put(CONFIG, '{"a": 1, "a": 2}'), 'is 2 times in', CONFIG
  ),
  'config in Latin-1': Refused(put(CONFIG, b'{"a": "\xe9"}'), 'UTF-8', CONFIG),
  'config with BOM': Refused(
    edit(CONFIG, lambda d: b'\xef\xbb\xbf' + d), 'a byte order mark', CONFIG
  ),
  'huge config': Refused(
    lambda folder: os.truncate(folder / CONFIG, 2**27), 'more than', CONFIG
  ),
  'size as text': number('hidden_size', '8', "hidden_size is '8', not a whole"),
  'size a fraction': number('hidden_size', 8.5, "is '8.5', not a whole number"),
  'size a bool': number('type_vocab_size', True, 'a whole number from 1 to'),
  'size null': number('vocab_size', None, "vocab_size is 'None', not a"),
  'no size': number('intermediate_size', 0, 'a whole number from 1 to'),
  'negative size': number('num_attention_heads', -2, 'a whole number from 1'),
  'a billion layers': number('num_hidden_layers', 10**9, 'from 1 to 1,000'),
  'heads that do not divide': number(
    'num_attention_heads', 3, '=8 is not divisible by'
  ),
  'no positions': number(
    'max_position_embeddings', 2, '=2 leaves no room for 3'
  ),
  'epsilon of nothing': number(
    'layer_norm_eps', 0, "layer_norm_eps is '0', not"
  ),
  'epsilon as text': number(
    'layer_norm_eps', '1e-12', "layer_norm_eps is '1e-12'"
  ),
  'nonsense elsewhere': number(
    'hidden_dropout_prob', 'much', 'transformers cannot read it ('
  ),
  'another model': other('model_type electra', model_type='electra'),
  'unknown model': other('model_type my-bert', model_type='my-bert'),
  'list as model': other("model_type ['bert']", model_type=['bert']),
  'no model type': Refused(
    change_json(CONFIG, 'model_type'), 'model_type None'
  ),
  'a decoder': other('FOLDER has a decoder', is_decoder=True),
  'relative positions': other(
    'positions relative_key', position_embedding_type='relative_key'
  ),
  'unknown activation': other('hidden_act silu', hidden_act='silu'),
  'list as activation': other("hidden_act ['gelu']", hidden_act=['gelu']),
  'RoBERTa with other padding': other(
    'has roberta with pad_token_id 0', model_type='roberta', pad_token_id=0
  ),
  'MPNet with other padding': other(
    'has mpnet with pad_token_id 2', model_type='mpnet', pad_token_id=2
  ),
  'MPNet with other distances': other(
    '16 buckets of', model_type='mpnet', relative_attention_num_buckets=16
  ),
  'DistilBERT of another activation': other(
    'activation silu', model_type='distilbert', activation='silu'
  ),
  'DistilBERT of a text as size': Refused(
    change_json(CONFIG, model_type='distilbert', dim='8'), "dim is '8'", CONFIG
  ),
  'DistilBERT by names of BERT': Refused(
    change_json(CONFIG, model_type='distilbert', num_hidden_layers=10**9),
    "n_layers is '1000000000', not a whole number from 1 to 1,000",
    CONFIG,
  ),
  'BERT under another name': other(
    'is missing from a checkpoint of distilbert', model_type='distilbert'
  ),
  'code of its own': other('code of its own', auto_map={'AutoModel': 'evil.M'}),
  # Weights.
  'no weights': Refused(remove(WEIGHTS), 'there is no model.safetensors in'),
  'pickle alone': Refused(
    together(remove(WEIGHTS), put('pytorch_model.bin', b'\x80\x04.')),
    'not a PyTorch file',
  ),
  'pickle under another name': Refused(
    put(WEIGHTS, b'\x80\x04\x95' * 40), 'safetensors cannot read it', WEIGHTS
  ),
  'pointer of Git LFS': Refused(put(WEIGHTS, LFS), 'git lfs pull', WEIGHTS),
  'web page as weights': Refused(
    put(WEIGHTS, '<!DOCTYPE html><html></html>'), 'cannot read it', WEIGHTS
  ),
  'empty weights': Refused(put(WEIGHTS, ''), 'header too small', WEIGHTS),
  'weights cut': Refused(
    edit(WEIGHTS, lambda d: d[:-9]), 'safetensors cannot read it', WEIGHTS
  ),
  'weights cut in the header': Refused(
    edit(WEIGHTS, lambda d: d[:50]), 'safetensors cannot read it', WEIGHTS
  ),
  'weights with a tail': Refused(
    append(WEIGHTS, 'x'), 'safetensors cannot read it', WEIGHTS
  ),
  'header of 2**64 bytes': Refused(
    put(WEIGHTS, b'\xff' * 8 + b'{}'), 'header too large', WEIGHTS
  ),
  'header no JSON': raw(b'{"a": '),
  'header a list': raw(b'[]'),
  'header nested': raw(b'[' * 100_000),
  'tensor of 2**60 values': raw(HEADER % (b'1152921504606846976', b'4')),
  'tensor behind the end': raw(HEADER % (b'1000', b'4000')),
  'folder as weights': Refused(
    folder_as(WEIGHTS), 'there is a folder', WEIGHTS
  ),
  'pipe as weights': Refused(pipe(WEIGHTS), 'there is a pipe', WEIGHTS),
  'device as weights': Refused(link(WEIGHTS, '/dev/zero'), 'device', WEIGHTS),
  'link to nothing': Refused(
    link(WEIGHTS, 'gone'), 'there is nothing, and a file', WEIGHTS
  ),
  'links as in the cache': Accepted(_shard_outside),
  'tensor missing': Refused(tensors(lambda t: t.pop(BIAS)), f'{BIAS} is miss'),
  'tensor too many': Refused(
    tensors(lambda t: t.update(head=np.ones(3, np.float32))),
    'tensor head does not belong to a checkpoint of bert (1 such)',
  ),
  'tensor with an odd name': Refused(
    tensors(lambda t: t.update({'a\n\x1b[2J': np.ones(3, np.float32)})),
    'does not belong to',
  ),
  'another width': Refused(
    tensors(lambda t: t.update({BIAS: np.zeros(3, np.float32)})),
    'the shape (3,) in our layout, but config.json implies (8,)',
  ),
  'more layers in config': Refused(
    change_json(CONFIG, num_hidden_layers=2),
    'is missing from a checkpoint of bert (16 such)',
  ),
  'larger vocabulary in config': Refused(
    change_json(CONFIG, vocab_size=61), 'but config.json implies (61, 8)'
  ),
  'NaN weight': Refused(spoilt(np.nan), '1 of 480 values of tensor embed'),
  'infinite weight': Refused(spoilt(np.inf), '1 of 480 values of tensor embed'),
  'too large for float32': Refused(
    tensors(lambda t: t.update({BIAS: np.full(8, 1e300)})),
    f'8 of 8 values of tensor {BIAS} are not finite',
  ),
  'positions as whole numbers': Accepted(
    tensors(
      lambda found: found.update({'embeddings.position_ids': np.arange(16)})
    )
  ),
  'quantized': Refused(all_as(np.int8), 'is of I8, which', WEIGHTS),
  'whole numbers': Refused(all_as(np.int64), 'is of I64, which', WEIGHTS),
  'bools': Refused(all_as(bool), 'is of BOOL, which', WEIGHTS),
  'bfloat16': Accepted(all_as(ml_dtypes.bfloat16)),
  'double': Accepted(all_as(np.float64)),
  # Weights in several files.
  'two files': Accepted(shards()),
  'index no JSON': Refused(put(INDEX, '{'), 'not one JSON value', INDEX),
  'index a list': Refused(put(INDEX, '[]'), 'is not a JSON object', INDEX),
  'no weight map': Refused(
    put_json(INDEX, {}), "its weight_map, 'None', names", INDEX
  ),
  'weight map a list': Refused(
    put_json(INDEX, {'weight_map': ['a']}), 'names no files', INDEX
  ),
  'weight map of numbers': Refused(shards(x=3), 'is not a path within', INDEX),
  'file outside': Refused(
    shards(x='../../etc/x.safetensors'), "'../../etc/x.safe", INDEX
  ),
  'absolute file': Refused(
    shards(x='/etc/passwd'), "'/etc/passwd' is not a path within", INDEX
  ),
  'dots inside a path': Refused(
    shards(x='a/../../b.safetensors'), 'is not a path within', INDEX
  ),
  'Windows path': Refused(
    shards(x='..\\b.safetensors'), 'is not a path within', INDEX
  ),
  'pickle in the index': Refused(
    shards(x='pytorch_model.bin'), 'does not end in .safetensors', INDEX
  ),
  'file gone': Refused(
    together(shards(), remove('b.safetensors')), 'there is no b.safetensors'
  ),
  'file named that never was': Refused(
    shards(x='c.safetensors'), 'there is no c.safetensors'
  ),
  'tensor in two files': Refused(_shards_twice, 'is in another file too'),
  # The tokenizer.
  'no tokenizer': Refused(remove(TOKENS), 'no tokenizer loads at'),
  'no file of a tokenizer': Refused(
    remove(TOKENS, TOKENS_CONFIG), 'has no vocabulary but its special tokens'
  ),
  'tokenizer cut': Refused(
    edit(TOKENS, lambda d: d[:300]), 'not one JSON value', TOKENS
  ),
  'tokenizer a list': Refused(put(TOKENS, '[]'), 'not a JSON object', TOKENS),
  'tokenizer empty': Refused(put(TOKENS, '{}'), 'no tokenizer loads at'),
  'tokenizer without a model': Refused(
    change_json(TOKENS, model=None), 'no tokenizer loads at'
  ),
  'tokenizer nested': Refused(put(TOKENS, '[' * 100_000), 'nested', TOKENS),
  'pipe as tokenizer': Refused(pipe(TOKENS), 'there is a pipe', TOKENS),
  'tokenizer config no JSON': Refused(
    put(TOKENS_CONFIG, '{'), 'not one JSON value', TOKENS_CONFIG
  ),
  'tokenizer config a list': Refused(
    put(TOKENS_CONFIG, '[1]'), 'is not a JSON object', TOKENS_CONFIG
  ),
  'tokenizer with code': Refused(
    change_json(
      TOKENS_CONFIG,
      tokenizer_class='Mine',
      auto_map={'AutoTokenizer': ['evil.Mine', None]},
    ),
    'needs code of its own (auto_map)',
    TOKENS_CONFIG,
  ),
  'class a number': Refused(
    change_json(TOKENS_CONFIG, tokenizer_class=3), 'no tokenizer loads at'
  ),
  'list as padding': Refused(
    change_json(TOKENS_CONFIG, pad_token=['x']), 'no tokenizer loads at'
  ),
  'no padding': Refused(
    change_json(TOKENS_CONFIG, 'pad_token'), 'has no padding token'
  ),
  'no tokenizer config': Accepted(remove(TOKENS_CONFIG)),
  'no special tokens': Refused(
    change_json(TOKENS, post_processor=None), 'puts no special tokens around'
  ),
  'case of another tokenizer': Refused(
    change_json(TOKENS_CONFIG, do_lower_case=False),
    'but its files say that it keeps capitals',
  ),
  'case that a flag decides': Accepted(
    together(
      change_json(TOKENS_CONFIG, do_lower_case=False), settings(lower_case=True)
    )
  ),
  'tokenizer of more words': Refused(
    lambda folder: (
      tokenizer_lib.train_vocabulary(
        [chr(0x4E00 + i) for i in range(99)], 104
      ).save_pretrained(folder)
      and None
    ),
    'but the word embedding has 60 rows',
  ),
  'tokenizer of one word more': Refused(
    _with_last_id(60), 'has the id 60, but the word embedding has 60 rows'
  ),
  'tokenizer of all words': Accepted(_with_last_id(59)),
  # Settings that do not fit the model.
  'query beyond the positions': Refused(
    settings(query_length=17), '--query_length=17 is more than the 16 tokens'
  ),
  'passage beyond the positions': Refused(
    settings(passage_length=512), '--passage_length=512 is more than the 16'
  ),
  'capitals from nowhere': Refused(
    settings(lower_case=False), '--lower_case=false is given with a tokeni'
  ),
  'space before words': Refused(
    settings(prefix_space=True), '--prefix_space=true is given with a'
  ),
  'no space before words': Refused(
    settings(prefix_space=False, init_from=''), '--prefix_space=false is given'
  ),
  'no token as separator': Refused(
    together(
      change_json(TOKENS_CONFIG, 'sep_token'), settings(title_separator='token')
    ),
    '--title_separator=token is given',
  ),
  'norm without a projection': Refused(
    settings(head_norm=False), '--head_norm=false is given without a proj'
  ),
  'heads of new weights': Refused(
    settings(init_from='', num_heads=5), 'is not divisible by --num_heads=5'
  ),
  'vocabulary of new weights': Refused(
    settings(init_from='', vocab_size=5),
    '=5 does not hold the 5 special tokens',
  ),
  # sentence-transformers.
  'sentence-transformers': Accepted(sentences(), "pooling 'mean', simil"),
  'modules no JSON': Refused(
    sentences(put(MODULES, '[{')), 'not one JSON value', MODULES
  ),
  'modules an object': Refused(
    sentences(put(MODULES, '{}')), 'is not a JSON list', MODULES
  ),
  'no modules': Refused(sentences(put(MODULES, '[]')), NOT_OURS),
  'module a text': Refused(
    sentences(put(MODULES, '["Transformer"]')),
    "module 'Transformer' has no",
    MODULES,
  ),
  'module without a type': Refused(
    sentences(put(MODULES, '[{"path": ""}]')), "has no 'type' of sent", MODULES
  ),
  'type a number': Refused(module(0, type=3), "has no 'type' of", MODULES),
  'modules linked to nothing': Refused(
    sentences(link(MODULES, 'gone')), 'there is nothing, and', MODULES
  ),
  'transformer outside': Refused(
    module(0, path='../other'), 'is not a path within', MODULES
  ),
  'absolute transformer': Refused(module(0, path='/etc'), "'/etc'", MODULES),
  'pooling outside': Refused(
    module(1, path='../1_Pooling'), 'is not a path within', MODULES
  ),
  'path a number': Refused(module(1, path=7), 'is not a path within', MODULES),
  'no folder of pooling': Refused(
    module(1, path='2_Pooling'),
    'there is nothing, and',
    '2_Pooling/config.json',
  ),
  'output of the Transformer that is usual': Accepted(modality(output(HIDDEN))),
  'output of the Transformer unsaid': Accepted(modality(None)),
  'another output of the Transformer': Refused(
    modality(output('logits')),
    "'method_output_name': 'logits'}}; use",
  ),
  'output of the Transformer a list': Refused(
    modality(['text']), "FOLDER has modality_config ['text']; use"
  ),
  'output of the Transformer a text': Refused(
    modality({'text': HIDDEN}), "modality_config {'text': 'last_hidden_state'}"
  ),
  'keywords of the Transformer a number': Refused(
    sentences(change_json(LENGTH, model_args=3)), 'FOLDER has model_args 3; use'
  ),
  'include_prompt a number': Refused(
    sentences(change_json(POOLING, include_prompt=0)),
    'FOLDER/1_Pooling has include_prompt 0; use',
  ),
  'dropout behind the pooling': Accepted(
    sentences(
      put_json('2_Dropout/config.json', {'dropout': 0.1}),
      kinds=('Transformer', 'Pooling', 'Dropout', 'Normalize'),
    ),
    "2_Dropout: Dropout is left out; --dropout_rate is the body's",
  ),
  'dense on top': Accepted(dense(), 'head_size 4, head_norm False'),
  'dense under a head of another width': Refused(
    together(dense(), settings(head_size=5)),
    'the head of FOLDER does not fit --head_size=5, --pooling=mean and',
  ),
  'dense under a norm': Accepted(together(dense(), settings(head_norm=True))),
  'dense with an activation': Accepted(
    dense({'activation_function': 'torch.nn.modules.activation.GELU'}),
    'layers projection to 4 (GELU)',
  ),
  'dense with parameters of its activation': Refused(
    dense({'activation_function': 'torch.nn.modules.activation.PReLU'}),
    'has Dense with torch.nn.modules.activation.PReLU',
  ),
  'dense that says no activation': Accepted(
    dense(
      None, None, change_json('2_Dense/config.json', 'activation_function')
    ),
    'layers projection to 4 (Tanh)',
  ),
  'dense without a file': Refused(
    dense(None, None, remove(DENSE)), 'there is no model.safetensors in'
  ),
  'dense without a bias': Refused(
    dense(None, {'linear.bias': None}), 'but its config.json implies', DENSE
  ),
  'dense that needs no bias': Accepted(
    dense({'bias': False}, {'linear.bias': None}), 'head_size 4'
  ),
  'dense with one tensor more': Refused(
    dense(None, {'more': (3,)}), 'but its config.json implies', DENSE
  ),
  'dense of another shape': Refused(
    dense({'out_features': 5}),
    'config.json implies linear.weight (5, 8), linear.bias (5,)',
    DENSE,
  ),
  'dense of NaN': Refused(
    dense(None, None, spoilt_dense(np.nan)),
    '1 of 4 values of tensor linear.bias are not finite; use',
    DENSE,
  ),
  'infinite dense': Refused(
    dense(None, None, spoilt_dense(-np.inf)),
    'linear.bias are not finite',
    DENSE,
  ),
  'dense of another width': Refused(
    dense({'in_features': 9}, {'linear.weight': (4, 9)}),
    "takes '9' numbers, but 8 come before it",
  ),
  'a norm without a file': Refused(
    sentences(kinds=('Transformer', 'Pooling', 'LayerNorm')),
    'there is no model.safetensors in',
  ),
  'a module we have not': Refused(
    sentences(kinds=('Transformer', 'Pooling', 'LSTM')), 'a LSTM after Pool'
  ),
  'router': Accepted(router(), 'tie_encoders False'),
  'one tower of two': Refused(
    together(router(), settings(tie_encoders=True)),
    'tie_encoders=true is given with FOLDER, a checkpoint of two encoders',
  ),
  'router of other routes': Refused(
    router(structure={'a': [], 'b': []}), 'has a Router of a, b'
  ),
  'router without types': Refused(
    router(types=[]), 'a Router without types and structure'
  ),
  'router that leads out': Refused(
    router(
      types={'../x': f'{TYPE}Transformer'},
      structure={'query': ['../x'], 'document': ['../x']},
    ),
    "'../x' is not a path within",
    ROUTER,
  ),
  'router of no list': Refused(
    router(structure={'query': 3, 'document': 4}), "Router of {'query': 3,"
  ),
  'no pooling': Refused(sentences(kinds=('Transformer',)), NOT_OURS),
  'modules in another order': Refused(
    sentences(kinds=('Pooling', 'Transformer')), 'modules Pooling, Transformer'
  ),
  'class of its own': Refused(
    module(0, type='evil.Mine'), "has no 'type' of sentence_transf", MODULES
  ),
  'pooling no JSON': Refused(
    sentences(put(POOLING, '{')), 'not one JSON value', POOLING
  ),
  'pooling of maxima': Accepted(
    sentences(put_json(POOLING, {'pooling_mode': 'max'})), "pooling 'max'"
  ),
  'pooling of minima': Refused(
    sentences(put_json(POOLING, {'pooling_mode': 'min'})),
    "the pooling is ['min']",
  ),
  'two poolings': Accepted(
    sentences(change_json(POOLING, pooling_mode_cls_token=True)),
    "pooling 'cls+mean'",
  ),
  'no mode of pooling': Refused(
    sentences(put(POOLING, '{}')), 'the pooling is []'
  ),
  'mode a number': Refused(
    sentences(put_json(POOLING, {'pooling_mode': 3})), 'the pooling is 3'
  ),
  'prompts': Accepted(
    sentences(
      put_json(SENTENCES, {'prompts': {'query': 'q: ', 'passage': 'p: '}})
    ),
    "query_prompt 'q: ', passage_prompt 'p: '",
  ),
  'prompts of other tasks': Accepted(
    sentences(put_json(SENTENCES, {'prompts': {'cluster': 'c: '}})),
    'prompts for other tasks are left out: cluster',
  ),
  'a prompt for all': Refused(
    sentences(
      put_json(SENTENCES, {'prompts': {'a': 'a: '}, 'default_prompt_name': 'a'})
    ),
    'a prompt for all texts, a',
  ),
  'a prompt that is not pooled': Accepted(
    sentences(
      put_json(SENTENCES, {'prompts': {'query': 'q: '}}),
      change_json(POOLING, include_prompt=False),
    ),
    'include_prompt False',
  ),
  'prompts that are numbers': Refused(
    sentences(put_json(SENTENCES, {'prompts': {'query': 3}})), 'prompts {'
  ),
  'an export of another version': Refused(
    sentences(put_json('retriever.json', {'tied': True})),
    'this version does not know its settings',
    'retriever.json',
  ),
  'prompts a text': Refused(
    sentences(put_json(SENTENCES, {'prompts': 'q: '})), 'prompts q:'
  ),
  'other similarity': Refused(
    sentences(put_json(SENTENCES, {'similarity_fn_name': 'euclidean'})),
    'similarity euclidean',
  ),
  'similarity a list': Refused(
    sentences(put_json(SENTENCES, {'similarity_fn_name': ['dot']})),
    "similarity ['dot']",
  ),
  'settings a list': Refused(
    sentences(put(SENTENCES, '[]')), 'is not a JSON object', SENTENCES
  ),
  'lower case': Accepted(
    sentences(put_json(LENGTH, {'do_lower_case': True})), 'lower-cased'
  ),
  'lower case as text': Refused(
    sentences(put_json(LENGTH, {'do_lower_case': 'no'})), 'do_lower_case no'
  ),
  'length as text': Refused(
    sentences(put_json(LENGTH, {'max_seq_length': '12'})),
    "max_seq_length is '12'; set it to a whole number of at least 3",
    LENGTH,
  ),
  'negative length': Refused(
    sentences(put_json(LENGTH, {'max_seq_length': -1})),
    "is '-1'; set it",
    LENGTH,
  ),
  'length beyond the positions': Accepted(
    sentences(put_json(LENGTH, {'max_seq_length': 99})), 'passage_length 16'
  ),
  # A run of ours.
  'run without a manifest': Refused(
    _run_of_ours(remove('manifest.json')), 'there is no checkpoint in'
  ),
  'retriever changed': Refused(
    _run_of_ours(edit('record/model/retriever.json', lambda data: data + b' ')),
    'was changed',
  ),
  'run of a later version': _other_version(dialect='new'),
  'run of an earlier version': _other_version('title_separator'),
  'run without a body': _other_version('body'),
  'run of a shorter body': _other_version(body={'model_type': 'bert'}),
  'run without checkpoints': Refused(
    _run_of_ours(shutil.rmtree), 'there is no checkpoint in'
  ),
  'run in another folder': Refused(
    together(
      _run_of_ours(lambda folder: None),
      rename('checkpoints', 'checkpoint'),
      settings(init_from='/no/run'),
    ),
    'no file or folder',
  ),
  # Destinations of exports.
  'export': Accepted(exported(), 'exported: '),
  'export again': Accepted(
    exported(_export_before, overwrite=True), 'exported: '
  ),
  'export twice': Refused(exported(_export_before), 'is there already'),
  'export onto a file': Refused(exported(put('out', '')), 'is there already'),
  'export onto a link to nowhere': Refused(
    exported(link('out', '/no/such')), 'is there already'
  ),
  'export over a file': Refused(
    exported(put('out', ''), overwrite=True), 'is not what an export wrote'
  ),
  'export over its own source': Refused(
    exported(output='', overwrite=True), 'is not what an export wrote'
  ),
  'export over a manifest of another': Refused(
    exported(put_json('out/manifest.json', {}), overwrite=True),
    'is not what an export wrote',
  ),
  'export over a link': Refused(
    exported(
      _export_before, rename('out', 'old'), link('out', 'old'), overwrite=True
    ),
    'is not what an export wrote',
  ),
  'export below a file': Refused(
    exported(output=f'{CONFIG}/out'), 'cannot be made'
  ),
}
