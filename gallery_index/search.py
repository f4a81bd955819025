"""Exact search for both ends, layer by layer, in one pass over the codes.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gallery_index.scoring import centre, norms, scores

# Candidates beyond the k asked for: they make the second look of ``_widen`` rare.
_SPARE = 3
_MAX_QUERIES = 1024
_TOGETHER = 64  # pairs of a query and a layer up to which several layers are taken together
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

    def tile(self, times: int, count: int) -> Exclusion:
        """For ``count`` queries that were repeated as a whole, ``times`` times (``Tensor.repeat``)."""
        steps = torch.arange(times, device=self.query.device) * count
        return Exclusion((self.query[:, None] + steps).flatten(), self.row.repeat_interleave(times))

    def queries(self, start: int, stop: int) -> Exclusion:
        """For the queries start..stop - 1 alone, numbered from 0."""
        if not len(self.query):
            return self
        keep = (self.query >= start) & (self.query < stop)
        return Exclusion(self.query[keep] - start, self.row[keep])


class End(NamedTuple):
    """One end of a result: rows int64 and scores float64, best first along the last axis."""

    rows: Tensor
    scores: Tensor


class ExactSearch:
    """Codes of some layers, ready to be searched.

    Args:
        codes: (L, N, D) float32, finite.
        code_norms: (L, N) float64 from ``scoring.norms``, all positive.
        mean: (L, D) float64.
        mode: ``raw``, ``cosine`` or ``centred``.
        rank: (N,) int64, each row's place in the order of ids, by which ties are broken.
    """

    def __init__(self, codes: Tensor, code_norms: Tensor, mean: Tensor, mode: str, rank: Tensor) -> None:
        self.codes, self.norms, self.mean, self.mode, self.rank = codes, code_norms, mean, mode, rank
        self._inverse = None if mode == "raw" else code_norms.reciprocal().float()
        wild, spreads = [], []
        for layer in range(len(codes)):
            # An approximate score's error is at most a small multiple of this spread (see _slack).
            spread = code_norms[layer].clone() if mode != "cosine" else torch.ones_like(code_norms[layer])
            if mode == "centred":
                shift = mean[layer].square().sum().sqrt()
                spread = (spread + 2 * shift) / spread  # |x| <= |x - mu| + |mu|
            limit = _WILD_FACTOR * spread.median()
            top, order = spread.topk(min(_MAX_WILD, len(spread)))
            wild.append(order[top > limit].sort().values)
            spread[wild[-1]] = 0
            spreads.append(spread.max())
        self._spread = torch.stack(spreads)
        # (L, W), -1 where a layer has fewer than the others
        self._wild = torch.nn.utils.rnn.pad_sequence(wild, batch_first=True, padding_value=-1)

    @property
    def _slack(self) -> Tensor:
        """Largest error of an approximate score of a row that is not wild, (L,).

        D products and additions in float32, inputs rounded to the unit of the process's matrix
        products (TF32 or bfloat16 where someone allowed them), and eight more roundings.
        """
        unit = _UNIT_ROUNDOFF.get(torch.get_float32_matmul_precision(), 2.0**-8)
        return 1.01 * ((self.codes.shape[2] + 8) * 2.0**-24 + 2 * unit) * self._spread

    def query_norms(self, queries: Tensor) -> Tensor:
        """Float64 lengths (B, L) of queries (B, L, D) in this mode; 0 where there is no direction to compare."""
        return norms(queries, self.mean, self.mode)

    def search(self, queries: Tensor, k: int, k_least: int, excluded: Exclusion) -> tuple[End, End]:
        """For every layer on its own, the k most similar codes and the least similar ones.

        Args:
            queries: (B, L, D) float32, each with positive ``query_norms``.
            k, k_least: at least 1; at least so many rows are left for every query.
            excluded: pairs of query and row.

        Returns:
            most, rows and scores (B, L, k), and least (B, L, k_least).
        """
        count, layers = queries.shape[:2]
        if not count:
            return tuple(
                End(self.rank.new_empty(0, layers, wanted), self.norms.new_empty(0, layers, wanted))
                for wanted in (k, k_least)
            )
        together = max(1, _TOGETHER // max(1, min(count, _MAX_QUERIES)))
        columns: list[list[tuple[End, End]]] = []
        for first in range(0, layers, together):
            some = range(first, min(first + together, layers))
            ends = []
            for i in range(0, count, _MAX_QUERIES):
                part = queries[i : i + _MAX_QUERIES, some.start : some.stop].transpose(0, 1)  # layers outside
                size = part.shape[1]
                pairs = _Pairs(
                    self,
                    part.reshape(-1, part.shape[2]),
                    torch.arange(some.start, some.stop, device=queries.device).repeat_interleave(size),
                    excluded.queries(i, i + _MAX_QUERIES).tile(len(some), size),
                )
                found = self._search(pairs, k, k_least)
                ends.append(tuple(End(*(v.view(len(some), size, -1).transpose(0, 1) for v in e)) for e in found))
            columns.append([_join(ends, e, dim=0) for e in (0, 1)])
        return _join(columns, 0, dim=1), _join(columns, 1, dim=1)

    def _search(self, pairs: _Pairs, k: int, k_least: int) -> tuple[End, End]:
        most = _Running(k + max(_SPARE, k // 4), largest=True)
        least = _Running(k_least + max(_SPARE, k_least // 4), largest=False)
        rows = self.codes.shape[1]
        width = max(_MIN_BLOCK, _SCORES_PER_BLOCK // len(pairs.unit) // _GROUPS * _GROUPS)
        for start in range(0, rows, width):
            block, hide = self._block(pairs, start, min(start + width, rows))
            for end in (most, least):
                hide(end.never)
                end.offer(block, start)
        return self._settle(pairs, most, k), self._settle(pairs, least, k_least)

    def _block(self, pairs: _Pairs, start: int, stop: int) -> tuple[Tensor, Callable[[float], None]]:
        """Approximate scores of rows start..stop - 1: (Q, W), W rounded up to a multiple of the group size.

        Also returns a function that sets every entry that may not win (padding, exclusions, wild
        rows, which are scored exactly anyhow) to a value.
        """
        count, width = len(pairs.unit), -(-(stop - start) // _GROUPS) * _GROUPS
        scored = torch.empty(count, width, device=self.codes.device)
        view = scored[:, : stop - start]
        column = None
        with torch.autocast(self.codes.device.type, enabled=False):
            for layer, first, last in pairs.runs:
                codes, few, out = self.codes[layer, start:stop], pairs.unit[first:last], view[first:last]
                if last - first > 8:
                    torch.mm(few, codes.T, out=out)
                else:
                    # A few queries: with the codes on the left the product streams them at the memory's
                    # speed, except for one query alone (a matrix-vector product, 3 x slower on 2 cores).
                    if last - first == 1:
                        few = few.repeat(2, 1)  # (not `expand`: rows of stride 0 are 5 x slower)
                    if column is None or column.shape[1] != len(few):
                        column = torch.empty(stop - start, len(few), device=self.codes.device)
                    torch.mm(codes, few.T, out=column)
                    out.copy_(column.T[: last - first])
                if pairs.shift is not None:
                    out.sub_(pairs.shift[first:last])
                if self._inverse is not None:
                    out.mul_(self._inverse[layer, start:stop])
        query, row = pairs.excluded.part(start, stop)
        wild_query, wild_row = pairs.wild.part(start, stop)

        def hide(value: float) -> None:
            scored[:, stop - start :] = value
            if len(wild_row):
                scored[wild_query, wild_row - start] = value
            if len(row):
                scored[query, row - start] = value

        return scored, hide

    def _settle(self, pairs: _Pairs, end: _Running, wanted: int) -> End:
        """Score the candidates exactly, sort them, and look again where the bound does not prove the result."""
        sign = 1.0 if end.largest else -1.0
        usable = torch.isfinite(end.scores)
        rows = torch.where(usable, end.rows, 0)
        if self._wild.shape[1]:
            wild = self._wild[pairs.layer]
            usable = torch.cat((usable, pairs.allowed(wild) & (wild >= 0)), dim=1)
            rows = torch.cat((rows, wild.clamp(min=0)), dim=1)
        value = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
        step = max(1, _RESCORED_NUMBERS // (rows.shape[1] * self.codes.shape[2]))
        for i in range(0, len(rows), step):
            value[i : i + step] = sign * self._exact(pairs, slice(i, i + step), rows[i : i + step])
        value.masked_fill_(~usable, float("-inf"))
        order = self.rank[rows].argsort(dim=1)
        order = order.gather(1, value.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :wanted]
        rows, value = rows.gather(1, order), value.gather(1, order)

        # A row that is no candidate has an approximate score no better than the worst candidate's
        # (infinite where every row that is left is a candidate).
        worst = (sign * end.scores.double()).amin(dim=1)
        if end.scores.shape[1] >= self.codes.shape[1]:
            worst.fill_(float("-inf"))
        reached = value[:, -1] / (pairs.length if self.mode == "raw" else 1.0)
        slack = self._slack[pairs.layer]
        doubtful = torch.nonzero(reached <= worst + slack).flatten()
        for few in doubtful.split(_WIDENED_QUERIES) if len(doubtful) else ():
            rows[few], value[few] = self._widen(pairs.take(few), (reached - slack)[few], sign, wanted)
        return End(rows, sign * value)

    def _widen(self, pairs: _Pairs, threshold: Tensor, sign: float, wanted: int) -> tuple[Tensor, Tensor]:
        """Score every row exactly whose approximate score reaches the pair's threshold (Q,)."""
        wild = self._wild[pairs.layer]
        place = torch.nonzero(pairs.allowed(wild) & (wild >= 0))
        found = [torch.stack((place[:, 0], wild[place[:, 0], place[:, 1]]), dim=1)]
        width, count = _SCORES_PER_BLOCK // _WIDENED_QUERIES, self.codes.shape[1]
        for start in range(0, count, width):
            block, hide = self._block(pairs, start, min(start + width, count))
            hide(-sign * float("inf"))
            near = torch.nonzero(sign * block >= threshold[:, None])
            near[:, 1] += start
            found.append(near)
        query, row = torch.cat(found).T
        step = max(1, _RESCORED_NUMBERS // self.codes.shape[2])
        value = torch.cat([
            sign * self._exact(pairs, q, r[:, None])[:, 0]
            for q, r in zip(query.split(step), row.split(step), strict=True)
        ])  # fmt: skip
        order = self.rank[row].argsort()
        order = order[value[order].argsort(descending=True, stable=True)]
        order = order[query[order].argsort(stable=True)]
        first = torch.searchsorted(query[order], torch.arange(len(threshold), device=query.device))
        best = order[first[:, None] + torch.arange(wanted, device=query.device)]
        return row[best], value[best]

    def _exact(self, pairs: _Pairs, some: slice | Tensor, rows: Tensor) -> Tensor:
        """Exact scores (Q, R) of some pairs with the rows (Q, R)."""
        layer = pairs.layer[some, None]
        return scores(
            pairs.exact[some, None],
            pairs.length[some, None],
            self.codes[layer, rows],
            self.norms[layer, rows],
            self.mean[layer],
            self.mode,
        )


class _Pairs:
    """Pairs of a query and a layer, in order of layers, in the forms that the two steps need.

    Args:
        queries: (Q, D) float32.
        layer: (Q,) int64, ascending.
        excluded: rows that a pair may not return; its queries are pairs.
    """

    def __init__(self, search: ExactSearch, queries: Tensor, layer: Tensor, excluded: Exclusion) -> None:
        self.count, self.layer, self.excluded = search.codes.shape[1], layer, excluded
        mean = search.mean[layer]
        self.exact = centre(queries, mean, search.mode)
        self.length = norms(queries, mean, search.mode)
        unit = self.exact / self.length[:, None]
        self.unit = unit.float()
        self.shift = (unit * mean).sum(1, keepdim=True).float() if search.mode == "centred" else None
        self._wild_rows = search._wild
        self._set_runs()

    def _set_runs(self) -> None:
        layers, counts = torch.unique_consecutive(self.layer, return_counts=True)
        stops = counts.cumsum(0).tolist()
        self.runs = list(zip(layers.tolist(), [0, *stops[:-1]], stops, strict=True))
        query, column = torch.nonzero(self._wild_rows[self.layer] >= 0, as_tuple=True)
        row = self._wild_rows[self.layer[query], column]
        order = row.argsort()
        self.wild = Exclusion(query[order], row[order])

    def take(self, index: Tensor) -> _Pairs:
        """Some of the pairs (and their exclusions), in ascending order."""
        new = copy.copy(self)
        new.layer = self.layer[index]
        new.exact, new.length, new.unit = self.exact[index], self.length[index], self.unit[index]
        new.shift = None if self.shift is None else self.shift[index]
        place, which = torch.nonzero(index[:, None] == self.excluded.query, as_tuple=True)
        order = which.argsort()  # pairs stay sorted by row
        new.excluded = Exclusion(place[order], self.excluded.row[which[order]])
        new._set_runs()
        return new

    def allowed(self, rows: Tensor) -> Tensor:
        """Which of the rows (Q, R) each pair may return: (Q, R) bool."""
        key = torch.arange(len(self.unit), device=rows.device)[:, None] * self.count + rows
        return ~torch.isin(key, self.excluded.query * self.count + self.excluded.row)


def _join(parts: Sequence[tuple[End, End]], end: int, dim: int) -> End:
    return End(*(torch.cat([part[end][i] for part in parts], dim=dim) for i in (0, 1)))


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
