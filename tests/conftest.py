"""Faces for tests: people who do not exist, drawn by the embedded generator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

Pixels = np.ndarray


@pytest.fixture(scope="session")
def draw_face() -> Callable[[int], Pixels]:
    """Seed -> uint8 (256, 256, 3): an FFHQ-aligned face, the same for the same seed."""
    from scol_ops.metrics import to_uint8
    from scol_ops.models.weights import load_mobilestylegan

    generator = load_mobilestylegan(256)

    def draw(seed: int) -> Pixels:
        z = torch.randn(1, 512, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            w = generator.mapping(z)
            w = generator.mean_code + 0.7 * (w - generator.mean_code)
            return to_uint8(generator(w[:, None].expand(-1, 16, -1))[0])

    return draw


@pytest.fixture(scope="session")
def draw_photo(draw_face) -> Callable[..., Pixels]:
    """(seeds, width, height) -> uint8 photo with those people side by side on a plain ground."""

    def draw(seeds: list[int], width: int = 420, height: int = 340) -> Pixels:
        photo = np.full((height, width, 3), (112, 124, 131), np.uint8)
        step = width // max(1, len(seeds))
        for i, seed in enumerate(seeds):
            left, top = i * step + (step - 256) // 2, (height - 256) // 2
            photo[top : top + 256, left : left + 256] = draw_face(seed)
        return photo

    return draw
