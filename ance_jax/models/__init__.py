"""Encoders; checkpoints of other projects, read and written."""
