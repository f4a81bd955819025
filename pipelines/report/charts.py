"""Histograms as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.report.html import escape


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """With thousands' commas and a true minus; an en dash for none, a sign for infinity."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" + (f" {unit}" if unit else "")
    return f"{value:,.{digits}f}".replace("-", "−") + (f" {unit}" if unit else "")


def ticks_between(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers that cover a range: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def histogram_svg(
    counts: Sequence[int] | NDArray, edges: Sequence[float] | NDArray, ticks: Sequence[float], title: str, axis: str,
    words: str, marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A histogram with labelled axes, as an inline SVG under a heading.

    Args:
        counts, edges: n bars and their n + 1 edges.
        ticks: of the x axis, two or more; the first and the last are its ends.
        title: heading, and start of the picture's description.
        axis: label of the x axis, with its unit.
        words: what it shows, in a line below.
        marks: (x, words): dashed lines.
    """
    counts, (low, high) = np.asarray(counts), (ticks[0], ticks[-1])
    left, right, top, bottom, width, height = 58, 14, 16, 46, 520, 260
    inner_w, inner_h = width - left - right, height - top - bottom
    y_ticks = [t for t in ticks_between(0, max(int(counts.max()), 1), 5) if float(t).is_integer()]
    y_max = y_ticks[-1]

    def px(x: float) -> float:
        return left + inner_w * (x - low) / (high - low)

    def py(y: float) -> float:
        return top + inner_h * (1 - y / y_max)

    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    parts = []
    for t in y_ticks:
        parts.append(f'<line class=grid x1="{left}" x2="{width - right}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>'
                     f'<text x="{left - 6}" y="{py(t) + 4:.1f}" text-anchor=end>{t:,.0f}</text>')
    for t in ticks:
        parts.append(f'<line class=axis x1="{px(t):.1f}" x2="{px(t):.1f}" y1="{py(0)}" y2="{py(0) + 5}"/>'
                     f'<text x="{px(t):.1f}" y="{py(0) + 18}" text-anchor=middle>{number(t, digits)}</text>')
    for count, x0, x1 in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            parts.append(
                f'<rect class=bar x="{px(x0) + 0.5:.1f}" y="{py(count):.1f}" width="{px(x1) - px(x0) - 1:.1f}" '
                f'height="{py(0) - py(count):.1f}"><title>{number(x0, digits + 1)} to {number(x1, digits + 1)}: '
                f"{count:,}</title></rect>"
            )
    parts.append(f'<line class=axis x1="{left}" x2="{width - right}" y1="{py(0)}" y2="{py(0)}"/>')
    for x, label in marks:
        side = "end" if px(x) > left + inner_w / 2 else "start"
        parts.append(f'<line class=mark x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{top}" y2="{py(0)}"/>'
                     f'<text class=marked x="{px(x) + (-6 if side == "end" else 6):.1f}" y="{top + 10}" '
                     f"text-anchor={side}>{escape(label)}</text>")
    parts.append(f'<text x="{left + inner_w / 2}" y="{height - 8}" text-anchor=middle>{escape(axis)}</text>'
                 f'<text x="14" y="{top + inner_h / 2}" text-anchor=middle '
                 f'transform="rotate(-90 14 {top + inner_h / 2})">faces</text>')
    return (f"<div><h3>{escape(title)}</h3>"
            f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{escape(f"Histogram. {title}. {words}")}">'
            f"{''.join(parts)}</svg><p class=soft>{escape(words)}.</p></div>")
