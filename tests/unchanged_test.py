"""Rare settings together give what they gave: numbers, files and lines shown.

Each run of TRAIN has many rare settings at once, and the jobs of READ read it.
Its small set has what real sets have: equal texts, queries among the passages,
grades of 0, judged ids that the corpus lacks, titles, answers, texts without
letters. All that is printed and written, except times, is compared with
data/unchanged.json. After an intended change, write that file again with
`pytest tests/unchanged_test.py --write_unchanged`, and read its diff.
"""

import json
import pathlib
import re

import numpy as np
import old_run_test
import pytest

pytestmark = pytest.mark.usefixtures('compiled_once')
EXPECTED = pathlib.Path(__file__).parent / 'data' / 'unchanged.json'
# Other processors round otherwise; bfloat16 is left out, as it would differ by
# more.
ACCURACY = 1e-3
NUMBER = re.compile(r'\d+(?:\.\d+)?')
# Lines that only slow machines print, and words that differ between machines.
SLOW = re.compile(r' so far$| left$')
MACHINE = re.compile(
  r'\b[0-9a-f]{12,64}\b|\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d'
  r'|[\d.,]+ (s|ms|min|h|GB|MB|kB|[GT]FLOP/s|\w+/s|\w+ per second)\b'
)
OF_MACHINE = re.compile(
  '^time/|secs$|^seconds|hash$|sha256|^made|^files$|^about$|memory|^run$'
  '|^checkpoint$|^weights$'
)
# Parts of a page: the last is of all flags.
OF_TIMES = re.compile('Costs|Seconds|<summary>')
# Files of a run that its jobs have written.
FILES = (
  'run/export-6/**/*.json',
  'exported/*.json',
  'other/*.json',
  'run/*.jsonl',
  'run/*.json',
  'run/*.trec',
  'run/*.html',
  'run/refresh/*/*.*',
)
SMALL = [
  '--dataset=beir', '--data_dir={data}', '--num_devices=2', '--num_layers=1',
  '--hidden_size=16', '--num_heads=2', '--intermediate_size=32',
  '--vocab_size=300', '--query_length=8', '--passage_length=16',
  '--batch_size=8', '--top_k=6', '--max_steps=6', '--steps_per_refresh=3',
  '--steps_per_log=2', '--learning_rate=1e-2', '--lr_warmup_steps=2',
  '--noprogress_bars',
]  # fmt: skip
TRAIN = {
  'centred': [
    '--method=ance', '--warmup_method=random', '--warmup_steps=2',
    '--dropout_rate=0.2', '--micro_batch_size=2', '--weight_decay=0.1',
    '--optimizer=adamw', '--clip_norm=0.5', '--pooling=mean',
    '--similarity=cosine', '--temperature=0.1', '--head_size=8',
    '--query_prompt=query: ', '--passage_prompt=passage: ',
    '--title_separator=token', '--rows_per_block=24',
    '--center_passages', '--index=SQ8', '--relative_margin=0.05',
    '--on_shortage=fill', '--num_hard_negatives=3', '--protocol=beir',
  ],
  'pieces': [
    '--method=ance_in_batch', '--chunks=3', '--whole_chunks',
    '--passage_length=6', '--tie_encoders=false', '--dropout_rate=0.1',
    '--micro_batch_size=2', '--remat', '--query_slices=2', '--index=device',
    '--search_memory_mb=1', '--rows_per_block=16', '--z_margin=0.01',
    '--max_rank=60',
    '--on_shortage=keep', '--choose=random',
    # So little that rounding does not change what is mined.
    '--pooling=cls', '--learning_rate=1e-5',
    '--drop_answers=false', '--nodrop_same_text', '--steps_per_eval=2',
    '--num_hard_negatives=2', '--adam_epsilon=1e-3',
  ],
  'code': [
    '--method=ance_code', '--num_hard_negatives=2', '--warmup_method=bm25',
    '--warmup_steps=2', '--bm25_language=none', '--pooling=weightedmean',
    '--nohead_norm', '--head_size=6',
    '--refresh_mode=delayed', '--refresh_delay=1',
    '--protocol=answers',
  ],
  'answers': [
    '--method=ance_code_qa', '--skip_ranks=1', '--max_rank=9',
    '--refresh_trigger=0.3', '--steps_per_checkpoint=2',
    '--refresh_schedule=0-2:1,2-:2',
    '--pooling=lasttoken', '--similarity=dot', '--center_scores',
    '--relative_margin=0.01', '--on_shortage=drop',
  ],
  'given': [
    '--dataset=pairs', '--data_dir={pairs}', '--dev_fraction=0.3',
    '--method=ance_in_batch', '--warmup_method=given_in_batch',
    '--warmup_steps=3', '--num_hard_negatives=2', '--similarity=cosine',
    '--temperature=0.05', '--head_size=12', '--pooling=mean_sqrt_len_tokens',
    '--query_prompt=q: ', '--num_devices=1', '--max_refreshes=1',
    '--bm25_language=bigrams', '--steps_per_eval=4',
  ],
}  # fmt: skip
# Jobs on the run, a line each.
READ = {
  'centred': """
    evaluate --split=test
    evaluate --split=test --protocol=usual --checkpoint=3 --index=Flat
    evaluate --split=train --protocol=usual
    mine --num_negatives=3 --max_rank=12 --z_margin=0.2 --on_shortage=keep
      --format=triplets_scored --output={run}/a.jsonl
    mine --num_negatives=3 --choose=random --on_shortage=fill
      --absolute_margin=0.1 --format=dpr --output={run}/b.json
    mine --num_negatives=3 --relative_margin=0.02 --rerank_max_score=0.9
      --score_run={run}/train-model-6.trec --format=flag_embedding
      --output={run}/c.jsonl
    audit
    inspect
    search --query=ab1 --num_results=4
    report
  """,
  'pieces': """
    evaluate --split=test
    mine --skip_ranks=2 --max_score=3.0 --format=n_tuples --num_negatives=2
      --on_shortage=fill --output={run}/a.jsonl
    audit --split=dev
    inspect
    report
  """,
  'code': """
    evaluate --split=test --retriever=bm25 --workdir={tmp}/bm25
    evaluate
    evaluate --checkpoint=3
    compare --split=dev --runs={run}/dev-model-6.trec,{run}/dev-model-3.trec
  """,
  'answers': """
    evaluate --split=test --protocol=answers
    report
  """,
  'given': """
    evaluate --num_devices=1
    evaluate --num_devices=2 --checkpoint=best --index=IVF4,Flat
      --index_params=nprobe=2 --workdir={tmp}/other --init_from={run}
    export --similarity=dot
    evaluate --init_from={run}/export-6 --workdir={tmp}/exported
    search --init_from={run}/export-6 --workdir={tmp}/exported --query=ab1
      --query_length=5
    audit --split=train
    mine --num_negatives=2 --format=ids --output={run}/a.jsonl --retriever=bm25
      --bm25_b=0.1
    encode --workdir={tmp}/encoded --init_from={run}
    inspect
  """,
}


