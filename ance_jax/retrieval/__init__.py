"""Embeddings, indexes, rankings and their measures."""
