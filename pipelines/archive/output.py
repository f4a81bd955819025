"""OUT: where files go, how they are written, looked at and removed."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from array import array
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import numpy as np

from cluster.files import Files
from pipelines.archive.folders import walk_store
from pipelines.archive.paths import (
    OutputError,
    SourceError,
    files_of,
    local_path,
    photo_id,
    relation_of,
    safe_relative,
)
from pipelines.archive.source import kind_of, split_glob

T = TypeVar("T")
_CHANGED = "it has changed since it was written"


def check_places(src: str, out: str, run_url: str) -> None:
    """OUT and RUN are apart from SRC and from each other, and can be written to.

    Raises:
        OutputError, SourceError: see ``archive.output.check_out``.
    """
    check_out(src, out)
    try:
        check_out(src, run_url)
    except OutputError as error:
        raise OutputError(error.code, f"the run's folder: {error.message}") from error
    places = [files_of(url, OutputError).url.rstrip("/") + "/" for url in (out, run_url)]
    if places[1].startswith(places[0]):
        raise OutputError(
            "OUT_IS_SRC", "the run's folder must not be OUT nor lie in it: OUT gets the photos' tree alone"
        )


def _out_error(e: OSError, what: str) -> OutputError:
    if isinstance(e, PermissionError):
        return OutputError("NOT_WRITABLE", f"{what}: {e.strerror or e}")
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError("DISK_FULL", f"{what}: {e.strerror}")
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError("NOT_WRITABLE", f"{what}: {e.strerror}")
    return OutputError("WRITE_FAILED", f"{what}: {e.strerror or e}")


def check_out(src: str, out: str) -> None:
    """Before a run starts: OUT is apart from SRC, is or can become a folder, and can be written to (it is tried).

    Raises OutputError OUT_IS_SRC, OUT_INSIDE_SRC (a second run would take its own output for photos), SRC_INSIDE_OUT (a
    result could overwrite a source), OUT_NOT_A_FOLDER, NOT_WRITABLE, DISK_FULL, WRITE_FAILED, BAD_URL; SourceError as
    `list_photos` where SRC cannot be used. Lists and tables name files anywhere: for them, `list_photos(out=...)`
    refuses the rows concerned.
    """
    kind = kind_of(src)
    if kind in ("folder", "glob"):
        base = src if kind == "folder" else split_glob(src)[0]
        relation = relation_of(out, base)
        if relation == "same":
            raise OutputError("OUT_IS_SRC", f"{out} is the source itself")
        if relation == "inside":
            raise OutputError("OUT_INSIDE_SRC", f"{out} lies inside {base}")
        if relation == "around":
            raise OutputError("SRC_INSIDE_OUT", f"{base} lies inside {out}")

    local_out = local_path(out)
    if local_out is not None and os.path.exists(local_out) and not os.path.isdir(local_out):
        raise OutputError("OUT_NOT_A_FOLDER", f"{out} is a file")
    files, probe = _files(out), f".scol-{uuid.uuid4().hex}.part"

    def attempt() -> None:
        try:
            files.write(probe, b"scol")
        finally:
            files.remove(probe)

    _typed(attempt, out, "NOT_WRITABLE")


def _files(out: str) -> Files:
    """Of OUT, or of a folder in it."""
    return files_of(out, OutputError, temporary=".scol-{random}.part")


def _typed(action: Callable[[], T], what: str, code: str = "WRITE_FAILED") -> T:
    """What `action` gives; OutputError for all that it may raise, `code` for a store's own errors."""
    try:
        return action()
    except OutputError:
        raise
    except OSError as e:
        raise _out_error(e, what) from e
    except Exception as e:  # each store's client has errors of its own
        raise OutputError(code, f"{what}: {type(e).__name__}: {e}") from e


