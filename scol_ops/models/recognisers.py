"""Face recognisers behind one differentiable interface: photo or FFHQ crop in, unit embeddings out.

Each network does its own alignment, from the same landmarks and boxes, so that it sees faces as it was measured with
(its card in ``data/`` tells how) wherever they come from.  A recogniser used inside the method never judges it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scol_ops.warp import GeometryError, invert_affine, similarity_transform, warp_affine

# Mean positions of the five landmarks in a 112 x 112 picture that ArcFace's training faces were aligned to, and most
# recognisers' since (github.com/deepinsight/insightface, face_align).
ARCFACE_LANDMARKS = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
# Where MTCNN finds faces in the embedded generator's pictures, as shares of the crop's side from its corner: mean of
# 64 faces (truncation 0.7, seed 11, 256 px), made symmetrical.  Standard deviations: eyes 0.005, mouth 0.014, nose
# 0.032 across and 0.015 down (it shows the pose), box 0.02 to 0.045.
_FFHQ_LANDMARKS = ((0.3737, 0.4724), (0.6263, 0.4724), (0.5, 0.6245), (0.3795, 0.7314), (0.6205, 0.7314))
_FFHQ_BOX = (0.2236, 0.1797, 0.7764, 0.9201)


def ffhq_mean_geometry(batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Landmarks and boxes for crops whose own nobody has detected: generated faces lie where FFHQ's faces do.

    Detected ones are better, the nose above all: see the measured agreement in ``data/*.md``.

    Args:
        batch: number of crops B.
        size: their side in pixels.

    Returns:
        (B, 5, 2) and (B, 4), float32, pixels of the crop.
    """
    landmarks, box = torch.tensor(_FFHQ_LANDMARKS) * size - 0.5, torch.tensor(_FFHQ_BOX) * size - 0.5
    return landmarks.repeat(batch, 1, 1), box.repeat(batch, 1)


