"""Everything that can go wrong with a gallery, as types a caller can tell apart."""

from __future__ import annotations


class GalleryError(Exception):
    """Base of all errors of this package."""


class GalleryNotFoundError(GalleryError):
    """No finished gallery at that place (none was built, or the build never got to its commit)."""


class GalleryExistsError(GalleryError):
    """A finished gallery is already there; galleries are never changed in place."""


class GalleryBusyError(GalleryError):
    """Somebody reads, builds or deletes what the caller wants to delete."""


class GalleryConflictError(GalleryError):
    """CURRENT was switched by somebody else since the caller looked."""


class GalleryCheckError(GalleryError):
    """A new version did not pass its check; CURRENT was not switched.

    Attributes:
        problems: what was found, one line each.
    """

    def __init__(self, where: str, problems: list[str]) -> None:
        super().__init__(f"{where} is not consistent: " + "; ".join(problems[:10]))
        self.problems = [f"{where}: {problem}" for problem in problems]


class GalleryCorruptError(GalleryError):
    """A file is missing, truncated or altered: its size or sha256 is not the one in ``index.json``."""


class GalleryMismatchError(GalleryError):
    """The gallery is sound but not the one the caller needs; the message names both sides."""


class BadCodesError(GalleryError, ValueError):
    """Codes or ids that a gallery may not hold.

    Attributes:
        reasons: id of each refused code to why it was refused (at most the first 1,000).
    """

    def __init__(self, message: str, reasons: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = dict(reasons or {})


class QueryError(GalleryError, ValueError):
    """The codes or options given to a search are malformed."""


class NotEnoughCodesError(QueryError):
    """Fewer codes than asked for are left for a query after its exclusions.

    Attributes:
        query: index of the first such query in the batch.
        available: codes left for it.
        wanted: codes asked for.
    """

    def __init__(self, query: int, available: int, wanted: int, count: int) -> None:
        super().__init__(
            f"query {query}: {wanted} codes wanted, but the gallery holds {count} and "
            f"{count - available} of them are excluded for this query"
        )
        self.query, self.available, self.wanted = query, available, wanted
