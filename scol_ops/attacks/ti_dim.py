"""TI-DIM: momentum, input diversity and translation-invariant gradients together.

Input diversity: Xie et al., "Improving Transferability of Adversarial Examples with Input Diversity" (CVPR 2019,
arXiv:1803.06978): with probability 0.7 the surrogates see the picture shrunk and padded at random.  Translation
invariance: Dong et al., "Evading Defenses to Transferable Adversarial Examples by Translation-Invariant Attacks"
(CVPR 2019, arXiv:1904.02884), eq. 7: the gradient is convolved with a Gaussian kernel (15 x 15, sigma 3).  Loss of
dodging, L-infinity.  The papers' own numbers: eps 16 of 255, 10 steps, decay 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scol_ops.attack import AttackResult
from scol_ops.attacks.common import StepSettings, signed_steps
from scol_ops.losses import IdentityFeature


@dataclass(frozen=True)
class TIDIMSettings(StepSettings):
    """As ``StepSettings``.  probability: of a diverse input, 0..1.  smallest: least
    share of the side that a diverse input is shrunk to.  kernel: side of the gradient's kernel, odd, 1 for none;
    sigma: its width, pixels."""

    probability: float = 0.7
    smallest: float = 0.9
    kernel: int = 15
    sigma: float = 3.0


def gaussian_kernel(side: int, sigma: float) -> Tensor:
    """(side, side), sums to 1; an odd side."""
    if side < 1 or side % 2 == 0 or not sigma > 0:
        raise ValueError(f"the kernel's side must be odd and sigma positive: {side}, {sigma}")
    x = torch.arange(side, dtype=torch.float32) - side // 2
    g = torch.exp(-(x**2) / (2 * sigma**2))
    g = g / g.sum()
    return g[:, None] * g


def diverse(picture: Tensor, generator: torch.Generator, smallest: float) -> Tensor:
    """Shrunk to a random side in [smallest, 1] of its own, and padded with grey at random to the old size;
    differentiable.

    Grey (0 in [-1, 1]) where the paper pads with black: the recognisers' crops reach into it.
    """
    height, width = picture.shape[-2:]
    share = smallest + (1 - smallest) * float(torch.rand((), generator=generator))
    rows, columns = max(1, round(height * share)), max(1, round(width * share))
    top = int(torch.randint(height - rows + 1, (), generator=generator))
    left = int(torch.randint(width - columns + 1, (), generator=generator))
    small = F.interpolate(picture, (rows, columns), mode="bilinear", align_corners=False)
    return F.pad(small, (left, width - columns - left, top, height - rows - top))


def ti_dim(
    picture: Tensor,
    identity: Sequence[IdentityFeature],
    settings: TIDIMSettings = TIDIMSettings(),
    mask: Tensor | None = None,
    seed: int = 0,
) -> AttackResult:
    """Move the surrogates' features away from the original's, for all small shifts and sizes at once.

    Args:
        picture, identity, mask: as ``mi_fgsm``.
        settings: see ``TIDIMSettings``.
        seed: of the diverse inputs; the same seed gives the same result on one device.

    Returns:
        ``AttackResult``: the last iterate, |change| <= 2 eps mask in [-1, 1] units; losses without diversity.

    Raises:
        ValueError: wrong shape, no surrogate, numbers out of range.
    """
    if not (0 <= settings.probability <= 1 and 0 < settings.smallest <= 1):
        raise ValueError(f"probability and smallest are shares: {settings.probability}, {settings.smallest}")
    rng = torch.Generator().manual_seed(seed)
    kernel = gaussian_kernel(settings.kernel, settings.sigma).to(picture).expand(3, 1, -1, -1)

    def seen(moved: Tensor) -> Tensor:
        draw = float(torch.rand((), generator=rng)) < settings.probability
        return diverse(moved, rng, settings.smallest) if draw else moved

    return signed_steps(
        picture,
        identity,
        settings,
        mask,
        seen,
        lambda gradient: F.conv2d(gradient, kernel, padding=settings.kernel // 2, groups=3),
    )
