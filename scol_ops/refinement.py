"""Refinement of a face's residual in pixels: identity away, and as little as possible to be seen.

Tuning makes a strong semantic change that shows; here the residual itself is optimised, from the tuned picture or from
the photo: what an eye sees of it (``perception``) against what recognisers see, each pixel within a bound.  (Ours; the
paper stops at tuning.  See METHOD, "Seen when it was tried", and docs/results.md.)
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
from scol_ops.losses import IdentityFeature, id_lock_loss, identity_hinge_loss
from scol_ops.perception import PIXELS_PER_DEGREE, VisibleDifference
from scol_ops.tuning import DeadlineExceeded, TuneResult, confine, masked_psnr
from scol_ops.visibility import WINDOW_SHARE

_ALMOST = 0.99  # of the bound: a residual that starts there can still move
_SMALLEST = 0.45  # of a face's size in its photo: a little below half, which is what sites often leave


@dataclass(frozen=True)
class RefineSettings:
    """steps: Adam steps on the residual (0 switches the refinement off).  lr: in units of [-1, 1] a step.
    start: share of the tuned residual that the search begins with; 0: from the photo.
    seen: weight of what an eye sees of the change, in JOD (``perception.VisibleDifference``).  surroundings: how much a
    place outside the face's window counts in it, 0..1.  zoom: how many times the photo is enlarged where it is looked
    at.
    hinge: push from the original's identity.  id_lock: pull to the locked one.  draws: random transformations a step,
    each before the features (expectation over transformation); diversity, blur, jpeg_quality: which.  photo_scale: the
    features see the face at the size that it has in the photo, where finer change is lost.  shrink: share of the draws
    in which it is smaller still, down to ``_SMALLEST``.
    limit: largest change of a pixel in [0, 1] units, 0 for none.
    chroma: share of the residual's change of colour that stays; 0: lightness alone changes.  residual_sigma: low-pass
    of the residual, in pixels of the photo or of the crop, whichever are larger; 0 for none.
    """

    steps: int
    lr: float
    start: float
    seen: float
    surroundings: float
    zoom: float
    hinge: float
    id_lock: float
    draws: int
    diversity: float
    blur: bool
    jpeg_quality: tuple[int, int] | None
    photo_scale: bool
    shrink: float
    limit: float
    chroma: float
    residual_sigma: float


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
    spans: Sequence[float] | None = None,
) -> TuneResult:
    """Optimise the residual in pixels.

    Args:
        tuned: (1, 3, S, S) in [-1, 1], the tuning stage's picture.
        original, mask: as in ``tune``.
        identity, margins: as in ``tune``.
        locked: per feature, the identity to stay at (unit vectors); None switches the lock off.
        settings, seed, deadline: as in ``tune``.
        photo_side: side of the crop in pixels of the photo, for ``photo_scale``; None: as large as the crop.
        spans: as of ``identity_hinge_loss``.

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
    objective = _Objective(original, mask, identity, margins, locked, settings, seed, photo_side, spans)
    residual = _Residual(settings, settings.start * (tuned - original))
    optimiser = torch.optim.Adam([residual.parameter], lr=residual.lr)

    # No finer than the photo's pixels: what alternates from pixel to pixel is cheap to the eye's models, and seen as a
    # grid.
    size = original.shape[-1]
    sigma = settings.residual_sigma * max(1.0, size / (photo_side or size))

    def changed() -> Tensor:
        return confine(original + residual(), original, mask, sigma)

    history: list[dict[str, float]] = []
    for step in range(settings.steps):
        if deadline is not None and time.monotonic() > deadline:
            raise DeadlineExceeded(f"refinement step {step} of {settings.steps}")
        # Cosine to a tenth: large moves first, then settle.
        for group in optimiser.param_groups:
            group["lr"] = residual.lr * (0.55 + 0.45 * math.cos(math.pi * step / settings.steps))
        loss, losses = objective(changed())
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss {float(loss)} at refinement step {step}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        history.append(losses)
    with torch.no_grad():
        result = changed().clamp(-1, 1)
    return TuneResult(result, len(history), time.monotonic() - begin, history)


class _Residual:
    """The change of the pixels, (1, 3, S, S) in [-1, 1] units, kept within its bound by a hyperbolic tangent: clamping
    would let the gradient of what lies at the bound count for nothing, and draw contour lines on smooth skin.

    Attributes:
        parameter: what is optimised.
        lr: its learning rate.
    """

    def __init__(self, settings: RefineSettings, first: Tensor) -> None:
        self._limit, self._chroma = 2 * settings.limit, settings.chroma
        self.lr = settings.lr / (self._limit or 1)
        if self._limit:
            first = torch.atanh((first / self._limit).clamp(-_ALMOST, _ALMOST))
        self.parameter = first.detach().clone().requires_grad_(True)

    def __call__(self) -> Tensor:
        residual = self._limit * torch.tanh(self.parameter) if self._limit else self.parameter
        return damp_chroma(residual, self._chroma)


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
        spans: Sequence[float] | None,
    ) -> None:
        self.original, self.mask, self.identity, self.margins = original, mask, identity, margins
        self.locked, self.settings, self.spans = locked, settings, spans
        self.side = float(original.shape[-1]) if photo_side is None else photo_side
        self.rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.of_original = [f(original) for f in identity]
        self.visible = None
        if settings.seen:
            # A crop's pixel is so many of the photo's, which is what people look at.
            size = original.shape[-1]
            weight = _looked_at(size, settings.surroundings).to(original)
            self.visible = VisibleDifference(original, PIXELS_PER_DEGREE * size / self.side / settings.zoom, weight)

    def __call__(self, picture: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss of a picture (1, 3, S, S), and its parts by name."""
        settings = self.settings
        hinge = lock = picture.new_zeros(())
        for _ in range(settings.draws):
            drawn = diversify(self._sized(picture), self.rng, settings.diversity, settings.blur, settings.jpeg_quality)
            features = [f(drawn) for f in self.identity]
            hinge = hinge + identity_hinge_loss(features, self.of_original, self.margins, self.spans) / settings.draws
            if self.locked is not None and settings.id_lock:
                lock = lock + id_lock_loss(features, self.locked) / settings.draws
        loss = settings.hinge * hinge + settings.id_lock * lock
        losses = {"hinge": float(hinge.detach()), "id_lock": float(lock.detach())}
        if self.visible is not None:
            seen = self.visible(picture).sum()
            losses["seen"] = float(seen.detach())
            loss = loss + settings.seen * seen
        losses["psnr"] = masked_psnr(picture.detach(), self.original, self.mask)
        return loss, losses

    def _sized(self, picture: Tensor) -> Tensor:
        """The picture as recognisers get it: at its size in the photo, and in most draws smaller, as sites make it."""
        if not self.settings.photo_scale:
            return picture
        share, side = torch.rand(2, generator=self.rng).tolist()
        smaller = 1 - (1 - _SMALLEST) * side if share < self.settings.shrink else 1.0
        return at_photo_scale(picture, min(self.side, picture.shape[-1]) * smaller)


def _looked_at(size: int, surroundings: float) -> Tensor:
    """(1, 1, size, size): 1 in the face's window, where JOD is measured, ``surroundings`` outside."""
    weight = torch.full((1, 1, size, size), float(surroundings))
    edge = round(size * (1 - WINDOW_SHARE) / 2)
    weight[..., edge : size - edge, edge : size - edge] = 1
    return weight
