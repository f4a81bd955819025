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
        try:
            source, _ = central_window(eyes, url)
            pictures = [decode(read_bytes(tree[name])).pixels for tree in trees[1:]]
        except (PhotoError, SourceError, GeometryError):
            unreadable += 1
            continue
        if source is None:
            unreadable += 1
            continue
        if pictures[0].shape == pictures[1].shape:
            quality.append(psnr(*pictures))
        try:
            windows = [source, *(central_window(eyes, tree[name])[0] for tree in trees[1:])]
            no_face += windows[2] is None
            found = [None if w is None else [e[0] for e in eyes.embed([w])] for w in windows]
        except GeometryError:
            unreadable += 1
            continue
        for number, network in enumerate(eyes.networks):
            for swap, table in ((found[1], before), (found[2], known)):
                table[network.name].append(
                    swap is not None and float(found[0][number] @ swap[number]) > network.threshold
                )
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


def _where(values: Sequence[bool], chosen: Sequence[bool]) -> list[bool]:
    return [value for value, yes in zip(values, chosen, strict=True) if yes]
