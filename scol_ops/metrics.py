"""What a protected picture cost (PSNR, SSIM, FLIP) and what it won (ISM, Rank-1-U).

Pictures here are numpy uint8 (H, W, 3) RGB, sRGB: what a file holds, so that rounding to 8 bits counts.
``to_uint8`` makes them from the method's tensors.  Embeddings are (B, dim) arrays or tensors of any norm but zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import flip_evaluator
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from skimage.metrics import structural_similarity
from torch import Tensor

_SSIM_SIGMA = 1.5
_SSIM_WINDOW = 11
_STRIP_MARGIN = 32  # rows beside a strip of ``photo_difference``
# Two cosines nearer than this are a tie: float32 sums of a thousand products differ by about as much with their order.
_TIE = 1e-6


def to_uint8(pictures: Tensor) -> NDArray[np.uint8]:
    """Method's pictures as bytes: (B, 3, H, W) or (3, H, W) in [-1, 1] -> (B, H, W, 3) or (H, W, 3).

    Values outside are clamped; -1 is 0, 1 is 255, rounded to the nearest level.

    Raises:
        ValueError: wrong shape, or NaN.
    """
    if pictures.ndim not in (3, 4) or pictures.shape[-3] != 3:
        raise ValueError(f"pictures must be (B, 3, H, W) or (3, H, W), got {tuple(pictures.shape)}")
    pictures = pictures.detach().float()
    if bool(pictures.isnan().any()):
        raise ValueError("pictures hold NaN")
    levels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.movedim(-3, -1).cpu().numpy()


def check_pair(reference: NDArray, test: NDArray, mask: NDArray | None = None) -> NDArray[np.bool_]:
    """The mask, all true where there is none; raises ValueError for anything but two pictures of one size."""
    for picture in (reference, test):
        if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
            raise ValueError(f"pictures must be numpy uint8, got {getattr(picture, 'dtype', type(picture).__name__)}")
        if picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise ValueError(f"pictures must be (H, W, 3), got {picture.shape}")
    if reference.shape != test.shape:
        raise ValueError(f"pictures differ in size: {reference.shape} and {test.shape}")
    if mask is None:
        return np.ones(reference.shape[:2], bool)
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != reference.shape[:2]:
        raise ValueError(f"mask must be bool {reference.shape[:2]}, got {mask.dtype} {mask.shape}")
    if not mask.any():
        raise ValueError("mask is empty")
    return mask


def psnr(reference: NDArray[np.uint8], test: NDArray[np.uint8], mask: NDArray[np.bool_] | None = None) -> float:
    """Peak signal to noise ratio: 10 log10(255^2 / mean squared error over pixels and channels).

    Args:
        reference, test: uint8 (H, W, 3).
        mask: bool (H, W), the pixels that count; all by default.

    Returns:
        dB; infinity for equal pictures.

    Raises:
        ValueError: wrong types or shapes, empty mask.
    """
    mask = check_pair(reference, test, mask)
    error = (reference.astype(np.int32) - test.astype(np.int32))[mask]
    squared = float(np.mean(error * error, dtype=np.float64))
    return math.inf if squared == 0 else 10 * math.log10(255**2 / squared)


def ssim(reference: NDArray[np.uint8], test: NDArray[np.uint8], mask: NDArray[np.bool_] | None = None) -> float:
    """Structural similarity with the settings of Wang et al. (IEEE TIP 13(4), 2004), by scikit-image.

    Gaussian weights of sigma 1.5 in an 11 x 11 window, K1 = 0.01, K2 = 0.03, range 255, population covariances, mean
    over R, G, B and over the windows that lie wholly inside the picture.

    Args:
        reference, test: uint8 (H, W, 3), at least 11 x 11.
        mask: bool (H, W): the centres of the windows that count; all by default.

    Returns:
        -1 to 1, 1 for equal pictures.

    Raises:
        ValueError: wrong types or shapes, smaller than a window, no window's centre in the mask.
    """
    mask = check_pair(reference, test, mask)
    if min(mask.shape) < _SSIM_WINDOW:
        raise ValueError(f"SSIM needs {_SSIM_WINDOW} x {_SSIM_WINDOW} pixels, got {mask.shape[0]} x {mask.shape[1]}")
    _, full = structural_similarity(
        reference, test, data_range=255, channel_axis=2, gaussian_weights=True, sigma=_SSIM_SIGMA,
        use_sample_covariance=False, K1=0.01, K2=0.03, full=True,
    )
    edge = _SSIM_WINDOW // 2
    inner = (slice(edge, mask.shape[0] - edge), slice(edge, mask.shape[1] - edge))
    if not mask[inner].any():
        raise ValueError("mask holds no window's centre")
    return float(full[inner][mask[inner]].mean(dtype=np.float64))


def flip(
    reference: NDArray[np.uint8],
    test: NDArray[np.uint8],
    mask: NDArray[np.bool_] | None = None,
    pixels_per_degree: float = 67.02,
) -> float:
    """Mean of LDR-FLIP, the difference seen when flipping between two pictures, by NVIDIA's flip-evaluator.

    Andersson et al., "FLIP: A Difference Evaluator for Alternating Images" (HPG 2020).  The map is made from the whole
    pictures, so what lies beside the mask is seen in context, and then averaged over the mask.

    Args:
        reference, test: uint8 (H, W, 3), sRGB.
        mask: bool (H, W), the pixels that count (the face, say); all by default.
        pixels_per_degree: of visual angle; the authors' default: a 0.7 m wide 3840 px display seen from 0.7 m.

    Returns:
        0 (equal) to 1.

    Raises:
        ValueError: wrong types or shapes, empty mask, pixels_per_degree not positive.
    """
    mask = check_pair(reference, test, mask)
    return float(flip_map(reference, test, pixels_per_degree)[mask].mean(dtype=np.float64))


def flip_map(
    reference: NDArray[np.uint8], test: NDArray[np.uint8], pixels_per_degree: float = 67.02
) -> NDArray[np.float32]:
    """LDR-FLIP of each pixel, (H, W), 0 to 1; arguments, source and errors as those of ``flip``."""
    check_pair(reference, test, None)
    if not (math.isfinite(pixels_per_degree) and pixels_per_degree > 0):
        raise ValueError(f"pixels_per_degree must be positive, got {pixels_per_degree}")
    error, _, _ = flip_evaluator.evaluate(
        np.ascontiguousarray(reference, np.float32) / 255, np.ascontiguousarray(test, np.float32) / 255, "LDR",
        applyMagma=False, computeMeanError=False, parameters={"ppd": float(pixels_per_degree)},
    )
    return error[..., 0]


@dataclass(frozen=True)
class PhotoDifference:
    """Two pictures of one size: `psnr` (dB), `ssim`, `flip` as the functions of these names; `mean_change` and
    `max_change` of a channel's value, in levels of 255."""

    psnr: float
    ssim: float
    flip: float
    mean_change: float
    max_change: int


