"""Losses of the tuning, refinement and attack stages.

All pictures are (B, 3, H, W), RGB, nominally in [-1, 1]; every loss is a scalar tensor (mean over the
batch unless said otherwise) and differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# A differentiable identity feature: crops (B, 3, S, S) -> unit vectors (B, D).
IdentityFeature = Callable[[Tensor], Tensor]


class PerceptualDistance(Protocol):
    """A distance that pictures have to one that stays, such as ``models.lpips_distance.LPIPSDistance``."""

    def reference(self, pictures: Tensor) -> Any:
        """What ``to_reference`` compares with, of (B, 3, H, W)."""

    def to_reference(self, reference: Any, pictures: Tensor) -> Tensor:
        """Distances (B,), differentiable to the pictures (B, 3, H, W)."""


_WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # data range 2


def _gaussian(channels: int, like: Tensor) -> Tensor:
    x = torch.arange(_WINDOW, dtype=like.dtype, device=like.device) - _WINDOW // 2
    g = torch.exp(-(x**2) / (2 * _SIGMA**2))
    return (g / g.sum()).expand(channels, 1, -1)


def _blur(x: Tensor, stride: int) -> Tensor:
    kernel = _gaussian(x.shape[1], x)
    x = F.conv2d(x, kernel[:, :, :, None], groups=x.shape[1], stride=(stride, 1))
    return F.conv2d(x, kernel[:, :, None, :], groups=x.shape[1], stride=(1, stride))


def ssim_map(a: Tensor, b: Tensor, stride: int = 1) -> Tensor:
    """Local SSIM, (B, 3, H-10, W-10): Gaussian window 11, sigma 1.5, data range 2 (Wang et al. 2004, eq. 13).

    ``stride`` > 1 evaluates every n-th window only, in both directions.
    """
    stacked = torch.cat((a, b, a * a, b * b, a * b), dim=1)
    mu_a, mu_b, aa, bb, ab = _blur(stacked, stride).chunk(5, dim=1)
    var_a, var_b, cov = aa - mu_a * mu_a, bb - mu_b * mu_b, ab - mu_a * mu_b
    return ((2 * mu_a * mu_b + _C1) * (2 * cov + _C2)) / ((mu_a * mu_a + mu_b * mu_b + _C1) * (var_a + var_b + _C2))


def multiscale_ssim_loss(a: Tensor, b: Tensor, scales: int = 2) -> Tensor:
    """1 - mean SSIM, averaged over ``scales`` octaves (average pooling by 2 between them).

    Stands in for LPIPS where no backbone weights are at hand (METHOD reading 6).  A plain average of
    the octaves, not Wang's product: its gradient does not vanish where one octave is far off.  Every
    second window is evaluated (they overlap by nine of eleven pixels, and each costs time at every step).

    Raises:
        ValueError: the smallest octave is below the 11-pixel window.
    """
    if min(a.shape[-2:]) >> (scales - 1) < _WINDOW:
        raise ValueError(f"{scales} octaves of a {tuple(a.shape[-2:])} picture leave less than {_WINDOW} pixels")
    total = a.new_zeros(())
    for scale in range(scales):
        if scale:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        total = total + 1 - ssim_map(a, b, stride=2).mean()
    return total / scales


def reconstruction_loss(output: Tensor, target: Tensor, l2_weight: float = 10.0, ssim_weight: float = 1.0) -> Tensor:
    """Pixel L2 plus multi-scale SSIM: the substitute for pivotal tuning's LPIPS + L2 (Roich et al. 2021, eq. 3)."""
    loss = l2_weight * F.mse_loss(output, target)
    if ssim_weight:
        loss = loss + ssim_weight * multiscale_ssim_loss(output, target)
    return loss


def id_lock_loss(features: Sequence[Tensor], locked: Sequence[Tensor]) -> Tensor:
    """``1 - cos`` between the output's and the fused picture's features, mean over features (METHOD reading 5).

    Args:
        features, locked: per identity feature, unit vectors (B, D).
    """
    terms = [1 - (f * g).sum(dim=1) for f, g in zip(features, locked, strict=True)]
    return torch.stack(terms).mean()


def identity_hinge_loss(
    features: Sequence[Tensor],
    original: Sequence[Tensor],
    margins: Sequence[float],
    spans: Sequence[float] | None = None,
) -> Tensor:
    """``max(0, cos(F(output), F(original)) - margin)``, mean over features (METHOD reading 5, the optional hinge).

    Args:
        features, original: per identity feature, unit vectors (B, D).
        margins: per identity feature, the cosine under which the loss is zero.
        spans: per identity feature, > 0: from the cosine of different people to 1; the loss is divided by it, so that
            features whose cosines are compressed weigh as much as others. None: 1.
    """
    spans = [1.0] * len(margins) if spans is None else spans
    terms = [
        ((f * g).sum(dim=1) - margin).clamp_min(0) / span
        for f, g, margin, span in zip(features, original, margins, spans, strict=True)
    ]
    return torch.stack(terms).mean()
