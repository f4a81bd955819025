"""MI-FGSM: iterated signed gradients with momentum.

Dong et al., "Boosting Adversarial Attacks with Momentum" (CVPR 2018, arXiv:1710.06081), Algorithm 1 and eqs. 6 and 7,
with the loss of dodging: the cosine to the original's features.  L-infinity.  The paper's own numbers: eps 16 of 255,
10 steps of eps / 10, decay 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from scol_ops.attack import AttackResult
from scol_ops.attacks.common import StepSettings, signed_steps
from scol_ops.losses import IdentityFeature


@dataclass(frozen=True)
class MIFGSMSettings(StepSettings):
    """As ``StepSettings``; with a decay of 0 it is I-FGSM."""


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
    return signed_steps(picture, identity, settings, mask)
