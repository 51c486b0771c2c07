"""Means to make a run faster with the same numbers up to rounding: kernels, compilation, memory,
threads, imports. Without this folder everything still runs."""
