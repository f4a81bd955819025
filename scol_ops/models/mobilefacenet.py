"""MobileFaceNet (Chen et al., 2018, arXiv:1804.07573), 192 numbers a face; weights and facts: data/mobilefacenet.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scol_ops.models.recognisers import ARCFACE_LANDMARKS, Recogniser, landmark_alignment, unit

# Channels in, expanded, out, stride of each inverted residual block.
_BLOCKS = (
    (64, 128, 64, 2), *[(64, 128, 64, 1)] * 4, (64, 256, 128, 2), *[(128, 256, 128, 1)] * 6, (128, 512, 128, 2),
    *[(128, 256, 128, 1)] * 2,
)
_LAST_STRIDE = 12  # the block that goes from 14 to 7 px


class _Conv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding (or none for a global kernel), then a PReLU if asked for."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, prelu: bool = False) -> None:
        super().__init__(cin, cout, kernel, stride, padding=1 if (kernel, stride) == (3, 1) else 0, groups=groups)
        self.prelu = nn.Parameter(torch.empty(cout)) if prelu else None

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 2:  # of an even picture, SAME leaves the one row and column of padding to the far side
            x = F.pad(x, (0, 1, 0, 1))
        x = super().forward(x)
        return x if self.prelu is None else F.prelu(x, self.prelu)


class _Block(nn.Module):
    def __init__(self, cin: int, expanded: int, cout: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1
        self.expand = _Conv(cin, expanded, 1, prelu=True)
        self.depthwise = _Conv(expanded, expanded, 3, stride, groups=expanded, prelu=True)
        self.project = _Conv(expanded, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileFaceNet(Recogniser):
    """Five landmarks brought to ArcFace's positions in 112 x 112; see ``Recogniser``."""

    name, dim, input_size, threshold = "mobilefacenet", 192, 112, 0.328
    hidden_below = 0.45

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({
            "conv": _Conv(3, 64, 3, 2, prelu=True),
            "depthwise": _Conv(64, 64, 3, groups=64, prelu=True),
            "pointwise": _Conv(64, 64, 1),
        })
        self.blocks = nn.Sequential(*[_Block(*b) for b in _BLOCKS])
        self.head = nn.ModuleDict({
            "conv": _Conv(128, 512, 1, prelu=True),
            "global_depthwise": _Conv(512, 512, 7, groups=512),
            "linear1": _Conv(512, 512, 1),
            "linear2": _Conv(512, 192, 1),
        })

    def alignment(self, landmarks: Tensor, boxes: Tensor) -> Tensor:
        return landmark_alignment(landmarks, ARCFACE_LANDMARKS)

    def features(self, aligned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, 112, 112) in [-1, 1] -> features (B, 128, 14, 14) and (B, 128, 7, 7), embeddings (B, 192)."""
        x = aligned * (127.5 / 128)  # (p - 127.5) / 128 of p in 0..255
        for layer in self.stem.values():
            x = layer(x)
        middle = self.blocks[:_LAST_STRIDE](x)
        late = self.blocks[_LAST_STRIDE:](middle)
        x = late
        for layer in self.head.values():
            x = layer(x)
        return middle, late, unit(x.flatten(1))

    def embed_aligned(self, aligned: Tensor) -> Tensor:
        return self.features(aligned)[2]
