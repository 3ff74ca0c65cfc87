"""Dense retrievers in JAX, trained on negatives mined from their own index."""

__version__ = '0.1.0'
