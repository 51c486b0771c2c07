"""Decoding with a drafter: trees, their verification, and the cache of the target."""
