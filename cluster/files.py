"""Local files that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary name beside `path` (``PATH.RANDOM.tmp``), which takes its place when the block ends without an error.

    After an error there is no temporary file, and `path` is what it was; after a kill the temporary file may stay
    (``scol purge`` knows its name).

    Args:
        path: of the file to be; its folder is there.

    Raises:
        OSError: it cannot be put there.
    """
    temporary = f"{os.fspath(path)}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
