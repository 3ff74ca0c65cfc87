"""What --pooling and --similarity may name."""

# {name: what it takes of the token vectors}, made in pooling.py; in the order
# in which older files of sentence-transformers join them.
POOLINGS = {
  'cls': "the first token's",
  'max': 'the maximum of each number',
  'mean': 'the mean',
  'mean_sqrt_len_tokens': 'the sum over the root of their number',
  'weightedmean': 'the mean weighted by place',
  'lasttoken': "the last one's",
}
# Scores of a query and a passage, made in bi_encoder.py.
SIMILARITIES = ('dot', 'cosine')
