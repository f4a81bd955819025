"""Refinement of the tuned face's residual in pixels: back towards the photo, identity kept away.

Tuning makes a strong semantic change that shows; here the residual itself is optimised, starting from
the tuned picture: what the photo needs comes back, what hides the identity stays.  (Ours; the paper stops
at tuning.  See METHOD, "Seen when it was tried".)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scol_ops.diversity import at_photo_scale, diversify
from scol_ops.filters import damp_chroma
from scol_ops.losses import (
    IdentityFeature,
    id_lock_loss,
    identity_hinge_loss,
    multiscale_ssim_loss,
)
from scol_ops.perception import colour_flip, perceived_colours, visible_difference
from scol_ops.tuning import DeadlineExceeded, TuneResult, confine, masked_psnr

_STEERING = 0.1  # how much the logarithm of FLIP's weight moves in a step, for each e-fold off the target


@dataclass(frozen=True)
class RefineSettings:
    """steps: Adam steps on the residual (0 switches the refinement off).  lr: in units of [-1, 1] a step.
    start: share of the tuned residual that the search begins with.  l2_weight, ssim_weight, visible_weight: pull to the
    photo, by pixels, by structure and by the squared change of what an eye sees.  flip_weight: pull to the photo by the
    mean FLIP over the mask, which leaves most places alone and changes few (``perception.colour_flip``).  flip_target:
    that FLIP, to which the weight is steered step by step, so that faces come out alike whatever the features'
    gradients; 0: the weight stays.
    id_lock: pull to the locked identity.  hinge: push from the original's.  diversity, blur, jpeg_quality: random
    transformations before the features (expectation over transformation).  photo_scale: the features see the face at
    the size that it has in the photo, where finer change is lost.  residual_sigma: low-pass of the residual in crop
    pixels, 0 for none.  chroma: share of the residual's change of colour that stays; 0: lightness alone changes.
    limit: largest change of a pixel in [-1, 1] units (before these two), 0 for none.
    """

    steps: int
    lr: float
    start: float
    l2_weight: float
    ssim_weight: float
    visible_weight: float
    flip_weight: float
    flip_target: float
    id_lock: float
    hinge: float
    diversity: float
    blur: bool
    jpeg_quality: tuple[int, int] | None
    photo_scale: bool
    residual_sigma: float
    chroma: float
    limit: float


@torch.enable_grad()  # see ``tuning.tune``
def refine(
    tuned: Tensor,
    original: Tensor,
    mask: Tensor,
    identity: Sequence[IdentityFeature],
    margins: Sequence[float],
    locked: Sequence[Tensor] | None,
    settings: RefineSettings,
    seed: int = 0,
    deadline: float | None = None,
    photo_side: float | None = None,
) -> TuneResult:
    """Optimise the residual in pixels.

    Args:
        tuned: (1, 3, S, S) in [-1, 1], the tuning stage's picture.
        original, mask: as in ``tune``.
        identity, margins: as in ``tune``.
        locked: per feature, the identity to stay at (unit vectors); None switches the lock off.
        settings, seed, deadline: as in ``tune``.
        photo_side: side of the crop in pixels of the photo, for ``photo_scale``; None: as large as the crop.

    Returns:
        ``TuneResult``; the picture is clamped to [-1, 1].

    Raises:
        ValueError, DeadlineExceeded, FloatingPointError: as ``tune``.
    """
    if len(identity) != len(margins):
        raise ValueError(f"{len(identity)} identity features but {len(margins)} margins")
    if settings.steps == 0 or not identity:
        return TuneResult(tuned, 0, 0.0)
    begin = time.monotonic()
    objective = _Objective(original, mask, identity, margins, locked, settings, seed, photo_side)
    residual = (settings.start * (tuned - original)).clone().requires_grad_(True)
    optimiser = torch.optim.Adam([residual], lr=settings.lr)

    def changed() -> Tensor:
        return confine(original + damp_chroma(residual, settings.chroma), original, mask, settings.residual_sigma)

    history: list[dict[str, float]] = []
    for step in range(settings.steps):
        if deadline is not None and time.monotonic() > deadline:
            raise DeadlineExceeded(f"refinement step {step} of {settings.steps}")
        # Cosine to a tenth: large moves first, then settle.
        rate = settings.lr * (0.55 + 0.45 * math.cos(math.pi * step / settings.steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss, losses = objective(changed(), step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss {float(loss)} at refinement step {step}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if settings.limit:
            with torch.no_grad():
                residual.clamp_(-settings.limit, settings.limit)
        history.append(losses)
    with torch.no_grad():
        result = changed().clamp(-1, 1)
    return TuneResult(result, len(history), time.monotonic() - begin, history)


class _Objective:
    """What the refinement minimises; arguments as of ``refine``."""

    def __init__(
        self,
        original: Tensor,
        mask: Tensor,
        identity: Sequence[IdentityFeature],
        margins: Sequence[float],
        locked: Sequence[Tensor] | None,
        settings: RefineSettings,
        seed: int,
        photo_side: float | None,
    ) -> None:
        self.original, self.mask, self.identity, self.margins = original, mask, identity, margins
        self.locked, self.settings, self.photo_side = locked, settings, photo_side
        self.rng = torch.Generator().manual_seed(seed)
        self.flip_weight = settings.flip_weight
        self.area = mask.sum().clamp_min(1e-6)
        with torch.no_grad():
            self.of_original = [f(original) for f in identity]
            looks = settings.visible_weight or settings.flip_weight
            self.colours = perceived_colours(original) if looks else None

    def __call__(self, picture: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a picture (1, 3, S, S), and its parts by name."""
        settings = self.settings
        seen = picture
        if settings.photo_scale and self.photo_side is not None:
            seen = at_photo_scale(seen, self.photo_side)
        seen = diversify(seen, self.rng, settings.diversity, settings.blur, settings.jpeg_quality)
        features = [f(seen) for f in self.identity]
        hinge = identity_hinge_loss(features, self.of_original, self.margins)
        loss = settings.hinge * hinge + settings.l2_weight * (picture - self.original).square().mean()
        losses = {"hinge": float(hinge.detach())}
        if settings.ssim_weight:
            loss = loss + settings.ssim_weight * multiscale_ssim_loss(picture, self.original)
        if self.colours is not None:
            loss = self._seen(picture, step, loss, losses)
        if self.locked is not None and settings.id_lock:
            lock = id_lock_loss(features, self.locked)
            losses["id_lock"] = float(lock.detach())
            loss = loss + settings.id_lock * lock
        losses["psnr"] = masked_psnr(picture.detach(), self.original, self.mask)
        return loss, losses

    def _seen(self, picture: Tensor, step: int, loss: Tensor, losses: dict[str, float]) -> Tensor:
        """The loss with what an eye sees of the change added; steers the weight of FLIP."""
        settings, perceived = self.settings, perceived_colours(picture)
        if settings.visible_weight:
            visible = visible_difference(perceived, self.colours)
            losses["visible"] = float(visible.detach())
            loss = loss + settings.visible_weight * visible
        if settings.flip_weight:
            flip = (colour_flip(perceived, self.colours) * self.mask[:, 0]).sum() / self.area
            losses["flip"] = float(flip.detach())
            loss = loss + self.flip_weight * flip
            # Not before what tuning left has settled, or its large change would drive the weight too far up.
            if settings.flip_target and 3 * step >= settings.steps:
                off = math.log(max(float(flip.detach()), 1e-6) / settings.flip_target)
                self.flip_weight *= math.exp(_STEERING * max(-1.0, min(1.0, off)))
        return loss
