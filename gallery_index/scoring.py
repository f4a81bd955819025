"""Similarity of style codes: the three modes, and a dot product that is the same on every machine.

The paper ranks by dot products.  Raw W codes share a large mean (in StyleGAN2-FFHQ's W the mean has
about 40 % of a code's norm), so a raw product ranks largely by that mean and by norm.  Reading 1 of
our method, per layer, with ``mu`` the gallery's mean at that layer:

- ``raw``: ``q . x``
- ``cosine``: ``q . x / (|q| |x|)``
- ``centred`` (default): ``(q - mu) . (x - mu) / (|q - mu| |x - mu|)``
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Mode = Literal["raw", "cosine", "centred"]
MODES: tuple[str, ...] = get_args(Mode)

# A vector shorter than this share of what it was computed from is rounding noise, not a direction.
_NEGLIGIBLE = 1e-6


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last axis in a fixed order: (..., D) -> (...).

    Only element-wise IEEE additions, halving the axis each time, so that the result has the same
    bits whatever the machine, the thread count, the batch or the BLAS.
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        if x.shape[-1] % 2:
            folded[..., :1] += x[..., -1:]
        x = folded
    return x[..., 0]


def centre(x: Tensor, mean: Tensor, mode: str) -> Tensor:
    """Codes (..., D) as float64, minus the mean (D,) float64 where the mode is ``centred``."""
    return x - mean if mode == "centred" else x.double()  # a difference with float64 is one, in one pass


def norms(x: Tensor, mean: Tensor, mode: str) -> Tensor:
    """Float64 lengths (...) of codes (..., D) after ``centre``; 0 where what is left is only rounding."""
    length = tree_sum(centre(x, mean, mode).square()).sqrt()
    if mode != "centred":
        return length
    scale = tree_sum(x.double().square()).sqrt()
    return torch.where(length > _NEGLIGIBLE * scale, length, torch.zeros_like(length))


def scores(query: Tensor, query_norm: Tensor, codes: Tensor, code_norms: Tensor, mean: Tensor, mode: str) -> Tensor:
    """Exact similarities of pairs of a query and a code, float64; leading axes broadcast.

    Args:
        query: (..., D) float64, after ``centre``.
        query_norm: (...) float64, its ``norms``.
        codes: (..., D) float32, as stored.
        code_norms: (...) float64, their ``norms``.
        mean: (D,) float64.

    Returns:
        (...) float64.
    """
    product = tree_sum(centre(codes, mean, mode).mul_(query))
    return product if mode == "raw" else product / (query_norm * code_norms)
