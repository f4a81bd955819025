"""Pages of one file, and the page of a run."""
