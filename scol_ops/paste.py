"""Paste-back: where a face may change, and how the change gets into the photo.

METHOD.md: "the residual between protected and original crop is warped back into the photo with a soft mask, so a 20 MP
photo keeps its own detail".  The photo's pixels are never resampled: only the difference is, and only it is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from scol_ops.warp import crop_transform, invert_affine, warp_affine

# The face's outline about the middle of eyes and mouth, in its own upright frame, as multiples of a length that
# turning the head hardly changes (see ``face_mask``).  Set by eye on generated and real faces: forehead to the
# hairline, chin, cheeks without the ears.
_HALF_WIDTH, _UP, _DOWN = 1.16, 1.42, 1.34
_FEATHER = 0.22
_ROUNDNESS = 2.3  # 2 would be an ellipse; cheeks and temples are fuller


def face_mask(
    landmarks: Tensor, size: int = 256, *, scale: float = 1.0, feather: float = _FEATHER, border: float = 0.06
) -> Tensor:
    """Soft masks of faces in their crops: forehead to chin and cheek to cheek, without hair and background.

    Five points show neither hairline nor jaw, so this is an outline of usual proportions, placed by eyes and mouth and
    shifted by the nose where the head is turned.

    Args:
        landmarks: (B, 5, 2) in pixels of the crop (``align``).
        size: side of the crop.
        scale: the outline's size, 1 for the usual face.
        feather: width of the soft edge as a share of the outline's radius; it lies inside the outline.
        border: the mask falls to zero over this share of the side at the crop's edge.

    Returns:
        float32 (B, 1, size, size) in [0, 1]; zero in the crop's outermost pixels.

    Raises:
        ValueError: wrong shape, or parameters out of range.
    """
    if landmarks.ndim != 3 or landmarks.shape[1:] != (5, 2):
        raise ValueError(f"landmarks must be (B, 5, 2), got {tuple(landmarks.shape)}")
    if size < 8 or not scale > 0 or not 0 < feather <= 1 or not 0 < border <= 0.5:
        raise ValueError(
            f"size >= 8, scale > 0, 0 < feather <= 1, 0 < border <= 0.5: got {size}, {scale}, {feather}, {border}"
        )
    points = landmarks.detach().float()
    eyes, mouth, nose = (points[:, 0] + points[:, 1]) / 2, (points[:, 3] + points[:, 4]) / 2, points[:, 2]
    across, down = points[:, 1] - points[:, 0], mouth - eyes
    # The frame: x along the eyes and mouth, as the crop's is (``ffhq_quads``).
    x = across + torch.stack([down[:, 1], -down[:, 0]], 1)
    x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-6)
    y = torch.stack([-x[:, 1], x[:, 0]], 1)
    # Turning the head shortens the distance of the eyes, nodding that to the mouth: the larger is the nearer to truth.
    unit = torch.maximum(across.norm(dim=1), down.norm(dim=1)).clamp_min(1e-3) * scale
    centre = (eyes + mouth) / 2
    # A turned head shows more cheek on the side that the nose points away from.
    turn = (((nose - centre) * x).sum(1) / unit).clamp(-0.5, 0.5)
    at = torch.arange(size, device=points.device, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)  # (S, S, 2) x, y
    offset = grid[None] - centre[:, None, None]
    u = (offset * x[:, None, None]).sum(-1) / unit[:, None, None]
    v = (offset * y[:, None, None]).sum(-1) / unit[:, None, None]
    turn = turn[:, None, None]
    narrower, wider = (1 - 1.5 * turn.abs()).clamp_min(0.5), 1 + 0.3 * turn.abs()
    half_width = _HALF_WIDTH * torch.where(u * turn > 0, narrower, wider)
    half_height = torch.where(v < 0, _UP, _DOWN)
    radius = ((u / half_width).abs() ** _ROUNDNESS + (v / half_height).abs() ** _ROUNDNESS) ** (1 / _ROUNDNESS)
    mask = _smooth((1 - radius) / feather)
    edge = torch.minimum(at, size - 1 - at) / (border * size)
    edge = _smooth(torch.minimum(edge[:, None], edge[None, :]))
    return (mask * edge)[:, None]


def change_mask(landmarks: Tensor, size: int = 256, *, scale: float = 1.0, features: float = 1.0) -> Tensor:
    """How much of a change each place of a crop may have.

    Recognisers read the whole head and what is behind it; people read brows, eyes, nose and mouth.

    Args:
        landmarks, size: as of ``face_mask``.
        scale: the outline's size, 1 for the face alone; larger: hair, ears, neck and what is behind, ever more softly.
        features: share at brows, eyes, nose and mouth, 0..1.

    Returns:
        float32 (B, 1, size, size) in [0, 1]; as of ``face_mask`` where both are 1.

    Raises:
        ValueError: as of ``face_mask``, or a share out of range.
    """
    if not 0 <= features <= 1:
        raise ValueError(f"a share is 0..1, got {features}")
    mask = face_mask(landmarks, size, scale=scale, feather=min(1.0, _FEATHER * scale))
    return mask if features == 1 else mask * (1 - (1 - features) * _features(landmarks.detach().float(), size))


# Gaussians about a landmark: where (0: the eyes, 1: the nose's bridge, 2: its tip, 3: the mouth), radii across and
# down, in distances of the eyes.
_SPARED = ((0, 0.33, 0.27), (1, 0.22, 0.5), (2, 0.3, 0.22), (3, 0.45, 0.25))
_BROW = 0.12  # the eyes' Gaussian lies so much above them, for the brows


def _features(points: Tensor, size: int) -> Tensor:
    """(B, 5, 2) -> (B, 1, size, size), 1 at the middle of brows and eyes, nose and mouth, falling to 0."""
    across = points[:, 1] - points[:, 0]
    unit = across.norm(dim=1).clamp_min(1e-3)[:, None]
    x = across / unit
    y = torch.stack([-x[:, 1], x[:, 0]], 1)
    middle = (points[:, 0] + points[:, 1]) / 2
    bridge, mouth = (middle + points[:, 2]) / 2, (points[:, 3] + points[:, 4]) / 2
    places = {0: [points[:, i] - _BROW * unit * y for i in (0, 1)], 1: [bridge], 2: [points[:, 2]], 3: [mouth]}
    at = torch.arange(size, device=points.device, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)[None]
    total = points.new_zeros(len(points), size, size)
    for which, wide, high in _SPARED:
        for centre in places[which]:
            offset = grid - centre[:, None, None]
            u = (offset * x[:, None, None]).sum(-1) / (wide * unit[:, :, None])
            v = (offset * y[:, None, None]).sum(-1) / (high * unit[:, :, None])
            total = total + torch.exp(-((u * u + v * v) ** 2) / 2)
    return total.clamp(0, 1)[:, None]


def _smooth(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def paste_back(
    photo: np.ndarray,
    originals: Tensor,
    protected: Tensor,
    masks: Tensor,
    quads: Tensor,
    *,
    masked: bool = False,
    corrections: int = 1,
) -> np.ndarray:
    """Add the faces' changes to their photo.

    For each face ``mask * (protected - original)`` is brought to the photo's grid: bicubic where the face is larger
    than its crop, averaged over each photo pixel's area where it is smaller.  Interpolating and cutting out again would
    weaken the finest pattern of the change, so what is missing after a trial is added (iterated back-projection, Irani
    and Peleg 1991).  Where faces overlap, changes are averaged by their masks, so the overlap is not changed twice.
    The sum is rounded to the nearest integer (half to even) and clipped to 0..255; no dithering.

    Args:
        photo: uint8 (H, W, 3).
        originals, protected: (N, 3, S, S) in [-1, 1]: crops as ``align_crops`` cut them, and what became of them.
        masks: (N, 1, S, S) in [0, 1].
        quads: (N, 4, 2), as the crops were cut.
        masked: True where ``protected`` already is ``original + mask * change``: the mask is then not applied twice,
            and only says where pixels may change at all.
        corrections: rounds of back-projection.

    Returns:
        uint8 (H, W, 3), a new array: bit-equal to the photo outside the masks.

    Raises:
        ValueError: wrong shapes or dtypes, or crops that are not finite.
        GeometryError: a quad is not a square.
    """
    if not isinstance(photo, np.ndarray) or photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
        raise ValueError("photo must be a uint8 array (H, W, 3)")
    count, size = len(quads), originals.shape[-1]
    for name, tensor, channels in (("originals", originals, 3), ("protected", protected, 3), ("masks", masks, 1)):
        if tensor.shape != (count, channels, size, size):
            raise ValueError(f"{name} must be {(count, channels, size, size)}, got {tuple(tensor.shape)}")
    if corrections < 0:
        raise ValueError(f"corrections must not be negative, got {corrections}")
    result = photo.copy()
    if count == 0:
        return result
    masks = masks.detach().float().clamp(0, 1)
    change = protected.detach().float() - originals.detach().float()
    if not bool(torch.isfinite(change).all()):
        raise ValueError("crops are not finite")
    change = torch.where(masks > 0, change, 0) if masked else change * masks
    matrices = crop_transform(quads.double().cpu(), size)
    boxes = [_support(mask[0].cpu(), matrix, photo.shape[:2]) for mask, matrix in zip(masks, matrices, strict=True)]
    for (left, top, right, bottom), faces in _together(boxes):
        shape = (bottom - top, right - left)
        total, weight = torch.zeros(3, *shape), torch.zeros(1, *shape)
        for i in faces:
            x0, y0, x1, y1 = boxes[i]
            part, mask = _to_photo(change[i], masks[i], matrices[i], boxes[i], corrections)
            rows, columns = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
            # With ``masked`` the change is as if the weight were the mask too.
            total[:, rows, columns] += part.cpu()
            weight[:, rows, columns] += mask.cpu()
        total *= 127.5 / weight.clamp_min(1)
        region = result[top:bottom, left:right]
        changed = torch.from_numpy(region.copy()).permute(2, 0, 1).float().add_(total).round_().clamp_(0, 255)
        region[:] = changed.to(torch.uint8).permute(1, 2, 0).numpy()
    return result


def _support(mask: Tensor, matrix: Tensor, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Pixels of the photo (left, top, right, bottom; may be empty) that a crop's mask touches."""
    rows, columns = torch.nonzero(mask.amax(1))[:, 0], torch.nonzero(mask.amax(0))[:, 0]
    if len(rows) == 0:
        return 0, 0, 0, 0
    x0, x1, y0, y1 = (float(v) for v in (columns[0] - 1, columns[-1] + 1, rows[0] - 1, rows[-1] + 1))
    corners = torch.tensor([[x0, y0], [x0, y1], [x1, y1], [x1, y0]], dtype=matrix.dtype)
    corners = corners @ matrix[:2, :2].mT + matrix[:2, 2]
    low, high = corners.amin(0).tolist(), corners.amax(0).tolist()
    left, top = max(0, math.floor(low[0])), max(0, math.floor(low[1]))
    right, bottom = min(shape[1], math.ceil(high[0]) + 1), min(shape[0], math.ceil(high[1]) + 1)
    return (left, top, right, bottom) if right > left and bottom > top else (0, 0, 0, 0)


