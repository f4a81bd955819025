"""Photos are read ahead by threads, while the networks work on those before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from pipelines.archive.reading import read_bytes

_THREADS = 16
_PHOTOS = 100  # at most in memory that nobody has asked for yet
_BYTES = 256 * 2**20  # the same in bytes
_UNKNOWN = 8 * 2**20  # bytes counted for a photo whose size is not known


class Reader:
    """Reads photos, those that are announced ahead of their turn.

    Args:
        max_bytes: of a photo, see `archive.reading.read_bytes`.
    """

    def __init__(self, max_bytes: int, threads: int = _THREADS, photos: int = _PHOTOS, in_memory: int = _BYTES) -> None:
        self._max_bytes, self._photos, self._in_memory = max_bytes, photos, in_memory
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")
        self._waiting: deque[tuple[str, int]] = deque()
        self._open: dict[str, tuple[Future, int]] = {}

    def ahead(self, photos: Iterable[tuple[str, int | None]]) -> None:
        """Announce photos, by URL and size in bytes, in the order in which they will be asked for. What was announced
        before and has not been asked for is dropped."""
        for future, _ in self._open.values():
            future.cancel()
        self._open.clear()
        self._waiting = deque((url, _UNKNOWN if size is None else size) for url, size in photos)
        self._fill()

    def _fill(self) -> None:
        held = sum(size for _, size in self._open.values())
        while self._waiting and len(self._open) < self._photos:
            url, size = self._waiting[0]
            if self._open and held + size > self._in_memory:
                return
            self._waiting.popleft()
            if url not in self._open:
                self._open[url] = self._pool.submit(read_bytes, url, self._max_bytes), size
                held += size

    def read(self, url: str) -> bytes:
        """A photo's file. Raises SourceError as `archive.reading.read_bytes`."""
        future, _ = self._open.pop(url, (None, 0))
        try:
            if future is None:
                return read_bytes(url, self._max_bytes)
            return future.result()
        finally:
            self._fill()
