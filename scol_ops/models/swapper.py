"""Swap oracle's mapper: a recogniser's embedding of a face to style codes of the embedded generator's identity layers.

A face swapper takes the source's identity embedding and renders it on a target (SimSwap, Chen et al. 2020,
arXiv:2106.06340; mapped into StyleGAN's W+ by MegaFS, Zhu et al. 2021, arXiv:2105.04932, and by Nitzan et al. 2020,
arXiv:2005.07728).  Which layers carry identity was measured: see ``data/swapper.md``.  Trained by
``pipelines/training/train_swapper.py`` on generated faces only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scol_ops.models.mobilestylegan import CODE_DIM

EMBEDDING_DIM = 192  # MobileFaceNet's
FIRST, LAST = 2, 10  # codes FIRST .. LAST - 1 of the generator's 16 are the source's, the others the target's
EMBEDDER = "mobilefacenet"


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.leaky_relu(self.inner(self.norm(x)), 0.1))


class Swapper(nn.Module):
    """Embeddings (B, 192), unit norm, of MobileFaceNet -> codes (B, LAST - FIRST, 512) of the identity layers.

    A linear map, with which a regression begins, and a small residual network that corrects it; outputs are offsets
    from the mean W in units of each component's standard deviation.  Differentiable.
    """

    WIDTH, DEPTH = 256, 2

    def __init__(self) -> None:
        super().__init__()
        out = (LAST - FIRST) * CODE_DIM
        self.linear = nn.Linear(EMBEDDING_DIM, out)
        self.enter = nn.Linear(EMBEDDING_DIM, self.WIDTH)
        self.blocks = nn.Sequential(*[_Residual(self.WIDTH) for _ in range(self.DEPTH)], nn.LayerNorm(self.WIDTH))
        self.leave = nn.Linear(self.WIDTH, out)
        self.register_buffer("mean_code", torch.zeros(CODE_DIM))
        self.register_buffer("std_code", torch.ones(CODE_DIM))

    def normalised(self, embeddings: Tensor) -> Tensor:
        """Codes in standard units, (B, LAST - FIRST, 512): ``(w - mean) / std``.

        Raises:
            ValueError: wrong shape.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != EMBEDDING_DIM:
            raise ValueError(f"embeddings must be (B, {EMBEDDING_DIM}), got {tuple(embeddings.shape)}")
        x = embeddings * EMBEDDING_DIM**0.5  # a component is about 1
        return (self.linear(x) + self.leave(self.blocks(self.enter(x)))).unflatten(1, (-1, CODE_DIM))

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.mean_code + self.std_code * self.normalised(embeddings)
