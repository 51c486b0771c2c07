"""From a command line to a config that is known to be right. Nothing here imports torch."""
