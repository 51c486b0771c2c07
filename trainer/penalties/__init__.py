"""Penalties: terms that are computed from activations and added to the loss, with any adapter."""
