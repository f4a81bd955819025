"""Linear filters of pictures and residuals, in space and in colour."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # of R, G and B: ITU-R BT.601-7, section 2.5.1, and JPEG's


def low_pass(residual: Tensor, sigma: float) -> Tensor:
    """Gaussian low-pass of a residual (B, 3, S, S), sigma in pixels; 0 returns it unchanged."""
    if sigma <= 0:
        return residual
    radius = max(1, round(3 * sigma))
    t = torch.arange(-radius, radius + 1, dtype=residual.dtype, device=residual.device)
    kernel = torch.exp(-(t**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    x = F.conv2d(F.pad(residual, (radius, radius, 0, 0), mode="replicate"), kernel[:, :, None, :], groups=3)
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), kernel[:, :, :, None], groups=3)


def damp_chroma(residual: Tensor, share: float) -> Tensor:
    """A residual (B, 3, S, S), RGB, with this share of its change of colour; its change of lightness stays.

    Lightness is luma (``LUMA``), as in JPEG: equal change of R, G and B.  share: 0..1; 1 returns
    the residual unchanged.
    """
    if share == 1:
        return residual
    luma = (residual * residual.new_tensor(LUMA).reshape(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    return luma + share * (residual - luma)
