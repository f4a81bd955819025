"""Files of a gallery on any fsspec file system: hashed while written, checked while read, committed last.

A data file is written under a temporary name; when all are there they are moved to names that carry
their sha256, so a file under a final name is whole, and two builders can only ever put the same
bytes under the same name.  ``index.json`` is created last and only if absent: before it exists
nothing is readable.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gallery_index.errors import GalleryCorruptError, GalleryExistsError, GalleryNotFoundError

INDEX = "index.json"
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
        self.fs, self.root = fsspec.core.url_to_fs(self.url, **dict(storage_options or {}))
        self.root = self.root.rstrip("/")
        self._pending: dict[str, str] = {}

    def path(self, name: str) -> str:
        """Where a file is: its temporary place if this object wrote it and has not published it yet."""
        if not _NAME.fullmatch(name):
            raise GalleryCorruptError(f"{self.url}: {name!r} is not a file name of a gallery")
        return f"{self.root}/{self._pending.get(name, name)}"

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.path(name))

    def write(self, stem: str, suffix: str, write: Callable[[BinaryIO], None]) -> FileEntry:
        """Let ``write`` fill a new file, to be named ``STEM-SHA256[:16]SUFFIX`` by ``publish``."""
        self.fs.makedirs(self.root, exist_ok=True)
        temporary = f"tmp-{uuid.uuid4().hex}"
        try:
            with self.fs.open(self.path(temporary), "wb") as file:
                hashing = _HashingWriter(file)
                write(hashing)  # type: ignore[arg-type]
        except BaseException:
            self.remove(temporary)
            raise
        entry = FileEntry(f"{stem}-{hashing.hash.hexdigest()[:16]}{suffix}", hashing.size, hashing.hash.hexdigest())
        self._pending[entry.name] = temporary
        return entry

    def publish(self) -> None:
        """Move all files written so far to their final names."""
        for name, temporary in list(self._pending.items()):
            self.fs.mv(f"{self.root}/{temporary}", f"{self.root}/{name}")
            del self._pending[name]

    def discard(self) -> None:
        """Delete all files written and not published."""
        for name in list(self._pending):
            self.remove(name)
            del self._pending[name]

    def remove(self, name: str) -> None:
        """Delete a file if it is there."""
        try:
            self.fs.rm_file(self.path(name))
        except FileNotFoundError:
            pass

    def commit(self, content: bytes) -> None:
        """Create ``index.json`` in one step, if there is none.

        Raises:
            GalleryExistsError: another build was committed here first.
        """
        final = self.path(INDEX)
        taken = GalleryExistsError(f"{self.url} already holds a gallery; build into another folder")
        if isinstance(self.fs, LocalFileSystem):
            # A hard link is the local create-if-absent that never shows half a file.
            temporary = self.path(f"tmp-{uuid.uuid4().hex}")
            try:
                with open(temporary, "xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(temporary, final)
            except FileExistsError:
                raise taken from None
            finally:
                self.remove(os.path.basename(temporary))
            return
        if self.fs.exists(final):
            raise taken
        try:
            # Object stores show an object only when it is complete; "xb" is their conditional put.
            with self.fs.open(final, "xb") as file:
                file.write(content)
        except FileExistsError:
            raise taken from None
        except (ValueError, NotImplementedError):  # a file system of fsspec without exclusive creation
            with self.fs.open(final, "wb") as file:
                file.write(content)

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
        digest, size = hashlib.sha256(), 0
        try:
            with self.fs.open(self.path(entry.name), "rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
        except FileNotFoundError:
            raise GalleryCorruptError(f"{self.url}: {entry.name} is missing") from None
        self._check(entry, size, digest.hexdigest())

    def _check(self, entry: FileEntry, size: int, digest: str) -> None:
        if size != entry.size:
            raise GalleryCorruptError(f"{self.url}: {entry.name} has {size} bytes, expected {entry.size}")
        if digest != entry.sha256:
            raise GalleryCorruptError(f"{self.url}: {entry.name} has sha256 {digest}, expected {entry.sha256}")
