"""File systems of fsspec, such that a server that falls silent cannot stop a process for ever."""

from __future__ import annotations

import os
import re

import fsspec

from cluster.errors import BadUrlError

# Back ends that put an object as a whole or not at all, know conditional puts, and have no folders to be made.
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::.*)?://")  # what a URL begins with; anything else is a local path


def protocols(fs: fsspec.AbstractFileSystem) -> set[str]:
    """All names of a file system's protocol."""
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def open_fs(url: str, **options) -> tuple[fsspec.AbstractFileSystem, str]:
    """`fsspec.core.url_to_fs`: the file system, and the path in it.

    botocore sends each PUT to S3 with `Expect: 100-continue`, so that a refused body need not travel. aiohttp, on which
    s3fs works, waits for the server's "go on" without any limit (read_timeout does not count there), so a connection
    that dies at this moment hangs its process: seen against a server that stayed silent, and reported in
    https://github.com/marin-community/marin/issues/6719. Sessions that are made after this call send no such header.

    A local path is taken as it is, also with `::` in it.

    Raises:
        BadUrlError: the protocol is unknown, its package is missing, or its client cannot be made (no such host, ...).
    """
    if "s3://" in url or "s3a://" in url:
        _expect_nothing()
    try:
        if not PROTOCOL.match(url):
            # fsspec would take what stands before and behind `::`, and the second letter's colon, for its own.
            return fsspec.filesystem("file", **options), os.path.abspath(os.path.expanduser(url)).replace(os.sep, "/")
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or error.name
        raise BadUrlError(url, f"cannot open: the package {package} is not installed ({error})") from error
    except Exception as error:  # every client has errors of its own
        raise BadUrlError(url, f"cannot open ({error})") from error


def _expect_nothing() -> None:
    from botocore import handlers  # with it `botocore.session` reads the list below, for each session anew

    wanted = ("before-call.s3", handlers.add_expect_header)
    if wanted in handlers.BUILTIN_HANDLERS:
        handlers.BUILTIN_HANDLERS.remove(wanted)
