"""Input of --job=mine: flags, rankings and cross-encoders."""

import json
import os
import shutil

from bad_input_tools import Accepted
from bad_input_tools import Refused
from bad_input_tools import append
from bad_input_tools import change_json
from bad_input_tools import edit
from bad_input_tools import put
from bad_input_tools import put_json
from bad_input_tools import remove
from bad_input_tools import settings
from bad_input_tools import together
import cases_beir
import jax
import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save_file

from ance_jax import config
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.jobs import mine
from ance_jax.models import bert
from ance_jax.models import bert_weights

RANKING, ENCODER, PAIRS = 'ranking.trec', 'encoder', 'pairs/pairs.jsonl'
WEIGHTS, CONFIG = f'{ENCODER}/model.safetensors', f'{ENCODER}/config.json'
TOKENS, SETTINGS = (
  f'{ENCODER}/tokenizer_config.json',
  f'{ENCODER}/config_sentence_transformers.json',
)
BODY = bert.BodyConfig('bert', 60, 8, 1, 2, 8, 16, 1, 1e-12, 'gelu')


def make_sound(folder, sound):
  """Copies data, a ranking and a cross-encoder, made on the first call."""
  if not os.listdir(sound):
    (sound / 'data').mkdir()
    (sound / ENCODER).mkdir()
    (sound / 'mined').mkdir()
    cases_beir.make_sound(sound / 'data', None)
    put(RANKING, 'q0 Q0 p1 1 3 x\nq0 Q0 p2 2 2 x\nq1 Q0 p4 1 1 x\n')(sound)
    _make_encoder(sound)
  shutil.copytree(sound, folder, dirs_exist_ok=True)


def _make_encoder(folder):
  ids = np.zeros((1, 2), np.int32)
  params = bert.Body(BODY).init(jax.random.key(0), ids, ids[:, 0] + 1)['params']
  tensors = {
    f'bert.{name}': array
    for name, array in bert_weights.body_to_tensors(params, BODY).items()
  }
  for name, rows in (('bert.pooler.dense', 8), ('classifier', 1)):
    tensors[f'{name}.weight'] = np.ones((rows, 8), np.float32)
    tensors[f'{name}.bias'] = np.ones(rows, np.float32)
  save_file(tensors, folder / WEIGHTS)
  tokenizer = tokenizer_lib.train_vocabulary(['text what', 'what a text'], 60)
  tokenizer.save_pretrained(folder / ENCODER)
  theirs = {
    'model_type': 'bert',
    'vocab_size': 60,
    'hidden_size': 8,
    'num_hidden_layers': 1,
    'num_attention_heads': 2,
    'intermediate_size': 8,
    'max_position_embeddings': 16,
    'type_vocab_size': 1,
  }
  put_json(CONFIG, theirs)(folder)
  put_json(SETTINGS, {'activation_fn': 'torch.nn.modules.activation.Sigmoid'})(
    folder
  )


def use(folder, changes):
  """Mines with the folder's data, ranking and cross-encoder."""
  given = {
    'workdir': str(folder / 'mined'),
    'dataset': 'beir',
    'data_dir': str(folder / 'data'),
    'ranking': str(folder / RANKING),
    'cross_encoder': str(folder / ENCODER),
    'rerank_max_score': 1.0,
    **(changes or {}),
  }
  mine.run(config.Config(job='mine', num_devices=1, **given))


def flags(says, **changes):
  """Returns the case of inconsistent flags."""
  return Refused(settings(**changes), says)


def unscored(says, **changes):
  """Returns the case of inconsistent flags without a cross-encoder."""
  return flags(says, cross_encoder='', rerank_max_score=None, **changes)


def tensors(says, **changes):
  """Returns the case of a cross-encoder with changed or removed tensors."""

  def make(folder):
    found = {**load_file(folder / WEIGHTS), **changes}
    found = {name: array for name, array in found.items() if array is not None}
    save_file(found, folder / WEIGHTS)

  return Refused(make, says)


def _ones(*shape):
  return np.ones(shape, np.float32)


def activation(name):
  """Returns a `make` that sets the cross-encoder's activation."""
  return put_json(SETTINGS, {'activation_fn': name})


def modules(*kinds):
  """Returns a `make` that sets the cross-encoder's modules."""
  names = [f'sentence_transformers.models.{kind}' for kind in kinds]
  listed = [{'type': name, 'path': ''} for name in names]
  return put_json(f'{ENCODER}/modules.json', listed)


