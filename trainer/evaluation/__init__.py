"""Measurements of a model: loss, answers, decoding speed, density."""
