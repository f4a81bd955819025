"""Versions of a gallery: immutable folders, and one pointer to the current one.

::

    STORE/CURRENT                      which version is current: JSON, replaced in one step
    STORE/switches/TOKEN.json          what followed the state of CURRENT that had this token; created if absent
    STORE/versions/NNNNNN-KEY/         a version: a gallery's folder (``gallery_index``), never changed once committed
    STORE/removed/salt, ID.json        who is not to come back: keyed hashes of photos, people and faces
    STORE/locks/                       locks of who reads, builds or deletes a version (local disks)

KEY names what a version is made of, so a build that was killed finds its own folder and goes on in it.

A switch is a comparison and an exchange on any file system with create-if-absent: whoever wants to follow the state
with token T creates ``switches/T.json``, and of two only one can.  CURRENT is written afterwards.  Should the process
die in between, or write late, readers find the successor of what CURRENT says by its token and follow: CURRENT is a
shortcut to the end of a chain that only grows.  A reader sees the old version or the new one, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gallery_index.builder import CodeBatch, GalleryBuilder, checked, names_of
from gallery_index.compressed import Plan
from gallery_index.errors import (
    GalleryBusyError,
    GalleryConflictError,
    GalleryCorruptError,
    GalleryExistsError,
    GalleryMismatchError,
    GalleryNotFoundError,
)
from gallery_index.info import GalleryInfo
from gallery_index.storage import INDEX, TEMPORARY, Folder
from gallery_index.table import Rows, read_columns

CURRENT = "CURRENT"
_START = "start"
_VERSION = re.compile(r"[0-9]{6}-[0-9a-f]{12}")


def open_gallery(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> tuple[Folder, GalleryInfo]:
    """A gallery's folder and description: the folder itself, or the current version of a store.

    Raises:
        GalleryNotFoundError: neither is there.
        GalleryMismatchError, GalleryCorruptError: its ``index.json`` cannot be used.
    """
    folder = Folder(url, storage_options)
    for _ in range(10):
        content = folder.fetch(INDEX)
        if content is not None:
            return folder, GalleryInfo.from_bytes(content, folder.url)
        store = Store(url, storage_options)
        name = store.current()
        if name is None:
            break
        version = store.version(name)
        content = version.fetch(INDEX)
        if content is not None:
            return version, GalleryInfo.from_bytes(content, version.url)
        if store.current() == name:
            raise GalleryCorruptError(f"{store.url}: its current version {name} is not there")
    raise GalleryNotFoundError(f"no finished gallery at {folder.url} (neither {INDEX} nor {CURRENT})")


def read_info(url: str | os.PathLike[str]) -> GalleryInfo:
    """A gallery's description, without its codes; errors as ``open_gallery``."""
    return open_gallery(url)[1]


