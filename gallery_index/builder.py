"""Building a gallery: codes in, a folder of checked files out, readable only once it is whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import faiss
import numpy as np
import torch

from gallery_index.errors import BadCodesError, GalleryError, GalleryExistsError
from gallery_index.info import GalleryInfo
from gallery_index.scoring import MODES, centre, norms
from gallery_index.storage import INDEX, FileEntry, Folder
from gallery_index.table import layer_column, read_table, vectors_of, write_table

_FILE_BYTES = 64 << 20
_ROWS_AT_ONCE = 4096
_MAX_REASONS = 1000
_MAX_MAGNITUDE = 1e12  # squares and products of anything larger may overflow float32


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


class GalleryBuilder:
    """Writes a gallery batch by batch; memory does not grow with N, but for the ids.

    Codes go to Parquet as they come.  ``finish`` then reads them back layer by layer, subtracts the
    mean and normalises as the mode says, writes one exact FAISS index (``IndexFlatIP``) a layer, and commits
    ``index.json``.  Files and fingerprint depend on the codes, ids and options alone, not on how
    they were batched.

    As a context manager it finishes when the block ends, and aborts on an exception.

    Args:
        out_url: local path or fsspec URL of a folder that holds no gallery yet.
        mode: ``raw``, ``cosine`` or ``centred``.
        weights: fingerprints of what made the codes, by role; see ``GalleryInfo.weights``.
        broadcast_layers: L, where each id has one W (codes (n, 1, D)) that stands for all L layers.
        source: words on where the codes come from.
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
        self._broadcast = broadcast_layers
        self._files: list[FileEntry] = []
        self._tables: list[FileEntry] = []
        self._waiting: list[CodeBatch] = []
        self._waiting_rows = 0
        self._ids: set[str] = set()
        self._photos: set[str] = set()
        self._people: set[str] = set()
        self._shape: tuple[int, int, int | None] | None = None
        self._sum: np.ndarray | None = None
        self._closed = False

    def __enter__(self) -> GalleryBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif not self._closed:
            self.finish()

    def add(self, batch: CodeBatch) -> None:
        """Add codes.

        Raises:
            BadCodesError: wrong shapes or types, an id that is empty or was there before, or a code with a
                NaN, an infinity, a magnitude above 1e12 or only zeros at some layer; names the ids.
        """
        self._require_open()
        batch = self._checked(batch)
        if not len(batch.codes):
            return
        self._ids.update(batch.ids)
        self._photos.update(batch.photo_ids)
        self._people.update(p for p in batch.person_ids if p is not None)
        self._waiting.append(batch)
        self._waiting_rows += len(batch.codes)
        while self._waiting_rows >= self._rows_per_file:
            self._write_codes(self._rows_per_file)

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
            if not self._tables or self._sum is None or self._shape is None:
                raise BadCodesError("a gallery needs at least one code")
            layers, dim, width = self._shape
            count = len(self._ids)
            mean = self._sum / count
            lengths = np.empty((layers, count))
            indexes = [self._write_index(layer, mean[layer], lengths[layer]) for layer in range(layers)]
            info = GalleryInfo(
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
                codes=tuple(entry.name for entry in self._tables),
                indexes=tuple(entry.name for entry in indexes),
                mean=self._write("mean", ".npy", lambda f: np.save(f, mean, allow_pickle=False)).name,
                norms=self._write("norms", ".npy", lambda f: np.save(f, lengths, allow_pickle=False)).name,
                files={entry.name: entry for entry in self._files},
            )
            content = info.to_bytes()
            self._folder.publish()
            try:
                self._folder.commit(content)
            except GalleryExistsError:
                winner = GalleryInfo.from_bytes(self._folder.read_index(), self._folder.url)
                for name in set(info.files) - set(winner.files):  # equal content has equal names
                    self._folder.remove(name)
                raise
        except BaseException:
            self.abort()
            raise
        self._closed = True
        return GalleryInfo.from_bytes(content, self._folder.url)

    def abort(self) -> None:
        """Give up: delete the files written so far."""
        self._folder.discard()
        self._closed = True

    @property
    def _rows_per_file(self) -> int:
        layers, dim, _ = self._shape or (1, 512, None)
        return max(1, _FILE_BYTES // (layers * dim * 4))

    def _require_open(self) -> None:
        if self._closed:
            raise GalleryError("this builder has finished or was aborted")

    def _checked(self, batch: CodeBatch) -> CodeBatch:
        codes = np.asarray(batch.codes)
        if codes.ndim != 3 or 0 in codes.shape[1:] or codes.dtype != np.float32:
            raise BadCodesError(f"codes must be (n, L, D) float32, got {codes.shape} {codes.dtype}")
        if self._broadcast is not None and codes.shape[1] != 1:
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
            if id_ in seen or id_ in self._ids:
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

        shape = (*codes.shape[1:], None if embeddings is None else embeddings.shape[1])
        if self._shape is None and n:
            self._shape = shape
        elif n and shape != self._shape:
            raise BadCodesError(f"(L, D, E) was {self._shape} and is {shape} in this batch")
        return CodeBatch(np.array(codes), photo_ids, person_ids, ids, embeddings)  # a copy: the caller may reuse his

    def _write_codes(self, rows: int) -> None:
        """Write the first ``rows`` waiting rows as one file."""
        merged = _concatenate(self._waiting)
        part, rest = _split(merged, rows)
        self._waiting, self._waiting_rows = [rest], self._waiting_rows - rows
        total = part.codes.sum(axis=0, dtype=np.float64)
        self._sum = total if self._sum is None else self._sum + total
        entry = self._write(
            f"codes-{len(self._tables):05d}",
            ".parquet",
            lambda f: write_table(f, part.ids, part.photo_ids, part.person_ids, part.codes, part.embeddings),
        )
        self._tables.append(entry)

    def _write_index(self, layer: int, mean: np.ndarray, lengths: np.ndarray) -> FileEntry:
        """One layer's index; fills ``lengths`` (N,) with the codes' norms in this mode."""
        index = faiss.IndexFlatIP(self._shape[1])
        centre_of = torch.from_numpy(mean)
        reasons: dict[str, str] = {}
        start = 0
        for entry in self._tables:
            table = read_table(self._folder.read(entry), ["id", layer_column(layer)], entry.name)
            vectors = vectors_of(table, layer_column(layer), self._shape[1], entry.name)
            for i in range(0, len(vectors), _ROWS_AT_ONCE):
                codes = torch.tensor(vectors[i : i + _ROWS_AT_ONCE])
                length = norms(codes, centre_of, self._mode)
                for row in torch.nonzero(length == 0).flatten().tolist():
                    reasons[table["id"][i + row].as_py()] = f"layer {layer} equals the mean of the gallery"
                unit = centre(codes, centre_of, self._mode)
                if self._mode != "raw":
                    unit = unit / length[:, None]
                index.add(unit.float().numpy())
                lengths[start : start + len(codes)] = length.numpy()
                start += len(codes)
        _refuse(reasons)
        return self._write(
            f"layer-{layer:02d}", ".faiss", lambda f: faiss.write_index(index, faiss.PyCallbackIOWriter(f.write))
        )

    def _write(self, stem: str, suffix: str, write: Callable[[BinaryIO], None]) -> FileEntry:
        entry = self._folder.write(stem, suffix, write)
        self._files.append(entry)
        return entry


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


def _concatenate(batches: list[CodeBatch]) -> CodeBatch:
    batches = [b for b in batches if len(b.codes)]
    if len(batches) == 1:
        return batches[0]
    lists = [[value for b in batches for value in b[i]] for i in (1, 2, 3)]
    embeddings = None if batches[0].embeddings is None else np.concatenate([b.embeddings for b in batches])
    return CodeBatch(np.concatenate([b.codes for b in batches]), *lists, embeddings)


def _split(batch: CodeBatch, rows: int) -> tuple[CodeBatch, CodeBatch]:
    first, rest = (
        CodeBatch(*(None if v is None else v[part] for v in batch)) for part in (slice(0, rows), slice(rows, None))
    )
    return first, rest
