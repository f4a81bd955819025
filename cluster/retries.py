"""Which failures of a store may pass, and trying again after growing pauses.

The clients of object stores (botocore, gcsfs, adlfs, aiohttp) try again themselves for a second or some; what arrives
here has outlived that. s3fs turns answers of the server into errors of Python by their code, and several codes into
EINVAL, so what counts is the HTTP status at the root of an error:
https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from cluster.errors import ClusterError, StoreError

T = TypeVar("T")
log = logging.getLogger("cluster")

ATTEMPTS = 7  # pauses of 0.25 to 8 s between them: 16 s, give or take the half

# 408 and 425: the request came too slowly, too early. 409: a concurrent conditional write (ConditionalRequestConflict),
# or an operation on the same object. 429 and 503: slow down.
_STATUSES = {408, 409, 425, 429, 500, 502, 503, 504}
# Answers with status 400 that speak of this one transmission, not of the request.
_CODES = {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}
# Errors of other clients that carry a status: gcsfs, aiohttp, Azure.
_STATUS_OF = {"HttpError": "code", "ClientResponseError": "status", "HttpResponseError": "status_code"}
_PERMANENT_TYPES = {  # by name, since the packages may not be there
    "ClientAuthenticationError",
    "ConfigNotFound",
    "DefaultCredentialsError",
    "NoCredentialsError",
    "NoRegionError",
    "ParamValidationError",
    "PartialCredentialsError",
    "ProfileNotFound",
}
PERMANENT = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota exceeded",
    errno.EROFS: "read-only file system",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.ENOTDIR: "not a directory",
    errno.EISDIR: "is a directory",
    errno.ENOENT: "no such file",
    errno.EEXIST: "exists already",
    errno.ENAMETOOLONG: "name too long",
    errno.EFBIG: "file too large",
    errno.ELOOP: "too many symbolic links",
    errno.EINVAL: "invalid argument",
    errno.ENOTSUP: "not supported by the file system",
    errno.ENOSYS: "not supported by the store",
}


def _roots(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from. Not what was handled meanwhile: that may be another answer's."""
    while error is not None:
        yield error
        error = error.__cause__


def http_status(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and the store's own code of the answer that an error stands for; (None, "") where there is none."""
    for one in _roots(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore
            code = str(response.get("Error", {}).get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status is None and code.isdigit():
                status = int(code)
            return status, code
        for kind, name in _STATUS_OF.items():
            value = getattr(one, name, None)
            if isinstance(value, int) and any(base.__name__ == kind for base in type(one).__mro__):
                return value, ""
    return None, ""


def is_transient(error: BaseException, remote: bool = True) -> bool:
    """Whether the same call may succeed later.

    Args:
        remote: the error comes from a store behind a network. Its client's own types, of which nothing else is known,
            then stand for lost connections and the like.
    """
    if isinstance(error, ClusterError):
        return isinstance(error, StoreError) and error.transient
    status, code = http_status(error)
    if status is not None:
        return status in _STATUSES or code in _CODES
    if any(kind.__name__ in _PERMANENT_TYPES for kind in type(error).__mro__):
        return False
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(
        error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError | NotADirectoryError
    ):
        return False
    if isinstance(error, OSError):
        return error.errno not in PERMANENT
    return remote and isinstance(error, Exception) and not isinstance(
        error, TypeError | ValueError | LookupError | AttributeError | ImportError | NotImplementedError | MemoryError
    )


def _says_so(error: Exception) -> bool:
    return isinstance(error, StoreError) and error.transient


def with_retries(
    action: Callable[[], T],
    attempts: int = ATTEMPTS,
    first_wait: float = 0.25,
    transient: Callable[[Exception], bool] = _says_so,
) -> T:
    """Call `action`, again after growing, jittered pauses while it raises what may pass.

    Args:
        transient: tells what that is; by default a `StoreError` that says so. `is_transient` for what is raised by
            fsspec and the clients below it.

    Raises:
        what `action` raised last.
    """
    for attempt in range(attempts):
        try:
            return action()
        except Exception as error:
            if attempt == attempts - 1 or not transient(error):
                raise
            pause = first_wait * 2**attempt * random.uniform(0.5, 1.5)
            log.warning("%s; trying again in %.1f s", _words(error), pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"