def _together(boxes: list[tuple[int, int, int, int]]) -> Iterator[tuple[tuple[int, int, int, int], list[int]]]:
    """Groups of faces whose boxes overlap, each with the box about it: far apart faces need no common canvas."""
    groups = [(box, [i]) for i, box in enumerate(boxes) if box[2] > box[0]]
    merged = True
    while merged:
        merged = False
        for a in range(len(groups)):
            for b in range(a + 1, len(groups)):
                (p, members), (q, others) = groups[a], groups[b]
                if p[0] < q[2] and q[0] < p[2] and p[1] < q[3] and q[1] < p[3]:
                    box = (min(p[0], q[0]), min(p[1], q[1]), max(p[2], q[2]), max(p[3], q[3]))
                    groups[a] = (box, sorted(members + others))
                    del groups[b]
                    merged = True
                    break
            if merged:
                break
    yield from groups


def _to_photo(
    change: Tensor, mask: Tensor, matrix: Tensor, box: tuple[int, int, int, int], corrections: int
) -> tuple[Tensor, Tensor]:
    """A crop's change (3, S, S) and mask (1, S, S) on the photo's pixels of the box."""
    left, top, right, bottom = box
    shape, device = (bottom - top, right - left), change.device
    matrix = matrix.clone()
    matrix[:2, 2] -= matrix.new_tensor([left, top])
    from_crop = matrix[None].to(device, torch.float32)
    to_crop = invert_affine(matrix)[None].to(device, torch.float32)
    weight = warp_affine(mask[None], to_crop, shape)[0]
    inside = weight > 0

    def spread(x: Tensor) -> Tensor:
        return torch.where(inside, warp_affine(x[None], to_crop, shape, mode="bicubic")[0], 0)

    part = spread(change)
    for _ in range(corrections):
        seen = warp_affine(part[None], from_crop, change.shape[-1])[0]
        # Only where the mask is: at its rim, and beyond the photo's edge, nothing can be made up for.
        part = part + spread((change - seen) * mask)
    # Bicubic interpolation and back-projection swing beyond what there is: no pixel of the photo changes more than one
    # of the crop did.
    most = change.abs().amax()
    return part.clamp(-most, most), weight
