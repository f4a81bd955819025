"""What happens to a picture on its way through messengers, sites and screens: recompression, resizing, blur, cropping.

These are the real codecs (Pillow's), for measuring what is left of a protection; ``diversity`` has differentiable
cousins for working against it.  Pictures are numpy uint8 (H, W, 3) RGB.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Pixels = NDArray[np.uint8]
SEPARATOR = "+"
# Without any, a recogniser sees the file itself.
NONE = "none"
STANDARD = (
    "jpeg95", "jpeg75", "jpeg50", "webp75", "half", "blur1", "screenshot", "jpeg75+half", "screenshot+jpeg75",
)  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """Where a picture's points lie afterwards: ``p' = scale * (p + 0.5 - origin) - 0.5``, x and y in pixels.

    Pixel centres are at integer coordinates, so half a pixel is added before scaling and taken off after it.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    origin: tuple[float, float] = (0.0, 0.0)

    def points(self, points: NDArray) -> NDArray[np.float64]:
        """(..., 2) x, y before -> after."""
        return (np.asarray(points, np.float64) + 0.5 - self.origin) * self.scale - 0.5

    def then(self, later: Placement) -> Placement:
        """The placement of both, one after the other."""
        scale = tuple(a * b for a, b in zip(self.scale, later.scale, strict=True))
        parts = zip(self.origin, later.origin, self.scale, strict=True)
        origin = tuple(first + second / s for first, second, s in parts)
        return Placement(scale, origin)


def _codec(format: str, quality: int) -> Callable[[Image.Image], tuple[Image.Image, Placement]]:
    def run(image: Image.Image) -> tuple[Image.Image, Placement]:
        buffer = io.BytesIO()
        image.save(buffer, format, quality=quality)
        buffer.seek(0)
        with Image.open(buffer, formats=(format,)) as again:
            return again.convert("RGB"), Placement()

    return run


def _there_and_back(percent: float) -> Callable[[Image.Image], tuple[Image.Image, Placement]]:
    def run(image: Image.Image) -> tuple[Image.Image, Placement]:
        size = tuple(max(1, round(side * percent / 100)) for side in image.size)
        small = image.resize(size, Image.Resampling.BICUBIC)
        return small.resize(image.size, Image.Resampling.BICUBIC), Placement()

    return run


def _blur(sigma: float) -> Callable[[Image.Image], tuple[Image.Image, Placement]]:
    return lambda image: (image.filter(ImageFilter.GaussianBlur(sigma)), Placement())


def _screenshot(crop: float, scale: float) -> Callable[[Image.Image], tuple[Image.Image, Placement]]:
    def run(image: Image.Image) -> tuple[Image.Image, Placement]:
        width, height = image.size
        left, top = crop * width, crop * height
        box = (left, top, width - left, height - top)
        size = tuple(max(1, round(scale * (high - low))) for low, high in ((box[0], box[2]), (box[1], box[3])))
        place = Placement((size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1])), (left, top))
        return image.resize(size, Image.Resampling.BILINEAR, box=box), place

    return run


_STEP = re.compile(r"(jpeg|webp|resize|blur|half|screenshot)(\d+(?:\.\d+)?)?")


def _step(text: str) -> Callable[[Image.Image], tuple[Image.Image, Placement]]:
    match = _STEP.fullmatch(text)
    kind, number = match.groups() if match else (None, None)
    value = None if number is None else float(number)
    if kind in ("jpeg", "webp") and value is not None and value.is_integer() and 1 <= value <= 100:
        return _codec(kind.upper(), int(value))
    if kind == "resize" and value is not None and 5 <= value <= 400:
        return _there_and_back(value)
    if kind == "blur" and value is not None and 0 < value <= 20:
        return _blur(value)
    if kind == "half" and value is None:
        return _there_and_back(50)
    if kind == "screenshot" and value is None:
        return _screenshot(0.03, 0.8)
    raise ValueError(
        f"unknown distortion {text!r}; there are jpegQ and webpQ (quality 1..100), half, resizeP (to P %, 5..400, and "
        "back), blurS (Gaussian, S px, above 0, at most 20), screenshot, and chains of them joined by +"
    )


@dataclass(frozen=True)
class Distortion:
    """A chain of steps, by its name: ``jpeg75``, ``jpeg75+half``; ``none`` changes nothing.

    ``jpegQ``, ``webpQ``: through that codec at quality Q (chroma at half size, as most encoders do).  ``half``: to half
    size and back, bicubic.  ``resizeP``: the same with P %.  ``blurS``: Gaussian of sigma S px.  ``screenshot``: 3 %
    cut off at each edge and the rest shown at 80 %, bilinear.  A chain runs from left to right.

    Raises:
        ValueError: a step that is not known, or a number out of range.
    """

    name: str

    def __post_init__(self) -> None:
        self._steps()

    def _steps(self) -> list[Callable[[Image.Image], tuple[Image.Image, Placement]]]:
        return [] if self.name == NONE else [_step(text) for text in self.name.split(SEPARATOR)]

    def __call__(self, pixels: Pixels) -> tuple[Pixels, Placement]:
        """The distorted picture, and where the points of the given one lie in it."""
        image, place = Image.fromarray(np.ascontiguousarray(pixels)), Placement()
        for step in self._steps():
            image, moved = step(image)
            place = place.then(moved)
        return np.asarray(image.convert("RGB")), place
