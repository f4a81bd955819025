"""Generator tuning with the id-lock: make the fused code show the original picture.

Pivotal tuning (Roich et al. 2021, arXiv:2106.05744) around the fused code instead of the face's own:
the weights move until ``G_theta(w_f)`` looks like ``x``, while the id-lock holds the output's identity
where ``G_theta0(w_f)`` had it (METHOD reading 5).  The residual against ``x`` is confined to the face by
a soft mask and may be low-passed, so that hair, background and fine texture stay the photo's own.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scol_ops.diversity import diversify
from scol_ops.filters import low_pass
from scol_ops.losses import (
    IdentityFeature,
    PerceptualDistance,
    id_lock_loss,
    identity_hinge_loss,
    reconstruction_loss,
)
from scol_ops.runtime import computes_bf16

PARAMETER_SETS = ("all", "convolutions", "late")


@dataclass(frozen=True)
class TuneSettings:
    """Numbers of the tuning stage. Values that are in use: ``pipelines.config.sections``, as for all settings here.

    steps: Adam steps.  lr: its rate (2e-3 diverges, measured).  parameters: which generator weights move
    (``all`` but the mapping network; ``convolutions`` leaves the style layers; ``late`` keeps the 4..32 px
    blocks).  l2_weight, ssim_weight: reconstruction; lpips_weight: in place of SSIM's where LPIPS is given.  id_lock:
    the paper's lambda (1).  hinge: weight of the hinge on the similarity to the original.  diversity: strength of
    random resize and shift before the identity features, 0 for none; blur, jpeg_quality: random blur and JPEG as well
    (expectation over transformation, off in the paper).  residual_sigma: low-pass of the residual in crop pixels, 0 for
    none. target_psnr: stop early when the reconstruction inside the mask reaches it and the hinge is met (dB).
    """

    steps: int
    lr: float
    parameters: str
    l2_weight: float
    ssim_weight: float
    lpips_weight: float
    id_lock: float
    hinge: float
    diversity: float
    blur: bool
    jpeg_quality: tuple[int, int] | None
    residual_sigma: float
    target_psnr: float
    bf16: bool


@dataclass
class TuneResult:
    """picture: (1, 3, S, S) in [-1, 1]; steps done; history: one dict of losses a step; seconds."""

    picture: Tensor
    steps: int
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)


class DeadlineExceeded(TimeoutError):
    """A face took longer than its time limit."""


def select_parameters(generator: nn.Module, which: str) -> list[nn.Parameter]:
    """Switch gradients on for one of ``PARAMETER_SETS`` and return those parameters."""
    if which not in PARAMETER_SETS:
        raise ValueError(f"parameters must be one of {PARAMETER_SETS}, got {which!r}")
    chosen, moving = [], set(generator.tunable(which))
    for name, parameter in generator.named_parameters():
        take = name in moving
        parameter.requires_grad_(take)
        if take:
            chosen.append(parameter)
    return chosen


def confine(picture: Tensor, original: Tensor, mask: Tensor, sigma: float = 0.0) -> Tensor:
    """``original + mask * low_pass(picture - original)``: what would be pasted back, (B, 3, S, S)."""
    return original + mask * low_pass(picture - original, sigma)


def masked_psnr(a: Tensor, b: Tensor, mask: Tensor) -> float:
    """PSNR in dB of pictures in [-1, 1] over a soft mask (1, 1, S, S) (mean of squares weighted by it)."""
    error = ((a - b).square().mean(dim=1, keepdim=True) * mask).sum() / mask.sum().clamp_min(1e-6)
    return float(10 * torch.log10(4 / error.clamp_min(1e-12)))


@torch.enable_grad()  # an earlier face that was stopped inside the optimiser may have left the mode off
def tune(
    generator: nn.Module,
    fused: Tensor,
    original: Tensor,
    mask: Tensor,
    identity: Sequence[IdentityFeature],
    margins: Sequence[float],
    settings: TuneSettings,
    seed: int = 0,
    deadline: float | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    perceptual: PerceptualDistance | None = None,
) -> TuneResult:
    """Tune the generator so that the fused code shows the original picture under another identity.

    Args:
        generator: codes (1, L, 512) -> (1, 3, S, S); a copy of it is tuned, itself it is never changed.
        fused: (1, L, 512), the fused code ``w_f``.
        original: (1, 3, S, S) in [-1, 1], the aligned face ``x``.
        mask: (1, 1, S, S) in [0, 1], where change is allowed.
        identity: features of the id-lock, each crops -> unit vectors.
        margins: per feature, the cosine to the original under which the hinge rests.
        settings: see ``TuneSettings``.
        seed: of the random transformations; the same seed and inputs give the same bits on one device.
        deadline: ``time.monotonic()`` after which ``DeadlineExceeded`` is raised.
        on_step: called with the step and its losses.
        perceptual: LPIPS, as pivotal tuning has it; None for the substitute, multi-scale SSIM (METHOD reading 6).

    Returns:
        ``TuneResult`` with the confined picture, clamped to [-1, 1].

    Raises:
        ValueError: shapes that do not agree, settings out of range.
        DeadlineExceeded: see ``deadline``.
        FloatingPointError: the loss became NaN or infinite.
    """
    if original.shape[0] != 1 or fused.shape[0] != 1 or mask.shape[-2:] != original.shape[-2:]:
        raise ValueError(f"one face at a time: {tuple(fused.shape)}, {tuple(original.shape)}, {tuple(mask.shape)}")
    if len(identity) != len(margins):
        raise ValueError(f"{len(identity)} identity features but {len(margins)} margins")
    begin = time.monotonic()
    history: list[dict[str, float]] = []
    # A copy: to restore the generator could be cut short by a time limit, which may go off anywhere, and the next face
    # would start from this one's weights (the trap of CLIP2Protect).
    own = copy.deepcopy(generator)
    optimiser = torch.optim.Adam(select_parameters(own, settings.parameters), lr=settings.lr)
    objective = None
    if settings.steps:  # without any nothing is compared: profiles that refine the photo itself need not wait for it
        objective = _Objective(own, fused, original, mask, identity, margins, settings, seed, perceptual)
    for step in range(settings.steps):
        if deadline is not None and time.monotonic() > deadline:
            raise DeadlineExceeded(f"tuning step {step} of {settings.steps}")
        loss, losses = objective()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss {float(loss)} at tuning step {step}: the learning rate is too high")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        history.append(losses)
        if on_step is not None:
            on_step(step, losses)
        if losses["psnr"] >= settings.target_psnr and losses.get("hinge", 0.0) == 0.0:
            break
    with torch.no_grad():
        result = confine(own(fused), original, mask, settings.residual_sigma).clamp(-1, 1)
    return TuneResult(result, len(history), time.monotonic() - begin, history)


class _Objective:
    """What tuning minimises over the generator's weights; arguments as of ``tune``."""

    def __init__(
        self,
        generator: nn.Module,
        fused: Tensor,
        original: Tensor,
        mask: Tensor,
        identity: Sequence[IdentityFeature],
        margins: Sequence[float],
        settings: TuneSettings,
        seed: int,
        perceptual: PerceptualDistance | None,
    ) -> None:
        self.generator, self.fused, self.original, self.mask = generator, fused, original, mask
        self.identity, self.margins, self.settings, self.perceptual = identity, margins, settings, perceptual
        self.rng = torch.Generator().manual_seed(seed)
        enabled = settings.bf16 and computes_bf16(original.device)
        self.autocast = torch.autocast(original.device.type, torch.bfloat16, enabled=enabled)
        with torch.no_grad():
            self.of_original = [f(original) for f in identity]
            first = generator(fused)
            self.locked = [f(first.clamp(-1, 1)) for f in identity]
            self.reference = None if perceptual is None else perceptual.reference(original)

    def __call__(self) -> tuple[Tensor, dict[str, float]]:
        """The loss of the generator as it is, and its parts by name."""
        settings, original, mask = self.settings, self.original, self.mask
        with self.autocast:
            raw = self.generator(self.fused)
        raw = raw.float()
        picture = confine(raw, original, mask, settings.residual_sigma)
        # The reconstruction sees the face at full weight and its surroundings lightly: they are the
        # photo's own after pasting, but an empty surrounding would pull the features apart.
        shown = original + (0.1 + 0.9 * mask) * (raw - original)
        substitute = settings.ssim_weight if self.perceptual is None else 0.0
        loss = reconstruction_loss(shown, original, settings.l2_weight, substitute)
        if self.perceptual is not None:
            loss = loss + settings.lpips_weight * self.perceptual.to_reference(self.reference, shown).mean()
        losses = {"reconstruction": float(loss.detach())}
        if self.identity and (settings.id_lock or settings.hinge):
            seen = diversify(picture, self.rng, settings.diversity, settings.blur, settings.jpeg_quality)
            features = [f(seen) for f in self.identity]
            lock = id_lock_loss(features, self.locked)
            hinge = identity_hinge_loss(features, self.of_original, self.margins)
            losses |= {"id_lock": float(lock.detach()), "hinge": float(hinge.detach())}
            loss = loss + settings.id_lock * lock + settings.hinge * hinge
        losses["psnr"] = masked_psnr(picture.detach(), original, mask)
        return loss, losses
