"""Words of every script; BM25 of them against its formula, written out."""

import json
import math
import unicodedata

import bm25s
import numpy as np
import pytest

from ance_jax import config
from ance_jax import errors
from ance_jax.jobs import evaluate
from ance_jax.jobs import mine
from ance_jax.retrieval import bm25
from ance_jax.retrieval import words

ENGLISH = [
  'The river is the longest of the country and flows into the sea.',
  'A panda eats bamboo in the mountains of the south.',
  'It was the first book that was written about tea.',
]
CODE = ['find . -name "*.txt" | xargs rm', 'ls -la bin | sort -u', 'x = f(y)']
GERMAN = [
  'Der längste Fluss des Landes fließt durch drei Städte.',
  'Die Bücher über Tee sind sehr alt.',
  'Das Haus an der Straße war klein, und es will in die Ferne.',
]
INDONESIAN = [
  'Sungai yang terpanjang di negeri itu mengalir ke laut.',
  'Buku pertama tentang teh dan cara untuk membuatnya.',
]
RUSSIAN = ['Самая длинная река страны.', 'Первая книга о чае.', 'Ёж ест жука.']
HINDI = [
  'यह देश की सबसे लंबी नदी है',
  'चाय के बारे में पहली किताब',
  'पांडा बांस खाता है',
]
CHINESE = [
  '长江是亚洲第一长河，发源于青藏高原。',
  '大熊猫主要生活在四川，以竹子为主要食物。',
  '茶叶起源于中国，陆羽写下了第一部关于茶的书。',
]
THAI = ['แม่น้ำที่ยาวที่สุดในประเทศ', 'หนังสือเล่มแรกเกี่ยวกับชา', 'แพนด้ากินไผ่']
LAO = ['ແມ່ນ້ຳທີ່ຍາວທີ່ສຸດ', 'ປຶ້ມກ່ຽວກັບຊາ']
KHMER = ['ទន្លេវែងជាងគេនៅក្នុងប្រទេស', 'សៀវភៅដំបូងអំពីតែ']
BURMESE = ['နိုင်ငံ၏အရှည်ဆုံးမြစ်', 'လက်ဖက်အကြောင်းပထမဆုံးစာအုပ်']
KOREAN = [
  '나라에서 가장 긴 강이다',
  '차에 관한 첫 번째 책',
  '판다는 대나무를 먹는다',
]
JAPANESE = [
  '国で一番長い川は信濃川です。',
  'お茶についての最初の本',
  'パンダは竹を食べる',
]
TIBETAN = ['བོད་ཀྱི་ཆུ་བོ་རིང་པོ།', 'ཇའི་སྐོར་གྱི་དཔེ་ཆ།']


def choose(texts):
  return words.choose(texts, frozenset(bm25s.stopwords.STOPWORDS_EN))


@pytest.mark.parametrize(
  ('texts', 'chosen'),
  [
    (ENGLISH, 'english'),
    (CODE, 'english'),
    (['t1w2 t1w3 topic', '12 34', ''], 'english'),
    (['...'], 'english'),
    (GERMAN, 'none'),
    ([unicodedata.normalize('NFD', text) for text in GERMAN], 'none'),
    (INDONESIAN, 'none'),
    (RUSSIAN, 'none'),
    (HINDI, 'none'),
    (TIBETAN, 'none'),
    (CHINESE, 'bigrams'),
    (JAPANESE, 'bigrams'),
    (KOREAN, 'bigrams'),
    (THAI, 'bigrams'),
    (KHMER, 'bigrams'),
    (LAO, 'bigrams'),
    (BURMESE, 'bigrams'),
    (ENGLISH + CHINESE[:1], 'bigrams'),
    (ENGLISH + HINDI[:1], 'none'),
    # Names of other languages, and a formula, in an English text.
    (ENGLISH * 4 + ['It is the β of Lu Yu (陸羽) and of the Café'], 'english'),
  ],
)
def test_auto_goes_by_script_and_by_frequent_words(texts, chosen):
  assert choose(texts)[0] == chosen


def test_auto_counts_from_a_twentieth_of_the_words_on():
  for letter, chosen, why in (
    ('茶', 'bigrams', '5.0% of it is in scripts without spaces'),
    ('чай ', 'none', '5.0% of words are in other alphabets'),
    ('café ', 'none', '0.0% of words are English stop words, 5.0% foreign'),
  ):
    for number, expected in ((5, chosen), (4, 'english')):
      text = letter * number + 'word ' * (100 - number)
      assert choose([text])[0] == expected
      assert (choose([text])[1] == why) == (number == 5)
  # As many foreign words as English stop words are none too many.
  assert choose(['der the'])[0] == 'english'
  assert choose(['der das the'])[0] == 'none'


