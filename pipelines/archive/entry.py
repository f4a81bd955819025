"""One entry of SRC: a photo that is to be protected, or a file that is left alone or unusable, and why."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from pipelines.archive.paths import SourceError, photo_id, safe_relative, shown_name, source_error_of

PHOTO_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .tif .tiff .bmp .dib .gif .heic .heif .hif .avif .jp2 .jxl .psd "
    ".dng .cr2 .cr3 .nef .arw .raf .orf .rw2 .pef .srw".split()
)
SKIP_CODES = frozenset({"NOT_A_PHOTO", "HIDDEN"})


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One entry of SRC.

    `path`: relative, POSIX, valid UTF-8, unique in the listing. `url`: what `read_bytes` opens: an absolute local path
    or an fsspec URL. `size`: bytes, None where unknown. `modified`: nanoseconds since 1970 as text for local files, the
    store's etag (or modification time) elsewhere, None where unknown. `error`: `CODE: words`, None for a good photo.
    `content`: `content_digest`, where it was asked for.
    """

    path: str
    url: str
    size: int | None = None
    modified: str | None = None
    person_id: str | None = None
    error: str | None = None
    content: str | None = None

    @property
    def photo_id(self) -> str:
        return photo_id(self.path)

    @property
    def code(self) -> str | None:
        """The typed part of `error`."""
        return self.error.split(":", 1)[0] if self.error else None

    @property
    def skipped(self) -> bool:
        """Left out on purpose (not a photo, or hidden), as against failed."""
        return self.code in SKIP_CODES


def modified_of(info: dict) -> str | None:
    for key in (
        "ETag",
        "etag",
        "md5Hash",
        "content_md5",
        "mtime",
        "LastModified",
        "last_modified",
        "updated",
        "created",
    ):
        if info.get(key) is not None:
            return str(info[key]).strip('"')
    return None


def failed_row(path: str, url: str, error: SourceError) -> SourceRow:
    return SourceRow(shown_name(path), shown_name(url), error=str(error))


def stat_row(path: str, full: str, error: SourceError | None = None) -> SourceRow:
    """A row for a local file; `error`: why it is skipped."""
    if error is not None:
        return failed_row(path, full, error)
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return failed_row(path, full, SourceError("NAME_NOT_UTF8", "the name is not valid UTF-8; rename the file"))
    try:
        safe_relative(path)
        st = os.stat(full)
        if not stat.S_ISREG(st.st_mode):
            raise SourceError("NOT_A_FILE", "a device, pipe or folder")
    except OSError as e:
        return failed_row(path, full, source_error_of(e, "file"))
    except SourceError as e:
        return failed_row(path, full, e)
    return SourceRow(path, full, st.st_size, str(st.st_mtime_ns))


def row_by_suffix(path: str) -> SourceError | None:
    name = path.rsplit("/", 1)[-1]
    if os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES:
        return None
    return SourceError("NOT_A_PHOTO", "not a picture by its suffix; left alone")