class Recogniser(nn.Module, ABC):
    """A face recogniser: alignment and network together.

    A subclass sets the class attributes and writes ``alignment`` and ``embed_aligned``.

    Attributes:
        name: key of the registry.
        dim: length of an embedding.
        input_size: side of the aligned picture in pixels.
        threshold: cosine above which two faces count as one person: a false accept rate of 1 % over LFW's pairs.
            Source: measured, see the network's card in ``data/``.
        hidden_below: cosine to the very photo up to which other photos of the person are another's: the bar of a judge.
            Source: measured on development people, docs/results.md. None of networks that were not: their bar is the
            threshold, which is harder.
        fingerprint: first 16 hex digits of the weights' sha256; set by ``load_recogniser``, empty before.
    """

    name: ClassVar[str]
    dim: ClassVar[int]
    input_size: ClassVar[int]
    threshold: ClassVar[float]
    hidden_below: ClassVar[float | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.fingerprint = ""

    @abstractmethod
    def alignment(self, landmarks: Tensor, boxes: Tensor) -> Tensor:
        """(B, 5, 2) landmarks and (B, 4) boxes in a picture -> (B, 2, 3), aligned pixel -> that picture's pixel."""

    @abstractmethod
    def embed_aligned(self, aligned: Tensor) -> Tensor:
        """The network alone: (B, 3, input_size, input_size) in [-1, 1] -> (B, dim), unit norm."""

    def align(self, images: Tensor, landmarks: Tensor, boxes: Tensor) -> Tensor:
        """Cut the network's input out of pictures; outside a picture is black.

        Args:
            images: (B, 3, H, W) in [-1, 1], or (1, 3, H, W): one picture with B faces.
            landmarks: (B, 5, 2) x, y in pixels of the picture, in design.md's order.
            boxes: (B, 4) x0, y0, x1, y1 in pixels, as MTCNN draws them (forehead to chin).

        Returns:
            (B, 3, input_size, input_size), differentiable to ``images``.  Shrinking is filtered, see
            ``warp.warp_affine``.

        Raises:
            ValueError: wrong shapes.
            GeometryError: landmarks that coincide, empty boxes, numbers that are not finite.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"pictures must be (B, 3, H, W), got {tuple(images.shape)}")
        if landmarks.ndim != 3 or landmarks.shape[1:] != (5, 2):
            raise ValueError(f"landmarks must be (B, 5, 2), got {tuple(landmarks.shape)}")
        if boxes.shape != (len(landmarks), 4):
            raise ValueError(f"boxes must be ({len(landmarks)}, 4), got {tuple(boxes.shape)}")
        dtype = torch.promote_types(images.dtype, torch.float32)
        landmarks, boxes = (t.to(device=images.device, dtype=dtype) for t in (landmarks, boxes))
        return warp_affine(images, self.alignment(landmarks, boxes), self.input_size, fill=-1.0)

    def embed_photo(self, photo: Tensor, landmarks: Tensor, boxes: Tensor) -> Tensor:
        """Embed all faces of one photo.

        Args:
            photo: (1, 3, H, W) RGB in [-1, 1].
            landmarks: (B, 5, 2) in the photo's pixels.
            boxes: (B, 4) in the photo's pixels.

        Returns:
            (B, dim), unit norm, differentiable to the photo's pixels.

        Raises:
            ValueError, GeometryError: see ``align``.
        """
        if photo.ndim != 4 or photo.shape[0] != 1:
            raise ValueError(f"photo must be (1, 3, H, W), got {tuple(photo.shape)}")
        return self.embed_aligned(self.align(photo, landmarks, boxes))

    def embed_crops(self, crops: Tensor, landmarks_in_crop: Tensor, boxes_in_crop: Tensor) -> Tensor:
        """Embed one face in each FFHQ crop: the same warp as from a photo, in the crops' pixels.

        ``warp.transform_points`` and ``warp.transform_boxes`` with ``invert_affine(crop_transform(quad, S))`` bring
        a photo's landmarks and boxes here; ``ffhq_mean_geometry`` gives them for generated faces.

        Args:
            crops: (B, 3, S, S) RGB in [-1, 1].
            landmarks_in_crop: (B, 5, 2) in the crops' pixels.
            boxes_in_crop: (B, 4) in the crops' pixels.

        Returns:
            (B, dim), unit norm, differentiable to the crops' pixels.

        Raises:
            ValueError, GeometryError: see ``align``.
        """
        if crops.ndim != 4 or len(crops) != len(landmarks_in_crop):
            raise ValueError(f"{tuple(crops.shape)} crops do not go with {len(landmarks_in_crop)} sets of landmarks")
        return self.embed_aligned(self.align(crops, landmarks_in_crop, boxes_in_crop))

    def forward(self, crops: Tensor, landmarks_in_crop: Tensor, boxes_in_crop: Tensor) -> Tensor:
        """``embed_crops``."""
        return self.embed_crops(crops, landmarks_in_crop, boxes_in_crop)


def landmark_alignment(landmarks: Tensor, template: Tensor) -> Tensor:
    """Aligned pixel -> picture pixel, from the similarity that brings (B, 5, 2) landmarks nearest to a (5, 2) template.

    Raises:
        GeometryError: see ``warp.similarity_transform``.
    """
    return invert_affine(similarity_transform(landmarks, template))


def box_alignment(boxes: Tensor, scale: float, size: int) -> Tensor:
    """Aligned pixel -> picture pixel, for an upright square about each box's centre.

    Args:
        boxes: (B, 4) x0, y0, x1, y1 in pixels.
        scale: side of the square over the box's longer side.
        size: side of the aligned picture in pixels.

    Raises:
        GeometryError: empty or non-finite boxes.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    side = (high - low).amax(1)
    if not bool((torch.isfinite(boxes).all(1) & (high > low).all(1)).all()):
        raise GeometryError("boxes must be finite, with x0 < x1 and y0 < y1")
    step = scale * side / size
    shift = (low + high) / 2 - step[:, None] * (size - 1) / 2
    linear = torch.eye(2, dtype=boxes.dtype, device=boxes.device) * step[:, None, None]
    return torch.cat([linear, shift[:, :, None]], dim=2)


def unit(embedding: Tensor) -> Tensor:
    """L2-normalise (B, dim)."""
    return F.normalize(embedding, dim=1)
