"""Runs compared query by query: what is read, shown, and refused."""

import dataclasses
import pathlib
import shutil

import old_run_test
from pages_test import HOSTILE
from pages_test import check
import pytest

from ance_jax import config as config_lib
from ance_jax import errors
from ance_jax.core import atomic
from ance_jax.core import checkpoint
from ance_jax.jobs import compare
from ance_jax.jobs import evaluate
from ance_jax.jobs import systems
from ance_jax.retrieval import metrics


@pytest.fixture(scope='module')
def scored(beir_folder, tmp_path_factory):
  """A folder of BM25's rankings with other parameters, and their means."""
  folder, means = tmp_path_factory.mktemp('scored'), {}
  for name, k1, b in (('usual', 0.9, 0.4), ('flat', 0.1, 0.0)):
    means[name] = evaluate.run(
      config_lib.Config(
        job='evaluate',
        retriever='bm25',
        workdir=str(folder / name),
        dataset='beir',
        data_dir=str(beir_folder),
        bm25_k1=k1,
        bm25_b=b,
        split='train',
      )
    )
  return folder, means


@pytest.fixture
def settings(scored, beir_folder, tmp_path):
  """Compares the two of `scored`."""
  folder, _ = scored
  return config_lib.Config(
    job='compare',
    workdir=str(tmp_path / 'compared'),
    dataset='beir',
    data_dir=str(beir_folder),
    runs=f'{folder}/usual,{folder}/flat',
    split='train',
  )


def run_file(settings, label):
  """Path of the run file of one of the two systems."""
  names = {pathlib.Path(n).name: n for n in settings.runs.split(',')}
  return pathlib.Path(names[label], 'train-bm25-0.trec')


def with_copy(settings, tmp_path, change, name='copy.trec'):
  """Compares the first system with a copy of its file, its lines changed."""
  original = run_file(settings, 'usual')
  lines = change(original.read_text().splitlines())
  (tmp_path / name).write_text('\n'.join(lines) + '\n')
  return dataclasses.replace(settings, runs=f'{original},{tmp_path / name}')


def test_values_by_query_agree_with_the_means_that_evaluate_gave(
  settings, scored
):
  _, _, found = systems.read(settings)
  assert [system.label for system in found] == ['usual', 'flat']
  for system in found:
    means = {name: metrics.mean(v) for name, v in system.values.items()}
    assert means == scored[1][system.label]
    assert all(len(values) == 48 for values in system.values.values())


def test_values_by_query_are_those_of_a_slow_rewrite(settings):
  _, split, (system, _) = systems.read(settings)
  for query in range(len(split.ids)):
    judged = slice(*split.offsets[query : query + 2])
    relevant = set(split.passages[judged].tolist())
    ranking = system.rows[query].tolist()
    places = [n for n, row in enumerate(ranking, 1) if row in relevant]
    first = places[0] if places else None
    found = metrics.first_relevant(system.rows, split, None, [query])
    assert found == [first]
    reciprocal = 1 / first if first and first <= 10 else 0
    assert system.values['mrr@10'][query] == pytest.approx(reciprocal)


def test_the_tables_the_file_and_the_page_say_the_same(settings, capsys):
  found = compare.run(settings)['flat']
  assert found.wins + found.losses + found.ties == 48
  assert found.losses > 0
  out = capsys.readouterr().out
  folder = pathlib.Path(settings.workdir)
  written = atomic.read_json(folder / 'compare-train.json')
  assert written['baseline'] == 'usual'
  assert written['differences'] == {'flat': found._asdict()}
  means = written['metrics']
  difference = means['flat']['mrr@10'] - means['usual']['mrr@10']
  assert found.mean == pytest.approx(difference)
  reader = check((folder / 'compare-train.html').read_text())
  for shown in (f'{found.mean:+.4f}', f'{found.p:.4f}', f'{found.losses}'):
    assert shown in out
    assert shown in reader.texts
  _, _, (first, other) = systems.read(settings)
  for depth, share in written['same in first']['flat'].items():
    ours, theirs = (
      [set(row[: int(depth)].tolist()) - {-1} for row in system.rows]
      for system in (first, other)
    )
    both = sum(len(a & b) for a, b in zip(ours, theirs, strict=True))
    assert share == pytest.approx(both / sum(map(len, ours)))
    assert (share < 1) == (depth == '10')
    assert f'{share:.1%}' in out
  for said in ('9,999', 'seed 0', 'mrr@10', 'as p: there is one comparison'):
    assert said in out
    assert any(said in text for text in reader.texts)


