"""dlib's face recogniser (Davis King, 2017), a ResNet with 29 convolutions, 128 numbers a face; data/dlib_resnet.md."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scol_ops.models.recognisers import ARCFACE_LANDMARKS, Recogniser, landmark_alignment, unit

# Channels in, out, and whether the block halves the picture.
_BLOCKS = (
    *[(32, 32, False)] * 3, (32, 64, True), *[(64, 64, False)] * 3, (64, 128, True), *[(128, 128, False)] * 2,
    (128, 256, True), *[(256, 256, False)] * 2, (256, 256, True),
)
_MEAN = (122.782, 117.001, 104.298)


def _template() -> Tensor:
    """dlib's mean face in 150 x 150, in terms of ArcFace's in 112 x 112: larger, and higher in the picture."""
    points = (ARCFACE_LANDMARKS - 56) * 1.114 + 56
    points[:, 1] -= 0.142 * 112
    return points * (150 / 112)


class _Block(nn.Module):
    def __init__(self, cin: int, cout: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv1 = nn.Conv2d(cin, cout, 3, stride=2 if down else 1, padding=0 if down else 1)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        if self.down:
            x = F.avg_pool2d(x, 2)
            # dlib's add_prev: what one of the two lacks in channels, rows or columns counts as zeros.
            shape = [max(a, b) for a, b in zip(x.shape[1:], y.shape[1:], strict=True)]
            x, y = (
                F.pad(t, (0, shape[2] - t.shape[3], 0, shape[1] - t.shape[2], 0, shape[0] - t.shape[1])) for t in (x, y)
            )
        return F.relu(x + y)


class DlibResNet(Recogniser):
    """Five landmarks brought to dlib's mean face in 150 x 150; see ``Recogniser``.

    dlib itself compares descriptors by distance, not by cosine: its cosines are compressed (the card gives the means).
    """

    name, dim, input_size, threshold = "dlib_resnet", 128, 150, 0.911
    hidden_below = 0.93

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, stride=2)
        self.blocks = nn.Sequential(*[_Block(*b) for b in _BLOCKS])
        self.linear = nn.Linear(256, 128, bias=False)
        self.register_buffer("mean", torch.tensor(_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("template", _template(), persistent=False)

    def alignment(self, landmarks: Tensor, boxes: Tensor) -> Tensor:
        return landmark_alignment(landmarks, self.template)

    def descriptor(self, aligned: Tensor) -> Tensor:
        """dlib's own output, before unit norm: (B, 3, 150, 150) in [-1, 1] -> (B, 128), of norm about 1.3."""
        x = ((aligned + 1) * 127.5 - self.mean) / 256
        x = F.max_pool2d(F.relu(self.stem(x)), 3, stride=2)
        return self.linear(self.blocks(x).mean((2, 3)))

    def embed_aligned(self, aligned: Tensor) -> Tensor:
        return unit(self.descriptor(aligned))
