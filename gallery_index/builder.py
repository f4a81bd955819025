"""Building a gallery: codes in, a folder of checked files out, readable only once it is whole."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from gallery_index import compressed
from gallery_index.errors import BadCodesError, GalleryCorruptError, GalleryError, GalleryExistsError
from gallery_index.info import GalleryInfo
from gallery_index.scoring import MODES, norms
from gallery_index.storage import INDEX, FileEntry, Folder
from gallery_index.table import ID_COLUMNS, Rows, read_columns, read_rows, row_digests, write_table

_FILE_BYTES = 64 << 20
_ROWS_AT_ONCE = 4096
_MAX_REASONS = 1000
_MAX_MAGNITUDE = 1e12  # squares and products of anything larger may overflow float32
_OURS = re.compile(
    r"tmp-[0-9a-f]{32}|codes-[0-9]{5}-[0-9a-f]{16}\.parquet|(mean|norms)-[0-9a-f]{16}\.npy"
    r"|layer-[0-9]{2}-[0-9a-f]{16}\.faiss|exact-[0-9]{2}-[0-9a-f]{16}\.npy"
)

Unwanted = Callable[[list[str], list[str], list[str | None]], np.ndarray]


class CodeBatch(NamedTuple):
    """Some codes with their ids.

    Attributes:
        codes: (n, L, D) float32: W+ codes; (n, 1, D) for a gallery that broadcasts one W.
        photo_ids: n non-empty strings: the photo that each code comes from.
        person_ids: n strings, or None where nobody knows; None as a whole if never known.
        ids: n strings, unique in the gallery (a face's id); the photo ids by default.
        embeddings: (n, E) float32 identity embeddings, for the identity-similarity ceiling; optional.
    """

    codes: np.ndarray
    photo_ids: Sequence[str]
    person_ids: Sequence[str | None] | None = None
    ids: Sequence[str] | None = None
    embeddings: np.ndarray | None = None


@dataclass(frozen=True)
class CodeFile:
    """A file of codes that is written: its entry, its rows, and the sum over them, (L, D) float64."""

    entry: FileEntry
    rows: int
    total: np.ndarray


class GalleryBuilder:
    """Writes a gallery batch by batch; memory does not grow with N, but for the ids.

    Codes go to Parquet as they come.  ``finish`` then reads them back once for the norms, once a layer for a
    compressed index if one is wanted, and commits ``index.json``.  Files and fingerprint depend on the codes, ids and
    options alone, not on how they were batched.  Files of an earlier builder that was killed are used again.

    As a context manager it finishes when the block ends, and aborts on an exception.

    Args:
        out_url: local path or fsspec URL of a folder that holds no gallery yet.
        mode: ``raw``, ``cosine`` or ``centred``.
        weights: fingerprints of what made the codes, by role; see ``GalleryInfo.weights``.
        broadcast_layers: L, where each id has one W (codes (n, 1, D)) that stands for all L layers.
        source: words on where the codes come from.
        compression: a compressed FAISS index of each layer as well; None for the exact search alone.
        keep: leave the files written so far when it is aborted (but for codes that are refused), so that the same
            build goes on from there.
        threads: that read and write files; None for one a core.
        unwanted: called with the ids, photo ids and person ids of rows that are added; says which to leave
            out, (n,) bool.
        storage_options: for fsspec.

    Raises:
        GalleryExistsError: the folder holds a gallery.
        ValueError: unknown mode or layer count.
    """

    def __init__(
        self,
        out_url: str | os.PathLike[str],
        *,
        mode: str = "centred",
        weights: Mapping[str, str | None],
        broadcast_layers: int | None = None,
        source: str = "",
        compression: compressed.Plan | None = None,
        keep: bool = False,
        threads: int | None = None,
        unwanted: Unwanted | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if broadcast_layers is not None and broadcast_layers < 1:
            raise ValueError(f"broadcast_layers must be at least 1, got {broadcast_layers}")
        if not all(isinstance(k, str) and isinstance(v, str | None) for k, v in weights.items()):
            raise ValueError(f"weights must map roles to fingerprints (strings or None), got {weights!r}")
        self._folder = Folder(out_url, storage_options)
        if self._folder.exists(INDEX):
            raise GalleryExistsError(f"{self._folder.url} already holds a gallery; build into another folder")
        self._mode, self._weights, self._source = mode, dict(weights), source
        self._broadcast, self._compression, self._keep = broadcast_layers, compression, keep
        self._unwanted = unwanted
        self._threads = threads or len(os.sched_getaffinity(0))
        self._made: set[str] = set()
        self._files: list[CodeFile] = []
        self._waiting: list[Rows] = []
        self._waiting_rows = 0
        self._ids: set[str] = set()
        self._photos: set[str] = set()
        self._people: set[str] = set()
        self._shape: tuple[int, int, int | None] | None = None
        self._closed = False

    def __enter__(self) -> GalleryBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort(keep=self._keep and not issubclass(kind, BadCodesError))
        elif not self._closed:
            self.finish()

    def add(self, batch: CodeBatch) -> None:
        """Add codes.

        Raises:
            BadCodesError: wrong shapes or types, an id that is empty or was there before, or a code with a
                NaN, an infinity, a magnitude above 1e12 or only zeros at some layer; names the ids.
        """
        self._require_open()
        rows = checked(batch, self._broadcast is not None, self._ids)
        if self._unwanted is not None:
            rows = rows.take(np.flatnonzero(~self._unwanted(rows.ids, rows.photo_ids, rows.person_ids)))
        self.add_rows(rows)

    def add_rows(self, rows: Rows) -> None:
        """Add rows of ``checked``, or of a file of codes.

        Raises:
            BadCodesError: an id that was there before, or another shape than the rows before.
        """
        self._require_open()
        if not rows.ids:
            return
        self._fits((*rows.codes.shape[1:], None if rows.embeddings is None else rows.embeddings.shape[1]))
        self._enter_names(rows.ids, rows.photo_ids, rows.person_ids)
        self._waiting.append(rows)
        self._waiting_rows += len(rows.ids)
        while self._waiting_rows >= self._rows_per_file:
            self._write_codes(self._rows_per_file)

    def take_over(
        self,
        parent: Folder,
        info: GalleryInfo,
        unwanted: Unwanted,
    ) -> None:
        """Add the codes of another gallery, but for some: files of which all rows stay are shared, not written anew.

        Args:
            parent, info: a gallery of the same shape and kind as this one.
            unwanted: called with the ids, photo ids and person ids of some rows; says which to leave out, (n,) bool.

        Raises:
            GalleryCorruptError: a file of it is missing, truncated or altered.
            BadCodesError: an id that is there already.
        """
        self._require_open()
        if info.broadcast != (self._broadcast is not None):
            raise BadCodesError("one of the two galleries broadcasts one W to all layers, the other does not")
        self._fits((info.stored_layers, info.dim, info.embedding_dim))

        def one(name: str) -> tuple[Rows, CodeFile | None]:
            entry, where = info.files[name], f"{parent.url}: {name}"
            rows = read_rows(parent.read(entry), info.stored_layers, info.dim, info.embedding_dim, where)
            stay = ~unwanted(rows.ids, rows.photo_ids, rows.person_ids)
            if stay.all() and len(stay) * 2 >= self._rows_per_file:
                if self._folder.adopt(parent, entry):
                    self._made.add(name)
                return rows._replace(codes=rows.codes[:0]), CodeFile(entry, len(stay), _total(rows))
            rows = rows.take(np.flatnonzero(stay))
            if len(rows.ids) * 2 < self._rows_per_file:  # too small for a file: joins others of its kind
                return rows, None
            return rows._replace(codes=rows.codes[:0]), self._write_file(int(name.split("-")[1]), rows)

        for rows, file in self._in_threads(one, info.codes):
            if file is None:
                if rows.ids:
                    self.add_rows(rows)
            else:
                self._enter_names(rows.ids, rows.photo_ids, rows.person_ids)
                self._files.append(file)

    def finish(self) -> GalleryInfo:
        """Write what is left and the indexes, and commit.

        Raises:
            BadCodesError: nothing was added, or a code has no direction in this mode (``centred``: it
                equals the mean of all, as the only code of a gallery does); names the ids.
            GalleryExistsError: another builder committed to this folder first.
        """
        self._require_open()
        try:
            if self._waiting_rows:
                self._write_codes(self._waiting_rows)
            if not self._files or self._shape is None:
                raise BadCodesError("a gallery needs at least one code")
            info = self._complete()
            content = info.to_bytes()
            for entry in info.files.values():  # somebody may have given up a build that shared files with this one
                if not self._folder.exists(entry.name):
                    raise GalleryCorruptError(f"{self._folder.url}: {entry.name} was deleted; build again")
            self._folder.commit(content)
        except BaseException as error:
            if self._folder.exists(INDEX):  # another was quicker, and has swept away what it does not need
                self.abort(keep=False)
                raise GalleryExistsError(
                    f"{self._folder.url} already holds a gallery; build into another folder"
                ) from error
            self.abort(keep=self._keep and not isinstance(error, BadCodesError))
            raise
        self._closed = True
        for name in self._folder.names():
            if _OURS.fullmatch(name) and name not in info.files:
                self._folder.remove(name)
        return GalleryInfo.from_bytes(content, self._folder.url)

    def abort(self, keep: bool = False) -> None:
        """Give up: delete the files written so far, unless they are to be kept for another attempt."""
        self._closed = True
        if keep:
            return
        theirs: set[str] = set()
        if (content := self._folder.fetch(INDEX)) is not None:
            theirs.update(GalleryInfo.from_bytes(content, self._folder.url).files)
        for name in self._made - theirs:
            self._folder.remove(name)

    @property
    def count(self) -> int:
        """Codes added so far."""
        return len(self._ids)

    @property
    def _rows_per_file(self) -> int:
        layers, dim, _ = self._shape or (1, 512, None)
        return max(1, _FILE_BYTES // (layers * dim * 4))

    def _require_open(self) -> None:
        if self._closed:
            raise GalleryError("this builder has finished or was aborted")

    def _enter_names(self, ids: Sequence[str], photo_ids: Sequence[str], person_ids: Sequence[str | None]) -> None:
        before = len(self._ids)
        self._ids.update(ids)
        if len(self._ids) != before + len(ids):
            raise BadCodesError("an id is there twice")
        self._photos.update(photo_ids)
        self._people.update(p for p in person_ids if p is not None)

    def _fits(self, shape: tuple[int, int, int | None]) -> None:
        if self._shape is None:
            self._shape = shape
        elif shape != self._shape:
            raise BadCodesError(f"(L, D, E) was {self._shape} and is {shape} in this batch")

    def _in_threads(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        """Results in order, with no more items in hand than threads."""
        with ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, len(items), self._threads):
                yield from pool.map(work, items[start : start + self._threads])

    def _write_codes(self, rows: int) -> None:
        """Write the first ``rows`` waiting rows as one file."""
        merged = Rows.concatenate(self._waiting)
        self._waiting, self._waiting_rows = [merged.take(slice(rows, None))], self._waiting_rows - rows
        self._files.append(self._write_file(len(self._files), merged.take(slice(0, rows))))

    def _write_file(self, number: int, rows: Rows) -> CodeFile:
        names = "\0".join(rows.ids).encode()
        key = hashlib.sha256(hashlib.sha256(names).digest() + rows.digests.tobytes()).hexdigest()[:16]
        entry = self._once(f"codes-{number:05d}-{key}.parquet", lambda file: write_table(file, rows))
        return CodeFile(entry, len(rows.ids), _total(rows))

    def _complete(self) -> GalleryInfo:
        """Mean, norms and indexes; the description."""
        layers, dim, width = self._shape
        count = sum(file.rows for file in self._files)
        mean = sum(file.total for file in self._files) / count
        lengths = self._lengths(mean, count)
        entries = [file.entry for file in self._files]
        key = _digest(self._mode, *(entry.sha256 for entry in entries))
        mean_entry, norms_entry = (
            self._once(f"{name}-{key}.npy", lambda file, array=array: np.save(file, array, allow_pickle=False))
            for name, array in (("mean", mean), ("norms", lengths))
        )
        indexes: list[FileEntry] = []
        exact: list[FileEntry] = []
        if self._compression is not None:
            source = compressed.Source(self._folder, entries, mean, lengths, self._mode)
            key = _digest(key, *self._compression.as_json().items())
            for layer in range(layers):
                exact.append(self._once(f"exact-{layer:02d}-{key}.npy", lambda f, i=layer: source.write_exact(i, f)))
                indexes.append(
                    self._once(
                        f"layer-{layer:02d}-{key}.faiss",
                        lambda f, i=layer: compressed.write_index(source, i, self._compression, f),
                    )
                )
        return GalleryInfo(
            mode=self._mode,
            count=count,
            layers=self._broadcast or layers,
            dim=dim,
            broadcast=self._broadcast is not None,
            photos=len(self._photos),
            people=len(self._people),
            embedding_dim=width,
            weights=self._weights,
            source=self._source,
            codes=tuple(entry.name for entry in entries),
            indexes=tuple(entry.name for entry in indexes),
            mean=mean_entry.name,
            norms=norms_entry.name,
            files={entry.name: entry for entry in (*entries, *indexes, *exact, mean_entry, norms_entry)},
            compression=None if self._compression is None else self._compression.as_json(),
            exact=tuple(entry.name for entry in exact),
        )

    def _lengths(self, mean: np.ndarray, count: int) -> np.ndarray:
        """Norms of all codes in this mode: (L, N) float64."""
        layers, dim, width = self._shape
        lengths = np.empty((layers, count))
        starts = np.cumsum([0, *(file.rows for file in self._files)])
        reasons: dict[str, str] = {}

        def one(number: int) -> dict[str, str]:
            entry = self._files[number].entry
            rows = read_rows(self._folder.read(entry), layers, dim, width, f"{self._folder.url}: {entry.name}")
            wrong = {}
            for layer in range(layers):
                centre_of = torch.from_numpy(mean[layer])
                for i in range(0, len(rows.ids), _ROWS_AT_ONCE):
                    part = norms(torch.from_numpy(rows.codes[i : i + _ROWS_AT_ONCE, layer]), centre_of, self._mode)
                    for row in torch.nonzero(part == 0).flatten().tolist():
                        wrong[rows.ids[i + row]] = f"layer {layer} equals the mean of the gallery"
                    lengths[layer, starts[number] + i :][: len(part)] = part.numpy()
            return wrong

        for wrong in self._in_threads(one, range(len(self._files))):
            reasons |= wrong
        _refuse(reasons)
        return lengths

    def _once(self, name: str, write: Callable[[BinaryIO], None]) -> FileEntry:
        entry, made = self._folder.once(name, write)
        if made:
            self._made.add(name)
        return entry


def checked(batch: CodeBatch, broadcast: bool, known: Collection[str] = ()) -> Rows:
    """A batch as rows to be stored, with embeddings of unit length.

    Args:
        batch: codes with their ids.
        broadcast: whether each id has one W for all layers.
        known: ids that may not come again.

    Raises:
        BadCodesError: see ``GalleryBuilder.add``.
    """
    codes = np.asarray(batch.codes)
    if codes.ndim != 3 or 0 in codes.shape[1:] or codes.dtype != np.float32:
        raise BadCodesError(f"codes must be (n, L, D) float32, got {codes.shape} {codes.dtype}")
    if broadcast and codes.shape[1] != 1:
        raise BadCodesError(f"a gallery that broadcasts needs codes (n, 1, D), got {codes.shape}")
    n = len(codes)
    photo_ids, ids = list(batch.photo_ids), list(batch.photo_ids if batch.ids is None else batch.ids)
    person_ids = [None] * n if batch.person_ids is None else list(batch.person_ids)
    embeddings = None if batch.embeddings is None else np.asarray(batch.embeddings, dtype=np.float32)
    if not len(photo_ids) == len(ids) == len(person_ids) == n:
        raise BadCodesError(
            f"{n} codes came with {len(ids)} ids, {len(photo_ids)} photo ids and {len(person_ids)} person ids"
        )
    people = [p for p in person_ids if p is not None]
    for name, values in (("id", ids), ("photo id", photo_ids), ("person id", people)):
        wrong = next((v for v in values if not isinstance(v, str) or not v or "\0" in v), None)
        if wrong is not None:
            raise BadCodesError(f"{name} {wrong!r} is not a non-empty string")
    if embeddings is not None and (embeddings.ndim != 2 or len(embeddings) != n or not embeddings.shape[1]):
        raise BadCodesError(f"embeddings must be ({n}, E), got {embeddings.shape}")

    reasons: dict[str, str] = {}
    seen = set()
    for id_ in ids:
        if id_ in seen or id_ in known:
            reasons[id_] = "the id is there twice"
        seen.add(id_)
    magnitude = np.abs(codes).max(axis=2, initial=0.0)  # (n, L); NaN stays NaN
    for row, layer in np.argwhere(~((magnitude > 0) & (magnitude <= _MAX_MAGNITUDE))):
        value = magnitude[row, layer]
        what = "zero" if value == 0 else "NaN" if np.isnan(value) else "infinite or above 1e12"
        reasons.setdefault(ids[row], f"layer {layer} is {what}")
    if embeddings is not None:
        length = np.linalg.norm(embeddings.astype(np.float64), axis=1)
        for row in np.flatnonzero(~(np.isfinite(length) & (length > 0))):
            reasons.setdefault(ids[row], "the embedding is zero, NaN or infinite")
    _refuse(reasons)
    if embeddings is not None:
        embeddings = (embeddings / length[:, None]).astype(np.float32)

    digests = row_digests(ids, photo_ids, person_ids, codes, embeddings)
    return Rows(ids, photo_ids, person_ids, digests, np.array(codes), embeddings)  # a copy: the caller may reuse his


def build(
    out_url: str | os.PathLike[str], batches: Iterable[CodeBatch | tuple[Any, ...]], **options: Any
) -> GalleryInfo:
    """Build a gallery from an iterator of ``CodeBatch`` (or tuples in its order).

    Args, errors: see ``GalleryBuilder``, whose keyword arguments ``options`` are.
    """
    with GalleryBuilder(out_url, **options) as builder:
        for batch in batches:
            builder.add(CodeBatch(*batch))
        return builder.finish()


def _refuse(reasons: dict[str, str]) -> None:
    if reasons:
        first = ", ".join(f"{id_!r} ({why})" for id_, why in list(reasons.items())[:10])
        more = f" and {len(reasons) - 10} more" if len(reasons) > 10 else ""
        raise BadCodesError(
            f"{len(reasons)} codes refused: {first}{more}", dict(list(reasons.items())[:_MAX_REASONS])
        )


def batches_of(folder: Folder, info: GalleryInfo) -> Iterable[CodeBatch]:
    """The codes of a finished gallery, file by file, as a builder takes them.

    Raises:
        GalleryCorruptError: a file is missing, truncated or altered.
    """
    for name in info.codes:
        content, where = folder.read(info.files[name]), f"{folder.url}: {name}"
        rows = read_rows(content, info.stored_layers, info.dim, info.embedding_dim, where)
        yield CodeBatch(rows.codes, rows.photo_ids, rows.person_ids, rows.ids, rows.embeddings)


def names_of(folder: Folder, info: GalleryInfo) -> Iterable[tuple[list[str], list[str], list[str | None]]]:
    """Ids, photo ids and person ids of a gallery, file by file, without reading the codes."""
    for name in info.codes:
        table = read_columns(folder, name, ID_COLUMNS)
        yield tuple(table[column].to_pylist() for column in ID_COLUMNS)


def _total(rows: Rows) -> np.ndarray:
    return rows.codes.sum(axis=0, dtype=np.float64)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
