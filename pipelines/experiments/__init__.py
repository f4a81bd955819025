"""Experiments: tables of the paper's kind over a run's results."""
