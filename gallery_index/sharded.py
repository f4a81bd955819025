"""A gallery that is spread over processes: each holds some layers of some rows, and all are asked together.

This module knows the parts and how their answers become one; who runs them, and where, is the caller's affair
(``cluster.Service`` on the nodes of a cluster).  The answers are those of the single process, to the last bit: parts
give exact float64 scores (``gallery_index.search``), which depend on the pair of codes alone, and they are merged by
score, then by id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gallery_index.errors import GalleryCorruptError
from gallery_index.gallery import Searcher, read_array
from gallery_index.info import Expectation
from gallery_index.search import End, ExactSearch, Exclusion
from gallery_index.store import open_gallery
from gallery_index.table import layer_column, read_rows, read_table, vectors_of

Ask = Callable[[Sequence[Any]], list[Any]]


@dataclass(frozen=True)
class Extent:
    """What a part holds: layers first..last - 1 and rows start..stop - 1."""

    first: int
    last: int
    start: int
    stop: int


def extents(layers: int, count: int, parts: int) -> list[Extent]:
    """Split L stored layers and N rows into so many parts: by layers as far as these go, each then by rows.

    Raises:
        ValueError: more parts than layers times rows.
    """
    groups = max(n for n in range(1, layers + 1) if parts % n == 0)
    bands = parts // groups
    if parts < 1 or bands > count:
        raise ValueError(f"{layers} layers of {count} codes cannot be split into {parts} parts")
    by_layer = np.linspace(0, layers, groups + 1).astype(int).tolist()
    by_row = np.linspace(0, count, bands + 1).astype(int).tolist()
    return [
        Extent(by_layer[i], by_layer[i + 1], by_row[j], by_row[j + 1]) for i in range(groups) for j in range(bands)
    ]


def make_part(
    url: str,
    fingerprint: str,
    extent: Extent,
    *,
    device: str = "cpu",
    storage_options: Mapping[str, Any] | None = None,
) -> Callable[[Mapping[str, Any]], Any]:
    """Load a part from the store (files checked by sha256) and return what answers for it.

    A request is ``{"rows": ...}``, for the codes of rows, or the arguments of ``_Part.search``.

    Raises:
        GalleryMismatchError: the gallery there is not the one with this fingerprint.
        GalleryNotFoundError, GalleryCorruptError: see ``Gallery.load``.
    """
    folder, info = open_gallery(url, storage_options)
    Expectation(fingerprint=fingerprint).check(info, folder.url)
    layers = range(extent.first, extent.last)
    codes = torch.empty(len(layers), extent.stop - extent.start, info.dim, device=device)
    ids: list[str] = []
    at = 0
    for name in info.codes:
        where = f"{folder.url}: {name}"
        # Where a file's rows lie is known only from the files before it; they are checked in passing.
        table = read_table(folder.read(info.files[name]), ["id", *(layer_column(layer) for layer in layers)], where)
        low, high = max(extent.start, at), min(extent.stop, at + len(table))
        if low < high:
            ids += table["id"].slice(low - at, high - low).to_pylist()
            for i, layer in enumerate(layers):
                vectors = vectors_of(table, layer_column(layer), info.dim, where)[low - at : high - at]
                codes[i, low - extent.start : high - extent.start] = torch.tensor(vectors)
        at += len(table)
    if at != info.count:
        raise GalleryCorruptError(f"{folder.url} holds {at} codes, index.json counts {info.count}")
    shape = (info.stored_layers, info.dim), (info.stored_layers, info.count)
    mean = read_array(folder, info, info.mean, shape[0])[layers.start : layers.stop]
    lengths = read_array(folder, info, info.norms, shape[1])[layers.start : layers.stop, extent.start : extent.stop]
    rank = np.empty(len(ids), np.int64)
    rank[np.argsort(np.array(ids), kind="stable")] = np.arange(len(ids))
    arrays = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (lengths, mean))
    part = _Part(ExactSearch(codes, *arrays, info.mode, torch.from_numpy(rank).to(device)), extent)

    def answer(request: Mapping[str, Any]) -> Any:
        with torch.inference_mode():
            return part.vectors(request["rows"]) if "rows" in request else part.search(**request)

    return answer


class _Part:
    """A part in the process that holds it."""

    def __init__(self, exact: ExactSearch, extent: Extent) -> None:
        self.exact, self.extent = exact, extent

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Codes (L', R, D) of rows (L', R), -1 where the row is in no part of these layers' that this is."""
        own = torch.from_numpy(rows) - self.extent.start
        inside = (own >= 0) & (own < self.exact.codes.shape[1]) & (torch.from_numpy(rows) >= 0)
        place = torch.nonzero(inside, as_tuple=True)
        return self.exact.codes[place[0], own[place]].cpu().numpy()

    def search(
        self, queries: np.ndarray, k: int, k_least: int, query: np.ndarray, row: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Both ends among the part's rows.

        Args:
            queries: (B, L', D) float32.
            k, k_least: wanted; where fewer rows are left for a query, the rest of its answer is rows of -1.
            query, row: pairs that may not be returned, by row.

        Returns:
            rows and scores of the most similar (B, L', k), and of the least similar (B, L', k_least).
        """
        device = self.exact.codes.device
        inside = (row >= self.extent.start) & (row < self.extent.stop)
        hidden = Exclusion(*(torch.from_numpy(a[inside]).to(device) for a in (query, row - self.extent.start)))
        left = self.exact.codes.shape[1] - torch.bincount(hidden.query, minlength=len(queries))
        batch = torch.from_numpy(queries).to(device)
        shape = (len(queries), queries.shape[1])
        rows = [torch.full((*shape, n), -1, dtype=torch.int64, device=device) for n in (k, k_least)]
        scores = [torch.full((*shape, n), float("nan"), dtype=torch.float64, device=device) for n in (k, k_least)]
        for count in torch.unique(left.clamp(max=max(k, k_least))).tolist():  # one round, but where few rows are left
            if not count:
                continue
            some = torch.nonzero(left.clamp(max=max(k, k_least)) == count).flatten()
            place = torch.full((len(queries),), -1, device=device)
            place[some] = torch.arange(len(some), device=device)
            keep = place[hidden.query] >= 0
            part = Exclusion(place[hidden.query[keep]], hidden.row[keep])
            ends = self.exact.search(batch[some], min(k, count), min(k_least, count), part)
            for i, end in enumerate(ends):
                rows[i][some, :, : end.rows.shape[2]] = end.rows + self.extent.start
                scores[i][some, :, : end.rows.shape[2]] = end.scores
        return tuple(v.cpu().numpy() for pair in zip(rows, scores, strict=True) for v in pair)


class ShardedGallery(Searcher):
    """A gallery whose codes are held by parts elsewhere: the same ``search``, with the same results.

    Args:
        url: of the gallery or store.
        parts: number of parts.
        start: called with the gallery's fingerprint, the URL of its folder, and the extents of the parts; returns what
            sends each part a request and gives their answers in order (``cluster.Service.ask``, say).
        expect: what the gallery has to be.
        layers: see ``Gallery.load``.
        storage_options: for fsspec.

    Raises:
        GalleryNotFoundError, GalleryMismatchError, GalleryCorruptError: see ``Gallery.load``.
        ValueError: see ``extents``.
    """

    def __init__(
        self,
        url: str,
        parts: int,
        start: Callable[[str, str, list[Extent]], Ask],
        *,
        expect: Expectation | None = None,
        layers: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        folder, info = open_gallery(url, storage_options)
        if expect is not None:
            expect.check(info, folder.url)
        if layers is not None and info.broadcast:
            info = replace(info, layers=layers)
        self.extents = extents(info.stored_layers, info.count, parts)
        names: tuple[list[str], list[str], list[str | None]] = ([], [], [])
        embeddings = None if info.embedding_dim is None else np.empty((info.count, info.embedding_dim), np.float32)
        for name in info.codes:
            rows = read_rows(folder.read(info.files[name]), 0, info.dim, info.embedding_dim, f"{folder.url}: {name}")
            if embeddings is not None:
                embeddings[len(names[0]) : len(names[0]) + len(rows.ids)] = rows.embeddings
            for kept, new in zip(names, rows[:3], strict=True):
                kept += new
        mean = read_array(folder, info, info.mean, (info.stored_layers, info.dim))
        super().__init__(folder, info, *names, mean, embeddings, torch.device("cpu"))
        self._ask = start(info.fingerprint, folder.url, self.extents)

    def _ends(self, queries: Tensor, k: int, k_least: int, excluded: Exclusion) -> tuple[End, End]:
        count, layers = queries.shape[:2]
        if self.info.broadcast:
            queries, excluded = queries.flatten(0, 1)[:, None], excluded.repeat(layers)
        hidden = {"query": excluded.query.numpy(), "row": excluded.row.numpy()}
        batch = queries.numpy()
        answers = self._ask(
            [{"queries": batch[:, e.first : e.last], "k": k, "k_least": k_least} | hidden for e in self.extents]
        )
        ends = []
        for end, wanted, sign in ((0, k, 1.0), (1, k_least, -1.0)):
            rows = torch.empty(*queries.shape[:2], wanted, dtype=torch.int64)
            scores = torch.empty(*queries.shape[:2], wanted, dtype=torch.float64)
            for first, last in dict.fromkeys((e.first, e.last) for e in self.extents):
                same = [a for a, e in zip(answers, self.extents, strict=True) if e.first == first]
                row, score = (torch.from_numpy(np.concatenate([a[2 * end + i] for a in same], axis=2)) for i in (0, 1))
                value = torch.where(row >= 0, sign * score, -torch.inf)
                order = self._rank[row.clamp(min=0)].argsort(dim=2)
                by_score = value.gather(2, order).argsort(dim=2, descending=True, stable=True)
                order = order.gather(2, by_score)[:, :, :wanted]
                rows[:, first:last], scores[:, first:last] = row.gather(2, order), score.gather(2, order)
            ends.append(End(*(values.reshape(count, layers, wanted) for values in (rows, scores))))
        return ends[0], ends[1]

    def _vectors(self, rows: Tensor) -> np.ndarray:
        wanted = rows.numpy()
        stored = wanted.transpose(1, 0, 2)
        if self.info.broadcast:
            stored = stored.reshape(1, stored.shape[0] * stored.shape[1], wanted.shape[2])
        # (stored layers, R)
        stored = np.ascontiguousarray(stored.reshape(len(stored), stored.shape[1] * wanted.shape[2]))
        found = np.empty((*stored.shape, self.dim), np.float32)
        answers = self._ask([{"rows": stored[e.first : e.last]} for e in self.extents])
        for extent, codes in zip(self.extents, answers, strict=True):
            part = stored[extent.first : extent.last]
            found[extent.first : extent.last][(part >= extent.start) & (part < extent.stop)] = codes
        layers, count = wanted.shape[1], wanted.shape[0]
        return found.reshape(layers, count, wanted.shape[2], self.dim).transpose(1, 0, 2, 3)