def photo_difference(reference: NDArray[np.uint8], test: NDArray[np.uint8], strip: int = 512) -> PhotoDifference:
    """All measures over whole pictures of any height, in memory for ``strip`` rows.

    SSIM and FLIP are made strip by strip, with more rows beside a strip than their filters reach (5 for SSIM, at most
    10 for FLIP at 67 pixels a degree), so that the result is that of the whole picture.

    Raises:
        ValueError: wrong types or shapes, smaller than 11 x 11.
    """
    check_pair(reference, test, None)
    height, width = reference.shape[:2]
    squares = changes = 0
    largest = 0
    sums = {"ssim": 0.0, "flip": 0.0}
    weights = {"ssim": 0, "flip": 0}
    edge = _SSIM_WINDOW // 2
    if min(height, width) < _SSIM_WINDOW:
        raise ValueError(f"SSIM needs {_SSIM_WINDOW} x {_SSIM_WINDOW} pixels, got {height} x {width}")
    for top in range(0, height, strip):
        bottom = min(height, top + strip)
        low, high = max(0, top - _STRIP_MARGIN), min(height, bottom + _STRIP_MARGIN)
        a, b = reference[low:high], test[low:high]
        change = np.abs(reference[top:bottom].astype(np.int32) - test[top:bottom])
        squares += int((change * change).sum(dtype=np.int64))
        changes += int(change.sum(dtype=np.int64))
        largest = max(largest, int(change.max()))
        rows = np.zeros(a.shape[:2], bool)
        rows[top - low : bottom - low] = True
        sums["flip"] += flip(a, b, rows) * int(rows.sum())
        weights["flip"] += int(rows.sum())
        # SSIM counts windows that lie wholly inside the picture, and not those cut by its edges.
        first, last = max(top, edge), min(bottom, height - edge)
        if first < last:
            rows = np.zeros(a.shape[:2], bool)
            rows[first - low : last - low, edge : width - edge] = True
            sums["ssim"] += ssim(a, b, rows) * int(rows.sum())
            weights["ssim"] += int(rows.sum())
    count = height * width * 3
    return PhotoDifference(
        math.inf if squares == 0 else 10 * math.log10(255**2 * count / squares),
        sums["ssim"] / weights["ssim"], sums["flip"] / weights["flip"], changes / count, largest,
    )


