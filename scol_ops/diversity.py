"""Random, differentiable input transformations (expectation over transformation).

Averaging gradients over them makes a change in identity survive other crops, sizes and recompression
(EOT: Athalye et al. 2018; input diversity: Xie et al. 2019).  All are seeded by an explicit generator.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scol_ops.filters import low_pass

# Annex K of ITU-T T.81 (JPEG), tables K.1 and K.2.
_LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99, *(99,) * 32,
)  # fmt: skip


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def random_resize_shift(x: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Shrink to a random 50..100 % and back, rotate, zoom and shift a little; one draw for the whole batch.

    Args:
        x: (B, 3, H, W).
        generator: a CPU generator.
        strength: 0 for the identity, 1 for +-4 % shift, +-4 % zoom, +-3 degrees, down to half size.

    Returns:
        The same shape; differentiable.
    """
    if strength <= 0:
        return x
    size = x.shape[-1]
    small = max(32, round(size * (1 - strength * _uniform(generator, 0.0, 0.5))))
    if small < size:
        x = F.interpolate(x, (small, small), mode="bilinear", antialias=True, align_corners=False)
    angle = math.radians(strength * _uniform(generator, -3, 3))
    zoom = 1 + strength * _uniform(generator, -0.04, 0.04)
    dx, dy = (strength * _uniform(generator, -0.08, 0.08) for _ in range(2))  # grid units: the side is 2
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    theta = torch.tensor([[cos, -sin, dx], [sin, cos, dy]], dtype=x.dtype, device=x.device)
    grid = F.affine_grid(theta.expand(x.shape[0], -1, -1), [x.shape[0], x.shape[1], size, size], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def at_photo_scale(x: Tensor, side: float) -> Tensor:
    """The crop as it is after pasting: at the size that it has in the photo, and back.

    Args:
        x: (B, 3, S, S) in [-1, 1].
        side: of the crop in pixels of the photo; from S on nothing is lost and ``x`` comes back as it is.

    Returns:
        The same shape, clamped to [-1, 1]; differentiable.
    """
    size, small = x.shape[-1], max(8, round(side))
    if small >= size:
        return x
    x = F.interpolate(x, (small, small), mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(x, (size, size), mode="bicubic", align_corners=False).clamp(-1, 1)


def random_blur(x: Tensor, generator: torch.Generator, max_sigma: float = 1.5) -> Tensor:
    """Gaussian blur with a random sigma (pixels) in [0, max_sigma]; differentiable."""
    sigma = _uniform(generator, 0.0, max_sigma)
    return x if sigma < 0.2 else low_pass(x, sigma)


def quantisation_tables(quality: int) -> tuple[Tensor, Tensor]:
    """The Independent JPEG Group's luma and chroma tables of a quality in 1..100: two (8, 8) tensors."""
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality must be in 1..100, got {quality}")
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return tuple(
        ((torch.tensor(t) * scale + 50) // 100).clamp(1, 255).float().reshape(8, 8) for t in (_LUMA, _CHROMA)
    )


def _dct_matrix(like: Tensor) -> Tensor:
    n = torch.arange(8, dtype=like.dtype, device=like.device)
    d = torch.cos((2 * n[None, :] + 1) * n[:, None] * math.pi / 16) / 2
    d[0] /= math.sqrt(2)
    return d


def _round_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()  # straight-through: rounding has no useful gradient


def jpeg(x: Tensor, quality: int, subsample: bool = True) -> Tensor:
    """JPEG compression and decompression as a differentiable layer (rounding passed straight through).

    Args:
        x: (B, 3, H, W) in [-1, 1]; like encoders do, sides are filled up to multiples of 16 with their last pixels.
        quality: 1..100, the Independent JPEG Group's scale (ITU-T T.81 annex K tables).
        subsample: 4:2:0 chroma, as most encoders; else 4:4:4.

    Raises:
        ValueError: a quality out of range.
    """
    height, width = x.shape[-2:]
    if height % 16 or width % 16:
        x = F.pad(x, (0, -width % 16, 0, -height % 16), mode="replicate")
    r, g, b = ((x.clamp(-1, 1) + 1) * 127.5).unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b - 128  # JFIF 1.02
    cb, cr = (b - y - 128) / 1.772, (r - y - 128) / 1.402
    d = _dct_matrix(x)
    planes = []
    for plane, table in zip((y, cb, cr), (0, 1, 1), strict=True):
        q = quantisation_tables(quality)[table].to(x)
        p = plane[:, None]
        if table and subsample:
            p = F.avg_pool2d(p, 2)
        h, w = p.shape[-2:]
        blocks = p.reshape(-1, h // 8, 8, w // 8, 8).transpose(2, 3)
        coefficients = _round_through(d @ blocks @ d.T / q) * q
        p = (d.T @ coefficients @ d).transpose(2, 3).reshape(-1, 1, h, w)
        if table and subsample:
            p = F.interpolate(p, scale_factor=2, mode="bilinear", align_corners=False)
        planes.append(p[:, 0])
    y, cb, cr = planes
    y = y + 128
    rgb = torch.stack((y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb), dim=1)
    return _round_through(rgb.clamp(0, 255))[..., :height, :width] / 127.5 - 1


def diversify(
    x: Tensor, generator: torch.Generator, resize: float = 1.0, blur: bool = False,
    jpeg_quality: tuple[int, int] | None = None,
) -> Tensor:
    """One random draw of the enabled transformations.

    Args:
        x: (B, 3, H, W) in [-1, 1].
        generator: CPU generator; the draw is the only randomness.
        resize: strength of ``random_resize_shift``.
        blur: also ``random_blur`` (half of the draws).
        jpeg_quality: also ``jpeg`` with a quality drawn from this closed range (half of the draws).
    """
    if blur and _uniform(generator, 0, 1) < 0.5:
        x = random_blur(x, generator)
    if jpeg_quality is not None and _uniform(generator, 0, 1) < 0.5:
        x = jpeg(x, round(_uniform(generator, *jpeg_quality)))
    return random_resize_shift(x, generator, resize)