@dataclass(frozen=True)
class Version:
    """A version of a store.

    Attributes:
        name: its folder's.
        info: its description; None while it is not finished.
        current: whether CURRENT points to it.
        bytes: of its files.
        switched: when it last became current, seconds since 1970; None where it never did.
        about: what its builder told with the switch (counts, check).
    """

    name: str
    info: GalleryInfo | None
    current: bool
    bytes: int = 0
    switched: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What an update did: faces by what became of them, and the new version (the old one where nothing changed)."""

    name: str
    info: GalleryInfo
    added: int = 0
    replaced: int = 0
    removed: int = 0
    unchanged: int = 0
    refused: int = 0

    def counts(self) -> dict[str, int]:
        """Plain values: added, replaced, removed, unchanged, and refused because they are of removed people."""
        return {n: getattr(self, n) for n in ("added", "replaced", "removed", "unchanged", "refused")}


@dataclass
class Pruned:
    """What ``prune`` did: versions and unfinished builds deleted, and what it had to leave, with why."""

    versions: list[str] = field(default_factory=list)
    builds: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


class Removed:
    """Who is not to come back: keyed hashes of ids, so that the list names nobody.

    The key lies beside the list: somebody who has both can try ids that he knows, but not read them off.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        salt = folder.fetch("salt")
        self._salt = salt
        self._hashes: set[str] = set()
        for name in folder.names() if salt is not None else ():
            if name.endswith(".json"):
                content = folder.fetch(name)
                self._hashes.update(json.loads(content) if content else ())

    def __len__(self) -> int:
        return len(self._hashes)

    def digest(self) -> str:
        """Equal for equal lists."""
        return hashlib.sha256("".join(sorted(self._hashes)).encode()).hexdigest()[:16]

    def _hash(self, kind: str, value: str) -> str:
        return hashlib.blake2b(f"{kind}\0{value}".encode(), key=self._salt, digest_size=16).hexdigest()

    def add(self, people: Collection[str] = (), photos: Collection[str] = (), ids: Collection[str] = ()) -> None:
        """Note people, photos and faces; kept before anything else is done."""
        if self._salt is None:
            self.folder.create("salt", secrets.token_bytes(32))
            self._salt = self.folder.fetch("salt")
        named = (("person", people), ("photo", photos), ("id", ids))
        new = sorted({self._hash(kind, value) for kind, values in named for value in values} - self._hashes)
        if new:
            content = json.dumps(new).encode()
            self.folder.create(f"{hashlib.sha256(content).hexdigest()[:16]}.json", content)
            self._hashes.update(new)

    def readmit(self, people: Collection[str] = (), photos: Collection[str] = (), ids: Collection[str] = ()) -> int:
        """Take people, photos and faces off the list again. Returns how many were on it."""
        if self._salt is None:
            return 0
        named = (("person", people), ("photo", photos), ("id", ids))
        gone = {self._hash(kind, value) for kind, values in named for value in values} & self._hashes
        for name in self.folder.names() if gone else ():
            if name.endswith(".json"):
                entries = json.loads(self.folder.fetch(name) or b"[]")
                left = [entry for entry in entries if entry not in gone]
                if len(left) < len(entries):
                    self.folder.replace(name, json.dumps(left).encode())
        self._hashes -= gone
        return len(gone)

    def mask(
        self, ids: Sequence[str], photo_ids: Sequence[str], person_ids: Sequence[str | None]
    ) -> np.ndarray:
        """Which of these faces are on the list: (n,) bool."""
        if not self._hashes:
            return np.zeros(len(ids), bool)
        return np.array(
            [
                self._hash("id", id_) in self._hashes
                or self._hash("photo", photo) in self._hashes
                or (person is not None and self._hash("person", person) in self._hashes)
                for id_, photo, person in zip(ids, photo_ids, person_ids, strict=True)
            ],
            bool,
        )


