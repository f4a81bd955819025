"""Files of a gallery on any fsspec file system: hashed while written, checked while read, committed last.

How they are written, read and tried again is ``cluster.files``'s.  A data file is created if it is absent, under a name
that carries a digest of what went into it.  So a file under its name is whole, it never changes, and a builder that
finds it there (its own, from before it was killed, or another's) uses it.  ``index.json`` is created last: before it
exists nothing is readable.  A file system that does not promise create-if-absent is refused when something is to be
created, not for reading.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from cluster.errors import BadUrlError, UnsafeStoreError
from cluster.files import Content, Files
from gallery_index.errors import (
    GalleryBusyError,
    GalleryCorruptError,
    GalleryError,
    GalleryExistsError,
    GalleryNotFoundError,
)

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

INDEX = "index.json"
TEMPORARY = "tmp-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    """What ``index.json`` records of a file."""

    name: str
    size: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self.sha256}


class _HashingWriter(io.RawIOBase):
    """A write-only file that counts and hashes what passes through."""

    def __init__(self, target: BinaryIO) -> None:
        self._target, self.size, self.hash = target, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._target.write(view)
        self.hash.update(view)
        self.size += len(view)
        return len(view)


class Folder:
    """A gallery's folder.

    Args:
        url: a local path or any fsspec URL.
        storage_options: passed to fsspec (credentials, endpoints).

    Raises:
        GalleryError: the URL cannot be opened.
    """

    def __init__(self, url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = os.fspath(url)
        self.storage_options = dict(storage_options or {})
        try:
            self.files = Files(url, self.storage_options, temporary=TEMPORARY + "{random}")
        except BadUrlError as error:
            raise GalleryError(str(error)) from error
        self.root, self.local = self.files.root.rstrip("/"), self.files.local

    def checked(self, name: str) -> str:
        """The name itself; GalleryCorruptError where no file of a gallery has such a name."""
        if not _NAME.fullmatch(name):
            raise GalleryCorruptError(f"{self.url}: {name!r} is not a file name of a gallery")
        return name

    def path(self, name: str) -> str:
        """Where a file is, inside the file system."""
        return self.files.path(self.checked(name))

    def folder(self, name: str) -> Folder:
        """A folder inside this one."""
        self.checked(name)
        return Folder(f"{self.url.rstrip('/')}/{name}", self.storage_options)

    def exists(self, name: str) -> bool:
        return self.files.has(self.checked(name))

    def names(self) -> list[str]:
        """Names of the files and folders here, sorted; none where there is no such folder."""
        return [name for name, _ in self.files.list()]

    def once(self, name: str, write: Callable[[BinaryIO], None]) -> tuple[FileEntry, bool]:
        """A file that is written if it is not there yet, by letting ``write`` fill it.

        Returns:
            its entry, and whether this call made it.

        Raises:
            GalleryError: somebody deleted the file while it was written, or the store cannot create if absent.
        """
        if self.exists(name):
            return self.entry(name), False
        made: list[FileEntry] = []

        def fill(file: BinaryIO) -> None:
            hashing = _HashingWriter(file)
            write(hashing)  # type: ignore[arg-type]
            made.append(FileEntry(name, hashing.size, hashing.hash.hexdigest()))

        try:
            won = self._create(name, fill)
        except FileNotFoundError:
            raise GalleryError(f"{self.url}: {name} was deleted while it was being written") from None
        return (made[0], True) if won else (self.entry(name), False)

    def adopt(self, other: Folder, entry: FileEntry) -> bool:
        """Have another folder's file here as well, without another copy of its bytes where the disk can.

        Returns:
            whether this call made it.
        """
        if self.exists(entry.name):
            return False
        if self.local and other.local:
            try:
                os.makedirs(self.root, exist_ok=True)
                os.link(other.path(entry.name), self.path(entry.name))
                return True
            except FileExistsError:
                return False
            except OSError:  # another disk, or one without hard links
                pass

        def copy(target: BinaryIO) -> None:
            with other.files.open(other.checked(entry.name)) as file:
                shutil.copyfileobj(file, target, _CHUNK)

        return self.once(entry.name, copy)[1]

    def entry(self, name: str) -> FileEntry:
        """Size and sha256 of a file that is there."""
        return FileEntry(name, *self.files.digest(self.checked(name)))

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""
        self.files.remove(self.checked(name))

    def remove_all(self) -> None:
        """Delete the folder with all that it holds; what makes it a gallery goes first."""
        self.remove(INDEX)
        if self.local:
            shutil.rmtree(self.root, ignore_errors=True)
            if os.path.isdir(self.root):
                shutil.rmtree(self.root)
        elif self.names():
            self.files.again(lambda: self.files.fs.rm(self.root, recursive=True))

    def create(self, name: str, content: bytes) -> bool:
        """Create a small file in one step if there is none. False where there is one.

        Raises:
            GalleryError: the store cannot promise that.
        """
        return self._create(name, content)

    def _create(self, name: str, content: Content) -> bool:
        try:
            return self.files.create(self.checked(name), content)
        except UnsafeStoreError as error:
            raise GalleryError(str(error)) from error

    def replace(self, name: str, content: bytes) -> None:
        """Write a small file, so that a reader sees the old content or the new."""
        self.files.write(self.checked(name), content)

    def fetch(self, name: str) -> bytes | None:
        """A small file's content; None where there is none."""
        try:
            return self.files.read(self.checked(name))
        except (FileNotFoundError, NotADirectoryError):
            return None

    @contextmanager
    def lock(self, name: str, exclusive: bool = False) -> Iterator[None]:
        """Hold a lock while the block lasts: any number of shared ones, or one exclusive one.

        A shared one waits for an exclusive one to end.  A process that dies, by whatever signal, lets go.  Only local
        disks (and NFS) have locks; elsewhere, and on a disk that cannot be written to, this does nothing.

        Raises:
            GalleryBusyError: an exclusive lock is wanted, and somebody holds one of either kind.
        """
        if not self.local or fcntl is None:
            yield
            return
        path = self.path(name)
        while True:
            try:
                os.makedirs(self.root, exist_ok=True)
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError:
                yield
                return
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
                except BlockingIOError:
                    raise GalleryBusyError(f"{self.url}: {name} is in use") from None
                # The lock counts only if the file is still the one with this name.
                if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                    yield
                    if exclusive:
                        self.remove(name)
                    return
            finally:
                os.close(file)

    def commit(self, content: bytes) -> None:
        """Create ``index.json`` in one step, if there is none.

        Raises:
            GalleryExistsError: another build was committed here first.
        """
        if not self.create(INDEX, content):
            raise GalleryExistsError(f"{self.url} already holds a gallery; build into another folder")

    def read_index(self) -> bytes:
        content = self.fetch(INDEX)
        if content is None:
            raise GalleryNotFoundError(f"no finished gallery at {self.url} (no {INDEX})")
        return content

    def read(self, entry: FileEntry) -> bytes:
        """A file's content.

        Raises:
            GalleryCorruptError: missing, or not the size and sha256 that ``index.json`` records.
        """
        content = self.fetch(entry.name)
        if content is None:
            raise GalleryCorruptError(f"{self.url}: {entry.name} is missing")
        self._check(entry, len(content), hashlib.sha256(content).hexdigest())
        return content

    def verify(self, entry: FileEntry) -> None:
        """Check a file as ``read`` does, without holding it in memory."""
        try:
            found = self.entry(entry.name)
        except FileNotFoundError:
            raise GalleryCorruptError(f"{self.url}: {entry.name} is missing") from None
        self._check(entry, found.size, found.sha256)

    def _check(self, entry: FileEntry, size: int, digest: str) -> None:
        if size != entry.size:
            raise GalleryCorruptError(f"{self.url}: {entry.name} has {size} bytes, expected {entry.size}")
        if digest != entry.sha256:
            raise GalleryCorruptError(f"{self.url}: {entry.name} has sha256 {digest}, expected {entry.sha256}")
