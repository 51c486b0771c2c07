"""SLURM jobs and signals. Nothing here imports torch."""