def test_the_queries_that_gained_and_lost_most_are_those(settings):
  compare.run(settings)
  shown = atomic.read_json(f'{settings.workdir}/compare-train.json')['queries']
  corpus, split, (first, other) = systems.read(settings)
  values = other.values['mrr@10'] - first.values['mrr@10']
  lost = shown['flat']['lost']
  expected = sorted(v for v in values if v < 0)[:10]
  assert [example['difference'] for example in lost] == expected
  for name, sign in (('gained', 1), ('lost', -1)):
    assert all(e['difference'] * sign > 0 for e in shown['flat'][name])
  ids = {split.ids[row]: row for row in range(len(split.ids))}
  for example in lost:
    query = ids[example['query_id']]
    assert example['query'] == split.texts[query]
    for system, place, passage in zip(
      (first, other), example['places'], example['first'], strict=True
    ):
      row = int(system.rows[query, 0])
      assert corpus.ids[row] in passage
      assert corpus.texts[row] in passage
      value = system.values['mrr@10'][query]
      assert value == (pytest.approx(1 / place) if value else 0)


def test_more_comparisons_are_corrected_by_holm(settings, scored, capsys):
  third = scored[0] / 'third.trec'
  shutil.copy(run_file(settings, 'flat'), third)
  alone = compare.run(settings)['flat']
  both = compare.run(
    dataclasses.replace(settings, runs=f'{settings.runs},{third}')
  )
  assert both['third.trec'] == both['flat']
  assert both['flat'].p == alone.p
  assert both['flat'].p_holm == min(1, 2 * alone.p)
  assert "Holm's correction for 2 comparisons" in capsys.readouterr().out


def test_a_query_that_is_missing_counts_as_0_and_is_counted(
  settings, tmp_path, capsys
):
  _, split, (whole, _) = systems.read(settings)
  gone = {split.ids[row] for row in range(5)}
  config = with_copy(
    settings,
    tmp_path,
    lambda lines: [line for line in lines if line.split()[0] not in gone],
  )
  found = compare.run(config)['copy.trec']
  assert 'copy.trec: 5 queries are not in it, and count 0' in (
    capsys.readouterr().out
  )
  assert found.mean == pytest.approx(-whole.values['mrr@10'][:5].sum() / 48)
  shown = atomic.read_json(f'{config.workdir}/compare-train.json')['queries']
  lost = shown['copy.trec']['lost'][0]
  assert lost['query_id'] in gone
  assert lost['places'][1] is None
  assert lost['first'][1] is None


def test_hostile_passages_are_shown_as_text(beir_folder, settings, tmp_path):
  data, texts = tmp_path / 'hostile', ' '.join(HOSTILE)
  shutil.copytree(beir_folder, data)
  for name in ('corpus', 'queries'):
    path = data / f'{name}.jsonl'
    text = texts.replace('"', '\\"')
    path.write_text(path.read_text().replace('"text": "', f'"text": "{text} '))
  (tmp_path / 'copy.trec').write_text('q0 Q0 p1 1 2 x\nq1 Q0 p2 1 2 x\n')
  # Other texts are another corpus; only ids tell of a file without a note.
  bare = tmp_path / 'bare.trec'
  shutil.copy(run_file(settings, 'usual'), bare)
  config = dataclasses.replace(
    settings, data_dir=str(data), runs=f'{bare},{tmp_path}/copy.trec'
  )
  compare.run(config)
  reader = check(pathlib.Path(config.workdir, 'compare-train.html').read_text())
  assert any(HOSTILE[0] in text for text in reader.texts)
  assert any(texts in text for text in reader.texts)


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    (
      lambda lines: [f'x{line}' for line in lines],
      'none of the 48 queries .* such as',
    ),
    (
      lambda lines: [line.replace(' Q0 p', ' Q0 x') for line in lines],
      r"the ranked passage 'x\d+' is not in the data",
    ),
    (lambda lines: ['q0 Q0 p1 1 2.5'], 'query id, Q0, passage'),
  ],
)
def test_a_run_of_other_queries_or_passages_is_refused(
  change, says, settings, tmp_path
):
  with pytest.raises(errors.BadInput, match=says) as raised:
    compare.run(with_copy(settings, tmp_path, change))
  assert str(raised.value).startswith(f'{tmp_path}/copy.trec')


