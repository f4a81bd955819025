"""LPIPS 0.1 (Zhang et al. 2018, arXiv:1801.03924) as a differentiable loss, by the package ``lpips``.

The package brings the weights of its linear layers; those of the backbone (VGG16 or AlexNet of torchvision, trained on
ImageNet) are not in it, and nothing is downloaded here: the user adds them to the model store.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NETS = ("vgg", "alex")
# The package's own weights, lpips/weights/v0.1/NET.pth of lpips 0.1.4.
LINEAR_SHA256 = {
    "vgg": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "alex": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
}


class LPIPSDistance(nn.Module):
    """Perceptual distance of pictures (B, 3, H, W), RGB in [-1, 1]; smaller is more alike, 0 for equal ones.

    Args:
        net: ``vgg`` or ``alex``.

    Attributes:
        package: the package's network; its entries but ``lins.*`` (the same tensors as ``lin*``) are the layout.
    """

    def __init__(self, net: str) -> None:
        super().__init__()
        if net not in NETS:
            raise ValueError(f"net must be one of {NETS}, got {net!r}")
        from lpips import LPIPS  # imports torchvision and more: only if needed

        self.net = net
        self.package = LPIPS(pretrained=False, net=net, version="0.1", pnet_rand=True, verbose=False)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """The five maps after ReLU, before the unit norm."""
        return list(self.package.net(self.package.scaling_layer(pictures)))

    def reference(self, pictures: Tensor) -> list[Tensor]:
        """What ``to_reference`` compares with: for a picture that stays the same over many steps."""
        return [_unit(f) for f in self.features(pictures)]

    def per_layer(self, reference: Sequence[Tensor], pictures: Tensor) -> Tensor:
        """The five terms of the distance, (B, 5)."""
        terms = [
            self.package.lins[i]((a - b).square()).mean(dim=(1, 2, 3))
            for i, (a, b) in enumerate(zip(reference, self.reference(pictures), strict=True))
        ]
        return torch.stack(terms, dim=1)

    def to_reference(self, reference: Sequence[Tensor], pictures: Tensor) -> Tensor:
        """Distances (B,) to pictures that ``reference`` was made of."""
        return self.per_layer(reference, pictures).sum(dim=1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,)."""
        return self.to_reference(self.reference(a), b)


def _unit(features: Tensor) -> Tensor:
    """Each place's channels to unit length. Where all are 0, the package's square root has no gradient; here it is
    1."""
    power = features.square().sum(dim=1, keepdim=True)
    empty = power == 0
    length = torch.where(empty, 1.0, power).sqrt()
    return features / torch.where(empty, 1.0, length + 1e-10)
