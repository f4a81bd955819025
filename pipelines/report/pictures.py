"""Pictures inside a page, as data URLs within a budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
PICTURE_SIDE = 256
AMPLIFICATION = 10  # of the differences that are shown


def data_url(pixels: Pixels) -> str:
    """A picture, uint8 (H, W, 3), as a JPEG of at most `PICTURE_SIDE` px in a data URL."""
    image = Image.fromarray(pixels)
    if max(image.size) > PICTURE_SIDE:
        image = image.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BOX, reducing_gap=None)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90, subsampling="4:4:4", optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def difference(a: Pixels, b: Pixels, amplification: float = AMPLIFICATION) -> Pixels:
    """|a - b| times `amplification`, uint8 of their shape, clipped at 255: black where nothing changed."""
    return np.clip(np.abs(b.astype(np.int16) - a) * amplification, 0, 255).astype(np.uint8)


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


class Picture(NamedTuple):
    """`label`: below it; `alt`: what it shows, for those who do not see it."""

    url: str
    label: str
    alt: str


@dataclass(frozen=True)
class FaceFigure:
    """A face as the macro `figure` shows it.

    Attributes:
        name: whose, as plain text that nobody has checked; so is `reason`.
        words: measures.
        pictures: before, after, difference; or none.
        status: `weak`, `ok`: how `reason` is coloured.
    """

    name: str
    words: str
    pictures: tuple[Picture, ...] = ()
    status: str = ""
    reason: str = ""


def triple(
    pixels: Sequence[Pixels], name: str, budget: Budget, labels: tuple[str, str] = ("before", "after")
) -> tuple[Picture, ...]:
    """Before, after and difference of a face, uint8 (S, S, 3) each, as pictures; none where the budget is used up."""
    urls = [data_url(p) for p in pixels]
    if not budget.take(urls):
        return ()
    labels = (*labels, f"difference × {AMPLIFICATION}")
    words = ("Original", "Protected", f"Difference, {AMPLIFICATION} times amplified")
    return tuple(Picture(url, label, f"{w}: {name}") for url, label, w in zip(urls, labels, words, strict=True))
