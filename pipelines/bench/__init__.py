"""Measurements: one file a `make bench-NAME`, one harness."""
