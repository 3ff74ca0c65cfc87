"""Texts, judgements and token rows, and who reads them."""
