"""The improved ResNets of ArcFace's PyTorch ports, plain (IR) and with squeeze and excitation (IR-SE).

Source: Deng et al. 2019 (arXiv:1801.07698); layout: github.com/TreB1eN/InsightFace_Pytorch, as e4e and CLIP2Protect
carry it on.  The recognisers ``irse50`` and ``ir152``, and the trunk of the e4e encoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scol_ops.models.recognisers import ARCFACE_LANDMARKS, Recogniser, landmark_alignment, unit

# Units of each of the four groups; the groups' widths are 64, 128, 256 and 512, and each begins with stride 2.
UNITS = {50: (3, 4, 14, 3), 152: (3, 8, 36, 3)}
_WIDTHS = (64, 128, 256, 512)


class SqueezeExcite(nn.Module):
    """Channels weighted by what a small network makes of their means (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, width: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, width // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(width // reduction, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))))


class Unit(nn.Module):
    """Norm, convolution, PReLU, convolution with the stride, norm (and excitation); plus the input, nothing after."""

    def __init__(self, cin: int, cout: int, stride: int, excite: bool) -> None:
        super().__init__()
        # Where the width stays, the shortcut takes every n-th pixel and has no entries.
        self.shortcut_layer = (
            nn.MaxPool2d(1, stride)
            if cin == cout
            else nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
        )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(cin),
            nn.Conv2d(cin, cout, 3, 1, 1, bias=False),
            nn.PReLU(cout),
            nn.Conv2d(cout, cout, 3, stride, 1, bias=False),
            nn.BatchNorm2d(cout),
            *([SqueezeExcite(cout)] if excite else []),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


def stem() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))


def trunk(layers: int, excite: bool) -> nn.Sequential:
    """All units; every group halves the picture, rounding up.

    Args:
        layers: 50 or 152.
    """
    units, cin = [], 64
    for width, count in zip(_WIDTHS, UNITS[layers], strict=True):
        for i in range(count):
            units.append(Unit(cin, width, 2 if i == 0 else 1, excite))
            cin = width
    return nn.Sequential(*units)


class IRNetwork(nn.Module):
    """Stem, trunk and the layer to 512 numbers.

    Args:
        layers: 50 or 152.
        excite: IR-SE.
        positions: places of the last feature map that the linear layer reads: 49 for 112 px, 196 for 224 px.
        affine: whether the last norm has weights of its own.
    """

    def __init__(self, layers: int, excite: bool, positions: int = 49, affine: bool = True) -> None:
        super().__init__()
        self.input_layer = stem()
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512), nn.Dropout(), nn.Flatten(), nn.Linear(512 * positions, 512),
            nn.BatchNorm1d(512, affine=affine),
        )  # fmt: skip
        self.body = trunk(layers, excite)
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 512), not normalised.

        Raises:
            ValueError: a picture whose last feature map is not of ``positions`` places.
        """
        x = self.body(self.input_layer(x))
        if x.shape[2] * x.shape[3] != self.positions:
            raise ValueError(
                f"the picture's last feature map is {x.shape[2]} x {x.shape[3]}, this network reads {self.positions} "
                "places"
            )
        # `contiguous`: flattened channel by channel also where the map is channels-last.
        return self.output_layer(x.contiguous())


class _ArcFaceAligned(Recogniser):
    """Five landmarks brought to ArcFace's positions in 112 x 112, as the networks were trained."""

    dim, input_size = 512, 112
    network: nn.Module

    def alignment(self, landmarks: Tensor, boxes: Tensor) -> Tensor:
        return landmark_alignment(landmarks, ARCFACE_LANDMARKS)

    def embed_aligned(self, aligned: Tensor) -> Tensor:
        return unit(self.network(aligned))


class IRSE50(_ArcFaceAligned):
    """IR-SE50 (``model_ir_se50.pth``, ``irse50.pth``); see ``Recogniser``."""

    # At a false accept rate of 1 %: CLIP2Protect's own number for its files (its test script), not measured here.
    name, threshold = "irse50", 0.241045

    def __init__(self, positions: int = 49, affine: bool = True) -> None:
        super().__init__()
        self.network = IRNetwork(50, True, positions, affine)


class IR152(_ArcFaceAligned):
    """IR152 (``ir152.pth``); see ``Recogniser``. The threshold's source is that of ``IRSE50``."""

    name, threshold = "ir152", 0.166788

    def __init__(self, positions: int = 49) -> None:
        super().__init__()
        self.network = IRNetwork(152, False, positions)