def write_output(out: str, path: str, data: bytes) -> str:
    """Writes `data` to OUT/path, replacing what is there, and returns where (absolute local path, or URL).

    Local: written beside its place under a temporary name, flushed to disk, then renamed, so that nobody sees half a
    file; a folder in OUT that is a link is refused, since it may lead outside, or to where another photo's output lies.
    Other stores: one put, atomic where the store's is (S3, GCS, Azure). Raises OutputError UNSAFE_PATH, NOT_WRITABLE,
    DISK_FULL, WRITE_FAILED, BAD_URL.
    """
    path = _safe_output(path)
    target = output_place(out, path)
    if local_path(out) is None:
        _typed(lambda: _files(out).write(path, data), path)
    else:
        folder = _own_folder(target, path)  # before it is made, which would follow a link that leads outside
        _typed(lambda: _files(folder).write(os.path.basename(target), data), path)
    return target


def output_place(out: str, path: str) -> str:
    """Where `write_output` puts OUT/path, and what it returns: absolute local path, links resolved, or URL."""
    local = local_path(out)
    if local is not None:
        return os.path.join(os.path.realpath(local), *path.split("/"))
    files = _files(out)
    return files.fs.unstrip_protocol(files.path(path))


def output_sizes(out: str) -> Callable[[Sequence[str]], np.ndarray]:
    """How large files in OUT are: paths in OUT -> int64 (n,), bytes, -1 where there is none.

    On a disk each file is asked for; another store is listed, now, which keeps 16 bytes for each file that is there.

    Raises:
        OutputError: the store cannot be listed.
    """
    local = local_path(out)
    if local is not None:

        def size(path: str) -> int:
            try:
                return os.stat(os.path.join(local, path)).st_size
            except OSError:
                return -1

        return lambda paths: np.array([size(path) for path in paths], np.int64)

    def hashed(path: str) -> int:
        return int(photo_id(path), 16)

    ids, sizes = array("Q"), array("q")
    try:
        for row in walk_store(_files(out), hidden=True, depth=None):
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
        if local_path(out) is None:
            return _files(out).digest(path)[1]
        return Files(output_place(out, path)).digest()[1]
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


def _own_folder(target: str, path: str) -> str:
    """The folder of a local place in OUT.  Raises OutputError UNSAFE_PATH where a folder in OUT is a link."""
    folder = os.path.dirname(target)
    if os.path.realpath(folder) != folder:
        raise OutputError("UNSAFE_PATH", f"a folder in OUT is a link: {path!r}")
    return folder


def remove_output(out: str, path: str, digests: Collection[str]) -> str | None:
    """Removes OUT/path if its bytes are still some that were written there, and folders of OUT that this leaves empty.

    Args:
        digests: SHA-256, hex, of what was written there, whenever.

    Returns:
        None where the file is gone now (or was before); else why it stays, in words.

    Raises OutputError UNSAFE_PATH, NOT_WRITABLE, WRITE_FAILED, BAD_URL.
    """
    path = _safe_output(path)
    drop = _remove_stored if local_path(out) is None else _remove_local
    return _typed(lambda: drop(out, path, digests), path)


def _remove_stored(out: str, path: str, digests: Collection[str]) -> str | None:
    files = _files(out)
    try:
        if files.digest(path)[1] not in digests:
            return _CHANGED
    except FileNotFoundError:
        return None
    files.remove(path)
    return None


def _remove_local(out: str, path: str, digests: Collection[str]) -> str | None:
    root, target = os.path.realpath(local_path(out)), output_place(out, path)
    folder = _own_folder(target, path)
    try:
        if not stat.S_ISREG(os.lstat(target).st_mode):
            return "something else than a file has taken its place"
    except (FileNotFoundError, NotADirectoryError):
        return None
    if Files(target).digest()[1] not in digests:
        return _CHANGED
    os.unlink(target)
    while folder != root:
        try:
            os.rmdir(folder)  # refuses where anything is left
        except OSError:
            break
        folder = os.path.dirname(folder)
    return None
