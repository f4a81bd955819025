"""Aligned faces of photos, for measuring (never for training)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.archive.reading import read_bytes
from pipelines.archive.source import list_photos
from pipelines.photos.codec import decode
from pipelines.photos.photo import PhotoError
from scol_ops.alignment import align
from scol_ops.detection import FaceDetector
from scol_ops.warp import crop_transform, invert_affine, transform_boxes


def largest_faces(
    photos: Iterable[NDArray], detector: FaceDetector
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """The largest face of each photo that shows one.

    Args:
        photos: (H, W, 3) uint8 each.
        detector: finds them.

    Yields:
        the photo's number; the crop (3, 256, 256) in [-1, 1]; landmarks (5, 2) and box (4,) in the crop's pixels.
    """
    for number, pixels in enumerate(photos):
        faces = detector.detect([pixels])[0]
        if faces:
            found = align(pixels, faces[0].landmarks)
            to_crop = invert_affine(crop_transform(found.quads[0], found.size))
            box = transform_boxes(torch.from_numpy(faces[0].box)[None].double(), to_crop)[0].float()
            yield number, found.crops[0], found.landmarks[0], box


def aligned_faces(folder: Path, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest face of each of ``count`` random photos with a face.

    Returns:
        crops (N, 3, 256, 256) in [-1, 1], landmarks (N, 5, 2) and boxes (N, 4) in the crops' pixels; N <= count.
    """
    rows = [row for row in list_photos(str(folder)) if row.error is None]
    random.Random(seed).shuffle(rows)

    def photos() -> Iterator[NDArray]:
        for row in rows:
            try:
                yield decode(read_bytes(row.url, 1 << 29)).pixels
            except PhotoError:
                continue

    _, *faces = zip(*islice(largest_faces(photos(), FaceDetector()), count), strict=True)
    crops, landmarks, boxes = map(torch.stack, faces)
    return crops, landmarks, boxes
