"""Put protected faces back into their photo, and say which part of a crop is face.

Only the residual between the protected and the original crop is brought to the photo's own grid and added:
a photo of 20 MP keeps its detail, and where nothing changed no value changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from scol_ops.warp import crop_transform, invert_affine, transform_points, warp_affine

# The face's ellipse in units of the distance from eyes to mouth, found by looking at it on photos: from
# the hairline to below the chin, cheek to cheek; hair, ears and background stay outside on frontal faces.
_CENTRE = 0.32  # centre below the eyes
_HALF_WIDTH, _HALF_HEIGHT = 1.18, 1.45
_FEATHER = 0.18  # share of the radius over which the mask falls from 1 to 0


def face_mask(landmarks: Tensor, size: int = 256) -> Tensor:
    """A soft mask of each face: an ellipse that turns with it, 1 inside, 0 outside, feathered in between.

    Args:
        landmarks: (B, 5, 2) in the crop's pixels.
        size: side of the crop in pixels.

    Returns:
        (B, 1, size, size) float32 in [0, 1]; 0 on the crop's border.

    Raises:
        ValueError: another shape.
    """
    if landmarks.ndim != 3 or landmarks.shape[1:] != (5, 2):
        raise ValueError(f"landmarks must be (B, 5, 2), got {tuple(landmarks.shape)}")
    points = landmarks.double()
    eyes, mouth = (points[:, 0] + points[:, 1]) / 2, (points[:, 3] + points[:, 4]) / 2
    down = mouth - eyes
    height = down.norm(dim=1, keepdim=True).clamp_min(1.0)
    down = down / height
    centre = eyes + down * height * _CENTRE
    axis = torch.arange(size, dtype=torch.float64, device=landmarks.device)
    dx = axis[None, None, :] - centre[:, 0, None, None]
    dy = axis[None, :, None] - centre[:, 1, None, None]
    across = (dx * down[:, 1, None, None] - dy * down[:, 0, None, None]) / (_HALF_WIDTH * height[:, :, None])
    along = (dx * down[:, 0, None, None] + dy * down[:, 1, None, None]) / (_HALF_HEIGHT * height[:, :, None])
    t = ((1 - (across.square() + along.square()).sqrt()) / _FEATHER).clamp(0, 1)
    mask = t * t * (3 - 2 * t)
    # An odd face may reach the border; there the residual has to end.
    edge = (torch.minimum(axis, size - 1 - axis) / (size / 32)).clamp(0, 1)
    return (mask * edge[None, :, None] * edge[None, None, :])[:, None].float()


def _window(mask: Tensor, to_photo: Tensor, height: int, width: int) -> tuple[int, int, int, int] | None:
    """Rows and columns (top, bottom, left, right; half open) of the photo that a mask (S, S) can touch."""
    rows, columns = torch.nonzero(mask.amax(1)).flatten(), torch.nonzero(mask.amax(0)).flatten()
    if not len(rows):
        return None
    y0, y1, x0, x1 = float(rows[0]), float(rows[-1]), float(columns[0]), float(columns[-1])
    corners = torch.tensor([[x0, y0], [x1, y0], [x0, y1], [x1, y1]], dtype=torch.float64)
    corners = transform_points(corners, to_photo.cpu())
    reach = 2 + 2 * float(torch.linalg.matrix_norm(to_photo[:2, :2].cpu(), ord=2))  # the kernel's support
    left, top = (math.floor(float(v) - reach) for v in corners.amin(0))
    right, bottom = (math.ceil(float(v) + reach) + 1 for v in corners.amax(0))
    top, left, bottom, right = max(0, top), max(0, left), min(height, bottom), min(width, right)
    return (top, bottom, left, right) if top < bottom and left < right else None


def _clusters(windows: Sequence[tuple[int, int, int, int]]) -> list[list[int]]:
    """Groups of windows that touch each other, directly or through others."""
    groups: list[tuple[list[int], tuple[int, int, int, int]]] = []
    for i, window in enumerate(windows):
        members, box = [i], window
        while True:
            hit = next((g for g in groups if _overlap(g[1], box)), None)
            if hit is None:
                break
            groups.remove(hit)
            members = hit[0] + members
            box = (min(box[0], hit[1][0]), max(box[1], hit[1][1]), min(box[2], hit[1][2]), max(box[3], hit[1][3]))
        groups.append((members, box))
    return [sorted(members) for members, _ in groups]


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def paste_back(photo: np.ndarray, originals: Tensor, protected: Tensor, masks: Tensor, quads: Tensor) -> np.ndarray:
    """Add the faces' residuals to their photo.

    Where faces overlap, each pixel takes the faces' residuals weighted by their masks, divided by the sum of
    the masks where that exceeds 1: an overlap is changed once, not twice.  Values are rounded half to even and
    clipped to 0..255.  Enlarging is bicubic, shrinking averages.

    Args:
        photo: uint8 (H, W, 3), upright.
        originals, protected: (B, 3, S, S) in [-1, 1], the faces as they were cut out and as they shall look.
        masks: (B, 1, S, S) in [0, 1].
        quads: (B, 4, 2), where the crops lie in the photo.

    Returns:
        A new array like ``photo``; every pixel outside the masks has its old value.

    Raises:
        ValueError: shapes or types that do not agree.
        GeometryError: a quad that is no square.
    """
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        raise ValueError(f"photo must be uint8 (H, W, 3), got {photo.dtype} {photo.shape}")
    count, _, size, _ = originals.shape
    if protected.shape != originals.shape or masks.shape != (count, 1, size, size) or quads.shape != (count, 4, 2):
        raise ValueError(
            f"shapes do not agree: {tuple(originals.shape)}, {tuple(protected.shape)}, {tuple(masks.shape)}, {tuple(quads.shape)}"
        )
    height, width = photo.shape[:2]
    to_photo = crop_transform(quads.double(), size)
    result = photo.copy()
    kept, windows = [], []
    for i in range(count):
        window = _window(masks[i, 0], to_photo[i], height, width)
        if window is not None:
            kept.append(i)
            windows.append(window)
    for cluster in _clusters(windows):
        top, left = min(windows[c][0] for c in cluster), min(windows[c][2] for c in cluster)
        bottom, right = max(windows[c][1] for c in cluster), max(windows[c][3] for c in cluster)
        change = torch.zeros(3, bottom - top, right - left)
        weight = torch.zeros(1, bottom - top, right - left)
        for c in cluster:
            t, b, x, r = windows[c]
            i = kept[c]
            # Photo pixel of the window -> crop pixel.
            shift = torch.eye(3, dtype=torch.float64)
            shift[0, 2], shift[1, 2] = x, t
            matrix = (invert_affine(to_photo[i]) @ shift)[None].to(originals.device)
            layers = torch.cat(((protected[i] - originals[i]) * masks[i], masks[i]))[None]
            enlarged = warp_affine(layers[:, :3], matrix, (b - t, r - x), mode="bicubic")[0].cpu()
            share = warp_affine(layers[:, 3:], matrix, (b - t, r - x))[0].cpu().clamp(0, 1)
            area = (slice(None), slice(t - top, b - top), slice(x - left, r - left))
            # A bicubic kernel rings two pixels beyond the mask; outside it nothing may change.
            change[area] += enlarged * (share > 0)
            weight[area] += share
        change = change / weight.clamp_min(1) * 127.5
        area = result[top:bottom, left:right]
        moved = torch.from_numpy(area.astype(np.float32)).permute(2, 0, 1) + change
        area[:] = moved.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return result
