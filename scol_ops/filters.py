"""Linear filters of pictures and residuals."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
