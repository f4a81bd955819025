"""faceres: a MobileNet v1 (Howard et al., 2017, arXiv:1704.04861) that tells faces, 1,024 numbers; data/faceres.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scol_ops.models.recognisers import Recogniser, box_alignment, unit

# Channels in, out, stride of each depthwise-separable block.
_BLOCKS = (
    (32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), *[(512, 512, 1)] * 5,
    (512, 1024, 2), (1024, 1024, 1),
)
_MEAN_BGR = (103.939, 116.779, 123.68)
_BOX_SCALE = 1.1


class _Conv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding of an even picture, then relu6."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(cin, cout, kernel, stride, padding=1 if (kernel, stride) == (3, 1) else 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 2:  # PyTorch's symmetric padding=1 would be another network
            x = F.pad(x, (0, 1, 0, 1))
        return F.relu6(super().forward(x))


class _Block(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.depthwise = _Conv(cin, cin, 3, stride, groups=cin)
        self.pointwise = _Conv(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class FaceRes(Recogniser):
    """An upright square 1.1 times the box, in 224 x 224, landmarks unused; see ``Recogniser``.

    All numbers of an embedding are >= 0, so no cosine is below 0.
    """

    name, dim, input_size, threshold = "faceres", 1024, 224, 0.545
    hidden_below = 0.65

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"conv": _Conv(3, 32, 3, 2)})
        self.blocks = nn.Sequential(*[_Block(*b) for b in _BLOCKS])
        self.register_buffer("mean", torch.tensor(_MEAN_BGR).reshape(1, 3, 1, 1), persistent=False)

    def alignment(self, landmarks: Tensor, boxes: Tensor) -> Tensor:
        return box_alignment(boxes, _BOX_SCALE, self.input_size)

    def embed_aligned(self, aligned: Tensor) -> Tensor:
        x = (aligned.flip(1) + 1) * 127.5 - self.mean
        return unit(self.blocks(self.stem["conv"](x)).mean((2, 3)))
