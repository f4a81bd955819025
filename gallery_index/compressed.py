"""Compressed FAISS indexes, one a layer, for galleries beyond memory: candidates from the index, scores from the codes.

Two steps a query and end, as in the exact search, but without its proof: FAISS gives the ``candidates`` rows that
look best in compressed form (inverted lists of quantised vectors, or a graph), and these are scored in float64 by the
codes as given, which are mapped into memory from the disk.  So every score returned is exact, ties are broken by id,
and what may go wrong is that a code is missed.

The least similar end is searched in the same index with the negated query.  That is the same as searching an index of
negated codes: the index answers for inner products of unit vectors, ``min q . x = -max (-q) . x``, and neither
quantisers nor lists know which of the two signs is theirs.  What is promised of this end is therefore the same, and it
is measured on its own (``scol gallery verify``, ``docs/gallery.md``): a target of the attack is farther from all codes
than a neighbour is, so its recall need not be equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import faiss
import numpy as np
import torch
from torch import Tensor

from gallery_index.errors import GalleryCorruptError, GalleryError
from gallery_index.info import GalleryInfo
from gallery_index.scoring import centre, norms, scores
from gallery_index.search import End, Exclusion
from gallery_index.storage import FileEntry, Folder
from gallery_index.table import layer_column, read_columns, vectors_of

_ROWS_AT_ONCE = 8192
_OVERFETCH = 64  # exclusions up to this many are dealt with by asking for more; beyond, FAISS is told of them


@dataclass(frozen=True)
class Plan:
    """How the layers' indexes are made and searched.

    Attributes:
        factory: of FAISS (``faiss.index_factory``), over unit vectors by inner product, e.g. ``IVF4096,SQ8``
            (https://github.com/facebookresearch/faiss/wiki/The-index-factory).
        search: FAISS's parameters of a search (``faiss.ParameterSpace``), e.g. ``nprobe=64``.
        candidates: that are scored exactly, for each query and end.
        train: rows of the sample that the index is trained on.
        seed: of that sample.
    """

    factory: str
    search: str = ""
    candidates: int = 100
    train: int = 100_000
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> Plan:
        return Plan(**body)


class Source:
    """The codes of a gallery that is being built, layer by layer.

    Args:
        folder: where the files are.
        files: with the codes, in order.
        mean: (L, D) float64.
        lengths: (L, N) float64, the codes' norms in this mode.
        mode: ``raw``, ``cosine`` or ``centred``.
    """

    def __init__(
        self, folder: Folder, files: Sequence[FileEntry], mean: np.ndarray, lengths: np.ndarray, mode: str
    ) -> None:
        self.folder, self.files, self.mean, self.lengths, self.mode = folder, files, mean, lengths, mode
        self.count, self.dim = lengths.shape[1], mean.shape[1]

    def codes(self, layer: int) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks of a layer's codes as given, with the row that each starts at."""
        start = 0
        for entry in self.files:
            column = layer_column(layer)
            table = read_columns(self.folder, entry.name, [column])
            codes = vectors_of(table, column, self.dim, f"{self.folder.url}: {entry.name}")
            for i in range(0, len(codes), _ROWS_AT_ONCE):
                yield start + i, codes[i : i + _ROWS_AT_ONCE]
            start += len(codes)

    def unit(self, layer: int) -> Iterator[tuple[int, np.ndarray]]:
        """The same, centred and normalised as the mode says."""
        mean = torch.from_numpy(self.mean[layer])
        for start, codes in self.codes(layer):
            centred = centre(torch.tensor(codes), mean, self.mode)
            if self.mode != "raw":
                centred = centred / torch.from_numpy(self.lengths[layer, start : start + len(codes)])[:, None]
            yield start, centred.float().numpy()

    def sample(self, layer: int, count: int, seed: int) -> np.ndarray:
        """Unit vectors of a random sample of rows, in order of rows."""
        wanted = np.random.default_rng([seed, layer]).permutation(self.count)[:count]
        wanted.sort()
        parts = []
        for start, unit in self.unit(layer):
            first, last = np.searchsorted(wanted, [start, start + len(unit)])
            parts.append(unit[wanted[first:last] - start])
        return np.concatenate(parts)

    def write_exact(self, layer: int, file: BinaryIO) -> None:
        """A layer's codes as given, as one .npy that can be mapped into memory."""
        header = {"descr": "<f4", "fortran_order": False, "shape": (self.count, self.dim)}
        np.lib.format.write_array_header_1_0(file, header)
        for _, codes in self.codes(layer):
            file.write(np.ascontiguousarray(codes, "<f4").data)


def write_index(source: Source, layer: int, plan: Plan, file: BinaryIO) -> None:
    """Train, fill and write one layer's index; memory: the sample, and the compressed codes."""
    index = faiss.index_factory(source.dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        index.train(source.sample(layer, min(plan.train, source.count), plan.seed))
    for _, unit in source.unit(layer):
        index.add(unit)
    faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


class CompressedLayer:
    """One layer of a finished gallery, searched by its compressed index; the twin of ``search.ExactSearch``.

    Args:
        folder: a local folder.
        index, exact: names of the layer's files.
        code_norms: (N,) float64.
        mean: (D,) float64.
        mode: ``raw``, ``cosine`` or ``centred``.
        rank: (N,) int64, each row's place in the order of ids.
        plan: how it was made.

    Raises:
        GalleryError: the folder is not on a local disk.
        GalleryCorruptError: the files are not what they should be.
    """

    def __init__(
        self,
        folder: Folder,
        index: str,
        exact: str,
        code_norms: Tensor,
        mean: Tensor,
        mode: str,
        rank: Tensor,
        plan: Plan,
    ) -> None:
        if not folder.local:
            raise GalleryError(f"{folder.url}: a compressed gallery is mapped from a local disk; copy it to one")
        self.norms, self.mean, self.mode, self.rank, self.plan = code_norms, mean, mode, rank, plan
        try:
            # "c": PyTorch does not know read-only arrays; nothing writes to it
            codes = np.load(folder.path(exact), mmap_mode="c", allow_pickle=False)
            # Lists of an IVF index stay on the disk, mapped; other kinds are read.
            self.index = faiss.read_index(folder.path(index), faiss.IO_FLAG_MMAP)
        except (OSError, ValueError, RuntimeError) as error:
            raise GalleryCorruptError(f"{folder.url}: {index}, {exact}: {error}") from error
        shape = (len(code_norms), len(mean))
        if codes.shape != shape or (self.index.ntotal, self.index.d) != shape or codes.dtype != np.float32:
            raise GalleryCorruptError(f"{folder.url}: {index}, {exact}: not of {shape} codes")
        self.codes = torch.from_numpy(codes)
        self.tune(plan.search)

    @classmethod
    def of(
        cls, folder: Folder, info: GalleryInfo, layer: int, code_norms: Tensor, mean: np.ndarray, rank: Tensor
    ) -> CompressedLayer:
        """A layer of a gallery that has compressed indexes."""
        plan = Plan.from_json(info.compression)
        names = info.indexes[layer], info.exact[layer]
        return cls(folder, *names, code_norms, torch.from_numpy(mean), info.mode, rank, plan)

    def tune(self, parameters: str) -> None:
        """Set FAISS's parameters of a search, e.g. ``nprobe=64``."""
        if parameters:
            faiss.ParameterSpace().set_index_parameters(self.index, parameters)

    def search(
        self, queries: Tensor, k: int, k_least: int, excluded: Exclusion, candidates: int | None = None
    ) -> tuple[End, End]:
        """As ``ExactSearch.search`` for one layer, by candidates: queries (Q, D), results (Q, k) and (Q, k_least).

        A query for which the index gives fewer rows than are wanted (lists that were probed held too few that are
        not excluded) is answered exactly, from all codes.
        """
        exact = centre(queries, self.mean, self.mode)
        length = norms(queries, self.mean, self.mode)
        unit = (exact / length[:, None]).float().numpy() if self.mode != "raw" else queries.numpy()
        hidden: list[np.ndarray] = [np.empty(0, np.int64)] * len(queries)
        if len(excluded.query):
            query, row = excluded.query.numpy(), excluded.row.numpy()
            order = np.argsort(query, kind="stable")
            hidden = np.split(row[order], np.searchsorted(query[order], np.arange(1, len(queries))))
        candidates = max(k, k_least, candidates or self.plan.candidates)
        ends = []
        for sign, wanted in ((1.0, k), (-1.0, k_least)):
            rows = self._candidates(sign * unit, hidden, min(candidates, len(self.norms)))
            ends.append(self._settle(exact, length, rows, sign, wanted, hidden))
        return ends[0], ends[1]

    def _candidates(self, unit: np.ndarray, hidden: list[np.ndarray], count: int) -> np.ndarray:
        """Rows (Q, C), -1 where there is none."""
        most = max((len(h) for h in hidden), default=0)
        if most <= _OVERFETCH:
            _, rows = self.index.search(np.ascontiguousarray(unit), min(count + most, len(self.norms)))
            for found, rows_hidden in zip(rows, hidden, strict=True):
                if len(rows_hidden):
                    found[np.isin(found, rows_hidden)] = -1
            return rows
        rows = np.full((len(unit), count), -1, np.int64)
        for i, rows_hidden in enumerate(hidden):
            selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(rows_hidden))
            _, rows[i : i + 1] = self.index.search(unit[i : i + 1].copy(), count, params=self._parameters(selector))
        return rows

    def _parameters(self, selector: faiss.IDSelector) -> faiss.SearchParameters:
        index = faiss.downcast_index(self.index)
        if isinstance(index, faiss.IndexPreTransform):
            inner = faiss.downcast_index(index.index)
            return faiss.SearchParametersPreTransform(index_params=_parameters_of(inner, selector))
        return _parameters_of(index, selector)

    def _settle(
        self, exact: Tensor, length: Tensor, rows: np.ndarray, sign: float, wanted: int, hidden: list[np.ndarray]
    ) -> End:
        """Score candidates exactly and sort them by score, then by id."""
        found = torch.from_numpy(rows)
        usable = found >= 0
        short = torch.nonzero(usable.sum(1) < wanted).flatten().tolist()
        found = torch.where(usable, found, 0)
        value = torch.empty(found.shape, dtype=torch.float64)
        for i in range(0, len(found), 16):  # memory: 16 queries' candidates at a time
            part = slice(i, i + 16)
            own = exact[part, None], length[part, None]
            value[part] = sign * scores(
                *own, self.codes[found[part]], self.norms[found[part]], self.mean, self.mode
            )
        value.masked_fill_(~usable, float("-inf"))
        order = self.rank[found].argsort(dim=1)
        order = order.gather(1, value.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :wanted]
        if order.shape[1] < wanted:
            order = torch.nn.functional.pad(order, (0, wanted - order.shape[1]))
        found, value = found.gather(1, order), value.gather(1, order)
        for query in short:
            found[query], value[query] = self._exhaustive(exact[query], length[query], sign, wanted, hidden[query])
        return End(found, sign * value)

    def _exhaustive(
        self, exact: Tensor, length: Tensor, sign: float, wanted: int, hidden: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        """All codes scored for one query (D,): rows and signed scores (wanted,), best first."""
        value = torch.empty(len(self.norms), dtype=torch.float64)
        for i in range(0, len(value), _ROWS_AT_ONCE):
            part = slice(i, i + _ROWS_AT_ONCE)
            value[part] = sign * scores(exact, length, self.codes[part], self.norms[part], self.mean, self.mode)
        value[torch.from_numpy(hidden)] = float("-inf")
        order = self.rank.argsort()
        order = order[value[order].argsort(descending=True, stable=True)[:wanted]]
        return order, value[order]


def _parameters_of(index: faiss.Index, selector: faiss.IDSelector) -> faiss.SearchParameters:
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    return faiss.SearchParameters(sel=selector)