@pytest.mark.parametrize('name', ['corpus.jsonl', 'qrels/train.tsv'])
def test_a_run_of_data_with_the_same_ids_is_refused_by_its_hash(
  name, settings, beir_folder, tmp_path
):
  other = tmp_path / 'other'
  shutil.copytree(beir_folder, other)
  path = other / name
  old, new = ('t3w', 't4w') if name.startswith('corpus') else ('\t2', '\t3')
  assert old in path.read_text()
  path.write_text(path.read_text().replace(old, new))
  config = dataclasses.replace(
    settings, job='evaluate', retriever='bm25', data_dir=str(other)
  )
  evaluate.run(dataclasses.replace(config, workdir=str(tmp_path / 'second')))
  first = settings.runs.split(',')[0]
  with pytest.raises(errors.BadInput, match='of hash .* instead of'):
    compare.run(
      dataclasses.replace(settings, runs=f'{first},{tmp_path}/second')
    )


@pytest.mark.parametrize(
  ('changes', 'says'),
  [
    ({'workdir': ''}, '--job=compare is given without --workdir'),
    ({'runs': ''}, '--runs= names fewer than two runs'),
    ({'runs': '/nowhere'}, '--runs=/nowhere names fewer than two'),
    ({'runs': 'a,b,a'}, '--runs=a,b,a names a run twice'),
    ({'runs': '/nowhere,/neither'}, '/nowhere: there is nothing, and a file'),
    ({'split': 'dev'}, "no run file of 'dev'; make it"),
  ],
)
def test_what_cannot_be_compared_is_refused(changes, says, settings):
  with pytest.raises(errors.BadInput, match=says):
    compare.run(dataclasses.replace(settings, **changes))


def test_a_folder_with_two_run_files_must_be_told_which(settings, tmp_path):
  folder = tmp_path / 'two'
  folder.mkdir()
  for step in (1, 2):
    shutil.copy(run_file(settings, 'flat'), folder / f'train-model-{step}.trec')
  config = dataclasses.replace(settings, runs=f'{settings.runs},{folder}')
  with pytest.raises(
    errors.BadInput, match=r'\(train-model-1.trec, train-model-2.trec\)'
  ):
    compare.run(config)


def test_from_the_shell_the_first_folder_of_a_run_brings_the_data(
  tiny, settings, scored, tmp_path
):
  folder, bm25 = tmp_path / 'run', run_file(settings, 'usual')
  record = checkpoint.record_folder(folder, 2)
  atomic.make_folder(record)
  began = dataclasses.replace(tiny, workdir='/moved/since', seed=5)
  (record / 'run.flags').write_text(began.to_flagfile())
  atomic.commit(record.parent, {})
  for ending in ('trec', 'json'):
    source = run_file(settings, 'flat').with_suffix(f'.{ending}')
    shutil.copy(source, folder / f'train-model-2.{ending}')
  old_run_test.command(
    '--job=compare', '--split=train', f'--workdir={tmp_path}/out',
    f'--runs={bm25},{folder}',
  )  # fmt: skip
  written = atomic.read_json(tmp_path / 'out/compare-train.json')
  assert written['metrics']['run'] == scored[1]['flat']
  assert 'seed 5' in written['about']['p']
  assert not (folder / 'compare-train.json').exists()
