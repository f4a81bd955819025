"""Pictures inside a page, as data URLs within a budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
PICTURE_SIDE = 256


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
