"""Typed errors of the engine."""

from __future__ import annotations


class ClusterError(Exception):
    """Base of every error raised by `cluster`."""


class StoreError(ClusterError):
    """A part could not be written, listed or read.

    `path` is what was touched. `transient` says whether trying again may help (a network fault, a timeout)
    or not (disk full, no permission, not a Parquet file).
    """

    def __init__(self, path: str, message: str, *, transient: bool = False):
        super().__init__(path, message, transient)
        self.path = path
        self.message = message
        self.transient = transient

    def __str__(self) -> str:
        return f"{self.message}: {self.path}"

    def __reduce__(self):
        return _rebuild, (type(self), self.path, self.message, self.transient)


class UnsafeStoreError(StoreError):
    """The back end does not promise create-if-absent, so two writers could overwrite each other's parts."""


class BadUrlError(StoreError):
    """A URL that cannot be opened: its scheme is unknown, or the package that reads it is not installed."""


class SchemaVersionError(StoreError):
    """The part was written by a newer version than this one can read."""


def _rebuild(cls: type[StoreError], path: str, message: str, transient: bool) -> StoreError:
    return cls(path, message, transient=transient)


class ContractError(ClusterError):
    """An operator's answer breaks its stage's contract (columns, keys, rows), or a stage is declared wrongly."""


class PlanError(ClusterError, ValueError):
    """The items handed to the engine are inconsistent (keys missing, doubled, of unequal length)."""


class EngineError(ClusterError, RuntimeError):
    """The run cannot go on: a stage cannot be loaded, or its workers die before doing any work."""


class BrokenStageError(EngineError):
    """Every item that a stage was given ended in the same exception: an installation or a program is broken, not the
    items.

    Attributes:
        stage: its name.
        count: how many items these were.
        reason: of the last of them, `EXCEPTION: Type: words`.
        advice: what to do about it, put there by whoever knows; ends the message.
    """

    def __init__(self, stage: str, count: int, reason: str):
        super().__init__(stage, count, reason)
        self.stage, self.count, self.reason, self.advice = stage, count, reason, ""

    def __str__(self) -> str:
        words = f"stage {self.stage}: the first {self.count} items all ended in the same exception: {self.reason}"
        return words + (f"; {self.advice}" if self.advice else "")


class RunInterrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C. Every finished part is kept; `summary` says what was done."""

    def __init__(self, summary):
        super().__init__("run interrupted")
        self.summary = summary
