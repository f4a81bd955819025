"""The run's folder: schemas, tables, keys, attempts, presence, logs."""
