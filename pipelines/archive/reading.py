"""Photos' bytes, whole or as a digest."""

from __future__ import annotations

import hashlib
import os
import stat

import fsspec

from pipelines.archive.paths import PIECE_BYTES, SourceError, file_system_of, local_path, patiently, source_error_of
from pipelines.photos.photo import MAX_BYTES


def read_bytes(url: str, max_bytes: int = MAX_BYTES) -> bytes:
    """A photo's file. Raises SourceError NOT_FOUND, UNREADABLE, NOT_A_FILE, TOO_LARGE, READ_FAILED, BAD_URL."""
    local = local_path(url)
    try:
        if local is not None:
            # Not blocking on a pipe that has taken the file's place.
            handle = os.open(local, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            try:
                st = os.fstat(handle)
                if not stat.S_ISREG(st.st_mode):
                    raise SourceError("NOT_A_FILE", "a device, pipe or folder")
                if st.st_size > max_bytes:
                    raise SourceError("TOO_LARGE", f"{st.st_size:,} bytes; the limit is {max_bytes:,}")
                with open(handle, "rb", closefd=False) as f:
                    return f.read()
            finally:
                os.close(handle)
        fs, path = file_system_of(url)
        return patiently(lambda: get_whole(fs, path, max_bytes))
    except SourceError:
        raise
    except OSError as e:
        raise source_error_of(e, "file") from e
    except Exception as e:  # each store's client has errors of its own
        raise SourceError("READ_FAILED", f"{type(e).__name__}: {e}") from e


def digest_of(data: bytes) -> str:
    """BLAKE2b of a file's bytes, 32 hex digits, as of ``content_digest``."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def content_digest(url: str) -> str:
    """BLAKE2b of a file's bytes, 32 hex digits; read in pieces, so that its size does not matter.

    Raises SourceError NOT_FOUND, UNREADABLE, NOT_A_FILE, READ_FAILED, BAD_URL.
    """
    digest = hashlib.blake2b(digest_size=16)
    local = local_path(url)
    try:
        if local is not None:
            # Not blocking on a pipe that has taken the file's place.
            handle = os.open(local, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            try:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise SourceError("NOT_A_FILE", "a device, pipe or folder")
                while piece := os.read(handle, PIECE_BYTES):
                    digest.update(piece)
            finally:
                os.close(handle)
        else:
            fs, path = file_system_of(url)

            def hashed():
                fresh, size = hashlib.blake2b(digest_size=16), 0
                with fs.open(path, "rb", block_size=PIECE_BYTES, cache_type="readahead") as file:
                    while piece := file.read(PIECE_BYTES):
                        fresh.update(piece)
                        size += len(piece)
                    if size != (getattr(file, "size", None) or size):
                        raise ConnectionError(f"{size:,} of {file.size:,} bytes came")
                return fresh

            digest = patiently(hashed)
    except SourceError:
        raise
    except OSError as e:
        raise source_error_of(e, "file") from e
    except Exception as e:  # each store's client has errors of its own
        raise SourceError("READ_FAILED", f"{type(e).__name__}: {e}") from e
    return digest.hexdigest()


def get_whole(fs: fsspec.AbstractFileSystem, path: str, max_bytes: int | None = None) -> bytes:
    """A file whole. Raises ConnectionError where only a part came, SourceError TOO_LARGE before anything is read."""
    fs.invalidate_cache(path.rsplit("/", 1)[0])  # a listing may know an older size
    size = fs.info(path).get("size")
    if size is not None and max_bytes is not None and size > max_bytes:
        raise SourceError("TOO_LARGE", f"{size:,} bytes; the limit is {max_bytes:,}")
    data = fs.cat_file(path)
    if size is not None and len(data) != size:
        raise ConnectionError(f"{len(data):,} of {size:,} bytes came")
    return data
