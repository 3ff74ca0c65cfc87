"""Embeddings, indexes and rankings, and how they are scored."""
