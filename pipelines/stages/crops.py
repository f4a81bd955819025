"""Crops, codes and geometry of a row as tensors, and back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.config.sections import Config
from pipelines.run import schemas
from scol_ops.metrics import to_uint8
from scol_ops.paste import change_mask
from scol_ops.warp import crop_transform, invert_affine, transform_boxes, transform_points


def encode_png(picture: Tensor) -> bytes:
    """(1, 3, S, S) or (3, S, S) in [-1, 1] to PNG, rounded to 8 bits."""
    pixels = to_uint8(picture[0] if picture.ndim == 4 else picture)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def decode_png(data: bytes, device: torch.device | str = "cpu") -> Tensor:
    """PNG to (1, 3, S, S) float32 in [-1, 1]."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return to_tensor(np.asarray(image.convert("RGB")), device)


def to_tensor(pixels: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (H, W, 3) to (1, 3, H, W) float32 in [-1, 1]."""
    tensor = torch.from_numpy(np.array(pixels)).to(device)
    return tensor.permute(2, 0, 1)[None].float() / 127.5 - 1


def geometry_in_crop(
    row: Mapping[str, Any], size: int, device: torch.device, prefix: str = ""
) -> tuple[Tensor, Tensor]:
    """A face's landmarks (1, 5, 2) and box (1, 4) in pixels of its crop, float32."""
    quad = torch.from_numpy(np.array(row[prefix + "quad"], np.float64)).reshape(4, 2)
    to_crop = invert_affine(crop_transform(quad, size))
    landmarks = torch.from_numpy(np.array(row[prefix + "landmarks"], np.float64)).reshape(5, 2)
    box = torch.from_numpy(np.array(row[prefix + "box"], np.float64)).reshape(1, 4)
    landmarks = transform_points(landmarks, to_crop)[None].float().to(device)
    return landmarks, transform_boxes(box, to_crop).float().to(device)


def allowed(landmarks: Tensor, config: Config) -> Tensor:
    """Where, and how much, a face with these landmarks (1, 5, 2) in its crop may change: (1, 1, S, S) in [0, 1]."""
    return change_mask(landmarks, config.crop_size, scale=config.mask.scale, features=config.mask.features)


def photo_side(row: Mapping[str, Any], prefix: str = "") -> float:
    """Side of a face's crop in pixels of its photo (mean of the quad's four)."""
    corners = np.array(row[prefix + "quad"], np.float64).reshape(4, 2)
    return float(np.linalg.norm(corners - np.roll(corners, 1, axis=0), axis=1).mean())


def as_codes(vector: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """A manifest's vector to (1, L, 512)."""
    array = np.array(vector, np.float32).reshape(1, -1, schemas.CODE_DIM)
    return torch.from_numpy(array).to(device)


def as_vector(codes: Tensor) -> np.ndarray:
    """(1, L, 512) or (L, 512) to a manifest's vector of L x 512 float32."""
    return codes.detach().float().cpu().reshape(-1).numpy()
