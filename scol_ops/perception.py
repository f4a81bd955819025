"""Colours as a person sees them on a screen: what a change must not move.

The first two steps of FLIP (Andersson et al. 2020, "FLIP: A Difference Evaluator for Alternating Images", sections 4.1.1
and 4.1.2; constants of its contrast sensitivity functions from table 1 there): filter by what an eye resolves at the
usual viewing distance, colour far more than lightness, then compare in CIELAB with Hunt's effect.  ``colour_flip`` goes
on as FLIP does (sections 4.1.3 and 4.1.4): a power below 1, so that few places that change much count less than many that
change a little.  FLIP's edges and points are left out.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Pixels a degree of the visual field: 0.7 m from a screen 0.7 m and 3840 pixels wide (FLIP's default).
PIXELS_PER_DEGREE = 0.7 * 3840 / 0.7 * math.pi / 180

# Linear sRGB to CIE XYZ, D65 (IEC 61966-2-1).
_XYZ = ((0.4123908, 0.3575843, 0.1804808), (0.2126390, 0.7151687, 0.0721923), (0.0193308, 0.1191948, 0.9505322))
# Sums of Gaussians a sqrt(pi / b) exp(-pi^2 x^2 / b), x in degrees: (channel, a, b) of lightness, red-green, blue-yellow.
_SENSITIVITY = ((0, 1.0, 0.0047), (1, 1.0, 0.0053), (2, 34.1, 0.04), (2, 13.5, 0.025))
_DELTA = 6 / 29  # CIELAB's linear part
# FLIP's q_c; and the share of the largest difference at which its map bends, and the value there (p_c, p_t).
_POWER, _BEND, _AT_BEND = 0.7, 0.4, 0.95
# Added to a difference in L, a, b: below what an eye sees, and enough to keep the power's gradient finite at zero.
_UNSEEN = 0.004


@functools.lru_cache(8)
def _kernels(pixels_per_degree: float) -> tuple[Tensor, Tensor]:
    """1D kernels (4, 1, K), each of sum 1, and the weight (3, 4) of each in its channel."""
    radius = math.ceil(3 * math.sqrt(0.04 / (2 * math.pi**2)) * pixels_per_degree)
    x = torch.arange(-radius, radius + 1, dtype=torch.float64) / pixels_per_degree
    kernels, weights = [], torch.zeros(3, len(_SENSITIVITY), dtype=torch.float64)
    for i, (channel, a, b) in enumerate(_SENSITIVITY):
        kernel = torch.exp(-math.pi**2 * x**2 / b)
        weights[channel, i] = a * math.sqrt(math.pi / b) * kernel.sum() ** 2
        kernels.append(kernel / kernel.sum())
    return torch.stack(kernels)[:, None].float(), (weights / weights.sum(1, keepdim=True)).float()


def opponent_colours(pictures: Tensor) -> Tensor:
    """sRGB (B, 3, H, W) in [-1, 1], clamped, to YCxCz: lightness 0..100, red-green, blue-yellow; linear in light."""
    value = (pictures.clamp(-1, 1) + 1) / 2
    light = torch.where(value > 0.04045, ((value.clamp_min(0.04) + 0.055) / 1.055) ** 2.4, value / 12.92)
    matrix = light.new_tensor(_XYZ)
    x, y, z = torch.einsum("ij,bjhw->bihw", matrix / matrix.sum(1, keepdim=True), light).unbind(1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), 1)


def perceived_colours(pictures: Tensor, pixels_per_degree: float = PIXELS_PER_DEGREE) -> Tensor:
    """Pictures as the eye resolves them, in CIELAB with Hunt's effect; differentiable.

    Args:
        pictures: (B, 3, H, W), RGB in [-1, 1] (clamped).
        pixels_per_degree: of the visual field; lower: the picture is looked at from nearer.

    Returns:
        (B, 3, H, W): L in 0..100; a and b, about -100..100, scaled by L / 100 (colour of dark places shows less).

    Raises:
        ValueError: wrong shape, or a resolution that is not positive.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"pictures must be (B, 3, H, W), got {tuple(pictures.shape)}")
    if not pixels_per_degree > 0:
        raise ValueError(f"pixels a degree must be positive, got {pixels_per_degree}")
    kernels, weights = (t.to(pictures) for t in _kernels(pixels_per_degree))
    radius = kernels.shape[-1] // 2
    channels = opponent_colours(pictures)[:, [channel for channel, _, _ in _SENSITIVITY]]
    channels = F.pad(channels, (radius,) * 4, mode="replicate")
    channels = F.conv2d(channels, kernels[:, :, :, None], groups=len(kernels))
    channels = F.conv2d(channels, kernels[:, :, None, :], groups=len(kernels))
    lightness, red_green, blue_yellow = torch.einsum("ci,bihw->bchw", weights, channels).unbind(1)
    y = (lightness + 16) / 116
    cube = [_lab_root(v.clamp(0, 1)) for v in (y + red_green / 500, y, y - blue_yellow / 200)]
    lightness = 116 * cube[1] - 16
    hunt = lightness / 100
    return torch.stack((lightness, hunt * 500 * (cube[0] - cube[1]), hunt * 200 * (cube[1] - cube[2])), 1)


def _lab_root(t: Tensor) -> Tensor:
    return torch.where(t > _DELTA**3, t.clamp_min(_DELTA**3) ** (1 / 3), t / (3 * _DELTA**2) + 4 / 29)


def visible_difference(perceived: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared distance of two ``perceived_colours``, in units of L's range (100) squared; scalar."""
    return ((perceived - wanted) / 100).square().sum(dim=1).mean()


@functools.lru_cache(8)
def _largest(pixels_per_degree: float) -> float:
    """HyAB distance of green and blue, the largest that there is, to the power of ``_POWER``."""
    colours = torch.tensor([[-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])[:, :, None, None]
    green, blue = perceived_colours(colours, pixels_per_degree).chunk(2)
    return float(_hyab(green, blue)) ** _POWER


def _hyab(a: Tensor, b: Tensor) -> Tensor:
    """Distance of colours (B, 3, H, W) -> (B, H, W): lightness and colour add up (Abasi et al. 2020)."""
    difference = a - b
    # The root's gradient at zero is infinite without the offset.
    return difference[:, 0].abs() + (difference[:, 1:].square().sum(dim=1) + 1e-9).sqrt()


def colour_flip(perceived: Tensor, wanted: Tensor, pixels_per_degree: float = PIXELS_PER_DEGREE) -> Tensor:
    """FLIP's colour difference of each pixel, differentiable; FLIP itself raises it further at edges and points.

    Args:
        perceived, wanted: (B, 3, H, W), ``perceived_colours`` of two pictures.
        pixels_per_degree: as they were made with.

    Returns:
        (B, H, W) in 0..1.  Equal pictures have 0.0012, since the power's gradient must stay finite.
    """
    power = (_hyab(perceived, wanted) + _UNSEEN) ** _POWER
    largest = _largest(pixels_per_degree)
    bend = _BEND * largest
    return torch.where(
        power < bend, power * (_AT_BEND / bend), _AT_BEND + (power - bend) * (1 - _AT_BEND) / (largest - bend)
    )
