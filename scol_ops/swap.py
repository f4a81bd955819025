"""The swap oracle: what a face swapper does with a source, by embedded networks.

A swapper takes the source's identity embedding and renders it on a target (SimSwap, arXiv:2106.06340).  Here the
embedding is MobileFaceNet's, a mapper makes style codes of the identity layers of it, the target's codes keep the other
layers, and the embedded generator renders both (as MegaFS does with StyleGAN2, arXiv:2105.04932).  It measures defences
(DSR, deepfake PSNR) where no swapper's weights can be had.  It is a weaker swapper than those; how weak:
``models/data/swapper.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scol_ops.models.mobilestylegan import CODE_DIM, NUM_CODES
from scol_ops.models.swapper import EMBEDDING_DIM, FIRST, LAST


@dataclass(frozen=True, eq=False)
class Swap:
    """Swapped faces.

    Attributes:
        pictures: (B, 3, 256, 256), RGB in [-1, 1]: rendered faces, over the targets where there is a mask.
        codes: (B, 16, 512): the targets' with the sources' identity layers.
    """

    pictures: Tensor
    codes: Tensor


def swap(
    target: Tensor,
    target_codes: Tensor,
    source: Tensor,
    mapper: Callable[[Tensor], Tensor],
    generator: Callable[[Tensor], Tensor],
    mask: Tensor | None = None,
) -> Swap:
    """Put sources' identities on targets.

    Args:
        target: (B, 3, 256, 256), FFHQ-aligned crops, RGB in [-1, 1].
        target_codes: (B, 16, 512): the crops' inversions; the better, the more of pose and light stays.
        source: (B, 192), unit norm: MobileFaceNet's embeddings of the sources' faces.
        mapper: ``embedded.load_swapper``.
        generator: ``embedded.load_mobilestylegan(256)``.
        mask: (B or 1, 1, 256, 256) in [0, 1]: where the target is replaced (``paste.face_mask`` of its
            landmarks); None for the rendered picture as it is.

    Returns:
        ``Swap``; differentiable to all three.

    Raises:
        ValueError: wrong shapes.
    """
    batch = len(target)
    for name, tensor, shape in (
        ("target", target, (batch, 3, 256, 256)),
        ("target_codes", target_codes, (batch, NUM_CODES, CODE_DIM)),
        ("source", source, (batch, EMBEDDING_DIM)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    if mask is not None and (mask.shape[1:] != (1, 256, 256) or len(mask) not in (1, batch)):
        raise ValueError(f"mask must be ({batch}, 1, 256, 256), got {tuple(mask.shape)}")
    codes = torch.cat([target_codes[:, :FIRST], mapper(source), target_codes[:, LAST:]], 1)
    pictures = generator(codes).clamp(-1, 1)
    return Swap(pictures if mask is None else target + mask * (pictures - target), codes)
