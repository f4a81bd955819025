"""A finished gallery, and the search over it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from gallery_index.compressed import CompressedLayer
from gallery_index.errors import GalleryCorruptError, GalleryError, NotEnoughCodesError, QueryError
from gallery_index.info import Expectation, GalleryInfo
from gallery_index.scoring import centre, norms
from gallery_index.search import End, ExactSearch, Exclusion
from gallery_index.storage import Folder
from gallery_index.store import open_gallery
from gallery_index.table import read_rows

ExcludedIds = Sequence[str | Collection[str] | None]
SEARCHES = ("exact", "compressed")
ExcludeMask = np.ndarray | Callable[[int], np.ndarray]


@dataclass(frozen=True)
class SearchResult:
    """The most similar codes and the least similar one, for every query and layer on its own.

    Attributes:
        most_ids: (B, L, k) strings, most similar first, equal scores in the order of ids.
        most_scores: (B, L, k) float32, in the gallery's mode (cosines in [-1, 1] unless ``raw``).
        most_vectors: (B, L, k, D) float32, the codes as they were given to the builder; None if not asked for.
        least_ids: (B, L) strings.
        least_scores: (B, L) float32.
        least_vectors: (B, L, D) float32, or None.
    """

    most_ids: np.ndarray
    most_scores: np.ndarray
    most_vectors: np.ndarray | None
    least_ids: np.ndarray
    least_scores: np.ndarray
    least_vectors: np.ndarray | None


class Searcher:
    """The search over N codes of L layers with ids, wherever the codes are.

    Attributes:
        url: the folder that the gallery lies in.
        info: its description (mode, counts, weights, files).
        ids: (N,) strings, in the order of the store.
        photo_ids: N strings.
        person_ids: N strings or None.
        mean: (stored layers, D) float64.
    """

    def __init__(
        self,
        folder: Folder,
        info: GalleryInfo,
        ids: list[str],
        photo_ids: list[str],
        person_ids: list[str | None],
        mean: np.ndarray,
        embeddings: np.ndarray | None,
        device: torch.device,
    ) -> None:
        self._folder, self.url, self.info = folder, folder.url, info
        self.ids = np.array(ids)
        self.photo_ids, self.person_ids, self.mean = photo_ids, person_ids, mean
        self._embeddings, self._device = embeddings, device
        rank = np.empty(len(ids), dtype=np.int64)
        rank[np.argsort(self.ids, kind="stable")] = np.arange(len(ids))
        self._rank, self._mean = (torch.from_numpy(a).to(device) for a in (rank, mean))
        self._row = {id_: row for row, id_ in enumerate(ids)}
        self._rows_of_photo = _group(photo_ids)
        self._rows_of_person = _group(person_ids)

    def _ends(self, queries: Tensor, k: int, k_least: int, excluded: Exclusion) -> tuple[End, End]:
        """Rows and scores (B, L, k), and (B, L, k_least)."""
        raise NotImplementedError

    def _vectors(self, rows: Tensor) -> np.ndarray:
        """Codes as given, (B, L, R, D), of rows (B, L, R)."""
        raise NotImplementedError

    @property
    def mode(self) -> str:
        return self.info.mode

    @property
    def num_layers(self) -> int:
        return self.info.layers

    @property
    def dim(self) -> int:
        return self.info.dim

    @property
    def fingerprint(self) -> str:
        """32 hex digits over ``index.json``: equal only for equal files, mode, mean and weights."""
        return self.info.fingerprint

    def __len__(self) -> int:
        return self.info.count

    def unit_queries(self, codes: np.ndarray) -> np.ndarray:
        """Codes (B, L, D) as ``faiss_index`` wants them: centred and normalised as the mode says, float32.

        Raises:
            QueryError: as ``search``.
        """
        queries = self._checked(codes).cpu()
        mean = torch.from_numpy(self.mean)
        if self.mode == "raw":
            return queries.numpy()
        centred = queries.double() - (mean if self.mode == "centred" else 0.0)
        return (centred / centred.norm(dim=2, keepdim=True)).float().numpy()

    def search(
        self,
        codes: np.ndarray | Tensor,
        k: int,
        *,
        exclude_photo_ids: ExcludedIds | None = None,
        exclude_person_ids: ExcludedIds | None = None,
        exclude_mask: ExcludeMask | None = None,
        identity_embeddings: np.ndarray | None = None,
        identity_ceiling: float | None = None,
        vectors: bool = True,
    ) -> SearchResult:
        """For every layer on its own, the k most similar codes and the least similar one.

        Exact: equal to a float64 search over all codes with ties broken by id (see
        ``gallery_index.search``).  What one query gets does not depend on the others, on the
        machine or on the device, to the last bit.  Readings 1 to 3 of the method.  Compressed: the same
        scores and order, but a code may be missed (see ``gallery_index.compressed``).

        Args:
            codes: (B, L, D) float32; B = 0 is allowed.
            k: how many most similar codes.
            exclude_photo_ids: for each query a photo id, several, or None: codes of these photos are left out.
            exclude_person_ids: the same for person ids.
            exclude_mask: bool (B, N) in the order of ``ids``, True where a code is left out, or a
                function from the query's index to such a row (N,).
            identity_embeddings: (B, E) of the queries' faces, by the recogniser that made the gallery's embeddings.
            identity_ceiling: codes whose embedding has a higher cosine with the query's are left out.
            vectors: False leaves the vectors out of the result.

        Raises:
            QueryError: wrong shape or type, NaN or infinity, a code without a direction in this mode,
                exclusions of another length, or a ceiling on a gallery without embeddings.
            NotEnoughCodesError: fewer than k codes are left for a query.
        """
        queries = self._checked(codes)
        count = len(queries)
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise QueryError(f"k must be a positive integer, got {k!r}")
        excluded = self._exclusion(
            count, exclude_photo_ids, exclude_person_ids, exclude_mask, identity_embeddings, identity_ceiling
        )
        left = len(self) - torch.bincount(excluded.query, minlength=count)
        for query in torch.nonzero(left < k)[:1].flatten().tolist():
            raise NotEnoughCodesError(query, int(left[query]), int(k), len(self))
        if k > len(self):
            raise NotEnoughCodesError(0, len(self), int(k), len(self))

        most, least = self._ends(queries, int(k), 1, excluded)
        rows, scored = (torch.cat(parts, dim=2) for parts in zip(most, least, strict=True))
        found = None
        if vectors:
            found = self._vectors(rows)
        ids = self.ids[rows.cpu().numpy()]
        values = scored.float().cpu().numpy()
        return SearchResult(
            most_ids=ids[:, :, :k],
            most_scores=values[:, :, :k],
            most_vectors=None if found is None else found[:, :, :k],
            least_ids=ids[:, :, k],
            least_scores=values[:, :, k],
            least_vectors=None if found is None else found[:, :, k],
        )

    def rank(self, codes: np.ndarray | Tensor, k: int, k_least: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the k most, (B, L, k), and of the k_least least similar codes, (B, L, k_least), without exclusions.

        Raises:
            QueryError, NotEnoughCodesError: see ``search``.
        """
        if max(k, k_least) > len(self):
            raise NotEnoughCodesError(0, len(self), max(k, k_least), len(self))
        ends = self._ends(self._checked(codes), k, k_least, Exclusion.none(self._device))
        return tuple(end.rows.cpu().numpy() for end in ends)

    def _checked(self, codes: np.ndarray | Tensor) -> Tensor:
        queries = torch.as_tensor(codes)
        if queries.dtype != torch.float32 or queries.ndim != 3 or queries.shape[1:] != (self.num_layers, self.dim):
            raise QueryError(
                f"codes must be (B, {self.num_layers}, {self.dim}) float32 for this gallery, "
                f"got {tuple(queries.shape)} {str(queries.dtype).removeprefix('torch.')}"
            )
        queries = queries.detach().to(self._device)
        bad = torch.nonzero(~torch.isfinite(queries).all(dim=2))
        if len(bad):
            raise QueryError(f"query {int(bad[0, 0])}: layer {int(bad[0, 1])} has a NaN or an infinity")
        for query, layer in torch.nonzero(norms(queries, self._mean, self.mode) == 0)[:1].tolist():
            what = "the gallery's mean" if self.mode == "centred" else "zero"
            raise QueryError(f"query {query}: layer {layer} equals {what}: it has no direction to compare")
        return queries

    def _exclusion(
        self,
        count: int,
        photo_ids: ExcludedIds | None,
        person_ids: ExcludedIds | None,
        mask: ExcludeMask | None,
        embeddings: np.ndarray | None,
        ceiling: float | None,
    ) -> Exclusion:
        rows: list[list[np.ndarray]] = [[] for _ in range(count)]
        for name, ids, rows_of in (
            ("exclude_photo_ids", photo_ids, self._rows_of_photo),
            ("exclude_person_ids", person_ids, self._rows_of_person),
        ):
            if ids is None:
                continue
            if isinstance(ids, str) or len(ids) != count:
                raise QueryError(f"{name} must have one entry for each of the {count} queries")
            for query, entry in enumerate(ids):
                entries = () if entry is None else (entry,) if isinstance(entry, str) else entry
                rows[query] += [rows_of[e] for e in entries if e in rows_of]
        if mask is not None:
            if not callable(mask) and (np.shape(mask) != (count, len(self)) or np.asarray(mask).dtype != np.bool_):
                raise QueryError(f"exclude_mask must be bool ({count}, {len(self)}), got {np.shape(mask)}")
            for query in range(count):
                row = np.asarray(mask(query) if callable(mask) else mask[query])
                if row.shape != (len(self),) or row.dtype != np.bool_:
                    raise QueryError(f"exclude_mask gave {row.shape} {row.dtype}, bool ({len(self)},) is needed")
                rows[query].append(np.flatnonzero(row))
        if (embeddings is None) != (ceiling is None):
            raise QueryError("identity_embeddings and identity_ceiling go together")
        if embeddings is not None:
            self._above_ceiling(count, np.asarray(embeddings, dtype=np.float64), float(ceiling), rows)
        if not any(rows):
            return Exclusion.none(self._device)
        unique = [np.unique(np.concatenate(r)) if r else np.empty(0, np.int64) for r in rows]
        query = np.repeat(np.arange(count), [len(u) for u in unique])
        row = np.concatenate(unique)
        order = np.argsort(row, kind="stable")
        return Exclusion(*(torch.from_numpy(a[order]).to(self._device) for a in (query, row)))

    def _above_ceiling(self, count: int, queries: np.ndarray, ceiling: float, rows: list[list[np.ndarray]]) -> None:
        if self._embeddings is None:
            raise QueryError(f"{self.url} holds no identity embeddings, so it knows no identity_ceiling")
        if queries.shape != (count, self.info.embedding_dim):
            raise QueryError(f"identity_embeddings must be ({count}, {self.info.embedding_dim}), got {queries.shape}")
        length = np.linalg.norm(queries, axis=1, keepdims=True)
        if not (np.isfinite(length).all() and (length > 0).all()):
            raise QueryError("identity_embeddings has a zero, a NaN or an infinity")
        for start in range(0, len(self), 4096):
            part = self._embeddings[start : start + 4096].astype(np.float64)
            above = (queries / length) @ part.T > ceiling
            for query in np.flatnonzero(above.any(axis=1)):
                rows[query].append(np.flatnonzero(above[query]) + start)


