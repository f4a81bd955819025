"""Windows of faces as they are looked at: the photo's own pixels, cut on pixel boundaries and never resampled."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from pipelines.report.pictures import Pixels
from scol_ops.visibility import WINDOW_SHARE, face_window

LARGEST = 640  # px; of a larger window its middle is shown, so that two of them fit a screen


def window_of(
    quad: ArrayLike, width: int, height: int, share: float = WINDOW_SHARE, largest: int = LARGEST
) -> tuple[int, int, int, int]:
    """The upright square about the middle of a face's FFHQ crop that is shown, cut to the photo.

    Args:
        quad: 8 numbers or (4, 2), the crop's corners in the photo as of `alignment.ffhq_quads`.
        width, height: of the photo, px.
        share: the window's side by the crop's. largest: its longest side, px.

    Returns:
        left, top, right, bottom in px: `photo[top:bottom, left:right]` is the window.

    Raises:
        ValueError: not 8 finite numbers, or a window that lies wholly beside the photo.
    """
    corners = np.asarray(quad, np.float64).reshape(4, 2)
    middle, side = corners.mean(0), math.dist(corners[0], corners[1])
    wanted = min(share * side, largest - 1.0)  # rounding outwards adds a pixel
    return face_window(middle + (corners - middle) * (wanted / (WINDOW_SHARE * side) if side else 1.0), width, height)


def windows_of(
    one: Pixels, two: Pixels, quad: ArrayLike, share: float = WINDOW_SHARE
) -> tuple[Pixels, Pixels] | None:
    """A face's window in two photos, uint8 (H, W, 3), that show the same; None where these have not one size, or the
    face lies beside them.

    Args:
        quad, share: as of `window_of`.
    """
    if one.shape != two.shape:
        return None
    try:
        left, top, right, bottom = window_of(quad, one.shape[1], one.shape[0], share)
    except ValueError:
        return None
    before, after = (np.ascontiguousarray(photo[top:bottom, left:right]) for photo in (one, two))
    return before, after
