"""Where photos come from and where they go: folders, globs, lists and tables, on disk or behind any fsspec URL.

`list_photos` yields one `SourceRow` for every file that it meets, sorted by relative path, so that nothing is lost
silently: a photo; an entry that cannot be used, with a typed reason; or a file that is skipped on purpose (`skipped`:
other kinds of files, which are neither copied nor changed, and hidden ones).

SRC, and the relative path of a photo:

- a folder, all depths: below the folder
- a glob (`*`, `?`, `[...]`, `**` for all depths): below its longest part without wildcards
- `LIST.txt`, UTF-8, a path or URL a line, empty lines ignored: as written; of an absolute path or URL, what lies below
  the list's folder, else all of it without the leading `/` or `scheme://`
- `TABLE.parquet`, `TABLE.csv`, column `path`, optional `person_id`: as in a list
- one photo: its name

In folders and globs files are told apart by suffix (`PHOTO_SUFFIXES`; raw and HEIC count as photos, and are refused
with a reason when they are decoded). What a list names is always taken for a photo.

Links are followed where they stay inside SRC; loops and links that lead outside get a row with a reason. A path that
could leave OUT, or name something else there, is refused (`safe_relative`).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import os
import re
import stat
import unicodedata
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from fsspec.utils import glob_translate

from cluster.remote import OBJECT_STORES, open_fs, protocols
from cluster.retries import is_transient, with_retries
from pipelines.photo import MAX_BYTES

PHOTO_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .tif .tiff .bmp .dib .gif .heic .heif .hif .avif .jp2 .jxl .psd "
    ".dng .cr2 .cr3 .nef .arw .raf .orf .rw2 .pef .srw".split()
)
TABLE_SUFFIXES = (".parquet", ".pq", ".csv")
SKIP_CODES = frozenset({"NOT_A_PHOTO", "HIDDEN"})

T = TypeVar("T")

_PIECE = 4 * 2**20  # bytes read at once where a file is only hashed
_PAGE = 1000  # objects of S3 asked for at once: the most that it gives
_MAX_LINKS = 8  # folders entered through links, one inside the other: bounds what links across links can unfold to
_DEVICES = re.compile(r"(?i)^(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\..*)?$")
_DRIVE = re.compile(r"[A-Za-z]:")
_PROTOCOL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*(::|://)")


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


# ---- local or not ----------------------------------------------------------------------------------------------------


def _local(url: str) -> str | None:
    """The local path that `url` means, or None for other stores."""
    if url.startswith(("file://", "local://")):
        return url.split("://", 1)[1]
    return None if _PROTOCOL.match(url) else url


def _fs(url: str, error: type[SourceError] = SourceError):
    try:
        return open_fs(url)
    except (ValueError, ImportError, TypeError) as e:
        raise error("BAD_URL", f"{url}: {e}") from e


def _patient(action: Callable[[], T]) -> T:
    """What `action` gives, which asks a store over a network; again where a fault may pass."""
    return with_retries(action, transient=is_transient)


def _modified(info: dict) -> str | None:
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


def _shown(path: str) -> str:
    """Valid UTF-8 for any file name: bytes that are none become `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _failed(path: str, url: str, error: SourceError) -> SourceRow:
    return SourceRow(_shown(path), _shown(url), error=str(error))


def _os_error(e: OSError, what: str) -> SourceError:
    if isinstance(e, PermissionError) or e.errno == errno.EACCES:
        return SourceError("UNREADABLE", f"{what}: permission denied")
    if isinstance(e, FileNotFoundError):
        return SourceError("NOT_FOUND", f"{what}: no such file")
    if e.errno == errno.ELOOP:
        return SourceError("LINK_LOOP", f"{what}: the link leads to itself")
    return SourceError("READ_FAILED", f"{what}: {e.strerror or e}")


# ---- folders ---------------------------------------------------------------------------------------------------------


def _inside(path: str, folder: str) -> bool:
    """Both real paths."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _stat_row(path: str, full: str, error: SourceError | None = None) -> SourceRow:
    """A row for a local file; `error`: why it is skipped."""
    if error is not None:
        return _failed(path, full, error)
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return _failed(path, full, SourceError("NAME_NOT_UTF8", "the name is not valid UTF-8; rename the file"))
    try:
        safe_relative(path)
        st = os.stat(full)
        if not stat.S_ISREG(st.st_mode):
            raise SourceError("NOT_A_FILE", "a device, pipe or folder")
    except OSError as e:
        return _failed(path, full, _os_error(e, "file"))
    except SourceError as e:
        return _failed(path, full, e)
    return SourceRow(path, full, st.st_size, str(st.st_mtime_ns))


def _by_suffix(path: str) -> SourceError | None:
    name = path.rsplit("/", 1)[-1]
    if os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES:
        return None
    return SourceError("NOT_A_PHOTO", "not a picture by its suffix; left alone")


def _walk_local(root: str, hidden: bool, depth: int | None) -> Iterator[SourceRow]:
    """All files below `root` sorted by path; one folder's names in memory at a time (and those of its parents)."""
    real_root = os.path.realpath(root)

    def entries(folder: str, prefix: str) -> list[tuple[str, os.DirEntry]]:
        with os.scandir(folder) as it:
            found = [(prefix + e.name, e) for e in it]
        # A folder sorts where its content does: `a-b` < `a.jpg` < `a/...`.
        return sorted(found, key=lambda f: f[0] + ("/" if is_folder(f[1]) else ""))

    def is_folder(entry: os.DirEntry) -> bool:
        try:
            return entry.is_dir()
        except OSError:  # a link to itself
            return False

    def identity(path: str) -> tuple[int, int]:
        st = os.stat(path)
        return st.st_dev, st.st_ino

    # One element a level: what is left of it, the folder's identity, links on the way to it.
    try:
        stack = [(iter(entries(root, "")), identity(root), 0)]
    except OSError as e:
        raise _os_error(e, root) from e
    while stack:
        todo, _, links = stack[-1]
        path, entry = next(todo, (None, None))
        if entry is None:
            stack.pop()
            continue
        full = entry.path
        try:
            if entry.name.startswith(".") and not hidden:
                raise SourceError("HIDDEN", "a hidden file or folder; left alone")
            is_link, is_dir = entry.is_symlink(), is_folder(entry)
            if is_link:
                try:
                    os.stat(full)
                except FileNotFoundError:
                    raise SourceError(
                        "BROKEN_LINK", f"leads to {_shown(os.readlink(full))}, which is not there"
                    ) from None
                if (is_dir or not _by_suffix(path)) and not _inside(os.path.realpath(full), real_root):
                    raise SourceError("LINK_OUTSIDE", "the link leads outside SRC")
            if is_dir:
                if depth is not None and len(stack) >= depth:
                    continue
                here = identity(full)
                if any(here == above for _, above, _ in stack):
                    raise SourceError("LINK_LOOP", "the link leads to a folder that it lies in")
                if is_link and links >= _MAX_LINKS:
                    raise SourceError("LINK_LOOP", f"more than {_MAX_LINKS} links one inside the other")
                stack.append((iter(entries(full, path + "/")), here, links + is_link))
                continue
        except SourceError as e:
            yield _failed(path, full, e)
        except OSError as e:
            yield _failed(path, full, _os_error(e, "folder" if is_folder(entry) else "file"))
        else:
            yield _stat_row(path, full, _by_suffix(path))


def _walk_store(fs, root: str, hidden: bool, depth: int | None) -> Iterator[SourceRow]:
    """As `_walk_local`, on any fsspec store: one folder in memory at a time (and its parents), on S3 1,000 objects."""
    root = root.rstrip("/")
    if "s3" in protocols(fs):
        yield from _walk_s3(fs, root, hidden, depth)
        return

    def entries(folder: str) -> list[tuple[str, dict]]:
        found = _patient(lambda: fs.ls(folder, detail=True))
        found = [(i["name"].rstrip("/")[len(root) + 1 :], i) for i in found]
        # Stores list the folder itself where a marker object exists.
        found = [(p, i) for p, i in found if p and i["name"].rstrip("/") != folder.rstrip("/")]
        return sorted(found, key=lambda f: f[0] + ("/" if f[1]["type"] == "directory" else ""))

    try:
        stack = [iter(entries(root))]
    except FileNotFoundError as e:
        raise SourceError("NOT_FOUND", f"{root}: no such folder") from e
    except OSError as e:
        raise _os_error(e, root) from e
    while stack:
        path, info = next(stack[-1], (None, None))
        if info is None:
            stack.pop()
            continue
        url = fs.unstrip_protocol(info["name"])
        try:
            if path.rsplit("/", 1)[-1].startswith(".") and not hidden:
                raise SourceError("HIDDEN", "a hidden file or folder; left alone")
            if info["type"] == "directory":
                if depth is None or len(stack) < depth:
                    stack.append(iter(entries(info["name"])))
                continue
            safe_relative(path)
            error = _by_suffix(path)
        except SourceError as e:
            error = e
        except OSError as e:
            error = _os_error(e, "folder")
        if info["type"] == "directory" or (error and error.code == "UNSAFE_PATH"):
            yield _failed(path, url, error)
        else:
            yield SourceRow(path, url, info.get("size"), _modified(info), error=str(error) if error else None)


def _walk_s3(fs, root: str, hidden: bool, depth: int | None) -> Iterator[SourceRow]:
    """As `_walk_store`, page by page, since a prefix may hold millions of objects. S3 lists all that lies below a prefix
    in the order of UTF-8's bytes, which is that of paths here (directory buckets do not, and are listed as they come)."""
    bucket, _, prefix = root.partition("/")
    prefix = f"{prefix}/" if prefix else ""
    ask = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": _PAGE}
    empty, told = True, ""
    while ask is not None:
        try:
            page = _patient(lambda ask=ask: fs.call_s3("list_objects_v2", **ask))
        except FileNotFoundError as e:
            raise SourceError("NOT_FOUND", f"{root}: no such bucket") from e
        except OSError as e:
            raise _os_error(e, root) from e
        for info in page.get("Contents", ()):
            empty = False
            path = info["Key"][len(prefix) :]
            if not path or path.endswith("/"):  # an object that stands for a folder
                continue
            parts = path.split("/")
            above = next((i for i, part in enumerate(parts) if part.startswith(".") and part not in (".", "..")), None)
            if above is not None and not hidden:  # one row for a hidden folder
                path = "/".join(parts[: above + 1])
                if path != told and (depth is None or above < depth):
                    told = path
                    url = fs.unstrip_protocol(f"{bucket}/{prefix}{path}")
                    yield _failed(path, url, SourceError("HIDDEN", "a hidden file or folder; left alone"))
                continue
            if depth is not None and len(parts) > depth:
                continue
            url = fs.unstrip_protocol(f"{bucket}/{info['Key']}")
            try:
                if safe_relative(path) != path:
                    raise SourceError("UNSAFE_PATH", "a name with empty parts or `.` in it, which no file system has")
            except SourceError as e:
                yield _failed(path, url, e)
                continue
            error = _by_suffix(path)
            yield SourceRow(path, url, info["Size"], _modified(info), error=str(error) if error else None)
        token = page.get("NextContinuationToken")
        ask = ask | {"ContinuationToken": token} if token else None
    if empty:
        raise SourceError("NOT_FOUND", f"{root}: nothing there")


# ---- lists and tables ------------------------------------------------------------------------------------------------


def _open(src: str):
    local = _local(src)
    return open(local, "rb") if local is not None else fsspec.open(src, "rb").open()


def _read_list(src: str) -> Iterator[tuple[str, str | None]]:
    with _open(src) as f:
        text = f.read().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    for line in text.split("\n"):
        line = line.removesuffix("\r")
        if line.strip():
            yield line, None


def _read_table(src: str) -> Iterator[tuple[str, str | None]]:
    try:
        with _open(src) as f:
            if src.lower().endswith(".csv"):
                options = pa.csv.ConvertOptions(
                    column_types={"path": pa.string(), "person_id": pa.string()},
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=True,
                    null_values=[""],
                )
                table = pa.csv.read_csv(f, convert_options=options)
            else:
                names = pa.parquet.read_schema(f).names
                f.seek(0)
                table = pa.parquet.ParquetFile(f).read(columns=[n for n in ("path", "person_id") if n in names], use_threads=False)
        if "path" not in table.column_names:
            raise SourceError("BAD_LIST", f"{src}: no column `path`")
        paths = table["path"].cast(pa.string())
        people = table["person_id"].cast(pa.string()) if "person_id" in table.column_names else itertools.repeat(None)
        for path, person in zip(paths, people, strict=False):
            yield path.as_py() or "", person.as_py() if person is not None else None
    except pa.ArrowException as e:
        raise SourceError("BAD_LIST", f"{src}: {e}") from e


def _list_row(number: int, entry: str, person: str | None, base: str) -> SourceRow:
    """`base`: the list's folder, an absolute local path or a URL without a slash at its end."""
    if not entry:
        return SourceRow(f"(row {number})", "", error=str(SourceError("EMPTY_PATH", "the row has no path")))
    local_base = _local(base)
    if _PROTOCOL.match(entry) and _local(entry) is None:
        url = entry
        path = entry[len(base) + 1 :] if entry.startswith(base + "/") else entry.split("://", 1)[-1].lstrip("/")
    elif local_base is None and not entry.startswith(("/", "file://")):
        path, url = entry, f"{base}/{entry}"
    else:
        entry = _local(entry) or entry
        path = entry
        if os.path.isabs(entry):
            path = (
                os.path.relpath(entry, local_base) if local_base and _inside(entry, local_base) else entry.lstrip("/")
            )
        url = os.path.join(local_base or "/", entry)
    try:
        path = safe_relative(path)
    except SourceError as e:
        not_utf8 = any(unicodedata.category(c) == "Cs" for c in path)
        error = SourceError("NAME_NOT_UTF8", "the name is not valid UTF-8; rename the file") if not_utf8 else e
        return replace(_failed(entry, url, error), person_id=person)
    if _local(url) is not None:
        return replace(_stat_row(path, os.path.abspath(url)), person_id=person)
    try:
        fs, name = _fs(url)
        info = _patient(lambda: fs.info(name))
        if info["type"] != "file":
            raise SourceError("NOT_A_FILE", "a folder")
    except SourceError as e:
        return SourceRow(path, url, person_id=person, error=str(e))
    except OSError as e:
        return SourceRow(path, url, person_id=person, error=str(_os_error(e, "file")))
    except Exception as e:  # each store's client has errors of its own
        return SourceRow(path, url, person_id=person, error=f"READ_FAILED: {type(e).__name__}: {e}")
    return SourceRow(path, url, info.get("size"), _modified(info), person)


def _list_rows(src: str, entries: Iterator[tuple[str, str | None]]) -> list[SourceRow]:
    local = _local(src)
    base = os.path.dirname(os.path.abspath(local)) if local is not None else src.rsplit("/", 1)[0]
    try:
        rows = [_list_row(i, entry, person, base) for i, (entry, person) in enumerate(entries, 1)]
    except OSError as e:
        raise _os_error(e, src) from e
    twice = [path for path, n in Counter(row.path for row in rows).items() if n > 1]
    if twice:
        names = ", ".join(sorted(twice)[:5])
        raise SourceError("DUPLICATE", f"{src} names {len(twice)} path(s) more than once: {names}")
    return sorted(rows, key=lambda row: row.path)


def _relation(a: str, b: str) -> str:
    """How two places lie: `same`, `inside` (a in b), `around` (b in a) or `apart`. Links are resolved."""
    local_a, local_b = _local(a), _local(b)
    if (local_a is None) != (local_b is None):
        return "apart"
    if local_a is not None:
        a, b = os.path.realpath(local_a), os.path.realpath(local_b)
    else:
        (fs_a, a), (fs_b, b) = _fs(a), _fs(b)
        if type(fs_a) is not type(fs_b):
            return "apart"
        a, b = a.rstrip("/"), b.rstrip("/")
    return "same" if a == b else "inside" if _inside(a, b) else "around" if _inside(b, a) else "apart"


# ---- the listing -----------------------------------------------------------------------------------------------------


def _split_glob(src: str) -> tuple[str, str]:
    """The longest folder without wildcards, and the pattern below it."""
    parts = src.split("/")
    first = next(i for i, part in enumerate(parts) if re.search(r"[*?\[]", part))
    return "/".join(parts[:first]) or ("/" if src.startswith("/") else "."), "/".join(parts[first:])


def _kind(src: str) -> str:
    """folder, glob, list, table or photo. Raises SourceError NOT_FOUND, BAD_URL."""
    local = _local(src)
    if local is not None:
        is_dir, exists = os.path.isdir(local), os.path.exists(local)
    else:
        fs, path = _fs(src)
        try:  # not `isdir` and `exists`, which take every failure for a no
            is_dir, exists = _patient(lambda: fs.info(path))["type"] == "directory", True
        except FileNotFoundError:
            is_dir = exists = False
        except OSError as e:
            raise _os_error(e, src) from e
    if is_dir:
        return "folder"
    if not exists:
        if re.search(r"[*?\[]", src):
            return "glob"
        raise SourceError("NOT_FOUND", f"{src}: no such file or folder")
    suffix = os.path.splitext(src)[1].lower()
    return "list" if suffix == ".txt" else "table" if suffix in TABLE_SUFFIXES else "photo"


def list_photos(
    src: str, *, people_from: str | None = None, hidden: bool = False, out: str | None = None
) -> Iterator[SourceRow]:
    """One row for every entry of SRC, sorted by path (Unicode code points). See the module's text.

    `people_from="folder"`: the person is the name of the photo's folder, none for photos at the top; a table's own
    person_id goes before. `hidden`: also take hidden files and folders. `out`: rows whose file lies inside OUT become
    errors (IN_OUT), so that a list cannot make a run overwrite its own sources.
    Folders and globs are streamed; lists and tables are read whole, to sort them and to find duplicates.
    Raises SourceError where SRC as a whole cannot be used: NOT_FOUND, UNREADABLE, BAD_LIST, BAD_URL, DUPLICATE.
    """
    if people_from not in (None, "folder"):
        raise ValueError(f"people_from: `folder` or None, not {people_from!r}")
    kind = _kind(src)
    if kind in ("folder", "glob"):
        base, pattern = (src, None) if kind == "folder" else _split_glob(src)
        depth = None if pattern is None or "**" in pattern else pattern.count("/") + 1
        local = _local(base)
        if local is not None:
            rows = _walk_local(os.path.abspath(local), hidden, depth)
        else:
            fs, root = _fs(base)
            fs.invalidate_cache()
            rows = _walk_store(fs, root, hidden, depth)
        if pattern is not None:
            match = re.compile(glob_translate(pattern)).match
            rows = (
                row for row in rows if match(row.path) or (row.error and not row.skipped and os.path.isdir(row.url))
            )
    elif kind == "photo":
        local = _local(src)
        base = os.path.dirname(os.path.abspath(local)) if local is not None else src.rsplit("/", 1)[0]
        rows = iter([_list_row(1, src.rsplit("/", 1)[-1], None, base)])
    else:
        rows = iter(_list_rows(src, (_read_list if kind == "list" else _read_table)(src)))

    @functools.lru_cache(4096)
    def folder_in_out(folder: str) -> bool:
        return _relation(folder, out) in ("same", "inside")

    def in_out(url: str) -> bool:
        if _local(url) is not None and os.path.islink(_local(url)):
            return _relation(url, out) in ("same", "inside")
        return folder_in_out(os.path.dirname(url))  # resolving every path by itself would be most of the listing's time

    for row in rows:
        if people_from == "folder" and row.person_id is None and "/" in row.path:
            row = replace(row, person_id=row.path.split("/")[-2])
        if out is not None and row.error is None and in_out(row.url):
            row = replace(row, error=str(SourceError("IN_OUT", "the photo lies inside OUT")))
        yield row


def read_bytes(url: str, max_bytes: int = MAX_BYTES) -> bytes:
    """A photo's file. Raises SourceError NOT_FOUND, UNREADABLE, NOT_A_FILE, TOO_LARGE, READ_FAILED, BAD_URL."""
    local = _local(url)
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
        fs, path = _fs(url)
        return _patient(lambda: _get(fs, path, max_bytes))
    except SourceError:
        raise
    except OSError as e:
        raise _os_error(e, "file") from e
    except Exception as e:  # each store's client has errors of its own
        raise SourceError("READ_FAILED", f"{type(e).__name__}: {e}") from e


def content_digest(url: str) -> str:
    """BLAKE2b of a file's bytes, 32 hex digits; read in pieces, so that its size does not matter.

    Raises SourceError NOT_FOUND, UNREADABLE, NOT_A_FILE, READ_FAILED, BAD_URL.
    """
    digest = hashlib.blake2b(digest_size=16)
    local = _local(url)
    try:
        if local is not None:
            # Not blocking on a pipe that has taken the file's place.
            handle = os.open(local, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            try:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise SourceError("NOT_A_FILE", "a device, pipe or folder")
                while piece := os.read(handle, _PIECE):
                    digest.update(piece)
            finally:
                os.close(handle)
        else:
            fs, path = _fs(url)

            def hashed():
                fresh, size = hashlib.blake2b(digest_size=16), 0
                with fs.open(path, "rb", block_size=_PIECE, cache_type="readahead") as file:
                    while piece := file.read(_PIECE):
                        fresh.update(piece)
                        size += len(piece)
                    if size != (getattr(file, "size", None) or size):
                        raise ConnectionError(f"{size:,} of {file.size:,} bytes came")
                return fresh

            digest = _patient(hashed)
    except SourceError:
        raise
    except OSError as e:
        raise _os_error(e, "file") from e
    except Exception as e:  # each store's client has errors of its own
        raise SourceError("READ_FAILED", f"{type(e).__name__}: {e}") from e
    return digest.hexdigest()


# ---- OUT -------------------------------------------------------------------------------------------------------------


def _out_error(e: OSError, what: str) -> OutputError:
    if isinstance(e, PermissionError):
        return OutputError("NOT_WRITABLE", f"{what}: {e.strerror or e}")
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError("DISK_FULL", f"{what}: {e.strerror}")
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError("NOT_WRITABLE", f"{what}: {e.strerror}")
    return OutputError("WRITE_FAILED", f"{what}: {e.strerror or e}")


def lies_inside(one: str, other: str) -> bool:
    """Whether a folder or glob of photos lies below another folder; a tree does not lie inside itself.

    Raises:
        SourceError: as `list_photos`.
    """
    kind = _kind(one)
    if kind not in ("folder", "glob") or _kind(other) != "folder":
        return False
    return _relation(one if kind == "folder" else _split_glob(one)[0], other) == "inside"


def check_out(src: str, out: str) -> None:
    """Before a run starts: OUT is apart from SRC, is or can become a folder, and can be written to (it is tried).

    Raises OutputError OUT_IS_SRC, OUT_INSIDE_SRC (a second run would take its own output for photos), SRC_INSIDE_OUT (a
    result could overwrite a source), OUT_NOT_A_FOLDER, NOT_WRITABLE, DISK_FULL, WRITE_FAILED, BAD_URL; SourceError as
    `list_photos` where SRC cannot be used. Lists and tables name files anywhere: for them, `list_photos(out=...)`
    refuses the rows concerned.
    """
    kind = _kind(src)
    if kind in ("folder", "glob"):
        base = src if kind == "folder" else _split_glob(src)[0]
        relation = _relation(out, base)
        if relation == "same":
            raise OutputError("OUT_IS_SRC", f"{out} is the source itself")
        if relation == "inside":
            raise OutputError("OUT_INSIDE_SRC", f"{out} lies inside {base}")
        if relation == "around":
            raise OutputError("SRC_INSIDE_OUT", f"{base} lies inside {out}")

    local_out = _local(out)
    if local_out is not None:
        if os.path.exists(local_out) and not os.path.isdir(local_out):
            raise OutputError("OUT_NOT_A_FOLDER", f"{out} is a file")
        probe = os.path.join(local_out, f".scol-{uuid.uuid4().hex}.part")
        try:
            os.makedirs(local_out, exist_ok=True)
            with open(probe, "xb") as f:
                f.write(b"scol")
        except OSError as e:
            raise _out_error(e, out) from e
        finally:
            with suppress(OSError):
                os.unlink(probe)
        return
    fs, path = _fs(out, OutputError)
    try:
        probe = f"{path.rstrip('/')}/.scol-{uuid.uuid4().hex}.part"
        _patient(lambda: _put(fs, probe, b"scol"))
        _patient(lambda: _drop(fs, probe))
    except OSError as e:
        raise _out_error(e, out) from e
    except Exception as e:  # each store's client has errors of its own
        raise OutputError("NOT_WRITABLE", f"{out}: {type(e).__name__}: {e}") from e


def write_output(out: str, path: str, data: bytes) -> str:
    """Writes `data` to OUT/path, replacing what is there, and returns where (absolute local path, or URL).

    Local: written beside its place under a temporary name, flushed to disk, then renamed, so that nobody sees half a
    file; a folder in OUT that is a link is refused, since it may lead outside, or to where another photo's output lies.
    Other stores: one put, atomic where the store's is (S3, GCS, Azure). Raises OutputError UNSAFE_PATH, NOT_WRITABLE,
    DISK_FULL, WRITE_FAILED, BAD_URL.
    """
    path = _safe_output(path)
    if _local(out) is None:
        fs, target = _store_target(out, path)
        try:
            _patient(lambda: _put(fs, target, data))
        except OSError as e:
            raise _out_error(e, path) from e
        except Exception as e:  # each store's client has errors of its own
            raise OutputError("WRITE_FAILED", f"{path}: {type(e).__name__}: {e}") from e
        return fs.unstrip_protocol(target)

    target, folder = _local_target(out, path)  # before makedirs, which would follow a link that leads outside
    part = os.path.join(folder, f".scol-{uuid.uuid4().hex}.part")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(part, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, target)
    except OSError as e:
        with suppress(OSError):
            os.unlink(part)
        raise _out_error(e, path) from e
    return target


def _put(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    if OBJECT_STORES.isdisjoint(protocols(fs)):
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    fs.pipe_file(path, data)


def _get(fs: fsspec.AbstractFileSystem, path: str, max_bytes: int | None = None) -> bytes:
    """A file whole. Raises ConnectionError where only a part came, SourceError TOO_LARGE before anything is read."""
    fs.invalidate_cache(path.rsplit("/", 1)[0])  # a listing may know an older size
    size = fs.info(path).get("size")
    if size is not None and max_bytes is not None and size > max_bytes:
        raise SourceError("TOO_LARGE", f"{size:,} bytes; the limit is {max_bytes:,}")
    data = fs.cat_file(path)
    if size is not None and len(data) != size:
        raise ConnectionError(f"{len(data):,} of {size:,} bytes came")
    return data


def _drop(fs: fsspec.AbstractFileSystem, path: str) -> None:
    with suppress(FileNotFoundError):  # the answer to an earlier try may have been lost
        fs.rm_file(path)


def output_place(out: str, path: str) -> str:
    """Where `write_output` puts OUT/path, and what it returns: absolute local path, links resolved, or URL."""
    local = _local(out)
    if local is not None:
        return os.path.join(os.path.realpath(local), *path.split("/"))
    fs, target = _store_target(out, path)
    return fs.unstrip_protocol(target)


def output_sizes(out: str) -> Callable[[Sequence[str]], np.ndarray]:
    """How large files in OUT are: paths in OUT -> int64 (n,), bytes, -1 where there is none.

    On a disk each file is asked for; another store is listed, now, which keeps 16 bytes for each file that is there.

    Raises:
        OutputError: the store cannot be listed.
    """
    local = _local(out)
    if local is not None:

        def size(path: str) -> int:
            try:
                return os.stat(os.path.join(local, path)).st_size
            except OSError:
                return -1

        return lambda paths: np.array([size(path) for path in paths], np.int64)

    def hashed(path: str) -> int:
        return int(photo_id(path), 16)

    fs, root = _fs(out, OutputError)
    ids, sizes = array("Q"), array("q")
    try:
        fs.invalidate_cache()
        for row in _walk_store(fs, root, hidden=True, depth=None):
            if row.size is not None:
                ids.append(hashed(row.path))
                sizes.append(row.size)
    except SourceError as e:
        if e.code != "NOT_FOUND":  # nothing was written yet
            raise OutputError("WRITE_FAILED", f"{out} cannot be listed: {e.message}") from e
    order = np.argsort(np.frombuffer(ids, np.uint64), kind="stable")
    there, length = np.frombuffer(ids, np.uint64)[order], np.frombuffer(sizes, np.int64)[order]

    def look(paths: Sequence[str]) -> np.ndarray:
        wanted = np.array([hashed(path) for path in paths], np.uint64)
        if not len(there):
            return np.full(len(wanted), -1, np.int64)
        place = np.minimum(np.searchsorted(there, wanted), len(there) - 1)
        return np.where(there[place] == wanted, length[place], -1)

    return look


def output_digest(out: str, path: str) -> str | None:
    """SHA-256, hex, of OUT/path as it is now; None where there is no such file.

    Raises OutputError UNSAFE_PATH, WRITE_FAILED (it cannot be read), NOT_WRITABLE.
    """
    path = _safe_output(path)
    try:
        if _local(out) is None:
            fs, target = _store_target(out, path)
            return hashlib.sha256(_patient(lambda: _get(fs, target))).hexdigest()
        with open(output_place(out, path), "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise _out_error(e, path) from e


def _safe_output(path: str) -> str:
    """`safe_relative` for a place in OUT: raises OutputError."""
    try:
        return safe_relative(path)
    except SourceError as e:
        raise OutputError(e.code, e.message) from e


def _store_target(out: str, path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """OUT/path on a store that is not local: its file system, and the path there."""
    fs, root = _fs(out, OutputError)
    return fs, f"{root.rstrip('/')}/{path}"


def _local_target(out: str, path: str) -> tuple[str, str]:
    """OUT/path on a disk, and its folder.  Raises OutputError UNSAFE_PATH where a folder in OUT is a link."""
    target = output_place(out, path)
    folder = os.path.dirname(target)
    if os.path.realpath(folder) != folder:
        raise OutputError("UNSAFE_PATH", f"a folder in OUT is a link: {path!r}")
    return target, folder


def remove_output(out: str, path: str, digests: Collection[str]) -> str | None:
    """Removes OUT/path if its bytes are still some that were written there, and folders of OUT that this leaves empty.

    Args:
        digests: SHA-256, hex, of what was written there, whenever.

    Returns:
        None where the file is gone now (or was before); else why it stays, in words.

    Raises OutputError UNSAFE_PATH, NOT_WRITABLE, WRITE_FAILED, BAD_URL.
    """
    path = _safe_output(path)
    if _local(out) is None:
        fs, target = _store_target(out, path)
        try:
            fs.invalidate_cache(target.rsplit("/", 1)[0])
            if hashlib.sha256(_patient(lambda: _get(fs, target))).hexdigest() not in digests:
                return "it has changed since it was written"
            _patient(lambda: _drop(fs, target))
        except FileNotFoundError:
            return None
        except OSError as e:
            raise _out_error(e, path) from e
        except Exception as e:  # each store's client has errors of its own
            raise OutputError("WRITE_FAILED", f"{path}: {type(e).__name__}: {e}") from e
        return None

    target, folder = _local_target(out, path)
    root = os.path.realpath(_local(out))
    try:
        try:
            if not stat.S_ISREG(os.lstat(target).st_mode):
                return "something else than a file has taken its place"
        except (FileNotFoundError, NotADirectoryError):
            return None
        with open(target, "rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() not in digests:
                return "it has changed since it was written"
        os.unlink(target)
        while folder != root:
            try:
                os.rmdir(folder)  # refuses where anything is left
            except OSError:
                break
            folder = os.path.dirname(folder)
    except OSError as e:
        raise _out_error(e, path) from e
    return None
