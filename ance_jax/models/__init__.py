"""Encoders, and checkpoints of others read and written."""
