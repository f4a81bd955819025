"""What a person sees of a change: JOD of ColorVideoVDP, where it is seen, and the window of a face that counts.

Mantiuk et al., "ColorVideoVDP: A visual difference predictor for image, video and display distortions" (SIGGRAPH 2024),
by the authors' package ``cvvdp``.  JOD is "just objectionable difference": 10 is no difference, and at 9 three of four
viewers who see both pictures tell them apart.  Pictures here are numpy uint8 (H, W, 3) RGB, sRGB, as in ``metrics``.

The package's own ``__init__`` wants ffmpeg, Hugging Face's hub, matplotlib and more, for videos and a metric of another
kind.  ``_package`` loads the still pictures' part alone, at the first call (torchvision takes seconds).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray

from scol_ops.metrics import check_pair

DISPLAYS = ("standard_fhd", "standard_4k")
_COLUMNS = {"standard_fhd": "jod", "standard_4k": "jod_4k"}
WINDOW_SHARE = 0.6  # of a crop's side
_NAME = "pycvvdp"
_LEAST_SIDE = 8  # px; below, the pyramid has no band but its base
_MOST_SIDE = 1080  # px, the height of the smaller display; a square of it takes about 1.5 s of a core, 0.7 GB
_JODS = 10.0  # of the raw heat map's 1
# A metric keeps its last picture's pyramid, and ``sys.modules`` is everybody's.
_lock = threading.RLock()


class OutsideError(ValueError):
    """A face's window that lies wholly beside the photo."""


def jod(reference: NDArray[np.uint8], test: NDArray[np.uint8], display: str = "standard_fhd") -> float:
    """How different two pictures look to a person who sees both, by ColorVideoVDP.

    Where a side is below 8 px the pictures are mirrored until it has 8.  Where one is above 1080 px both are shrunk by
    area until it has 1080: nobody sees more of them at once on the smaller display, and time and memory grow with the
    pixels.

    Args:
        reference, test: uint8 (H, W, 3), sRGB.
        display: the screen, seen from twice its height: ``standard_fhd``, 24 inches, 1920 x 1080, 38 pixels a degree of
            visual angle; ``standard_4k``, 30 inches, 3840 x 2160, 75 pixels a degree.

    Returns:
        JOD: 10 for equal pictures, less for a larger difference; it can fall below 0.

    Raises:
        ValueError: wrong types or shapes, a display that is not one of ``DISPLAYS``.
    """
    with _lock, torch.no_grad():
        score, _ = _predicted(reference, test, display, None)
    return score


