"""Smaller bases made from a base: weights set to zero, layers dropped, MLPs narrowed. The result is
a plain folder of transformers."""
