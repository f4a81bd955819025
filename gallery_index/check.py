"""Looking through a gallery: are its files whole, its rows sound, and does each code find itself?

Memory is one file of codes and a sample of queries, whatever N: all is done in one pass over the files.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gallery_index.compressed import CompressedLayer
from gallery_index.errors import GalleryCheckError, GalleryCorruptError
from gallery_index.info import GalleryInfo
from gallery_index.scoring import centre, norms, scores
from gallery_index.search import Exclusion
from gallery_index.storage import Folder
from gallery_index.table import Rows, read_rows

SAMPLE = 32
RECALL_AT = 10
_ROWS_AT_ONCE = 4096


def check(
    folder: Folder, info: GalleryInfo, *, count: int | None = None, sample: int = SAMPLE, seed: int = 0
) -> Mapping[str, Any]:
    """Read all of a gallery and see whether it may be used.

    Looked at are: size and sha256 of every file; the number of rows, photos and people against ``index.json`` (and
    against ``count``, what the caller reckons with); ids that are there twice; NaN, infinities and zeros; mean and
    norms; whether each of a random sample of codes is its own most similar one (``raw``: whether its product with
    itself is the square of its norm); and, of a compressed index, the recall of the ten most and the ten least similar
    of the sample.

    Returns:
        plain values: ``codes``, ``sample``, ``self_retrieved`` (share), ``recall_most``, ``recall_least``
        (None without a compressed index).

    Raises:
        GalleryCheckError: all that was found wrong, in words.
    """
    mean, lengths = _small_files(folder, info)
    wanted = np.sort(np.random.default_rng(seed).permutation(info.count)[:sample])
    scan = _Scan(folder, info, mean, lengths, wanted)
    scan.compare(info.count if count is None else count)
    if scan.problems:
        raise GalleryCheckError(folder.url, scan.problems)

    queries = scan.queries
    ends = _ends(folder, info, queries, mean, lengths)
    itself = torch.from_numpy(wanted)[:, None, None]
    own = _own(queries, wanted, mean, lengths, info)
    if info.mode == "raw":  # a product may be larger with a longer code, so only its own value can be looked at
        found = torch.isclose(own, torch.from_numpy(lengths[:, wanted].T ** 2), rtol=1e-9)
    else:  # among the ten best; alone there unless others have the same code
        found = torch.isclose(own, ends.best[:, :, 0], rtol=1e-9)
        found &= (ends.most == itself).any(2) | torch.isclose(ends.best[:, :, -1], ends.best[:, :, 0], rtol=1e-9)
    if not found.all():
        words = f"{int((~found).sum())} of {found.numel()} sampled codes do not find themselves first"
        raise GalleryCheckError(folder.url, [words])
    report: dict[str, Any] = {
        "codes": scan.count,
        "sample": len(wanted),
        "self_retrieved": float(found.double().mean()),
        "recall_most": None,
        "recall_least": None,
    }
    if info.compression is not None and folder.local:
        report["recall_most"], report["recall_least"] = _recall(folder, info, queries, mean, lengths, ends)
    return report


def _small_files(folder: Folder, info: GalleryInfo) -> tuple[np.ndarray, np.ndarray]:
    """Mean (L, D) and norms (L, N), once every file but those of codes is what ``index.json`` says."""
    problems = []
    for entry in info.files.values():
        if entry.name not in info.codes:
            try:
                folder.verify(entry)
            except GalleryCorruptError as error:
                problems.append(str(error))
    if problems:
        raise GalleryCheckError(folder.url, problems)
    mean = np.load(io.BytesIO(folder.read(info.files[info.mean])), allow_pickle=False)
    lengths = np.load(io.BytesIO(folder.read(info.files[info.norms])), allow_pickle=False)
    if mean.shape != (info.stored_layers, info.dim) or lengths.shape != (info.stored_layers, info.count):
        raise GalleryCheckError(folder.url, [f"mean is {mean.shape} and norms {lengths.shape}"])
    return mean, lengths


class _Scan:
    """One pass over the files of codes.

    Attributes:
        problems: what was found wrong, in words.
        count: codes seen.
        queries: (S, L, D), the codes of the sampled rows.
    """

    def __init__(self, folder: Folder, info: GalleryInfo, mean: np.ndarray, lengths: np.ndarray, wanted: np.ndarray):
        self.info, self.mean, self.lengths, self.wanted = info, mean, lengths, wanted
        self.problems: list[str] = []
        self.count = 0
        self.queries = np.empty((len(wanted), *mean.shape), np.float32)
        self._total = np.zeros(mean.shape)
        self._ids: set[str] = set()
        self._photos: set[str] = set()
        self._people: set[str] = set()
        for name in info.codes:
            where = f"{folder.url}: {name}"
            try:
                rows = read_rows(folder.read(info.files[name]), *mean.shape, info.embedding_dim, where)
            except GalleryCorruptError as error:
                raise GalleryCheckError(folder.url, [str(error)]) from error
            if not self._file(name, rows):
                break

    def _file(self, name: str, rows: Rows) -> bool:
        """Look at the rows of a file; False where the rest need not be read."""
        start, stop = self.count, self.count + len(rows.ids)
        self.count = stop
        twice = [id_ for id_ in rows.ids if id_ in self._ids]
        self._ids.update(rows.ids)
        if len(self._ids) != stop:
            twice = (twice or rows.ids)[0]
            self.problems.append(f"{name}: {stop - len(self._ids)} id(s) are there twice, such as {twice!r}")
            self.count = start
            return False
        self._photos.update(rows.photo_ids)
        self._people.update(p for p in rows.person_ids if p is not None)
        if stop > self.info.count:
            self.count = start
            return False
        bad = ~np.isfinite(rows.codes).all(axis=(1, 2))
        if bad.any():
            self.problems.append(f"{name}: {int(bad.sum())} codes have a NaN or an infinity")
        self._total += rows.codes.sum(axis=0, dtype=np.float64)
        for layer in range(len(self.mean)):
            for i in range(0, len(rows.ids), _ROWS_AT_ONCE):
                codes = torch.from_numpy(rows.codes[i : i + _ROWS_AT_ONCE, layer])
                found = norms(codes, torch.from_numpy(self.mean[layer]), self.info.mode).numpy()
                stated = self.lengths[layer, start + i :][: len(found)]
                if not (np.array_equal(found, stated) and (found > 0).all()):
                    self.problems.append(f"{name}: norms of layer {layer} are not those of its codes, or zero")
        first, last = np.searchsorted(self.wanted, [start, stop])
        self.queries[first:last] = rows.codes[self.wanted[first:last] - start]
        return True

    def compare(self, reckoned: int) -> None:
        """Note where the numbers, or the mean, are not those of ``index.json``, or of the caller."""
        for what, have, want in (
            ("codes", self.count, self.info.count),
            ("photos", len(self._photos), self.info.photos),
            ("people", len(self._people), self.info.people),
            ("codes reckoned with", self.count, reckoned),
        ):
            if have != want:
                self.problems.append(f"it has {have} {what}, not {want}")
        if not self.problems and not np.allclose(self.mean, self._total / self.count, rtol=1e-9, atol=1e-12):
            self.problems.append("its mean is not that of its codes")


class _Ends(NamedTuple):
    """Rows of the most and the least similar codes, (S, L, k), and the scores of the most similar, best first."""

    most: Tensor
    least: Tensor
    best: Tensor


def _own(queries: np.ndarray, rows: np.ndarray, mean: np.ndarray, lengths: np.ndarray, info: GalleryInfo) -> Tensor:
    """Similarity of each sampled code with itself: (S, L) float64."""
    own = []
    for layer in range(queries.shape[1]):
        where, codes = torch.from_numpy(mean[layer]), torch.from_numpy(queries[:, layer])
        length = torch.from_numpy(lengths[layer, rows])
        own.append(scores(centre(codes, where, info.mode), length, codes, length, where, info.mode))
    return torch.stack(own, dim=1)


def _ends(folder: Folder, info: GalleryInfo, queries: np.ndarray, mean: np.ndarray, lengths: np.ndarray) -> _Ends:
    """Both ends for the sample, from all codes, by float64 products."""
    k = min(RECALL_AT, info.count)
    units = []
    for layer in range(info.stored_layers):
        centred = centre(torch.from_numpy(queries[:, layer]), torch.from_numpy(mean[layer]), info.mode)
        units.append(centred if info.mode == "raw" else torch.nn.functional.normalize(centred, dim=1))
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(2 * info.stored_layers)]
    start = 0
    for name in info.codes:
        content, where = folder.read(info.files[name]), f"{folder.url}: {name}"
        rows = read_rows(content, info.stored_layers, info.dim, info.embedding_dim, where)
        for layer in range(info.stored_layers):
            for i in range(0, len(rows.ids), _ROWS_AT_ONCE):
                codes = torch.from_numpy(rows.codes[i : i + _ROWS_AT_ONCE, layer])
                product = units[layer] @ centre(codes, torch.from_numpy(mean[layer]), info.mode).T
                if info.mode != "raw":
                    product /= torch.from_numpy(lengths[layer, start + i : start + i + len(codes)])
                for end in (0, 1):
                    value, row = product.topk(min(k, len(codes)), dim=1, largest=not end)
                    offered = kept[2 * layer + end]
                    offered.append((value, row + start + i))
                    if sum(v.shape[1] for v, _ in offered) > 64 * k:
                        offered[:] = [_join(offered, k, largest=not end)]
        start += len(rows.ids)
    joined = [_join(offered, k, largest=not (i % 2)) for i, offered in enumerate(kept)]
    return _Ends(
        torch.stack([rows for _, rows in joined[::2]], dim=1),
        torch.stack([rows for _, rows in joined[1::2]], dim=1),
        torch.stack([values for values, _ in joined[::2]], dim=1),
    )


def _join(offered: list[tuple[Tensor, Tensor]], k: int, largest: bool) -> tuple[Tensor, Tensor]:
    values, rows = (torch.cat(parts, dim=1) for parts in zip(*offered, strict=True))
    values, place = values.topk(k, dim=1, largest=largest)
    return values, rows.gather(1, place)


def _recall(
    folder: Folder, info: GalleryInfo, queries: np.ndarray, mean: np.ndarray, lengths: np.ndarray, ends: _Ends
) -> tuple[float, float]:
    """Share of the exact ten at each end that the compressed indexes find."""
    k = ends.most.shape[2]
    hits = torch.zeros(2)
    rank = torch.arange(info.count)  # ties do not matter here
    for layer in range(info.stored_layers):
        index = CompressedLayer.of(folder, info, layer, torch.from_numpy(lengths[layer]), mean[layer], rank)
        found = index.search(torch.from_numpy(queries[:, layer].copy()), k, k, Exclusion.none(torch.device("cpu")))
        for end, (have, want) in enumerate(zip(found, (ends.most, ends.least), strict=True)):
            hits[end] += (have.rows[:, :, None] == want[:, layer, None]).sum()
    return tuple((hits / (len(queries) * info.stored_layers * k)).tolist())
