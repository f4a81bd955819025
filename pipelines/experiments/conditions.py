"""How hard a photo is to recognise, by numbers that can be measured: the turn of the head, the light; and things in
front of the face, which are drawn, since data sets such as LFW do not say whose face is covered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from scol_ops.filters import LUMA

Pixels = NDArray[np.uint8]

EASY, POSE, DARK, FLAT, SIDE, COVERED = "easy", "pose", "dark", "flat", "side-lit", "covered"
CONDITIONS = (EASY, POSE, DARK, FLAT, SIDE, COVERED)
WORDS = {
    EASY: "extreme in nothing that is measured",
    POSE: "the head turned most to a side",
    DARK: "the lowest luminance, of the light or of the complexion",
    FLAT: "the lowest contrast",
    SIDE: "one half of the face much brighter than the other",
    COVERED: "the easy photos with glasses or a mask drawn over the face",
}


@dataclass(frozen=True)
class Hardness:
    """What is measured of a face.

    yaw: where the nose is between the eyes, in distances of the eyes: 0 in the middle, positive to the image's right;
    about half the sine of the head's turn.  roll: of the line between the eyes, in degrees.  luminance: mean of the
    crop's luma, 0 to 1.  contrast: its standard deviation (RMS contrast: Peli, JOSA A 7, 1990), 0 to 0.5.
    side: difference of the right and the left half's luma, in shares of their sum: -1 to 1.  Luminance is the light's
    and the complexion's alike; the halves of a face have one complexion.
    """

    yaw: float
    roll: float
    luminance: float
    contrast: float
    side: float


def hardness(landmarks: NDArray, crop: Pixels) -> Hardness:
    """Of a face's landmarks (5, 2), in the photo's pixels, and its crop, of which the middle half counts: the face."""
    left, right, nose = np.asarray(landmarks, np.float64).reshape(5, 2)[:3]
    across = right - left
    length = float(np.linalg.norm(across))
    side = len(crop)
    luma = crop[side // 4 : side - side // 4, side // 4 : side - side // 4] @ LUMA / 255
    halves = [float(half.mean()) for half in np.array_split(luma, 2, axis=1)]
    return Hardness(
        float((nose - (left + right) / 2) @ across / length**2),
        float(np.degrees(np.arctan2(across[1], across[0]))),
        float(luma.mean()),
        float(luma.std()),
        (halves[1] - halves[0]) / max(sum(halves), 1e-6),
    )


def pick(found: Mapping[str, Hardness], count: int) -> dict[str, list[str]]:
    """Condition -> the names that have it most, hardest first; a name may be in several.

    Args:
        found: by name.
        count: of each condition, at most.
    """
    names = sorted(found)
    shaded = {n: abs(found[n].side) for n in names}
    turned = {n: abs(found[n].yaw) for n in names}
    ranks = [
        _ranks(turned),
        _ranks(shaded),
        _ranks({n: abs(found[n].luminance - _median(names, found, "luminance")) for n in names}),
        _ranks({n: abs(found[n].contrast - _median(names, found, "contrast")) for n in names}),
    ]
    easy = sorted(names, key=lambda n: max(rank[n] for rank in ranks))[:count]  # extreme in nothing
    return {
        EASY: easy,
        POSE: sorted(names, key=lambda n: -turned[n])[:count],
        DARK: sorted(names, key=lambda n: found[n].luminance)[:count],
        FLAT: sorted(names, key=lambda n: found[n].contrast)[:count],
        SIDE: sorted(names, key=lambda n: -shaded[n])[:count],
        COVERED: easy,
    }


def _ranks(values: Mapping[str, float]) -> dict[str, int]:
    """How many are below each."""
    return dict(zip(values, np.searchsorted(np.sort([*values.values()]), [*values.values()]).tolist(), strict=True))


def _median(names: Sequence[str], found: Mapping[str, Hardness], measure: str) -> float:
    return float(np.median([getattr(found[n], measure) for n in names]))


def cover(photo: Pixels, landmarks: NDArray, number: int) -> Pixels:
    """The photo with dark glasses over the eyes (even numbers) or a pale mask over nose and mouth (odd ones).

    Args:
        photo: uint8 (H, W, 3).
        landmarks: (5, 2) in its pixels.
    """
    left, right, nose, left_mouth, right_mouth = np.asarray(landmarks, np.float64).reshape(5, 2)
    across = right - left
    length = np.linalg.norm(across)
    x = across / length
    y = np.array([-x[1], x[0]])  # down the face
    image = Image.fromarray(photo)
    draw = ImageDraw.Draw(image)

    def points(centre: NDArray, corners: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [tuple(centre + length * (a * x + b * y)) for a, b in corners]

    if number % 2 == 0:
        round_ = [(0.42 * np.cos(t), 0.3 * np.sin(t)) for t in np.linspace(0, 2 * np.pi, 40)]
        for eye in (left, right):
            draw.polygon(points(eye, round_), fill=(24, 24, 28))
        bar = [(-0.95, -0.1), (0.95, -0.1), (0.95, 0.02), (-0.95, 0.02)]
        draw.polygon(points((left + right) / 2, bar), fill=(24, 24, 28))
    else:
        mouth = (left_mouth + right_mouth) / 2
        rise = float((nose - mouth) @ y) / length  # to the nose's tip, negative
        mask = [(-0.95, rise - 0.1), (0, rise - 0.3), (0.95, rise - 0.1), (0.75, 0.45), (0, 0.75), (-0.75, 0.45)]
        draw.polygon(points(mouth, mask), fill=(196, 212, 222))
    return np.asarray(image)
