"""Texts, judgements and token rows, and their readers."""
