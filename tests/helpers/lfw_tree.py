"""A data set of generated people in LFW's layout."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from pipelines.jobs.demo import draw_person


def lfw(folder: Path, seeds: Mapping[str, int]) -> Path:
    """Two photos of 200 px of each person, by the seed of their face; returns the folder."""
    for person, seed in seeds.items():
        for number in (1, 2):
            image = Image.fromarray(draw_person(seed, number - 1, 256)).resize((200, 200), Image.Resampling.BOX)
            out = io.BytesIO()
            image.save(out, "JPEG", quality=93)
            path = folder / f"{person}/{person}_{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(out.getvalue())
    return folder
