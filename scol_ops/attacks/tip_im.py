"""TIP-IM: towards one of several other identities, chosen anew at each step.

Yang et al., "Towards Face Encryption by Generating Adversarial Identity Masks" (ICCV 2021, arXiv:2003.06814): the
loss is the distance to a target's features minus that to the original's (their L_iden) plus gamma times a naturalness
term (maximum mean discrepancy of the pixels); every step goes towards the target whose step gains most, with momentum
and diverse inputs.  Gain: ``log(1 + sum_i exp(d(x, original) - d(x, target_i)))``.  L-infinity; the authors' numbers:
eps 12 of 255, steps of 1.5 eps / N, 10 targets, gamma 0 for the strongest protection (their code,
github.com/ShawnXYang/TIP-IM, looked up for these numbers).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scol_ops.attack import AttackResult, momentum
from scol_ops.attacks.common import bounds, check, nudged, of_original
from scol_ops.diversity import random_resize_shift
from scol_ops.losses import IdentityFeature


@dataclass(frozen=True)
class TIPIMSettings:
    """eps, steps, decay: as ``StepSettings``.  step_size: in [0, 1] units, None for 1.5 eps / steps.  gamma: weight
    of the naturalness.  diversity: strength of ``random_resize_shift`` before the surrogates, 0 for none."""

    eps: float = 8 / 255
    steps: int = 20
    step_size: float | None = None
    decay: float = 1.0
    gamma: float = 0.0
    diversity: float = 1.0


def identity_loss(features: Sequence[Tensor], original: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """(B,): squared distance to the target minus that to the original, mean over surrogates; unit vectors (B, D)."""
    terms = [
        (f - t).square().sum(1) - (f - o).square().sum(1) for f, o, t in zip(features, original, target, strict=True)
    ]
    return torch.stack(terms).mean(0)


def gain(features: Sequence[Tensor], original: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """(B,): how far from the original and near to any target, mean over surrogates; targets (T, D)."""
    out = []
    for f, o, t in zip(features, original, targets, strict=True):
        away, near = (f - o).norm(dim=1, keepdim=True), torch.cdist(f, t)
        out.append(torch.log1p(torch.exp(away - near).sum(1)))
    return torch.stack(out).mean(0)


def discrepancy(a: Tensor, b: Tensor, width: float = 1.0) -> Tensor:
    """Squared maximum mean discrepancy of two sets of pictures (B, 3, H, W), scalar: Gaussian kernel on pixels, whose
    mean squared difference is measured in units of ``width``."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, y).square() / (2 * width**2 * x.shape[1])).mean()

    a, b = a.flatten(1), b.flatten(1)
    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)


def tip_im(
    picture: Tensor,
    identity: Sequence[IdentityFeature],
    targets: Sequence[Tensor],
    settings: TIPIMSettings = TIPIMSettings(),
    mask: Tensor | None = None,
    seed: int = 0,
) -> AttackResult:
    """Move the surrogates' features to those of another identity.

    Args:
        picture, identity, mask: as ``mi_fgsm``; one face at a time, B = 1, since each has its own target.
        targets: per surrogate, the target identities' features, unit vectors (T, D), the same T people in each.
        settings: see ``TIPIMSettings``.
        seed: of the diverse inputs.

    Returns:
        ``AttackResult``: the last iterate, |change| <= 2 eps mask in [-1, 1] units; its losses are ``identity_loss``
        to the target that is nearest at the end.

    Raises:
        ValueError: wrong shape, no surrogate, targets that do not go with them, numbers out of range.
    """
    step_size = 1.5 * settings.eps / max(1, settings.steps) if settings.step_size is None else settings.step_size
    check(picture, identity, settings.eps, step_size, settings.steps)
    if len(picture) != 1:
        raise ValueError(f"one face at a time, got {len(picture)}")
    if len(targets) != len(identity) or len({len(t) for t in targets}) != 1 or not len(targets[0]):
        raise ValueError(f"{[len(t) for t in targets]} targets for {len(identity)} identity features")
    begin = time.monotonic()
    rng = torch.Generator().manual_seed(seed)
    original = of_original(picture, identity)
    low, high = bounds(picture, settings.eps, mask)
    moved = nudged(picture, low, high)
    accumulated = torch.zeros_like(picture)
    count = len(targets[0])
    for _ in range(settings.steps):
        moved.requires_grad_(True)
        features = [f(random_resize_shift(moved, rng, settings.diversity)) for f in identity]
        losses = [identity_loss(features, original, [t[i : i + 1] for t in targets]) for i in range(count)]
        natural = settings.gamma * discrepancy(moved, picture) if settings.gamma else 0.0
        steps, directions = [], []
        for i, loss in enumerate(losses):
            (gradient,) = torch.autograd.grad((loss + natural).sum(), moved, retain_graph=i < count - 1)
            directions.append(momentum(accumulated, gradient, settings.decay))
            steps.append((moved.detach() - 2 * step_size * directions[-1].sign()).clamp(low, high))
        with torch.no_grad():
            gains = torch.cat([gain([f(step) for f in identity], original, targets) for step in steps])
        best = int(gains.argmax())
        moved, accumulated = steps[best], directions[best]
    with torch.no_grad():
        ends = [[f(p) for f in identity] for p in (picture, moved)]
        after = torch.stack([identity_loss(ends[1], original, [t[i : i + 1] for t in targets]) for i in range(count)])
        nearest = int(after.argmin())
        before = identity_loss(ends[0], original, [t[nearest : nearest + 1] for t in targets])
    return AttackResult(moved.detach(), before, after[nearest], time.monotonic() - begin)
