"""Sums over any number of faces: means with confidence intervals, and distributions, in one pass.

Intervals are bootstrap percentiles over people: faces of one person are alike, so people are drawn, not faces, with all
their faces (Field and Welsh, "Bootstrapping clustered data", JRSS B 69, 2007).  A person's draws are of a
multinomial, made piece by piece, so that nothing has to be kept but sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` faces of `people` people, and the 95 % bootstrap interval (None for fewer than two people)."""

    value: float
    low: float | None
    high: float | None
    n: int
    people: int

    def to_dict(self) -> dict[str, float | int | None]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n, "people": self.people}


def wilson(successes: float, n: int) -> dict[str, float | int] | None:
    """A share and its 95 % interval (Wilson, "Probable inference, the law of succession, and statistical inference",
    JASA 22, 1927), as if all answers were independent.

    Args:
        successes: 0 to n; halves are allowed.
        n: answers.

    Returns:
        `value`, `low`, `high` in 0 to 1, and `n`; None where nobody answered.
    """
    if not n:
        return None
    z, share = 1.959964, successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return {"value": share, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "n": n}


class ClusterBootstrap:
    """Means of many quantities over faces, with intervals over people.

    Args:
        names: of the quantities.
        people: how many people there will be, exactly.
        resamples: bootstrap samples.
        seed: of the draws.
    """

    def __init__(self, names: Sequence[str], people: int, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.names, self.resamples = list(names), resamples
        self._people_left, self._people = people, people
        self._draws_left = np.full(resamples, people, np.int64)
        self._rng = np.random.default_rng(seed)
        size = len(self.names)
        self._sum, self._count = np.zeros(size), np.zeros(size, np.int64)
        self._having = np.zeros(size, np.int64)  # people with a face that has the quantity
        self._drawn_sum, self._drawn_count = np.zeros((resamples, size)), np.zeros((resamples, size))

    def add(self, people: Sequence[str], values: NDArray[np.float64]) -> None:
        """All faces of some people.

        Args:
            people: whose face each row is; none of them may come in another call.
            values: (faces, quantities); NaN where a face does not have it.

        Raises:
            ValueError: shapes that do not agree, or more people than were promised.
        """
        if values.shape != (len(people), len(self.names)):
            raise ValueError(f"{values.shape} values for {len(people)} faces and {len(self.names)} quantities")
        names, code = np.unique(np.asarray(people, str), return_inverse=True)
        if len(names) > self._people_left:
            raise ValueError(f"more than {self._people} people")
        known = ~np.isnan(values)
        filled = np.where(known, values, 0.0)
        self._sum += filled.sum(0)
        self._count += known.sum(0)
        sums, counts = np.zeros((len(names), len(self.names))), np.zeros((len(names), len(self.names)))
        np.add.at(sums, code, filled)
        np.add.at(counts, code, known)
        self._having += (counts > 0).sum(0)
        for first in range(0, len(names), 256):
            some = slice(first, min(len(names), first + 256))
            number = some.stop - some.start
            # How many of the draws that are left fall to these people, then to each of them.
            here = self._rng.binomial(self._draws_left, number / self._people_left)
            weights = self._rng.multinomial(here, np.full(number, 1 / number))
            self._draws_left -= here
            self._people_left -= number
            self._drawn_sum += weights @ sums[some]
            self._drawn_count += weights @ counts[some]

    def estimates(self) -> dict[str, Estimate | None]:
        """By name; None where no face had the quantity.

        Raises:
            ValueError: fewer people came than were promised.
        """
        if self._people_left:
            raise ValueError(f"{self._people_left} of {self._people} people are missing")
        out: dict[str, Estimate | None] = {}
        for i, name in enumerate(self.names):
            if not self._count[i]:
                out[name] = None
                continue
            low = high = None
            some = self._drawn_count[:, i] > 0
            if self._having[i] > 1 and some.any():
                means = self._drawn_sum[some, i] / self._drawn_count[some, i]
                low, high = (float(v) for v in np.percentile(means, [2.5, 97.5]))
            out[name] = Estimate(
                float(self._sum[i] / self._count[i]), low, high, int(self._count[i]), int(self._having[i])
            )
        return out


class Distribution:
    """A histogram that grows; quantiles to the width of a bin.

    Args:
        low, high: range; what lies outside is counted in the first or the last bin, infinity in `infinite`.
        bins: their number.
    """

    def __init__(self, low: float, high: float, bins: int = 2000) -> None:
        self.low, self.high = low, high
        self.counts = np.zeros(bins, np.int64)
        self.infinite = 0

    def add(self, values: NDArray[np.float64]) -> None:
        values = values[~np.isnan(values)]
        finite = values[np.isfinite(values)]
        self.infinite += len(values) - len(finite)
        place = (finite - self.low) / (self.high - self.low) * len(self.counts)
        self.counts += np.bincount(np.clip(place, 0, len(self.counts) - 1).astype(int), minlength=len(self.counts))

    def quantile(self, share: float) -> float | None:
        """The middle of the bin in which that share of the finite values is reached; None without any."""
        total = int(self.counts.sum())
        if not total:
            return None
        bin = int(np.searchsorted(np.cumsum(self.counts), max(1, math.ceil(share * total))))
        return self.low + (bin + 0.5) * (self.high - self.low) / len(self.counts)

    def to_dict(self, shares: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> dict[str, float | int | None]:
        found: Mapping[str, float | None] = {f"p{round(100 * s)}": self.quantile(s) for s in shares}
        return {"n": int(self.counts.sum()), "infinite": self.infinite, **found}

    def coarse(self, bins: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Counts and edges in fewer bins over the range that is used, for drawing."""
        used = np.flatnonzero(self.counts)
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        if not len(used):
            return np.zeros(1, np.int64), np.array([self.low, self.high])
        step = max(1, math.ceil((used[-1] + 1 - used[0]) / bins))
        starts = np.arange(used[0], used[-1] + 1, step)
        return np.add.reduceat(self.counts, starts), np.append(
            edges[starts], edges[min(len(edges) - 1, starts[-1] + step)]
        )
