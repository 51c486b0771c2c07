"""From a config, or from a run folder, to objects."""
