"""MI-FGSM: iterated signed gradients with momentum.

Dong et al., "Boosting Adversarial Attacks with Momentum" (CVPR 2018, arXiv:1710.06081), Algorithm 1 and eqs. 6 and 7,
with the loss of dodging: the cosine to the original's features.  L-infinity.  The paper's own numbers: eps 16 of 255,
10 steps of eps / 10, decay 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scol_ops.attack import AttackResult, momentum
from scol_ops.attacks.common import bounds, check, dodging_loss, nudged, of_original
from scol_ops.losses import IdentityFeature


@dataclass(frozen=True)
class MIFGSMSettings:
    """eps: bound of the change, in [0, 1] pixel units.  steps: signed steps.  step_size: of each, in [0, 1] units,
    None for eps / steps.  decay: of the momentum, 0 for none (then it is I-FGSM)."""

    eps: float = 8 / 255
    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0


def mi_fgsm(
    picture: Tensor,
    identity: Sequence[IdentityFeature],
    settings: MIFGSMSettings = MIFGSMSettings(),
    mask: Tensor | None = None,
) -> AttackResult:
    """Move the surrogates' features away from the original's.

    Args:
        picture: (B, 3, H, W) in [-1, 1].
        identity: surrogates, pictures -> unit vectors (B, D), differentiable.
        settings: see ``MIFGSMSettings``.
        mask: (B, 1, H, W) in [0, 1] that scales the bound; None for everywhere.

    Returns:
        ``AttackResult``: the last iterate, |change| <= 2 eps mask in [-1, 1] units, and its loss (``dodging_loss``).
        There is no random start: the same picture gives the same result on one device.

    Raises:
        ValueError: wrong shape, no surrogate, numbers out of range.
    """
    step_size = settings.eps / max(1, settings.steps) if settings.step_size is None else settings.step_size
    check(picture, identity, settings.eps, step_size, settings.steps)
    begin = time.monotonic()
    original = of_original(picture, identity)
    low, high = bounds(picture, settings.eps, mask)
    moved = nudged(picture, low, high)
    accumulated = torch.zeros_like(picture)
    for _ in range(settings.steps):
        moved.requires_grad_(True)
        (gradient,) = torch.autograd.grad(dodging_loss(moved, identity, original).sum(), moved)
        accumulated = momentum(accumulated, gradient, settings.decay)
        moved = (moved.detach() - 2 * step_size * accumulated.sign()).clamp(low, high)
    with torch.no_grad():
        before, after = (dodging_loss(p, identity, original) for p in (picture, moved))
    return AttackResult(moved.detach(), before, after, time.monotonic() - begin)
