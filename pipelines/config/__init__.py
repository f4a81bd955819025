"""What a run is asked for: names, sections, loading, showing."""
