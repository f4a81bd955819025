"""Exact search for both ends of one layer in one pass over its codes.

Two steps, because a float32 product is fast but its last bits depend on the machine, the batch and
the BLAS, and near ties would then come out in another order:

1. A blocked float32 product over the codes as stored, with running candidates at both ends.  For
   the mode ``centred`` nothing is copied: ``(q - mu) . (x - mu) = (q - mu) . x - (q - mu) . mu``.
2. The few candidates are scored again in float64 in a fixed order of additions
   (``scoring.scores``) and sorted by score, then by id.

The result is proven, not hoped for: with the standard bound on a float32 dot product's error
(Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1) no code outside the candidates can
reach the k-th one, or else (many near ties) all codes within the bound are scored again.  So the
answer equals a float64 search over all codes with ties broken by id, for every batch size, block
size, thread count and device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gallery_index.scoring import centre, norms, scores

# Candidates beyond the k asked for: they make the second look of ``_widen`` rare.
_SPARE = 6
_MAX_QUERIES = 1024
_SCORES_PER_BLOCK = 1 << 22
_MIN_BLOCK = 2048
_GROUPS = 32
_RESCORED_NUMBERS = 1 << 18
_WIDENED_QUERIES = 8
# Codes whose float32 score may be far off (they lie very near the mean) are scored exactly for every query.
_MAX_WILD = 64
_WILD_FACTOR = 8.0
_UNIT_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}


@dataclass(frozen=True)
class Exclusion:
    """Pairs (query, row) that may not be returned, sorted by row: two int64 tensors (P,)."""

    query: Tensor
    row: Tensor

    @staticmethod
    def none(device: torch.device) -> Exclusion:
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return Exclusion(empty, empty)

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The pairs with start <= row < stop."""
        bounds = torch.tensor([start, stop], device=self.row.device)
        first, last = torch.searchsorted(self.row, bounds).tolist()
        return self.query[first:last], self.row[first:last]

    def repeat(self, times: int) -> Exclusion:
        """For queries that were repeated ``times`` times each (``repeat_interleave``)."""
        steps = torch.arange(times, device=self.query.device)
        return Exclusion((self.query[:, None] * times + steps).flatten(), self.row.repeat_interleave(times))

    def queries(self, start: int, stop: int) -> Exclusion:
        """For the queries start..stop - 1 alone, numbered from 0."""
        if not len(self.query):
            return self
        keep = (self.query >= start) & (self.query < stop)
        return Exclusion(self.query[keep] - start, self.row[keep])


@dataclass(frozen=True)
class End:
    """One end of a layer's result: rows (Q, k) int64 and scores (Q, k) float64, best first."""

    rows: Tensor
    scores: Tensor


