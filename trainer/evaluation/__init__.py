"""Measures what a model is worth: loss, answers, speed of decoding, density."""