def _unit_rows(embeddings: ArrayLike | Tensor, what: str) -> NDArray[np.float32]:
    """(B, dim) embeddings at unit norm; raises ValueError for other shapes, zero or non-finite rows."""
    if isinstance(embeddings, Tensor):
        embeddings = embeddings.detach().cpu().numpy()
    rows = np.asarray(embeddings, np.float64)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{what} embeddings must be (B, dim), got {rows.shape}")
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norm).all() or (norm == 0).any():
        raise ValueError(f"{what} embeddings hold a row that is zero or not finite")
    return (rows / norm).astype(np.float32)


def ism(original: ArrayLike | Tensor, protected: ArrayLike | Tensor) -> NDArray[np.float32]:
    """Identity score matching: cosine of a recogniser's features of each original and its protected face.

    Args:
        original, protected: (B, dim), row by row the same face.

    Returns:
        (B,) in -1 to 1; lower is better protected.  To be compared with ``Recogniser.threshold``.

    Raises:
        ValueError: shapes that differ, rows that are zero or not finite.
    """
    a, b = _unit_rows(original, "original"), _unit_rows(protected, "protected")
    if a.shape != b.shape:
        raise ValueError(f"embeddings differ in shape: {a.shape} and {b.shape}")
    return np.clip(np.einsum("ij,ij->i", a, b), -1, 1)


def rank1_matches(
    probe_embeddings: ArrayLike | Tensor,
    probe_ids: Sequence | NDArray,
    gallery_embeddings: ArrayLike | Tensor,
    gallery_ids: Sequence | NDArray,
) -> NDArray[np.bool_]:
    """For each probe, whether the gallery's most similar candidate is of the probe's own identity.

    A tie (cosines within 1e-6) between the own identity and another counts as a match: against the protection.

    Args:
        probe_embeddings: (P, dim) of protected faces.
        probe_ids: P identities, of the originals.
        gallery_embeddings: (G, dim) of unprotected photos, none of them a probe's own original.
        gallery_ids: G identities; ids are any hashable.

    Returns:
        bool (P,).

    Raises:
        ValueError: shapes that do not go together, rows that are zero or not finite, no probes, or a probe whose
            identity is not in the gallery (it could not be found, protected or not).
    """
    probes, gallery = _unit_rows(probe_embeddings, "probe"), _unit_rows(gallery_embeddings, "gallery")
    # Plain Python ids: numpy would turn mixed ones to strings, and 1 would be "1".
    own_ids, all_ids = (ids.tolist() if isinstance(ids, np.ndarray) else list(ids) for ids in (probe_ids, gallery_ids))
    if len(own_ids) != len(probes) or len(all_ids) != len(gallery):
        raise ValueError(
            f"{len(own_ids)} ids for {len(probes)} probes, {len(all_ids)} for a gallery of {len(gallery)}"
        )
    code_of = {identity: code for code, identity in enumerate(dict.fromkeys(all_ids))}
    if not own_ids:
        raise ValueError("no probes")
    if probes.shape[1] != gallery.shape[1]:
        raise ValueError(f"probes of {probes.shape[1]} numbers, gallery of {gallery.shape[1]}")
    missing = [identity for identity in own_ids if identity not in code_of]
    if missing:
        raise ValueError(f"{len(missing)} probes' identities are not in the gallery, the first {missing[0]!r}")
    gallery_codes = np.array([code_of[i] for i in all_ids])
    probe_codes = np.array([code_of[i] for i in own_ids])
    matches = np.empty(len(probes), bool)
    for start in range(0, len(probes), 256):  # bounded memory for a large gallery
        block = slice(start, start + 256)
        scores = probes[block] @ gallery.T
        own = probe_codes[block, None] == gallery_codes[None]
        best_own = np.where(own, scores, -np.inf).max(1)
        best_other = np.where(own, -np.inf, scores).max(1)
        matches[block] = best_own >= best_other - _TIE
    return matches