def write_set(folder):
  """Writes a BEIR folder with answers that has what real sets have."""
  random = np.random.default_rng(5)
  letters = 'ab cd ef gh ij kl mn op'.split()
  words = [f'{pair}{n}' for pair in letters for n in range(9)]
  texts = [
    ' '.join(random.choice(words, n)) for n in random.integers(3, 30, 70)
  ]
  texts[10:14] = [texts[0], texts[0].upper(), texts[1], '  ' + texts[1]]
  texts[14:18] = ['?!', '日本 語の文', 'a' * 90, texts[2] + ' ' + texts[3]]
  titles = [f'{words[n]} title' if n % 3 else '' for n in range(70)]
  queries = [' '.join(random.choice(text.split(), 3)) for text in texts[:48]]
  queries[5], queries[6], queries[20] = texts[7], queries[4], '!?'
  splits = {'train': range(30), 'dev': range(30, 40), 'test': range(40, 48)}
  lines = {
    'corpus': [
      {'_id': f'p{n}', 'title': title, 'text': text}
      for n, (title, text) in enumerate(zip(titles, texts, strict=True))
    ],
    'queries': [
      # One of them has the id of a passage.
      {'_id': 'p3' if n == 41 else f'q{n}', 'text': text}
      for n, text in enumerate(queries)
    ],
    'answers': [
      {'_id': 'p3' if n == 41 else f'q{n}', 'answers': [texts[n].split()[0]]}
      for n in range(48)
    ],
  }
  for name, rows in lines.items():
    path = folder / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  (folder / 'qrels').mkdir()
  for name, rows in splits.items():
    judged = ['query-id\tcorpus-id\tscore']
    for n in rows:
      query = lines['queries'][n]['_id']
      judged.append(f'{query}\tp{n}\t{1 + n % 2}')
      if n % 3 == 0:
        judged += [
          f'{query}\tp{60 + n % 9}\t{n % 2}',
          f'{query}\tp{50 - n % 7}\t2',
        ]
    judged.append(f'{query}\tnowhere\t1')
    (folder / 'qrels' / f'{name}.tsv').write_text('\n'.join(judged) + '\n')


