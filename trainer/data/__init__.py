"""From a task's examples to batches: rendering, tokenising, packing, order, loading; and stored
hidden states."""
