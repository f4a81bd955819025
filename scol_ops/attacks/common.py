"""What the attacks share: the bound, the loss of dodging, where it starts, and its signed steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scol_ops.attack import AttackResult, momentum
from scol_ops.losses import IdentityFeature


def check(picture: Tensor, identity: Sequence[IdentityFeature], eps: float, step_size: float, steps: int) -> None:
    """Raises ValueError for a wrong shape, no surrogate, or numbers out of range."""
    if picture.ndim != 4 or picture.shape[1] != 3:
        raise ValueError(f"pictures must be (B, 3, H, W), got {tuple(picture.shape)}")
    if not identity:
        raise ValueError("no identity feature to attack")
    if not (0 <= eps <= 1 and step_size >= 0 and steps >= 0):
        raise ValueError(f"eps must be in [0, 1], step size and steps not negative: {eps}, {step_size}, {steps}")


def bounds(picture: Tensor, eps: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lowest and highest pixels allowed: |change| <= 2 eps mask, within [-1, 1].

    Args:
        picture: (B, 3, H, W) in [-1, 1].
        eps: in [0, 1] units.
        mask: (B, 1, H, W) in [0, 1]; None for everywhere.
    """
    reach = 2 * eps * (torch.ones_like(picture[:, :1]) if mask is None else mask)
    return (picture - reach).clamp_min(-1), (picture + reach).clamp_max(1)


def of_original(picture: Tensor, identity: Sequence[IdentityFeature]) -> list[Tensor]:
    """Per surrogate the original's features, unit vectors (B, D)."""
    with torch.no_grad():
        return [feature(picture) for feature in identity]


def dodging_loss(picture: Tensor, identity: Sequence[IdentityFeature], original: Sequence[Tensor]) -> Tensor:
    """Cosine to the original's features, mean over the surrogates: (B,), to be made small."""
    return torch.stack([(f(picture) * o).sum(1) for f, o in zip(identity, original, strict=True)]).mean(0)


def nudged(picture: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The picture with a chequered change of half a level of 255, within the bounds: where a dodging attack starts.

    At the original itself the cosine has its maximum, and its gradient is zero but for rounding.
    """
    y = torch.arange(picture.shape[2], device=picture.device)[:, None]
    x = torch.arange(picture.shape[3], device=picture.device)
    return (picture + ((y + x) % 2 * 2 - 1).to(picture) / 255).clamp(low, high)


@dataclass(frozen=True)
class StepSettings:
    """eps: bound of the change, in [0, 1] pixel units.  steps: signed steps.  step_size: of each, in [0, 1] units,
    None for eps / steps.  decay: of the momentum, 0 for none."""

    eps: float = 8 / 255
    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0


def signed_steps(
    picture: Tensor,
    identity: Sequence[IdentityFeature],
    settings: StepSettings,
    mask: Tensor | None,
    seen: Callable[[Tensor], Tensor] = lambda moved: moved,
    smooth: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> AttackResult:
    """Iterated signed gradients with momentum, the loop of MI-FGSM and of those that add to it.

    Args:
        picture: (B, 3, H, W) in [-1, 1].
        identity: surrogates, pictures -> unit vectors (B, D), differentiable.
        settings: see ``StepSettings``.
        mask: (B, 1, H, W) in [0, 1] that scales the bound; None for everywhere.
        seen: what the surrogates see of the moved picture, differentiable.
        smooth: what becomes of its gradient before the momentum.

    Returns:
        ``AttackResult``: the last iterate, |change| <= 2 eps mask in [-1, 1] units; losses of the pictures as they are.

    Raises:
        ValueError: see ``check``.
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
        (gradient,) = torch.autograd.grad(dodging_loss(seen(moved), identity, original).sum(), moved)
        accumulated = momentum(accumulated, smooth(gradient), settings.decay)
        moved = (moved.detach() - 2 * step_size * accumulated.sign()).clamp(low, high)
    with torch.no_grad():
        before, after = (dodging_loss(p, identity, original) for p in (picture, moved))
    return AttackResult(moved.detach(), before, after, time.monotonic() - begin)
