"""What some tests need that not every environment of the tests has."""

import sys

import pytest

# The extra `test` installs torch below Python 3.12 only, where conftest.py
# fails a run that skips any test.
torch = pytest.mark.skipif(
  sys.version_info >= (3, 12),
  reason='the test extra has torch below Python 3.12 only',
)