def _file_as_encoder(folder):
  return {'cross_encoder': str(folder / CONFIG)}


def _score_run(folder):
  put(RANKING, 'q0 Q0 p1 1 good x\n')(folder)
  return {'cross_encoder': '', 'score_run': str(folder / RANKING)}


def _second_type(data):
  template = json.loads(data)
  for token in template['post_processor']['pair'][-2:]:
    for piece in token.values():
      piece['type_id'] = 1
  return json.dumps(template).encode()


def _mined_before(folder):
  put('mined/hard_negatives.triplets.jsonl', '{}')(folder)


def pair(text, says):
  """Returns the case of a bad second line of pairs."""

  def make(folder):
    put(PAIRS, '{"anchor": "what", "positive": "text"}\n' + text)(folder)
    return {'dataset': 'pairs', 'data_dir': str(folder / 'pairs')}

  return Refused(make, says, PAIRS, 2)


def _pairs(*texts, **files):
  """Returns a `make` that writes a folder of pairs and other files."""

  def make(folder):
    put(PAIRS, ''.join(texts))(folder)
    for name, text in files.items():
      put(f'pairs/{name}.jsonl', text)(folder)
    return {
      'dataset': 'pairs',
      'data_dir': str(folder / 'pairs'),
      'cross_encoder': '',
      'rerank_max_score': None,
      'ranking': '',
      'retriever': 'bm25',
      'dev_fraction': 0.0,
    }

  return make


