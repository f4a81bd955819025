"""The closed loop's rules: the least change of a face that hides it, and no more than may be seen.

A face has two bars: the judge's cosines, and the JOD of its window.  The change is tried in shares, by halving, until
the smallest that hides is found (``Search``).  Where the whole change does not hide, another round makes a stronger
one: refinement from where the last round ended, with less weight on what is seen.  Where both bars cannot be met, the
one of sight wins: a face is told as weak, never disfigured.  (Ours; the paper protects once and does not look.)  Pure
rules on settings and numbers; who looks at the saved photo, and with which recogniser, is the caller's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from scol_ops.distortions import NONE
from scol_ops.refinement import RefineSettings


@dataclass(frozen=True)
class StrengthenSettings:
    """rounds: most rounds of a stronger change, 0 for none.  steps: refinement steps of a round.  seen_factor: the
    weight of what is seen is divided by it each round.  looks: looks of the judge at shares of a change, after the one
    at the whole; 0: the change stays whole.
    """

    rounds: int
    steps: int
    seen_factor: float
    looks: int


def refinement_of(settings: StrengthenSettings, base: RefineSettings, number: int) -> RefineSettings:
    """The refinement's settings in round ``number`` (1 ..).  It starts from the whole of what is there.

    Raises:
        ValueError: a number below 1.
    """
    if number < 1:
        raise ValueError(f"rounds are counted from 1, got {number}")
    return replace(base, steps=settings.steps, start=1.0, seen=base.seen / settings.seen_factor**number)


def unconfined(picture: Tensor, original: Tensor, mask: Tensor, least: float = 0.1) -> Tensor:
    """The picture whose change, confined to the mask, is that of ``picture``: ``original + change / max(mask, least)``.

    What is refined again would otherwise be faded out twice at the mask's soft edge.

    Args:
        picture, original: (1, 3, S, S); ``picture`` is ``original + mask * change``.
        mask: (1, 1, S, S) in [0, 1].
        least: where the mask is below it, the change stays smaller than it was: rounding to 8 bits would be blown up.
    """
    return original + (picture - original) / mask.clamp_min(least)


def faded(picture: Tensor, original: Tensor, share: float) -> Tensor:
    """The picture with this share (0..1) of its change; both (1, 3, S, S).

    Raises:
        ValueError: a share out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share is 0..1, got {share}")
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


@dataclass(frozen=True)
class Look:
    """What one file showed of a face.

    Attributes:
        share: of the change, 0..1.
        hidden: no cosine is above its bar.
        unseen: the JOD of its window is not below its bar.
    """

    share: float
    hidden: bool
    unseen: bool


@dataclass
class Search:
    """Halving for the smallest share of a change that hides, or the largest that may be seen.

    Both grow with the share, as far as can be told: where a look contradicts another, the search still ends, and its
    answer is one of the shares that were looked at.

    Attributes:
        most: looks after the first, which is at the whole change.
    """

    most: int
    looks: list[Look] = field(default_factory=list)

    def next(self) -> float | None:
        """The share to look at next; None: the search has ended."""
        if not self.looks:
            return 1.0
        if len(self.looks) > self.most:
            return None
        hides = min((look.share for look in self.looks if look.hidden), default=None)
        bare = max((look.share for look in self.looks if not look.hidden), default=0.0)
        shows = min((look.share for look in self.looks if not look.unseen), default=None)
        # Until a share is found that both shows and does not hide: then no share does both, and sight decides.
        if hides is not None and (shows is None or bare < shows):
            return ((bare if bare < hides else 0.0) + hides) / 2
        if shows is None:
            return None
        clear = max((look.share for look in self.looks if look.unseen and look.share < shows), default=0.0)
        return (clear + shows) / 2

    def told(self, look: Look) -> None:
        """Take what a look at ``next`` showed."""
        self.looks.append(look)

    @property
    def found(self) -> int:
        """Index of the look to keep: the smallest share that hides unseen, else the largest unseen, else the smallest.

        Raises:
            ValueError: nothing was looked at.
        """
        if not self.looks:
            raise ValueError("no looks to choose from")
        order = range(len(self.looks))
        both = [i for i in order if self.looks[i].hidden and self.looks[i].unseen]
        unseen = [i for i in order if self.looks[i].unseen]
        if both or not unseen:
            return min(both or order, key=lambda i: self.looks[i].share)
        return max(unseen, key=lambda i: self.looks[i].share)
