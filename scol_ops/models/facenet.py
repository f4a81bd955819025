"""FaceNet: InceptionResnetV1 of the package facenet-pytorch, trained on VGGFace2 or on CASIA-WebFace.

The package is imported for its network alone; it downloads nothing where ``pretrained`` is None.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scol_ops.models.recognisers import Recogniser
from scol_ops.warp import GeometryError

# Side of the cut over the box's: a margin of 14 px in the picture of 160, as the package's evaluation on LFW has it.
_SCALE = 160 / (160 - 14)


def network(classes: int | None) -> nn.Module:
    """The package's network in its order of layers; ``classes``: of the head, None leaves it out."""
    from facenet_pytorch.models.inception_resnet_v1 import InceptionResnetV1  # imports torchvision: only if needed

    if classes is None:
        return InceptionResnetV1(pretrained=None, classify=False)
    return InceptionResnetV1(pretrained=None, classify=True, num_classes=classes)


class FaceNet(Recogniser):
    """MTCNN's box, a little wider, stretched to a square as the training faces were; see ``Recogniser``.

    The reference's picture is ``(p - 127.5) / 128`` of p in 0..255, and pictures of any side from 75 px work.
    """

    # At a false accept rate of 1 %: CLIP2Protect's own number for its file, see ``ir.IRSE50``; not measured here.
    name, dim, input_size, threshold = "facenet", 512, 160, 0.409131

    def __init__(self, classes: int | None = 8631) -> None:
        super().__init__()
        self.network = network(classes)
        self.network.classify = False

    def alignment(self, landmarks: Tensor, boxes: Tensor) -> Tensor:
        low, high = boxes[:, :2], boxes[:, 2:]
        if not bool((torch.isfinite(boxes).all(1) & (high > low).all(1)).all()):
            raise GeometryError("boxes must be finite, with x0 < x1 and y0 < y1")
        step = _SCALE * (high - low) / self.input_size  # (B, 2), each direction by itself
        shift = (low + high) / 2 - step * (self.input_size - 1) / 2
        return torch.cat([torch.diag_embed(step), shift[:, :, None]], dim=2)

    def embed_aligned(self, aligned: Tensor) -> Tensor:
        return self.network(aligned * (127.5 / 128))


class FaceNetCasia(FaceNet):
    """The same, of the file that was trained on CASIA-WebFace; the threshold is FaceNet's, for want of another."""

    name = "facenet-casia"

    def __init__(self, classes: int | None = 10575) -> None:
        super().__init__(classes)
