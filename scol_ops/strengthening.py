"""The closed loop's rules: how much stronger each round works on a face that is still recognised, and which is kept.

A round goes on from the picture that the one before left: refinement with more weight on the identity and less on the
photo, then the attack with a larger bound.  (Ours; the paper protects once and does not look.)  Pure rules on settings
and numbers; who looks at the saved photo, and with which recogniser, is the caller's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from scol_ops.attack import AttackSettings
from scol_ops.distortions import NONE
from scol_ops.refinement import RefineSettings


@dataclass(frozen=True)
class StrengthenSettings:
    """rounds: most rounds, 0 for none.  steps: refinement steps of a round.  hinge_factor: the hinge's weight grows by
    it each round.  margin_step: the hinge's margins fall by it each round (cosine).  visible_factor: the weights that
    hold the picture at the photo (``flip_weight``, ``visible_weight``, ``l2_weight``, ``ssim_weight``) shrink by it each
    round, and ``flip_target`` grows.  eps_factor: the attack's bound and step size grow by it each round, up to a bound
    of max_eps ([0, 1] units; never below the attack's own).  min_psnr: dB over the face crop; a round that falls below
    it is faded until it does not (``faded``), and is the face's last.
    """

    rounds: int
    steps: int
    hinge_factor: float
    margin_step: float
    visible_factor: float
    eps_factor: float
    max_eps: float
    min_psnr: float


def refinement_of(settings: StrengthenSettings, base: RefineSettings, number: int) -> RefineSettings:
    """The refinement's settings in round ``number`` (1 ..).  It starts from the whole of what is there, which the
    refinement's low-pass and damping of colours go over once more."""
    _check(number)
    kept = settings.visible_factor**number
    return replace(
        base,
        steps=settings.steps,
        start=1.0,
        hinge=base.hinge * settings.hinge_factor**number,
        flip_weight=base.flip_weight / kept,
        flip_target=base.flip_target * kept,
        visible_weight=base.visible_weight / kept,
        l2_weight=base.l2_weight / kept,
        ssim_weight=base.ssim_weight / kept,
    )


def margins_of(settings: StrengthenSettings, base: Sequence[float], number: int) -> tuple[float, ...]:
    """The hinge's margins in round ``number`` (1 ..): cosines, not below -1."""
    _check(number)
    return tuple(max(-1.0, margin - settings.margin_step * number) for margin in base)


def attack_of(settings: StrengthenSettings, base: AttackSettings, number: int) -> AttackSettings:
    """The attack's settings in round ``number`` (1 ..)."""
    _check(number)
    eps = max(base.eps, min(settings.max_eps, base.eps * settings.eps_factor**number))
    factor = eps / base.eps if base.eps else 1.0
    return replace(base, eps=eps, step_size=base.step_size * factor)


def _check(number: int) -> None:
    if number < 1:
        raise ValueError(f"rounds are counted from 1, got {number}")


def unconfined(picture: Tensor, original: Tensor, mask: Tensor, least: float = 0.1) -> Tensor:
    """The picture whose change, confined to the mask, is that of ``picture``: ``original + change / max(mask, least)``.

    What is refined again would otherwise be faded out twice at the mask's soft edge.

    Args:
        picture, original: (1, 3, S, S); ``picture`` is ``original + mask * change``.
        mask: (1, 1, S, S) in [0, 1].
        least: where the mask is below it, the change stays smaller than it was: rounding to 8 bits would be blown up.
    """
    return original + (picture - original) / mask.clamp_min(least)


def faded(picture: Tensor, original: Tensor, psnr: float, least: float) -> Tensor:
    """The picture with so much less of its change that its PSNR rises from ``psnr`` to ``least`` (dB).

    Args:
        picture, original: (1, 3, S, S) in [-1, 1].

    Raises:
        ValueError: ``psnr`` is not below ``least``.
    """
    if not psnr < least:
        raise ValueError(f"{psnr} dB is not below {least} dB")
    share = 10 ** ((psnr - least) / 20)
    return original + share * (picture - original)


@dataclass(frozen=True)
class Bars:
    """Largest cosines to the original at which a face counts as protected: as saved, and after transformations."""

    saved: float
    distorted: float

    def of(self, name: str) -> float:
        return self.saved if name == NONE else self.distorted


@dataclass(frozen=True)
class Seen:
    """What a recogniser sees of one face in one file: cosines to the original by transformation.

    Attributes:
        cosines: by name of a ``distortions.Distortion``; ``none``, the file as it is, is among them.
    """

    cosines: Mapping[str, float]

    @property
    def saved(self) -> float:
        """Cosine in the file as it is."""
        return self.cosines[NONE]

    @property
    def worst(self) -> str:
        """Name of the transformation with the largest cosine; of equal ones the first."""
        return max(self.cosines, key=self.cosines.__getitem__)

    def above(self, bars: Bars) -> str | None:
        """Name of the transformation at which the face is furthest above its bar, or None where it is above none."""
        name = max(self.cosines, key=lambda n: self.cosines[n] - bars.of(n))
        return name if self.cosines[name] > bars.of(name) else None

    def excess(self, bars: Bars) -> float:
        """How far the face is above its bar where it is furthest; 0 or less: it passes."""
        return max(cosine - bars.of(name) for name, cosine in self.cosines.items())


def best_round(seen: Sequence[Seen], bars: Bars) -> int:
    """Index of the round to keep: the first that passes, since later ones only change more; else the nearest to it.

    Raises:
        ValueError: no rounds.
    """
    if not seen:
        raise ValueError("no rounds to choose from")
    for i, one in enumerate(seen):
        if one.excess(bars) <= 0:
            return i
    return min(range(len(seen)), key=lambda i: seen[i].excess(bars))
