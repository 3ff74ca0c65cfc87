"""The values of --pooling and --similarity."""

# Name -> description for --help; pooling.py computes them.
POOLINGS = {
  'cls': "the first token's",
  'max': 'the maximum of each number',
  'mean': 'the mean',
  'mean_sqrt_len_tokens': 'the sum over the root of their number',
  'weightedmean': 'the mean weighted by place',
  'lasttoken': "the last one's",
}
# Scores of a query and a passage; bi_encoder.py computes them.
SIMILARITIES = ('dot', 'cosine')
