"""Ranked passages in, hard negatives out; it knows no training."""
