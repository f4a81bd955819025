"""The judge: a recogniser that the method never works through looks at faces in files as anybody would read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.config.sections import Config
from pipelines.photos.photo import Photo
from pipelines.stages.crops import to_tensor
from scol_ops.distortions import NONE, Distortion
from scol_ops.metrics import ism
from scol_ops.models.recognisers import Recogniser
from scol_ops.strengthening import Bars, Seen

_BLOCK = 16  # px: a window that begins at a multiple has its JPEG blocks where the whole photo has them


def bars_of(config: Config, judge: Recogniser) -> Bars:
    """What the judge may see of a face at most."""
    own = judge.threshold if judge.hidden_below is None else judge.hidden_below
    saved = {None: own, "threshold": judge.threshold}.get(config.publish.max_ism, config.publish.max_ism)
    distorted = config.publish.max_ism_distorted
    return Bars(saved, saved if distorted is None else distorted)


@dataclass(frozen=True, eq=False)
class Window:
    """The part of a photo about a face, so that a large photo is not distorted, or made a float tensor, as a whole.

    Attributes:
        pixels: uint8 (H, W, 3).
        landmarks, box: (1, 5, 2) and (1, 4) in the window's pixels.
    """

    pixels: np.ndarray
    landmarks: Tensor
    box: Tensor

    def distorted(self, distortion: Distortion) -> Window:
        """What messengers and sites make of it."""
        pixels, place = distortion(self.pixels)
        landmarks = place.points(self.landmarks.double().numpy())
        box = place.points(self.box.double().numpy().reshape(1, 2, 2)).reshape(1, 4)
        return Window(pixels, torch.from_numpy(landmarks).float(), torch.from_numpy(box).float())

    def embed(self, network: Recogniser) -> Tensor:
        """(1, D), unit norm."""
        with torch.no_grad():
            return network.embed_photo(to_tensor(self.pixels), self.landmarks, self.box)


class Place:
    """Where the window of a face lies: all that the recognisers' alignments sample, unless the photo ends there.

    Args:
        row: with ``align.quad``, ``align.box``, ``align.landmarks``, in the photo's pixels.
        width, height: of the photo.
    """

    def __init__(self, row: Mapping[str, Any], width: int, height: int) -> None:
        quad = np.array(row["align.quad"], np.float64).reshape(4, 2)
        box = np.array(row["align.box"], np.float64).reshape(2, 2)
        points = np.concatenate([quad, box])
        low, high = points.min(0), points.max(0)
        margin = 0.25 * (high - low).max() + 2
        left, top = (max(0, int(v) // _BLOCK * _BLOCK) for v in np.floor(low - margin))
        right, bottom = (int(v) for v in np.ceil(high + margin))
        self._rows, self._columns = slice(top, min(height, bottom + 1)), slice(left, min(width, right + 1))
        shift = np.array([left, top])
        landmarks = np.array(row["align.landmarks"], np.float64).reshape(1, 5, 2) - shift
        self._landmarks = torch.from_numpy(landmarks).float()
        self._box = torch.from_numpy((box - shift).reshape(1, 4)).float()

    def of(self, photo: Photo) -> Window:
        return Window(photo.pixels[self._rows, self._columns], self._landmarks, self._box)


def look(network: Recogniser, own: Tensor, window: Window, names: Iterable[str]) -> Seen:
    """What a recogniser sees of a face in a file, as it is and after each of these transformations.

    Args:
        own: (1, D), of the face in the original.
        window: of the file.
        names: of ``distortions.Distortion``.
    """
    cosines = {}
    for name in dict.fromkeys((NONE, *names)):
        cosines[name] = float(ism(own, window.distorted(Distortion(name)).embed(network))[0])
    return Seen(cosines)


def reason_of_weakness(judge: str, seen: Seen, bars: Bars, distorted: bool) -> str | None:
    """Why a face is weak, with the numbers, or None where it is not.

    Args:
        distorted: what the judge sees after transformations decides as well.
    """
    above = seen.above(bars) if distorted else None
    after = "" if above in (None, NONE) else f"after {above} "
    if seen.saved > bars.saved:
        more = f"; {after}{seen.cosines[above]:.3f}, above {bars.distorted:.3f}" if after else ""
        return f"WEAK_IDENTITY: {judge} sees cosine {seen.saved:.3f} to the original, above {bars.saved:.3f}{more}"
    if not after:
        return None
    words = f"{after}cosine {seen.cosines[above]:.3f} to the original, above {bars.distorted:.3f}"
    return f"WEAK_DISTORTED: {judge} sees {words} (as saved {seen.saved:.3f})"
