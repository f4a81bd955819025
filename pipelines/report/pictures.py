"""Pictures inside a page, as data URLs within a budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
PICTURE_SIDE = 256
AMPLIFICATION = 10  # of the differences that are shown
LOSSLESS_SIDE = 256  # px; larger windows are stored as JPEG 95, which keeps every pixel's place
HEAT_TOP = 4.0  # JOD lost, where the colours of a heat map end
_HEAT = np.array([[255, 240, 120], [250, 150, 30], [205, 20, 40], [120, 0, 90]], np.float32)  # nothing to much


def encoded(image: Image.Image, form: str, **options: Any) -> str:
    """A picture as it is in a data URL. form: `JPEG` or `PNG`; options: of Pillow's `save`."""
    out = io.BytesIO()
    image.save(out, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(out.getvalue()).decode("ascii")


def data_url(pixels: Pixels) -> str:
    """A picture, uint8 (H, W, 3), as a JPEG of at most `PICTURE_SIDE` px in a data URL."""
    image = Image.fromarray(pixels)
    if max(image.size) > PICTURE_SIDE:
        image = image.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BOX, reducing_gap=None)
    return encoded(image, "JPEG", quality=90, subsampling="4:4:4", optimize=True)


def window_url(pixels: Pixels) -> str:
    """A face's window, uint8 (H, W, 3), in its own pixels in a data URL: as a PNG up to `LOSSLESS_SIDE` px, above as a
    JPEG 95 without subsampling."""
    image = Image.fromarray(pixels)
    if max(image.size) <= LOSSLESS_SIDE:
        return encoded(image, "PNG", optimize=True)
    return encoded(image, "JPEG", quality=95, subsampling="4:4:4", optimize=True)


def heat_colours(share: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colours of a heat map and how much of them is seen.

    Args:
        share: of the scale, any shape; below 0 and above 1 it is clipped.

    Returns:
        colours (..., 3), 0 to 255, that grow darker all along, for those who see no colours; opacity (..., 1), 0 to
        0.85.
    """
    share = np.clip(share, 0, 1)[..., None]
    place = share * (len(_HEAT) - 1)
    low = np.minimum(place.astype(int)[..., 0], len(_HEAT) - 2)
    colours = _HEAT[low] + (_HEAT[low + 1] - _HEAT[low]) * (place - low[..., None])
    return colours, np.minimum(0.85, share * 3.4).astype(np.float32)


def heat_map(original: Pixels, lost: NDArray[np.float32]) -> Pixels:
    """Where a change is seen, laid over the original in grey.

    Args:
        original: uint8 (H, W, 3). lost: float32 (H, W), JOD lost at each pixel (`scol_ops.visibility.jod_map`).

    Returns:
        uint8 (H, W, 3); colours from 0 to `HEAT_TOP`.
    """
    grey = original.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    colours, opacity = heat_colours(lost / HEAT_TOP)
    return np.round(grey[..., None] * (1 - opacity) + colours * opacity).astype(np.uint8)


def heat_scale(steps: int = 9) -> list[tuple[float, str]]:
    """The colours over mid grey: (JOD lost at the step's lower end, as SVG writes the colour)."""
    shares = np.arange(steps, dtype=np.float32) / (steps - 1)
    colours, opacity = heat_colours(shares)
    mixed = np.round(128 * (1 - opacity) + colours * opacity).astype(int).tolist()
    return [(HEAT_TOP * share, f"rgb({r},{g},{b})") for share, (r, g, b) in zip(shares.tolist(), mixed, strict=True)]


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
    """`label`: below it; `alt`: what it shows, for those who do not see it; `width`, `height`: of a window in its own
    pixels, 0 for a crop that is shown in whatever size fits."""

    url: str
    label: str
    alt: str
    width: int = 0
    height: int = 0


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

    @property
    def own_pixels(self) -> bool:
        """Whether the pictures are windows in the photo's own pixels."""
        return bool(self.pictures) and self.pictures[0].width > 0


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


def look(original: Pixels, protected: Pixels, third: Pixels, label: str, alt: str, name: str, budget: Budget) -> tuple[
    Picture, ...
]:  # fmt: skip
    """Windows of a face in the photo's own pixels, uint8 (H, W, 3) each; none where the budget is used up.

    Args:
        original, protected: what is compared. third: what tells of the change, with its `label` and `alt`.
        name: whose, for those who do not see it.
    """
    urls = [window_url(original), window_url(protected), window_url(third)]
    if not budget.take(urls):
        return ()
    words = (("original", "Original"), ("protected", "Protected"), (label, alt))
    height, width = original.shape[:2]
    return tuple(Picture(u, w, f"{a}: {name}", width, height) for u, (w, a) in zip(urls, words, strict=True))
