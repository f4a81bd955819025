"""Alignment: from five landmarks to a square crop placed like FFHQ's, and back.

Source of the rule: Karras et al., "A Style-Based Generator Architecture for Generative Adversarial Networks", CVPR
2019, appendix C, and its data set's script (github.com/NVlabs/ffhq-dataset).  Readings of ours:

- FFHQ takes eye centres and mouth corners from 68 landmarks; a detector's five are the same points.
- Where the crop reaches over the photo's edge the photo is mirrored, as in FFHQ; FFHQ then blurs the mirrored part and
  fades it into the median colour.  That is left out: it changes pixels inside the photo too, and nothing outside it is
  ever pasted back.
- FFHQ shrinks through two resizes; here ``warp_affine`` averages over each crop pixel's own area.  Faces smaller than
  the crop are enlarged by bicubic interpolation (as the method's paper has it: "smaller faces are upscaled").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scol_ops.warp import GeometryError, crop_transform, invert_affine, transform_points, warp_affine

# Beyond this many photo pixels per crop pixel the mean of many bilinear samples is as good as of bicubic ones.
_BICUBIC_UP_TO = 1.5


@dataclass(frozen=True, eq=False)
class Alignment:
    """Faces of one photo, cut out.

    Attributes:
        crops: float32 (N, 3, S, S), RGB in [-1, 1].
        quads: float64 (N, 4, 2) corners in the photo: top-left, bottom-left, bottom-right, top-right.
        landmarks: float32 (N, 5, 2) in pixels of the crops.
    """

    crops: Tensor
    quads: Tensor
    landmarks: Tensor

    @property
    def size(self) -> int:
        """Side of the crops in pixels."""
        return self.crops.shape[-1]


def ffhq_quads(landmarks: Tensor) -> Tensor:
    """Corners of the FFHQ crop about each face.

    With e the vector between the eyes, m the one from their middle to the mouth's, and R a quarter turn: the crop's
    x axis lies along e - R m, half its side is the larger of 2 |e| and 1.8 |m|, and its centre is a tenth of m below
    the eyes' middle.

    Args:
        landmarks: (N, 5, 2) left eye (image left), right eye, nose, left and right mouth corner, in pixels.

    Returns:
        float64 (N, 4, 2), top-left, bottom-left, bottom-right, top-right; the corners of the crop's area.  It may
        reach over the photo's edges.

    Raises:
        ValueError: wrong shape.
        GeometryError: points that are not finite or coincide.
    """
    if landmarks.ndim != 3 or landmarks.shape[1:] != (5, 2):
        raise ValueError(f"landmarks must be (N, 5, 2), got {tuple(landmarks.shape)}")
    left_eye, right_eye, _, left_mouth, right_mouth = landmarks.double().unbind(1)
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    across, down = right_eye - left_eye, mouth - eyes
    x = across + torch.stack([down[:, 1], -down[:, 0]], 1)
    length = x.norm(dim=1, keepdim=True)
    if not bool((torch.isfinite(length) & (length > 1e-6)).all()):
        raise GeometryError("eyes and mouth coincide or are not finite: no crop")
    half = torch.maximum(2.0 * across.norm(dim=1, keepdim=True), 1.8 * down.norm(dim=1, keepdim=True))
    x = x / length * half
    y = torch.stack([-x[:, 1], x[:, 0]], 1)
    centre = eyes + 0.1 * down
    return torch.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y], 1)


def _window(low: float, high: float, size: int) -> tuple[int, int]:
    """Pixels along one axis from which a crop covering low..high is interpolated, mirrored parts included."""
    start, stop = math.floor(low) - 3, math.ceil(high) + 4
    if start < 0:  # what lies outside is the mirror image of as much inside
        stop = max(stop, -start)
    if stop > size:
        start = min(start, 2 * size - stop)
    start, stop = max(0, start), min(size, stop)
    # A crop wholly beyond the photo: any piece will do, mirrored again and again.
    return (start, stop) if stop - start >= 1 else (0, size)


def align_crops(photo: Tensor | np.ndarray, quads: Tensor, size: int = 256) -> Tensor:
    """Cut squares out of one photo.

    Args:
        photo: float (1, 3, H, W) in [-1, 1], or a uint8 array (H, W, 3), of which only the pixels about the faces are
            converted.
        quads: (N, 4, 2) squares, see ``ffhq_quads``.
        size: side of the crops.

    Returns:
        float32 (N, 3, size, size) in [-1, 1], on the photo's device; each face's crop is the same alone or with
        others.  Outside the photo: its mirror image.

    Raises:
        ValueError: wrong shapes or dtype.
        GeometryError: a quad is not a square.
    """
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or 0 in photo.shape:
            raise ValueError(f"photo must be uint8 (H, W, 3), got {photo.dtype} {photo.shape}")
        height, width = photo.shape[:2]
        device = torch.device("cpu")
    else:
        if photo.ndim != 4 or photo.shape[:2] != (1, 3) or not photo.is_floating_point() or 0 in photo.shape:
            raise ValueError(f"photo must be float (1, 3, H, W), got {photo.dtype} {tuple(photo.shape)}")
        height, width = photo.shape[2:]
        device = photo.device
    matrices = crop_transform(quads.double().cpu(), size)
    crops = []
    for quad, matrix in zip(quads.double().cpu(), matrices, strict=True):
        low, high = quad.amin(0).tolist(), quad.amax(0).tolist()
        (left, right), (top, bottom) = _window(low[0], high[0], width), _window(low[1], high[1], height)
        if isinstance(photo, np.ndarray):
            part = torch.from_numpy(np.array(photo[top:bottom, left:right])).permute(2, 0, 1)[None].float()
            part = part / 127.5 - 1
        else:
            part = photo[:, :, top:bottom, left:right].float()
        matrix = matrix.clone()
        matrix[:2, 2] -= matrix.new_tensor([left, top])
        scale = float(torch.linalg.det(matrix[:2, :2]).abs().sqrt())
        mode = "bicubic" if scale <= _BICUBIC_UP_TO else "bilinear"
        crop = warp_affine(part, matrix[None].float().to(device), size, padding="reflection", mode=mode)
        crops.append(crop.clamp(-1, 1))
    return torch.cat(crops) if crops else torch.zeros(0, 3, size, size, device=device)


def landmarks_in_crops(landmarks: Tensor, quads: Tensor, size: int = 256) -> Tensor:
    """Landmarks (N, K, 2) of the photo in pixels of the crops that the quads (N, 4, 2) cut, float32.

    Raises:
        ValueError: wrong shapes.
        GeometryError: a quad is not a square.
    """
    inverse = invert_affine(crop_transform(quads.double(), size))
    return transform_points(landmarks.double(), inverse).float()


def align(photo: Tensor | np.ndarray, landmarks: Tensor | np.ndarray, size: int = 256) -> Alignment:
    """Cut out the faces of one photo like FFHQ's: ``ffhq_quads``, ``align_crops``, ``landmarks_in_crops``.

    Args:
        photo: as in ``align_crops``.
        landmarks: (N, 5, 2) or (5, 2), in pixels of the photo.
        size: side of the crops.

    Raises:
        ValueError, GeometryError: as those functions do.
    """
    landmarks = torch.as_tensor(landmarks)
    if landmarks.ndim == 2:
        landmarks = landmarks[None]
    quads = ffhq_quads(landmarks)
    return Alignment(align_crops(photo, quads, size), quads, landmarks_in_crops(landmarks, quads, size))
