"""File systems of fsspec, such that a server that falls silent cannot stop a process for ever."""

from __future__ import annotations

import fsspec


def open_fs(url: str, **options) -> tuple[fsspec.AbstractFileSystem, str]:
    """`fsspec.core.url_to_fs`: the file system, and the path in it.

    botocore sends each PUT to S3 with `Expect: 100-continue`, so that a refused body need not travel. aiohttp, on which
    s3fs works, waits for the server's "go on" without any limit (read_timeout does not count there), so a connection
    that dies at this moment hangs its process: seen against a server that stayed silent, and reported in
    https://github.com/marin-community/marin/issues/6719. Sessions that are made after this call send no such header.

    Raises:
        ImportError, ValueError, OSError: the protocol is unknown, its package is missing, or there is no such host.
    """
    if "s3://" in url or "s3a://" in url:
        _expect_nothing()
    return fsspec.core.url_to_fs(url, **options)


def _expect_nothing() -> None:
    from botocore import handlers  # with it `botocore.session` reads the list below, for each session anew

    wanted = ("before-call.s3", handlers.add_expect_header)
    if wanted in handlers.BUILTIN_HANDLERS:
        handlers.BUILTIN_HANDLERS.remove(wanted)