def test_auto_looks_at_all_of_a_long_corpus():
  corpus = ['only the words of the start'] * 9_000 + CHINESE * 1_000
  assert choose(corpus)[0] == 'bigrams'
  assert choose(corpus[::-1])[0] == 'bigrams'


def plain_bm25(query, documents, k1=0.9, b=0.4):
  """Robertson et al. with Lucene's idf: a score for each list of words."""
  mean = np.mean([len(document) for document in documents])
  scores = []
  for document in documents:
    score = 0.0
    for word in query:
      holders = sum(word in other for other in documents)
      idf = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
      count = document.count(word)
      norm = k1 * (1 - b + b * len(document) / mean)
      score += idf * count / (count + norm)
    scores.append(score)
  return scores


def pairs(text):
  """Two characters each of what is between punctuation marks."""
  parts = text.replace('，', '。').split('。')
  return [part[n : n + 2] for part in parts for n in range(len(part) - 1)]


def split(text):
  return text.lower().replace('.', '').replace(',', '').split()


@pytest.mark.parametrize(
  ('texts', 'cut', 'query', 'best'),
  [
    (CHINESE, pairs, '谁写了第一部茶的书', 2),
    (CHINESE, pairs, '熊猫的食物', 1),
    (GERMAN, split, 'alt sind Bücher', 1),
    (GERMAN, split, 'der Fluss', 0),
    (RUSSIAN, split, 'книга о Чае', 1),
    (HINDI, split, 'पहली किताब', 1),
    (HINDI, split, 'लंबी नदी', 0),
    (INDONESIAN, split, 'teh untuk', 1),
  ],
)
def test_scores_are_those_of_the_formula(texts, cut, query, best):
  ranking = bm25.make_rank(texts, k1=0.9, b=0.4)([query], len(texts))
  expected = np.array(plain_bm25(cut(query), [cut(text) for text in texts]))
  order = np.lexsort((range(len(texts)), -expected))
  hits = [row for row in order.tolist() if expected[row] > 0]
  assert ranking.rows[0, 0] == best
  assert ranking.rows[0, : len(hits)].tolist() == hits
  found = ranking.scores[0, : len(hits)]
  np.testing.assert_allclose(found, expected[hits], rtol=1e-5)


@pytest.mark.parametrize(
  ('texts', 'query', 'best'),
  [
    (THAI, 'หนังสือชา', 1),
    (THAI, 'แพนด้า', 2),
    (KHMER, 'សៀវភៅ', 1),
    (LAO, 'ປຶ້ມ', 1),
    (BURMESE, 'စာအုပ်', 1),
    (JAPANESE, '最初の本', 1),
    (JAPANESE, 'ﾊﾟﾝﾀﾞ', 2),
    (KOREAN, '대나무', 2),
    (TIBETAN, 'དཔེ་ཆ', 1),
  ],
)
def test_a_part_of_a_sentence_finds_it(texts, query, best):
  rank = bm25.make_rank(texts, k1=0.9, b=0.4, queries=[query])
  assert rank([query], 1).rows.tolist() == [[best]]


def test_words_of_scripts_without_spaces_are_two_letters_with_their_marks():
  def cut(text):
    return words.spaced(text, 'bigrams').split()

  assert cut('用iPhone 15拍照，好！') == ['用', 'iphone', '15', '拍照', '好']
  assert cut('中国語のテキスト') == '中国 国語 語の のテ テキ キス スト'.split()
  assert cut('コーヒー、時々') == ['コー', 'ーヒ', 'ヒー', '時々']
  # Five letters and four marks.
  assert cut('ที่นี่ดี') == ['ที่นี่', 'นี่ดี']
  assert cut('한국어 책') == ['한국', '국어', '책']
  assert words.spaced('中国 語', 'none') == '中国 語'


