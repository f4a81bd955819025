"""What a command does; each file one job."""
