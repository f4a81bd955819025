"""Rows of pictures with words below them, as one page of HTML and as one PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipelines.report import html
from pipelines.report.pictures import Budget, data_url

Pixels = NDArray[np.uint8]
Rows = Sequence[Sequence[str]]  # of a table, the head first

AMPLIFICATION = 10
_PAGE_CHARACTERS = 40_000_000
_RIGHT, _WRONG = (27, 110, 60), (179, 38, 30)


@dataclass(frozen=True)
class Cell:
    """A picture, uint8 (H, W, 3), or None where there is none; lines of words; `right`: framed as right or wrong."""

    pixels: Pixels | None
    words: tuple[str, ...]
    right: bool | None = None

    @property
    def side(self) -> int:
        """Of the picture on the page, px."""
        return min(256, max(self.pixels.shape[:2]))

    def framed(self, side: int) -> Image.Image:
        """The picture at `side` px, its frame drawn inside."""
        image = Image.fromarray(self.pixels).resize((side, side), Image.Resampling.LANCZOS)
        if self.right is None:
            return image
        border = max(2, side // 28)
        inner = image.resize((side - 2 * border,) * 2, Image.Resampling.LANCZOS)
        return ImageOps.expand(inner, border, _RIGHT if self.right else _WRONG)


@dataclass(frozen=True)
class Strip:
    """A row of pictures. `name`: whose, as plain text that nobody has checked; `words`: below the name."""

    name: str
    cells: tuple[Cell, ...]
    words: str = ""


@dataclass(frozen=True)
class Figure:
    """What a figure shows. `notes`: paragraphs of plain text; `tables`: a caption and rows each; `numbers`: of its JSON
    file."""

    name: str
    title: str
    notes: tuple[str, ...]
    tables: tuple[tuple[str, Rows], ...]
    strips: tuple[Strip, ...] = field(repr=False)
    numbers: Mapping[str, Any] = field(default_factory=dict, repr=False)


def difference(a: Pixels, b: Pixels) -> Pixels:
    """|a - b| times `AMPLIFICATION`, clipped: black where nothing changed."""
    return np.clip(np.abs(a.astype(np.int16) - b) * AMPLIFICATION, 0, 255).astype(np.uint8)


def write_png(figure: Figure, file: Path, side: int = 144) -> None:
    """The strips one below the other, their words below each picture."""
    gap, size, margin = 8, 13, 150
    font = ImageFont.load_default(size)
    most = max(len(strip.cells) for strip in figure.strips)
    heights = [side + (size + 4) * max(len(c.words) for c in s.cells) + 2 * gap for s in figure.strips]
    sheet = Image.new("RGB", (margin + most * (side + gap) + gap, sum(heights) + gap), "white")
    draw, top = ImageDraw.Draw(sheet), gap
    for strip, height in zip(figure.strips, heights, strict=True):
        label = "\n".join(_fitting(line, font, margin - 2 * gap) for line in (strip.name, *strip.words.split("\n")))
        draw.multiline_text((gap, top + side / 2), label, "black", font, anchor="lm")
        for column, cell in enumerate(strip.cells):
            left = margin + column * (side + gap)
            if cell.pixels is not None:
                sheet.paste(cell.framed(side), (left, top))
            for line, words in enumerate(cell.words):
                where = (left + side / 2, top + side + 3 + line * (size + 4))
                draw.text(where, _fitting(words, font, side), "black", font, anchor="ma")
        top += height
    sheet.save(file, optimize=True)


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut where it is too wide."""
    text = text.encode("ascii", "replace").decode()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def to_html(figure: Figure) -> str:
    """The page, which needs no other file (template: sheet.html)."""
    budget, strips = Budget(_PAGE_CHARACTERS), []
    for strip in figure.strips:
        urls = ["" if c.pixels is None else data_url(np.asarray(c.framed(c.side))) for c in strip.cells]
        if not budget.take(urls):
            break
        strips.append((strip, urls))
    return html.render("experiments/sheet.html", figure=figure, strips=strips)
