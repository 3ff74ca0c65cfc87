"""TFDS builders of the datasets that are not in the TFDS catalogue."""
