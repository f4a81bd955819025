"""Aligned faces of a folder of photos, for measuring (never for training)."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.archive.reading import read_bytes
from pipelines.archive.source import list_photos
from pipelines.photos.codec import decode
from pipelines.photos.photo import PhotoError
from scol_ops.alignment import align
from scol_ops.detection import FaceDetector
from scol_ops.warp import crop_transform, invert_affine, transform_boxes


def aligned_faces(folder: Path, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest face of each of ``count`` random photos with a face.

    Returns:
        crops (N, 3, 256, 256) in [-1, 1], landmarks (N, 5, 2) and boxes (N, 4) in the crops' pixels; N <= count.
    """
    rows = [row for row in list_photos(str(folder)) if row.error is None]
    random.Random(seed).shuffle(rows)
    detector = FaceDetector()
    crops, landmarks, boxes = [], [], []
    for row in rows:
        if len(crops) == count:
            break
        try:
            pixels = decode(read_bytes(row.url, 1 << 29)).pixels
        except PhotoError:
            continue
        faces = detector.detect([pixels])[0]
        if not faces:
            continue
        found = align(pixels, faces[0].landmarks)
        crops.append(found.crops)
        landmarks.append(found.landmarks[0])
        to_crop = invert_affine(crop_transform(found.quads[0], 256))
        boxes.append(transform_boxes(torch.from_numpy(faces[0].box.astype(np.float64))[None], to_crop)[0].float())
    return torch.cat(crops), torch.stack(landmarks), torch.stack(boxes)
