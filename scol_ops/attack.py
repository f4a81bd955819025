"""Identity inversion attack: move the pixels so that the encoder sees the least similar identity.

Minimise ``|| M * (E(x_p + delta) - w_target) ||^2`` over ``|delta|_inf <= eps`` by projected gradient descent
(PGD: Madry et al. 2018, arXiv:1706.06083) from a seeded random start; M and w_target come from latent
component inspection (METHOD readings 7 and 8).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scol_ops.diversity import diversify
from scol_ops.filters import low_pass
from scol_ops.tuning import DeadlineExceeded


@dataclass(frozen=True)
class AttackSettings:
    """eps: bound of the change in [0, 1] units (the paper's 8/255).  steps: PGD steps (ours), 0 switches off.
    step_size: of one signed step, in [0, 1] units.  random_start: share of eps of the uniform start.
    diversity, blur, jpeg_quality: expectation over transformation, off in the paper.  momentum: decay of the gradients
    of earlier steps (``momentum``).  translation_sigma: the gradient is smoothed by a Gaussian of so many crop pixels,
    as if the picture were seen at all small shifts (TI: Dong et al. 2019, arXiv:1904.02884, eq. 7).  Both 0 in the
    paper.
    """

    eps: float
    steps: int
    step_size: float
    random_start: float
    diversity: float
    blur: bool
    jpeg_quality: tuple[int, int] | None
    momentum: float
    translation_sigma: float


@dataclass
class AttackResult:
    """picture (B, 3, S, S) in [-1, 1]; loss before and after, per face (B,); seconds."""

    picture: Tensor
    loss_before: Tensor
    loss_after: Tensor
    seconds: float


def attack_loss(encoder: Callable[[Tensor], Tensor], picture: Tensor, target: Tensor, components: Tensor) -> Tensor:
    """Mean squared distance over the masked components, per face: (B,); faces without components give 0.

    Args:
        encoder: (B, 3, S, S) -> (B, L, 512).
        target: (B, L, 512).
        components: bool (B, L, 512).
    """
    squares = (encoder(picture) - target).square() * components
    return squares.sum(dim=(1, 2)) / components.sum(dim=(1, 2)).clamp_min(1)


def momentum(accumulated: Tensor, gradient: Tensor, decay: float) -> Tensor:
    """``decay * accumulated + gradient / mean |gradient|``, (B, 3, H, W): MI-FGSM (Dong et al. 2018, arXiv:1710.06081),
    eq. 6, with the mean in place of the sum (only the sign is used)."""
    size = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
    return decay * accumulated + gradient / size.clamp_min(1e-20)


@torch.enable_grad()  # see ``tuning.tune``
def attack(
    encoder: Callable[[Tensor], Tensor],
    picture: Tensor,
    target: Tensor,
    components: Tensor,
    mask: Tensor | None,
    settings: AttackSettings,
    seed: int = 0,
    deadline: float | None = None,
) -> AttackResult:
    """L-infinity PGD through the encoder.

    Args:
        encoder: differentiable, (B, 3, S, S) in [-1, 1] -> codes (B, L, 512).
        picture: (B, 3, S, S) in [-1, 1], the tuned face ``x_p``.
        target: (B, L, 512) and components: bool (B, L, 512), from latent component inspection.
        mask: (B, 1, S, S) in [0, 1] that scales the allowed change; None for everywhere.
        settings, seed: see ``AttackSettings``; the same seed gives the same bits on one device.
        deadline: ``time.monotonic()`` after which ``DeadlineExceeded`` is raised.

    Returns:
        ``AttackResult``; ``|result - picture| <= 2 * eps * mask`` in [-1, 1] units.  The best iterate of each
        face is returned, and never one worse than the picture it was given.

    Raises:
        ValueError: eps, step size, momentum or translation_sigma negative, shapes that do not agree.
        DeadlineExceeded: see ``deadline``.
    """
    if settings.eps < 0 or settings.step_size < 0 or settings.steps < 0:
        raise ValueError(f"eps, step_size and steps must not be negative: {settings}")
    if settings.momentum < 0 or settings.translation_sigma < 0:
        raise ValueError(f"momentum and translation_sigma must not be negative: {settings}")
    if target.shape != components.shape or target.shape[0] != picture.shape[0]:
        raise ValueError(f"shapes {tuple(picture.shape)}, {tuple(target.shape)}, {tuple(components.shape)}")
    begin = time.monotonic()
    with torch.no_grad():
        before = attack_loss(encoder, picture, target, components)
    best, best_loss = picture.clone(), before.clone()
    if settings.steps and settings.eps:
        rng = torch.Generator().manual_seed(seed)
        bound = 2 * settings.eps * (torch.ones_like(picture[:, :1]) if mask is None else mask)  # [-1, 1] units
        start = torch.rand(picture.shape, generator=rng).to(picture) * 2 - 1
        delta = start * settings.random_start * bound
        accumulated = torch.zeros_like(picture)
        for step in range(settings.steps + 1):
            if deadline is not None and time.monotonic() > deadline:
                raise DeadlineExceeded(f"attack step {step} of {settings.steps}")
            delta.requires_grad_(True)
            moved = (picture + delta).clamp(-1, 1)
            plain = not (settings.diversity or settings.blur or settings.jpeg_quality)
            seen = moved if plain else diversify(moved, rng, settings.diversity, settings.blur, settings.jpeg_quality)
            loss = attack_loss(encoder, seen, target, components)
            with torch.no_grad():
                judged = loss.detach() if plain else attack_loss(encoder, moved, target, components)
                better = judged < best_loss
                best[better], best_loss[better] = moved.detach()[better], judged[better]
            if step == settings.steps:
                break
            (gradient,) = torch.autograd.grad(loss.sum(), delta)
            with torch.no_grad():
                accumulated = momentum(accumulated, low_pass(gradient, settings.translation_sigma), settings.momentum)
                delta = (delta - 2 * settings.step_size * accumulated.sign()).clamp(-bound, bound)
    return AttackResult(best, before, best_loss, time.monotonic() - begin)
