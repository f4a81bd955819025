"""Photos' bytes, whole or as a digest."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO, TypeVar

from pipelines.archive.paths import PIECE_BYTES, SourceError, files_of, local_path, source_error_of
from pipelines.photos.photo import MAX_BYTES

T = TypeVar("T")


def read_bytes(url: str, max_bytes: int = MAX_BYTES) -> bytes:
    """A photo's file. Raises SourceError NOT_FOUND, UNREADABLE, NOT_A_FILE, TOO_LARGE, READ_FAILED, BAD_URL."""

    def read() -> bytes:
        local = local_path(url)
        if local is None:
            return files_of(url).read(max_bytes=max_bytes)
        with _open_photo(local) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise SourceError("TOO_LARGE", f"{size:,} bytes; the limit is {max_bytes:,}")
            return file.read()

    return _typed(read)


def digest_of(data: bytes) -> str:
    """BLAKE2b of a file's bytes, 32 hex digits, as of ``content_digest``."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def content_digest(url: str) -> str:
    """BLAKE2b of a file's bytes, 32 hex digits; read in pieces, so that its size does not matter.

    Raises SourceError NOT_FOUND, UNREADABLE, NOT_A_FILE, READ_FAILED, BAD_URL.
    """
    new = partial(hashlib.blake2b, digest_size=16)

    def read() -> str:
        local = local_path(url)
        if local is None:
            return files_of(url).digest(new=new)[1]
        digest = new()
        with _open_photo(local) as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    return _typed(read)


@contextmanager
def _open_photo(path: str) -> Iterator[BinaryIO]:
    """Not blocking on a pipe that has taken the file's place."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise SourceError("NOT_A_FILE", "a device, pipe or folder")
        with open(handle, "rb", buffering=0, closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def _typed(read: Callable[[], T]) -> T:
    try:
        return read()
    except SourceError:
        raise
    except OSError as e:
        raise source_error_of(e, "file") from e
    except Exception as e:  # each store's client has errors of its own
        raise SourceError("READ_FAILED", f"{type(e).__name__}: {e}") from e