class LayerSearch:
    """One layer's codes, ready to be searched.

    Args:
        codes: (N, D) float32, finite.
        code_norms: (N,) float64 from ``scoring.norms``, all positive.
        mean: (D,) float64.
        mode: ``raw``, ``cosine`` or ``centred``.
        rank: (N,) int64, each row's place in the order of ids, by which ties are broken.
    """

    def __init__(self, codes: Tensor, code_norms: Tensor, mean: Tensor, mode: str, rank: Tensor) -> None:
        self.codes, self.norms, self.mean, self.mode, self.rank = codes, code_norms, mean, mode, rank
        self._inverse = None if mode == "raw" else code_norms.reciprocal().float()
        # An approximate score's error is at most eta times this spread (see _eta).
        spread = code_norms.clone() if mode != "cosine" else torch.ones_like(code_norms)
        if mode == "centred":
            shift = mean.square().sum().sqrt()
            spread = (code_norms + 2 * shift) / code_norms  # |x| <= |x - mu| + |mu|
        limit = _WILD_FACTOR * spread.median()
        top, order = spread.topk(min(_MAX_WILD, len(spread)))
        self._wild = order[top > limit].sort().values
        calm = spread.clone()
        calm[self._wild] = 0
        self._spread = float(calm.max())

    @property
    def _slack(self) -> float:
        """Largest error of an approximate score of a row that is not wild.

        D products and additions in float32, inputs rounded to the unit of the process's matrix
        products (TF32 or bfloat16 where someone allowed them), and eight more roundings.
        """
        unit = _UNIT_ROUNDOFF.get(torch.get_float32_matmul_precision(), 2.0**-8)
        return 1.01 * ((self.codes.shape[1] + 8) * 2.0**-24 + 2 * unit) * self._spread

    def query_norms(self, queries: Tensor) -> Tensor:
        """Float64 lengths (Q,) of queries (Q, D) in this mode; 0 where there is no direction to compare."""
        return norms(queries, self.mean, self.mode)

    def search(self, queries: Tensor, k: int, k_least: int, excluded: Exclusion) -> tuple[End, End]:
        """The k most similar codes and the least similar ones.

        Args:
            queries: (Q, D) float32, each with positive ``query_norms``.
            k, k_least: at least 1; at least so many rows are left for every query.
            excluded: pairs of query and row.

        Returns:
            most (Q, k) and least (Q, k_least).
        """
        parts = [
            self._search(queries[i : i + _MAX_QUERIES], k, k_least, excluded.queries(i, i + _MAX_QUERIES))
            for i in range(0, len(queries), _MAX_QUERIES)
        ]
        most, least = (
            End(torch.cat([p[e].rows for p in parts]), torch.cat([p[e].scores for p in parts])) for e in (0, 1)
        )
        return most, least

    def _search(self, queries: Tensor, k: int, k_least: int, excluded: Exclusion) -> tuple[End, End]:
        batch = _Queries(self, queries, excluded)
        most = _Running(k + max(_SPARE, k // 4), largest=True)
        least = _Running(k_least + max(_SPARE, k_least // 4), largest=False)
        width = max(_MIN_BLOCK, _SCORES_PER_BLOCK // len(queries) // _GROUPS * _GROUPS)
        for start in range(0, len(self.codes), width):
            block, hide = self._block(batch, start, min(start + width, len(self.codes)))
            for end in (most, least):
                hide(end.never)
                end.offer(block, start)
        return self._settle(batch, most, k), self._settle(batch, least, k_least)

    def _block(self, batch: _Queries, start: int, stop: int) -> tuple[Tensor, Callable[[float], None]]:
        """Approximate scores of rows start..stop - 1: (Q, W), W rounded up to a multiple of the group size.

        Also returns a function that sets every entry that may not win (padding, exclusions, wild
        rows, which are scored exactly anyhow) to a value.
        """
        count, width = len(batch.unit), -(-(stop - start) // _GROUPS) * _GROUPS
        scored = torch.empty(count, width, device=self.codes.device)
        codes, view = self.codes[start:stop], scored[:, : stop - start]
        with torch.autocast(self.codes.device.type, enabled=False):
            if count <= 8:
                # A few queries: with the codes on the left the product streams them at the memory's
                # speed, except for one query alone (a matrix-vector product, 1.8 x slower on 2 cores).
                few = batch.unit if count > 1 else batch.unit.repeat(2, 1)
                view.copy_((codes @ few.T).T[:count])
            else:
                torch.mm(batch.unit, codes.T, out=view)
        if batch.shift is not None:
            view.sub_(batch.shift)
        if self._inverse is not None:
            view.mul_(self._inverse[start:stop])
        query, row = batch.excluded.part(start, stop)
        wild = self._wild[(self._wild >= start) & (self._wild < stop)] - start

        def hide(value: float) -> None:
            scored[:, stop - start :] = value
            if len(wild):
                scored[:, wild] = value
            if len(row):
                scored[query, row - start] = value

        return scored, hide

    def _settle(self, batch: _Queries, end: _Running, wanted: int) -> End:
        """Score the candidates exactly, sort them, and look again where the bound does not prove the result."""
        sign = 1.0 if end.largest else -1.0
        usable = torch.isfinite(end.scores)
        rows = torch.where(usable, end.rows, 0)
        if len(self._wild):
            rows = torch.cat((rows, self._wild.expand(len(rows), -1)), dim=1)
            usable = torch.cat((usable, batch.allowed(self._wild)), dim=1)
        value = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
        step = max(1, _RESCORED_NUMBERS // (rows.shape[1] * self.codes.shape[1]))
        for i in range(0, len(rows), step):
            part = slice(i, i + step)
            value[part] = sign * self._exact(batch.exact[part, None], batch.length[part, None], rows[part])
        value.masked_fill_(~usable, float("-inf"))
        order = self.rank[rows].argsort(dim=1)
        order = order.gather(1, value.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :wanted]
        rows, value = rows.gather(1, order), value.gather(1, order)

        # A row that is no candidate has an approximate score no better than the worst candidate's
        # (infinite where every row that is left is a candidate).
        worst = (sign * end.scores.double()).amin(dim=1)
        if end.scores.shape[1] >= len(self.codes):
            worst.fill_(float("-inf"))
        reached = value[:, -1] / (batch.length if self.mode == "raw" else 1.0)
        doubtful = torch.nonzero(reached <= worst + self._slack).flatten()
        for few in doubtful.split(_WIDENED_QUERIES) if len(doubtful) else ():
            rows[few], value[few] = self._widen(batch.take(few), reached[few] - self._slack, sign, wanted)
        return End(rows, sign * value)

    def _widen(self, batch: _Queries, threshold: Tensor, sign: float, wanted: int) -> tuple[Tensor, Tensor]:
        """Score every row exactly whose approximate score reaches the query's threshold (Q,)."""
        pairs = [torch.nonzero(batch.allowed(self._wild))]
        pairs[0][:, 1] = self._wild[pairs[0][:, 1]]
        width = _SCORES_PER_BLOCK // _WIDENED_QUERIES
        for start in range(0, len(self.codes), width):
            block, hide = self._block(batch, start, min(start + width, len(self.codes)))
            hide(-sign * float("inf"))
            near = torch.nonzero(sign * block >= threshold[:, None])
            near[:, 1] += start
            pairs.append(near)
        query, row = torch.cat(pairs).T
        step = max(1, _RESCORED_NUMBERS // self.codes.shape[1])
        value = torch.cat([
            sign * self._exact(batch.exact[q], batch.length[q], r)
            for q, r in zip(query.split(step), row.split(step), strict=True)
        ])  # fmt: skip
        order = self.rank[row].argsort()
        order = order[value[order].argsort(descending=True, stable=True)]
        order = order[query[order].argsort(stable=True)]
        first = torch.searchsorted(query[order], torch.arange(len(threshold), device=query.device))
        best = order[first[:, None] + torch.arange(wanted, device=query.device)]
        return row[best], value[best]

    def _exact(self, query: Tensor, length: Tensor, rows: Tensor) -> Tensor:
        return scores(query, length, self.codes[rows], self.norms[rows], self.mean, self.mode)


class _Queries:
    """A batch of queries in the forms that the two steps need."""

    def __init__(self, layer: LayerSearch, queries: Tensor, excluded: Exclusion) -> None:
        self.count, self.excluded = len(layer.codes), excluded
        self.exact = centre(queries, layer.mean, layer.mode)
        self.length = layer.query_norms(queries)
        unit = self.exact / self.length[:, None]
        self.unit = unit.float()
        self.shift = (unit @ layer.mean).float()[:, None] if layer.mode == "centred" else None

    def take(self, index: Tensor) -> _Queries:
        """Some of the queries (and their exclusions)."""
        new = copy.copy(self)
        new.exact, new.length, new.unit = self.exact[index], self.length[index], self.unit[index]
        new.shift = None if self.shift is None else self.shift[index]
        place, which = torch.nonzero(index[:, None] == self.excluded.query, as_tuple=True)
        order = which.argsort()  # pairs stay sorted by row
        new.excluded = Exclusion(place[order], self.excluded.row[which[order]])
        return new

    def allowed(self, rows: Tensor) -> Tensor:
        """Which of rows (R,) each query may return: (Q, R) bool."""
        key = torch.arange(len(self.unit), device=rows.device)[:, None] * self.count + rows
        return ~torch.isin(key, self.excluded.query * self.count + self.excluded.row)


class _Running:
    """The best ``count`` approximate scores seen so far for each query, and their rows."""

    def __init__(self, count: int, largest: bool) -> None:
        self.count, self.largest, self.never = count, largest, float("-inf") if largest else float("inf")
        self.scores = self.rows = torch.empty(0)

    def offer(self, block: Tensor, start: int) -> None:
        found, rows = _best(block, self.count, self.largest)
        rows = rows + start
        if self.scores.numel():
            found, rows = torch.cat((self.scores, found), dim=1), torch.cat((self.rows, rows), dim=1)
            found, place = found.topk(min(self.count, found.shape[1]), dim=1, largest=self.largest, sorted=False)
            rows = rows.gather(1, place)
        self.scores, self.rows = found, rows


def _best(block: Tensor, count: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Top ``count`` of each row of (Q, W), unsorted: values and columns (Q, min(count, W)).

    The ``count`` best entries lie in the ``count`` groups with the best maximum, and group maxima
    cost one vectorised pass: 3 x faster than ``topk`` on whole rows of 20,000 on a CPU.
    """
    width = block.shape[1] // _GROUPS
    if count >= width // 2:
        return block.topk(min(count, block.shape[1]), dim=1, largest=largest, sorted=False)
    groups = block.view(len(block), _GROUPS, width)
    peak = groups.amax(1) if largest else groups.amin(1)
    chosen = peak.topk(count, dim=1, largest=largest, sorted=False).indices
    inside = groups.gather(2, chosen[:, None].expand(-1, _GROUPS, -1)).flatten(1)
    found, place = inside.topk(count, dim=1, largest=largest, sorted=False)
    return found, place // count * width + chosen.gather(1, place % count)
