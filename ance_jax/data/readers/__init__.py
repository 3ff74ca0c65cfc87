"""Readers of files as their source has them."""
