"""SRC and OUT: what is there, how it is read and written."""
