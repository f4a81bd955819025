"""The jobs on top of the method, the gallery and the engine (docs/design.md)."""
