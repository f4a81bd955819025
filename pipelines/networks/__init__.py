"""Networks of a process by name, the model store, fingerprints."""
