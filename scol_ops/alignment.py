"""FFHQ alignment: landmarks to the square that a face is cut out by, and the crop.

The quad follows the rule of the FFHQ data set (Karras et al. 2019, arXiv:1812.04948, section A and its
published alignment script): centred slightly below the eyes, its half side the larger of twice the eye distance
and 1.8 times the eye-to-mouth distance, turned with the face.  Two departures: the eye centres and mouth
corners come from MTCNN's five landmarks instead of 68, and beyond the photo's border the picture is mirrored
without FFHQ's blur, so that nothing is invented that pasting would have to take back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scol_ops.warp import GeometryError, crop_transform, warp_affine


def ffhq_quads(landmarks: Tensor) -> Tensor:
    """The FFHQ square of each face.

    Args:
        landmarks: (B, 5, 2) x, y in the photo's pixels: left eye, right eye, nose, left and right mouth corner.

    Returns:
        (B, 4, 2) float64 corners: top-left, bottom-left, bottom-right, top-right.

    Raises:
        ValueError: another shape.
        GeometryError: landmarks that coincide or are not finite, so that no direction can be told.
    """
    if landmarks.ndim != 3 or landmarks.shape[1:] != (5, 2):
        raise ValueError(f"landmarks must be (B, 5, 2), got {tuple(landmarks.shape)}")
    left_eye, right_eye, _, left_mouth, right_mouth = landmarks.double().unbind(1)
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    eye_to_eye, eye_to_mouth = right_eye - left_eye, mouth - eyes
    # Along the eyes, corrected by what the mouth says about "down".
    along = eye_to_eye - torch.stack((-eye_to_mouth[:, 1], eye_to_mouth[:, 0]), dim=1)
    length = along.norm(dim=1, keepdim=True)
    if not bool((torch.isfinite(length) & (length > 1e-3)).all()):
        raise GeometryError("landmarks do not tell a face's direction")
    half = torch.maximum(2.0 * eye_to_eye.norm(dim=1), 1.8 * eye_to_mouth.norm(dim=1))[:, None]
    x = along / length * half
    y = torch.stack((-x[:, 1], x[:, 0]), dim=1)
    centre = eyes + 0.1 * eye_to_mouth
    return torch.stack((centre - x - y, centre - x + y, centre + x + y, centre + x - y), dim=1)


def align_crops(photo: Tensor, quads: Tensor, size: int = 256) -> Tensor:
    """Cut faces out of one photo.

    Smaller faces are enlarged by bicubic interpolation (the paper enlarges them too), larger ones are
    averaged down without aliasing (``warp.warp_affine``); outside the photo its mirror image is seen.

    Args:
        photo: (1, 3, H, W) in [-1, 1].
        quads: (B, 4, 2) from ``ffhq_quads``.
        size: side of the crops in pixels.

    Returns:
        (B, 3, size, size) in [-1, 1].

    Raises:
        ValueError, GeometryError: see ``warp.crop_transform`` and ``warp.warp_affine``.
    """
    matrices = crop_transform(quads.to(photo.device), size)
    return warp_affine(photo, matrices, size, padding="reflection", mode="bicubic").clamp(-1, 1)