class Store:
    """The versions of a gallery below one URL.

    Args:
        url: a local path or an fsspec URL; made by the first build.
        storage_options: for fsspec.
    """

    def __init__(self, url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        self.folder = Folder(url, storage_options)
        self.url = self.folder.url

    # ---- reading ----

    def version(self, name: str) -> Folder:
        """A version's folder.

        Raises:
            GalleryNotFoundError: that is no version's name.
        """
        if not _VERSION.fullmatch(name):
            raise GalleryNotFoundError(f"{self.url}: {name!r} is not the name of a version; see `scol gallery list`")
        return self.folder.folder("versions").folder(name)

    def state(self) -> dict[str, Any]:
        """The end of the chain of switches: ``token``, ``version`` (None before the first), ``at``, ``about``."""
        content = self.folder.fetch(CURRENT)
        state: dict[str, Any] = {"token": _START, "version": None}
        if content is not None:
            try:
                state = json.loads(content)
                str(state["token"]), str(state["version"])
            except (ValueError, KeyError, TypeError) as error:
                raise GalleryCorruptError(f"{self.url}: {CURRENT} is not readable: {error!r}") from error
        for following in self._after(state["token"]):
            state = following
        return state

    def _after(self, token: str) -> Iterator[dict[str, Any]]:
        switches = self.folder.folder("switches")
        while (content := switches.fetch(f"{token}.json")) is not None:
            state = json.loads(content)
            yield state
            token = state["token"]

    def current(self) -> str | None:
        """Name of the current version; None where there is none yet."""
        return self.state()["version"]

    def info(self, name: str) -> GalleryInfo:
        """A version's description.

        Raises:
            GalleryNotFoundError: there is no such finished version.
        """
        folder = self.version(name)
        return GalleryInfo.from_bytes(folder.read_index(), folder.url)

    def versions(self) -> list[Version]:
        """All versions, the oldest first, with those that are not finished."""
        current = self.current()
        switched = {state["version"]: state for state in self._after(_START)}
        found = []
        for name in self.folder.folder("versions").names():
            if not _VERSION.fullmatch(name):
                continue
            content = self.version(name).fetch(INDEX)
            if content is None:
                found.append(Version(name, None, False))
                continue
            info = GalleryInfo.from_bytes(content, self.version(name).url)
            state = switched.get(name, {})
            size = sum(entry.size for entry in info.files.values())
            found.append(Version(name, info, name == current, size, state.get("at"), state.get("about", {})))
        return found

    @property
    def removed(self) -> Removed:
        """Who is not to come back."""
        return Removed(self.folder.folder("removed"))

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Keep a version from being pruned while the block lasts (local disks)."""
        with self.folder.folder("locks").lock(name):
            self.version(name).read_index()
            yield

    # ---- changing ----

    def switch(self, name: str, *, expected: str | None = None, about: Mapping[str, Any] | None = None) -> None:
        """Make a version the current one.

        Args:
            name: of a finished version.
            expected: token of the state (``state``) that this is to follow; None to follow whatever there is.
            about: kept with the switch.

        Raises:
            GalleryNotFoundError: there is no such finished version.
            GalleryConflictError: somebody has switched since.
        """
        self.info(name)
        while True:
            before = self.state()
            if expected is not None and before["token"] != expected:
                raise GalleryConflictError(
                    f"{self.url}: CURRENT has become {before['version']} meanwhile; {name} was not made of it and "
                    "is not switched to; do the same again"
                )
            state = {"token": secrets.token_hex(8), "version": name, "at": time.time(), "about": dict(about or {})}
            if self.folder.folder("switches").create(f"{before['token']}.json", json.dumps(state).encode()):
                self.folder.replace(CURRENT, json.dumps(state).encode())
                return

    def build(
        self,
        key: str,
        fill: Callable[[GalleryBuilder], None],
        *,
        check: Callable[[Folder, GalleryInfo], Mapping[str, Any]] | None = None,
        switch: bool = True,
        expected: str | None = None,
        about: Callable[[], Mapping[str, Any]] = dict,
        **options: Any,
    ) -> tuple[str, GalleryInfo]:
        """Make a version, check it, and switch to it.

        A version of the same key that is finished is taken as it is; one that is not is gone on with.  Two builders of
        the same key may be at work at once, and come to the same version.

        Args:
            key: names all that the version is made of.
            fill: adds the codes; those of removed people are left out.
            check: looks at the finished version, and raises GalleryCheckError where it may not become current; what it
                returns is kept with the switch.
            switch: whether to switch to it.
            expected: see ``switch``.
            about: called when it is finished; kept with the switch.
            options: of ``GalleryBuilder``.

        Returns:
            the version's name and description.

        Raises:
            BadCodesError, GalleryConflictError, GalleryCheckError: see ``GalleryBuilder`` and ``switch``.
        """
        if self.folder.exists(INDEX):
            raise GalleryExistsError(f"{self.url} already holds a gallery, without versions; build into another folder")
        removed = self.removed
        short = hashlib.blake2b(f"{key} {removed.digest()}".encode(), digest_size=6).hexdigest()
        name = self._name(short)
        folder = self.version(name)
        with self.folder.folder("locks").lock(name):
            content = folder.fetch(INDEX)
            if content is None:
                try:
                    fixed = dict(keep=True, unwanted=removed.mask, storage_options=folder.storage_options)
                    with GalleryBuilder(folder.url, **fixed, **options) as builder:
                        fill(builder)
                        builder.finish()
                except GalleryExistsError:
                    pass  # the other builder of the same version was quicker
                content = folder.read_index()
            info = GalleryInfo.from_bytes(content, folder.url)
            report = dict(about())
            if check is not None and (switch or self.current() != name):
                report["check"] = dict(check(folder, info))
            if switch and self.current() != name:
                try:
                    self.switch(name, expected=expected, about=report)
                except GalleryConflictError:
                    if self.current() != name:  # the other builder of the same version was quicker
                        raise
        return name, info

    def _name(self, short: str) -> str:
        """Name of the version with this key: the one there is, or the next number's."""
        names = [name for name in self.folder.folder("versions").names() if _VERSION.fullmatch(name)]
        same = [name for name in names if name.endswith(short)]
        if same:
            return same[-1]
        number = max((int(name.split("-")[0]) for name in names), default=0) + 1
        return f"{number:06d}-{short}"

    def update(
        self,
        key: str,
        batches: Iterable[CodeBatch] = (),
        *,
        check: Callable[[Folder, GalleryInfo], Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Update:
        """A new version: the current one, plus codes, minus those of removed people.

        A face whose id is there already is replaced, or left as it is where nothing of it has changed.  Faces that are
        on the list of removed people are not added.  Where nothing changes, no version is made.

        Args:
            key: names the codes that are added (not what the version holds).
            batches: the codes; gone through once.
            check: see ``build``.
            options: of ``GalleryBuilder`` that are to differ from the current version's: ``compression``, ``source``.

        Raises:
            GalleryNotFoundError: the store has no version yet.
            GalleryConflictError: somebody else has switched meanwhile; the same again adds to what is there then.
            BadCodesError, GalleryCheckError: see ``GalleryBuilder`` and ``build``.
        """
        state = self.state()
        if state["version"] is None:
            raise GalleryNotFoundError(f"{self.url} has no version yet; build one first")
        parent, info = self.version(state["version"]), self.info(state["version"])
        removed = self.removed
        news = _News(parent, info, removed)
        pending = news.rows(batches)
        first = next(pending, None)
        if first is None and not news.gone and not options:
            return Update(state["version"], info, **news.counts)

        def fill(builder: GalleryBuilder) -> None:
            if first is not None:
                builder.add_rows(first)
            for rows in pending:
                builder.add_rows(rows)

            def unwanted(
                ids: list[str], photo_ids: list[str], person_ids: list[str | None]
            ) -> np.ndarray:
                replaced = np.array([id_ in news.replaced for id_ in ids], bool)
                return removed.mask(ids, photo_ids, person_ids) | replaced

            builder.take_over(parent, info, unwanted)

        inherited = dict(
            mode=info.mode,
            weights=info.weights,
            broadcast_layers=info.layers if info.broadcast else None,
            source=info.source,
            compression=None if info.compression is None else Plan.from_json(info.compression),
        )
        whole = json.dumps([key, state["token"], info.fingerprint, repr(sorted(options.items()))])
        name, new = self.build(
            whole,
            fill,
            check=check,
            expected=state["token"],
            about=lambda: news.counts | {"removed": news.gone, "from": state["version"]},
            **(inherited | options),
        )
        for _ in pending:  # a finished version of this key was taken: its counts are still wanted
            pass
        return Update(name, new, removed=news.gone, **news.counts)

    def prune(self, keep: int = 2) -> Pruned:
        """Delete versions: all but the current one and the newest ``keep`` others, and all that hold removed people.

        Also unfinished builds that nobody is at work on, and temporary files of processes that died.  A version that
        somebody reads is left, and named.  Without locks (other than local disks) the caller has to know that nobody
        reads or builds.

        Returns:
            what was deleted and what could not be; ``kept`` tells where codes of removed people are left.
        """
        done, removed = Pruned(), self.removed
        current = self.current()
        spared = 0
        for version in reversed(self.versions()):
            folder = self.version(version.name)
            if version.info is None:
                self._delete(folder, version.name, done.builds, done, "somebody builds it")
                continue
            tainted = 0
            if len(removed):
                tainted = sum(int(removed.mask(*names).sum()) for names in names_of(folder, version.info))
            if version.name == current:
                if tainted:
                    done.kept[version.name] = (
                        f"it is current and holds {tainted} code(s) of removed people: `scol gallery remove` them again"
                    )
                continue
            if not tainted and spared < keep:
                spared += 1
                continue
            why = f"somebody reads it; it holds {tainted} code(s) of removed people" if tainted else "somebody reads it"
            self._delete(folder, version.name, done.versions, done, why)
        for place in (self.folder, *(self.folder.folder(n) for n in ("removed", "switches"))):
            for name in place.names():
                if name.startswith(TEMPORARY):
                    place.remove(name)
        return done

    def _delete(self, folder: Folder, name: str, deleted: list[str], done: Pruned, why: str) -> None:
        try:
            with self.folder.folder("locks").lock(name, exclusive=True):
                folder.remove_all()
        except GalleryBusyError:
            done.kept[name] = why
        else:
            deleted.append(name)


def require_same(have: GalleryInfo, want: GalleryInfo, where: str) -> None:
    """Two galleries that are to be one: same mode, shape and weights.

    Raises:
        GalleryMismatchError: they are not; both fingerprints are named.
    """
    wrong = [
        f"{name} is {a!r} there and {b!r} here"
        for name, a, b in (
            ("mode", have.mode, want.mode),
            ("number of layers", have.layers, want.layers),
            ("code dimension", have.dim, want.dim),
            ("one W for all layers", have.broadcast, want.broadcast),
            ("width of embeddings", have.embedding_dim, want.embedding_dim),
            *((f"the {role}'s fingerprint", have.weights.get(role), want.weights.get(role))
              for role in sorted({*have.weights, *want.weights})),
        )
        if a != b
    ]  # fmt: skip
    if wrong:
        raise GalleryMismatchError(
            f"{where} (fingerprint {have.fingerprint}) does not go with this gallery ({want.fingerprint}): "
            + "; ".join(wrong)
        )


def store_of(url: str) -> tuple[Store, str] | None:
    """The store and name of a version's folder; None for any other URL."""
    place, _, name = url.rstrip("/").rpartition("/")
    root, _, middle = place.rpartition("/")
    return (Store(root), name) if middle == "versions" and _VERSION.fullmatch(name) else None


__all__ = ["Pruned", "Removed", "Store", "Update", "Version", "open_gallery", "read_info", "require_same", "store_of"]


class _News:
    """What an update adds to a version.

    Attributes:
        counts: faces that are added, replaced, unchanged, and refused because they are of removed people.
        replaced: ids of the version's faces that are replaced.
        gone: codes of the version that are of removed people.
    """

    def __init__(self, parent: Folder, info: GalleryInfo, removed: Removed) -> None:
        self.counts = dict(added=0, replaced=0, unchanged=0, refused=0)
        self.replaced: set[str] = set()
        self.gone = 0
        self._info, self._removed = info, removed
        self._here: dict[str, int] = {}
        for name in info.codes:
            table = read_columns(parent, name, ["id", "photo_id", "person_id", "digest"])
            names = [table[column].to_pylist() for column in ("id", "photo_id", "person_id")]
            self.gone += int(removed.mask(*names).sum())
            self._here.update(zip(names[0], table["digest"].to_pylist(), strict=True))

    def rows(self, batches: Iterable[CodeBatch]) -> Iterator[Rows]:
        """Rows of the batches that are new or changed; counts as it goes."""
        for batch in batches:
            rows = checked(CodeBatch(*batch), self._info.broadcast)
            refused = self._removed.mask(rows.ids, rows.photo_ids, rows.person_ids)
            keep = [row for row, id_ in enumerate(rows.ids) if self._wanted(id_, refused[row], rows.digests[row])]
            if keep:
                yield rows.take(np.array(keep))

    def _wanted(self, id_: str, refused: bool, digest: int) -> bool:
        if refused:
            self.counts["refused"] += 1
        elif id_ not in self._here:
            self.counts["added"] += 1
            return True
        elif self._here[id_] == digest:
            self.counts["unchanged"] += 1
        else:
            self.counts["replaced"] += 1
            self.replaced.add(id_)
            return True
        return False
