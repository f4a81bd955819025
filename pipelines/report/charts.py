"""Numbers, tiles and histograms of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """With thousands' commas and a true minus; an en dash for none, a sign for infinity."""
    if value is None or math.isnan(value):
        return "–"
    text = "∞" if math.isinf(value) else f"{value:,.{digits}f}".replace("-", "−")
    return f"{text} {unit}" if unit else text


class Tile(NamedTuple):
    """A figure under its name. `small`: after it, in small print; `kind`: `ok`, `weak`, `error`, which colour it."""

    name: str
    value: str
    kind: str = ""
    small: str = ""


def ticks_between(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers that cover a range: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Histogram:
    """A histogram with labelled axes, laid out for the macro `histogram`.

    Attributes:
        title: heading, and start of the picture's description.
        words: what it shows, in a line below.
        axis: label of the x axis, with its unit.
        bars: (x, y, width, height, words), in px like all that follow; none: there is no picture.
        x_ticks, y_ticks: (place, words).
        marks: (x, words, on the left): dashed lines.
    """

    title: str
    words: str
    axis: str = ""
    bars: tuple[tuple[float, float, float, float, str], ...] = ()
    x_ticks: tuple[tuple[float, str], ...] = ()
    y_ticks: tuple[tuple[float, str], ...] = ()
    marks: tuple[tuple[float, str, bool], ...] = ()
    width, height, left, right, top, bottom = 520, 260, 58, 506, 16, 214  # px: the picture, the plot in it

    @classmethod
    def of(
        cls, counts: Sequence[int] | NDArray, edges: Sequence[float] | NDArray, ticks: Sequence[float], title: str,
        axis: str, words: str, marks: Sequence[tuple[float, str]] = (),
    ) -> Histogram:
        """Lay one out.

        Args:
            counts, edges: n bars and their n + 1 edges, ascending.
            ticks: of the x axis, two or more; the first and the last are its ends.
            title, axis, words: see the class.
            marks: (x, words).
        """
        counts = np.asarray(counts)
        heights = [t for t in ticks_between(0, max(int(counts.max()), 1), 5) if float(t).is_integer()]
        digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))

        def px(x: float) -> float:
            return float(cls.left + (cls.right - cls.left) * (x - ticks[0]) / (ticks[-1] - ticks[0]))

        def py(y: float) -> float:
            return float(cls.top + (cls.bottom - cls.top) * (1 - y / heights[-1]))

        bars = [
            (px(x0) + 0.5, py(count), px(x1) - px(x0) - 1, cls.bottom - py(count),
             f"{number(x0, digits + 1)} to {number(x1, digits + 1)}: {count:,}")
            for count, x0, x1 in zip(counts, edges[:-1], edges[1:], strict=True) if count
        ]  # fmt: skip
        middle = (cls.left + cls.right) / 2
        return cls(
            title, words, axis, tuple((*(round(v, 1) for v in bar[:4]), bar[4]) for bar in bars),
            tuple((round(px(t), 1), number(t, digits)) for t in ticks),
            tuple((round(py(t), 1), f"{t:,.0f}") for t in heights),
            tuple((round(px(x), 1), label, px(x) > middle) for x, label in marks),
        )  # fmt: skip
