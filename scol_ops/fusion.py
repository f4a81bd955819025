"""Fuse: a code whose identity is nobody's, from the most similar codes of other people.

Stage ``fuse`` of SCOL (IJCAI 2025): per layer, aggregate the k codes of other people that are most similar
to the face's own.  The paper leaves the aggregate open; reading 4 of our method: their mean, or a
mean with softmax weights.  k is ours as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Weighting = Literal["mean", "softmax"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


def fusion_weights(scores: Tensor, weighting: Weighting = "mean", temperature: float = 0.1) -> Tensor:
    """Weights of the k codes: (..., k) scores to (..., k) weights, non-negative, each row's sum 1.

    Args:
        scores: similarities, finite; their order does not matter to ``mean``.
        weighting: ``mean``, 1 / k each; ``softmax``, in proportion to exp(score / temperature).
        temperature: of the softmax, in units of the scores, positive.  Scores of the modes ``cosine``
            and ``centred`` lie in [-1, 1]; raw scores need a temperature of their own scale.

    Raises:
        ValueError: unknown weighting, temperature not positive and finite, k = 0, NaN or infinite scores.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not scores.ndim or not scores.shape[-1]:
        raise ValueError("at least one code is needed to fuse")
    if not torch.isfinite(scores).all():
        raise ValueError("scores have a NaN or an infinity")
    if weighting == "mean":
        return torch.full_like(scores, 1.0 / scores.shape[-1])
    return torch.softmax(scores / temperature, dim=-1)


def draw_code(allowed: NDArray[np.bool_], seed: int) -> int:
    """Index of one of the allowed codes, each as likely: what the paper's figure "fused against random code" tunes
    from.

    Args:
        allowed: (N,) bool, whether a code may be taken.
        seed: of the draw, non-negative; the same seed draws the same code.

    Raises:
        ValueError: no code may be taken.
    """
    rows = np.flatnonzero(allowed)
    if not len(rows):
        raise ValueError("no code may be drawn")
    return int(rows[np.random.default_rng(seed).integers(len(rows))])


def fuse(
    vectors: Tensor,
    scores: Tensor,
    *,
    weighting: Weighting = "mean",
    temperature: float = 0.1,
    layers: Sequence[int] | None = None,
    original: Tensor | None = None,
) -> Tensor:
    """Fused codes.

    Args:
        vectors: (B, L, k, D) float, the codes to fuse, for every layer its own; on any device.
        scores: (B, L, k) their similarities to the face's code.
        weighting, temperature: see ``fusion_weights``.
        layers: which layers take the fused code, in 0..L-1; None means all.  The others keep the original.
        original: (B, L, D) the face's own codes; needed where ``layers`` leaves some out.

    Returns:
        (B, L, D), dtype and device of ``vectors``.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite vectors, a layer out of range, ``original`` missing;
            or as ``fusion_weights``.
    """
    if vectors.ndim != 4 or scores.shape != vectors.shape[:3]:
        raise ValueError(
            f"vectors must be (B, L, k, D) and scores (B, L, k), got {tuple(vectors.shape)} and {tuple(scores.shape)}"
        )
    bad = torch.nonzero(~torch.isfinite(vectors).all(dim=3))
    if len(bad):
        raise ValueError(f"vectors: face {int(bad[0, 0])}, layer {int(bad[0, 1])} has a NaN or an infinity")
    weights = fusion_weights(scores.to(vectors), weighting, temperature)
    # An elementwise sum, not a batched product: equal bits whatever the batch.
    fused = (weights[..., None] * vectors).sum(dim=2)
    if layers is None:
        return fused

    count = vectors.shape[1]
    wrong = [layer for layer in layers if isinstance(layer, bool) or not 0 <= layer < count]
    if wrong:
        raise ValueError(f"layers must be in 0..{count - 1}, got {wrong}")
    replaced = torch.zeros(count, dtype=torch.bool, device=fused.device)
    replaced[list(layers)] = True
    if bool(replaced.all()):
        return fused
    if original is None or original.shape != fused.shape:
        shape = None if original is None else tuple(original.shape)
        raise ValueError(f"layers that are kept need the original codes {tuple(fused.shape)}, got {shape}")
    return torch.where(replaced[None, :, None], fused, original.to(fused))
