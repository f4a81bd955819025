"""Compact encoder: a face of 256 x 256 to W+ codes of the embedded generator, (B, 16, 512).

A residual network with a feature pyramid in the manner of e4e (Tov et al. 2021, arXiv:2102.02766): one base
code from the coarsest features, and for each code an offset from the level that sees its scale.  As e4e's
backbone begins as a face recogniser, so every level here also reads the features of one, MobileFaceNet, whose
weights stay as they are.  Outputs are offsets from the mean W in units of each component's standard deviation.
Trained by ``pipelines/training/train_encoder.py`` on generated faces only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scol_ops.models.mobilefacenet import MobileFaceNet
from scol_ops.models.mobilestylegan import CODE_DIM, NUM_CODES
from scol_ops.models.recognisers import ffhq_mean_geometry

INPUT_SIZE = 256
GROUPS = ((0, 4), (4, 8), (8, NUM_CODES))  # codes that the 8, 16 and 32 px levels drive


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; halves the picture where ``stride`` is 2."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Conv2d(cin, cout, 1, bias=False) if cin != cout or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.1)
        y = self.norm2(self.conv2(y))
        if self.shortcut is not None:
            x = self.shortcut(F.avg_pool2d(x, 2) if x.shape[-1] != y.shape[-1] else x)
        return F.leaky_relu(x + y, 0.1)


class FaceFeatures(nn.Module):
    """What a frozen face recogniser sees in FFHQ crops: (B, 3, 256, 256) -> (B, DIM), differentiable to the crops."""

    DIM = 192 + 16 * 49 + 8 * 49

    def __init__(self) -> None:
        super().__init__()
        self.network = MobileFaceNet().requires_grad_(False)
        self.middle = nn.Conv2d(128, 8, 1)
        self.late = nn.Conv2d(128, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        # FFHQ crops show every face in the same place, up to its pose.
        landmarks, boxes = ffhq_mean_geometry(len(x), INPUT_SIZE)
        aligned = self.network.align(x, landmarks, boxes).contiguous(memory_format=torch.channels_last)
        middle, late, embedding = self.network.features(aligned)  # 14 px, 7 px, (B, 192)
        middle = F.avg_pool2d(F.leaky_relu(self.middle(middle), 0.1), 2)
        late = F.leaky_relu(self.late(late), 0.1)
        # The unit embedding, scaled so that a component is about 1.
        return torch.cat([embedding * embedding.shape[1] ** 0.5, middle.flatten(1), late.flatten(1)], dim=1)


class LevelHead(nn.Module):
    """A level's features, pooled to 4 x 4 so that they keep where things are, and a recogniser's, to hidden numbers."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, 64, 3, 1, 1)
        self.hidden = nn.Linear(64 * 16, hidden)
        self.face = nn.Linear(FaceFeatures.DIM, hidden, bias=False)

    def forward(self, x: Tensor, face: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(F.leaky_relu(self.reduce(x), 0.1), 4)
        return F.leaky_relu(self.hidden(x.flatten(1)) + self.face(face), 0.1)


class Encoder(nn.Module):
    """Faces (B, 3, 256, 256), RGB in [-1, 1], FFHQ-aligned -> codes (B, 16, 512); differentiable."""

    num_codes = NUM_CODES
    WIDTHS = (40, 80, 160, 256)
    HIDDEN = 320

    def __init__(self) -> None:
        super().__init__()
        a, b, c, d = self.WIDTHS
        self.stem = nn.Sequential(nn.Conv2d(3, a, 5, 2, 2, bias=False), nn.BatchNorm2d(a), nn.LeakyReLU(0.1))
        self.stage1 = ResidualBlock(a, a)  # 64 px
        self.stage2 = nn.Sequential(ResidualBlock(a, b, 2), ResidualBlock(b, b))  # 32 px
        self.stage3 = nn.Sequential(ResidualBlock(b, c, 2), ResidualBlock(c, c), ResidualBlock(c, c))  # 16 px
        self.stage4 = nn.Sequential(ResidualBlock(c, d, 2), ResidualBlock(d, d))  # 8 px
        self.lateral4 = nn.Conv2d(d, c, 1)
        self.lateral3 = nn.Conv2d(c, c, 1)
        self.lateral2 = nn.Conv2d(b, c, 1)
        self.face = FaceFeatures()
        self.heads = nn.ModuleList(LevelHead(c, self.HIDDEN) for _ in GROUPS)
        self.base = nn.Linear(self.HIDDEN, CODE_DIM)
        self.offsets = nn.ModuleList(
            nn.Linear(self.HIDDEN, (stop - start) * CODE_DIM) for start, stop in GROUPS
        )
        self.register_buffer("mean_code", torch.zeros(CODE_DIM))
        self.register_buffer("std_code", torch.ones(CODE_DIM))

    def normalised(self, x: Tensor) -> Tensor:
        """Faces to codes in standard units, (B, 16, 512): ``(w - mean) / std``."""
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[-2:] != (INPUT_SIZE, INPUT_SIZE):
            raise ValueError(f"faces must be (B, 3, {INPUT_SIZE}, {INPUT_SIZE}), got {tuple(x.shape)}")
        face = self.face(x)
        x = self.stage1(self.stem(F.avg_pool2d(x, 2)))
        c2 = self.stage2(x)
        c3 = self.stage3(c2)
        p4 = self.lateral4(self.stage4(c3))
        p3 = self.lateral3(c3) + F.interpolate(p4, scale_factor=2.0, mode="nearest")
        p2 = self.lateral2(c2) + F.interpolate(p3, scale_factor=2.0, mode="nearest")
        hidden = [head(p, face) for head, p in zip(self.heads, (p4, p3, p2), strict=True)]
        offsets = [layer(h).unflatten(1, (-1, CODE_DIM)) for layer, h in zip(self.offsets, hidden, strict=True)]
        return self.base(hidden[0])[:, None] + torch.cat(offsets, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mean_code + self.std_code * self.normalised(x).float()