def jod_map(
    reference: NDArray[np.uint8], test: NDArray[np.uint8], display: str = "standard_fhd"
) -> NDArray[np.float32]:
    """Where two pictures look different: JOD lost at each pixel.

    Arguments, sizes, source and errors as those of ``jod``; where the pictures are shrunk the map is enlarged again.

    Returns:
        float32 (H, W), 0 to 10: 0 where nothing is seen, 1 where the difference, were it the same all over the
        picture, would cost about 1 JOD.  Steps of half precision, as the package keeps it.
    """
    with _lock, torch.no_grad():
        _, lost = _predicted(reference, test, display, "raw")
    height, width = reference.shape[:2]
    if lost.shape[0] > height or lost.shape[1] > width:
        lost = lost[:height, :width]
    if lost.shape != (height, width):
        lost = F.interpolate(lost[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
    return np.ascontiguousarray(lost.numpy(), np.float32)


def face_window(quad: ArrayLike, width: int, height: int) -> tuple[int, int, int, int]:
    """The part of a photo in which a face is looked at: the middle 60 % (by side) of its FFHQ crop, upright.

    Brows to chin, with little hair and background beside it, whose sameness would flatter every measure.

    Args:
        quad: 8 numbers or (4, 2), the crop's corners in the photo as of ``alignment.ffhq_quads``: a square, which may
            be turned; the window is not, it has the square's centre and 0.6 of its side.
        width, height: of the photo, px.

    Returns:
        left, top, right, bottom in px, left and top rounded down, right and bottom up, clipped to the photo, so that
        ``photo[top:bottom, left:right]`` is the window.

    Raises:
        OutsideError: a ValueError; the window lies wholly beside the photo. ValueError: not 8 finite numbers.
    """
    corners = np.asarray(quad, np.float64)
    if corners.size != 8 or not np.isfinite(corners).all():
        raise ValueError(f"quad must be 8 finite numbers, got {np.asarray(quad).shape}")
    corners = corners.reshape(4, 2)
    half = WINDOW_SHARE * math.dist(corners[0], corners[1]) / 2
    x, y = corners.mean(0).tolist()
    left, right = max(0, math.floor(x - half)), min(width, math.ceil(x + half))
    top, bottom = max(0, math.floor(y - half)), min(height, math.ceil(y + half))
    if left >= right or top >= bottom:
        raise OutsideError(f"the window about ({x:.1f}, {y:.1f}) lies outside the photo of {width} x {height} px")
    return left, top, right, bottom


def face_jod(
    reference: NDArray[np.uint8], test: NDArray[np.uint8], quad: ArrayLike, displays: Iterable[str] = DISPLAYS
) -> dict[str, float | None]:
    """``jod`` of a face's window in two photos of one size: `jod` on the display ``standard_fhd``, `jod_4k` on
    ``standard_4k``.

    Args:
        reference, test: uint8 (H, W, 3), sRGB, whole photos.
        quad: of ``face_window``.
        displays: which of ``DISPLAYS``.

    Returns:
        JOD; None where the window lies wholly beside the photo: nothing of it can be seen.

    Raises:
        ValueError: wrong types or shapes, not 8 finite numbers.
    """
    check_pair(reference, test)
    try:
        left, top, right, bottom = face_window(quad, reference.shape[1], reference.shape[0])
    except OutsideError:
        return {_COLUMNS[display]: None for display in displays}
    before, after = (np.ascontiguousarray(photo[top:bottom, left:right]) for photo in (reference, test))
    return {_COLUMNS[display]: jod(before, after, display) for display in displays}


def _predicted(
    reference: NDArray[np.uint8], test: NDArray[np.uint8], display: str, heatmap: str | None
) -> tuple[float, Any]:
    """JOD, and (h, w) JOD lost of the pictures that were compared where a heat map is wanted."""
    check_pair(reference, test)
    if display not in DISPLAYS:
        raise ValueError(f"display must be one of {', '.join(DISPLAYS)}, got {display!r}")
    pair = [_fitted(picture) for picture in (test, reference)]
    score, stats = _metric(display, heatmap).predict(*pair, dim_order="HWC")
    return float(score), stats["heatmap"][0, 0, 0].float() * _JODS if heatmap else None


def _fitted(picture: NDArray[np.uint8]) -> NDArray:
    """The picture with sides of 8 to 1080 px: uint8, or float32 0 to 1 where it was shrunk (levels between count)."""
    height, width = picture.shape[:2]
    short = [(0, max(0, _LEAST_SIDE - side)) for side in (height, width)]
    if any(after for _, after in short):
        picture = np.pad(picture, (*short, (0, 0)), "symmetric")
    largest = max(picture.shape[:2])
    if largest > _MOST_SIDE:
        size = [max(_LEAST_SIDE, round(side * _MOST_SIDE / largest)) for side in picture.shape[:2]]
        values = torch.from_numpy(np.ascontiguousarray(picture)).movedim(2, 0)[None].float()
        picture = F.interpolate(values / 255, size, mode="area")[0].movedim(0, 2).numpy()
    return np.ascontiguousarray(picture)


@functools.cache
def _metric(display: str, heatmap: str | None) -> Any:
    """The package's metric for one display; it loads at the first call."""
    return _package().cvvdp(display_name=display, heatmap=heatmap, quiet=True, device=torch.device("cpu"))


@functools.cache
def _package() -> ModuleType:
    """The package's module ``cvvdp_metric``, without its ``__init__`` and what only videos need.

    Raises:
        ModuleNotFoundError: ``cvvdp`` is not installed.
    """
    # Before anything is lent in its place: it reads many modules, and one of them may be among those lent.
    importlib.import_module("torchvision.transforms")
    with _lock:
        spec = importlib.util.find_spec(_NAME)
        if spec is None:
            raise ModuleNotFoundError("cvvdp is not installed: pip install --no-deps -r requirements-nodeps.txt")
        lent = {
            _NAME: importlib.util.module_from_spec(spec),  # not executed: a bare package with its path
            # Writes videos, with ffmpeg and imageio.
            f"{_NAME}.dump_channels": _placeholder(f"{_NAME}.dump_channels", "DumpChannels"),
            # Imported and not used; the first looks for compilers and warns, the second asks the system.
            "torch.utils.benchmark": _placeholder("torch.utils.benchmark"),
            "third_party": _placeholder("third_party"),
            "third_party.cpuinfo": _placeholder("third_party.cpuinfo", "cpuinfo"),
        }
        with _lending(lent):
            # The package finds its own file as a module of this plain name, by way of ``sys.path``.
            sys.modules["interp"] = importlib.import_module(f"{_NAME}.interp")
            module = importlib.import_module(f"{_NAME}.cvvdp_metric")
            mine = [part for name, part in sys.modules.items() if name.startswith(f"{_NAME}.")]
    # It logs with the functions of ``logging``, which set up the root logger where nobody has; and it warns of any dark
    # picture, whose light it takes for not scaled.
    logger = logging.getLogger(_NAME)
    logger.setLevel(logging.ERROR)
    for part in mine:
        if getattr(part, "logging", None) is logging:
            part.logging = logger  # type: ignore[attr-defined]
    return module


def _placeholder(name: str, *members: str) -> ModuleType:
    module = ModuleType(name)
    for member in members:
        setattr(module, member, None)
    return module


@contextmanager
def _lending(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Has ``sys.modules`` hold these; afterwards it and ``sys.path`` are as they were, so that an import of the whole
    package elsewhere finds what it expects."""
    def names() -> list[str]:
        return [n for n in sys.modules if n in modules or n == "interp" or n == _NAME or n.startswith(f"{_NAME}.")]

    before, path = {name: sys.modules.pop(name) for name in names()}, list(sys.path)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names():
            del sys.modules[name]
        sys.modules.update(before)
        sys.path[:] = path
