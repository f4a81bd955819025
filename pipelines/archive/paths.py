"""Places of SRC and OUT: safe relative paths, ids, local paths and URLs, and their errors."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import unicodedata

from cluster.errors import BadUrlError
from cluster.files import Files
from cluster.remote import PROTOCOL


def absolute(url: str) -> str:
    """A local path made absolute, since workers may have another working directory; other URLs as they are.

    Raises:
        BadUrlError: the URL cannot be opened.
    """
    files = Files(url)
    return files.url if files.local else url


PIECE_BYTES = 4 * 2**20  # bytes read at once where a file is only hashed
_DEVICES = re.compile(r"(?i)^(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\..*)?$")
_DRIVE = re.compile(r"[A-Za-z]:")


class SourceError(ValueError):
    """Something about SRC or one of its photos. `str()` is `CODE: words`.

    Codes: NOT_FOUND, UNREADABLE, READ_FAILED, NOT_A_FILE, NOT_A_PHOTO, HIDDEN, TOO_LARGE, BROKEN_LINK, LINK_LOOP,
    LINK_OUTSIDE, NAME_NOT_UTF8, UNSAFE_PATH, EMPTY_PATH, DUPLICATE, IN_OUT, BAD_LIST, BAD_URL.
    """

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message

    def __reduce__(self):
        return type(self), (self.code, self.message)


class OutputError(SourceError):
    """Something about OUT. Codes: OUT_IS_SRC, OUT_INSIDE_SRC, SRC_INSIDE_OUT, OUT_NOT_A_FOLDER, NOT_WRITABLE,
    DISK_FULL, WRITE_FAILED, UNSAFE_PATH, BAD_URL."""


def photo_id(path: str) -> str:
    """First 16 hex digits of blake2b of the relative POSIX path in UTF-8 (docs/design.md)."""
    return hashlib.blake2b(path.encode("utf-8")).hexdigest()[:16]


def safe_relative(path: str) -> str:
    """The path in normal form (no `.`, no doubled `/`), sure to name something below the folder that it is joined to.

    Raises SourceError UNSAFE_PATH for `..`, absolute paths, drive letters, backslashes, control characters, line
    separators, lone surrogates, Windows device names and names of dots and spaces alone; EMPTY_PATH where no name is
    left. Strict on every system, since OUT may be carried to another one: a drive letter counts in every name (Windows
    joins `C:\\out`, `C:x` to `C:x`), and so does what another system may take for one of these: full-width dots and
    letters and the like, by Unicode's compatibility form (NFKC).
    """

    def refuse(why: str):
        shown = path.encode("utf-8", "backslashreplace").decode()
        raise SourceError("UNSAFE_PATH", f"{why}: {shown!r}")

    if path.startswith("/"):
        refuse("absolute path")
    if "\\" in path:
        refuse("backslash")
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in path):
        refuse("control character")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    seen = parts
    if not path.isascii():
        alike = [unicodedata.normalize("NFKC", part) for part in parts]
        if any(part.startswith(("/", "\\")) for part in alike):
            refuse("absolute path")
        seen = parts + [name for part in alike for name in re.split(r"[/\\]", part) if name]
    for part in seen:
        if part == "..":
            refuse("`..`")
        if not part.strip(". "):
            refuse("a name of dots and spaces")
        if _DRIVE.match(part):
            refuse("drive letter")
        if _DEVICES.match(part):
            refuse("device name")
    if not parts:
        raise SourceError("EMPTY_PATH", "no file name")
    return "/".join(parts)


def local_path(url: str) -> str | None:
    """The local path that `url` means, or None for other stores."""
    if url.startswith(("file://", "local://")):
        return url.split("://", 1)[1]
    return None if PROTOCOL.match(url) else url


def files_of(url: str, error: type[SourceError] = SourceError, **options) -> Files:
    """`Files` of a URL; raises `error` BAD_URL where it cannot be opened."""
    try:
        return Files(url, **options)
    except BadUrlError as e:
        raise error("BAD_URL", f"{url}: {e.message}") from e


def shown_name(path: str) -> str:
    """Valid UTF-8 for any file name: bytes that are none become `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def source_error_of(e: OSError, what: str) -> SourceError:
    if isinstance(e, PermissionError) or e.errno == errno.EACCES:
        return SourceError("UNREADABLE", f"{what}: permission denied")
    if isinstance(e, FileNotFoundError):
        return SourceError("NOT_FOUND", f"{what}: no such file")
    if e.errno == errno.ELOOP:
        return SourceError("LINK_LOOP", f"{what}: the link leads to itself")
    if e.errno == errno.EFBIG:
        return SourceError("TOO_LARGE", e.strerror)
    return SourceError("READ_FAILED", f"{what}: {e.strerror or e}")


def is_inside(path: str, folder: str) -> bool:
    """Both real paths."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def open_source(src: str):
    local = local_path(src)
    return open(local, "rb") if local is not None else files_of(src).open()


def relation_of(a: str, b: str) -> str:
    """How two places lie: `same`, `inside` (a in b), `around` (b in a) or `apart`. Links are resolved."""
    local_a, local_b = local_path(a), local_path(b)
    if (local_a is None) != (local_b is None):
        return "apart"
    if local_a is not None:
        a, b = os.path.realpath(local_a), os.path.realpath(local_b)
    else:
        one, other = files_of(a), files_of(b)
        if type(one.fs) is not type(other.fs):
            return "apart"
        a, b = one.root.rstrip("/"), other.root.rstrip("/")
    return "same" if a == b else "inside" if is_inside(a, b) else "around" if is_inside(b, a) else "apart"
