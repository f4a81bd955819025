"""MobileFaceNet with 512 numbers a face, as InsightFace_Pytorch and CLIP2Protect have it (``mobile_face.pth``).

Chen et al. 2018 (arXiv:1804.07573).  Another network than the embedded ``mobilefacenet`` of 192 numbers.
"""

from __future__ import annotations

from torch import Tensor, nn

from scol_ops.models.ir import _ArcFaceAligned


class _Conv(nn.Module):
    """Convolution without bias, norm, and a PReLU unless ``linear``."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1,
                 linear: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.prelu = None if linear else nn.PReLU(cout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if self.prelu is None else self.prelu(x)


class _Bottleneck(nn.Module):
    """Widen, filter each channel, project; ``residual`` adds the input."""

    def __init__(self, cin: int, cout: int, width: int, stride: int, residual: bool = False) -> None:
        super().__init__()
        self.conv = _Conv(cin, width, 1)
        self.conv_dw = _Conv(width, width, 3, stride, 1, groups=width)
        self.project = _Conv(width, cout, 1, linear=True)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.conv_dw(self.conv(x)))
        return x + y if self.residual else y


class _Stack(nn.Module):
    def __init__(self, channels: int, count: int, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(*[_Bottleneck(channels, channels, width, 1, residual=True) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class MobileFaceNet512Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _Conv(3, 64, 3, 2, 1)
        self.conv2_dw = _Conv(64, 64, 3, 1, 1, groups=64)
        self.conv_23 = _Bottleneck(64, 64, 128, 2)
        self.conv_3 = _Stack(64, 4, 128)
        self.conv_34 = _Bottleneck(64, 128, 256, 2)
        self.conv_4 = _Stack(128, 6, 256)
        self.conv_45 = _Bottleneck(128, 128, 512, 2)
        self.conv_5 = _Stack(128, 2, 256)
        self.conv_6_sep = _Conv(128, 512, 1)
        self.conv_6_dw = _Conv(512, 512, 7, groups=512, linear=True)
        self.linear = nn.Linear(512, 512, bias=False)
        self.bn = nn.BatchNorm1d(512)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], sides of 97 to 112 px -> (B, 512), not normalised.

        Raises:
            ValueError: sides whose last feature map is not 7 x 7.
        """
        side = tuple(x.shape[-2:])
        x = self.conv_3(self.conv_23(self.conv2_dw(self.conv1(x))))
        x = self.conv_5(self.conv_45(self.conv_4(self.conv_34(x))))
        if x.shape[-2:] != (7, 7):
            raise ValueError(f"MobileFaceNet reads faces of 112 px, got {side[0]} x {side[1]}")
        return self.bn(self.linear(self.conv_6_dw(self.conv_6_sep(x)).flatten(1)))


class MobileFaceNet512(_ArcFaceAligned):
    """See ``Recogniser``. The threshold's source is that of ``ir.IRSE50``."""

    name, threshold = "mobilefacenet-512", 0.301611

    def __init__(self) -> None:
        super().__init__()
        self.network = MobileFaceNet512Network()
