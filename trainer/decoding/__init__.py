"""Ways for a target to write with a drafter."""