def test_letters_match_however_they_are_encoded():
  for text, same in (
    ('Café', 'cafe\u0301'),
    ('ＡＢＣ１２', 'abc12'),
    ('STRASSE', 'straße'),
    ('ﬁnal', 'FINAL'),
    ('ΟΔΟΣ', 'οδος'),
    ('İstanbul', 'istanbul'),
    ('क्\u200dष', 'क्ष'),
    ('नही\u0902', 'नहीं'),
    ('葛\U000e0100城', '葛城'),
    ('co\u00adoperate', 'cooperate'),
    ('각', '\u1100\u1161\u11a8'),
  ):
    assert words.spaced(text, 'none') == words.spaced(same, 'none'), text
    assert ' ' not in words.spaced(text, 'none')
  assert words.spaced('20℃', 'none') == words.spaced('20°c', 'none')
  assert words.spaced('IŞIK İL', 'turkish') == 'ışık il'
  rank = bm25.make_rank([*ENGLISH, 'a cafe\u0301'], k1=0.9, b=0.4)
  assert rank(['caf\u00e9'], 1).rows.tolist() == [[3]]


def test_english_is_what_bm25s_makes_of_it():
  texts = ['A cat and 5 dogs', 'Cats: running_fast, über 23 中文!', 'i9 x y zz']
  tokenize = bm25._make_tokenize(bm25s, 'english')
  expected = bm25s.tokenize(
    texts,
    stopwords='en',
    stemmer=bm25.Stemmer.Stemmer('english'),
    return_ids=False,
    show_progress=False,
  )
  assert tokenize(texts, return_ids=False) == expected
  assert ['cat', 'dog'] in expected


def test_other_languages_are_stemmed_without_their_stop_words():
  rank = bm25.make_rank(GERMAN, k1=0.9, b=0.4, language='german')
  found = rank(['ein altes Buch', 'der die das'], 3).rows
  assert found.tolist() == [[1, -1, -1], [-1, -1, -1]]
  # bm25s has no stop words of it.
  rank = bm25.make_rank(['kissat ja'], k1=1, b=0, language='finnish')
  assert rank(['kissa', 'ja'], 1).rows.tolist() == [[0], [0]]


def test_every_language_of_the_flag_can_be_had():
  assert len(words.LANGUAGES) > 25
  for language in words.LANGUAGES:
    rank = bm25.make_rank(['xyz 12'], k1=1, b=0, language=language)
    assert rank(['12'], 1).rows.tolist() == [[0]]


@pytest.mark.parametrize(
  ('number', 'lost', 'said'),
  [(100, 1, False), (100, 2, True), (99, 1, True), (6, 3, True), (2, 0, False)],
)
def test_a_line_says_how_many_queries_match_nothing(number, lost, said, capsys):
  queries = ['cat'] * (number - lost) + ['the zebra'] * lost
  bm25.make_rank(['a cat'], k1=1, b=0, language='none', queries=queries)
  out = capsys.readouterr().out
  line = f'no passage for {lost} of {number} queries ({lost / number:.1%})'
  assert (line in out) == said
  assert ("first of them 'the zebra'" in out) == said


def test_more_than_half_that_match_nothing_are_an_error():
  queries = ['cat', 'cat', 'a horse', 'zebra', '???']
  said = "3 of 5 queries .60.0%., the first of them 'a horse', .*bm25_language"
  with pytest.raises(errors.BadInput, match=said):
    bm25.make_rank(['a cat'], k1=1, b=0, language='english', queries=queries)


def test_a_chinese_set_is_scored_or_refused_and_never_empty(tmp_path):
  queries = [('茶的书', 2), ('大熊猫', 1), ('亚洲的长河', 0)]
  (tmp_path / 'qrels').mkdir()
  for name, texts in (
    ('corpus', CHINESE),
    ('queries', [q for q, _ in queries]),
  ):
    lines = [
      json.dumps({'_id': f'{n}', 'text': t}) for n, t in enumerate(texts)
    ]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
  qrels = [f'{n}\t{row}\t1\n' for n, (_, row) in enumerate(queries)]
  qrels = ''.join(['query-id\tcorpus-id\tscore\n', *qrels])
  for split in ('test', 'test2'):
    (tmp_path / 'qrels' / f'{split}.tsv').write_text(qrels)
  settings = config.Config(
    job='evaluate',
    retriever='bm25',
    dataset='beir',
    data_dir=str(tmp_path),
    workdir=str(tmp_path / 'scores'),
    split='test',
  )
  assert evaluate.run(settings)['mrr@10'] == 1
  for job, run in (('evaluate', evaluate.run), ('mine', mine.run)):
    other = config.dataclasses.replace(
      settings,
      job=job,
      train_split='test2',
      workdir=str(tmp_path / job),
      bm25_language='english',
    )
    with pytest.raises(errors.BadInput, match='no passage for 3 of 3 queries'):
      run(other)
    assert not list(tmp_path.glob(f'{job}/*'))