def rank1_u(
    probe_embeddings: ArrayLike | Tensor,
    probe_ids: Sequence | NDArray,
    gallery_embeddings: ArrayLike | Tensor,
    gallery_ids: Sequence | NDArray,
) -> float:
    """Rank-1-U: the share of probes whose top-1 gallery candidate is NOT the original's identity.

    0 to 1, higher is better protected; see ``rank1_matches`` for arguments, ties and errors.  Worth little without
    the unprotected photos' own rate beside it.
    """
    return float(1 - rank1_matches(probe_embeddings, probe_ids, gallery_embeddings, gallery_ids).mean())


def candidate_ranks(
    own_scores: ArrayLike, other_scores: ArrayLike, others: ArrayLike | None = None
) -> NDArray[np.int32]:
    """Place of each probe's own identity among its candidates, 1 for the top; ties count as the better place.

    The share of ranks above 1 is Rank-1-U, above 5 Rank-5-U: the identity is not among the five most similar.

    Args:
        own_scores: (P,) cosine of each probe to its own identity's photo (the best of them).
        other_scores: (P, G) cosines to photos of a gallery.
        others: bool (P, G), which of these are of other people; all by default.

    Returns:
        int32 (P,), 1 to G + 1.

    Raises:
        ValueError: shapes that do not go together, numbers that are not finite, a probe without other people.
    """
    own, scores = np.asarray(own_scores, np.float64), np.asarray(other_scores, np.float64)
    mask = np.ones(scores.shape, bool) if others is None else np.asarray(others, bool)
    if own.ndim != 1 or scores.ndim != 2 or len(scores) != len(own) or mask.shape != scores.shape:
        raise ValueError(f"scores {own.shape} and {scores.shape}, mask {mask.shape}")
    if not np.isfinite(own).all() or not np.isfinite(scores[mask]).all():
        raise ValueError("scores are not finite")
    if not mask.any(1).all():
        raise ValueError("a probe has no candidates of other people")
    return (1 + ((scores > own[:, None] + _TIE) & mask).sum(1)).astype(np.int32)


def verification_threshold(different_scores: ArrayLike | Tensor, far: float = 1e-2) -> float:
    """The lowest of the given scores at which at most a share ``far`` of different people's pairs lies above it.

    Two faces count as one person where their cosine is greater than the threshold.

    Args:
        different_scores: cosines of pairs of different people, any shape.
        far: false accept rate, above 0 and below 1.

    Raises:
        ValueError: no finite scores, far out of range, or fewer than 1 / far pairs, from which the rate cannot be told.
    """
    if isinstance(different_scores, Tensor):
        different_scores = different_scores.detach().cpu().numpy()
    scores = np.sort(np.asarray(different_scores, np.float64).ravel())[::-1]
    if not 0 < far < 1:
        raise ValueError(f"far must be above 0 and below 1, got {far}")
    if not np.isfinite(scores).all():
        raise ValueError("scores are not finite")
    allowed = math.floor(far * len(scores) + 1e-9)
    if allowed < 1:
        raise ValueError(f"{len(scores)} pairs are too few for a false accept rate of {far}")
    return float(scores[allowed])