def write_pairs(folder, of):
  """Writes queries of another set with positives, negatives and scores."""
  random = np.random.default_rng(6)
  lines = (of / 'corpus.jsonl').read_text().splitlines()
  texts = [json.loads(line)['text'] for line in lines]
  rows = []
  for n in range(40):
    others = random.choice(70, 5, replace=False)
    rows.append(
      {
        'query': ' '.join(random.choice(texts[n].split(), 3)),
        'pos': [texts[n], texts[others[0]]][: 1 + n % 2],
        'neg': [texts[other] for other in others[1 : 2 + n % 4]],
        'pos_scores': [0.9, 0.7][: 1 + n % 2],
        'neg_scores': random.random(1 + n % 4).round(2).tolist(),
      }
    )
  path = folder / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  folders = {name: tmp_path_factory.mktemp(name) for name in ('data', 'pairs')}
  write_set(folders['data'])
  write_pairs(folders['pairs'], folders['data'])
  return {f'{{{name}}}': folder for name, folder in folders.items()}


def shown(text, places):
  """Returns the lines of a text without paths, times, hashes and numbers.

  The numbers, in order, are its second value.
  """
  text = without_paths(text, places)
  lines = [line for line in text.splitlines() if not SLOW.search(line)]
  text = MACHINE.sub('', '\n'.join(lines))
  numbers = [float(number) for number in NUMBER.findall(text)]
  return [NUMBER.sub('#', text).splitlines(), numbers]


def read_file(path, places):
  """Returns what a file of a run says, as JSON."""
  if path.suffix == '.trec':
    return old_run_test.read_ranking(path, depth=6)
  if path.suffix == '.npy':
    return np.load(path).tolist()
  if path.suffix == '.html':
    parts = re.split('<h2>|<details>', path.read_text())
    page = ''.join(part for part in parts if not OF_TIMES.match(part))
    page = re.sub('<(style|script|svg).*?</\\1>', '', page, flags=re.DOTALL)
    return shown(re.sub('(<[^>]+>\\s*)+', '\n', page), places)
  if path.suffix == '.jsonl':
    lines = without_paths(path.read_text(), places).splitlines()
    return [without_times(json.loads(line)) for line in lines]
  return without_times(json.loads(without_paths(path.read_text(), places)))


def without_paths(text, places):
  for name, path in places.items():
    text = text.replace(str(path), name)
  return text


def without_times(value):
  """Returns JSON without the items that time and the machine change."""
  if isinstance(value, dict):
    return {
      key: without_times(item)
      for key, item in value.items()
      if not OF_MACHINE.search(key)
    }
  if isinstance(value, list):
    return [without_times(item) for item in value]
  return value


@pytest.mark.parametrize('name', TRAIN)
def test_rare_settings_together_give_what_they_gave(
  name, places, tmp_path, request
):
  places = {'{run}': tmp_path / 'run', **places, '{tmp}': tmp_path}
  data = [flag for flag in (*SMALL, *TRAIN[name]) if flag.startswith('--data')]

  def run(*flags):
    for place, path in places.items():
      flags = [flag.replace(place, str(path)) for flag in flags]
    text = old_run_test.command(*flags)
    return shown(text, places)

  common = ['--workdir={run}', *SMALL, *TRAIN[name]]
  found = {'train': run(*common)}
  for line in re.sub(r'\n +(?=--)', ' ', READ[name]).strip().splitlines():
    flags = f'--job={line.strip()}'.split()
    found[line.strip()] = run('--workdir={run}', *data, *flags)
  for path in sorted(path for form in FILES for path in tmp_path.glob(form)):
    found[str(path.relative_to(tmp_path))] = read_file(path, places)
  found = json.loads(
    json.dumps(found), parse_float=lambda text: float(f'{float(text):.5g}')
  )
  found = {f'{name}: {title}': value for title, value in found.items()}
  kept = json.loads(EXPECTED.read_text())
  if request.config.getoption('--write_unchanged'):
    kept = {key: kept[key] for key in kept if not key.startswith(f'{name}: ')}
    kept |= found
    # A line for each job and file, run by run, for the diff.
    keys = sorted(kept, key=lambda key: list(TRAIN).index(key.split(': ')[0]))
    lines = (f'{json.dumps(key)}: {json.dumps(kept[key])}' for key in keys)
    EXPECTED.write_text('{\n' + ',\n'.join(lines) + '\n}\n')
  expected = {key: kept[key] for key in kept if key.startswith(f'{name}: ')}
  old_run_test.assert_same(found, expected, name, ACCURACY)
