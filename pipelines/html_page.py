"""Pages of one file: untrusted text made safe, pictures embedded, histograms drawn, under a strict policy.

A content security policy allows nothing but the page's own style, script and embedded pictures.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import html
import io
import math
from collections.abc import Sequence
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
PICTURE_SIDE = 256

# Written out so that a name can neither hide a part of itself nor reverse the line that it stands in.
_SPELLED = {c: f"\\u{c:04x}" for c in (*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F),
                                       *range(0x2066, 0x206A), 0xFEFF, *range(0xD800, 0xE000))}


def escape(text: object) -> str:
    """Untrusted text as HTML, for content and for quoted attributes: escaped, invisible characters spelled out."""
    return html.escape(str(text).translate(_SPELLED), quote=True)


def name_html(text: object) -> str:
    """A path or name, kept apart from the direction of the text about it."""
    return f'<bdi class="name">{escape(text)}</bdi>'


def data_url(pixels: Pixels) -> str:
    """A picture, uint8 (H, W, 3), as a JPEG of at most `PICTURE_SIDE` px in a data URL."""
    image = Image.fromarray(pixels)
    if max(image.size) > PICTURE_SIDE:
        image = image.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BOX, reducing_gap=None)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90, subsampling="4:4:4", optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


class Budget:
    """Counts the pictures' characters; says no when they are used up."""

    def __init__(self, characters: int) -> None:
        self.left = characters

    def take(self, urls: Sequence[str]) -> bool:
        size = sum(map(len, urls))
        if size > self.left:
            return False
        self.left -= size
        return True


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


def _asset(name: str) -> str:
    return resources.files("pipelines").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def document(title: str, heading: str, header: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """The page.

    Args:
        title: plain text; heading: plain text; header: HTML below it.
        sections: (id, plain title, HTML).
        footer: who wrote it, after "Written TIME".
    """
    style, script = _asset("report.css"), _asset("report.js")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    nav = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in sections)
    body = "".join(f'<section aria-labelledby="{key}"><h2 id="{key}">{name}</h2>{content}</section>'
                   for key, name, content in sections)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'<a class=skip href="#{sections[0][0]}">Skip to the content</a>'
        f"<header><h1>{escape(heading)}</h1>{header}"
        f'<nav aria-label="Sections"><ul>{nav}</ul></nav></header><main>{body}</main>'
        f"<footer>Written {now} {footer}.</footer><script>{script}</script></body></html>\n"
    )
