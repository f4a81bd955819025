"""A photo's bytes to pixels and back; no file system."""
