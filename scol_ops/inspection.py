"""Inspect: which components of a style code carry identity, and what the inversion attack aims at.

Stage ``inspect`` of SCOL (IJCAI 2025), "latent component inspection".  The paper gives tau = 3 and describes
what happens as tau changes (appendix B.2), but neither the formula nor its units: **an open
reading**.  Ours (reading 7 of the method): a component is one of the L x D numbers of a code.  With
``d = |w_inv - w|`` in stated units, it is identity related where ``d <= tau``; elsewhere the target
takes the original's value, and the loss of the attack leaves the component out.  That agrees with
the paper's words: a low tau lets much of the code be replaced by the original and weakens the
attack, a higher one takes more components to be identity related, and a very high one admits
differences that have nothing to do with identity.

What the units mean on the embedded generator's W (32 synthetic codes against the least similar of
5,000, mode ``centred``; a component's standard deviation is 0.41 in the median): share of identity
related components at tau = 0.5, 1, 2, 3, 5

- ``absolute``: 0.60, 0.82, 0.98, 0.999, 1.0
- ``std``: 0.35, 0.54, 0.78, 0.91, 0.99

so that the paper's tau = 3 leaves almost nothing out in absolute units, and a tenth in standard deviations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Unit = Literal["absolute", "std"]
UNITS: tuple[str, ...] = get_args(Unit)
PAPER_TAU = 3.0


@dataclass(frozen=True)
class Inspection:
    """What the inspection found, with what it was found by.

    Attributes:
        mask: (B, L, D) bool, True where a component is identity related.
        target: (B, L, D): ``w_inv`` where the mask is True, ``w`` elsewhere.
        share: (B,) float, share of identity related components, 0 to 1.
        tau: the threshold.
        unit: what ``tau`` and the differences are measured in.
    """

    mask: Tensor
    target: Tensor
    share: Tensor
    tau: float
    unit: Unit


def inspect_components(
    w: Tensor, w_inv: Tensor, tau: float = PAPER_TAU, *, unit: Unit = "absolute", std: Tensor | None = None
) -> Inspection:
    """Split the components of codes into identity related ones and the rest.

    Args:
        w: (B, L, D) float, the faces' own codes.
        w_inv: (B, L, D), the target codes: at each layer the least similar code of the gallery.
        tau: threshold, 0 or more (infinity: everything is identity related).
        unit: ``absolute``, the code's own numbers; ``std``, standard deviations of each component.
        std: (D,) or (L, D), positive: the standard deviations over the gallery; needed for ``std`` alone.

    Returns:
        see ``Inspection``; dtype and device of ``w``.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite codes, tau negative or NaN, unknown unit, std
            missing, unasked for, or not positive and finite.
    """
    if w.ndim != 3 or w.shape != w_inv.shape:
        raise ValueError(f"w and w_inv must both be (B, L, D), got {tuple(w.shape)} and {tuple(w_inv.shape)}")
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    if not tau >= 0:
        raise ValueError(f"tau must be 0 or more, got {tau}")
    if (std is None) != (unit == "absolute"):
        raise ValueError("std is needed for the unit 'std', and only for it")
    w_inv = w_inv.to(w)
    for name, code in (("w", w), ("w_inv", w_inv)):
        bad = torch.nonzero(~torch.isfinite(code).all(dim=2))
        if len(bad):
            raise ValueError(f"{name}: face {int(bad[0, 0])}, layer {int(bad[0, 1])} has a NaN or an infinity")

    limit: Tensor | float = tau
    if std is not None:
        if std.shape not in (w.shape[2:], w.shape[1:]):
            raise ValueError(f"std must be {tuple(w.shape[2:])} or {tuple(w.shape[1:])}, got {tuple(std.shape)}")
        std = std.to(w)
        if not bool((torch.isfinite(std) & (std > 0)).all()):
            raise ValueError("std has a component that is not positive and finite")
        limit = tau * std
    mask = (w_inv - w).abs() <= limit
    return Inspection(
        mask=mask,
        target=torch.where(mask, w_inv, w),
        share=mask.flatten(1).to(w.dtype).mean(dim=1),
        tau=float(tau),
        unit=unit,
    )
