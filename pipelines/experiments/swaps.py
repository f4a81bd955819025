"""What a face swapper makes of protected sources: DSR and deepfake PSNR, from folders of its outputs.

The outputs are somebody's (SimSwap, FaceDancer, ...) or the embedded oracle's (`oracle.py`).

DSR (defence success rate): share of sources whose swap, made from the protected photo, is no longer recognised as the
source: its cosine to the unprotected original is at or below the recogniser's threshold (false accept rate 1 % over
    LFW's pairs, its card).
Told beside it: the same share for swaps made from the originals, without which it is worth little, and DSR among the
sources whose original's swap is recognised.  Deepfake PSNR: between the swap made from the original and the one made
from the protected photo (dB; lower is better protected).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.archive.paths import SourceError
from pipelines.archive.reading import read_bytes
from pipelines.archive.source import list_photos
from pipelines.evaluate.measure import Eyes, central_window
from pipelines.evaluate.pairs import stem
from pipelines.photos.codec import decode
from pipelines.photos.photo import PhotoError
from scol_ops.metrics import psnr
from scol_ops.warp import GeometryError


@dataclass(frozen=True)
class SwapFigures:
    """By recogniser: `dsr`, `without`, the same share of swaps made from unprotected sources, and `of_recognised`, DSR
    of the sources whose unprotected swap is recognised (none: no entry). `deepfake_psnr`: dB. `swapper`: who made them.

    `sources`: compared. `missing`: originals without both swaps. `unreadable`: a file cannot be read, or the source
    shows no face. `no_face`: swaps that show none, which count as defended.
    """

    dsr: dict[str, float]
    without: dict[str, float]
    deepfake_psnr: float | None
    sources: int
    missing: int
    unreadable: int
    no_face: int
    of_recognised: dict[str, float] = field(default_factory=dict)
    swapper: str = "folder"


def measure_swaps(
    originals: str | Path,
    of_originals: str | Path,
    of_protected: str | Path,
    recognisers: Sequence[str],
    swapper: str = "folder",
) -> SwapFigures:
    """Compare two folders of swaps, paired with the originals by relative path without suffix.

    Raises:
        SourceError: a folder that cannot be listed. ValueError: no source has both swaps.
    """
    trees = [
        {stem(row.path): row.url for row in list_photos(str(t)) if row.error is None}
        for t in (originals, of_originals, of_protected)
    ]
    eyes = Eyes(recognisers)
    known: dict[str, list[bool]] = {name: [] for name in recognisers}
    before: dict[str, list[bool]] = {name: [] for name in recognisers}
    quality: list[float] = []
    missing = unreadable = no_face = 0
    for name, url in sorted(trees[0].items()):
        if name not in trees[1] or name not in trees[2]:
            missing += 1
            continue
        swaps = [tree[name] for tree in trees[1:]]
        try:
            pictures = [decode(read_bytes(swap)).pixels for swap in swaps]
            source, _ = eyes.embed_central(url)
            found = [_embed(eyes, swap) for swap in swaps]
        except (PhotoError, SourceError, GeometryError):
            unreadable += 1
            continue
        if source is None:
            unreadable += 1
            continue
        if pictures[0].shape == pictures[1].shape:
            quality.append(psnr(*pictures))
        no_face += found[1] is None
        for number, network in enumerate(eyes.networks):
            for swap, table in zip(found, (before, known), strict=True):
                same = swap is not None and float(source[number] @ swap[number]) > network.threshold
                table[network.name].append(same)
    sources = len(known[recognisers[0]])
    if not sources:
        raise ValueError(f"no original of {originals} has a swap in both {of_originals} and {of_protected}")
    finite = [q for q in quality if np.isfinite(q)]
    return SwapFigures(
        {name: float(1 - np.mean(flags)) for name, flags in known.items()},
        {name: float(1 - np.mean(flags)) for name, flags in before.items()},
        float(np.mean(finite)) if finite else None,
        sources,
        missing,
        unreadable,
        no_face,
        {name: 1 - sum(flags) / len(flags) for name in recognisers if (flags := _where(known[name], before[name]))},
        swapper,
    )


def _embed(eyes: Eyes, url: str) -> list[NDArray[np.float32]] | None:
    """The middle face's embeddings; None where a photo shows no face. Raises GeometryError."""
    window, _ = central_window(eyes, url)
    return None if window is None else [e[0] for e in eyes.embed([window])]


def _where(values: Sequence[bool], chosen: Sequence[bool]) -> list[bool]:
    return [value for value, yes in zip(values, chosen, strict=True) if yes]