class Gallery(Searcher):
    """A gallery in one process: searched exactly, or by compressed indexes.

    Made by ``Gallery.load``.  Searching changes nothing, so threads may share a gallery.

    Attributes:
        compressed: the layers' compressed indexes where these are searched; empty where the search is exact.
    """

    def __init__(
        self,
        folder: Folder,
        info: GalleryInfo,
        ids: list[str],
        photo_ids: list[str],
        person_ids: list[str | None],
        codes: Tensor | None,
        norms: np.ndarray,
        mean: np.ndarray,
        embeddings: np.ndarray | None,
    ) -> None:
        """``codes`` (stored layers, N, D): None to search the compressed indexes in the folder."""
        device = torch.device("cpu") if codes is None else codes.device
        super().__init__(folder, info, ids, photo_ids, person_ids, mean, embeddings, device)
        self._norms = torch.from_numpy(norms).to(device)
        self.compressed: list[CompressedLayer] = []
        if codes is None:
            self.compressed = [
                CompressedLayer.of(folder, info, layer, self._norms[layer], mean[layer], self._rank)
                for layer in range(info.stored_layers)
            ]
        else:
            self._exact = ExactSearch(codes, self._norms, self._mean, info.mode, self._rank)
        #: each stored layer's codes, (N, D) float32: in memory, or mapped from the disk
        self._codes = [layer.codes for layer in self.compressed] if codes is None else list(codes)

    @classmethod
    def load(
        cls,
        url: str | os.PathLike[str],
        *,
        expect: Expectation | None = None,
        layers: int | None = None,
        search: str = "exact",
        device: str | torch.device = "cpu",
        storage_options: Mapping[str, Any] | None = None,
    ) -> Gallery:
        """Load a finished gallery, checking every file's sha256 first.

        Memory: exact, N x (stored layers) x D float32, once, plus one file of at most 64 MiB meanwhile; compressed,
        ids, norms and what FAISS does not map (lists and codes are mapped from the disk).

        Args:
            url: a gallery's folder, or a store's, of which the current version is taken; a local path or an fsspec URL.
            expect: what it has to be; nothing is read beyond ``index.json`` if it is not.
            layers: L of the caller's codes, for a gallery of one W for all layers; None for the L that it was built
                with.
            search: ``exact``, or ``compressed`` where the gallery has such indexes and lies on a local disk.
            device: where the codes live and the exact search runs.
            storage_options: for fsspec.

        Raises:
            GalleryNotFoundError: no gallery there, or a build that did not finish.
            GalleryMismatchError: another mode, L, D, weights, mean or fingerprint; both sides are named.
            GalleryCorruptError: a file is missing, truncated or altered.
            GalleryError: ``compressed``, and it has no such indexes, or is not on a local disk.
            ValueError: another kind of search.
        """
        if search not in SEARCHES:
            raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
        folder, info = open_gallery(url, storage_options)
        if expect is not None:
            expect.check(info, folder.url)
        if layers is not None and info.broadcast:
            info = replace(info, layers=layers)
        codes = None
        if search == "compressed":
            if info.compression is None:
                raise GalleryError(f"{folder.url} has no compressed indexes; build it with a plan for them")
            for name in (*info.indexes, *info.exact):
                folder.verify(info.files[name])
        else:
            codes = torch.empty(info.stored_layers, info.count, info.dim, device=device)
        ids: list[str] = []
        photo_ids: list[str] = []
        person_ids: list[str | None] = []
        embeddings = None if info.embedding_dim is None else np.empty((info.count, info.embedding_dim), np.float32)
        for name in info.codes:
            where = f"{folder.url}: {name}"
            shape = 0 if codes is None else info.stored_layers, info.dim, info.embedding_dim
            rows = read_rows(folder.read(info.files[name]), *shape, where)
            start, stop = len(ids), len(ids) + len(rows.ids)
            if stop > info.count:
                raise GalleryCorruptError(f"{where} has more rows than index.json counts ({info.count})")
            ids += rows.ids
            photo_ids += rows.photo_ids
            person_ids += rows.person_ids
            if codes is not None:
                codes[:, start:stop] = torch.from_numpy(rows.codes).transpose(0, 1)
            if embeddings is not None:
                embeddings[start:stop] = rows.embeddings
        if len(ids) != info.count:
            raise GalleryCorruptError(f"{folder.url} holds {len(ids)} codes, index.json counts {info.count}")
        mean = read_array(folder, info, info.mean, (info.stored_layers, info.dim))
        norms = read_array(folder, info, info.norms, (info.stored_layers, info.count))
        return cls(folder, info, ids, photo_ids, person_ids, codes, norms, mean, embeddings)

    def codes(self, ids: Sequence[str]) -> np.ndarray:
        """Codes by id: (n, L, D) float32.

        Raises:
            KeyError: an id that the gallery does not hold.
        """
        rows = torch.tensor([self._row[id_] for id_ in ids], dtype=torch.int64, device=self._device)
        found = torch.stack([codes[rows] for codes in self._codes], dim=1)
        return found.expand(-1, self.num_layers, -1).contiguous().cpu().numpy()

    def component_std(self) -> np.ndarray:
        """Standard deviation of each component over the gallery: (L, D) float32; a unit of the inspection."""
        result = np.empty((self.info.stored_layers, self.dim))
        for layer, codes in enumerate(self._codes):
            mean = torch.from_numpy(self.mean[layer]).to(codes.device)
            squares = sum((part.double() - mean).square().sum(0) for part in codes.split(4096))
            result[layer] = (squares / len(codes)).sqrt().cpu().numpy()
        return np.broadcast_to(result, (self.num_layers, self.dim)).astype(np.float32)

    def faiss_index(self, layer: int) -> faiss.IndexFlatIP:
        """An exact FAISS index of a layer, made anew: vectors centred and normalised as the mode says."""
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"layer must be in 0..{self.num_layers - 1}, got {layer}")
        stored = 0 if self.info.broadcast else layer
        index = faiss.IndexFlatIP(self.dim)
        mean, lengths = torch.from_numpy(self.mean[stored]), self._norms[stored].cpu()
        for start in range(0, len(self), 4096):
            unit = centre(self._codes[stored][start : start + 4096].cpu(), mean, self.mode)
            if self.mode != "raw":
                unit = unit / lengths[start : start + 4096, None]
            index.add(unit.float().numpy())
        return index

    def _ends(self, queries: Tensor, k: int, k_least: int, excluded: Exclusion) -> tuple[End, End]:
        count, layers = queries.shape[:2]
        if self.info.broadcast:
            queries, excluded = queries.flatten(0, 1)[:, None], excluded.repeat(layers)
        with torch.inference_mode():
            if self.compressed:
                parts = [
                    index.search(queries[:, layer].contiguous(), k, k_least, excluded)
                    for layer, index in enumerate(self.compressed)
                ]
                ends = [End(*(torch.stack([p[e][i] for p in parts], dim=1) for i in (0, 1))) for e in (0, 1)]
            else:
                ends = self._exact.search(queries, k, k_least, excluded)
        return tuple(
            End(*(values.reshape(count, layers, wanted) for values in end))
            for end, wanted in zip(ends, (k, k_least), strict=True)
        )

    def _vectors(self, rows: Tensor) -> np.ndarray:
        codes = self._codes * (self.num_layers if self.info.broadcast else 1)
        return torch.stack([layer[rows[:, i]] for i, layer in enumerate(codes)], dim=1).cpu().numpy()


def _group(names: Sequence[str | None]) -> dict[str, np.ndarray]:
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            groups.setdefault(name, []).append(row)
    return {name: np.array(rows) for name, rows in groups.items()}


def read_array(folder: Folder, info: GalleryInfo, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One of a gallery's arrays, checked.  Raises GalleryCorruptError where it is not float64 of this shape."""
    try:
        array = np.load(io.BytesIO(folder.read(info.files[name])), allow_pickle=False)
    except ValueError as error:
        raise GalleryCorruptError(f"{folder.url}: {name}: {error}") from error
    if array.shape != shape or array.dtype != np.float64 or not np.isfinite(array).all():
        raise GalleryCorruptError(f"{folder.url}: {name} is {array.dtype} {array.shape}, expected float64 {shape}")
    return array
