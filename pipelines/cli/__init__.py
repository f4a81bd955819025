"""The command `scol`: click, and nothing else."""
