"""The one file layer: files below a URL of fsspec, each there whole or not at all.

What each back end promises:

| back end | `write` replaces a file by | `create`, only if it is absent, by | so of two that create |
|---|---|---|---|
| `file` | a temporary file beside it, fsync, rename(2) | the same with link(2), which never replaces | one wins, \
between all processes and hosts that share the file system (NFS included) |
| `memory` | one assignment | `mode="create"` under a lock | one wins, within one process (`shared` is false) |
| `s3`, `s3a` | one PUT | one PUT with `If-None-Match: *` (s3fs, botocore > 1.35.20) | one wins, by AWS S3; another \
server must know conditional writes |
| `gs`, `gcs` | one upload | one upload with `ifGenerationMatch=0` (gcsfs) | one wins, by Cloud Storage |
| `az`, `abfs`, `abfss` | one upload | one upload with `overwrite=False` (adlfs) | one wins, by Azure Blob Storage |
| anything else, and disks without hard links | what the store does | refused (`UnsafeStoreError`) unless \
`allow_unsafe=True`: then "exists?", write, move | both may |

- An object store needs no temporary name, since a PUT shows all or nothing.
- What is read has the size that the store tells at that moment; what came incompletely is asked for again.
- Faults that may pass are tried again after growing pauses (`cluster.retries`), on disks as on stores.
- A disk that loses its power may lose the latest files (folders are not fsync'ed), but shows none by half.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, BinaryIO, TypeVar

from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from cluster.errors import UnsafeStoreError
from cluster.remote import OBJECT_STORES, open_fs, protocols
from cluster.retries import ATTEMPTS, http_status, is_transient, with_retries

T = TypeVar("T")
Content = bytes | Callable[[BinaryIO], None]

_PIECE = 1 << 22  # bytes read at once where a file does not have to be in memory as a whole
_ABSENT = (FileNotFoundError, NotADirectoryError)
_MEMORY_LOCK = threading.Lock()


class Files:
    """Files below one URL. Picklable; safe to use from several threads.

    Names are relative, with `/`; "" is the URL itself.

    All methods raise OSError, or what the store's client raises, as it comes: whoever calls gives it his own type.

    Args:
        url: local path or fsspec URL of a folder, which `write` and `create` make, or of one file.
        storage_options: keyword arguments of the fsspec file system.
        temporary: name of temporary files, from `{name}` of the file, `{stem}`, what of it is before the first dot (32
            zeros where nothing is), and `{random}`, 32 hex digits.
        attempts: how often an action is tried where a fault may pass; 1 for callers that try again themselves.
        allow_unsafe: `create` also where two at once may both believe to have created a file.

    Attributes:
        fs: the file system of fsspec; root: the URL's path in it.
        local, memory: what kind it is.
        url: the local path, absolute, or the URL with its protocol.
        safe: whether the back end promises create-if-absent.

    Raises:
        BadUrlError: see `cluster.remote.open_fs`.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
        *,
        temporary: str = "{name}.{random}.tmp",
        attempts: int = ATTEMPTS,
        allow_unsafe: bool = False,
    ) -> None:
        self.fs, self.root = open_fs(os.fspath(url), **(storage_options or {}))
        self.attempts, self.allow_unsafe, self._template = attempts, allow_unsafe, temporary
        self.local, self.memory = isinstance(self.fs, LocalFileSystem), isinstance(self.fs, MemoryFileSystem)
        self._objects = not OBJECT_STORES.isdisjoint(protocols(self.fs))
        self.url = self.root if self.local else self.fs.unstrip_protocol(self.root)
        self.safe = self.local or self.memory or self._objects

    def path(self, name: str = "") -> str:
        """Where a file is inside the file system (no protocol)."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def again(self, action: Callable[[], T]) -> T:
        """What `action` gives, which touches this file system; again where a fault may pass."""
        return with_retries(action, self.attempts, transient=partial(is_transient, remote=not self.local))

    # Looking and reading ---------------------------------------------------------------------------------------

    def info(self, name: str = "") -> dict[str, Any]:
        """What fsspec knows of a file or folder as it is now: `type`, `size` and what the store adds."""

        def look() -> dict[str, Any]:
            self._forget(name)
            return self.fs.info(self.path(name))

        return self.again(look)

    def has(self, name: str = "") -> bool:
        """Whether there is such a file. An error, not a no, where the store does not say."""
        try:
            return self.info(name)["type"] == "file"
        except _ABSENT:
            return False

    def list(self, folder: str = "") -> list[tuple[str, bool]]:
        """Names in a folder, sorted, and whether each is a folder itself; none where there is no such folder."""
        path = self.path(folder)

        def look() -> list[tuple[str, bool]]:
            if self.local:
                with os.scandir(path) as entries:
                    return sorted((entry.name, entry.is_dir()) for entry in entries)
            self.fs.invalidate_cache(path)
            found = self.fs.ls(path, detail=True)
            return sorted((i["name"].rstrip("/").rsplit("/", 1)[-1], i["type"] == "directory") for i in found)

        try:
            return self.again(look)
        except _ABSENT:
            return []

    def open(self, name: str = "", **options: Any) -> BinaryIO:
        """A file to be read piece by piece; what is read then is not tried again (see `again`).

        Args:
            options: of the file system's `open`, for stores that are not local.
        """
        return self.again(partial(self._open, name, **options))

    def _open(self, name: str, **options: Any) -> BinaryIO:
        return open(self.path(name), "rb") if self.local else self.fs.open(self.path(name), "rb", **options)

    def read(self, name: str = "", max_bytes: int | None = None) -> bytes:
        """A file's content.

        Raises:
            OSError: also EFBIG, with words, where it has more than `max_bytes`; then nothing is read.
        """
        path = self.path(name)

        def whole() -> bytes:
            self._forget(name)
            size = self.fs.info(path).get("size")
            if size is not None and max_bytes is not None and size > max_bytes:
                raise OSError(errno.EFBIG, f"{size:,} bytes; the limit is {max_bytes:,}")
            if self.local:
                with open(path, "rb") as file:
                    return file.read()
            data = self.fs.cat_file(path)
            if size is not None and len(data) != size:
                raise ConnectionError(f"{path}: {len(data):,} of {size:,} bytes came")
            return data

        return self.again(whole)

    def digest(self, name: str = "", new: Callable[[], Any] = hashlib.sha256) -> tuple[int, str]:
        """Size and digest, hex, of a file, which is read in pieces.

        Args:
            new: makes the hash.
        """

        def hashed() -> tuple[int, str]:
            self._forget(name)
            size, hash_ = 0, new()
            with self._open(name, block_size=_PIECE, cache_type="readahead") as file:
                while piece := file.read(_PIECE):
                    hash_.update(piece)
                    size += len(piece)
                expected = None if self.local else getattr(file, "size", None)
            if size != (expected or size):
                raise ConnectionError(f"{self.path(name)}: {size:,} of {expected:,} bytes came")
            return size, hash_.hexdigest()

        return self.again(hashed)

    def _forget(self, name: str) -> None:
        """A listing may know an older size."""
        self.fs.invalidate_cache(os.path.dirname(self.path(name)))

    # Writing ---------------------------------------------------------------------------------------------------

    def write(self, name: str, content: Content) -> None:
        """Put a file there, in the place of what may be there.

        Args:
            content: bytes, or what writes them into a file; that is called once, so a fault of a local disk while it
                writes is not tried again. For other stores its bytes go through a local temporary file.
        """
        self._put(name, content, create=False)

    def create(self, name: str, content: Content) -> bool:
        """Put a file there if there is none.

        Returns:
            whether this call made it: of any number at once, one is told so.

        Raises:
            UnsafeStoreError: the back end cannot promise that.
        """
        if not (self.safe or self.allow_unsafe):
            raise UnsafeStoreError(self.url, "this store does not promise create-if-absent")
        return self._put(name, content, create=True)

    def remove(self, name: str = "") -> None:
        """Remove a file, if it is there."""

        def drop() -> None:
            with suppress(FileNotFoundError):  # the answer to an earlier try may have been lost
                self.fs.rm_file(self.path(name))

        self.again(drop)

    def _put(self, name: str, content: Content, create: bool) -> bool:
        path = self.path(name)
        if self.local:
            put = partial(self._put_local, path, content, create)
            return put() if callable(content) else self.again(put)
        if not callable(content):
            return self.again(partial(self._put_remote, path, content, create))
        with tempfile.NamedTemporaryFile(prefix="scol-") as file:
            content(file)
            file.flush()
            return self.again(partial(self._put_remote, path, file.name, create))

    def _put_local(self, path: str, content: Content, create: bool) -> bool:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        except FileExistsError as error:  # a file is in the folder's place
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.path.dirname(path)) from error
        temp = self._temporary(path)
        try:
            with open(temp, "xb") as file:
                content(file) if callable(content) else file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or a crash of the node could leave the final name with no bytes
            if create:
                return self._link(temp, path)
            os.replace(temp, path)
            return True
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temp)

    def _link(self, temp: str, path: str) -> bool:
        try:
            os.link(temp, path)
            return True
        except FileExistsError:
            # NFS may repeat a request whose answer got lost: then the name that exists is our own.
            return os.path.samefile(temp, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            if not self.allow_unsafe:
                raise UnsafeStoreError(path, "this file system has no hard links to commit with") from error
        if os.path.exists(path):
            return False
        os.replace(temp, path)
        return True

    def _put_remote(self, path: str, source: bytes | str, create: bool) -> bool:
        """`source`: the content, or the path of a local file."""

        def put(path: str, **mode: str) -> None:
            if isinstance(source, str):
                self.fs.put_file(source, path, **mode)
            else:
                self.fs.pipe_file(path, source, **mode)

        if not self._objects:
            self.fs.makedirs(os.path.dirname(path), exist_ok=True)
        if not create:
            put(path)
            return True
        if self.memory:
            with _MEMORY_LOCK:
                try:
                    put(path, mode="create")
                    return True
                except FileExistsError:
                    return False
        if self._objects:
            return self._put_if_absent(path, source, put)
        temp = self._temporary(path)
        try:
            put(temp)
            if self.fs.exists(path):
                return False
            self.fs.mv(temp, path)
            return True
        finally:
            if self.fs.exists(temp):
                self.fs.rm_file(temp)

    def _put_if_absent(self, path: str, source: bytes | str, put: Callable[..., None]) -> bool:
        """Whether what is there now is ours.

        A client puts again by itself where no answer came, so "exists already" (412), or "no such upload" (404) at the
        end of a multipart one, may be the answer to the repetition of what has succeeded.
        """
        try:
            put(path, mode="create")
            return True
        except OSError as error:
            # s3fs knows 412 for what it is only where the server names the condition, which not all do.
            exists = isinstance(error, FileExistsError) or http_status(error)[0] == 412
            if not exists and not isinstance(error, FileNotFoundError):
                raise
            self.fs.invalidate_cache(os.path.dirname(path))
            try:
                return self._equal(path, source)
            except FileNotFoundError:
                if exists:  # taken out again meanwhile, as by a purge
                    return False
                raise error from error.__cause__

    def _equal(self, path: str, source: bytes | str) -> bool:
        ours = open(source, "rb") if isinstance(source, str) else io.BytesIO(source)
        with ours, self.fs.open(path, "rb") as theirs:
            while piece := theirs.read(_PIECE):
                if ours.read(len(piece)) != piece:
                    return False
            return not ours.read(1)

    def _temporary(self, path: str) -> str:
        folder, _, name = path.rpartition("/")
        stem = name.split(".")[0] or "0" * 32
        return f"{folder}/{self._template.format(name=name, stem=stem, random=uuid.uuid4().hex)}"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """`Files.write` of a local file for what writes by name only: a temporary name beside `path` (``PATH.RANDOM.tmp``),
    which takes its place when the block ends without an error.

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
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
