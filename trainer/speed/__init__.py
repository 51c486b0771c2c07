"""Makes a run faster with the same numbers up to rounding. Without it everything still runs."""
