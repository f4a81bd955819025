"""Files of a gallery on any fsspec file system: hashed while written, checked while read, committed last.

A data file is written under a temporary name and then linked to its final one, which carries a digest of
what went into it.  So a file under a final name is whole, it never changes, and a builder that finds it
there (its own, from before it was killed, or another's) uses it.  ``index.json`` is created last and only
if absent: before it exists nothing is readable.

Local disks promise all of this.  Other file systems of fsspec show a file when it is complete, but where
they have no exclusive creation, two builders at once may replace a file by another of equal rows.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

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
    """

    def __init__(self, url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = os.fspath(url)
        self.storage_options = dict(storage_options or {})
        self.fs, self.root = fsspec.core.url_to_fs(self.url, **self.storage_options)
        self.root = self.root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Where a file is, inside the file system."""
        if not _NAME.fullmatch(name):
            raise GalleryCorruptError(f"{self.url}: {name!r} is not a file name of a gallery")
        return f"{self.root}/{name}"

    def folder(self, name: str) -> Folder:
        """A folder inside this one."""
        self.path(name)
        return Folder(f"{self.url.rstrip('/')}/{name}", self.storage_options)

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.path(name))

    def names(self) -> list[str]:
        """Names of the files and folders here, sorted; none where there is no such folder."""
        if self.local:
            try:
                return sorted(os.listdir(self.root))
            except (FileNotFoundError, NotADirectoryError):
                return []
        self.fs.invalidate_cache(self.root)
        try:
            return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False))
        except FileNotFoundError:
            return []

    def once(self, name: str, write: Callable[[BinaryIO], None]) -> tuple[FileEntry, bool]:
        """A file that is written if it is not there yet, by letting ``write`` fill it.

        Returns:
            its entry, and whether this call made it.

        Raises:
            GalleryError: somebody deleted the file while it was written.
        """
        if self.exists(name):
            return self.entry(name), False
        self.fs.makedirs(self.root, exist_ok=True)
        temporary = f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            with self.fs.open(self.path(temporary), "wb") as file:
                hashing = _HashingWriter(file)
                write(hashing)  # type: ignore[arg-type]
                if self.local:
                    file.flush()
                    os.fsync(file.fileno())  # or a machine that dies could leave the final name with no bytes
            return (FileEntry(name, hashing.size, hashing.hash.hexdigest()), True) if self._link(
                temporary, name
            ) else (self.entry(name), False)
        finally:
            self.remove(temporary)

    def _link(self, temporary: str, name: str) -> bool:
        """Give a temporary file its final name. False where another was quicker."""
        if not self.local:
            if self.fs.exists(self.path(name)):
                return False
            self.fs.mv(self.path(temporary), self.path(name))
            return True
        try:
            os.link(self.path(temporary), self.path(name))
            return True
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise GalleryError(f"{self.url}: {name} was deleted while it was being written") from None

    def adopt(self, other: Folder, entry: FileEntry) -> bool:
        """Have another folder's file here as well, without another copy of its bytes where the disk can.

        Returns:
            whether this call made it.
        """
        if self.exists(entry.name):
            return False
        self.fs.makedirs(self.root, exist_ok=True)
        if self.local and other.local:
            try:
                os.link(other.path(entry.name), self.path(entry.name))
                return True
            except FileExistsError:
                return False
            except OSError:  # another disk, or one without hard links
                pass

        def copy(target: BinaryIO) -> None:
            with other.fs.open(other.path(entry.name), "rb") as file:
                shutil.copyfileobj(file, target, _CHUNK)

        return self.once(entry.name, copy)[1]

    def entry(self, name: str) -> FileEntry:
        """Size and sha256 of a file that is there."""
        digest, size = hashlib.sha256(), 0
        with self.fs.open(self.path(name), "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return FileEntry(name, size, digest.hexdigest())

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""
        try:
            self.fs.rm_file(self.path(name))
        except FileNotFoundError:
            pass

    def remove_all(self) -> None:
        """Delete the folder with all that it holds; what makes it a gallery goes first."""
        self.remove(INDEX)
        if self.local:
            shutil.rmtree(self.root, ignore_errors=True)
            if os.path.isdir(self.root):
                shutil.rmtree(self.root)
        elif self.fs.exists(self.root):
            self.fs.rm(self.root, recursive=True)

    def create(self, name: str, content: bytes) -> bool:
        """Create a small file in one step if there is none. False where there is one."""
        final = self.path(name)
        self.fs.makedirs(self.root, exist_ok=True)
        if self.local:
            # A hard link is the local create-if-absent that never shows half a file.
            with self._temporary(content) as temporary:
                try:
                    os.link(temporary, final)
                    return True
                except FileExistsError:
                    return False
        if self.fs.exists(final):
            return False
        try:
            # Object stores show an object only when it is complete; "xb" is their conditional put.
            with self.fs.open(final, "xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        except (ValueError, NotImplementedError):  # a file system of fsspec without exclusive creation
            with self.fs.open(final, "wb") as file:
                file.write(content)
        return True

    def replace(self, name: str, content: bytes) -> None:
        """Write a small file, so that a reader sees the old content or the new."""
        if not self.local:
            self.fs.pipe_file(self.path(name), content)
            return
        os.makedirs(self.root, exist_ok=True)
        with self._temporary(content) as temporary:
            os.replace(temporary, self.path(name))

    @contextmanager
    def _temporary(self, content: bytes) -> Iterator[str]:
        """Path of a local file with this content, safe on the disk; it is gone after the block, if it still is there."""
        path = self.path(f"{TEMPORARY}{uuid.uuid4().hex}")
        try:
            with open(path, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            self.remove(os.path.basename(path))

    def fetch(self, name: str) -> bytes | None:
        """A small file's content; None where there is none."""
        try:
            return self.fs.cat_file(self.path(name))
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
        try:
            return self.fs.cat_file(self.path(INDEX))
        except (FileNotFoundError, NotADirectoryError):
            raise GalleryNotFoundError(f"no finished gallery at {self.url} (no {INDEX})") from None

    def read(self, entry: FileEntry) -> bytes:
        """A file's content.

        Raises:
            GalleryCorruptError: missing, or not the size and sha256 that ``index.json`` records.
        """
        try:
            content = self.fs.cat_file(self.path(entry.name))
        except FileNotFoundError:
            raise GalleryCorruptError(f"{self.url}: {entry.name} is missing") from None
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
