"""The choice of rows of a pool to train on, for a target or without one."""
