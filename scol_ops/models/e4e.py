"""The e4e encoder (Tov et al. 2021, arXiv:2102.02766): aligned faces of 256 px to W+ codes of StyleGAN2.

Layout: github.com/omertov/encoder4editing, models/encoders/psp_encoders.py.  An IR-SE50 trunk, a feature pyramid over
its last three scales, and one small convolutional head for every code: the first gives the base code, the others
offsets from it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scol_ops.models.ir import stem, trunk
from scol_ops.models.stylegan2 import CODE_DIM, EqualLinear, num_codes

INPUT_SIZE = 256
# Last unit of the 64, 32 and 16 px scales, and the codes from which the two finer ones are used.
_TAPS = (6, 20, 23)
_MIDDLE, _FINE = 3, 7


class StyleHead(nn.Module):
    """Features (B, 512, n, n) to (B, 512): convolutions of stride 2 down to one place, then an equalised layer."""

    def __init__(self, spatial: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(int(math.log2(spatial))):
            layers += [nn.Conv2d(512, CODE_DIM, 3, 2, 1), nn.LeakyReLU(0.01)]
        self.convs = nn.Sequential(*layers)
        self.linear = EqualLinear(CODE_DIM, CODE_DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs(x)
        if x.shape[-2:] != (1, 1):
            raise ValueError(
                f"e4e reads faces of {INPUT_SIZE} px: a head is left with {x.shape[2]} x {x.shape[3]} places"
            )
        return self.linear(x.flatten(1))


class E4E(nn.Module):
    """Faces (B, 3, 256, 256), RGB in [-1, 1], FFHQ-aligned -> codes (B, L, 512); differentiable.

    Args:
        size: of the generator in pixels; L = 2 log2(size) - 2.

    Attributes:
        num_codes: L.
        latent_avg: (L, 512), what offsets count from; a buffer, and no entry of the public ``encoder.*``.
        std_code: (512,), standard deviations of W over its decoder's mapping network; ones where it is not known.
    """

    def __init__(self, size: int = 1024) -> None:
        super().__init__()
        self.num_codes, self.size = num_codes(size), size
        self.input_layer = stem()
        self.body = trunk(50, excite=True)
        self.styles = nn.ModuleList(
            StyleHead(16 if i < _MIDDLE else 32 if i < _FINE else 64) for i in range(self.num_codes)
        )
        self.latlayer1 = nn.Conv2d(256, 512, 1)
        self.latlayer2 = nn.Conv2d(128, 512, 1)
        self.register_buffer("latent_avg", torch.zeros(self.num_codes, CODE_DIM))
        self.register_buffer("std_code", torch.ones(CODE_DIM))

    def offsets(self, x: Tensor, stage: int | None = None) -> Tensor:
        """Faces to codes less ``latent_avg``, (B, L, 512).

        Args:
            stage: of the progressive training: codes 1..stage have offsets of their own, later ones are the base code;
                None for the last, as in use.

        Raises:
            ValueError: no pictures, or of another size than 256 px (smaller ones pass as the reference lets them).
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"faces must be (B, 3, {INPUT_SIZE}, {INPUT_SIZE}), got {tuple(x.shape)}")
        taps, x = [], self.input_layer(x)
        for i, block in enumerate(self.body):
            x = block(x)
            if i in _TAPS:
                taps.append(x)
        c1, c2, c3 = taps
        last = self.num_codes if stage is None else min(stage + 1, self.num_codes)
        base = self.styles[0](c3)
        codes, features = [base], c3
        for i in range(1, last):
            if i == _MIDDLE:
                features = p2 = _grow(c3, c2) + self.latlayer1(c2)
            elif i == _FINE:
                features = _grow(p2, c1) + self.latlayer2(c1)
            codes.append(base + self.styles[i](features))
        codes += [base] * (self.num_codes - len(codes))
        return torch.stack(codes, dim=1).float()

    def normalised(self, x: Tensor) -> Tensor:
        """Faces to codes in standard units, (B, L, 512): offsets from the mean by ``std_code``."""
        return self.offsets(x) / self.std_code

    def forward(self, x: Tensor) -> Tensor:
        return self.offsets(x) + self.latent_avg


def _grow(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)