GOOD = ''.join(
  f'{{"query": "which text {i}", "positive": "text {i}"}}\n' for i in range(3)
)
CASES = {
  'sound': Accepted(settings(), 'sigmoid of its output'),
  # Flags.
  'more negatives than ranks': flags(
    '--num_negatives=9 does not fit', num_negatives=9, max_rank=8
  ),
  'skips all but three': flags(
    '--skip_ranks=97 and --max_rank=100', skip_ranks=97
  ),
  'least score above the most': flags(
    '--min_score=1.0 is above --max_score=0.5', min_score=1.0, max_score=0.5
  ),
  'NaN as margin': flags(
    '--relative_margin=nan is out of range', relative_margin=np.nan
  ),
  'negative margin': flags(
    '--absolute_margin=-0.1 is out of range', absolute_margin=-0.1
  ),
  'margin of a whole': flags('=1.0 is out of range', relative_margin=1.0),
  'form of another': flags(
    '--format=parquet does not exist; choose one of triplets', format='parquet'
  ),
  'centred without a margin': flags(
    '--center_scores=true is given without', center_scores=True
  ),
  'scorer without a bound': flags(
    'is given without --rerank_max_score', rerank_max_score=None
  ),
  'bound without a scorer': flags(
    '=1.0 is given without scores', cross_encoder=''
  ),
  'two scorers': flags(
    '--score_run=/no/run cannot be used with --cross_', score_run='/no/run'
  ),
  'ranking and BM25': flags('=bm25 both choose', retriever='bm25'),
  'output in no folder': flags('/no is not a folder', output='/no/file'),
  'folder as output': flags('/tmp is a folder', output='/tmp'),
  'mined before': Refused(_mined_before, 'is there already'),
  'no workdir': flags('without --workdir', workdir=''),
  'nothing that ranks': unscored('there is no run in', ranking=''),
  'ranking nowhere': unscored(
    'there is nothing, and a file is needed', ranking='/no/file'
  ),
  'filled beyond the corpus': unscored(
    'up to 2, and the corpus has 5', on_shortage='fill', num_negatives=5
  ),
  'answers where there are none': unscored(
    '--drop_answers needs answers', drop_answers=True
  ),
  'nothing left': unscored('training queries can be written', max_score=-9.0),
  'ranking of other passages': Refused(
    append(RANKING, 'q1 Q0 p77 2 0 x\n'),
    "the ranked passage 'p77' is not in",
    RANKING,
    4,
  ),
  'scores with a word as score': Refused(
    _score_run, "the score 'good' is not a number", RANKING, 1
  ),
  # Pairs.
  'pairs': Accepted(_pairs(GOOD), 'pairs: 3 passages'),
  'pairs twice': Accepted(_pairs(GOOD, GOOD), '3 repeated pairs'),
  'pairs beside a corpus': Accepted(
    _pairs(GOOD, corpus=cases_beir.passage(1)), 'pairs: 3 passages, 0'
  ),
  'no pairs': Refused(
    lambda folder: {'dataset': 'pairs', 'data_dir': str(folder / 'data')},
    'neither pairs.jsonl nor pairs.jsonl.gz',
  ),
  'empty pairs': Refused(_pairs(''), 'the file has no entries', PAIRS),
  'pair of a list': pair('["what", "text"]', 'is not a JSON object'),
  'list in an array of pairs': Refused(
    _pairs('[{"anchor": "what", "positive": "text"}, ["what", "text"]]'),
    "item 2, \"['what', 'text']\", is not an object",
    PAIRS,
  ),
  'pair of texts alone': pair(
    '{"text": "what"}', "no query among the keys 'text'"
  ),
  'pair without a positive': pair('{"anchor": "what"}', 'has no positive'),
  'two queries in a pair': pair(
    '{"anchor": "a", "query": "b", "positive": "c"}',
    "more than one of 'anchor', 'query'",
  ),
  'pair with half a label': pair(
    '{"anchor": "a", "positive": "c", "label": 0.5}', 'is not 1 or 0'
  ),
  'pair with a key more': Accepted(
    _pairs(GOOD, '{"anchor": "a", "positive": "c", "source": "web"}\n'),
    "1 lines with 'source', which is not read",
  ),
  'pair of numbers': pair(
    '{"anchor": 1, "positive": "c"}', 'the query 1 is not a string'
  ),
  'empty query in a pair': pair(
    '{"anchor": " ", "positive": "c"}', "' ' or its positive has no text"
  ),
  'pairs beside a corpus without ids': Refused(
    _pairs(GOOD, corpus='{"text": "text"}\n'),
    "no '_id' among",
    'pairs/corpus.jsonl',
    1,
  ),
  # The cross-encoder.
  'encoder that the cache lacks': flags(
    'not in the cache', cross_encoder='some/name'
  ),
  'file as encoder': Refused(
    _file_as_encoder, 'config.json is a file; name its'
  ),
  'encoder without a config': Refused(
    remove(CONFIG), 'no config.json in FOLDER/'
  ),
  'encoder without weights': Refused(remove(WEIGHTS), 'there is no model.safe'),
  'encoder without a tokenizer': Refused(
    remove(f'{ENCODER}/tokenizer.json', TOKENS), 'has no vocabulary'
  ),
  'encoder of another kind': Refused(
    change_json(CONFIG, model_type='deberta-v2'), 'model_type deberta-v2'
  ),
  'body as encoder': tensors(
    'has no tensor classifier.weight',
    **{'classifier.weight': None, 'classifier.bias': None},
  ),
  'encoder without a pooler': tensors(
    'no tensor bert.pooler.dense.bias', **{'bert.pooler.dense.bias': None}
  ),
  'encoder of three outputs': tensors(
    'has 3 outputs instead of one',
    **{'classifier.weight': _ones(3, 8), 'classifier.bias': _ones(3)},
  ),
  'encoder with an odd pooler': tensors(
    'a pooler of shapes [(9, 8), (8,)], not [(8, 8), (8,)]',
    **{'bert.pooler.dense.weight': _ones(8, 9)},
  ),
  'encoder with a tensor too many': tensors(
    'classifier.norm does not belong to', **{'classifier.norm': _ones(1)}
  ),
  'encoder of NaN': tensors(
    'tensor classifier.bias are not finite',
    **{'classifier.bias': np.nan * _ones(1)},
  ),
  'encoder by tanh': Refused(
    activation('torch.nn.modules.activation.Tanh'), 'activation torch.nn.mod'
  ),
  'encoder with a prompt': Refused(
    put_json(SETTINGS, {'default_prompt_name': 'ask'}), 'all texts, ask'
  ),
  'encoder of two modules': Refused(
    modules('Transformer', 'Dense'), 'has 2 modules'
  ),
  'encoder with token types that it lacks': Refused(
    together(
      change_json(TOKENS, model_input_names=['input_ids', 'token_type_ids']),
      edit(f'{ENCODER}/tokenizer.json', _second_type),
    ),
    'gives 2 token types, but the model has 1',
  ),
  'encoder of four tokens': Refused(
    put_json(f'{ENCODER}/sentence_bert_config.json', {'max_seq_length': 4}),
    'takes 4 tokens, and the shortest pair has 5',
  ),
}
