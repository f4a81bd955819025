"""OUT: where files go, how they are written, looked at and removed."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import uuid
from array import array
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

import fsspec
import numpy as np

from cluster.remote import OBJECT_STORES, protocols
from pipelines.archive.folders import walk_store
from pipelines.archive.paths import (
    OutputError,
    SourceError,
    file_system_of,
    local_path,
    patiently,
    photo_id,
    relation_of,
    safe_relative,
)
from pipelines.archive.reading import get_whole
from pipelines.archive.source import kind_of, split_glob


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
    places = [fsspec.core.url_to_fs(url)[0].unstrip_protocol(fsspec.core.url_to_fs(url)[1]) for url in (out, run_url)]
    if places[1].rstrip("/") == places[0].rstrip("/") or places[1].startswith(places[0].rstrip("/") + "/"):
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
    fs, path = file_system_of(out, OutputError)
    try:
        probe = f"{path.rstrip('/')}/.scol-{uuid.uuid4().hex}.part"
        patiently(lambda: _put(fs, probe, b"scol"))
        patiently(lambda: _drop(fs, probe))
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
    if local_path(out) is None:
        fs, target = _store_target(out, path)
        try:
            patiently(lambda: _put(fs, target, data))
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


def _drop(fs: fsspec.AbstractFileSystem, path: str) -> None:
    with suppress(FileNotFoundError):  # the answer to an earlier try may have been lost
        fs.rm_file(path)


def output_place(out: str, path: str) -> str:
    """Where `write_output` puts OUT/path, and what it returns: absolute local path, links resolved, or URL."""
    local = local_path(out)
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

    fs, root = file_system_of(out, OutputError)
    ids, sizes = array("Q"), array("q")
    try:
        fs.invalidate_cache()
        for row in walk_store(fs, root, hidden=True, depth=None):
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
            fs, target = _store_target(out, path)
            return hashlib.sha256(patiently(lambda: get_whole(fs, target))).hexdigest()
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
    fs, root = file_system_of(out, OutputError)
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
    if local_path(out) is None:
        fs, target = _store_target(out, path)
        try:
            fs.invalidate_cache(target.rsplit("/", 1)[0])
            if hashlib.sha256(patiently(lambda: get_whole(fs, target))).hexdigest() not in digests:
                return "it has changed since it was written"
            patiently(lambda: _drop(fs, target))
        except FileNotFoundError:
            return None
        except OSError as e:
            raise _out_error(e, path) from e
        except Exception as e:  # each store's client has errors of its own
            raise OutputError("WRITE_FAILED", f"{path}: {type(e).__name__}: {e}") from e
        return None

    target, folder = _local_target(out, path)
    root = os.path.realpath(local_path(out))
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
