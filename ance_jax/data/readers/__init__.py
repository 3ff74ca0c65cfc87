"""Readers of datasets in their original file formats."""
